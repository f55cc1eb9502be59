"""The command: a config in, a run folder out. The stages are in pipeline.py.

python -m intfast.train configs/quickstart.toml [key.sub=value ...] [--dry-run]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from intfast import checks, cli, ranks
from intfast.state.command import outcome, say

USAGE = """\
usage: python -m intfast.train CONFIG.toml [key.sub=value ...] [--dry-run [--ranks N]]

Runs Intervention Training: attempts, verification, interventions, continuations, SFT, RL,
evaluation, export. The same command continues an interrupted run.

Ctrl-C, SIGTERM and SIGHUP stop it: an optimizer step that has begun is finished and saved, anything
else is broken off within a second or one token, since it can be repeated exactly. Ctrl-C again
leaves at once, as kill -9 does: nothing that was saved is lost.

On N GPUs: torchrun --standalone --nproc-per-node N -m intfast.train CONFIG.toml ...; then a stop
waits for the end of a step, or of a chunk of samples, and all ranks make it together.

Exit codes: 0 done; 1 the environment (disk, memory, device); 2 something that you can change (the
message says what); 124 no progress for watchdog_s; 129 SIGHUP, 130 Ctrl-C, 143 SIGTERM.

  --dry-run   check everything, print the plan, generate and train nothing
  --ranks N   with --dry-run: the plan for N GPUs, and the command that starts them
  --models    the families of models, and what was verified of each
  --help      this text; --help rl: a section or setting alone

Settings (in the file under [section], or as key.sub=value; key.sub=absent unsets an optional one):
"""


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code that USAGE lists."""
    if [*arguments] == ["--models"]:
        from intfast.model import families

        return say(families.listed(), 0)
    dry_run = "--dry-run" in arguments
    world, arguments = _world(arguments) if dry_run else (1, arguments)
    if not world:
        return say("--ranks: expected a whole number >= 1 behind it, as in --dry-run --ranks 8", 2)
    words = [word for word in arguments if word not in ("--dry-run", "--help", "-h")]
    if len(words) + dry_run < len(arguments):
        return _help([word for word in words if "=" not in word and not word.endswith(".toml")])
    if not words or "=" in words[0]:
        return say(USAGE.split("\n\n")[0] + "\n\n--help explains every setting.", 2)

    with outcome("the same command continues this run", goes_on=not dry_run) as ended:
        config = cli.load(words[0], words[1:])
        if dry_run or ranks.launched().world == 1:
            checks.check_paths(config)
        if dry_run:
            from intfast import plan

            if ranks.launched().is_main:
                plan.show(config, num=world, words=words)
        else:
            # Here, so that a wrong setting is refused before torch is loaded.
            from intfast import pipeline
            from intfast.engine.device import pick_device
            from intfast.methods import table
            from intfast.run import open_run
            from intfast.study import finish

            def device() -> Any:
                checks.check_paths(config)  # each rank its own, and one message of all
                return pick_device(table.check(config))

            with (
                ranks.joined(device, config.watchdog_s, config.ranks.tp),
                open_run(config) as run,
                finish.page_of_failure(run),
            ):
                finish.finish(run, pipeline.train(run))
    return ended.code


def _world(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """The N of `--ranks N`, else that of torchrun; 0 for no number; and the other arguments."""
    if "--ranks" not in arguments:
        return ranks.launched().world, [*arguments]
    place = arguments.index("--ranks")
    number = "".join(arguments[place + 1 : place + 2])
    return int(number) if number.isdecimal() else 0, [*arguments[:place], *arguments[place + 2 :]]


def _help(parts: Sequence[str]) -> int:
    try:
        texts = [cli.explain(checks.MAY_CHANGE, part) for part in parts]
    except ValueError as error:
        return say(f"error: {error}", 2)
    return say("\n\n".join(texts) or USAGE + "\n" + cli.explain(checks.MAY_CHANGE))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
