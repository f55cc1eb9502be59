"""The stages that train: SFT on given examples; RL on rewards, with hints or process credit."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from intfast import collect, credit, faults, forward, loss, parity
from intfast.batch import Batch, Packed, pack, split
from intfast.course import Course, finished
from intfast.engine.protocol import derive_seed
from intfast.intervene import REACHED_CONTINUATION
from intfast.methods import process_credit
from intfast.methods.process_credit import Located
from intfast.model.decoder import Decoder
from intfast.model.optim import Optimizer, StepStats
from intfast.records import Example, Intervention, Problem
from intfast.run import Run
from intfast.sample import Graded, Start
from intfast.state import interrupt

Hints = Mapping[str, list[int]]
"""Problem id -> the prompt ids of the problem with its hint."""
Task = tuple[Problem, list[int] | None]
"""A problem and, for its guided version, the prompt with the hint."""


# --- one update --------------------------------------------------------------------------------


def update(
    run: Run, optimizer: Optimizer, packed: Packed, divisor: float, loss_of: forward.LossOf
) -> tuple[dict[str, float], StepStats]:
    """One optimizer step on the micro-batches of `packed`; the engine is told of it.

    The loss of every micro-batch is divided by the same count, taken over all of them.
    """
    total: loss.Stats | None = None
    for index, batch in enumerate(packed.batches):
        interrupt.beat()
        batch = batch.to(run.device)
        hidden_ND = forward.hidden_states(run.decoder, batch, run.device)
        loss_sum, stats = loss_of(hidden_ND, batch, index)
        (loss_sum / divisor).backward()
        total = loss.merge_stats(total, stats)
    assert total is not None
    values = loss.read_stats(total)
    values["loss"] = values.pop("loss_sum") / divisor
    stepped = optimizer.step(
        loss=values["loss"],
        diagnose=lambda: faults.first_non_finite(run, optimizer, packed, divisor, loss_of),
    )
    run.sampler.engine.weights_changed()
    return values, stepped


# --- supervised --------------------------------------------------------------------------------


class NoExamples(ValueError):
    """The data of the SFT stage came out empty."""


def _why_no_examples(run: Run) -> str:
    """What the records say, and what would help: a looser filter only where one held anything."""
    if run.config.sft.data != "intervention":
        return (
            "sft.data gave no example: the model was right in none of the samples it could come "
            "from; draw more of them, or take another sft.data"
        )
    records = run.folder.journal("interventions", Intervention).records
    gates = Counter(record.gate for record in records)
    said = ", ".join(f"{count} {gate}" for gate, count in gates.most_common()) or "none was drawn"
    helps = "read the replies in interventions.jsonl; more attempts, or a stronger base model, help"
    if gates.keys() & set(REACHED_CONTINUATION):
        helps = "draw more continuations, or set sft.filter = false; more attempts help too"
    return f"no intervention is left to fine-tune on ({said}): {helps}"


def sft(run: Run, name: str, examples: Sequence[Example]) -> None:
    """Fine-tune the base model on the examples; the result is the weights `name`."""
    config = run.config.sft
    if finished(run, name):
        return
    if not examples:
        raise NoExamples(_why_no_examples(run))
    steps_per_epoch = -(-len(examples) // config.batch_size)
    total_steps = config.epochs * steps_per_epoch

    def loss_of(hidden_ND: Tensor, batch: Batch, index: int) -> tuple[Tensor, loss.Stats]:
        return loss.sft_loss(hidden_ND, run.decoder.head_weight_VD, batch)

    with (
        Course(run, name, "base", config.optim, total_steps) as course,
        run.updating(),
        run.metrics.progress(name, total_steps) as advance,
    ):
        for step in range(course.step, total_steps):
            epoch, place = divmod(step, steps_per_epoch)
            order = _shuffled(len(examples), derive_seed(run.config.seed, "sft", epoch))
            chosen = order[place * config.batch_size : (place + 1) * config.batch_size]
            with run.metrics.phase("train"):
                packed = pack([examples[i] for i in chosen], run.config.batch)
                values, stepped = update(run, course.optimizer, packed, packed.weight_sum, loss_of)
            advance(1, packed.num_tokens)
            skipped = f"  SKIPPED, not finite: {stepped.cause}" if stepped.skipped else ""
            line = f"{name} {step + 1}/{total_steps}  nll {values['nll_mean']:.4f}{skipped}"
            run.metrics.row(name, step + 1, values | stepped.row(), line)
            # A checkpoint an epoch: SFT is short beside the stages around it.
            is_last = step + 1 == total_steps
            course.finished_step(save=place == steps_per_epoch - 1, finished=is_last)


def _shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


# --- reinforcement -----------------------------------------------------------------------------


class Rollouts(NamedTuple):
    """The groups that one step learns from, where the stream of problems stands, and counts."""

    starts_P: list[Start]
    groups_P_G: list[list[Graded]]
    cursor: int
    drawn: dict[str, float]
    located_P_G: list[list[Located | None]] | None = None


def rl(
    run: Run, name: str, start: str, problems: Sequence[Problem], hints: Hints | None = None
) -> None:
    """GRPO on the outcome from the weights `start`; the result is the weights `name`.

    Problems with a hint appear once bare and once with it, in the same stream. A hint is prompt:
    it carries no loss.
    """
    config = run.config.rl
    if finished(run, name):
        return
    if not problems:
        raise ValueError(
            'rl.problems = "unlocked" leaves no problem: no intervention was kept; '
            'use rl.problems = "selected"'
        )
    reference = None
    if config.policy.kl:
        run.hold(start)
        reference = copy.deepcopy(run.decoder).requires_grad_(False)
    total_steps = config.steps * config.minibatches
    tasks: list[Task] = [(problem, None) for problem in problems]
    tasks += [(problem, hints[problem.id]) for problem in problems if problem.id in (hints or {})]
    collected = sum(collect.generated_tokens(run).values()) if config.until_tokens else 0
    check_every, evaluate_every = run.config.parity.every, config.evaluate_every
    with Course(run, name, start, config.optim, total_steps) as course:
        done, last = course.step, False
        parity.before_generating(run)
        while not last:
            # Of the weights after the step before, here and not there: it can be broken off.
            due = evaluate_every and course.step % evaluate_every == 0
            if course.step and (due or course.step == config.steps):
                collect.evaluation(run, name, course.step)
            step = course.step + 1
            rollouts = draw(run, name, tasks, course.state.get("cursor", 0))
            if step == done + 1 or (check_every and step % check_every == 0):
                where = f"{name} step {step}"
                parity.check_rollouts(run, where, rollouts.starts_P, rollouts.groups_P_G)
            rollouts = _locate(run, rollouts, step)
            with run.updating():
                values = rollouts.drawn | learn(run, course.optimizer, rollouts, step, reference)
            run.metrics.row(name, step, values, _line(name, step, config.steps, values))
            last = step >= config.steps and (
                not config.until_tokens
                or collected + collect.rl_tokens(run, name) >= config.until_tokens
            )
            save = last or step % config.checkpoint_every == 0
            course.finished_step(save=save, finished=last, cursor=rollouts.cursor)


def _line(name: str, step: int, total: int, values: dict[str, float]) -> str:
    line = (
        f"{name} {step}/{total}  reward {values['reward']:.3f}  "
        f"zero-advantage {values['zero_advantage']:.2f} (all wrong {values['all_wrong']:.2f}, "
        f"all right {values['all_right']:.2f})  length {values['length']:.0f}"
    )
    if not values["updates"]:
        return line + "  no update: no group has variance"
    skipped = f"  SKIPPED, not finite: {values['cause']}" if values["skipped"] else ""
    return line + f"  entropy {values['entropy_mean']:.3f}{skipped}"


def draw(run: Run, name: str, tasks: Sequence[Task], cursor: int) -> Rollouts:
    """Rollouts of the next tasks of the stream, which repeats in a new order every epoch.

    Dynamic sampling (`rl.refill`): groups without variance are replaced by those of the next
    problems, for at most so many rounds; what is still missing then is missing in the step.
    """
    config = run.config.rl
    starts_P: list[Start] = []
    groups_P_G: list[list[Graded]] = []
    drawn: list[tuple[Start, list[Graded]]] = []
    for _ in range(1 + config.refill):
        wanted = config.problems_per_step - len(starts_P)
        starts = [_start(run, tasks, place) for place in range(cursor, cursor + wanted)]
        cursor += wanted
        with run.metrics.progress(f"{name} rollouts", wanted * config.group_size) as advance:
            new_P_G = run.sampler.sample(starts, config.sampling, advance)
        drawn += zip(starts, new_P_G, strict=True)
        for start, group in zip(starts, new_P_G, strict=True):
            if not config.refill or _has_variance(group):
                starts_P.append(start)
                groups_P_G.append(group)
        if len(starts_P) == config.problems_per_step:
            break
    values = _counts(run, [group for _, group in drawn])
    bare = [group for start, group in drawn if start.prompt_ids is None]
    if len(bare) < len(drawn):
        # What hints earn says nothing of the problems themselves.
        values["reward_bare"] = _counts(run, bare)["reward"] if bare else None
    return Rollouts(starts_P, groups_P_G, cursor, values)


def _locate(run: Run, rollouts: Rollouts, step: int) -> Rollouts:
    """The rollouts with the wrong steps that `credit.process` needs, and what finding them took."""
    config = run.config
    if config.rl.credit.process == "none":
        return rollouts
    problems_P = [start.problem for start in rollouts.starts_P]
    groups_P_G = rollouts.groups_P_G
    seed = derive_seed(config.seed, "process", step)
    located_P_G, counts = process_credit.locate(
        run.sampler, problems_P, groups_P_G, config.intervene, config.rl.credit, seed
    )
    return rollouts._replace(located_P_G=located_P_G, drawn=rollouts.drawn | counts)


def _start(run: Run, tasks: Sequence[Task], place: int) -> Start:
    """The task at a place of the endless stream, with its seeds."""
    seed = run.config.seed
    epoch, index = divmod(place, len(tasks))
    problem, prompt_ids = tasks[_shuffled(len(tasks), derive_seed(seed, "rl-order", epoch))[index]]
    samples = range(run.config.rl.group_size)
    seeds = [derive_seed(seed, "rl", place, problem.id, sample) for sample in samples]
    return Start(problem, seeds, prompt_ids=prompt_ids)


def _rewards(groups_P_G: Sequence[Sequence[Graded]]) -> list[list[float | None]]:
    return [[credit.REWARDS[graded.grade.status] for graded in group] for group in groups_P_G]


def _has_variance(group: Sequence[Graded]) -> bool:
    scored = {reward for reward in _rewards([group])[0] if reward is not None}
    return len(scored) > 1


def _counts(run: Run, drawn_P_G: Sequence[Sequence[Graded]]) -> dict[str, float]:
    """What a step drew, groups that were replaced included."""
    rewards_P_G = _rewards(drawn_P_G)
    found = credit.group_advantages(rewards_P_G, run.config.rl.credit)
    scored = [reward for group in rewards_P_G for reward in group if reward is not None]
    flat = [graded for group in drawn_P_G for graded in group]
    lengths = [len(graded.completion.token_ids) for graded in flat]
    groups = max(1, found.num_active + found.num_all_wrong + found.num_all_right)
    return {
        "reward": sum(scored) / max(1, len(scored)),
        "groups": len(drawn_P_G),
        "zero_advantage": found.zero_advantage_share,
        "all_wrong": found.num_all_wrong / groups,
        "all_right": found.num_all_right / groups,
        "unscored": found.num_unscored / len(flat),
        "truncated": sum(g.completion.finish_reason == "length" for g in flat) / len(flat),
        "length": sum(lengths) / len(lengths),
        "sampled_tokens": sum(lengths),
        # Of all rollouts; `entropy_mean` is of the tokens that carry gradient.
        "entropy_sampled": -sum(sum(g.completion.logprobs) for g in flat) / max(1, sum(lengths)),
    }


def learn(
    run: Run,
    optimizer: Optimizer,
    rollouts: Rollouts,
    step: int,
    reference: Decoder | None = None,
) -> dict[str, float]:
    """The updates of one step, one per minibatch, and their statistics together."""
    config = run.config.rl
    with run.metrics.phase("prepare"):
        jobs = _minibatches(run, rollouts, step)
    if not jobs:
        return {"updates": 0}
    policy, temperature = config.policy, config.sampling.temperature
    head_VD = run.decoder.head_weight_VD

    def scores(decoder: Decoder, packed: Packed) -> list[Tensor]:
        return forward.logprobs(decoder, packed, run.device, temperature)

    rows = []
    with run.metrics.phase("train"):
        # One update per step: the current log-probs are the old ones, and need no extra pass.
        old = [scores(run.decoder, p) if len(jobs) > 1 else None for p, _ in jobs]
        pinned = [scores(reference, p) if reference else None for p, _ in jobs]
        for (packed, divisor), old_B, reference_B in zip(jobs, old, pinned, strict=True):

            def loss_of(
                hidden_ND: Tensor, batch: Batch, index: int, old_B=old_B, reference_B=reference_B
            ) -> tuple[Tensor, loss.Stats]:
                return loss.policy_loss(
                    hidden_ND,
                    head_VD,
                    batch,
                    old_B[index] if old_B else None,
                    policy,
                    reference_logprob_N=reference_B[index] if reference_B else None,
                    temperature=temperature,
                )

            values, stepped = update(run, optimizer, packed, divisor, loss_of)
            rows.append(values | stepped.row())
    return loss.together(rows)


def _minibatches(run: Run, rollouts: Rollouts, step: int) -> list[tuple[Packed, float]]:
    """(packed, divisor) of each update of a step; minibatches without gradient are left out."""
    config = run.config.rl
    groups_P_G, located_P_G = rollouts.groups_P_G, rollouts.located_P_G
    rewards_P_G = _rewards(groups_P_G)
    prompts_P = [run.sampler.start_prompt(start) for start in rollouts.starts_P]
    found = credit.group_advantages(rewards_P_G, config.credit)
    advantages_P_G: Any = found.advantages_P_G
    if located_P_G is not None:
        advantages_P_G = process_credit.token_advantages(
            prompts_P, groups_P_G, rewards_P_G, found, located_P_G, config.credit
        )
    made = credit.examples(
        prompts_P,
        [[graded.completion for graded in group] for group in groups_P_G],
        advantages_P_G,
        config.credit,
        [start.problem.id for start in rollouts.starts_P],
    )
    jobs = []
    seed = derive_seed(run.config.seed, "minibatches", step)
    for part in split(made, config.minibatches, seed) if made else []:
        divisor = credit.divisor(part, config.credit, config.sampling.max_new_tokens)
        if kept := credit.with_gradient(part, config.policy):
            jobs.append((pack(kept, run.config.batch), divisor))
    return jobs
