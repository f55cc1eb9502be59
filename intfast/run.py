"""The open run, built once: problems, model, engine, grader, metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import intfast
from intfast import checks, data, intake, loss, ranks, words
from intfast.config import Config
from intfast.engine import memory
from intfast.engine.device import pick_device
from intfast.engine.protocol import Choice
from intfast.engine.start import prompt_reuse, start
from intfast.grading.function import grader_of
from intfast.grading.watch import GradeWatch
from intfast.model import folder as model_folder
from intfast.model import shards, weights
from intfast.model.decoder import Decoder
from intfast.model.folder import load_tokenizer
from intfast.prompts import style_of
from intfast.records import Problem
from intfast.sample import Sampler
from intfast.state import checkpoint, identity, interrupt, trackers
from intfast.state.metrics import Metrics, Row, make_console
from intfast.state.runfolder import RunFolder, prompt_time
from intfast.state.watchdog import Watchdog


@dataclass
class Run:
    """What the stages work with. One decoder, whose weights change in place."""

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
        # Weights change in place, in one set of tensors, which the engine reads: nothing is
        # loaded twice, and the addresses never change.
        if self.holds == name:
            return
        if name == "base":
            # From the model folder: a run keeps no copy of what it started from.
            weights.load_into(self.decoder, self.model_path)
        else:
            found = checkpoint.latest(self.stage_folder(name), self.metrics.say)
            assert found is not None, f"stage {name} has no checkpoint"
            self.restore(found[1])
        self.changed(name)

    def restore(self, tensors: dict[str, checkpoint.Stored]) -> None:
        """Copy the model tensors of a checkpoint into the parameters."""
        with torch.no_grad():
            for name, parameter in self.decoder.named_parameters():
                # In place: vLLM, or the engine here, holds these very tensors.
                whole = tensors[f"model.{name}"].detach()
                parameter.copy_(shards.own(self.decoder.shards, name, whole))

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
        # Caches of keys and values, and of prompts, belong to the weights before.
        self.sampler.engine.weights_changed()


@contextmanager
def open_run(config: Config, console: Console | None = None) -> Iterator[Run]:
    """A run with all its parts, closed at the end.

    Raises ValueError for what the user can change, RuntimeError for the environment: for problems,
    settings and model before weights are loaded, for the run folder after.
    """
    opened, console = time.perf_counter(), console or make_console()
    checks.check(config)
    trackers.require(config.metrics.trackers)
    device = pick_device(config)
    # Inputs first: a wrong path is told before gigabytes are loaded.
    problems, tests = intake.load(config, console)
    interrupt.check()
    path = weights.resolve(config.model.path)
    weights.check(path)
    tokenizer = load_tokenizer(path)
    # Tomorrow's prompts are today's, also of a template that writes the date.
    style = style_of(config.prompt, tokenizer, started := prompt_time(Path(config.run)))
    # Before the engine starts: it tests its bits with this number of threads.
    if config.model.threads:
        torch.set_num_threads(config.model.threads)
    # Together, since they share one set of weights.
    decoder, engine, choice = start(config, path, device)
    # From here on there are processes and locks: all of them are closed again.
    with (
        RunFolder(config) as folder,
        Watchdog(config.watchdog_s, folder.path / "watchdog.txt"),
        grader_of(config.grade) as grader,
    ):
        # The lock of the folder is held from here on: a second writer was refused above.
        metrics = Metrics(folder.journal("metrics", Row), console, folder.last_write)
        grader.say = metrics.say
        problems, tests = intake.gradable(problems, tests, grader, folder, metrics)
        context = config.rollout.context or decoder.config.max_positions
        watch = GradeWatch(metrics.say)
        # Rates of the grader, in every row of whatever stage.
        metrics.carry(watch.take)
        metrics.carry(prompt_reuse(engine))
        sampler = Sampler(engine, tokenizer, style, grader, context, metrics.phase, watch.add)
        both = intake.fitting(problems, tests, sampler.prompt, context, config, metrics.say)
        run = Run(config, folder, metrics, *both, path, decoder, sampler, opened=opened)
        # Compared with what the folder was started from, before anything is added to it.
        about = manifest(run, choice) | {"prompt_time": started.isoformat()}
        identity.keep(folder, about, metrics.say)
        folder.journal("problems", Problem).replace([*both[0], *both[1]])
        _announce(run, about)
        # Trackers last: one that is missing was refused first, one that fails is dropped.
        with trackers.attached(config, folder, metrics):
            yield run


def _announce(run: Run, about: dict[str, Any]) -> None:
    """One line on what runs where, and one on the settings that a continued run changed."""
    folder, say = run.folder, run.metrics.say
    say(
        f"{about['num_parameters']:,} parameters, {run.config.model.dtype} on {about['device']}, "
        f"{about['threads']} threads, engine {about['engine']} ({about['engine_reason']}), "
        f"kernels {about['kernels']} ({about['kernels_reason']}), {about['bits']}, "
        f"activation checkpointing {str(about['activation_checkpointing']).lower()}, "
        f"ranks {about['ranks']}, run folder {folder.path}"
        + (" (continues)" if folder.resumed else "")
    )
    say(model_folder.said(run.model_path, run.sampler.tokenizer, about["stop_ids"]))
    if folder.changed:
        rows = ", ".join(f"{k} = {b!r} (was {a!r})" for k, (a, b) in folder.changed.items())
        run.metrics.aside("settings", 0, {"changed": folder.changed})
        say(f"continues with {rows}")


def manifest(run: Run, choice: Choice) -> dict[str, Any]:
    """What a reader needs to place the numbers of a run: versions, hardware, data, seed."""
    config, head_VD = run.config, run.decoder.head_weight_VD
    code = run.sampler.grader.sources() | words.digest(config.prompt.domain)
    return {
        "intfast": intfast.__version__,
        **identity.surroundings(run.device),
        "loss_head": loss.head_plans(
            head_VD,
            config.batch.max_tokens,
            config.rl.policy,
            config.rl.sampling.temperature,
            **run.decoder.head_options,
        ),
        "engine": choice.name,
        "engine_reason": choice.reason,
        "kernels": choice.kernels,
        "kernels_reason": choice.kernels_reason,
        "activation_checkpointing": run.decoder.activation_checkpointing,
        "bits": choice.bits,
        "bits_hold": choice.bits_hold,
        "seed": config.seed,
        "ranks": ranks.now().world,
        "stop_ids": list(run.sampler.style.stop_ids),
        "model": str(config.model.path),
        # Of this start: they may move, their content may not.
        "paths": {k: getattr(config.data, k) for k in ("train", "test")}
        | {"model": str(run.model_path)},
        "num_parameters": memory.num_parameters(run.decoder.config),
        **identity.digests(run.model_path, model_folder.files(run.model_path)),
        # Of files that are neither model nor data: a grading function, the words of prompts.
        **({"code": code} if code else {}),
        "train": {"problems": len(run.problems), "hash": data.fingerprint(run.problems)},
        "test": {"problems": len(run.tests), "hash": data.fingerprint(run.tests)},
    }
