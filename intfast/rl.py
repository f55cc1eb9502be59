"""The RL stage: GRPO and its family on the outcome, one straight step after the other.

    problems -> rollouts -> grades -> advantages -> packed batches -> loss -> optimizer -> engine

Shapes as in records.py: P groups of G rollouts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from intfast import collect, credit, loss, parity
from intfast.batch import Packed, pack_apart, shuffled, split
from intfast.config import RlConfig
from intfast.credit import Credit
from intfast.engine.protocol import derive_seed
from intfast.grading.watch import cut_short
from intfast.labels import by_method
from intfast.methods import cost, table
from intfast.methods.method import Method
from intfast.model.decoder import Decoder
from intfast.records import Problem
from intfast.run import Run
from intfast.sample import Graded, Rollouts, Start
from intfast.update import Stage, is_finished, logprobs, update, with_logprobs

Hints = Mapping[str, list[int]]
"""Problem id -> the prompt ids of the problem with its hint."""


def rl(
    run: Run, name: str, initial: str, problems: Sequence[Problem], hints: Hints | None = None
) -> None:
    """Learn from the outcome of rollouts, from the weights `initial`; the result is `name`.

    Problems with a hint appear once bare and once with it, in the same stream. A hint is prompt:
    it carries no loss.
    """
    config, check_every = run.config.rl, run.config.parity.every
    if is_finished(run, name, config.steps):
        return
    tasks = _tasks(problems, hints or {}, run)
    # For a comparison at equal tokens: what the run generated before RL counts too.
    collected = sum(cost.generated_tokens(run).values()) if config.until_tokens else 0
    reference = _reference(run, initial)
    # A method changes what is started from, drawn, or credited; that of the outcome, nothing.
    method = table.start(run, name, reference)
    temperature = config.sampling.temperature
    policy_loss = partial(loss.policy_loss, config=config.policy, temperature=temperature)
    # A step moves the schedule by all its minibatches, whether or not each makes an update.
    with Stage(run, name, initial, config.optim, config.steps, config.minibatches) as stage:
        start, is_last = stage.step, False
        if stage.state.get("finished"):  # rl.steps has grown since
            run.folder.rename_entry("evaluations.json", name, f"{name}@{start}")
        parity.before_generating(run)
        while not is_last:
            # Not at the end of a step: what is done is saved before an evaluation is broken off.
            _evaluate_if_due(run, stage)
            step = stage.step + 1
            rollouts = draw(run, name, method.tasks(tasks, step), stage.state.get("cursor", 0))
            rollouts, spent = method.after_draw(rollouts, step)
            if stage.step == start or (check_every and step % check_every == 0):
                # The same tokens, scored by both sides: stale weights are not learned from.
                where = f"{name} step {step}"
                parity.check_rollouts(run, where, rollouts.starts_P, rollouts.groups_P_G)
            # GRPO: a reward counts by how far it lies above its own group. Problems that are always
            # or never solved move nothing.
            outcome = _outcome(run, rollouts.groups_P_G)
            advantages_P_G, about = method.credit(rollouts, outcome, step)
            row = counts(run, rollouts, outcome) | spent | about
            # The engine sleeps while the step trains: their memory is the same memory.
            with run.updating():
                with run.metrics.phase("prepare"):
                    updates, row["examples"] = minibatches(method, rollouts, advantages_P_G, step)
                stats = []
                with run.metrics.phase("train"):
                    # Off-policy from the second update on; the clipped ratio to the old policy
                    # bounds that.
                    for packed, divisor in scored(run, updates, reference):
                        stats.append(update(stage, packed, divisor, policy_loss))
            row |= loss.together(stats)
            # Written before the step is saved: a row of a step that was lost is dropped on resume.
            run.metrics.row(name, step, row, _line(name, step, config, row))
            # A stage at equal tokens goes on past its steps until the budget is generated.
            is_last = step >= config.steps and (
                not config.until_tokens
                or collected + cost.rl_tokens(run, name) >= config.until_tokens
            )
            save = is_last or step % config.checkpoint_every == 0
            stage.finish_step(save=save, finished=is_last, cursor=rollouts.cursor)


# --- rollouts ----------------------------------------------------------------------------------


def _tasks(problems: Sequence[Problem], hints: Hints, run: Run) -> list[Start]:
    if not problems:
        raise ValueError(
            'rl.problems = "unlocked" leaves no problem: no intervention was kept; '
            + (cut_short(run.folder, run.config) or 'use rl.problems = "selected"')
        )
    # Bare and hinted version are two tasks of one stream: a step has both kinds.
    hinted = [Start(p, (), prompt_ids=hints[p.id]) for p in problems if p.id in hints]
    return [Start(problem, ()) for problem in problems] + hinted


def _evaluate_if_due(run: Run, stage: Stage) -> None:
    """Evaluate every `rl.evaluate_every` steps, and after `rl.steps` where the stage goes on."""
    config, step = run.config.rl, stage.step
    if step and (
        (config.evaluate_every and step % config.evaluate_every == 0) or step == config.steps
    ):
        collect.evaluation(run, stage.name, step)


def draw(run: Run, name: str, tasks: Sequence[Start], cursor: int) -> Rollouts:
    """Rollouts of the next tasks of the stream, which repeats in a new order every epoch.

    Dynamic sampling (`rl.refill`): groups without variance are replaced by those of the next
    problems, for at most so many rounds; what is still missing then is missing in the step.
    """
    config = run.config.rl
    rollouts = Rollouts([], [], [], cursor)
    for _ in range(1 + config.refill):  # bounded: a step ends also where no group has variance
        # Only as many groups as are still missing, of the next problems.
        wanted = config.problems_per_step - len(rollouts.starts_P)
        starts_P = [_start(run, tasks, place) for place in range(cursor, cursor + wanted)]
        cursor += wanted
        with run.metrics.progress(f"{name} rollouts", wanted * config.group_size) as advance:
            groups_P_G = run.sampler.sample(starts_P, config.sampling, advance)
        for start, group in zip(starts_P, groups_P_G, strict=True):
            rollouts.drawn.append((start, group))
            if not config.refill or _has_variance(group):
                rollouts.starts_P.append(start)
                rollouts.groups_P_G.append(group)
        if len(rollouts.starts_P) == config.problems_per_step:
            break
    return rollouts._replace(cursor=cursor)


def _start(run: Run, tasks: Sequence[Start], place: int) -> Start:
    """The task at a place of the endless stream, with its seeds."""
    seed = run.config.seed
    # The stream has no state but a number: any place of it can be found again from the seed.
    epoch, index = divmod(place, len(tasks))
    task = tasks[shuffled(len(tasks), derive_seed(seed, "rl-order", epoch))[index]]
    samples = range(run.config.rl.group_size)
    # The place is in the seed: the same problem in the next epoch draws other rollouts.
    seeds = [derive_seed(seed, "rl", place, task.problem.id, sample) for sample in samples]
    return task._replace(seeds=seeds)


# --- rewards and counts ------------------------------------------------------------------------


def rewards(groups_P_G: Sequence[Sequence[Graded]]) -> list[list[float | None]]:
    """The reward of every rollout; None where it could not be graded."""
    return [[credit.reward(graded.grade) for graded in group] for group in groups_P_G]


def _outcome(run: Run, groups_P_G: Sequence[Sequence[Graded]]) -> Credit:
    return credit.group_advantages(rewards(groups_P_G), run.config.rl.credit, run.device)


def _has_variance(group: Sequence[Graded]) -> bool:
    # Equality and not a small deviation decides, as in the op.
    return len({reward for reward in rewards([group])[0] if reward is not None}) > 1


def counts(run: Run, rollouts: Rollouts, found: Credit) -> dict[str, Any]:
    """What a step drew, groups that were replaced included; `found` is of those it learns from."""
    groups_P_G = [group for _, group in rollouts.drawn]
    if groups_P_G != rollouts.groups_P_G:
        found = _outcome(run, groups_P_G)
    flat = [graded for group in groups_P_G for graded in group]
    lengths = [len(graded.completion.token_ids) for graded in flat]
    # Groups without any graded rollout are in none of the shares.
    num_scored = max(1, found.num_active + found.num_all_wrong + found.num_all_right)
    values = {
        "reward": _mean_reward(groups_P_G),
        "groups": len(groups_P_G),
        "zero_advantage": found.zero_advantage_share,
        "all_wrong": found.num_all_wrong / num_scored,
        "all_right": found.num_all_right / num_scored,
        "unscored": found.num_unscored / len(flat),
        "truncated": sum(g.completion.finish_reason == "length" for g in flat) / len(flat),
        "length": sum(lengths) / len(lengths),
        "sampled_tokens": sum(lengths),
        # Of all rollouts; `entropy_mean` is of the tokens that carry gradient.
        "entropy_sampled": -sum(sum(g.completion.logprobs) for g in flat) / max(1, sum(lengths)),
    }
    bare = [g for s, g in rollouts.drawn if s.prompt_ids is None and not s.answer_ids]
    if len(bare) < len(groups_P_G):
        # What hints earn says nothing of the problems themselves.
        values["reward_bare"] = _mean_reward(bare) if bare else None
    return values


def _mean_reward(groups_P_G: Sequence[Sequence[Graded]]) -> float:
    scored = [reward for group in rewards(groups_P_G) for reward in group if reward is not None]
    return sum(scored) / max(1, len(scored))


def _line(name: str, step: int, config: RlConfig, row: Mapping[str, Any]) -> str:
    line = (
        f"{name} {step}/{config.steps}  reward {row['reward']:.3f}  "
        f"zero-advantage {row['zero_advantage']:.2f} (all wrong {row['all_wrong']:.2f}, "
        f"all right {row['all_right']:.2f})  length {row['length']:.0f}"
        + (f" ({row['truncated']:.0%} cut)" if row["truncated"] else "")
    )
    if row["examples"] < config.minibatches:
        line += f"  only {row['examples']} rollouts to learn from, for {config.minibatches} updates"
    if not row["updates"]:
        return line + "  no update: no group has variance"
    skipped = f"  SKIPPED, not finite: {row['cause']}" if row["skipped"] else ""
    # Absent where no policy row was left, supervised ones alone.
    entropy = f"  entropy {row['entropy_mean']:.3f}" if "entropy_mean" in row else ""
    return line + entropy + skipped


# --- updates -----------------------------------------------------------------------------------


def minibatches(
    method: Method, rollouts: Rollouts, advantages_P_G: Sequence[Any], step: int
) -> tuple[list[tuple[Packed, float]], int]:
    """(packed, divisor) of each update of a step, and the number of rollouts that take part.

    Fewer rollouts than minibatches make fewer updates; those without any gradient are left out.
    """
    run, config = method.run, method.run.config.rl
    # One training sequence per rollout: prompt without loss, sampled tokens with their advantage.
    made = credit.examples(
        [run.sampler.start_prompt(start) for start in rollouts.starts_P],
        [[graded.completion for graded in group] for group in rollouts.groups_P_G],
        advantages_P_G,
        config.credit,
        [start.problem.id for start in rollouts.starts_P],
    )
    updates = []
    seed = derive_seed(run.config.seed, "minibatches", step)
    # What was drawn may leave few: unscored and masked rollouts, groups that refill did not find.
    for part in split(made, min(config.minibatches, len(made)), seed) if made else []:
        # Sequences of advantage zero cost a forward and change nothing, unless KL or entropy does.
        # Rows of a method's own are no part of the mean.
        if kept := credit.with_gradient(method.rows(part), config.policy):
            # Of the whole part: sequences of advantage 0 are left out, but are part of the mean.
            divisor = credit.divisor(part, config.credit, config.sampling.max_new_tokens)
            updates.append((pack_apart(kept, run.config.batch), divisor))
    return updates, len(made)


def scored(
    run: Run, updates: list[tuple[Packed, float]], reference: Decoder | None
) -> list[tuple[Packed, float]]:
    """The updates with the log-probs that the loss compares with, all taken before the first.

    The only update of a step needs no old ones: its current log-probs are the old ones.
    """
    temperature = run.config.rl.sampling.temperature
    compared = reference if run.config.rl.policy.kl else None
    for stream, decoder in (("old", run.decoder), ("reference", compared)):
        # Scored before the first update moves anything.
        if decoder is None or (stream == "old" and len(updates) == 1):
            continue
        updates = [
            (with_logprobs(p, stream, logprobs(decoder, p, run.device, temperature)), divisor)
            for p, divisor in updates
        ]
    return updates


def _reference(run: Run, initial: str) -> Decoder | None:
    """A frozen copy of the initial policy, where a KL term is measured from it or a method asks."""
    if not (run.config.rl.policy.kl or by_method(run.config.rl, "frozen")):
        return None
    # The start of the stage, for all of it: a reference that moved along would bound nothing.
    run.hold(initial)
    return copy.deepcopy(run.decoder).requires_grad_(False)
