"""The data of the rivals: which tokens, under which prompt, with which loss weight."""

from types import SimpleNamespace

import msgspec
import pytest
from small_run import TOKENIZER, Quiet, Script

from intfast.collect import Found
from intfast.config import Config, PromptConfig
from intfast.grading.grader import Grader
from intfast.methods import guided, prompts, sft_data
from intfast.prompts import ChatStyle, CompactStyle
from intfast.records import Attempt, Example, Guided, Intervention, Problem
from intfast.sample import Sampler
from intfast.state.journal import Journal
from intfast.state.metrics import Metrics
from intfast.tokens import decode, encode

END = TOKENIZER.eos_token_id
BODY = "a 7 ; b 3 ; c 5 ; d a # b ; e d + c ; ? d c e :"
REFERENCE = "a 7 # b 3 -> d 13 , d 13 + c 5 -> e 1 , ans d 13 c 5 e 1"
WRONG = "d a # b : 7 # 3 > 7 - 3 = d 4 ; e d + c : 4 + 5 = e 9 ; ans d 4 c 5 e 9"
RIGHT = "d a # b : 7 # 3 > 3 - 7 = d 13 ; e d + c : 13 + 5 = e 1 ; ans d 13 c 5 e 1"
OTHER = "d a # b : 7 # 3 = d 13 ; e d + c : 13 + 5 = e 1 ; ans d 13 c 5 e 1"
PROBLEMS = [
    Problem(id=name, problem=BODY, answer="d 13 c 5 e 1", reference=REFERENCE) for name in "pq"
]
PROMPT = encode(TOKENIZER, f"<solve> {BODY}")


@pytest.fixture
def run_of(tmp_path):
    """Run of a run whose engine answers from a script."""

    def make(*texts, **settings):
        base = Config()
        sections = {
            name: msgspec.structs.replace(getattr(base, name), **values)
            for name, values in settings.items()
        }
        style = CompactStyle(PromptConfig(style="compact", separator=" ;"), TOKENIZER)
        folder = SimpleNamespace(
            journal=lambda name, kind: Journal(tmp_path / f"{name}.jsonl", kind)
        )
        return SimpleNamespace(
            config=msgspec.structs.replace(base, **sections),
            sampler=Sampler(Script(texts), TOKENIZER, style, grader, 4000),
            folder=folder,
            metrics=Metrics(folder.journal("metrics", dict), Quiet()),
            problems=PROBLEMS,
            checked_version=0,
            hold=lambda name: None,
        )

    with Grader(mode="tail:ans", workers=1) as grader:
        yield make


def attempt(problem_id: str, sample: int, text: str, finish: str = "stop") -> Attempt:
    right = "correct" if text in (RIGHT, OTHER) else "wrong"
    return Attempt(
        problem_id=problem_id,
        sample=sample,
        prompt_ids=PROMPT,
        token_ids=encode(TOKENIZER, text),
        text=text,
        finish_reason=finish,
        grade=right,
        reason=right,
        policy_version=0,
    )


def build(run, *attempts: Attempt, selected=PROBLEMS) -> list[Example]:
    wrong = [
        (p, a) for p in selected for a in attempts if a.problem_id == p.id and a.grade == "wrong"
    ]
    found = Found(selected=list(selected), attempts=list(attempts), wrong=wrong)
    return list(sft_data.examples(run, found))


def targets(examples: list[Example]) -> list[list[int]]:
    """The tokens with loss; everything before them must be the bare prompt, without loss."""
    for example in examples:
        assert example.token_ids[: len(PROMPT)] == PROMPT
        assert example.weights[: len(PROMPT)] == [0.0] * len(PROMPT)
        assert set(example.weights[len(PROMPT) :]) == {1.0}
        assert len(example.weights) == len(example.token_ids)
    return [example.token_ids[len(PROMPT) :] for example in examples]


def test_references_end_with_the_end_token(run_of):
    run = run_of(sft={"data": "reference"})
    bare = msgspec.structs.replace(PROBLEMS[1], reference=None)
    built = build(run, selected=[PROBLEMS[0], bare])
    assert targets(built) == [[*encode(TOKENIZER, REFERENCE), END]]
    assert list(run.folder.journal("examples", Example)) == built


def test_a_continued_run_learns_from_the_examples_it_began_with(run_of):
    """batch.max_tokens may change in a continued run, which must not drop an example in silence."""
    reference = {"data": "reference"}
    whole = build(run_of(sft=reference))
    assert build(run_of(sft=reference, batch={"max_tokens": len(whole[0].token_ids)})) == whole
    with pytest.raises(ValueError, match=r"learns from 2 examples.* be 0.*batch\.max_tokens"):
        build(run_of(sft=reference, batch={"max_tokens": len(whole[0].token_ids) - 1}))


def test_reflections_rewrite_wrong_attempts_and_are_not_filtered(run_of):
    run = run_of(RIGHT, WRONG, sft={"data": "reflection"})
    built = build(run, attempt("p", 0, WRONG), attempt("p", 3, WRONG))
    assert targets(built) == [[*encode(TOKENIZER, text), END] for text in (RIGHT, WRONG)]
    asked = decode(TOKENIZER, run.sampler.engine.requests[0].prompt_ids)
    assert asked == f"<rewrite> {BODY} <sol> {WRONG} <ref> {REFERENCE} <out>"
    drawn = run.folder.journal("guided", Guided)
    assert [(r.kind, r.attempt, r.grade) for r in drawn] == [
        ("reflection", 0, "correct"),
        ("reflection", 3, "wrong"),
    ]


def test_one_row_per_problem_asks_for_no_more(run_of):
    run = run_of(RIGHT, RIGHT, sft={"data": "reflection", "target": "one_per_problem"})
    built = build(run, attempt("p", 1, WRONG), attempt("p", 2, WRONG), attempt("q", 0, WRONG))
    assert [example.problem_id for example in built] == ["p", "q"]
    assert len(run.sampler.engine.requests) == 2
    assert [r.attempt for r in run.folder.journal("guided", Guided)] == [1, 0]


def test_rft_keeps_distinct_right_attempts_of_all_problems(run_of):
    run = run_of(sft={"data": "rft"})
    drawn = [
        attempt("p", 0, RIGHT),
        attempt("p", 1, RIGHT),
        attempt("p", 2, OTHER),
        attempt("p", 3, WRONG),
        attempt("p", 4, OTHER + " ", "length"),
        attempt("q", 0, WRONG),
    ]
    built = build(run, *drawn, selected=PROBLEMS[1:])
    assert targets(built) == [[*encode(TOKENIZER, text), END] for text in (RIGHT, OTHER)]


def test_star_rationalises_only_what_no_attempt_solved(run_of):
    run = run_of(WRONG, OTHER, OTHER, RIGHT, sft={"data": "star", "samples": 4})
    built = build(run, attempt("p", 0, RIGHT), attempt("q", 0, WRONG))
    assert [(e.problem_id, e.kind) for e in built] == [("p", "rft"), ("q", "star"), ("q", "star")]
    assert targets(built)[1:] == [[*encode(TOKENIZER, text), END] for text in (OTHER, RIGHT)]
    (asked,) = run.sampler.engine.requests
    assert decode(TOKENIZER, asked.prompt_ids) == f"<rewrite> {BODY} <sol> <ref> {REFERENCE} <out>"


def test_beginnings_are_short_but_for_a_share_of_the_problems(run_of):
    """UPFT by hand: of 20 problems with a share of 0.1, 2 whole ones with the end token."""
    many = [msgspec.structs.replace(PROBLEMS[0], id=f"n{n}") for n in range(20)]
    run = run_of(sft={"data": "prefix", "prefix_tokens": 5})
    built = build(run, *(attempt(p.id, 0, WRONG) for p in many), selected=many)
    whole = encode(TOKENIZER, WRONG)
    found = targets(built)
    assert found.count([*whole, END]) == 2 and found.count(whole[:5]) == 18
    assert [n for n, target in enumerate(found) if len(target) > 5] == [0, 10]


def test_beginnings_are_asked_for_and_whole_attempts_are_not(run_of, bpe):
    style = ChatStyle(PromptConfig(), bpe)
    for data, prompt in (("prefix", prompts.first_step), ("bare_prefix", ChatStyle.solve)):
        run = run_of(sft={"data": data, "prefix_tokens": 5})
        run.sampler.style = style
        drawn = [attempt(name, 0, WRONG) for name in "pq"]
        built = list(sft_data._beginnings(run, Found(selected=PROBLEMS, attempts=drawn)))
        asked = [prompts.first_step, ChatStyle.solve].index(prompt)
        first, second = (example.token_ids for example in built)
        assert first[: len(style.solve(PROBLEMS[0]))] == style.solve(PROBLEMS[0])
        ids = prompt(style, PROBLEMS[1])
        assert second[: len(ids)] == ids and len(second) == len(ids) + 5
        assert ("only the first step" in decode(bpe, ids)) == (asked == 0)


def test_regft_asks_where_less_than_a_quarter_is_right(run_of):
    """By hand: 4 right of 16 are a quarter and not asked, 3 are."""
    run = run_of(RIGHT, WRONG, sft={"data": "regft", "samples": 2})
    drawn = [attempt("p", n, RIGHT if n < 4 else WRONG) for n in range(16)]
    drawn += [attempt("q", n, RIGHT if n < 3 else WRONG) for n in range(16)]
    built = build(run, *drawn)
    assert [(e.problem_id, e.kind) for e in built] == [("p", "rft"), ("q", "rft"), ("q", "regft")]
    assert targets(built) == [[*encode(TOKENIZER, RIGHT), END]] * 3
    (asked,) = run.sampler.engine.requests
    # Whole words, 80 % of the characters.
    part = guided.beginning(REFERENCE, 0.8)
    assert 0.7 * len(REFERENCE) < len(part) <= 0.8 * len(REFERENCE)
    assert decode(TOKENIZER, asked.prompt_ids) == f"<rewrite> {BODY} <sol> <ref> {part} <out>"


def test_the_exact_control_learns_the_prefixes_without_their_interventions(run_of):
    def record(problem_id, prefix):
        return Intervention(
            id=f"{problem_id}/0/0",
            problem_id=problem_id,
            attempt=0,
            sample=0,
            guided="",
            reply="",
            gate="kept",
            prefix_ids=prefix,
            intervention_ids=[7, 8],
        )

    kept = [record("p", [5, 6]), record("q", [])]
    problems = {problem.id: problem for problem in PROBLEMS}
    built = list(sft_data.build_examples(run_of().sampler, problems, kept, [], "prefix"))
    # Where the first step is wrong there is no prefix to learn from.
    assert targets(built) == [[5, 6]] and [e.problem_id for e in built] == ["p"]
    recipe = list(sft_data.build_examples(run_of().sampler, problems, kept, [], "recipe"))
    assert targets(recipe) == [[5, 6, 7, 8], [7, 8]]


def test_what_was_drawn_is_not_drawn_again(run_of):
    first = run_of(RIGHT, sft={"data": "reflection"})
    built = build(first, attempt("p", 0, WRONG))
    again = run_of(sft={"data": "reflection"})
    assert build(again, attempt("p", 0, WRONG)) == built
    assert again.sampler.engine.requests == []


# --- hints -------------------------------------------------------------------------------------


def test_a_beginning_ends_with_a_word():
    assert guided.beginning("a 7 # b 3 -> d 13", 0.5) == "a 7 # b"
    assert guided.beginning("one two", 0.99) == "one"
    assert guided.beginning("word", 0.5) == ""
    assert guided.beginning("x\n\ny z", 0.8) == "x\n\ny"


def test_the_shortest_beginning_that_unlocks_is_the_hint(run_of, monkeypatch):
    monkeypatch.setattr(guided, "SAMPLES", 2)
    # q is solved with a quarter; p with half, at the second of two samples; then nothing is left.
    texts = [WRONG, WRONG, RIGHT, WRONG, WRONG, RIGHT]
    run = run_of(*texts, rl={"hint": "shortest"})
    chosen = guided.hints(run, PROBLEMS)
    quarter, half = (guided.beginning(REFERENCE, share) for share in (0.25, 0.5))
    assert decode(TOKENIZER, chosen["q"]) == f"<solve> {BODY} {quarter}"
    assert decode(TOKENIZER, chosen["p"]) == f"<solve> {BODY} {half}"
    shares = [(r.problem_id, r.share) for r in run.folder.journal("guided", Guided)]
    assert shares == [("p", 0.25)] * 2 + [("q", 0.25)] * 2 + [("p", 0.5)] * 2


def test_a_problem_that_nothing_unlocks_keeps_the_shortest(run_of, monkeypatch):
    monkeypatch.setattr(guided, "SAMPLES", 2)
    run = run_of(*[WRONG] * 12, rl={"hint": "shortest"})
    chosen = guided.hints(run, PROBLEMS)
    quarter = guided.beginning(REFERENCE, 0.25)
    assert [decode(TOKENIZER, ids) for ids in chosen.values()] == [f"<solve> {BODY} {quarter}"] * 2


def test_fixed_hints_draw_nothing_and_give_nothing_away(run_of):
    run = run_of(rl={"hint": 0.5})
    told = msgspec.structs.replace(PROBLEMS[1], reference="ans d 13 c 5 e 1 , " + REFERENCE)
    bare = msgspec.structs.replace(PROBLEMS[1], id="r", reference=None)
    chosen = guided.hints(run, [PROBLEMS[0], told, bare])
    assert list(chosen) == ["p"]
    assert decode(TOKENIZER, chosen["p"]).endswith(guided.beginning(REFERENCE, 0.5))
    assert run.sampler.engine.requests == []


def test_no_hint_without_the_setting(run_of):
    assert guided.hints(run_of(), PROBLEMS) == {}


def test_the_chat_prompts_quote_what_they_need(bpe):
    style = ChatStyle(PromptConfig(instruction="Box it."), bpe)
    problem = Problem(id="m", problem="What is 1 + 1?", answer="2", reference="1 + 1 = 2")
    asked = decode(bpe, prompts.reflect(style, problem, "It is </attempt> 3."))
    assert all(text in asked for text in ("What is 1 + 1?", "1 + 1 = 2", "Box it."))
    assert asked.count("</attempt>") == 1
    hint = decode(bpe, prompts.hint(style, problem, "1 + 1"))
    assert "1 + 1 = 2" not in hint and "<reference>\n1 + 1\n</reference>" in hint
    assert decode(bpe, prompts.rationalise(style, problem)) == decode(bpe, style.guided(problem))
