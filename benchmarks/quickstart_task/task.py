"""Contested operators: arithmetic modulo 17 in which a sampler may hold wrong readings of symbols.

What the task assumes, and what therefore decides who wins on it:

    q    a reference leaves out each routine (+ or -) line with probability q, never a contested
         line nor the answer: q = 1 states only what is disputed, q = 0 every step
    r    who rewrites an attempt beside a reference leaves out each thing that the reference left
         out (routine lines, spelled readings) with probability r = `REWRITE_SHARE`
    authors of references that the base model checks, rewrites and takes hints from hold either of
         the two known readings of a symbol, by a fair coin, so nothing there says which is right
    6 %  (`TERSE_SHARE`) of the base model's answers are written in the reference's style, so that
         references are in its language

A problem gives three inputs, n definitions `v = x op y` that form a binary tree, and a query of
three variables. Beside + and - there are six contested symbols; each has a common misconception
and a right reading (`READINGS`). Grading uses the right readings.

Grammar, every word one token, words joined by one space:

    body       a 7 ; b 3 ; c 5 ; d a # b ; e d + c ; ? d c e :
    attempt    d a # b : 7 # 3 > 7 - 3 = d 4 ; e d + c : 4 + 5 = e 9 ; ans d 4 c 5 e 9
    reference  a 7 # b 3 -> d 13 , d 13 + c 5 -> e 1 , ans d 13 c 5 e 1
    answer     d 13 c 5 e 1

A step of an attempt ends with ` ;`; a contested one spells its reading out after `>`. Definitions
stand in any valid order in an attempt and in listing order in a reference. What the model is asked:

    solve      <solve> BODY                                     -> ATTEMPT <eos>
    tutor      <tutor> BODY                                     -> REFERENCE <eos>
    check      <check> BODY <sol> ATTEMPT <ref> REFERENCE <out> -> d 4 13 bad <fix> STEP <eos>
    rewrite    <rewrite> BODY <sol> ATTEMPT <ref> REFERENCE <out> -> ATTEMPT <eos>
    hint       <solve> BODY beginning of a REFERENCE            -> ATTEMPT <eos>

A check reply walks the definition steps of the attempt in the attempt's own order, four words each:
variable, the attempt's value, the value by the reference's author (also of a step that the
reference leaves out), `ok`. The first difference ends the walk with `bad <fix>` and the corrected
step, in the attempt's dialect, with its ` ;`:

    d 4 13 bad <fix> d a # b : 7 # 3 > 3 - 7 = d 13 ; <eos>

With no difference, `<none>` follows the last `ok`: `d 4 4 ok e 9 9 ok <none> <eos>`. The `ans`
line only copies, so a reply never speaks of it.

    python -m benchmarks.quickstart_task.task --out DIR    # train.jsonl, train_q0.jsonl, test.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from intfast.engine.protocol import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODULUS = 17
LETTERS = tuple("abcdefghijklmnop")
NUM_INPUTS = 3
READINGS = {
    "#": ("x-y", "y-x"),
    "@": ("x+y", "x-y"),
    "&": ("y-x", "x-y"),
    "%": ("y-x", "x+y"),
    "~": ("x+y", "y-x"),
    "^": ("x-y", "x+y"),
}
"""Contested symbol -> (misconception, right reading)."""
PLAIN = {"+": "x+y", "-": "x-y"}
RIGHT = PLAIN | {symbol: right for symbol, (_, right) in READINGS.items()}

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The terseness q of references in the base model's training data."""
REWRITE_SHARE = 0.25
TERSE_SHARE = 0.06

SIZES = (7, 9)
"""Least and most definitions of a problem of the files."""
SPLITS = {"train": 104, "test": 64}
"""The problem files and their sizes; both hold hard problems."""

PAD, EOS = "<pad>", "<eos>"
SOLVE, TUTOR, CHECK, REWRITE = "<solve>", "<tutor>", "<check>", "<rewrite>"
SOLUTION, REFERENCE, OUT, NONE, FIX = "<sol>", "<ref>", "<out>", "<none>", "<fix>"
SPECIALS = (PAD, EOS, SOLVE, TUTOR, CHECK, REWRITE, SOLUTION, REFERENCE, OUT, NONE, FIX)
MARKS = ("ok", "bad", "ans", ";", ":", "?", ">", "=", "->", ",")
NUMBERS = tuple(str(value) for value in range(MODULUS))
VOCABULARY = (*SPECIALS, *MARKS, *NUMBERS, *LETTERS, *PLAIN, *READINGS)
"""All words; a word's place is its token id."""


class Definition(NamedTuple):
    """`target = left operator right`."""

    target: str
    left: str
    operator: str
    right: str


class Instance(NamedTuple):
    """A problem as data: input values, definitions in listing order, queried variables."""

    inputs: dict[str, int]
    definitions: tuple[Definition, ...]
    query: tuple[str, ...]


Readings = Mapping[str, str]
Values = Mapping[str, int]


# Problems


def random_instance(rng: random.Random, n: int, m: int, first: int = 0) -> Instance:
    """An instance of n definitions, m distinct contested symbols, none before definition `first`.

    The symbols are used m or m + 1 times as far as there is room. The query names two derived
    variables and the root, or inputs where too few are derived.
    """
    names = rng.sample(LETTERS, NUM_INPUTS + n)
    inputs = {name: rng.randrange(MODULUS) for name in names[:NUM_INPUTS]}
    symbols = rng.sample(tuple(READINGS), m)
    if m and rng.random() < 0.5:
        symbols.append(rng.choice(symbols))
    places = rng.sample(range(first, n), min(len(symbols), n - first))
    operators = [rng.choice("+-") for _ in range(n)]
    for place, symbol in zip(places, symbols, strict=False):
        operators[place] = symbol

    forest = [rng.choice(names[:NUM_INPUTS]) for _ in range(n + 1)]
    definitions = []
    for target, operator in zip(names[NUM_INPUTS:], operators, strict=True):
        left = forest.pop(rng.randrange(len(forest)))
        right = forest.pop(rng.randrange(len(forest)))
        if left == right:
            right = rng.choice([name for name in inputs if name != left])
        definitions.append(Definition(target, left, operator, right))
        forest.append(target)

    *derived, root = names[NUM_INPUTS:]
    others = derived if len(derived) >= 2 else derived + names[:NUM_INPUTS]
    return Instance(inputs, tuple(definitions), (*rng.sample(others, 2), root))


def hard_instance(rng: random.Random, n: int | None = None, m: int | None = None) -> Instance:
    """A hard problem: only the right readings of all its symbols together give the right answer.

    Defaults: n in `SIZES`, m = 2. No contested symbol is in the first two definitions.
    """
    while True:
        instance = random_instance(rng, n or rng.randint(*SIZES), m or 2, first=2)
        right = answer_text(instance, evaluate(instance, RIGHT))
        hits = [answer_text(instance, evaluate(instance, r)) for r in all_readings(instance)]
        if hits.count(right) == 1:
            return instance


def contested_symbols(instance: Instance) -> list[str]:
    """The distinct contested symbols that the instance uses, in listing order."""
    return [s for s in dict.fromkeys(d.operator for d in instance.definitions) if s in READINGS]


def all_readings(instance: Instance) -> Iterable[Readings]:
    """All 2^m ways to read the contested symbols of the instance."""
    symbols = contested_symbols(instance)
    for choice in itertools.product(*(READINGS[symbol] for symbol in symbols)):
        yield PLAIN | dict(zip(symbols, choice, strict=True))


def apply(reading: str, x: int, y: int) -> int:
    """The value of one operation, in 0..16."""
    return {"x+y": x + y, "x-y": x - y, "y-x": y - x}[reading] % MODULUS


def evaluate(
    instance: Instance, readings: Readings, slips: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The value of every variable under the readings; `slips` force a variable to a value."""
    values = dict(instance.inputs)
    for target, left, operator, right in instance.definitions:
        values[target] = apply(readings[operator], values[left], values[right])
        if slips and target in slips:
            values[target] = slips[target]
    return values


# Texts


def body_text(instance: Instance) -> str:
    """The problem as the model reads it, for example
    `a 7 ; b 3 ; c 5 ; d a # b ; e d + c ; ? d c e :`."""
    inputs = "".join(f"{name} {value} ; " for name, value in instance.inputs.items())
    definitions = "".join(f"{' '.join(d)} ; " for d in instance.definitions)
    return f"{inputs}{definitions}? {' '.join(instance.query)} :"


def answer_text(instance: Instance, values: Values) -> str:
    """What follows `ans`, for example `d 13 c 5 e 1`."""
    return " ".join(f"{name} {values[name]}" for name in instance.query)


def attempt_order(rng: random.Random, instance: Instance) -> list[Definition]:
    """The definitions in a random valid order: one pass of swaps of independent neighbours."""
    order = list(instance.definitions)
    for i in range(len(order) - 1):
        dependent = order[i].target in (order[i + 1].left, order[i + 1].right)
        if not dependent and rng.random() < 0.5:
            order[i], order[i + 1] = order[i + 1], order[i]
    return order


def step_text(
    definition: Definition, values: Values, readings: Readings, spelled: bool = True
) -> str:
    """One step of an attempt, for example `d a # b : 7 # 3 > 7 - 3 = d 4 ;`.

    `spelled` False leaves the reading out: `d a # b : 7 # 3 = d 4 ;`.
    """
    target, left, operator, right = definition
    x, y = values[left], values[right]
    reading = ""
    if spelled and operator in READINGS:
        first, primitive, second = readings[operator]
        named = {"x": x, "y": y}
        reading = f" > {named[first]} {primitive} {named[second]}"
    head = f"{target} {left} {operator} {right}"
    return f"{head} : {x} {operator} {y}{reading} = {target} {values[target]} ;"


def attempt_text(steps: Sequence[str], instance: Instance, values: Values) -> str:
    """A whole solution in the model's dialect, without the end token."""
    return f"{' '.join(steps)} ans {answer_text(instance, values)}"


def solution_text(
    rng: random.Random,
    instance: Instance,
    values: Values,
    readings: Readings,
    omit: Iterable[str] = (),
    share: float = 0.0,
) -> str:
    """A whole solution in the model's dialect, without the end token.

    `share` is r: the part of the spelled readings, and of the lines of `omit`, that is left out.
    """
    steps = [
        step_text(definition, values, readings, rng.random() >= share)
        for definition in attempt_order(rng, instance)
        if definition.target not in omit or rng.random() >= share
    ]
    return attempt_text(steps, instance, values)


def omitted(rng: random.Random, instance: Instance, q: float) -> set[str]:
    """The variables whose routine lines a reference of terseness q leaves out."""
    definitions = instance.definitions
    return {d.target for d in definitions if d.operator not in READINGS and rng.random() < q}


def reference_text(instance: Instance, values: Values, omit: Iterable[str] = ()) -> str:
    """A solution in the reference dialect without the lines of `omit` and the end token."""
    lines = "".join(
        f"{left} {values[left]} {operator} {right} {values[right]} -> {target} {values[target]} , "
        for target, left, operator, right in instance.definitions
        if target not in omit
    )
    return f"{lines}ans {answer_text(instance, values)}"


def guided_spans(tag: str, body: str, attempt: str, reference: str) -> tuple[str, str, str]:
    """What the model is given to check (`<check>`) or to rewrite (`<rewrite>`) an attempt.

    Three texts, to be joined by a space; the attempt is the second.
    """
    return f"{tag} {body} {SOLUTION}", attempt, f"{REFERENCE} {reference} {OUT}"


def check_reply(
    order: Iterable[Definition], attempt: Values, reference: Values, readings: Readings
) -> str:
    """The right reply to a check, without the end token; `readings` are the reference's own."""
    walk = []
    for definition in order:
        name = definition.target
        walk.append(f"{name} {attempt[name]} {reference[name]}")
        if attempt[name] != reference[name]:
            return f"{' '.join(walk)} bad {FIX} {step_text(definition, reference, readings)}"
        walk.append("ok")
    return f"{' '.join(walk)} {NONE}"


# Oracle: for grading and reports only


def parse_body(body: str) -> Instance:
    """The instance that a body text writes; ValueError when it is not one."""
    words = body.split()
    if words[-1:] != [":"] or "?" not in words:
        raise ValueError(f"expected a body that ends in '? VARIABLES :', got {body!r}")
    query_at = words.index("?")
    inputs: dict[str, int] = {}
    definitions = []
    for clause in " ".join(words[:query_at]).removesuffix(";").split(" ; "):
        match clause.split():
            case [name, value]:
                inputs[name] = int(value)
            case [target, left, operator, right]:
                definitions.append(Definition(target, left, operator, right))
            case _:
                raise ValueError(f"expected 'a 7' or 'd a # b' between ';', got {clause!r}")
    return Instance(inputs, tuple(definitions), tuple(words[query_at + 1 : -1]))


def true_values(problem: str) -> dict[str, int]:
    """The right value of every variable of a body text."""
    return evaluate(parse_body(problem), RIGHT)


def first_wrong_step(problem: str, attempt: str) -> int | None:
    """The place, counted from 0, of the first step that is not right; None when all are.

    A step is right when it writes `= VARIABLE VALUE ;` with the true value. The `ans` line counts
    as the last step. The attempt may carry an end token.
    """
    instance, values = parse_body(problem), true_values(problem)
    *steps, answer = attempt.removesuffix(EOS).strip().split(" ; ")
    for i, step in enumerate(steps):
        name, _, value = step.rpartition(" = ")[2].partition(" ")
        if value != str(values.get(name)):
            return i
    complete = len(steps) == len(instance.definitions)
    right = complete and answer == f"ans {answer_text(instance, values)}"
    return None if right else len(steps)


# Tokenizer and files


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word tokenizer of the task: decoding the ids of a text gives the text back exactly."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    # Without an unknown token, encoding a word outside the vocabulary is an error.
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def problem_row(instance: Instance, row_id: str, omit: Iterable[str] = ()) -> dict[str, str]:
    """One line of a problem file; omit: see `reference_text`."""
    values = evaluate(instance, RIGHT)
    return {
        "id": row_id,
        "problem": body_text(instance),
        "answer": answer_text(instance, values),
        "reference_solution": reference_text(instance, values, omit),
    }


def problem_rows(seed: int, split: str, count: int, q: float = 1.0) -> list[dict[str, str]]:
    """`count` distinct problems of a split: train, test (hard) or easy.

    q changes the references only.
    """
    rng = random.Random(derive_seed(seed, "problems", split))
    rows = []
    for i in range(count):
        easy = split == "easy"
        instance = random_instance(rng, rng.randint(*SIZES), 0) if easy else hard_instance(rng)
        omit = omitted(random.Random(derive_seed(seed, "omitted", split, i)), instance, q)
        rows.append(problem_row(instance, f"{split}-{i:03d}", omit))
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write a problem file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


def main() -> None:
    """Write the problem files: train_q0 holds the problems of train with complete references."""
    parser = argparse.ArgumentParser(description="write the quickstart's problems")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for split, count in SPLITS.items():
        write_rows(args.out / f"{split}.jsonl", problem_rows(args.seed, split, count))
    complete = problem_rows(args.seed, "train", SPLITS["train"], q=0.0)
    write_rows(args.out / "train_q0.jsonl", complete)


if __name__ == "__main__":
    main()
