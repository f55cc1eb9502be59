"""Kinds of answers that were graded wrongly once: each with right values, all in one grader."""

import json
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks import grading as benchmark
from benchmarks import grading_pairs
from intfast.grading import grader as grading
from intfast.grading.grader import Grader
from intfast.leak import leaks
from intfast.records import Problem
from intfast.state import files

# class: gold | answer | + right, - wrong, or the reason that it is wrong for.
CLASSES = r"""
A1 5 | 5\text{ million} | leftover
A1 5 | 5\text{ factorial} | leftover
A1 5 | 5\text{ or more} | leftover
A1 5 | 5\text{ is wrong} | leftover
A1 2 | 2\text{ hours and }15\text{ minutes} | leftover
A1 4 | 4\text{ feet }6\text{ inches} | leftover
A1 5 | 5! | -
A1 135\text{ minutes} | 2\text{ hours and }15\text{ minutes} | +
A1 18 | 18\text{ marbles} | +
A2 7\text{ kg} | 7\text{ g} | unit
A2 7\text{ kg} | 7000\text{ g} | +
A2 20\text{ minutes} | 20\text{ seconds} | unit
A2 \$20 | 20\text{ cents} | unit
A2 \$20 | 2000\text{ cents} | +
A2 20\text{ cm}^2 | 20\text{ cm} | unit
A2 5\text{ apples} | 5\text{ pears} | unit
A3 45^\circ | 45\text{ rad} | unit
A3 45^\circ | \frac{\pi}{4}\text{ rad} | +
A3 45^\circ | \frac{\pi}{4} | +
A3 45^\circ | 45' | unit
A4 9:10\text{ AM} | 9:10\text{ PM} | unit
A4 9:10\text{ PM} | 21:10 | +
A5 \frac{3}{7} | 0.428571 | -
A5 \sqrt{3} | 1.7320508 | -
A5 \pi | 3.14159265358979323846264338 | -
A5 0.7654321 | 0.7654322 | -
A5 \frac{3}{8} | 0.375 | +
A5 2^{1000} | 2^{1000}+1 | -
A6 8 | 8+\frac{0}{2-2} | undefined
A6 0 | \frac{y}{0}-\frac{y}{0} | undefined
A6 0 | \frac{3}{2-2}\cdot 0 | undefined
A6 0 | \frac{0}{3-3} | undefined
A6 0 | \infty-\infty | undefined
A6 1 | \frac{x-x}{x-x} | undefined
A4 3:4 | 6:8 | +
A4 3:4 | 4:3 | -
A4 3:4 | 3:zz(( | unparseable
A7 27 | 27_8 | unit
A7 27_8 | 27_9 | unit
A7 27_8 | 27_{8} | +
A7 3 | 3\ldots | leftover
A7 5 | (2)(3) | -
A7 (3,4) | \{3,4\} | -
A7 \{3,4\} | (3,4) | -
A7 \text{E} | e | -
A7 A+b | a+b | -
A1 23/4 | 2\text{ }3/4 | -
A6 0 | 0\cdot\tan 90^\circ | undefined
A6 0 | 0\cdot\sec\frac{\pi}{2} | undefined
A7 \{1,2\} | \{1,\{2\}\} | -
A7 27_8 | (27)_8 | +
A7 27_8 | 27_{\text{eight}} | +
A7 27_8 | 27\text{ base }8 | +
A7 27_8 | 27\text{ in base }9 | unit
R1 \frac{3}{4} | \frac 3 4 | +
R2 (2,5] | x>2\text{ and }x\le5 | +
R2 (2,5] | x<2\text{ and }x\le5 | -
R2 (2,5] | ]2,5] | +
R2 (2,5] | ]2,5[ | -
R2 [3,\infty) | [3,\infty[ | +
R2 [\sqrt[3]{2},\sqrt[3]{5}] | \sqrt[3]{2}\le x\le\sqrt[3]{5} | +
R4 \frac{1}{6} | 0.1\overline6 | +
R4 \frac{1}{6} | 0.1\dot6 | +
R4 \frac{5}{11} | 0.\dot{4}\dot{5} | +
R6 \mathbb{R} | \R | +
R6 \mathbb{R} | \Bbb{R} | +
R7 x^2+2x+1 | x^2+2x+1=f(x) | +
R8 D | \text{D. 40} | +
R8 D | \text{choice }D | +
R8 D | (\text{D}) | +
R8 D | D. E | -
R8 D | D: 4, E: 5 | -
R9 7 | \text{Therefore, }x=7 | +
R9 7 | \text{There are }7\text{ ways} | +
R9 7 | \text{There are at least }7\text{ ways} | -
R9 7 | \color{red}7 | +
R14 i | \cos\frac\pi2+i\sin\frac\pi2 | +
R15 60\text{ km/h} | 60\,\mathrm{km\,h^{-1}} | +
R15 5\text{ cm}^2 | 5\text{ cm²} | +
R15 5\text{ cm}^2 | 5\text{ cm³} | unit
R16 \begin{pmatrix}3\\4\end{pmatrix} | \begin{psmallmatrix}3\\*[3pt]4\end{psmallmatrix} | +
R16 \begin{pmatrix}3\\4\end{pmatrix} | \begin{pmatrix}3\cr4\end{pmatrix} | +
R18 (-\infty,2] | \left\{t\,\middle|\,t\le2\right\} | +
R18 (-\infty,2] | \{t\in\mathbb R\colon t\le2\} | +
R18 x=2k\pi,\ k\in\mathbb{Z} | x=2\pi n\text{ where }n\text{ is an integer} | +
R18 x=2k\pi,\ k\in\mathbb{Z} | x=2k\pi\ (k\in Z) | +
R18 x=2k\pi,\ k\in\mathbb{Z} | x=2k\pi\text{ for integer }k | +
R18 x=2k\pi,\ k\in\mathbb{Z} | x=k\pi\text{ for integer }k | -
R20 120 | {10\choose3} | +
R21 \$20 | \text{\$20} | +
R21 \$20 | 20\$ | +
R21 \$20 | \text{EUR }20 | unit
A1 12 | 12\text{ basis points} | leftover
A3 \frac{\pi}{4} | \frac{\pi}{4}^\circ | -
A3 90^\circ | 90\text{°} | +
A6 0 | 0\cdot\log_{0}5 | leftover
R2 x\ne 2 | \mathbb{R}\setminus\{2\} | +
R2 x\ne 2 | \mathbb{R}\setminus\{3\} | -
R4 \frac5{11} | .\overline{45} | +
R9 12 | \text{The value of }x\text{ is }12 | +
R9 12 | \text{exactly }12 | +
R9 12 | \large 12 | +
R15 3\text{ m/s} | 3 m/s | +
R18 x=k\pi,\ k\in\mathbb{Z} | \{k\pi\mid k\in\mathbb{Z}\} | +
R18 x=k\pi,\ k\in\mathbb{Z} | \{x\mid x=2k\pi,k\in\mathbb{Z}\} | -
R21 28\% | 28\text{ \%} | +
R1 48600 | 48\,600 | +
R1 48600 | 48 600 | +
R1 0 | 20\,000 | -
R2 (2,5] | 2<x\le 5 | +
R2 [3,\infty) | x\ge 3 | +
R2 (-\infty,0)\cup(4,\infty) | x<0\text{ or }x>4 | +
R2 (-\infty,0)\cup(4,\infty) | x<0\text{ and }x>4 | -
R2 (2,5] | 2<x<5 | -
R4 \frac{5}{11} | 0.\overline{45} | +
R4 \frac{1}{6} | 0.1\overline{6} | +
R4 \frac{1}{6} | 0.\overline{16} | -
R5 2.75 | 2\ 3/4 | +
R5 2.75 | 2 3/4 | +
R5 \frac{3}{2} | 2 3/4 | -
R6 \{\} | \varnothing | +
R6 \phi | \varphi | +
R6 \mathbb{R} | \mathbf{R} | +
R6 \ln 2 | \log_e 2 | +
R7 9 | 9=y | +
R7 x=9 | 9=y | -
R8 D | \textbf{(D)}\ 40 | +
R8 D | \text{(D) }40 | +
R8 D | \textbf{(E)}\ 40 | -
R8 D | \text{(D) or (E)} | -
R9 7 | \text{The result is }7 | +
R9 \text{Friday} | \text{Friday.} | +
R9 7 | \text{The result is not }7 | -
R11 3\sqrt{7} | 3\cdot 7^{0.5} | +
R11 \sqrt{2} | 2^{0.5} | +
R12 9.11\times 10^{23} | 911000000000000000000000 | +
R12 2^{100} | 1267650600228229401496703205376 | +
R13 25000 | 2.5e4 | +
R13 0.6 | 6e-1 | +
R14 \frac{1}{2} | \sin 30^\circ | +
R14 i | e^{i\pi/2} | +
R15 25 | 25\ \frac{\text{m}}{\text{s}} | +
R15 25\text{ m/s} | 90\ \frac{\text{km}}{\text{h}} | +
R16 \begin{pmatrix}3\\4\end{pmatrix} | \begin{pmatrix}3\\[2pt]4\end{pmatrix} | +
R17 9:10\text{ AM} | 9{:}10\text{ a.m.} | +
R18 16\frac{2}{3}\% | \frac{50}{3}\% | +
R18 \{x \mid x\le 2\} | (-\infty,2] | +
R18 x=\frac{\pi}{6}+2k\pi,\ k\in\mathbb{Z} | x=\frac{\pi}{6}+2n\pi,\ n\in\mathbb{Z} | +
R18 x=\frac{\pi}{6}+2k\pi,\ k\in\mathbb{Z} | x=\frac{\pi}{6}+k\pi,\ k\in\mathbb{Z} | -
R21 28\% | 28\text{ percent} | +
R21 28\% | 28\text{ percentage points} | unit
R21 x\ge 5 | x >= 5 | +
H3 7 | 8!!!!!!!!! | too_complex
H3 7 | \binom{10^7}{3\cdot 10^6} | too_complex
H3 7 | (a+b+c+d)^{99} | -
H3 7 | (1+x)^{99999} | too_complex
H3 (x+1)^{40} | (1+x)^{40} | +
"""
UNICODE = [
    ("48600", "48\u202f600", "+"),
    ("48600", "48\xa0600", "+"),
    ("7", "\uff17", "+"),
    (r"\frac{3}{4}", "\xbe", "+"),
    (r"3\sqrt{5}", "3\u221a5", "+"),
    ("25", "5\xb2", "+"),
    (r"x\ne 3", "x\u22603", "+"),
    ("1000.99", "1,000.99 \u20ac", "+"),
    (r"\$20", "20 \u20ac", "unit"),
]
COMPLETIONS = [
    ("7", r"so $\fbox{7}$", "+"),
    ("7", r"so $\boxed 7$.", "+"),
    ("(2,3),(7,1)", r"So $\boxed{(2,3)}$ and $\boxed{(7,1)}$.", "+"),
    ("k=4, n=9", r"\boxed{k=4} and \boxed{n=9}", "+"),
    ("9", r"\boxed{4} or \boxed{9}", "-"),
    ("4,9", r"\boxed{4}. No: \boxed{9}", "-"),
]


def wanted() -> list[tuple[str, str, str]]:
    """(gold, completion, verdict)."""
    rows = [line.split(" ", 1)[1].split(" | ") for line in CLASSES.strip().splitlines()]
    rows += UNICODE
    return [(gold, rf"\boxed{{{answer}}}", say) for gold, answer, say in rows] + COMPLETIONS


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1, timeout_s=20) as grader:
        yield grader


def test_every_class_has_its_right_verdicts(grader):
    grades = grader.grade_many([row[:2] for row in wanted()])
    differ = []
    for (gold, text, say), grade in zip(wanted(), grades, strict=True):
        is_right = grade.status == {"+": "correct"}.get(say, "wrong")
        if not is_right or (say not in "+-" and grade.reason != say):
            differ.append((gold, text, grade.reason))
    assert differ == []


def test_a_sample_of_every_made_class_is_graded_as_it_was_made(grader):
    pairs = grading_pairs.made(seed=7, count=8)
    assert {pair.category for pair in pairs} == set(grading_pairs.CLASSES)
    grades = grader.grade_many([(pair.gold, pair.text) for pair in pairs])
    assert [
        p for p, g in zip(pairs, grades, strict=True) if (g.status == "correct") != p.is_right
    ] == []


def test_the_readme_holds_the_table_of_the_stored_rows():
    readme = Path(grading.WORKER).with_name("README.md").read_text(encoding="utf-8")
    assert benchmark.stored() in readme


def test_markers_are_unscored_and_sound_golds_are_gradable(grader):
    sound = [row[0] for row in wanted()] + [
        "proof by 7",
        r"\text{five or more}",
        r"x'",
        "3,4,\\ldots",
    ]
    assert [g for g, ok in zip(sound, grader.check_golds(sound), strict=True) if not ok] == [
        "proof by 7"
    ]
    markers = ["proof", "see the proof", "see figure", "N/A", "?", "..."]
    assert not any(grader.check_golds(markers))
    grades = grader.grade_many([(marker, rf"\boxed{{{marker}}}") for marker in markers])
    assert {grade.reason for grade in grades} == {"gold_unparseable"}


def test_fresh_workers_agree():
    """Undefined and nearly equal expressions were right or wrong by chance."""
    golds = ["0", "0", "0", "1", r"\sin(x)+\cos(x)", r"\sqrt{x^2}"]
    answers = [r"\frac{3}{2-2}\cdot 0", r"\frac{0}{3-3}", r"0\cdot\frac{1}{x-x}"]
    answers += [r"\frac{x-x}{x-x}", r"\sqrt{2}\sin(x+\frac{\pi}{4})", "x"]
    table = [(gold, rf"\boxed{{{answer}}}") for gold, answer in zip(golds, answers, strict=True)]
    seen = set()
    for _ in range(12):
        random.shuffle(table)
        with Grader(workers=1, timeout_s=30) as grader:
            grades = grader.grade_many(table)
        seen.add(tuple(sorted((*row, g.reason) for row, g in zip(table, grades, strict=True))))
    assert len(seen) == 1


def test_a_power_without_a_number_raises_nothing(grader):
    pairs = [(r"5\text{ m}", r"\boxed{5\text{ m^}}"), ("5", r"\boxed{5\text{ m^ s}}")]
    assert [grade.status for grade in grader.grade_many(pairs)] == ["wrong", "wrong"]


def test_numbers_of_any_length_raise_nothing(grader):
    long = "7" * 4301
    rows = [(long, r"\boxed{7}"), ("7", rf"\boxed{{{long}}}"), (long, rf"\boxed{{{long}}}")]
    rows += [(rf"\frac{{{long}}}{{3}}", r"\boxed{7}"), (f"{long}_8", r"\boxed{7}")]
    assert [grade.status for grade in grader.grade_many(rows)] == [
        *("unscored", "wrong", "correct", "unscored", "unscored")
    ]
    assert not leaks("the answer is 1" + "0" * 5000, "12")
    assert leaks("the answer is 12, not 1" + "0" * 5000, "12")
    assert leaks("so \\boxed{1}" * 17, "12")


def test_rounded_decimals_are_accepted_only_where_the_config_says_so():
    table = [(r"\frac{3}{7}", "0.428571"), (r"\frac{3}{7}", "0.42857"), (r"\sqrt{3}", "1.732051")]
    table += [(r"\frac{3}{7}", "0.428572"), ("0.7654321", "0.765432"), ("0.7654321", "0.765433")]
    rows = [(gold, rf"\boxed{{{answer}}}") for gold, answer in table]
    with Grader(workers=1, timeout_s=20, digits=6) as grader:
        found = [grade.status == "correct" for grade in grader.grade_many(rows)]
    assert found == [True, False, True, False, True, False]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_worker_is_held_to_its_memory():
    program = (
        "import json, runpy, sympy, latex2sympy2_extended\n"
        f"worker = runpy.run_path({str(grading.WORKER)!r})\n"
        f"worker['set_limits']({grading.WORKER_MEMORY_BYTES})\n"
        "held = []\n"
        "try:\n"
        "    while True: held.append(bytearray(1 << 20))\n"
        "except MemoryError:\n"
        "    held.clear()\n"
        "peak = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "print(int(peak[0].split()[1]) >> 10)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 200 < int(done.stdout) <= 300


def test_nothing_of_sympy_is_imported_after_ready():
    answers = json.dumps([row[1][7:-1] for row in wanted() if row[1].startswith("\\boxed{")])
    program = (
        "import json, runpy, sys\n"
        f"worker = runpy.run_path({str(grading.WORKER)!r})\n"
        "worker['warm_up']()\n"
        "before = set(sys.modules)\n"
        f"for answer in json.loads({answers!r}):\n"
        "    worker['judge']('x+1', answer)\n"
        "    worker['judge'](answer, answer)\n"
        "print(*sorted(name for name in set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == []


def test_a_record_with_a_lone_surrogate_can_be_written():
    record = Problem(id="1", problem="a\ud801b", answer="7")
    line = files.json_line(record)
    assert msgspec.json.decode(line, type=Problem).problem == "a\ufffdb"
    plain = Problem(id="1", problem="a\U0001f600", answer="7")
    assert files.json_line(plain) == msgspec.json.encode(plain) + b"\n"
