"""Methods of RL: values worked out by hand, what each refuses, and each in a tiny run."""

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from small_run import TOKENIZER, Quiet, Script

from intfast import cli, config, credit, plan, rl
from intfast.config import CreditConfig, PolicyConfig, PromptConfig, SamplingConfig
from intfast.engine.protocol import Completion
from intfast.grading.answers import Reason
from intfast.grading.grader import Grade
from intfast.methods import capo, critique, questa, table, vppo
from intfast.methods.critique import Span
from intfast.prompts import ChatStyle, CompactStyle
from intfast.records import Problem
from intfast.run import open_run
from intfast.sample import Graded, Rollouts, Sampler, Start
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
    return Sampler(Script(texts, tokenizer), tokenizer, style, None, 4000)


# --- the table ---------------------------------------------------------------------------------


def test_needs_of_a_method_are_known_before_any_work():
    assert set(table.METHODS) == set(typing_names(config.RlConfig, "method"))
    named = {name for names in config.NEEDED_BY.values() for name in names}
    assert named <= set(table.METHODS)
    for name in table.METHODS:
        found = cli.load(CONFIG, ["sft.epochs=0", "rl.from_base=false", f"rl.method={name}"])
        assert found.by_method("references") == (name in config.NEEDED_BY["references"])
        assert not cli.load(CONFIG, ["rl.steps=0", "rl.from_base=false"]).by_method("references")


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
