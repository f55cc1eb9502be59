# ruff: noqa: E501 - a row of the table is a line
"""One spelling for what LaTeX, Unicode and plain text write in many: a table, applied in order.

Every row has an example; tests/test_grade_normal.py asks each for it.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

from intfast.grading.units import NAMES

_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta lambda mu nu xi pi rho sigma tau phi phi chi psi omega "
    "Gamma Delta Theta Lambda Sigma Phi Psi Omega"
)
_SIGNS = {
    "\u2212\u2010\u2011\u2012\u2013\u2014\uff0d\ufe63": "-",
    "\u00d7\u2715": r"\times ",
    "\u00b7\u22c5\u2219": r"\cdot ",
    "\u00f7": r"\div ",
    "\u221a": r"\surd ",
    "\u221e": r"\infty ",
    "\u2264\u2a7d": r"\le ",
    "\u2265\u2a7e": r"\ge ",
    "\u2260": r"\ne ",
    "\u2248": r"\approx ",
    "\u00b0\u02da": r"^\circ ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2208": r"\in ",
    "\u2205": r"\varnothing ",
    "\u00b1": r"\pm ",
    "\u2213": r"\mp ",
    "\u2227": r"\land ",
    "\u2228": r"\lor ",
    "\u211d": r"\mathbb{R}",
    "\u2124": r"\mathbb{Z}",
    "\u2115": r"\mathbb{N}",
    "\u211a": r"\mathbb{Q}",
    "\u2102": r"\mathbb{C}",
    "\u2032\u2019": "'",
    "\u2033": "''",
    "\u2044\u2215": "/",
    "\u2026": r"\ldots ",
    "\u27e8": r"\langle ",
    "\u27e9": r"\rangle ",
    "\u20ac": r"\text{euros}",
    "\u00a3": r"\text{pounds sterling}",
    "\u00a2": r"\text{cents}",
    "\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000": r"\,",
    **{
        sign: rf"\{name} "
        for sign, name in zip(
            "\u03b1\u03b2\u03b3\u03b4\u03b5\u03b6\u03b7\u03b8\u03bb\u03bc\u03bd\u03be\u03c0\u03c1\u03c3\u03c4\u03c6\u03d5\u03c7\u03c8\u03c9"
            "\u0393\u0394\u0398\u039b\u03a3\u03a6\u03a8\u03a9",
            _GREEK.split(),
            strict=True,
        )
    },
}
_BY_SIGN = {ord(sign): text for signs, text in _SIGNS.items() for sign in signs}


@lru_cache(maxsize=2048)
def _meaning(char: str) -> tuple[str, str]:
    """("^", digits) of a superscript, ("_", ...) of a subscript, ("", LaTeX) of another sign."""
    plain, kind = unicodedata.normalize("NFKC", char), unicodedata.decomposition(char)
    if ord(char) in _BY_SIGN:
        return "", _BY_SIGN[ord(char)]
    if kind.startswith(("<super>", "<sub>")):
        return "^" if kind.startswith("<super>") else "_", plain.replace("\u2212", "-")
    if unicodedata.decimal(char, None) is not None:
        return "", str(unicodedata.decimal(char))
    if kind.startswith("<fraction>") and not plain.endswith("\u2044"):
        return "", r"\frac{{{}}}{{{}}}".format(*plain.split("\u2044"))
    is_shape = kind.startswith(("<wide>", "<font>", "<compat>")) and plain.isascii()
    return "", plain if is_shape else char


def _ascii(match: re.Match[str]) -> str:
    """A run of characters outside ASCII as LaTeX, where it has a meaning there."""
    made, last = [], ""
    for char in match[0]:
        mark, text = _meaning(char)
        # Several raised signs in a row are one exponent.
        made.append(
            ("}" if last and last != mark else "") + (mark + "{" if mark and last != mark else "")
        )
        made.append(text)
        last = mark
    return "".join(made) + ("}" if last else "")


_BOLD = r"\\(?:math(?:bf|it|sf|normal)|boldsymbol|bm|text(?:bf|it))"
_WORD = r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf|tt)|emph|[mh]box|boldsymbol|bm|operatorname\*?)"
_BASES = "two three four five six seven eight nine ten"
_FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp gcd lcm max min det sqrt"

TABLE: tuple[tuple[str, str, str, str], ...] = (
    # pattern, replacement, example, what becomes of it alone
    (r"(?<!\\)\\\\(?=(?:[dt]?frac|left|right|sqrt|pi|leq?|geq?|cup|infty|text|cdot|times|pm|in|mathbb)(?![a-z]))", r"\\", r"\\frac12", r"\frac12"),
    (r"\\(?:left|middle|right|[bB]igg?[lrm]?|displaystyle|textstyle|small|[lL]arge|LARGE|[hH]uge|limits|nolimits|mleft|mright)(?![A-Za-z])\.?", "", r"\left(1\right)", "(1)"),
    (r",\s*\\!\s*(?=\d{3})", ",", r"32,\! 349", "32,349"),
    (r"\{ ?\\(?:bf|it|rm|sf|em)(?![a-z]) ?([^{}]*)\}", r"\1", r"{\bf 7}", "7"),
    (r"\\(?:underline|(?:text)?color ?\{[a-z]{1,20}\}) ?(?=\{)|\\color ?\{[a-z]{1,20}\} ?", "", r"\textcolor{red}{7}", "{7}"),
    (r"\\cr(?![a-z])", r"\\\\", r"1\cr 2", r"1\\ 2"),
    (r"\\\\\*?(?:\[[^\[\]]{0,9}\])?\s*", r"\\\\", r"1\\[2pt] 2", r"1\\2"),
    (r"\{([pbvBV]?)smallmatrix\}", r"{\1matrix}", r"\begin{psmallmatrix}", r"\begin{pmatrix}"),
    (rf"{_WORD}\{{ ?(\\%|\^ ?\\circ) ?\}}", r"\1", r"28\text{ \%}", r"28\%"),
    (rf"{_WORD}\{{ ?\}}", " ", r"2\text{ }3/4", "2 3/4"),
    (rf"{_WORD}\{{ ?\\?\$ ?(\d[\d,]*(?:\.\d+)?|) ?\}}", r"\\$\1", r"\text{\$20}", r"\$20"),
    (r"(?<!\\)((?:\\\\)*+)(?: ?+(?:\\[,;:! ]|\\(?:q?quad|thinspace|enspace|hspace\{[^{}]{0,9}\})(?![A-Za-z])|~))++ ?", r"\1 ", r"1\,2\ \ 3", "1 2 3"),
    (r"\{,\}(?=\d\d\d(?!\d))", ",", "1{,}000", "1,000"),
    (r"(?<=\d)\{,\}(?=\d)", ".", "3{,}14", "3.14"),
    (r"\{([:.<>=+\-])\}", r"\1", "9{:}10", "9:10"),
    (r"\\colon(?![a-z])", ":", r"9\colon 10", "9: 10"),
    (r"\\[dtc]frac(?![a-z])", r"\\frac", r"\dfrac12", r"\frac12"),
    (r"\\frac(?!\d\d) ?(\d|\\pi) ?(\d|\\pi(?![a-z]))", r"\\frac{\1}{\2}", r"\frac\pi 2", r"\frac{\pi}{2}"),
    (r"\\frac ?(\d)(?=\{)|\\frac(\{[^{}]*\}) ?(\d)", lambda m: rf"\frac{{{m[1]}}}" if m[1] else rf"\frac{m[2]}{{{m[3]}}}", r"\frac5{11}", r"\frac{5}{11}"),
    (r"\{([^{}]{1,40})\\choose(?![a-z]) ?([^{}]{1,40})\}", r"\\binom{\1}{\2}", r"{6\choose 2}", r"\binom{6}{2}"),
    (r"\\(overline|bar|dot) ?(\d)", r"\\\1{\2}", r"0.1\overline6", r"0.1\overline{6}"),
    (r"\\dot\{(\d)\}(\d*)\\dot\{(\d)\}", r"\\overline{\1\2\3}", r"0.\dot{4}\dot{5}", r"0.\overline{45}"),
    (r"\((\d[\dA-F]*)\)_(?=[\d{])", r"\1_", "(27)_8", "27_8"),
    (r"\\(?:degree|textdegree)(?![a-z])|\^\s*(?:\\circ(?![a-z])|\{\s*\\circ\s*\})", r"\\text{degrees}", r"5^{\circ}", r"5\text{degrees}"),
    (r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{?\d\}?)?) ?[{(]?(\d+(?:\.\d+)?)\\text\{degrees\}[})]?", r"\1{(\\frac{\2\\pi}{180})}", r"\sin 5\text{degrees}", r"\sin{(\frac{5\pi}{180})}"),
    (r"\\(?:leqslant|leqq|leq)(?![a-z])|<=|=<", r"\\le ", "x<=3", r"x\le 3"),
    (r"\\(?:geqslant|geqq|geq)(?![a-z])|>=", r"\\ge ", r"x\geq 3", r"x\ge  3"),
    (r"\\neq(?![a-z])|\\not\s*=|!=", r"\\ne ", r"x\neq 3", r"x\ne  3"),
    (r"\\lt(?![a-z])", "<", r"x\lt 3", "x< 3"),
    (r"\\gt(?![a-z])", ">", r"x\gt 3", "x> 3"),
    (r"\\(?:vee|lor)(?![a-z])", r"\\text{or}", r"a\vee b", r"a\text{or} b"),
    (r"\\(?:wedge|land)(?![a-z])", r"\\text{and}", r"a\land b", r"a\text{and} b"),
    (r"\\(?:emptyset|O)(?![A-Za-z])|\\\{\s*\\\}", r"\\varnothing ", r"\{ \}", r"\varnothing "),
    (r"\\var(phi|epsilon|theta|rho|sigma|kappa)(?![a-z])", r"\\\1", r"\varphi", r"\phi"),
    (r"\\R(?![A-Za-z])", r"\\mathbb{R}", r"\R", r"\mathbb{R}"),
    (r"\\(?:math(?:bb|bf|rm|cal)|Bbb)\s*\{?([RZNQ])(?:\}|(?![A-Za-z]))", r"\\mathbb{\1}", r"\mathbf{R}", r"\mathbb{R}"),
    (r"\\(?:mid|vert|lvert|rvert|mvert)(?![A-Za-z])", "|", r"\lvert x\rvert", "| x|"),
    (r"\\(?:lbrace|rbrace)(?![a-z])", lambda m: "\\{" if m[0][1] == "l" else "\\}", r"\lbrace 1\rbrace", r"\{ 1\}"),
    (r"\\(?:ldots|dots|cdots|dotsc|hdots)(?![a-z])|\.\.\.+", r"\\ldots ", "3...", r"3\ldots "),
    (r"\\(?:to|rightarrow|implies|Rightarrow)(?![a-z])", r"\\to ", r"a\rightarrow b", r"a\to  b"),
    (r"\\surd\s*\(([^()]{1,99})\)", r"\\sqrt{\1}", r"\surd(5)", r"\sqrt{5}"),
    (r"\\surd\s*\{?(\d+|[a-z])\}?", r"\\sqrt{\1}", r"\surd 15", r"\sqrt{15}"),
    (r"(?<![\\A-Za-z])sqrt\s*\(([^()]{1,99})\)", r"\\sqrt{\1}", "sqrt(5)", r"\sqrt{5}"),
    (r"\\log\s*_\s*(?:e|\{\s*e\s*\})(?![a-z])", r"\\ln ", r"\log_e 2", r"\ln  2"),
    (r"\\log\s*_\s*(\d+|[a-z])(?!\w)\s*", r"\\log_{\1}", r"\log_2 32", r"\log_{2}32"),
    (r"\\lg(?![a-z])", r"\\log_{10}", r"\lg 5", r"\log_{10} 5"),
    (r"\\prime(?![a-z])|\^\s*\\prime(?![a-z])|\^\s*\{\s*\\prime\s*\}", "'", r"f^{\prime}", "f'"),
    (rf"{_BOLD}\s*\{{\s*([A-Za-z])\s*\}}|\\mathrm\s*\{{\s*([eid])\s*\}}", lambda m: m[1] or m[2], r"4\mathrm{i}", "4i"),
    (rf"{_WORD}\s*\{{\s*([^A-Za-z{{}}\\$]*|\([A-Z]\)[^A-Za-z{{}}\\$]*)\s*\}}", r"\1", r"\textbf{(D)} 4", "(D) 4"),
    (rf"(?<![\d ]){_WORD}\s*\{{\s*({_FUNCTIONS.replace(' ', '|')})\s*\}}", r"\\\1 ", r"\mathrm{lcm}(4,6)", r"\lcm (4,6)"),
    (rf"{_WORD}\s*\{{\s*(\d[\d.,/]*)(?=[ }}])", r"\1\\text{", r"\text{5 cm}", r"5\text{ cm}"),
    (rf"{_WORD}\s*\{{", r"\\text{", r"\mathrm{cm}", r"\text{cm}"),
    (r"(\\text\{[A-Za-z /.]*)\^ ?\{(-?\d)\}", r"\1^\2", r"\text{km h^{-1}}", r"\text{km h^-1}"),
    (r"(?<=\d) ((?:[kc]?m|mi|ft|k?g)/(?:s|h|hr|min))(?![A-Za-z])", r"\\text{\1}", "3 m/s", r"3\text{m/s}"),
    (r"(?<![A-Za-z\\])([a-z]) ?\\text\{ ?(?:is|equals) ?\}", r"\1=", r"x\text{ is }3", "x=3"),
    (r"\( ?\\text\{ ?([A-J]) ?\} ?\)", r"(\1)", r"(\text{D})", "(D)"),
    (r"(?<=\d) ?\\text\{ ?(?:in )?base ?\} ?(\d{1,2})(?!\d)", r"_\1", r"27\text{ base }8", "27_8"),
    (rf"_\{{?\\text\{{ ?({_BASES.replace(' ', '|')}) ?\}}\}}?", lambda m: f"_{_BASES.split().index(m[1]) + 2}", r"27_{\text{eight}}", "27_8"),
    (r"(?<=\d)\s*\\text\{\s*to\s*\}\s*(?=\d)", ":", r"3\text{ to }1", "3:1"),
    (r"(?<![\\A-Za-z])infinity(?![A-Za-z])", r"\\infty ", "infinity", r"\infty "),
    (r"\s*(?:\\?%|\\text\{\s*(?:per ?cent|pct|percentage)\s*\}|\b(?:per ?cent|pct|percentage)\b(?! ?point))", r"\\%", r"5\text{ percent}", r"5\%"),
    (r"\\?\$\s*(\d[\d,]*(?:\.\d+)?)", r"\1\\text{dollars}", r"\$5.00", r"5.00\text{dollars}"),
    (r"(?<=\d) ?\\\$(?!\d)", r"\\text{dollars}", r"20\$", r"20\text{dollars}"),
    (r"(\\text\{(?:euros|pounds sterling|EUR|USD|GBP) ?\})\s*(\d[\d,]*(?:\.\d+)?)", r"\2\1", r"\text{euros}5", r"5\text{euros}"),
    (r"(?<![\d.])(\d++(?:\.\d++)?+)\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*([+-]?\d{1,4})\s*\}|(\d)(?!\d))", lambda m: f"{m[1]}E{m[2] or m[3]}", r"2.5\times 10^{3}", "2.5E3"),
    (r"(\d)\s*\\text\{\s*[eE]\s*\}\s*([+-]?\d)|(\d\.\d+)e([+-]?\d)", lambda m: f"{m[1] or m[3]}E{m[2] or m[4]}", r"5\text{e}3", "5E3"),
    (r"(?<=\d),\s+(?=\d{3}(?!\d))", ";", "100, 200", "100;200"),
    (r"(?<=\d)''", r"\\text{arcseconds}", "5''", r"5\text{arcseconds}"),
    (r"(?<=\d)'", r"\\text{arcminutes}", "5'", r"5\text{arcminutes}"),
    # An open end written with the bracket turned outwards, as in French.
    (r"(?:(?<![\w})])|(?<=\\cup)|(?<=\\cup ))\] ?([^\[\](),;]{1,40}[,;][^\[\](),;]{1,40})(?<!\\sqrt)(?=[\[\]])", r"(\1", "]2,5]", "(2,5]"),
    (r"([(\[][^\[\](),;]{1,40}[,;][^\[\](),;]{1,40})(?<!\\sqrt)\[(?!\d)", r"\1)", r"[3,\infty[", r"[3,\infty)"),
    (r"(?<![\d.,])(\d{1,3}(?:(?: |,)\d{3})+)(?![\d,])", lambda m: m[1].replace(" ", ","), "1 000", "1,000"),
)  # fmt: skip
_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement, *_ in TABLE]
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_WORDS = re.compile(r"(?<=\d)\s+([A-Za-z]{2,}\.?(?:[ \n]+[A-Za-z]{2,}\.?){0,4})(?![\w{(])")
_AND_OR = re.compile(r"(?<![\\A-Za-z])(?:and|or)(?![A-Za-z])")
# Spaces mean something between two numbers, two words, and behind a command only.
_SPACES = re.compile(r"\s+(?![\w])|(?<![\w])\s+|(?<=\d)\s+(?=[A-Za-z]\b)")


def in_ascii(text: str) -> str:
    """A text with LaTeX for the signs outside ASCII that have a meaning in mathematics."""
    return re.sub(r"[^\x00-\x7f]+", _ascii, text)


def _counted(match: re.Match[str]) -> str:
    """The words behind a number as \\text{}, where they cannot be a product of letters."""
    words = match[1].split()
    is_known = all(len(word) > 2 or word in NAMES for word in words)
    return rf"\text{{{' '.join(words)}}}" if is_known else match[0]


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """One spelling for what LaTeX writes in many; equal results mean equal answers."""
    # Single-spaced, so that every row is linear.
    text = in_ascii(" ".join(text.split()))
    # A control space at the end lost its space.
    text = re.sub(r"(?<!\\)((?:\\\\)*+)\\$", r"\1", text)
    for left, right in _DELIMITERS:
        if text.startswith(left) and text.endswith(right) and len(text) >= len(left + right):
            text = text[len(left) : -len(right)].strip()
    if re.fullmatch(r"(?:\$[^$]+\$(?:,? ?(?:and|or)? ?)){2,}+", text + " "):
        text = text.replace("$", "")
    if found := re.fullmatch(r"\$([^\s$]|[^\s$][^$]*[^\s$])\$( ?[A-Za-z%\\][^$]*)", text):
        text = found[1] + found[2]
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    parts = _TEXT.split(text)
    # Every other part is the inside of \text{}, where spaces are words' own.
    parts[1::2] = [rf"\text{{{' '.join(part.split())}}}" for part in parts[1::2]]
    for at in range(0, len(parts), 2):
        part = _AND_OR.sub(lambda m: rf"\text{{{m[0]}}}", parts[at])
        parts[at] = _SPACES.sub("", " ".join(_WORDS.sub(_counted, part).split()))
    text = "".join(parts).rstrip(". ").strip()
    return text[6:-1] if re.fullmatch(r"\\text\{[A-Za-z]\}", text) else text


def unspaced(text: str) -> str:
    """A long text without what only spaces mathematics: less than `normalise`, and faster."""
    text = re.sub(r"\\[,;:!]|\$|\\(?:left|right)(?![a-z])|~", " ", text).replace("{,}", ",")
    text = re.sub(r"\\[dtc]frac(?![a-z])", r"\\frac", " ".join(text.split()))
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    return re.sub(r"(?<=\W) | (?=\W)", "", text).rstrip(".")


_DECIMAL = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:E[+-]?\d{1,4})?")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_FRACTION = re.compile(
    r"([+-]?)(?:(?:(\d+) ?)?\\frac(?:\{([+-]?\d+)\}\{(\d+)\}|(\d)(\d))|(?:(\d+) )?(\d+)/(\d+))"
)
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\{(\d+)\}|\((\d+)\))")
MAX_DIGITS = 4000
"""Python reads no longer integers, and no answer needs them."""


@lru_cache(maxsize=4096)
def number(normalised: str) -> Fraction | None:
    """The exact value of an integer, decimal, fraction or mixed number, else None."""
    if len(normalised) > MAX_DIGITS:
        return None
    text = normalised.replace(",", "") if _THOUSANDS.fullmatch(normalised) else normalised
    if _DECIMAL.fullmatch(text):
        return Fraction(text.rstrip("."))
    if match := _REPEATING.fullmatch(text):
        sign, whole, head, *blocks = match.groups()
        block = blocks[0] or blocks[1]
        value = int(whole + head or 0) + Fraction(int(block), 10 ** len(block) - 1)
        value /= 10 ** len(head)
        return -value if sign == "-" else value
    if not (match := _FRACTION.fullmatch(text)):
        return None
    whole = match[2] or match[7]
    top, bottom = (
        int(match[at] or 0) for at in ((3, 4) if match[3] else (5, 6) if match[5] else (8, 9))
    )
    if bottom == 0 or (whole and not 0 < top < bottom):
        return None
    value = int(whole or 0) + Fraction(top, bottom)
    return -value if match[1] == "-" else value
