"""`--dry-run`: check what can be checked without generating, and print what the run would do."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from intfast import config_io, limits, metrics, weights
from intfast.config import Config
from intfast.model import Decoder, ModelConfig
from intfast.parts import load_data, load_tokenizer, pick_device
from intfast.prompts import decode, style_of
from intfast.records import Problem

GIB = 2**30


def show(config: Config, console: Console | None = None) -> None:
    """Print settings that differ from the defaults, data, prompt, work, memory, and stages.

    Raises ValueError or RuntimeError for what would stop the run at its start.
    """
    console = console or metrics.make_console()

    def say(text: str) -> None:
        metrics.say(console, text)

    say("Settings that differ from the defaults")
    for key, (_, value) in config_io.differences(config).items():
        say(f"  {key} = {value!r}")
    say("\nData")
    problems, tests = load_data(config, console)
    path = weights.resolve(config.model.path)
    architecture = ModelConfig.from_hf(weights.read_config(path))
    tokenizer = load_tokenizer(path)
    style = style_of(config.prompt, tokenizer)
    context = config.rollout.context or architecture.max_positions
    problems, said = limits.fitting_train(problems, style.solve, context, config)
    tests, more = limits.fitting_problems(tests, style.solve, context, [config.evaluate.sampling])
    for sentence in filter(None, (said, more)):
        say(sentence)
    say("\nFirst prompt, exactly as the model sees it")
    say(decode(tokenizer, style.solve(problems[0])))
    say("\nWork")
    for line in work(config, problems, tests):
        say(f"  {line}")
    device = pick_device(config)
    say("")
    console.print(memory_table(config, architecture, device))
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
            most = selected * rl.hint_samples * len(rl.hint_shares)
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
            found["hints"] = selected * rl.hint_samples * len(rl.hint_shares) * rollout
        rollouts = rl.problems_per_step * rl.group_size * (1 + rl.refill)
        found["rollouts"] = rl.steps * rollouts * rollout
    return found


def memory_table(config: Config, architecture: ModelConfig, device: torch.device) -> Table:
    """Where the memory goes while training, in GiB, against what the device has free."""
    with torch.device("meta"):
        decoder = Decoder(architecture, torch.float32, "meta")
    num = sum(parameter.numel() for parameter in decoder.parameters())
    bf16 = config.model.dtype == "bfloat16"
    width = 2 if bf16 else 4
    tokens = config.batch.max_tokens
    layers = architecture.num_layers
    # Per token and layer: the inputs that backward keeps of the norms, q/k/v, attention output and
    # the two halves of the MLP; with checkpointing only the layer's input.
    hidden, ffn = architecture.hidden_size, architecture.intermediate_size
    heads = architecture.num_heads * architecture.head_dim
    kept = hidden if config.model.activation_checkpointing else 4 * hidden + 4 * heads + 4 * ffn
    rows = {
        "weights": num * width,
        "fp32 masters": num * 4 if bf16 else 0,
        "AdamW moments": num * 8,
        "gradients (fp32)": num * 4,
        f"activations of {tokens:,} tokens, estimated": tokens * layers * kept * width,
        "keys and values of the engine": int(config.rollout.cache_gib * GIB),
    }
    if config.rl.steps and config.rl.policy.kl:
        rows["reference model"] = num * width
    table = Table(title=f"Memory plan on {device.type}, {num:,} parameters", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for what, size in rows.items():
        table.add_row(what, f"{size / GIB:.2f}")
    total, free = sum(rows.values()), _free_bytes(device)
    table.add_section()
    table.add_row("together", f"{total / GIB:.2f}")
    table.add_row("free now", f"{free / GIB:.2f}")
    if total > free:
        table.caption = (
            "DOES NOT FIT: lower batch.max_tokens or rollout.cache_gib, or set "
            "model.activation_checkpointing = true"
        )
    return table


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _progress(folder: Path) -> str:
    if not (folder / "config.toml").exists():
        return "new"
    names = sorted(path.name for path in folder.glob("*.jsonl"))
    stages = sorted(path.parent.name for path in folder.glob("checkpoints/*/step-*"))
    done = [*names, *(f"checkpoints of {name}" for name in dict.fromkeys(stages))]
    return "has " + ", ".join(done) + "; the run would continue from there"
