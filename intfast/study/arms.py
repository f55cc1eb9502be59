"""The arms of a comparison: each a few settings on top of one config, for the same trainer.

An arm is a row of the table. `X` is a set of weights after SFT, `X_rl` the same after RL; both come
from one run where both are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from intfast.labels import Weights


class Arm(NamedTuple):
    """One row: label, colour, the settings of its run, and the weights of it that are shown."""

    label: str
    color: int
    settings: tuple[str, ...]
    weights: Weights


PLAIN = ("rl.from_base=false", "rl.hint=off", "intervene.baselines=false", "analysis.texts=0")
PLAIN += ("rl.method=outcome", "rl.method_args={}")
"""Settings of every arm: nothing is run or measured beside the arm itself."""
ALONE = (*PLAIN, "rl.steps=0")
"""Settings of every arm that ends with SFT."""
_OWN: dict[str, tuple[int, tuple[str, ...]]] = {
    "rl": (1, ()),
    "hint_rl": (5, ("rl.hint=shortest",)),
    "fixed_hint_rl": (6, ("rl.hint=0.5",)),
    "questa_rl": (2, ("rl.method=questa",)),
    "vppo_rl": (3, ("rl.method=vppo",)),
    "capo_rl": (4, ("rl.method=capo",)),
    "bread_rl": (5, ("rl.method=bread",)),
    "flawed_rl": (6, ("rl.method=flawed",)),
    "opsd_rl": (1, ("rl.method=opsd",)),
    "other_opsd_rl": (2, ("rl.method=opsd", "rl.method_args.teacher=other")),
    "sdpo_rl": (3, ("rl.method=sdpo",)),
    "laser_rl": (4, ("rl.method=laser",)),
    "online_int_rl": (5, ("rl.method=online_int",)),
    "reference": (2, ("sft.data=reference",)),
    # One rewrite per problem, so that all whole-solution arms have as many examples.
    "reflection": (4, ("sft.data=reflection", "sft.target=one_per_problem")),
    "rft": (1, ("sft.data=rft", "sft.target=recipe")),
    "star": (5, ("sft.data=star", "sft.target=one_per_problem")),
    "regft": (3, ("sft.data=regft", "sft.target=recipe")),
    "prefix": (6, ("sft.data=prefix",)),
    "bare_prefix": (6, ("sft.data=bare_prefix",)),
    "int_prefix": (4, ("sft.data=intervention", "sft.target=prefix")),
    "int": (3, ("sft.data=intervention",)),
}
"""Colour on the page, and settings beside PLAIN, of what is RL alone or SFT that RL may follow."""


def _all() -> dict[str, Arm]:
    base, base_rl = Weights("base"), Weights("base", rl=True)
    arms = {"base": Arm(base.label, 0, (), base)}
    for name, (color, settings) in _OWN.items():
        before, after = Weights(name), Weights(name, rl=True)
        # A control of InT has the weights that its run calls InT's.
        made = Weights("int") if "sft.data=intervention" in settings else before
        if name.endswith("rl"):
            label = base_rl.label if name == "rl" else Weights.parse(name).label
            arms[name] = Arm(label, color, (*PLAIN, "sft.epochs=0", *settings), base_rl)
        else:
            arms[name] = Arm(before.label, color, (*ALONE, *settings), made)
            arms[after.key] = Arm(after.label, color, (*PLAIN, *settings), made._replace(rl=True))
    return arms


ARMS = _all()
"""Name -> arm, in the order of the table."""
DEFAULT = ["base", "rl", "hint_rl", "fixed_hint_rl", "reference", "reference_rl", "reflection"]
DEFAULT += ["reflection_rl", "rft", "star", "prefix", "int", "int_rl"]
"""The rows of the paper's table and the usual sanity checks before RL."""
SOLID = ("base", "rl", "hint", "fixed_hint", "reference", "reflection", "int")
"""Families whose lines are whole; the others share their colours, with dashed lines."""
OURS = "int_rl"
"""The arm that the others are compared with, and whose tokens they may spend."""


def check(names: Sequence[str]) -> list[str]:
    """The named arms, or "all", in the table's order; ValueError for one that does not exist."""
    if list(names) == ["all"]:
        return list(ARMS)
    if unknown := [name for name in names if name not in ARMS]:
        raise ValueError(f"no arm {', '.join(unknown)}; arms are {', '.join(ARMS)}")
    if not names:
        raise ValueError(f"arms= names no arm; arms are {', '.join(ARMS)}")
    return [name for name in ARMS if name in names]


def family(name: str) -> str:
    """What `X` and `X_rl` share, as they may share a run: `X`."""
    return Weights.parse(name).arm


def has_rl(name: str) -> bool:
    """Whether an arm ends with RL."""
    return name in ARMS and ARMS[name].weights.rl


def is_dashed(name: str) -> bool:
    """Whether a line of the arm is dashed, as another arm has its colour."""
    return family(name) not in SOLID


def needs_sft(name: str) -> bool:
    """Whether an arm starts with supervised fine-tuning."""
    return family(name) in _OWN and family(name) != "rl"


def run_of(name: str, names: Sequence[str]) -> str:
    """The arm whose run holds the row `name`: `X_rl` holds `X` too, where both are wanted."""
    after = Weights(name, rl=True).key
    return after if after in names else name


def runs(names: Sequence[str]) -> list[str]:
    """The runs behind these rows; ours first, because it sets the tokens of the others."""
    found = dict.fromkeys(run_of(name, names) for name in names if name != "base")
    return sorted(found, key=lambda name: name != OURS)
