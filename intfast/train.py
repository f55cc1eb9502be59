"""The entry point: config in, the stages in plain sight, run folder out.

python -m intfast.train configs/quickstart.toml [key.sub=value ...] [--dry-run]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from intfast import config_io
from intfast.config import Config
from intfast.safe_text import shown

USAGE = """\
usage: python -m intfast.train CONFIG.toml [key.sub=value ...] [--dry-run]

Runs Intervention Training: attempts, verification, interventions, continuations, SFT, RL,
evaluation, export. The same command continues an interrupted run.

  --dry-run   check everything, print the plan, generate and train nothing
  --help      this text

Settings (in the file under [section], or as key.sub=value):
"""


def run(config: Config, console: Any = None) -> dict[str, Any]:
    """Run all stages of a config; returns the summary that is also in `summary.json`.

    Raises ValueError for what the user can change, RuntimeError for the environment.
    """
    from intfast import learn, stages, summary
    from intfast.metrics import make_console
    from intfast.parts import build

    start = time.perf_counter()
    with build(config, console or make_console()) as parts:
        stages.evaluation(parts, "base")
        last = "base"
        found = summary.Found(selected=parts.problems)

        if config.sft.epochs:
            attempts = stages.attempts(parts)
            found.selected = stages.select(parts, attempts)
            found.wrong = stages.wrong_attempts(parts, found.selected, attempts)
            found.interventions, found.continuations = stages.interventions(parts, found.wrong)
            found.examples = stages.examples(parts, found.interventions, found.continuations)
            summary.say_intervention(parts, found)
            learn.sft(parts, "int", found.examples)
            stages.evaluation(parts, "int")
            last = "int"

        if config.rl.steps:
            problems = found.rl_problems(config.rl.problems)
            name = f"{last}_rl"
            learn.rl(parts, name, last, problems)
            stages.evaluation(parts, name)
            if config.rl.from_base:
                learn.rl(parts, "base_rl", "base", problems)
                stages.evaluation(parts, "base_rl")
            last = name

        summary.export(parts, last)
        return summary.write(parts, found, time.perf_counter() - start)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code: 0 done, 2 user error, 1 environment, 130 Ctrl-C."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE + "\n" + config_io.explain())
        return 0
    dry_run = "--dry-run" in arguments
    words = [word for word in arguments if word != "--dry-run"]
    if not words or "=" in words[0]:
        print(USAGE.split("\n\n")[0] + "\n\n--help explains every setting.", file=sys.stderr)
        return 2
    try:
        config = config_io.load(words[0], words[1:])
        if dry_run:
            from intfast import plan

            plan.show(config)
        else:
            run(config)
    except ValueError as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command continues this run", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
