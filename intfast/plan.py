"""`--dry-run`: check what can be checked without generating, and print what the run would do."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from intfast import cli, intake
from intfast.config import Config
from intfast.engine import memory
from intfast.engine.cache import bytes_per_slot
from intfast.engine.device import pick_device
from intfast.engine.memory import GIB
from intfast.engine.protocol import pick_engine
from intfast.grading.function import grader_of
from intfast.methods import guided, table
from intfast.methods.method import Draws
from intfast.model import folder as model_folder
from intfast.model import shards, weights
from intfast.model.folder import load_tokenizer
from intfast.model.layer_ops import plain_ops
from intfast.prompts import style_of
from intfast.records import Problem
from intfast.state import metrics, trackers
from intfast.state.runfolder import prompt_time
from intfast.tokens import decode

MAX_GOLDS = 1000
"""Gold answers that a dry run checks; a parser reads about a hundred a second."""


def show(
    config: Config, console: Console | None = None, num: int = 1, words: Sequence[str] = ()
) -> None:
    """Print settings that differ from the defaults, data, prompt, work, memory, and stages.

    num, words: ranks, and the arguments of the command, to plan for
    Raises ValueError or RuntimeError for what would stop the run at its start.
    """
    trackers.require(config.metrics.trackers)
    table.check(config)
    console = console or metrics.make_console()
    say = partial(metrics.say, console)
    say("Settings that differ from the defaults")
    for key, (_, value) in cli.differences(config).items():
        say(f"  {key} = {value!r}")
    say("\nData")
    problems, tests = intake.load(config, console)
    path = weights.resolve(config.model.path)
    architecture = weights.check(path)
    tokenizer = load_tokenizer(path)
    style = style_of(config.prompt, tokenizer, prompt_time(Path(config.run)))
    context = config.rollout.context or architecture.max_positions
    problems, tests = _gradable(config, problems, tests, say)
    problems, tests = intake.fitting(problems, tests, style.solve, context, config, say)
    say(f"\nModel: {model_folder.said(path, tokenizer, style.stop_ids)}")
    if plain := plain_ops(architecture):
        say(f"Whatever model.kernels: {plain}")
    say("\nFirst prompt, exactly as the model sees it")
    say(decode(tokenizer, style.solve(problems[0])))
    say("\nWork")
    for line in work(config, len(problems), len(tests)):
        say(f"  {line}")
    if num % config.ranks.tp:
        raise ValueError(
            f"ranks.tp = {config.ranks.tp} needs a number of ranks that it divides, got {num}; "
            f"add --ranks {config.ranks.tp}"
        )
    planned = memory.Plan(config, architecture, planned_target(config, num))
    say("")
    for line in layout(planned, words, weights.read_config(path)["model_type"]):
        say(line)
    console.print(memory_table(planned))
    for line in verdict(planned):
        say(f"  {line}")
    dollar = " (a $ in its name: no variable is filled in)" if "$" in config.run else ""
    say(f"\nRun folder {config.run}{dollar}: {_progress(Path(config.run))}")
    say("Nothing was generated, trained or written.")


def _gradable(
    config: Config, problems: list[Problem], tests: list[Problem], say: intake.Say
) -> tuple[list[Problem], list[Problem]]:
    """Without those whose answers, of the first MAX_GOLDS, cannot be graded."""
    answers = list(dict.fromkeys(problem.answer for problem in [*problems, *tests]))
    first = answers[:MAX_GOLDS]
    with grader_of(config.grade) as grader:
        golds = dict(zip(first, grader.check_golds(first), strict=True))
        grader.say = say
        for line in grader.tried(problems):
            say(line)
    if len(answers) > len(first):
        say(
            f"{len(first):,} of {len(answers):,} gold answers were checked; the run checks the "
            "others at its start"
        )
    return intake.usable(problems, golds, say), intake.usable(tests, golds, say)


def draws(config: Config, num: int) -> Iterator[Draws]:
    """What the stages of a run on `num` problems generate at most, evaluation left out."""
    attempts, stage, rl = config.attempts, config.intervene, config.rl
    selected = min(num, attempts.max_problems or num)
    wrong = selected * attempts.wrong_per_problem
    each = stage.sampling.max_new_tokens
    if config.needs_attempts:
        words = f"{num} problems x {attempts.samples} attempts"
        yield Draws("attempts", words, num * attempts.samples, attempts.sampling.max_new_tokens)
    if config.needs_interventions:
        words = f"{wrong:,} wrong attempts x {stage.samples} verifications"
        words += " and a guided solution" if stage.guided_solve else ""
        yield Draws("verification", words, wrong * (stage.samples + stage.guided_solve), each)
        starts = 3 if stage.baselines else 1
        words = f"{wrong:,} interventions x {stage.continuations} continuations x {starts} starts"
        words += f", in waves of {stage.wave}, stop = {stage.stop}"
        samples = wrong * stage.continuations * starts
        yield Draws("continuations", words, samples, stage.continuation.max_new_tokens)
    if config.sft.epochs and config.sft.data in ("star", "regft", "reflection"):
        is_reflection = config.sft.data == "reflection"
        samples = selected * (attempts.wrong_per_problem if is_reflection else config.sft.samples)
        yield Draws("guided", "solutions with the reference in view", samples, each)
    rollout = rl.sampling.max_new_tokens
    if rl.steps and rl.hint == "shortest":
        samples = selected * guided.SAMPLES * len(guided.SHARES)
        yield Draws("hints", "samples in search of the shortest hint", samples, rollout)
    if rl.steps:
        rollouts = rl.problems_per_step * rl.group_size * (1 + rl.refill)
        words = f"{rl.steps} steps x {rollouts} rollouts"
        yield Draws("rollouts", words, rl.steps * rollouts, rollout)
        yield from table.METHODS[rl.method].draws(config, table.own(config), selected)


def work(config: Config, num: int, num_tests: int) -> Iterator[str]:
    """The arithmetic of the run as sentences; upper bounds where the model decides."""
    for stage, words, samples, _ in draws(config, num):
        yield f"{stage}: {words} = {samples:,}" + (" at most" if stage != "attempts" else "")
    sft, rl = config.sft, config.rl
    if sft.epochs:
        yield f"SFT on {sft.data} data: {sft.epochs} epochs, {sft.batch_size} examples a step"
    if rl.steps:
        rollouts = rl.problems_per_step * rl.group_size
        yield (
            f"RL: {rl.problems_per_step} problems x {rl.group_size} rollouts = {rollouts} rollouts "
            f"-> {rl.minibatches} updates of {rollouts // rl.minibatches}, {rl.steps} steps"
            + (", twice: from InT and from the base model" if rl.from_base else "")
            + (f", and on until {rl.until_tokens:,} tokens" if rl.until_tokens else "")
        )
    if num_tests:
        samples = config.evaluate.samples
        yield (
            f"evaluation: {num_tests} problems x {samples} samples = {num_tests * samples:,} "
            "for each set of weights"
        )


def layout(plan: memory.Plan, words: Sequence[str], family: str = "") -> Iterator[str]:
    """How a model is dealt to several ranks, what an update moves, and the command; or nothing.

    family  the model's `model_type`
    Raises ValueError where so many ranks cannot share it.
    """
    num, tp, dp = plan.target.ranks, plan.config.ranks.tp, plan.copies
    fault = shards.fault(family, plan.whole, tp) or memory.indivisible(plan.whole, dp, tp)
    if fault:
        raise ValueError(fault)
    if num == 1:
        return
    parameters, own = memory.num_parameters(plan.architecture), (dp - 1) / dp
    kind = f"{dp} data parallel x {tp} tensor parallel" if tp > 1 else "data parallel"
    held = f"in {tp} shards" if tp > 1 else "whole on each"
    yield f"Layout: {num} ranks, {kind}; weights {held}, optimizer in {dp} parts"
    each = "micro-batch" if plan.config.ranks.gradients == "dealt" else "update"
    yield (
        f"  out of each, and as much in: {4 * parameters * own / 1e9:.3g} GB of gradients (fp32) "
        f"in every {each}, {plan.width * parameters * own / 1e9:.3g} GB of weights in every update"
    )
    if tp > 1:
        # Forward and backward, and forward again where activations are not kept.
        tokens, a = plan.config.batch.max_tokens, plan.whole
        sums = (6 if plan.config.model.activation_checkpointing else 4) * a.num_layers + 1
        moved = tokens * a.hidden_size * (sums * plan.width + 4) * 2 * (tp - 1) / tp
        yield f"  a micro-batch of {tokens:,} tokens moves {moved / 1e9:.3g} GB more out of each"
    fitting = [t for t in range(1, num + 1) if num % t == 0 and _fits(plan, t, family)]
    yield f"  the smallest ranks.tp that fits: {fitting[0] if fitting else 'none'}"
    nodes = f"--nnodes {num // 8} --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
    where = f"{nodes} --nproc-per-node 8" if num > 8 else f"--standalone --nproc-per-node {num}"
    yield f"  torchrun {where} -m intfast.train {shlex.join(words)}\n"


def _fits(plan: memory.Plan, tp: int, family: str) -> bool:
    """Whether the model can be dealt to `tp` neighbours, and fits."""
    dp = plan.target.ranks // tp
    if shards.fault(family, plan.whole, tp) or memory.indivisible(plan.whole, dp, tp):
        return False
    return plan.changed("ranks.tp", tp).fits()


def planned_target(config: Config, num: int = 1) -> memory.Target:
    """The device to plan for: with `model.memory_gib` it need not be in this machine."""
    if config.model.memory_gib is not None and config.model.device == "cuda":
        engine = "native" if config.rollout.engine == "native" else "vllm"
        return memory.target_of(config, torch.device("cuda"), engine, num)
    device = pick_device(config)
    engine = pick_engine(config.rollout.engine, device.type).name
    return memory.target_of(config, device, engine, num)


def memory_table(plan: memory.Plan) -> Table:
    """Where the memory goes, in GiB."""
    num = memory.num_parameters(plan.whole)
    title = f"Memory plan, {plan.target.kind}, {num:,} parameters"
    table = Table("what", title=title, title_justify="left")
    for name in ("training", "generating"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in plan.items():
        table.add_row(item.what, *(f"{size / GIB:.2f}" if size else "" for size in item[1:]))
    table.add_section()
    table.add_row("together", *(f"{peak / GIB:.2f}" for peak in plan.peaks()))
    usable = memory.USABLE * plan.target.free
    what = f"left of {usable / GIB:.1f} GiB ({memory.USABLE:.0%} of what is free)"
    table.add_row(what, *(f"{(usable - peak) / GIB:.2f}" for peak in plan.peaks()))
    return table


def verdict(plan: memory.Plan) -> list[str]:
    """Sentences on whether the plan fits, and what to change."""
    if not plan.fits():
        return ["DOES NOT FIT", *plan.remedies()]
    cache, slot = plan.cache_bytes(), bytes_per_slot(plan.architecture, plan.dtype)
    lines = [
        f"fits; keys and values: {cache / GIB:.2f} GiB, {slot:,} bytes a token, "
        f"{cache // slot:,} tokens (rollout.cache_gib = {plan.config.rollout.cache_gib!r})"
    ]
    # A larger micro-batch is only free while the cache keeps its size.
    tokens = plan.config.batch.max_tokens
    most = plan.changed("rollout.cache_gib", cache / GIB).largest_batch(tokens)
    if most and most > tokens:
        lines.append(f"batch.max_tokens could be up to {most:,}, in fewer micro-batches")
    return lines


def _progress(folder: Path) -> str:
    if not (folder / "config.toml").exists():
        return "new"
    names = sorted(path.name for path in folder.glob("*.jsonl"))
    stages = sorted(path.parent.name for path in folder.glob("checkpoints/*/step-*"))
    done = [*names, *(f"checkpoints of {name}" for name in dict.fromkeys(stages))]
    return "has " + ", ".join(done) + "; the run would continue from there"
