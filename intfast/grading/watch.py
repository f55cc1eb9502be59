"""Rates of the reasons of grades, and a stop when too many answers cannot be scored.

A run whose answers come back unscored, or name no answer, learns nothing and looks busy; so does
one whose answers are cut at the length limit.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from operator import attrgetter

from intfast.config import Config
from intfast.grading.grader import Grade
from intfast.grading.reasons import Reason, Status
from intfast.records import Attempt, Continuation, Intervention
from intfast.state.runfolder import RunFolder

WINDOW = 256
"""Latest answers that the rate of the stop is taken over."""
MIN_ANSWERS = 64
"""Answers that must have been seen before a rate means anything."""
MAX_UNSCORED = 0.5
"""Share of the latest answers that may be unscored; above it the run stops."""
SILENT_SHARE = 0.9
"""Share of texts without an answer above which the console says so."""

REMEDIES = {
    Reason.TIMEOUT: "timeout: raise grade.timeout_s, or set grade.workers to the free CPU cores",
    Reason.CRASH: "crash: free memory for the grading processes, or lower grade.workers",
    Reason.GOLD_UNPARSEABLE: "gold_unparseable: look at the answer column of the data",
}
_FUNCTION = "{}: what grade.function did first is said above"


class GradeWatch:
    """Counts grades. `say` gets the one warning about texts without an answer."""

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self.say = say
        self._latest: deque[Reason] = deque(maxlen=WINDOW)
        self._counts: Counter[Reason] = Counter()
        self._has_warned = False

    def add(self, grades: Iterable[Grade]) -> None:
        """Count these grades.

        Raises ValueError when more than MAX_UNSCORED of the latest answers are unscored.
        """
        for grade in grades:
            self._latest.append(grade.reason)
            self._counts[grade.reason] += 1
        latest, total = Counter(self._latest), len(self._latest)
        if total < MIN_ANSWERS:
            return
        unscored = {r: n for r, n in latest.most_common() if r.status is Status.UNSCORED}
        share = sum(unscored.values()) / total
        if share > MAX_UNSCORED:
            listing = ", ".join(f"{count} {reason}" for reason, count in unscored.items())
            raise ValueError(
                f"{share:.0%} of the last {total} answers could not be scored ({listing}), more "
                f"than {MAX_UNSCORED:.0%}. What helps:\n"
                + "\n".join(f"  {REMEDIES.get(r, _FUNCTION.format(r))}" for r in unscored)
            )
        silent = latest[Reason.NO_ANSWER] / total
        if silent >= SILENT_SHARE and not self._has_warned:
            self._has_warned = True
            self.say(
                f"warning: {silent:.0%} of the last {total} texts name no answer, so nearly every "
                "reward is 0; check grade.mode, and prompt.instruction (it should ask for "
                "\\boxed{} where grade.mode is boxed)"
            )

    def take(self) -> dict[str, float]:
        """{"graded": number, "grade_<reason>": share of it} since the last call."""
        total = self._counts.total()
        rates = {f"grade_{reason}": n / total for reason, n in sorted(self._counts.items())}
        self._counts.clear()
        return {"graded": total} | rates if total else {}


def at_gates(candidates: Iterable[Intervention]) -> tuple[dict[str, int], str]:
    """Candidates by gate, and under "cut_GATE" those whose reply hit the length limit; in words."""
    gates: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    for record in candidates:
        gates[record.gate] += 1
        cut[record.gate] += record.finish_reason == "length"
    words = [
        f"{n} {gate}" + (f" ({cut[gate]} cut at the length limit)" if cut[gate] else "")
        for gate, n in gates.most_common()
    ]
    return {**gates, **{f"cut_{gate}": n for gate, n in cut.items() if n}}, ", ".join(words)


def cut_short(folder: RunFolder, config: Config) -> str:
    """Which length limits most of the collection ran into, and what to raise; "" for none."""
    found = []
    for name, kind, setting in (
        ("attempts", Attempt, "attempts.sampling"),
        ("interventions", Intervention, "intervene.sampling"),
        ("continuations", Continuation, "intervene.continuation"),
    ):
        records = folder.journal(name, kind)
        cut = sum(record.finish_reason == "length" for record in records)
        if 2 * cut > len(records):
            limit = attrgetter(setting)(config).max_new_tokens
            found.append(
                f"{cut} of {len(records)} {name} were cut at the length limit: raise "
                f"{setting}.max_new_tokens = {limit:,} (and rollout.context, where that is reached)"
            )
    return "; ".join(found)
