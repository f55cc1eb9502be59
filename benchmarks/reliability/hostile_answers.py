"""Answers that are meant to do harm, answers at random, and answers that fish for reward."""

from __future__ import annotations

import random
from collections.abc import Iterator

from benchmarks.reliability.answer_pairs import RIGHT, WRONG, pairs

CANARY = "pwned-by-an-answer"
"""What a payload that ran would leave in the working directory."""

CODE = (
    "__import__('os').mkdir('{c}')",
    '__import__("os").system("mkdir {c}")',
    "eval(\"__import__('os').mkdir('{c}')\")",
    "exec('import os; os.mkdir(\"{c}\")')",
    "open('{c}','w')",
    "open('{c}','w').write('x')",
    "(lambda: __import__('os').mkdir('{c}'))()",
    "[c for c in ().__class__.__base__.__subclasses__()]",
    "().__class__.__bases__[0].__subclasses__()[132]",
    "''.__class__.__mro__[1].__subclasses__()",
    "globals()['__builtins__']",
    "getattr(__builtins__,'eval')('1')",
    "breakpoint()",
    "exit()",
    "quit(0)",
    "input()",
    "help()",
    "os.system('mkdir {c}')",
    "import os",
    "from os import mkdir",
    "subprocess.run(['mkdir','{c}'])",
    'sympify(\'__import__("os").mkdir("{c}")\')',
    "parse_expr('open(0)')",
    "Symbol('x').__class__",
    "lambdify(x, x)",
    "S('open(1)')",
    "compile('1','','eval')",
    "vars()",
    "dir()",
    "__name__",
    "while True: pass",
    "raise SystemExit",
    "raise KeyboardInterrupt",
    "(yield)",
    "await x",
    "print(1)",
    "f'{{1}}'",
    "1if 1else 1",
    "x:=5",
    "@x",
)
WRAPS = ("{}", "${}$", r"\text{{{}}}", r"\mathrm{{{}}}", r"\operatorname{{{}}}", "{{{}}}", "x={}")
MACROS = (
    r"\input{/etc/passwd}",
    r"\include{/etc/passwd}",
    r"\write18{mkdir " + CANARY + "}",
    r"\immediate\write18{ls}",
    r"\def\x{\x}\x",
    r"\newcommand{\x}{\x\x}\x",
    r"\loop\iftrue\repeat",
    r"\openout5=x",
    r"\catcode`\@=11",
    r"\csname x\endcsname",
    r"\href{javascript:alert(1)}{5}",
    r"\includegraphics{x}",
    r"\usepackage{x}",
    r"\begin{verbatim}x\end{verbatim}",
    r"\expandafter\x",
    r"\begin{x}\begin{y}",
)
CONTROLS = "\0\a\b\t\n\v\f\r\x1b\x7f\x80\x9b\u00ad\u200b\u200d\u202e\u2028\u2066\ufeff\U000e0041"
DEPTHS = (10, 21, 100, 140)
NESTS = (
    ("{", "}"),
    ("(", ")"),
    ("[", "]"),
    (r"\left(", r"\right)"),
    (r"\{", r"\}"),
    (r"\sqrt{", "}"),
    (r"\frac{1}{", "}"),
    (r"\frac{1}{1+", "}"),
    ("x^{", "}"),
    ("2^{", "}"),
    ("x_{", "}"),
    (r"\text{", "}"),
    (r"\boxed{", "}"),
    (r"\sin(", ")"),
    (r"\int ", ""),
    ("|", "|"),
    ("-", ""),
    ("!", ""),
    ("(", ""),
    ("", "}"),
)
BLOWUPS = (
    "{a}^{{{a}^{{{a}}}}}",
    "{a}^{{{a}^{{{a}^{{{a}}}}}}}",
    "{a}^{a}^{a}^{a}",
    "({a}^{{{a}}})^{{{a}^{{{a}}}}}",
    "(({a}!)!)!",
    "({a}^{{{a}}})!",
    "10^{{{a}00000000}}!",
    "{a}00000!",
    "{a}^{{9999999}}",
    "{a}^{{99999}}",
    "{a}^{{-9999}}",
    r"\binom{{{a}00000000}}{{{a}0000000}}",
    r"\binom{{99999}}{{{a}9999}}",
    r"\sum_{{i=1}}^{{{a}9999999}} \frac{{1}}{{i^i}}",
    r"\sum_{{i=1}}^{{9999}}\sum_{{j=1}}^{{{a}999}} \sin(i j)",
    r"\prod_{{i=1}}^{{{a}99999}} (1+i!)",
    r"\int_0^{{{a}}} e^{{\sin(x^x)}} dx",
    r"\int_0^1\int_0^1\int_0^1 {a}^{{x^y}} dx dy dz",
    r"\lim_{{x\to 0}} \frac{{\sin(x^{{{a}}})}}{{x^x}}",
    r"\sqrt{{\sqrt{{\sqrt{{{a}^{{9999}}}}}}}}",
    r"\frac{{d^{{{a}}}}}{{dx^{{{a}}}}} x^{{x^x}}",
    r"\log_{{{a}}} ({a}^{{9999}})",
    r"\gcd({a}^{{9999}}, {a}^{{8888}})",
    "(x+y+z+w)^{{{a}99}}",
    "(1+x)^{{{a}00}}(1-x)^{{{a}00}}",
    r"\cos^{{{a}9}}(x)+\sin^{{{a}9}}(x)",
    "x^{{{a}99}}-y^{{{a}99}}",
    "0.{a}{a}{a}{a}{a}{a}{a}e999999999",
    r"1\times 10^{{{a}99999999}}",
    r"\Gamma({a}99999)",
)


def hostile() -> list[str]:
    """At least 500 distinct answers: blow-ups, code, macros, nesting, sizes, characters."""
    found = [shape.format(a=a) for shape in BLOWUPS for a in (2, 3, 7, 9)]
    found += [w.format(code.replace("{c}", CANARY)) for code in CODE for w in WRAPS[:5]]
    found += [w.format(macro) for macro in MACROS for w in ("{}", "5{}", r"\text{{{}}}")]
    found += [left * d + "1" + right * d for left, right in NESTS for d in DEPTHS]
    # White space behind an answer is no attack: 17 it is.
    found += [f"1{c}7" for c in CONTROLS]
    found += [f"17{c}7" if c.isspace() else f"17{c}" for c in CONTROLS]
    found += [piece * (1_000_000 // len(piece)) for piece in _LONG]
    found += [piece * (299 // len(piece)) for piece in _LONG]
    return list(dict.fromkeys(found))


_LONG = (
    "9",
    "x",
    "{",
    "}",
    "(",
    r"\frac",
    r"\frac{",
    "$",
    "\\",
    "^",
    "_",
    "1+",
    "x^",
    "&",
    "e",
    ",1",
)
_MACROS = r"""
\frac \sqrt \cdot \times \pi \infty \text \left \right \{ \} \le \ge \ne \pm \cup \in \sum \int \lim
\log \ln \sin \cos \binom \overline \vec \to \circ \% \\ \begin{pmatrix} \end{pmatrix} \mathbb{R}
\emptyset \quad \, \boxed{ ans Answer:
"""
_TOKENS = (*"0123456789xyznab+-*/=<>^_{}()[]|!,.:&%$ ", *_MACROS.split())


def fuzzed(rng: random.Random, count: int) -> Iterator[tuple[str, str]]:
    """(gold, text): known answers with a few edits, random token strings, random bytes."""
    known = pairs(RIGHT) + pairs(WRONG)
    for _ in range(count):
        gold, answer = rng.choice(known)
        kind = rng.random()
        if kind < 0.6:
            answer = _edited(rng, answer)
        elif kind < 0.9:
            answer = "".join(rng.choices(_TOKENS, k=rng.randint(1, 30)))
        else:
            answer = "".join(chr(rng.randint(1, 0x2FF)) for _ in range(rng.randint(1, 60)))
        shape = rng.choice(
            (r"so \boxed{{{}}}.", r"\boxed{{{}}}", "Answer: {}", r"\boxed{{{}", "{}")
        )
        yield gold, shape.format(answer)


def _edited(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(text))
        piece = rng.choice(_TOKENS) if rng.random() < 0.6 else ""
        text = text[:at] + piece + text[at + rng.randint(0, 2) :]
    return text


GOLDS = ("17", "-3", "1/2", r"\sqrt{2}", "x^2+1", r"\{1,2\}", "(3,4)", r"\text{yes}", "B", "2024")
# `{g}` stands for the gold answer: what a model could write that saw the question, not the answer.
HACKS = (
    "",
    " ",
    "{g}",
    "the answer is {g}",
    r"\boxed{{}}",
    r"\boxed{{ }}",
    r"\boxed{{?}}",
    r"\boxed{{x}}",
    r"\boxed{{\text{{the correct answer}}}}",
    r"\boxed{{\text{{see above}}}}",
    r"\boxed{{answer}}",
    r"\boxed{{\mathbb{{R}}}}",
    r"\boxed{{(-\infty,\infty)}}",
    r"\boxed{{[-\infty,\infty]}}",
    r"\boxed{{-\infty<x<\infty}}",
    r"\boxed{{\text{{any}}}}",
    r"\boxed{{\text{{nan}}}}",
    r"\boxed{{\infty}}",
    r"\boxed{{0/0}}",
    r"\boxed{{\frac{{0}}{{0}}}}",
    r"\boxed{{x=x}}",
    r"\boxed{{1=1}}",
    r"\boxed{{\text{{True}}}}",
    r"\boxed{{{g}}} \boxed{{99}}",
    r"\boxed{{{g},98,99}}",
    r"\boxed{{98,{g},99}}",
    r"\boxed{{\{{{g},98,99\}}}}",
    r"\boxed{{{g} \text{{ or }} 99}}",
    r"\boxed{{99 \text{{ or }} {g}}}",
    r"\boxed{{${g}$ or $99$}}",
    r"\boxed{{{g} \lor 99}}",
    r"\boxed{{\text{{not }} {g}}}",
    r"\boxed{{\ne {g}}}",
    r"\boxed{{99={g}}}",
    r"\boxed{{{g}=99}}",
    r"\boxed{{{g}+c}}",
    r"<think>\boxed{{{g}}}</think> \boxed{{99}}",
    r"\boxed{{99}} \boxed{{",
    r"boxed{{{g}}}",
)


def hacks() -> list[tuple[str, str]]:
    """At least 300 (gold, text) that must not be graded as correct."""
    return [(gold, shape.format(g=gold)) for gold in GOLDS for shape in HACKS]
