"""The arms of a comparison: each a few settings on top of one config, for the same trainer.

An arm is a row of the table. `X` is a set of weights after SFT, `X_rl` the same after RL; both come
from one run where both are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Arm(NamedTuple):
    """One row: its label, the settings of its run, and the evaluation of the run that it shows."""

    label: str
    settings: tuple[str, ...]
    evaluation: str


PLAIN = (
    "rl.from_base=false",
    "rl.hint=off",
    "intervene.baselines=false",
    "analysis.texts=0",
)
"""Settings of every arm: nothing is run or measured beside the arm itself."""
_ONLY_RL = {
    "rl": ("RL", ()),
    "hint_rl": ("hint-guided RL, shortest beginning", ("rl.hint=shortest",)),
    "fixed_hint_rl": (
        "hint-guided RL, half of the reference",
        ("rl.hint=0.5",),
    ),
}
_SFT = {
    "reference": ("SFT on references", ("sft.data=reference",)),
    # One rewrite per problem, so that all whole-solution arms have as many examples.
    "reflection": (
        "SFT on self-reflections",
        ("sft.data=reflection", "sft.target=one_per_problem"),
    ),
    "rft": ("SFT on right attempts (RFT)", ("sft.data=rft", "sft.target=recipe")),
    "star": ("SFT on rationalisations (STaR)", ("sft.data=star", "sft.target=one_per_problem")),
    "prefix": ("SFT on beginnings (UPFT)", ("sft.data=prefix",)),
    "int": ("InT", ("sft.data=intervention",)),
}


def _all() -> dict[str, Arm]:
    arms = {"base": Arm("base", (), "base")}
    for name, (label, settings) in _ONLY_RL.items():
        arms[name] = Arm(label, (*PLAIN, "sft.epochs=0", *settings), "base_rl")
    for name, (label, settings) in _SFT.items():
        arms[name] = Arm(label, (*PLAIN, "rl.steps=0", *settings), name)
        arms[f"{name}_rl"] = Arm(f"{label} + RL", (*PLAIN, *settings), f"{name}_rl")
    return arms


ARMS = _all()
"""Name -> arm, in the order of the table."""
DEFAULT = [name for name in ARMS if name not in ("rft_rl", "star_rl", "prefix_rl")]
"""The rows of the paper's table and the usual sanity checks before RL."""
OURS = "int_rl"
"""The arm that the others are compared with, and whose tokens they may spend."""


def check(names: Sequence[str]) -> list[str]:
    """The named arms in the order of the table; raises ValueError for one that does not exist."""
    if unknown := [name for name in names if name not in ARMS]:
        raise ValueError(f"no arm {', '.join(unknown)}; arms are {', '.join(ARMS)}")
    if not names:
        raise ValueError(f"arms= names no arm; arms are {', '.join(ARMS)}")
    return [name for name in ARMS if name in names]


def family(name: str) -> str:
    """What `X` and `X_rl` share, as they may share a run: `X`."""
    return name.removesuffix("_rl")


def needs_sft(name: str) -> bool:
    """Whether an arm starts with supervised fine-tuning."""
    return family(name) in _SFT


def run_of(name: str, names: Sequence[str]) -> str:
    """The arm whose run holds the row `name`: `X_rl` holds `X` too, where both are wanted."""
    return f"{name}_rl" if f"{name}_rl" in names else name


def runs(names: Sequence[str]) -> list[str]:
    """The runs behind these rows; ours first, because it sets the tokens of the others."""
    found = dict.fromkeys(run_of(name, names) for name in names if name != "base")
    return sorted(found, key=lambda name: name != OURS)
