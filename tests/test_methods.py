"""Methods of RL: values worked out by hand, what each refuses, and each in a tiny run."""

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from msgspec.structs import replace
from small_run import TOKENIZER, Quiet, Script

from intfast import cli, collect, config, credit, labels, loss, plan, rl
from intfast.batch import pack, pack_apart
from intfast.config import BatchConfig, CreditConfig, PolicyConfig, PromptConfig, SamplingConfig
from intfast.engine.protocol import Completion
from intfast.grading.answers import Reason
from intfast.grading.grader import Grade, Grader
from intfast.kernels.objectives import Either, Reinforce, SequenceClip, Streams
from intfast.methods import (
    bread,
    capo,
    critique,
    flawed,
    guided,
    laser,
    online_int,
    questa,
    table,
    teacher,
    vppo,
)
from intfast.methods.critique import Span
from intfast.prompts import ChatStyle, CompactStyle
from intfast.records import Aimed, Attempt, Example, Intervention, Problem
from intfast.run import open_run
from intfast.sample import Graded, Rollouts, Sampler, Start
from intfast.state.journal import Journal
from intfast.tokens import decode, encode

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/quickstart_short.toml"
END = TOKENIZER.eos_token_id
PROBLEM = Problem(
    id="p",
    problem="a 7 ; b 3 ; c 5 ; d a # b ; e d + c ; ? d c e :",
    answer="d 13 c 5 e 1",
    reference="a 7 # b 3 -> d 13 , d 13 + c 5 -> e 1 , ans d 13 c 5 e 1",
)
WRONG = "d a # b : 7 # 3 > 7 - 3 = d 4 ; e d + c : 4 + 5 = e 9 ; ans d 4 c 5 e 9"
RIGHT = "d a # b : 7 # 3 > 3 - 7 = d 13 ; e d + c : 13 + 5 = e 1 ; ans d 13 c 5 e 1"
COMPACT = CompactStyle(PromptConfig(style="compact", separator=" ;"), TOKENIZER)
SAMPLING = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=110)


def graded(text: str, status: str = "wrong") -> Graded:
    ids = [*encode(TOKENIZER, text), END]
    completion = Completion(
        token_ids=ids, logprobs=[-1.0] * len(ids), finish_reason="stop", policy_version=0
    )
    reason = {"wrong": Reason.WRONG, "correct": Reason.CORRECT}[status]
    return Graded(completion, text, Grade(status=reason.status, reason=reason))


def rollouts_of(*groups: list[Graded], problem: Problem = PROBLEM) -> Rollouts:
    starts = [Start(problem, [0] * len(group)) for group in groups]
    return Rollouts(starts, list(groups), list(zip(starts, groups, strict=True)), len(groups))


def sampler_of(*texts: str, style=COMPACT, tokenizer=TOKENIZER) -> Sampler:
    grader = SimpleNamespace(grade_many=list)  # nothing is graded
    return Sampler(Script(texts, tokenizer), tokenizer, style, grader, 4000)


@pytest.fixture
def bare_run(tmp_path):
    """Run of a run whose engine answers from a script, with a grader and empty journals."""

    def make(*texts: str, method: str = "bread"):
        kinds = {}

        def journal(name, kind):
            return kinds.setdefault(name, Journal(tmp_path / f"{len(kinds)}-{name}.jsonl", kind))

        sampler = Sampler(Script(texts), TOKENIZER, COMPACT, grader, 4000)
        return SimpleNamespace(
            config=cli.load(CONFIG, [f"rl.method={method}"]),
            sampler=sampler,
            folder=SimpleNamespace(journal=journal),
            metrics=SimpleNamespace(say=lambda text: None),
        )

    with Grader(mode="tail:ans", workers=1) as grader:
        yield make


# --- the table ---------------------------------------------------------------------------------


def test_needs_of_a_method_are_known_before_any_work():
    assert set(table.METHODS) == set(typing_names(config.RlConfig, "method"))
    named = {name for names in labels.NEEDED_BY.values() for name in names}
    assert named <= set(table.METHODS)
    for name in table.METHODS:
        found = cli.load(CONFIG, ["sft.epochs=0", "rl.from_base=false", f"rl.method={name}"])
        assert labels.by_method(found.rl, "references") == (name in labels.NEEDED_BY["references"])
        assert not labels.by_method(replace(found.rl, steps=0), "references")


def typing_names(kind, field):
    return (
        msgspec.inspect.type_info(kind)
        .fields[[f.name for f in msgspec.structs.fields(kind)].index(field)]
        .type.values
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rl.method=capo", "rl.method_args.votes=0"], "Expected `int` >= 1"),
        (["rl.method=capo", "rl.method_args.vots=2"], "unknown field `vots`.* knows whole = 2.0"),
        (["rl.method=vppo", "rl.method_args.alpha=1.0"], "Expected `float` < 1"),
        (["rl.method=outcome", "rl.method_args.alpha=0.5"], "knows none"),
        (["rl.method=vppo", "rl.credit.scale=group"], 'rl.credit.scale: expected "none"'),
        (["rl.method=vppo", "rl.credit.baseline=leave-one-out"], "rl.credit.baseline"),
        (["rl.method=capo", "rl.credit.scale=batch"], "rl.credit.scale"),
        (["rl.method=capo", "rl.refill=1"], "rl.refill: expected 0"),
        (["rl.method=capo", "rl.hint=shortest"], 'rl.hint: expected "off"'),
        (["rl.method=capo", "rl.policy.objective=gspo"], "rl.policy.objective: expected not"),
        (
            ["rl.method=capo", "rl.method_args.votes=2", "intervene.sampling.temperature=0"],
            "temperature > 0",
        ),
        (["rl.method=questa", "rl.hint=0.5"], 'rl.hint: expected "off"'),
    ],
)
def test_settings_that_a_method_cannot_work_with_are_refused(words, message):
    words = [*words, "intervene.samples=1"]
    with pytest.raises(ValueError, match=message):
        table.check(cli.load(CONFIG, words))


def test_the_plan_counts_what_a_method_draws():
    def samples(*words):
        found = cli.load(CONFIG, ["sft.epochs=0", "rl.from_base=false", *words])
        return {d.stage: d.samples for d in plan.draws(found, 24)}

    # 2 steps x 4 problems x 8 rollouts.
    assert samples()["rollouts"] == 64 and "critiques" not in samples()
    assert samples("rl.method=vppo")["critiques"] == 64
    assert samples("rl.method=capo", "rl.method_args.votes=3")["critiques"] == 192


# --- critiques ---------------------------------------------------------------------------------


def test_a_compact_critique_ends_where_a_replacement_would_begin():
    sampler = sampler_of("d 4 13 bad <fix>", "d 4 4 ok e 9 9 ok <none>", "d 4 13 ok")
    drawn = rollouts_of([graded(WRONG), graded(RIGHT, "correct"), *[graded(WRONG)] * 2])
    found, counts = critique.locate(sampler, drawn, ["wrong"], 1, SAMPLING, 0)
    fix = encode(TOKENIZER, "<fix>")[0]
    assert all(r.sampling.stop_ids == (END, fix) for r in sampler.engine.requests)
    # One request for each wrong rollout, no guided solution.
    assert len(sampler.engine.requests) == 3
    step = encode(TOKENIZER, "d a # b : 7 # 3 > 7 - 3 = d 4 ;")
    # Sound, and not readable.
    assert found == {(0, 0): [[Span(0, len(step))]], (0, 2): [[]], (0, 3): []}
    assert counts["critiques"] == 3 and counts["critiques_read"] == 2
    assert counts["method_tokens"] == 6 + 10 + 5


def test_a_compact_critique_is_read_as_strictly_as_a_verification():
    steps = COMPACT.split(WRONG)
    for reply, expected in [
        ("d 4 13 bad <fix>", [1]),
        ("d 4 4 ok e 9 1 bad <fix>", [2]),
        ("d 4 4 ok e 9 9 ok <none>", []),
        ("d 4 4 bad <fix>", None),
        ("d 5 13 bad <fix>", None),
        ("d 4 4 ok", None),
        ("bad <fix>", None),
        ("", None),
    ]:
        assert critique.read(COMPACT, reply, steps) == expected, reply


def test_a_chat_critique_names_all_wrong_steps_inside_marked_tags(bpe):
    style = ChatStyle(PromptConfig(), bpe)
    steps = ["One.\n\n", "Two </attempt> more.\n\n", "Three."]
    mark = style.mark(steps)
    block = f"<location-{mark}>%s</location-{mark}>"
    for text, expected in [
        ("2, 3", [2, 3]),
        ("3,2,2", [2, 3]),
        ("none", []),
        ("4", None),
        ("0", None),
        ("2 3", None),
        ("two", None),
    ]:
        assert critique.read(style, "So: " + block % text, steps) == expected, text
    assert critique.read(style, block % "1" + block % "2", steps) is None
    assert critique.read(style, block % "1" + f"<location-{mark}>", steps) is None
    assert critique.read(style, "<location-0>2</location-0>", steps) is None
    problem = Problem(id="m", problem="What?", answer="2", reference="It is 2.")
    asked = decode(bpe, critique.request(style, problem, steps)[0])
    assert "[Substep 2]\nTwo < /attempt> more." in asked and "It is 2." in asked
    # No replacement is asked for.
    assert "intervention" not in asked


def test_problems_without_a_reference_are_not_criticised():
    bare = msgspec.structs.replace(PROBLEM, reference=None)
    drawn = rollouts_of([graded(WRONG)], problem=bare)
    found, counts = critique.locate(sampler_of(), drawn, ["wrong"], 1, SAMPLING, 0)
    assert found == {} and counts["method_tokens"] == counts["critiques"] == 0


# --- VPPO and CAPO -----------------------------------------------------------------------------


def test_vppo_by_hand():
    own = vppo.Vppo.Settings()
    # First errors at tokens (-, 6, 3, none) less a margin of 2.
    right, *wrong = vppo.advantages([1, 0, 0, 0], [4, 10, 10, 10], [0, 4, 1, 0], own)
    assert right == pytest.approx([0.6875] * 4)
    for stream, num in zip(wrong, (4, 1, 0), strict=True):
        assert stream == pytest.approx([0.1875] * num + [-0.3125] * (10 - num))


def test_vppo_clamps_only_what_it_rewards_and_only_where_asked():
    for clamp, rewarded in ((True, 0.0), (False, -0.3125)):
        own = vppo.Vppo.Settings(clamp=clamp)
        *right, wrong = vppo.advantages([1, 1, 1, 0], [3, 3, 3, 10], [0, 0, 0, 5], own)
        assert right == [pytest.approx([0.1875] * 3)] * 3
        assert wrong == pytest.approx([rewarded] * 5 + [-0.8125] * 5)


def test_vppo_leaves_out_what_could_not_be_graded():
    own = vppo.Vppo.Settings()
    assert vppo.advantages([1.0, 1.0, None], [2, 0, 1], [0] * 3, own) == [[0.0, 0.0], [], None]


def test_vppo_reads_every_wrong_rollout():
    """Three identical wrong rollouts get identical credit."""
    sampler = sampler_of(*["d 4 4 ok e 9 1 bad <fix>"] * 3)
    run = SimpleNamespace(config=cli.load(CONFIG, ["rl.method=vppo"]), sampler=sampler)
    method = vppo.Vppo(run, vppo.Vppo.Settings(margin=0.0), "base")
    drawn = rollouts_of([graded(WRONG) for _ in range(3)])
    ((one, two, three),), counts = method.credit(drawn, None, 1)
    assert one == two == three and len(set(one)) == 2 and one[0] > 0 > one[-1]
    assert counts["critiques"] == counts["located"] == 3
    # A margin of a prompt's length takes the rewarded prefix away.
    sampler.engine.texts = ["d 4 4 ok e 9 1 bad <fix>"] * 3
    ((one, *_),), _ = vppo.Vppo(run, vppo.Vppo.Settings(), "base").credit(drawn, None, 1)
    assert set(one) == {0.0}


def test_capo_by_hand():
    own = capo.Capo.Settings()
    wrong = [[], [Span(1, 2)], [Span(1, 2), Span(2, 3)]]
    rows = zip([1.0, 1.0, 0.0], wrong, strict=True)
    rewards = [capo.token_rewards(reward, 3, spans, own) for reward, spans in rows]
    assert rewards == [[2, 2, 2], [2, 1, 2], [0, -1, -1]]
    made = critique.centred(rewards)
    expected = [[1, 1, 1], [1, 0, 1], [-1, -2, -2]]
    assert made == [pytest.approx(stream) for stream in expected]
    # One scale for outcome and penalty: the deviation of 2, 5/3 and -2/3.
    scaled = critique.centred(rewards, "group")
    deviation = (19 / 9) ** 0.5
    assert scaled[2] == pytest.approx([x / (deviation + credit.EPS) for x in expected[2]])
    assert capo.token_rewards(None, 3, [], own) is None
    # The stop token is sampled but belongs to no step.
    assert capo.token_rewards(0.0, 2, [Span(1, 9)], own) == [0, -1]


@pytest.mark.parametrize(
    ("rule", "expected"), [("intersection", {2}), ("majority", {2}), ("union", {2, 3})]
)
def test_capo_votes_by_hand(rule, expected):
    votes = [[Span(n, n + 1) for n in numbers] for numbers in ([2], [2, 3], [2])]
    assert {span.start for span in capo.voted(votes, rule)} == expected
    assert capo.voted([], rule) == []


def test_capo_reads_right_rollouts_too_and_votes():
    replies = ["d 4 13 bad <fix>", "d 4 4 ok e 9 1 bad <fix>"]
    replies += ["d 13 13 ok e 1 1 ok <none>"] * 2
    run = SimpleNamespace(config=cli.load(CONFIG, ["rl.method=capo"]), sampler=sampler_of(*replies))
    drawn = rollouts_of([graded(WRONG), graded(RIGHT, "correct")])
    method = capo.Capo(run, capo.Capo.Settings(votes=2, vote="union"), "base")
    ((wrong, right),), counts = method.credit(drawn, None, 1)
    assert counts["critiques"] == 4 and counts["located"] == 1
    assert len(set(right)) == 1 and right[0] > 0
    steps = [len(encode(TOKENIZER, step)) for step in COMPACT.split(WRONG)]
    assert wrong[0] == wrong[sum(steps[:2]) - 1] == wrong[-1] - 1


def test_examples_take_one_advantage_per_token():
    completion = Completion(
        token_ids=[5, 6], logprobs=[-1.0, -1.0], finish_reason="stop", policy_version=0
    )
    (example,) = credit.examples([[1, 2]], [[completion]], [[[0.5, -0.5]]], CreditConfig())
    assert example.advantages == [0.0, 0.0, 0.5, -0.5]
    idle = msgspec.structs.replace(example, advantages=[0.0, 0.0, 0.5, 0.0])
    assert credit.with_gradient([idle], PolicyConfig()) == [idle]


# --- QuestA ------------------------------------------------------------------------------------


def test_questa_shows_half_then_a_quarter_and_no_bare_problem():
    run = SimpleNamespace(
        config=cli.load(CONFIG, ["rl.method=questa", "rl.steps=4"]), sampler=sampler_of()
    )
    method = questa.Questa(run, questa.Questa.Settings(), "base")
    short = msgspec.structs.replace(PROBLEM, reference="a 7 # b 3 -> d")
    for step, share in ((1, 0.5), (2, 0.5), (3, 0.25)):
        shown, bare = method.tasks([Start(PROBLEM, ()), Start(short, ())], step)
        part = PROBLEM.reference[: int(share * len(PROBLEM.reference))]
        assert decode(TOKENIZER, shown.prompt_ids).endswith(
            decode(TOKENIZER, encode(TOKENIZER, part))
        )
        # 14 characters: half are 7, fewer than 10.
        assert bare.prompt_ids is None


def test_questa_leaves_out_groups_that_are_too_easy_or_too_hard():
    method = questa.Questa(None, questa.Questa.Settings(), "base")
    right, wrong = graded(RIGHT, "correct"), graded(WRONG)
    groups = [
        [right] * 2,
        [right, wrong],
        [wrong] * 2,
        [right] * 19 + [wrong],
        [right] * 39 + [wrong],
    ]
    kept, counts = method.after_draw(rollouts_of(*groups), 1)
    assert kept.groups_P_G == [groups[1], groups[3]] and counts == {"groups_left_out": 3}
    assert len(kept.starts_P) == 2 and len(kept.drawn) == 5


# --- in a run ----------------------------------------------------------------------------------


@pytest.fixture
def run_of(tmp_path):
    def make(*overrides):
        words = [
            f"run={tmp_path / 'run'}",
            f"model.path={ROOT / 'configs/quickstart/base'}",
            f"data.train={ROOT / 'configs/quickstart/train.jsonl'}",
            f"data.test={ROOT / 'configs/quickstart/test.jsonl'}",
            "data.train_limit=4",
            "data.test_limit=2",
            "rl.problems_per_step=2",
            "rl.group_size=4",
            "rl.steps=2",
            *overrides,
        ]
        return open_run(cli.load(CONFIG, words), Quiet())

    return make


@pytest.mark.parametrize("method", ["vppo", "capo"])
def test_groups_that_are_all_wrong_move_the_weights(run_of, method):
    own = ["rl.method_args.margin=0.0"] if method == "vppo" else []
    with run_of(f"rl.method={method}", *own) as run:
        before = run.decoder.head_weight_VD.detach().clone()
        rl.rl(run, "base_rl", "base", run.problems)
        rows = run.metrics.rows("base_rl")
        assert not before.equal(run.decoder.head_weight_VD)
    assert [row["updates"] for row in rows] == [1, 1]
    assert all(row["critiques"] == 8 and row["critiques_read"] > 0 for row in rows)
    assert all(row["located"] > 0 and row["method_tokens"] > 8 for row in rows)


# --- BREAD -------------------------------------------------------------------------------------


def test_bread_replaces_groups_that_fail_by_the_shortest_beginning_that_works(bare_run):
    """A group with a right rollout stays; one that failed is drawn from a quarter, then half."""
    run = bare_run(*[WRONG] * 2, WRONG, RIGHT)
    failed, good = [graded(WRONG)] * 2, [graded(WRONG), graded(RIGHT, "correct")]
    drawn = rollouts_of(good, failed)
    kept, counts = bread.Bread(run, bread.Bread.Settings(), "base_rl").after_draw(drawn, 1)
    assert kept.groups_P_G[0] is good and kept.starts_P[0] is drawn.starts_P[0]
    half = guided.beginning(PROBLEM.reference, 0.5)
    assert kept.starts_P[1].answer_ids == encode(TOKENIZER, half)
    assert [x.grade.status for x in kept.groups_P_G[1]] == ["wrong", "correct"]
    asked = [decode(TOKENIZER, request.prompt_ids) for request in run.sampler.engine.requests]
    quarter = guided.beginning(PROBLEM.reference, 0.25)
    assert asked == [f"<solve> {PROBLEM.problem} {text}" for text in (quarter, half)]
    assert counts["groups_failed"] == counts["groups_branched"] == 1
    spent = 3 * len(graded(WRONG).completion.token_ids) + len(graded(RIGHT).completion.token_ids)
    assert counts["method_tokens"] == spent
    # What the step drew is what is counted as drawn.
    assert kept.drawn == drawn.drawn
    # The reference in the answer is prompt: no loss on it.
    made = credit.examples(
        [run.sampler.start_prompt(start) for start in kept.starts_P[1:]],
        [[x.completion for x in kept.groups_P_G[1]]],
        [[-0.5, 0.5]],
        CreditConfig(),
    )
    length = len(asked_ids := run.sampler.engine.requests[1].prompt_ids)
    assert made[0].token_ids[:length] == list(asked_ids) and not any(made[0].weights[:length])
    assert all(made[0].weights[length:])


def test_bread_leaves_a_group_that_nothing_helps(bare_run):
    run = bare_run(*[WRONG] * 6)
    drawn = rollouts_of([graded(WRONG)] * 2)
    kept, counts = bread.Bread(run, bread.Bread.Settings(), "base_rl").after_draw(drawn, 1)
    assert kept.groups_P_G == drawn.groups_P_G and kept.starts_P == drawn.starts_P
    assert counts["groups_branched"] == 0 and len(run.sampler.engine.requests) == 3


# --- flawed beginnings -------------------------------------------------------------------------


def test_half_of_the_starts_are_flawed_and_the_seed_says_which(bare_run):
    """By hand: of 10 problems with a share of 0.5, 5 start with answer ids."""
    run = bare_run()
    problems = [msgspec.structs.replace(PROBLEM, id=f"n{n}") for n in range(10)]
    for problem in problems:
        attempt = run.sampler.attempt(problem, 0, graded(WRONG))
        step = encode(TOKENIZER, "d a # b : 7 # 3 > 3 - 7 = d 13 ;")
        run.folder.journal("attempts", Attempt).append([attempt])
        run.folder.journal("interventions", Intervention).append(
            [
                Intervention(
                    id=f"{problem.id}/0/0",
                    problem_id=problem.id,
                    attempt=0,
                    sample=0,
                    guided="",
                    reply="",
                    gate="unsolved",
                    location=1,
                    intervention_ids=step,
                )
            ]
        )
    tasks = [Start(problem, ()) for problem in problems]

    def made(config=run.config):
        run.config = config
        return flawed.Flawed(run, flawed.Flawed.Settings(), "base_rl").tasks(tasks, 1)

    flaw = encode(TOKENIZER, "d a # b : 7 # 3 > 7 - 3 = d 4 ;")
    first = made()
    assert sorted(map(bool, (start.answer_ids for start in first))) == [False] * 5 + [True] * 5
    assert all(start.answer_ids in ((), flaw) and start.prompt_ids is None for start in first)
    assert made() == first
    assert made(msgspec.structs.replace(run.config, seed=1)) != first
    # A rollout behind it: prompt and flaw without loss, an advantage on the sampled tokens alone.
    start = next(start for start in first if start.answer_ids)
    prompt_ids = run.sampler.start_prompt(start)
    completions = [
        Completion(token_ids=[1] * 5, logprobs=[0.0] * 5, finish_reason="stop", policy_version=0)
    ] * 2
    found = credit.group_advantages([[1.0, 0.0]], CreditConfig())
    pair = credit.examples([prompt_ids], [completions], found.advantages_P_G, CreditConfig())
    num = len(run.sampler.prompt(start.problem)) + len(flaw)
    for example, advantage in zip(pair, (0.5, -0.5), strict=True):
        assert example.weights == [0.0] * num + [1.0] * 5
        assert example.advantages == [0.0] * num + [advantage] * 5


def test_a_rollout_behind_a_flaw_is_graded_with_it(bare_run):
    run = bare_run("e d + c : 4 + 5 = e 9 ; ans d 13 c 5 e 1")
    flaw = encode(TOKENIZER, "d a # b : 7 # 3 > 7 - 3 = d 4 ;")
    ((found,),) = run.sampler.sample([Start(PROBLEM, [0], flaw)], SAMPLING)
    assert found.grade.status == "correct"
    # Alone the end of an answer is none.
    run = bare_run("d 13 c 5 e 1")
    ((found,),) = run.sampler.sample([Start(PROBLEM, [0], encode(TOKENIZER, "ans"))], SAMPLING)
    assert found.grade.status == "correct"


# --- teachers ----------------------------------------------------------------------------------


def test_a_teacher_gives_each_token_the_difference_of_log_probs(monkeypatch):
    """By hand: teacher (-0.5, -2), student (-1, -1)."""
    asked = []

    def score(decoder, sequences, temperature):
        asked.extend(sequences)
        return [[-7.0] * (len(ids) - 3) + [-0.5, -2.0] for ids in sequences]

    monkeypatch.setattr(teacher.scoring, "score", score)
    completion = Completion(
        token_ids=[5, 6], logprobs=[-1.0, -1.0], finish_reason="stop", policy_version=0
    )
    group = [graded(WRONG)._replace(completion=completion) for _ in range(2)]
    made, counts = teacher.advantages(
        sampler_of(), None, rollouts_of(group), [["a 7 # b 3", None]], 1.0
    )
    assert made == [[[0.5, -1.0], [0.0, 0.0]]]
    shown = f"<rewrite> {PROBLEM.problem} <sol> <ref> a 7 # b 3 <out>"
    assert asked == [[*encode(TOKENIZER, shown), 5, 6]]
    assert counts["scored_tokens"] == len(asked[0]) and counts["taught"] == 1


def test_what_a_teacher_sees():
    other = msgspec.structs.replace(PROBLEM, id="o", reference="b 3")
    right = [graded(RIGHT, "correct"), graded(RIGHT + " ", "correct")]
    drawn = rollouts_of([graded(WRONG), *right], [graded(WRONG)])
    drawn.starts_P[1] = drawn.starts_P[1]._replace(problem=other)

    def seen(kind, **own):
        method = kind(SimpleNamespace(), kind.Settings(**own), "base_rl")
        return [method.shown(drawn, 0, g) for g in range(3)] + [method.shown(drawn, 1, 0)]

    assert seen(teacher.Opsd) == [PROBLEM.reference] * 3 + ["b 3"]
    assert seen(teacher.Opsd, teacher="other") == ["b 3"] * 3 + [PROBLEM.reference]
    # Never the rollout itself.
    assert seen(teacher.Sdpo) == [RIGHT, RIGHT + " ", RIGHT, None]


def test_a_teacher_with_the_students_prompt_teaches_nothing(run_of, monkeypatch):
    monkeypatch.setattr(teacher.prompts, "rationalise", lambda style, problem: style.solve(problem))
    with run_of("rl.method=opsd") as run:
        rollouts = rl.draw(run, "rl", [Start(problem, ()) for problem in run.problems], 0)
        method = teacher.Opsd(run, teacher.Opsd.Settings(), "base_rl")
        made, _ = method.credit(rollouts, None, 1)
    flat = [abs(value) for group in made for stream in group for value in stream]
    assert len(flat) > 100 and max(flat) < 1e-4


# --- LaSeR -------------------------------------------------------------------------------------


def test_laser_by_hand():
    """beta 0.1, c -23, log-probs -14, -22, -20, rewards 1, 0, 0; alpha 0.1."""
    weights = laser.class_weights([1.0, 0.0, 0.0])
    assert weights == [1.5, 0.75, 0.75]
    logprobs = torch.tensor([-14.0, -22.0, -20.0], requires_grad=True)
    goals = torch.tensor([-23 + 1 / 0.1, -23, -23])
    factor = torch.tensor(weights) * 0.1**2
    terms = (
        factor
        * Either(Reinforce())(
            logprobs, None, Streams(torch.ones(3), torch.zeros(3), goal_T=goals)
        ).loss_T
    )
    assert terms.tolist() == pytest.approx([0.015, 0.0075, 0.0675])
    (0.1 * terms.mean()).backward()
    assert logprobs.grad[2].item() == pytest.approx(0.0015)


def test_laser_mixes_advantages_by_hand():
    outcome, scores = [[1.0, 0.0, 0.0]], [[0.9, 0.1, 0.3]]
    own = laser.Laser.Settings()

    def found(scale, scores=scores, outcome=outcome):
        config = CreditConfig(scale=scale)
        first = credit.group_advantages(outcome, config).advantages_P_G
        return laser.mixed(first, scores, own, config)

    assert found("none")[0] == pytest.approx([0.64667, -0.33333, -0.31333], abs=1e-4)
    assert found("group")[0] == pytest.approx([1.1513, -0.5997, -0.5516], abs=4e-4)
    # Scores that hardly differ say nothing: the outcome alone, which is not zeroed.
    pair = found("none", [[0.5, 0.52]], [[1.0, 0.0]])
    assert pair == [[0.5, -0.5]]
    assert found("none", [[0.9, None, 0.1]], [[1.0, None, 0.0]])[0][1] is None


def test_laser_rows_have_their_goal_and_count_in_no_divisor(bare_run):
    run = bare_run(method="laser")
    run.problems = [PROBLEM]
    method = laser.Laser(run, laser.Laser.Settings(), "base_rl")
    lasts = iter([-14.0, -22.0, -20.0])
    run.sampler.engine.score = lambda sequences: [[0.0, next(lasts)] for _ in sequences]
    run.metrics.rows = lambda stage: [{"self_constant": -23.0}]
    cut = graded(RIGHT, "correct")
    ids = cut.completion.token_ids[:-1]
    cut = cut._replace(
        completion=msgspec.structs.replace(
            cut.completion, finish_reason="length", token_ids=ids, logprobs=[-1.0] * len(ids)
        )
    )
    group = [graded(RIGHT, "correct"), graded(WRONG), graded(WRONG + " "), cut]
    drawn = rollouts_of(group)
    outcome = credit.group_advantages(rl.rewards([group]), CreditConfig())
    advantages, counts = method.credit(drawn, outcome, 1)
    assert advantages == outcome.advantages_P_G and counts["self_f1"] == 1.0
    prompt_ids = [run.sampler.prompt(PROBLEM)]
    part = credit.examples(
        prompt_ids, [[x.completion for x in group]], advantages, run.config.rl.credit
    )
    made = method.rows(part)
    # The truncated rollout has no row and changes no weight.
    assert made[3] is part[3]
    goals = [example.goal for example in made[:3]]
    assert goals[0] == pytest.approx(-13) and set(goals[1:]) == {-23}
    z = laser.reserved(run.sampler, prompt_ids[0], "")
    assert all(example.token_ids[-2:] == [END, z] for example in made[:3])
    # Divided by the divisor, it is the mean of the hand-computed terms.
    divisor = credit.divisor(part, run.config.rl.credit, 110)
    lost = [
        example.weights[-1] / divisor * (last - example.goal) ** 2
        for example, last in zip(made, (-14.0, -22.0, -20.0), strict=False)
    ]
    assert sum(lost) == pytest.approx(0.1 * 0.03)
    kept = credit.with_gradient(
        [msgspec.structs.replace(x, advantages=[0.0] * len(x.advantages)) for x in made],
        PolicyConfig(),
    )
    assert len(kept) == 3
    # A warm-up.
    late = laser.Laser(run, laser.Laser.Settings(from_step=1), "base_rl")
    lasts = iter([-14.0, -22.0, -20.0])
    late.credit(drawn, outcome, 1)
    assert late.rows(part) is part


def test_laser_refuses_a_token_that_is_too_likely_or_taken(bare_run):
    run = bare_run(method="laser")
    run.problems = [PROBLEM]
    run.metrics.rows = lambda stage: []
    method = laser.Laser(run, laser.Laser.Settings(), "base_rl")
    assert method._measured([-13.0, -12.0]) == -12.5
    with pytest.raises(ValueError, match=r"below -1/beta - 2 = -12, got -11\.00; set"):
        method._measured([-11.0])
    for name in ("<eos>", "<solve>", "a 7", "no such"):
        with pytest.raises(ValueError, match=r"rl\.method_args\.token: expected one token"):
            laser.Laser(run, laser.Laser.Settings(token=name), "base_rl")
    assert laser.reserved(run.sampler, [], "<check>") == encode(TOKENIZER, "<check>")[0]


# --- online InT --------------------------------------------------------------------------------


def test_online_int_learns_from_interventions_of_groups_that_fail(bare_run):
    fix = "d 4 13 bad <fix> d a # b : 7 # 3 > 3 - 7 = d 13 ;"
    rest = "e d + c : 13 + 5 = e 1 ; ans d 13 c 5 e 1"
    run = bare_run(fix, WRONG, rest, method="online_int")
    own = online_int.OnlineInt.Settings(continuations=2, weight=0.5, every=2)
    method = online_int.OnlineInt(run, own, "base_rl")
    good = [graded(WRONG), graded(RIGHT, "correct")]
    drawn = rollouts_of(good, [graded(WRONG)] * 2)
    outcome = credit.group_advantages(rl.rewards(drawn.groups_P_G), CreditConfig())
    # Not due.
    assert method.credit(drawn, outcome, 1)[1] == {} and method.rows([]) == []
    advantages, counts = method.credit(drawn, outcome, 2)
    assert advantages == outcome.advantages_P_G
    assert [counts[f"interventions_{x}"] for x in ("tried", "passed", "kept")] == [1, 1, 1]
    drawn_tokens = sum(len(encode(TOKENIZER, text)) + 1 for text in (fix, WRONG, rest))
    assert counts["method_tokens"] == drawn_tokens
    part = credit.examples(
        [run.sampler.prompt(PROBLEM)] * 2,
        [[x.completion for x in group] for group in drawn.groups_P_G],
        advantages,
        run.config.rl.credit,
    )
    *rest, example = method.rows(part)
    assert rest == part and example.advantages is None
    step = encode(TOKENIZER, "d a # b : 7 # 3 > 3 - 7 = d 13 ;")
    assert example.token_ids == [*run.sampler.prompt(PROBLEM), *step]
    # Its weights, over the divisor, are `weight` times those of a mean.
    divisor = credit.divisor(part, run.config.rl.credit, 110)
    assert sum(example.weights) / divisor == pytest.approx(0.5)
    # The second of two updates of a step has the rest: nothing.
    assert method.rows(part) is part


# --- rows that a method adds to an update ------------------------------------------------------


def policy_example(**changes) -> Example:
    values = {
        "token_ids": [1, 2, 3, 4],
        "weights": [0.0, 0.0, 1.0, 1.0],
        "advantages": [0.0, 0.0, 0.5, -0.5],
        "sampler_logprobs": [0.0, 0.0, -1.0, -2.0],
    }
    return Example(**(values | changes))


def aimed(goal: float) -> Aimed:
    return Aimed(
        token_ids=[1, 2, 3, 5],
        weights=[0.0, 0.0, 1.0, 0.25],
        advantages=[0.0, 0.0, 0.0, 0.0],
        sampler_logprobs=[0.0, 0.0, -1.0, 0.0],
        goal=goal,
    )


def losses(batch, policy, dtype=torch.float64):
    made = torch.Generator().manual_seed(3)
    hidden = torch.randn(len(batch.rows_N), 8, generator=made, dtype=dtype, requires_grad=True)
    weight = torch.randn(16, 8, generator=made, dtype=dtype)
    total, stats = loss.policy_loss(hidden, weight, batch, policy)
    total.backward()
    return total, stats, hidden, weight


def test_a_row_with_a_goal_is_a_squared_loss_and_not_of_the_policy():
    config, policy = BatchConfig(max_tokens=100), PolicyConfig(kl=0.0)
    (batch,) = pack([policy_example(), aimed(-4.0)], config).batches
    assert batch.goal_N.isnan().tolist() == [True, True, True, False]
    total, stats, hidden, weight = losses(batch, policy)
    again = hidden.detach().clone().requires_grad_()
    logprob = torch.log_softmax(again @ weight.T, -1).gather(1, batch.target_N[:, None])[:, 0]
    # The ratio is 1 in the only update of a step, and its gradient that of the log-prob.
    surrogate = -batch.advantage_N * (logprob - logprob.detach()).exp()
    plain = (batch.weight_N * torch.where(batch.goal_N.isnan(), surrogate, 0)).sum()
    plain = plain + 0.25 * (logprob[3] + 4) ** 2
    plain.backward()
    assert total.item() == pytest.approx(plain.item())
    assert torch.allclose(hidden.grad, again.grad)
    # What is said of the policy is of the sampled tokens.
    (alone,) = pack([policy_example(), policy_example()], config).batches
    assert stats.keys() == losses(alone, policy)[1].keys()
    read = loss.read_stats(stats)
    assert read["ratio_mean"] == pytest.approx(1) and read["num_tokens"] == 3


def test_a_goal_keeps_its_sequence_and_must_be_a_number():
    with pytest.raises(ValueError, match="an objective of tokens"):
        Either(SequenceClip(2))
    idle = policy_example(advantages=[0.0] * 4)
    assert credit.with_gradient([idle, aimed(-4.0)], PolicyConfig()) == [aimed(-4.0)]
    with pytest.raises(ValueError, match="goal of example 0: expected a finite"):
        pack([aimed(float("nan"))], BatchConfig(max_tokens=100))
    (batch,) = pack([idle], BatchConfig(max_tokens=100)).batches
    assert batch.goal_N is None


def test_supervised_rows_join_an_update_in_batches_of_their_own():
    taught = Example(token_ids=[1, 2, 3], weights=[0.0, 0.5, 0.5])
    packed = pack_apart([taught, policy_example()], BatchConfig(max_tokens=100))
    first, second = packed.batches
    assert first.advantage_N is not None and second.advantage_N is None
    assert packed.num_loss_tokens == 4 and packed.num_sequences == 2
    assert packed.weight_sum == 3.0
    policy = PolicyConfig()
    _, of_policy, *_ = losses(first, policy)
    total, of_taught, hidden, weight = losses(second, policy)
    logprob = torch.log_softmax(hidden @ weight.T, -1).gather(1, second.target_N[:, None])
    assert total.item() == pytest.approx(-0.5 * logprob.sum().item())
    both = loss.read_stats(loss.merge_stats(loss.merge_stats(None, of_taught), of_policy))
    alone = loss.read_stats(of_policy)
    assert both["loss_sum"] == pytest.approx(alone["loss_sum"] + total.item())
    assert {k: v for k, v in both.items() if k != "loss_sum"} == {
        k: v for k, v in alone.items() if k != "loss_sum"
    }
    # An update of supervised rows alone has no figures of a policy, and the step's are the others'.
    rows = [loss.read_stats(of_taught) | {"skipped": 0}, alone | {"skipped": 0}]
    assert loss.together(rows)["entropy_mean"] == pytest.approx(alone["entropy_mean"])
    assert "entropy_mean" not in loss.together(rows[:1])
    assert credit.with_gradient([taught], policy) == [taught]


@pytest.mark.parametrize("method", ["laser", "online_int", "bread", "flawed"])
def test_methods_in_a_run(run_of, monkeypatch, method):
    # The least likely of 62 words is likelier than a real vocabulary's.
    own = ["rl.method_args.beta=0.2"] if method == "laser" else []
    with run_of(f"rl.method={method}", "rl.minibatches=2", "attempts.max_problems=4", *own) as run:
        found = collect.gather(run, [run.config])
        if method == "online_int":
            # This base hardly solves a problem: every continuation counts.
            monkeypatch.setattr(
                "intfast.methods.online_int.intervene.judge",
                lambda found, drawn, config: [
                    replace(record, gate="kept") if record.gate == "passed" else record
                    for record in found
                ],
            )
        before = run.decoder.head_weight_VD.detach().clone()
        rl.rl(run, "base_rl", "base", found.selected)
        rows = run.metrics.rows("base_rl")
        moved = not before.equal(run.decoder.head_weight_VD)
    assert len(rows) == 2
    if method in ("laser", "online_int"):
        assert moved and all(row["updates"] == 2 for row in rows)
        assert all(row["skipped"] == 0 for row in rows)
    if method == "laser":
        assert rows[0]["self_constant"] == rows[1]["self_constant"] < -7
