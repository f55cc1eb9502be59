"""Deriving a run folder from another: the same records, other settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from intfast.config import Config
from intfast.state.files import write_atomic
from intfast.state.runfolder import changed_settings, in_words


def check(
    config: Config, what: str, remedy: str, free: Sequence[str] = (), also: Sequence[str] = ()
) -> None:
    """Raise ValueError where the folder of a config holds a run with other settings.

    what    such a run is, for the message
    remedy  what the user can do
    free    settings that may differ, beside checks.MAY_CHANGE
    also    further differences, in words
    """
    path = Path(config.run) / "config.toml"
    changed = changed_settings(config, path)[0] if path.is_file() else {}
    rows = in_words({key: pair for key, pair in changed.items() if key not in free})
    rows += "".join(f"\n  {text}" for text in also)
    if rows:
        raise ValueError(f"{config.run} holds {what} with other settings:{rows}\n{remedy}")


def give(source: Path, target: Path, names: Sequence[str]) -> None:
    """Give a run folder the records that it lacks and `source` has, each whole or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        # A part of a journal would be taken for a collection that was interrupted.
        if (source / name).exists() and not (target / name).exists():
            write_atomic(target / name, (source / name).read_bytes())
