"""`--dry-run`: check what can be checked without generating, and print what the run would do."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from intfast import cli, intake
from intfast.config import Config
from intfast.engine import memory
from intfast.engine.cache import bytes_per_slot
from intfast.engine.memory import GIB
from intfast.engine.protocol import pick_engine
from intfast.methods import guided
from intfast.model import weights
from intfast.model.decoder import Architecture
from intfast.model.folder import load_tokenizer
from intfast.prompts import decode, style_of
from intfast.records import Problem
from intfast.run import pick_device
from intfast.state import metrics, trackers


def show(config: Config, console: Console | None = None) -> None:
    """Print settings that differ from the defaults, data, prompt, work, memory, and stages.

    Raises ValueError or RuntimeError for what would stop the run at its start.
    """
    trackers.require(config.metrics.trackers)
    console = console or metrics.make_console()

    def say(text: str) -> None:
        metrics.say(console, text)

    say("Settings that differ from the defaults")
    for key, (_, value) in cli.differences(config).items():
        say(f"  {key} = {value!r}")
    say("\nData")
    problems, tests = intake.load(config, console)
    path = weights.resolve(config.model.path)
    architecture = weights.check(path)
    tokenizer = load_tokenizer(path)
    style = style_of(config.prompt, tokenizer)
    context = config.rollout.context or architecture.max_positions
    problems, tests = intake.fitting(problems, tests, style.solve, context, config, say)
    say("\nFirst prompt, exactly as the model sees it")
    say(decode(tokenizer, style.solve(problems[0])))
    say("\nWork")
    for line in work(config, problems, tests):
        say(f"  {line}")
    target = planned_target(config)
    say("")
    console.print(memory_table(config, architecture, target))
    for line in verdict(config, architecture, target):
        say(f"  {line}")
    say(f"\nRun folder {config.run}: {_progress(Path(config.run))}")
    say("Nothing was generated, trained or written.")


def work(config: Config, problems: list[Problem], tests: list[Problem]) -> list[str]:
    """The arithmetic of the run as sentences; upper bounds where the model decides."""
    lines = []
    attempts, stage = config.attempts, config.intervene
    num = len(problems)
    selected = min(num, attempts.max_problems or num)
    wrong = selected * attempts.wrong_per_problem
    if config.needs_attempts:
        lines.append(f"{num} problems x {attempts.samples} attempts = {num * attempts.samples:,}")
    if config.needs_interventions:
        lines.append(
            f"at most {selected} problems x {attempts.wrong_per_problem} wrong attempts "
            f"x {stage.samples} verifications = {wrong * stage.samples:,} candidates"
        )
        starts = 3 if stage.baselines else 1
        lines.append(
            f"at most {wrong:,} interventions x {stage.continuations} continuations"
            + (" x 3 starts" if starts == 3 else "")
            + f" = {wrong * stage.continuations * starts:,}, in waves of {stage.wave}, "
            f"stop = {stage.stop}"
        )
    if config.sft.epochs and config.sft.data in ("star", "reflection"):
        most = selected * config.sft.samples if config.sft.data == "star" else wrong
        lines.append(f"at most {most:,} solutions with the reference in view")
    if config.sft.epochs:
        lines.append(
            f"SFT on {config.sft.data} data: {config.sft.epochs} epochs, "
            f"{config.sft.batch_size} examples a step"
        )
    if config.rl.steps:
        rl = config.rl
        rollouts = rl.problems_per_step * rl.group_size
        if rl.hint == "shortest":
            most = selected * guided.SAMPLES * len(guided.SHARES)
            lines.append(f"at most {most:,} samples in search of the shortest hint")
        lines.append(
            f"RL: {rl.problems_per_step} problems x {rl.group_size} rollouts = {rollouts} rollouts "
            f"-> {rl.minibatches} updates of {rollouts // rl.minibatches}, {rl.steps} steps"
            + (", twice: from InT and from the base model" if rl.from_base else "")
            + (f", and on until {rl.until_tokens:,} tokens" if rl.until_tokens else "")
        )
    if tests:
        lines.append(
            f"evaluation: {len(tests)} problems x {config.evaluate.samples} samples "
            f"= {len(tests) * config.evaluate.samples:,} for each set of weights"
        )
    return lines


def most_tokens(config: Config, num: int) -> dict[str, int]:
    """What a run on `num` problems can generate at most, in tokens, evaluation left out."""
    attempts, stage, rl = config.attempts, config.intervene, config.rl
    selected = min(num, attempts.max_problems or num)
    wrong = selected * attempts.wrong_per_problem
    each = stage.sampling.max_new_tokens
    found = {}
    if config.needs_attempts:
        found["attempts"] = num * attempts.samples * attempts.sampling.max_new_tokens
    if config.needs_interventions:
        found["verification"] = wrong * (stage.samples + stage.guided_solve) * each
        found["continuations"] = wrong * stage.continuations * stage.continuation.max_new_tokens
    if config.sft.epochs and config.sft.data in ("star", "reflection"):
        is_star = config.sft.data == "star"
        per_problem = config.sft.samples if is_star else attempts.wrong_per_problem
        found["guided"] = selected * per_problem * each
    if rl.steps:
        rollout = rl.sampling.max_new_tokens
        if rl.hint == "shortest":
            found["hints"] = selected * guided.SAMPLES * len(guided.SHARES) * rollout
        rollouts = rl.problems_per_step * rl.group_size * (1 + rl.refill)
        found["rollouts"] = rl.steps * rollouts * rollout
    return found


def planned_target(config: Config) -> memory.Target:
    """The device to plan for: with `model.memory_gib` it need not be in this machine."""
    if config.model.memory_gib is not None and config.model.device == "cuda":
        engine = "native" if config.rollout.engine == "native" else "vllm"
        return memory.target_of(config, torch.device("cuda"), engine)
    device = pick_device(config)
    return memory.target_of(config, device, pick_engine(config.rollout.engine, device.type).name)


def memory_table(config: Config, architecture: Architecture, target: memory.Target) -> Table:
    """Where the memory goes, in GiB, and the verdict with its remedies as the caption."""
    plan = memory.make_plan(config, architecture, target)
    num = memory.num_parameters(architecture)
    table = Table(title=f"Memory plan, {target.kind}, {num:,} parameters", title_justify="left")
    for name in ("what", "training", "generating"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for item in plan.items:
        table.add_row(item.what, *(f"{size / GIB:.2f}" if size else "" for size in item[1:]))
    table.add_section()
    table.add_row("together", f"{plan.training / GIB:.2f}", f"{plan.generating / GIB:.2f}")
    usable = memory.USABLE * target.free
    table.add_row(
        f"left of {usable / GIB:.1f} GiB ({memory.USABLE:.0%} of what is free)",
        f"{(usable - plan.training) / GIB:.2f}",
        f"{(usable - plan.generating) / GIB:.2f}",
    )
    return table


def verdict(config: Config, architecture: Architecture, target: memory.Target) -> list[str]:
    """Sentences on whether the plan fits, and what to change."""
    plan = memory.make_plan(config, architecture, target)
    if plan.left(target.free) < 0:
        return ["DOES NOT FIT", *memory.remedies(config, architecture, target)]
    cache = memory.cache_bytes(config, architecture, target)
    slot = bytes_per_slot(architecture, getattr(torch, config.model.dtype))
    lines = [
        f"fits; keys and values: {cache / GIB:.2f} GiB, {slot:,} bytes a token, "
        f"{cache // slot:,} tokens (rollout.cache_gib = {config.rollout.cache_gib!r})"
    ]
    if config.rollout.cache_gib == "auto":
        # A larger micro-batch is only free while the cache keeps its size.
        config = memory.changed(config, "rollout.cache_gib", cache / GIB)
    most = memory.largest_batch(config, architecture, target, config.batch.max_tokens)
    if most and most > config.batch.max_tokens:
        lines.append(f"batch.max_tokens could be up to {most:,}, in fewer micro-batches")
    return lines


def _progress(folder: Path) -> str:
    if not (folder / "config.toml").exists():
        return "new"
    names = sorted(path.name for path in folder.glob("*.jsonl"))
    stages = sorted(path.parent.name for path in folder.glob("checkpoints/*/step-*"))
    done = [*names, *(f"checkpoints of {name}" for name in dict.fromkeys(stages))]
    return "has " + ", ".join(done) + "; the run would continue from there"
