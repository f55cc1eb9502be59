"""The entry point: config in, the stages in plain sight, run folder out.

python -m intfast.train configs/quickstart.toml [key.sub=value ...] [--dry-run]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from intfast import cli
from intfast.config import Config
from intfast.state.command import exit_code
from intfast.state.runfolder import MAY_CHANGE

if TYPE_CHECKING:
    from intfast.run import Parts
    from intfast.study.summary import Found

USAGE = """\
usage: python -m intfast.train CONFIG.toml [key.sub=value ...] [--dry-run]

Runs Intervention Training: attempts, verification, interventions, continuations, SFT, RL,
evaluation, export. The same command continues an interrupted run.

Ctrl-C, SIGTERM and SIGHUP stop it: an optimizer step that has begun is finished and saved, anything
else is broken off within a second or one token, since it can be repeated exactly. Ctrl-C again
leaves at once, as kill -9 does: nothing that was saved is lost.

Exit codes: 0 done; 1 the environment (disk, memory, device); 2 something that you can change (the
message says what); 124 no progress for watchdog_s; 129 SIGHUP, 130 Ctrl-C, 143 SIGTERM.

  --dry-run   check everything, print the plan, generate and train nothing
  --help      this text

Settings (in the file under [section], or as key.sub=value; key.sub=absent unsets an optional one):
"""


def run(config: Config, console: Any = None) -> dict[str, Any]:
    """Run all stages of a config; returns the summary that is also in `summary.json`.

    Raises ValueError for what the user can change, RuntimeError for the environment.
    """
    from intfast import collect, learn
    from intfast.methods import guided, sft_data
    from intfast.run import build
    from intfast.state.metrics import make_console
    from intfast.study import analysis, report, summary, token_logprobs

    start = time.perf_counter()
    with build(config, console or make_console()) as parts:
        collect.evaluation(parts, "base")
        found = gather(parts, [config])
        last = "base"

        if config.sft.epochs:
            last = sft_data.STAGES.get(config.sft.data, config.sft.data)
            found.examples = sft_data.examples(parts, found)
            if found.interventions:
                summary.say_intervention(parts, found)
            learn.sft(parts, last, found.examples)
            token_logprobs.write(parts, last, found.examples)
            collect.evaluation(parts, last)

        supervised = last
        if config.rl.steps:
            problems = found.rl_problems(config.rl.problems)
            hints = guided.hints(parts, problems)
            for name in (last, "base") if config.rl.from_base else (last,):
                learn.rl(parts, f"{name}_rl", name, problems, hints)
                collect.evaluation(parts, f"{name}_rl")
            last = f"{last}_rl"

        summary.export(parts, last)
        analysis.write(parts, found, supervised)
        result = summary.write(parts, found, time.perf_counter() - start)
        page = report.write([parts.folder.path], parts.folder.path / "report.html")
        parts.metrics.say(f"to read it, open {page}")
        return result


def gather(parts: Parts, configs: Sequence[Config]) -> Found:
    """What the training data and the choice of problems of these configs need."""
    from intfast import collect
    from intfast.study.summary import Found

    found = Found(selected=parts.problems[: parts.config.attempts.max_problems])
    if any(config.needs_attempts for config in configs):
        found.attempts = collect.attempts(parts)
        found.selected = collect.select(parts, found.attempts)
        found.wrong = collect.wrong_attempts(parts, found.selected, found.attempts)
    if any(config.needs_interventions for config in configs):
        found.interventions, found.continuations = collect.interventions(parts, found.wrong)
    return found


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code that USAGE lists."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE + "\n" + cli.explain(MAY_CHANGE))
        return 0
    dry_run = "--dry-run" in arguments
    words = [word for word in arguments if word != "--dry-run"]
    if not words or "=" in words[0]:
        print(USAGE.split("\n\n")[0] + "\n\n--help explains every setting.", file=sys.stderr)
        return 2

    def work() -> None:
        config = cli.load(words[0], words[1:])
        if dry_run:
            from intfast import plan

            plan.show(config)
        else:
            run(config)

    return exit_code(work, "the same command continues this run")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
