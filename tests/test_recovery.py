"""The campaigns of kills, stops and damage at small size; in processes of their own, to fork."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.reliability import corrupt, kill, resume
from benchmarks.reliability.children import NAMES, Child, Moment

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.campaign


def test_damaged_checkpoints_are_passed_over_and_crashes_leave_old_or_new():
    figures = corrupt.run(100, seed=1)
    assert figures["passed"] and figures["control_failed"], figures
    assert sum(figures["crash_states"].values()) > 50


def test_stopped_before_a_step_training_sees_the_same_samples():
    figures = resume.run(2, seed=1)
    assert figures["passed"] and figures["control_failed"], figures


def campaign(code: str) -> dict:
    """What a piece of code prints as JSON, run where nothing has computed yet."""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_an_update_that_is_over_at_once_gives_way_to_the_next():
    child = Child.__new__(Child)
    child.events, write = os.pipe()
    child.phases, child.furthest = [], -1
    update = NAMES.index("rl update") << 1
    os.write(write, bytes([update | 1, update, update | 1]))
    moment, times = Moment("rl update", "rl update"), {"rl update": [0.01]}
    assert kill._reached(child, moment, random.Random(0), times)
    assert child.phases == ["rl update"]
    os.close(write)
    assert not child.next()
    os.close(child.events)


def test_kills_are_dealt_to_the_phases_with_the_fewest():
    kills, rng = Counter(), random.Random(0)
    for _ in range(26):
        kills.update(kill._dealt(rng, kill.ORDER, kills))
    least = 26 * kill.KILLS_PER_RUN // len(kill.ORDER)
    assert {kills[phase] for phase in kill.ORDER} <= {least, least + 1}


KILL = """
import json, tempfile
from pathlib import Path
from benchmarks.reliability import bed, kill
kill.KILLS_PER_RUN = 4
kill.warm_up(bed.MODEL)
with tempfile.TemporaryDirectory() as name:
    bed.prepare(Path(name), 0)
    found = kill.campaign(Path(name), "run", {kills}, 0, *{arguments})
print(json.dumps([found.runs, found.equal, sum(found.kills.values())]))
"""


def test_killed_runs_end_as_undisturbed_ones():
    runs, equal, kills = campaign(KILL.format(kills=3, arguments="()"))
    assert equal == runs > 0 and kills >= 3


def test_the_kills_find_randomness_that_is_not_restored():
    # Several runs: the few kills of one may all fall where nothing is drawn.
    arguments = "kill.VARIANTS['global randomness']"
    runs, equal, _ = campaign(KILL.format(kills=12, arguments=arguments))
    assert equal < runs


@pytest.mark.parametrize("seed", [0])
def test_stopped_processes_save_in_time_and_leave_nothing_behind(seed):
    code = f"""
import json
from benchmarks.reliability import term
term.STOPS_PER_RUN = 3
term.GRACE_S = 120
print(json.dumps(term.run(2, {seed})))
"""
    figures = campaign(code)
    assert figures["passed"] and figures["control_failed"], figures
