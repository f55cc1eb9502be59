"""The problems of a run: loaded, gradable, and with room to answer. Nothing is ever cut.

What is dropped is counted and printed before anything is generated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from operator import attrgetter
from pathlib import Path

import msgspec
import torch
from rich.console import Console

from intfast import adapters, cli, data, grading, ranks
from intfast.config import SAMPLED, BatchConfig, Config, SamplingConfig
from intfast.grading.answers import MATHEMATICS
from intfast.grading.grader import Grader
from intfast.model import folder as model_folder
from intfast.model import weights
from intfast.records import Example, Problem, Record
from intfast.sample import fits
from intfast.sources import named
from intfast.state import identity
from intfast.state.metrics import Metrics
from intfast.state.metrics import say as say_on
from intfast.state.runfolder import RunFolder

PromptOf = Callable[[Problem], list[int]]
Say = Callable[[str], None]
PARSERS = ("math-verify", "latex2sympy2_extended", "sympy")
"""Packages that decide which gold answers can be read."""
CHUNK_GOLDS = 200
"""Gold answers between two writes of what was decided."""


def load(config: Config, console: Console) -> tuple[list[Problem], list[Problem]]:
    """(training problems, test problems), with the report of each on the console.

    No id occurs twice in the two together: it is what records, seeds and tables go by.
    """
    settings = config.data
    assert settings.train is not None
    sources = {
        "train": (settings.train, settings.train_limit),
        "test": (settings.test, settings.test_limit),
    }
    loaded: dict[str, list[Problem]] = {"train": [], "test": []}
    faults = []
    for purpose, (source, limit) in sources.items():
        if source is None:
            continue
        try:
            loaded[purpose], report = data.load_problems(
                source,
                purpose=purpose,
                columns=settings.columns,
                limit=limit,
                mode=config.grade.mode,
                keeps_rows=bool(config.grade.function),
            )
        except ValueError as error:
            # The other file is read all the same: its faults belong into the same list.
            faults.append(f"data.{purpose}: {error}")
        except RuntimeError as error:
            raise RuntimeError(f"data.{purpose}: {error}") from error
        else:
            say_on(console, report)
    if faults:
        raise ValueError("\n".join(faults))
    problems = loaded["train"]
    if adapters.is_source(settings.train):
        # Made, not collected: nobody can take them out of a file.
        same = {train.id for _, train in data.overlap(problems, loaded["test"])[0]}
        problems = [problem for problem in problems if problem.id not in same]
        if same:
            say_on(console, f"left out {len(same)} training problems that are test problems, too")
    tests = _told_apart(problems, loaded["test"], partial(say_on, console))
    if config.needs_references and not any(problem.reference for problem in problems):
        raise ValueError(
            f"{settings.train}: no problem has a reference solution, which interventions, "
            "rewrites, hints and some methods of RL need; add a column reference_solution, or for "
            'plain RL set sft.epochs = 0 and rl.problems = "selected"'
        )
    compare_ranks(config, [*problems, *tests])
    return problems, tests


def _told_apart(problems: list[Problem], tests: list[Problem], say: Say) -> list[Problem]:
    """The tests, with ids that no training problem has.

    Raises ValueError where a test problem is also trained on.
    """
    same, alike = (
        named(f"{test.source} (training {train.source})" for test, train in pairs)
        for pairs in data.overlap(problems, tests)
    )
    if same:
        raise ValueError(
            f"test problems are also training problems; remove them from one file: {same}"
        )
    if alike:
        say(
            "look at these test problems, which differ from training problems with the same answer "
            f"in letter case, spaces or Unicode forms alone: {alike}"
        )
    # The tests' and not the training problems', whose records do not depend on what is tested.
    unique = data.with_unique_ids(tests, {problem.id for problem in problems})
    if num := sum(a.id != b.id for a, b in zip(tests, unique, strict=True)):
        say(f"{num} test ids are also ids of training problems and got a content hash")
    return unique


def compare_ranks(config: Config, problems: Sequence[Problem]) -> None:
    """Raise ranks.Refused unless all ranks have the same settings, problems, model and versions."""
    world = ranks.now()
    if world.world == 1:
        return
    folder = weights.resolve(config.model.path)
    about = identity.surroundings(torch.device("cpu"))
    mine = {
        "settings": cli.to_toml(config),
        "data": data.fingerprint(problems),
        **identity.digests(folder, model_folder.files(folder)),
        **{key: about[key] for key in ("commit", "python", "packages")},
    }
    first = world.gather(mine)[0]
    rows = [row for key in mine for row in identity.differences(key, first[key], mine[key])]
    words = ", ".join(f"{name} is {found}, on rank 0 {was}" for name, was, found in rows)
    world.require(f"{words}; give all ranks the same files and versions" if rows else "")


class Golds(Record):
    """Which gold answers can be graded against, as one grader decided: `golds.json` of a run."""

    grader: str
    """Digest of what decides: code, packages, settings."""
    golds: dict[str, bool]


def check_golds(
    problems: Sequence[Problem], grader: Grader, folder: RunFolder, metrics: Metrics
) -> dict[str, bool]:
    """Gold answer -> whether it can be graded against; remembered in the run folder.

    A parser reads about a hundred LaTeX answers a second: too slow to do at every start.
    """
    golds = list(dict.fromkeys(problem.answer for problem in problems))
    if grader.mode not in MATHEMATICS:
        return dict(zip(golds, grader.check_golds(golds), strict=True))
    digest = _digest(grader)
    stored = folder.read_json("golds.json")
    try:
        known = msgspec.convert(stored or {"grader": "", "golds": {}}, Golds)
    except msgspec.ValidationError as error:
        path = folder.path / "golds.json"
        raise ValueError(f"{path}: {error}; delete it to check the answers again") from error
    # Another version, another verdict: nothing is taken over.
    if known.grader != digest:
        known = Golds(grader=digest, golds={})
    new = [gold for gold in golds if gold not in known.golds]
    title = "gold answers checked once"
    with metrics.phase("golds"), metrics.progress(title, len(new)) as advance:
        for begin in range(0, len(new), CHUNK_GOLDS):
            chunk = new[begin : begin + CHUNK_GOLDS]
            known.golds.update(zip(chunk, grader.check_golds(chunk), strict=True))
            # On the disk before the next: a killed start loses one chunk.
            folder.write_json("golds.json", known)
            advance(len(chunk), 0)
    return known.golds


def _digest(grader: Grader) -> str:
    """Of what decides whether a gold answer can be graded against."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(grading.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    versions = [metadata.version(name) for name in PARSERS]
    digest.update(repr([grader.mode, grader.timeout_s, versions]).encode())
    return digest.hexdigest()


def gradable(
    problems: list[Problem],
    tests: list[Problem],
    grader: Grader,
    folder: RunFolder,
    metrics: Metrics,
) -> tuple[list[Problem], list[Problem]]:
    """The problems and tests whose gold answers can be graded against, by `check_golds`."""
    # On one rank: a verdict may depend on a clock.
    golds = ranks.now().first(lambda: check_golds([*problems, *tests], grader, folder, metrics))
    for line in ranks.now().first(lambda: grader.tried([*problems, *tests])):
        metrics.say(line)
    return usable(problems, golds, metrics.say), usable(tests, golds, metrics.say)


def usable(problems: list[Problem], golds: Mapping[str, bool], say: Say) -> list[Problem]:
    """The problems whose gold answer is not known as ungradable; the others are dropped and named.

    Otherwise every sample of such a problem would come back unscored.
    """
    dropped = [p for p in problems if not golds.get(p.answer, True)]
    if dropped:
        rows = named(f"{p.source or p.id} ({p.answer[:40]!r})" for p in dropped)
        say(f"dropped {len(dropped)} of {len(problems)} problems: ungradable answers: {rows}")
    if dropped and len(dropped) == len(problems):
        raise ValueError("no answer can be graded; look at the answer column, or at grade.mode")
    return [problem for problem in problems if golds.get(problem.answer, True)]


def fitting(
    problems: list[Problem],
    tests: list[Problem],
    prompt_of: PromptOf,
    context: int,
    config: Config,
    say: Say,
) -> tuple[list[Problem], list[Problem]]:
    """The problems and tests whose prompts leave room to answer in the context."""
    problems, said = fitting_train(problems, prompt_of, context, config)
    tests, more = fitting_problems(tests, prompt_of, context, [config.evaluate.sampling])
    for sentence in filter(None, (said, more, bounded(context, config))):
        say(sentence)
    return problems, tests


def bounded(context: int, config: Config) -> str:
    """A sentence on the limits of completions that the context does not leave room for."""
    drawn = {path: attrgetter(path)(config).max_new_tokens for path in SAMPLED.split()}
    over = [f"{path}.max_new_tokens = {n:,}" for path, n in drawn.items() if n >= context]
    if not over:
        return ""
    return (
        f"answers are bounded by the context of {context:,} tokens, prompt included, not by "
        f"{', '.join(over)}: lower these, or raise rollout.context as far as the model goes"
    )


def fitting_problems(
    problems: Sequence[Problem],
    prompt_of: PromptOf,
    context: int,
    samplings: Sequence[SamplingConfig],
    budget: int | None = None,
) -> tuple[list[Problem], str]:
    """The problems whose prompt leaves room to answer, and a sentence on the others ("" for none).

    context    longest sequence of the model, in tokens
    samplings  how answers are drawn: each must have its room
    budget     longest training sequence, where a rollout must fit too
    Raises ValueError when nothing is left.
    """
    kept, dropped, longest = [], [], 0
    for problem in problems:
        num_tokens = len(prompt_of(problem))
        has_room = all(fits(context, num_tokens, sampling) for sampling in samplings)
        if budget is not None:
            room = min(max(s.max_new_tokens for s in samplings), context - num_tokens)
            has_room = has_room and num_tokens + room <= budget
        if has_room:
            kept.append(problem)
        else:
            dropped.append(problem)
            longest = max(longest, num_tokens)
    if not dropped:
        return kept, ""
    limit = f"the model's context of {context:,} tokens"
    if budget is not None:
        limit += f" and batch.max_tokens = {budget:,}"
    rows = named(problem.source or problem.id for problem in dropped)
    sentence = (
        f"dropped {len(dropped)} of {len(problems)} problems whose prompts (up to {longest:,} "
        f"tokens) leave no room to answer within {limit}: {rows}"
    )
    if not kept:
        raise ValueError(f"{sentence}; lower max_new_tokens, or bring shorter problems")
    return kept, sentence


def fitting_train(
    problems: Sequence[Problem], prompt_of: PromptOf, context: int, config: Config
) -> tuple[list[Problem], str]:
    """`fitting_problems` for what the training stages of a config draw."""
    problems, said, more = list(problems), "", ""
    if config.sft.epochs:
        attempts = [config.attempts.sampling]
        problems, said = fitting_problems(problems, prompt_of, context, attempts)
    if config.rl.steps:
        budget = config.batch.max_tokens if config.batch.too_long == "error" else None
        rl = [config.rl.sampling]
        problems, more = fitting_problems(problems, prompt_of, context, rl, budget)
    return problems, "\n".join(filter(None, [said, more]))


class Fitting(Iterable[Example]):
    """The training sequences within the token budget; `said` is of those that came before."""

    def __init__(self, examples: Iterable[Example], batch: BatchConfig) -> None:
        self.examples, self.batch = examples, batch
        self.kept = self.dropped = 0

    def __iter__(self) -> Iterator[Example]:
        for example in self.examples:
            fits = len(example.token_ids) <= self.batch.max_tokens
            if fits or self.batch.too_long != "error":
                self.kept += 1
                yield example
            else:
                self.dropped += 1

    @property
    def said(self) -> str:
        """A sentence on those that were dropped; empty where none was."""
        if not self.dropped:
            return ""
        return (
            f"dropped {self.dropped} of {self.kept + self.dropped} training sequences: longer than "
            f"batch.max_tokens = {self.batch.max_tokens:,}; raise it, or set "
            'batch.too_long = "alone"'
        )
