"""The command: a config in, a run folder out. The stages are in pipeline.py.

python -m intfast.train configs/quickstart.toml [key.sub=value ...] [--dry-run]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from intfast import checks, cli
from intfast.config import MAY_CHANGE
from intfast.state.command import outcome, say

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
  --help      this text; --help rl: a section or setting alone

Settings (in the file under [section], or as key.sub=value; key.sub=absent unsets an optional one):
"""


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code that USAGE lists."""
    dry_run = "--dry-run" in arguments
    words = [word for word in arguments if word not in ("--dry-run", "--help", "-h")]
    if len(words) + dry_run < len(arguments):
        return _help([word for word in words if "=" not in word and not word.endswith(".toml")])
    if not words or "=" in words[0]:
        return say(USAGE.split("\n\n")[0] + "\n\n--help explains every setting.", 2)

    with outcome("the same command continues this run", goes_on=not dry_run) as ended:
        config = cli.load(words[0], words[1:])
        checks.check_paths(config)
        if dry_run:
            from intfast import plan

            plan.show(config)
        else:
            # Here, so that a wrong setting is refused before torch is loaded.
            from intfast import pipeline
            from intfast.run import open_run
            from intfast.study import finish

            with open_run(config) as run, finish.page_of_failure(run):
                finish.finish(run, pipeline.train(run))
    return ended.code


def _help(parts: Sequence[str]) -> int:
    try:
        texts = [cli.explain(MAY_CHANGE, part) for part in parts]
    except ValueError as error:
        return say(f"error: {error}", 2)
    return say("\n\n".join(texts) or USAGE + "\n" + cli.explain(MAY_CHANGE))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
