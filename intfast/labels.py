"""Names: of data and methods in a config, of weights in stored files, and labels for a reader."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

SftData = Literal[
    *("intervention", "reference", "reflection", "rft"),
    *("star", "regft", "prefix", "bare_prefix"),
]
"""`sft.data`."""
WITHOUT_REFERENCES = ("rft", "prefix", "bare_prefix")
"""Those that read no reference solution."""
SftTarget = Literal[
    *("recipe", "intervention", "prefix", "suffix"), *("one_per_problem", "no_filter")
]
"""`sft.target`."""
Method = Literal[
    *("outcome", "vppo", "capo", "questa", "bread", "flawed"),
    *("opsd", "sdpo", "laser", "online_int"),
]
"""`rl.method`."""
NEEDED_BY = {
    "references": ("vppo", "capo", "questa", "bread", "opsd", "online_int"),
    "interventions": ("flawed",),
    "frozen": ("opsd",),
}
"""What methods of RL need beside problems; "frozen" is a copy of the first policy."""
LABELS = {
    "base": "base",
    "base_rl": "RL",
    "hint_rl": "hint-guided RL, shortest beginning",
    "fixed_hint_rl": "hint-guided RL, half of the reference or none",
    "questa_rl": "RL on hinted problems alone (QuestA)",
    "vppo_rl": "RL, VPPO, own critic",
    "capo_rl": "RL, CAPO, own critic",
    "bread_rl": "RL, failed groups behind the reference's beginning (BREAD)",
    "flawed_rl": "RL, half from flawed beginnings",
    "opsd_rl": "RL by a teacher with the reference (OPSD)",
    "other_opsd_rl": "RL by a teacher with another's reference",
    "sdpo_rl": "RL by a teacher with a right sibling (SDPO)",
    "laser_rl": "RL with a self-reward (LaSeR)",
    "online_int_rl": "RL with interventions of its own (online InT)",
    "reference": "SFT on references",
    "reflection": "SFT on self-reflections",
    "rft": "SFT on right attempts (RFT)",
    "star": "SFT on rationalisations (STaR)",
    "regft": "SFT with most of the reference in view (ReGFT)",
    "prefix": "SFT on beginnings (UPFT)",
    "bare_prefix": "SFT on beginnings, bare prompt",
    "int_prefix": "SFT on InT's prefixes alone",
    "int": "InT",
}
"""Key -> label, in the order of the tables; RL on top of any other is "LABEL + RL"."""
STARTS = {
    "intervention": "prefix + intervention",
    "error": "prefix + wrong step",
    "prefix": "prefix alone",
}
"""Continuation.start -> label."""
EXAMPLES = {
    "reference": "reference solution",
    "reflection": "self-reflection",
    "rft": "right attempt",
    "star": "rationalisation",
    "regft": "solution along most of the reference",
    "prefix": "beginning of an attempt",
}
"""Example.kind -> label."""


class Weights(NamedTuple):
    """Weights of a run: those that an arm's SFT made, after RL or not, or in the middle of RL.

    Example: Weights.parse("int_rl@20") == Weights("int", rl=True, step=20), "InT + RL, step 20"
    """

    arm: str
    rl: bool = False
    step: int | None = None
    """Of RL; None at its end, and where there is none."""

    @classmethod
    def parse(cls, key: str) -> Weights:
        """The weights of a stored key. The name of any other stage is taken for an arm."""
        stage, _, step = key.partition("@")
        arm = stage.removesuffix("_rl")
        return cls(arm, arm != stage, int(step) if step else None)

    @property
    def stage(self) -> str:
        """The training stage that makes them: the key without the step."""
        return f"{self.arm}_rl" if self.rl else self.arm

    @property
    def key(self) -> str:
        """What stored files call them."""
        return self.stage if self.step is None else f"{self.stage}@{self.step}"

    @property
    def label(self) -> str:
        """What tables call them; the key where it is the name of another stage."""
        label = LABELS.get(self.stage)
        if label is None:
            label = LABELS.get(self.arm, self.arm) + (" + RL" if self.rl else "")
        return label if self.step is None else f"{label}, step {self.step}"

    @property
    def place(self) -> tuple[int, str, bool, int]:
        """Sorts as the tables do; evaluations within RL come behind that at its end."""
        places = list(LABELS)
        place = places.index(self.arm) if self.arm in places else len(places)
        return place, self.arm, self.rl, -1 if self.step is None else self.step


def by_method(rl: Any, need: str) -> bool:
    """Whether there is RL by a method that needs this; rl: config.RlConfig."""
    return rl.steps > 0 and rl.method in NEEDED_BY[need]


def label(key: str) -> str:
    """The label of a stored key, or the name of a stage that makes no weights."""
    return Weights.parse(key).label


def in_order(keys: list[str]) -> list[str]:
    """Stored keys as the tables have them."""
    return sorted(keys, key=lambda key: Weights.parse(key).place)
