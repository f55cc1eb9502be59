"""Several arms from one base model and one set of problems, in one table.

python -m intfast.compare CONFIG.toml [arms=rl,int_rl] [seeds=0,1,2] [key.sub=value ...] [--dry-run]
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from intfast import checks, cli, ranks
from intfast.config import Config
from intfast.safe_text import shown
from intfast.state.command import outcome, say
from intfast.state.files import read_json, write_atomic
from intfast.state.runfolder import PROMPT_TIME, write_json
from intfast.study import arms, derive

if TYPE_CHECKING:
    from rich.console import Console

USAGE = """\
usage: python -m intfast.compare CONFIG.toml [arms=NAME,...] [seeds=N,...] [equal_tokens=BOOL]
                                 [key.sub=value ...] [ARM:key.sub=value ...] [--dry-run]

Runs arms over the same trainer, problems and base model and writes one table: compare.md,
compare.json and the page report.html in the folder `run`, where every arm and seed has an ordinary
run folder. Attempts and interventions are drawn once per seed. The same command continues.

  arms=          which rows; all: every one that can run here; default: those of the paper's table
                 and the usual sanity checks
  seeds=         one repetition each; default: the seed of the config
  equal_tokens=  true: RL of the other arms goes on until they have generated as many tokens as
                 int_rl, data collection included; false: equal steps only; default: true where
                 int_rl is among the arms and rl.optim.schedule is constant
  ARM:key=value  a setting of sft or rl for one arm alone; int:sft.epochs=8 is for int and int_rl
  --dry-run      print the arms, their settings and the most that they can generate
  --help         this text, and `python -m intfast.train --help` for every setting

Arms:
"""

FIXED = (
    "sft.data",
    "rl.method",
    "rl.steps",
    "rl.until_tokens",
    "rl.from_base",
    "rl.evaluate_every",
)
"""Settings, and those that begin with rl.hint or rl.problems, that make the arms and the table."""


class Plan(NamedTuple):
    """What was asked for."""

    path: str
    words: list[str]
    root: Path
    """The folder of the comparison."""
    names: list[str]
    seeds: list[int]
    equal_tokens: bool
    own: dict[str, list[str]]
    """Arm, without "_rl" -> its own settings."""
    left_out: dict[str, str]
    """Of `arms=all`: the arms that cannot run here, and why."""

    def config(self, name: str, seed: int, until_tokens: int | None = None) -> Config:
        """The config of the run of an arm; its folder lies in that of the comparison."""
        own = self.own.get(arms.family(name), [])
        words = [*self.words, *arms.ARMS[name].settings, *own, f"seed={seed}"]
        if until_tokens:
            words.append(f"rl.until_tokens={until_tokens}")
        try:
            config = cli.load(self.path, [*words, f"run={self.root}/seed-{seed}/{name}"])
            if config.rl.method != "outcome":
                from intfast.methods import table

                table.check(config)
            return config
        except ValueError as error:
            raise ValueError(f"arm {name}: {error}") from error

    def goes_on(self, name: str) -> bool:
        """Whether RL of this run goes on behind `rl.steps`, for equal tokens."""
        return self.equal_tokens and name != arms.OURS and arms.has_rl(name)


def read_plan(words: Sequence[str]) -> Plan:
    """The plan of a command line; raises ValueError for what the user can change."""
    own = {"arms": ",".join(arms.DEFAULT), "seeds": "", "equal_tokens": ""}
    rest, of_arms = [], []
    for word in words[1:]:
        key, _, value = word.partition("=")
        if key in own:
            own[key] = value
        else:
            (of_arms if ":" in key else rest).append(word)
    config = cli.load(words[0], rest)
    is_all = own["arms"] == "all"
    names = arms.check([name for name in own["arms"].split(",") if name])
    seeds = own["seeds"] or str(config.seed)
    if not all(part.strip().isdecimal() for part in seeds.split(",")):
        raise ValueError(f"seeds= expects whole numbers separated by commas, got {seeds!r}")
    if own["equal_tokens"] not in ("true", "false", ""):
        raise ValueError(f"equal_tokens= expects true or false, got {own['equal_tokens']!r}")
    if config.data.test is None:
        raise ValueError("a comparison needs held-out problems: set data.test")
    with_rl = ", ".join(name for name in names if arms.has_rl(name))
    with_sft = ", ".join(name for name in names if arms.needs_sft(name))
    if with_rl and not config.rl.steps:
        raise ValueError(f"rl.steps = 0, but arms {with_rl} need RL; leave them out")
    if with_sft and not config.sft.epochs:
        raise ValueError(f"sft.epochs = 0, but arms {with_sft} need SFT; leave them out")
    if with_rl and config.rl.problems == "unlocked":
        raise ValueError(
            'rl.problems = "unlocked" would train every arm on the problems that InT unlocked, and '
            f"charge it for InT's search ({with_rl}); set rl.problems=selected"
        )
    can_extend = arms.OURS in names and config.rl.optim.schedule == "constant"
    if own["equal_tokens"] == "true" and not can_extend:
        raise ValueError(
            "equal_tokens=true needs int_rl among the arms and rl.optim.schedule = constant; add "
            "what is missing, or leave equal_tokens out"
        )
    plan = Plan(
        path=words[0],
        words=rest,
        root=Path(config.run),
        names=names,
        seeds=list(dict.fromkeys(int(part) for part in seeds.split(","))),
        equal_tokens=own["equal_tokens"] != "false" and can_extend,
        own=_own_settings(of_arms, names),
        left_out={},
    )
    for name in arms.runs(names):
        try:
            arm = plan.config(name, plan.seeds[0], 1 if plan.goes_on(name) else None)
        except ValueError as error:
            if not is_all or name in arms.DEFAULT:
                raise
            rows = [row for row in names if arms.run_of(row, names) == name]
            plan.left_out.update(dict.fromkeys(rows, str(error).splitlines()[-1].strip()))
            continue
        if arms.needs_sft(name) and not arm.sft.epochs:
            raise ValueError(f"arm {name}: sft.epochs = 0, but the arm needs SFT")
    return plan._replace(names=[name for name in names if name not in plan.left_out])


def _own_settings(words: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """The words of single arms, ARM:key=value, by arm; raises ValueError for what cannot be."""
    known = {arms.family(name) for name in names if name != "base"}
    found: dict[str, list[str]] = {}
    for word in words:
        name, _, setting = word.partition(":")
        if arms.family(name) not in known:
            others = ", ".join(name for name in names if name != "base")
            raise ValueError(f"{word}: no arm {name} here; arms are {others}")
        if not setting.startswith(("sft.", "rl.")):
            # The collection is shared, and evaluations are compared.
            raise ValueError(f"{word}: expected a setting of sft or rl for one arm, got {setting}")
        key = setting.partition("=")[0]
        if key in FIXED or key.startswith(("rl.hint", "rl.problems")):
            raise ValueError(
                f"{word}: {key} tells the arms apart or is the same for all; leave it out, or, "
                f"where no arm sets it, give {setting} for all of them"
            )
        found.setdefault(arms.family(name), []).append(setting)
    return found


def run(plan: Plan, console: Console) -> dict[str, Any]:
    """Run what is missing; write compare.json, compare.md and report.html; return the first."""
    from intfast.study import compare_table, report

    start = time.perf_counter()
    names = arms.runs(plan.names)
    configs = {seed: {name: plan.config(name, seed) for name in names} for seed in plan.seeds}
    for seed, rows in configs.items():
        # Where ours had no example there were no tokens to equal.
        open_end = not (plan.root / f"seed-{seed}" / arms.OURS / "skipped.json").exists()
        for name, config in rows.items():
            _check_stored(config, open_end and plan.goes_on(name))
    sources = {s: _collect(plan, s, list(rows.values()), console) for s, rows in configs.items()}
    until = dict.fromkeys(plan.seeds, 0)
    # Arm by arm: what is stopped early has all seeds of the first arms.
    for place, name in enumerate(names, 1):
        for seed in plan.seeds:
            _say(console, f"== arm {place} of {len(names)}, seed {seed}: {name}")
            config = configs[seed][name]
            if until[seed] and config.rl.steps:
                config = plan.config(name, seed, until[seed])
            _run_arm(config, sources[seed], console)
            if name == arms.OURS and plan.equal_tokens:
                # Absent where ours had nothing to learn from.
                summary = read_json(Path(config.run) / "summary.json") or {}
                until[seed] = sum(summary.get("generated_tokens", {}).values())
    found = compare_table.build(plan.root, plan.names, plan.seeds, plan.own, plan.equal_tokens)
    found["left_out"] = plan.left_out
    found["about"] = _about(Path(plan.path))
    found["seconds_last_process"] = time.perf_counter() - start
    write_json(plan.root / "compare.json", found)
    text = compare_table.markdown(found)
    write_atomic(plan.root / "compare.md", text.encode())
    _say(console, text)
    _say(console, f"to look at it: {report.write([plan.root], plan.root / 'report.html')}")
    return found


def _about(config: Path) -> str:
    """The comment that a config begins with: what its author says of the task and its limits."""
    first = itertools.takewhile(lambda line: line.startswith("#"), config.read_text().splitlines())
    return " ".join(line.lstrip("# ") for line in first)


def _say(console: Console, text: str) -> None:
    console.print(shown(text), markup=False, highlight=False, soft_wrap=True)


def _collect(plan: Plan, seed: int, configs: Sequence[Config], console: Console) -> Path:
    """Draw what several arms share: the base evaluation, attempts, interventions."""
    from intfast import collect
    from intfast.run import open_run

    # The same for any choice of arms, so that arms can be added later.
    name = "rl" if plan.config("base", seed).rl.steps else "int"
    folder = plan.root / f"seed-{seed}" / "collection"
    words = [*plan.words, *arms.ARMS[name].settings, f"seed={seed}", f"run={folder}"]
    config = cli.load(plan.path, words)
    done = configs and all(_is_done(Path(arm.run)) for arm in configs)
    if done and (folder / "evaluations.json").exists():
        return folder
    with open_run(config, console) as run:
        collect.evaluation(run, "base")
        collect.gather(run, configs)
    return folder


def _is_done(folder: Path) -> bool:
    return (folder / "summary.json").exists() or (folder / "skipped.json").exists()


def _check_stored(config: Config, goes_on: bool) -> None:
    """Raise ValueError, before any work, where a folder holds an arm with other settings."""
    stored = Path(config.run) / "config.toml"
    went_on = stored.exists() and cli.load(stored).rl.until_tokens is not None
    also = []
    if stored.exists() and goes_on != went_on:
        was, now = ("ended at rl.steps", "goes on") if goes_on else ("went on", "ends at rl.steps")
        also.append(f"its RL {was}; with these arms and equal_tokens it {now}")
    # How many tokens are as many as ours is known only behind ours.
    derive.check(config, "an arm", "use another run=FOLDER", ["rl.until_tokens"], also)


def _run_arm(config: Config, source: Path, console: Console) -> None:
    """Run one arm, unless it is done; an arm without a single example is recorded as such."""
    from intfast.sft import NoExamples
    from intfast.study import finish

    folder = Path(config.run)
    if _is_done(folder):
        _say(console, f"{folder} is done")
        return
    # The records that a run would draw itself.
    names = ["evaluations.json", "golds.json", PROMPT_TIME]
    names += ["attempts.jsonl"] if config.needs_attempts else []
    names += ["interventions.jsonl", "continuations.jsonl"] if config.needs_interventions else []
    derive.give(source, folder, names)
    try:
        finish.train(config, console)
    except NoExamples as error:
        _say(console, f"{folder}: {error}")
        write_json(folder / "skipped.json", {"reason": str(error)})


# --- dry run -----------------------------------------------------------------------------------


def show(plan: Plan, console: Console) -> None:
    """Print every arm with its settings and the most that it can generate; generate nothing."""
    from intfast import intake
    from intfast.model import weights
    from intfast.plan import draws

    seed = plan.seeds[0]
    configs = {name: plan.config(name, seed) for name in arms.runs(plan.names)}
    base = plan.config("base", seed)
    weights.check(weights.resolve(base.model.path))
    # All arms read the same data; one that needs references says where there are none.
    reader = next((config for config in configs.values() if config.needs_references), base)
    num = len(intake.load(reader, console)[0])
    for name, config in configs.items():
        rows = [row for row in plan.names if arms.run_of(row, plan.names) == name]
        _say(console, f"\n{name} (rows: {', '.join(rows)})")
        for key, (old, new) in cli.differences(config, base).items():
            if key != "run":
                _say(console, f"  {key} = {new!r} (was {old!r})")
        tokens = {d.stage: d.samples * d.tokens for d in draws(config, num)}
        parts = ", ".join(f"{what} {count:,}" for what, count in tokens.items())
        _say(console, f"  generates at most {sum(tokens.values()):,} tokens ({parts})")
        if plan.goes_on(name):
            _say(console, f"  RL goes on until it has generated as many tokens as {arms.OURS}")
    for name, why in plan.left_out.items():
        _say(console, f"\n{name} is left out: {why}")
    once = "attempts, interventions once per seed"
    _say(console, f"\n{len(configs)} runs x {len(plan.seeds)} seeds; {once}")
    _say(console, "Nothing was generated, trained or written.")


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code, as `intfast.train` does."""
    if "--help" in arguments or "-h" in arguments:
        rows = (f"  {name:15} {arm.label}" for name, arm in arms.ARMS.items())
        return say(USAGE + "\n".join(rows))
    dry_run = "--dry-run" in arguments
    words = [word for word in arguments if word != "--dry-run"]
    if not words or "=" in words[0]:
        return say(USAGE.split("\n\n")[0] + "\n\n--help explains more.", 2)

    with outcome("the same command continues this comparison", goes_on=not dry_run) as ended:
        ranks.require_one()
        plan = read_plan(words)
        checks.check_paths(plan.config("base", plan.seeds[0]))
        from intfast.state.metrics import make_console

        (show if dry_run else run)(plan, make_console())
    return ended.code
