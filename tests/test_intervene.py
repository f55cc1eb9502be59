"""The InT stage: gates in order, waves and their stop rule, and what is trained."""

import msgspec
import pytest
from small_run import TOKENIZER, Script

from intfast import intervene, sample
from intfast.config import InterveneConfig, PromptConfig, SamplingConfig
from intfast.grading.grader import Grader
from intfast.methods import sft_data
from intfast.prompts import ChatStyle, CompactStyle
from intfast.records import Attempt, Continuation, Intervention, Problem
from intfast.sample import Sampler, Start
from intfast.tokens import decode, encode

BODY = "a 7 ; b 3 ; c 5 ; d a # b ; e d + c ; ? d c e :"
REFERENCE = "a 7 # b 3 -> d 13 , d 13 + c 5 -> e 1 , ans d 13 c 5 e 1"
TEXT = "d a # b : 7 # 3 > 7 - 3 = d 4 ; e d + c : 4 + 5 = e 9 ; ans d 4 c 5 e 9"
FIX = "d a # b : 7 # 3 > 3 - 7 = d 13 ;"
REPLY = f"d 4 13 bad <fix> {FIX}"
LATER = "d 4 4 ok e 9 1 bad <fix> e d + c : 4 + 5 = e 1 ;"
SAMPLING = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=40)
CONFIG = InterveneConfig(
    samples=3, continuations=4, wave=2, stop="never", sampling=SAMPLING, continuation=SAMPLING
)
PROBLEM = Problem(id="p", problem=BODY, answer="d 13 c 5 e 1", reference=REFERENCE)
ATTEMPT = Attempt(
    problem_id="p",
    sample=0,
    prompt_ids=encode(TOKENIZER, f"<solve> {BODY}"),
    token_ids=encode(TOKENIZER, TEXT),
    text=TEXT,
    finish_reason="stop",
    grade="wrong",
    reason="wrong",
    policy_version=0,
)


def solver_of(*texts: str, context: int = 1000) -> Sampler:
    style = CompactStyle(PromptConfig(style="compact", separator=" ;"), TOKENIZER)
    return Sampler(Script(texts), TOKENIZER, style, Grader(mode="tail:ans"), context)


def propose(*replies: str, config=CONFIG, context=1000) -> list[Intervention]:
    sampler = solver_of(*replies, context=context)
    return sampler.run(intervene.propose(sampler, [(PROBLEM, ATTEMPT)], config, seed=0))


# --- gates -------------------------------------------------------------------------------------


def test_a_good_reply_becomes_prefix_ids_and_intervention_ids():
    first, *_ = propose(REPLY, REPLY, REPLY)
    assert (first.gate, first.location, first.prefix_ids) == ("passed", 1, [])
    assert decode(TOKENIZER, first.intervention_ids) == FIX
    assert first.num_tokens == len(encode(TOKENIZER, REPLY)) + 1
    later, *_ = propose(LATER, LATER, LATER)
    kept = TEXT.split(" e d + c")[0]
    assert decode(TOKENIZER, later.prefix_ids) == kept
    assert later.prefix_ids == ATTEMPT.token_ids[: len(later.prefix_ids)]


def test_each_candidate_is_recorded_with_its_gate_and_the_first_good_one_passes():
    gates = [r.gate for r in propose("d 4 4 ok e 9 9 ok <none>", REPLY, LATER)]
    assert gates == ["no_error", "passed", "duplicate"]
    assert [r.gate for r in propose("ok", "ok ok", REPLY)] == ["unparsed", "unparsed", "passed"]


def test_a_prompt_without_room_for_the_reply_is_dropped_and_never_cut():
    sampler = solver_of(context=100)
    records = sampler.run(intervene.propose(sampler, [(PROBLEM, ATTEMPT)], CONFIG, seed=0))
    assert [r.gate for r in records] == ["too_long"] * 3
    assert sampler.engine.requests == []


@pytest.mark.parametrize(
    ("content", "answer", "leaks"),
    [
        ("so the answer is 2", "2", True),
        ("we get \\boxed{ 2 }", "2", True),
        ("square both sides: 2 x = 4", "2", False),
        ("the answer is 25", "2", False),
        ("the answer: $17$", "17", True),
        ("then x = 1024 follows", "1024", True),
        ("then x = 10245 follows", "1024", False),
        ("then x = 1024.5 follows", "1024", False),
        ("so it ends at 1024.", "1024", True),
        ("take \\frac{1}{2} of it", "\\frac{1}{2}", True),
        ("ans d 13  c 5 e 1", "d 13 c 5 e 1", True),
        (FIX, "d 13 c 5 e 1", False),
        ("so the answer is 2.", "2", True),
        ("the final answer must then be $2$", "2", True),
        ("Answer = (2)", "2", True),
        ("my answer is the sum of 2 and 3", "2", False),
        ("the answer is 2.5", "2", False),
        ("we have \\boxed{\\dfrac12}", "0.5", True),
        ("we have \\boxed{3}", "2", False),
        ("the answer is 0.5", "\\frac{1}{2}", True),
        ("hence 1,024 of them", "1024", True),
        ("hence 1024.0 of them", "1024", True),
        ("so n = \uff11\uff10\uff12\uff14", "1024", True),
        ("half, 0.5, of them", "1/2", False),
        ("therefore the claim is True", "true", True),
        ("untrue", "true", False),
        ("so it is C", "C", False),
        ("the answer is c", "C", True),
        ("2" * 400, "2", False),
        ("x = 102400", "1024", False),
    ],
)
def test_leaks_knows_words_and_numbers(content, answer, leaks):
    assert intervene.leaks(content, answer) is leaks


def test_a_replacement_that_is_too_long_or_leaves_no_room_is_dropped():
    num_fix = len(encode(TOKENIZER, FIX))
    for limit, gate in ((num_fix, "passed"), (num_fix - 1, "overlong")):
        config = msgspec.structs.replace(CONFIG, samples=1, max_step_tokens=limit)
        assert propose(REPLY, config=config)[0].gate == gate
    num_prompt = len(ATTEMPT.prompt_ids)
    long = msgspec.structs.replace(SAMPLING, max_new_tokens=400)
    config = msgspec.structs.replace(CONFIG, samples=1, continuation=long)
    for context, gate in ((num_prompt + num_fix + 400, "passed"), (num_prompt + 400, "no_room")):
        assert propose(REPLY, config=config, context=context)[0].gate == gate


def test_baselines_need_room_behind_the_attempt(monkeypatch):
    full = len(ATTEMPT.prompt_ids) + len(ATTEMPT.token_ids)
    reply_room = msgspec.structs.replace(SAMPLING, max_new_tokens=1)
    for baselines, gate in ((True, "no_room"), (False, "passed")):
        config = msgspec.structs.replace(
            CONFIG, samples=1, sampling=reply_room, continuation=reply_room, baselines=baselines
        )
        sampler = solver_of(REPLY, context=full)
        sampler.fits = lambda *_: True
        monkeypatch.setattr(sample, "check_output", lambda *_: None)
        (record,) = sampler.run(intervene.propose(sampler, [(PROBLEM, ATTEMPT)], config, seed=0))
        assert record.gate == gate


def test_the_leak_gate_can_be_switched_off():
    problem = msgspec.structs.replace(PROBLEM, answer="d 13")
    for gate, on in (("leak", True), ("passed", False)):
        config = msgspec.structs.replace(CONFIG, leak_gate=on, samples=1)
        sampler = solver_of(REPLY)
        (record,) = sampler.run(intervene.propose(sampler, [(problem, ATTEMPT)], config, seed=0))
        assert record.gate == gate


# --- continuations -----------------------------------------------------------------------------


def run_continuations(config: InterveneConfig, *texts: str):
    """All waves on one passed candidate: the records, and the engine."""
    sampler = solver_of(REPLY, *texts)
    one = msgspec.structs.replace(config, samples=1)
    (candidate,) = sampler.run(intervene.propose(sampler, [(PROBLEM, ATTEMPT)], one, seed=0))
    passed = [intervene.Passed("p", candidate.id, lambda: (PROBLEM, ATTEMPT, candidate))]
    records: list[Continuation] = []
    while todo := intervene.missing(passed, intervene.outcomes(records), config):
        records += sampler.run(intervene.continue_from(sampler, todo, config, seed=0))
    return candidate, records, sampler


RIGHT = "e d + c : 13 + 5 = e 1 ; ans d 13 c 5 e 1"
WRONG = "e d + c : 13 + 5 = e 2 ; ans d 13 c 5 e 2"


def test_continuations_start_from_prompt_prefix_and_intervention():
    _, records, sampler = run_continuations(CONFIG, RIGHT, WRONG, WRONG, RIGHT)
    assert [record.grade for record in records] == ["correct", "wrong", "wrong", "correct"]
    asked = [decode(TOKENIZER, r.prompt_ids) for r in sampler.engine.requests[1:]]
    assert asked == [f"<solve> {BODY} {FIX}"]
    seeds = [seed for request in sampler.engine.requests for seed in request.seeds]
    assert len(set(seeds)) == len(seeds)


def test_baselines_continue_from_the_wrong_step_and_from_the_prefix():
    config = msgspec.structs.replace(CONFIG, baselines=True, continuations=1, wave=1)
    _, records, sampler = run_continuations(config, RIGHT, WRONG, WRONG)
    assert [record.start for record in records] == ["intervention", "error", "prefix"]
    asked = [decode(TOKENIZER, r.prompt_ids) for r in sampler.engine.requests[1:]]
    wrong_step = TEXT.split(" e d + c")[0]
    assert asked[1:] == [f"<solve> {BODY} {wrong_step}", f"<solve> {BODY}"]


def test_the_first_success_stops_the_waves():
    config = msgspec.structs.replace(CONFIG, stop="first_success")
    _, records, _ = run_continuations(config, WRONG, RIGHT, WRONG, WRONG)
    assert len(records) == 2


def test_no_rule_ends_the_baselines_early():
    config = msgspec.structs.replace(CONFIG, stop="first_success", baselines=True)
    texts = [RIGHT, WRONG, RIGHT, WRONG, RIGHT, WRONG, WRONG, WRONG, WRONG, WRONG]
    _, records, _ = run_continuations(config, *texts)
    drawn = [record.start for record in records]
    assert [drawn.count(start) for start in ("intervention", "error", "prefix")] == [2, 4, 4]


def test_judging_needs_min_correct_and_touches_only_what_was_continued():
    candidate, records, _ = run_continuations(CONFIG, RIGHT, WRONG, WRONG, RIGHT)
    dropped = msgspec.structs.replace(candidate, id="x", gate="leak")
    for needed, gate in ((1, "kept"), (2, "kept"), (3, "unsolved")):
        config = msgspec.structs.replace(CONFIG, min_correct=needed)
        judged = list(intervene.judge([candidate, dropped], records, config))
        assert [record.gate for record in judged] == [gate, "leak"]
        assert list(intervene.judge(judged, records, config)) == judged
    none = msgspec.structs.replace(CONFIG, continuations=0)
    assert list(intervene.judge([candidate], [], none)) == [candidate]


# --- examples ----------------------------------------------------------------------------------


def built(target="recipe", judged=None):
    candidate, records, sampler = run_continuations(CONFIG, WRONG, RIGHT, WRONG, RIGHT)
    if judged is None:
        judged = list(intervene.judge([candidate], records, CONFIG))
    made = sft_data.build_examples(sampler, {"p": PROBLEM}, judged, records, target)
    return list(made), candidate


def spans(example, weight):
    ids = [t for t, w in zip(example.token_ids, example.weights, strict=True) if w == weight]
    return decode(TOKENIZER, ids)


def test_prompt_carries_no_loss_and_there_is_no_suffix_and_no_end_token():
    (example,), _ = built()
    assert spans(example, 0.0) == f"<solve> {BODY}"
    assert spans(example, 1.0) == FIX
    assert TOKENIZER.eos_token_id not in example.token_ids


def test_the_ablations_change_what_is_trained():
    sampler = solver_of(LATER)
    one = msgspec.structs.replace(CONFIG, samples=1)
    (later,) = sampler.run(intervene.propose(sampler, [(PROBLEM, ATTEMPT)], one, seed=0))
    kept = msgspec.structs.replace(later, gate="kept")
    prefix, fix = TEXT.split(" e d + c")[0], "e d + c : 4 + 5 = e 1 ;"
    (example,), _ = built("recipe", [kept])
    assert spans(example, 1.0) == f"{prefix} {fix}"
    (example,), _ = built("intervention", [kept])
    assert spans(example, 1.0) == fix
    assert spans(example, 0.0) == f"<solve> {BODY} {prefix}"
    (example,), _ = built("suffix")
    assert spans(example, 1.0) == f"{FIX} {RIGHT}<eos>".replace("<eos>", " <eos>")


def test_filter_and_rows_choose_the_examples():
    _, candidate = built()
    records = [
        msgspec.structs.replace(candidate, id=f"{n}", gate=gate)
        for n, gate in enumerate(["kept", "unsolved", "leak", "kept"])
    ]
    assert len(built("recipe", records)[0]) == 2
    assert len(built("no_filter", records)[0]) == 3
    assert len(built("one_per_problem", records)[0]) == 1


# --- the sampler --------------------------------------------------------------------------------


def test_the_grade_is_that_of_the_whole_answer_and_the_text_that_of_the_completion():
    sampler = solver_of("c 5 e 1")
    begun = encode(TOKENIZER, "ans d 13")
    ((graded,),) = sampler.sample([Start(PROBLEM, [0], begun)], SAMPLING)
    assert (graded.text, graded.grade.status) == ("c 5 e 1", "correct")


# --- the chat style ----------------------------------------------------------------------------


def test_the_chat_style_solves_along_the_reference_and_then_verifies(bpe):
    text = "First, x = 1.\n\nThen y = 2.\n\nDone"
    problem = Problem(id="q", problem="x?", answer="1024", reference="x is 1024.")
    attempt = msgspec.structs.replace(
        ATTEMPT, problem_id="q", text=text, token_ids=encode(bpe, text)
    )

    style = ChatStyle(PromptConfig(), bpe)
    mark = style.mark([text])
    reply = (
        f"<location-{mark}>2</location-{mark}>\n"
        f"<intervention-{mark}>\nWait, y = 3.\n</intervention-{mark}>"
    )
    engine = Script(["my own solution", "no tags", reply], bpe)
    sampler = Sampler(engine, bpe, style, Grader(), 5000)
    longer = msgspec.structs.replace(SAMPLING, max_new_tokens=200)
    config = msgspec.structs.replace(CONFIG, samples=2, sampling=longer)
    first, second = sampler.run(intervene.propose(sampler, [(problem, attempt)], config, seed=0))
    assert (first.gate, second.gate) == ("unparsed", "passed")
    assert (first.guided, second.guided) == ("my own solution", "")
    asked = decode(bpe, engine.requests[1].prompt_ids)
    assert "<|assistant|>my own solution<|end|>" in asked
    num_guided = len(encode(bpe, "my own solution")) + 1
    assert first.num_tokens == num_guided + len(encode(bpe, "no tags")) + 1
    assert second.num_tokens == len(encode(bpe, reply)) + 1
    joined = [*second.prefix_ids, *second.intervention_ids]
    assert decode(bpe, joined) == "First, x = 1.\n\nWait, y = 3.\n\n"
