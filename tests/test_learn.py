"""SFT and RL on a tiny model: they learn, stop, continue exactly, and count what they do."""

import bounds
import msgspec
import pytest
import torch
from safetensors.torch import load_file
from small_run import Quiet, rounding_of, words, write_inputs

from intfast import cli, collect, credit, pipeline, rl, sft
from intfast.grading.answers import Reason
from intfast.grading.grader import Grade
from intfast.model import optim
from intfast.model.decoder import PackedAttention
from intfast.records import Example, Intervention
from intfast.run import open_run
from intfast.sample import Start
from intfast.state import checkpoint
from intfast.study import analysis, summary
from intfast.study.read import TokenLogprobs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model folder and two problem files."""
    return write_inputs(tmp_path_factory.mktemp("learn"))


@pytest.fixture
def run_of(folder, tmp_path, monkeypatch):
    """Builds the parts of a run; a right answer is one whose first word is a letter a..h."""

    def grade(self, submissions):
        right = [text.split()[:1] and text.split()[0] in "abcdefgh" for _, text, *_ in submissions]
        reasons = [Reason.CORRECT if r else Reason.WRONG for r in right]
        return [Grade(status=reason.status, reason=reason) for reason in reasons]

    monkeypatch.setattr("intfast.grading.grader.Grader.grade_many", grade)

    def make(*overrides, run="run"):
        settings = [
            *words(folder, tmp_path / run, max_new_tokens=4),
            "rl.steps=6",
            "rl.problems_per_step=4",
            "rl.group_size=8",
            "rl.checkpoint_every=2",
            "evaluate.samples=4",
            *overrides,
        ]
        return open_run(cli.load(None, settings), Quiet())

    return make


def weights_of(run):
    return {name: p.detach().clone() for name, p in run.decoder.named_parameters()}


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rl_raises_the_reward(run_of):
    with run_of("rl.steps=12", "rl.optim.lr=0.03") as run:
        rl.rl(run, "base_rl", "base", run.problems)
        rows = run.metrics.rows("base_rl")
    rewards = [row["reward"] for row in rows]
    assert len(rows) == 12
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3


def test_rl_tells_the_engine_of_every_update(run_of):
    with run_of() as run:
        before = run.sampler.engine.policy_version
        rl.rl(run, "base_rl", "base", run.problems)
        updates = sum(row["updates"] for row in run.metrics.rows("base_rl"))
        assert run.sampler.engine.policy_version - before >= updates > 0


def test_advantages_come_from_the_op_once_a_step(run_of, monkeypatch):
    calls, op = [], credit.kernel.group_advantages
    monkeypatch.setattr(
        credit.kernel, "group_advantages", lambda *a, **k: calls.append(a) or op(*a, **k)
    )
    with run_of() as run:
        rl.rl(run, "base_rl", "base", run.problems)
    assert len(calls) == 6
    assert {tuple(offsets.tolist()) for _, offsets in calls} == {(0, 8, 16, 24, 32)}


@pytest.mark.parametrize("stop_before", [1, 3, 4])
def test_interrupted_rl_continues_to_the_same_weights(run_of, monkeypatch, stop_before):
    with run_of(run="whole") as run:
        rl.rl(run, "base_rl", "base", run.problems)
        expected, rows = weights_of(run), run.metrics.rows("base_rl")

    drawn = rl.draw
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == stop_before:
            raise KeyboardInterrupt
        return drawn(*arguments)

    with run_of() as run:
        monkeypatch.setattr(rl, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rl.rl(run, "base_rl", "base", run.problems)
    monkeypatch.setattr(rl, "draw", drawn)
    with run_of() as run:
        rl.rl(run, "base_rl", "base", run.problems)
        assert same(weights_of(run), expected)
        again = run.metrics.rows("base_rl")
    assert [r["reward"] for r in again] == [r["reward"] for r in rows]
    assert [r["step"] for r in again] == [1, 2, 3, 4, 5, 6]


def test_a_finished_stage_is_not_repeated(run_of):
    with run_of() as run:
        rl.rl(run, "base_rl", "base", run.problems)
        expected = weights_of(run)
    with run_of() as run:
        rl.rl(run, "base_rl", "base", run.problems)
        run.hold("base_rl")
        assert same(weights_of(run), expected)
        run.hold("base")
        assert not same(weights_of(run), expected)


def test_groups_without_variance_leave_the_weights_alone(run_of, monkeypatch):
    wrong = Grade(status=Reason.WRONG.status, reason=Reason.WRONG)
    monkeypatch.setattr(
        "intfast.grading.grader.Grader.grade_many", lambda self, s: [wrong] * len(list(s))
    )
    with run_of() as run:
        before = weights_of(run)
        rl.rl(run, "base_rl", "base", run.problems)
        assert same(weights_of(run), before)
        rows = run.metrics.rows("base_rl")
    assert {(r["zero_advantage"], r["all_wrong"], r["all_right"]) for r in rows} == {(1, 1, 0)}
    assert {row["updates"] for row in rows} == {0}


def test_dynamic_sampling_replaces_idle_groups_within_its_bound(run_of, monkeypatch):
    with run_of("rl.refill=3") as run:
        rights = iter([1] + [0] * 7 + [0] * 24 + ([1] + [0] * 7) * 3)
        reasons = {1: Reason.CORRECT, 0: Reason.WRONG}
        monkeypatch.setattr(
            run.sampler.grader,
            "grade_many",
            lambda s: [
                Grade(status=r.status, reason=r) for r in (reasons[next(rights)] for _ in list(s))
            ],
        )
        rollouts = rl.draw(run, "rl", [Start(p, ()) for p in run.problems], 0)
        found = credit.group_advantages(rl.rewards(rollouts.groups_P_G), run.config.rl.credit)
        row = rl.counts(run, rollouts, found)
    assert len(rollouts.starts_P) == len(rollouts.groups_P_G) == 4
    assert (rollouts.cursor, len(rollouts.drawn), row["groups"]) == (7, 7, 7)
    assert row["all_wrong"] == pytest.approx(3 / 7)
    ids = [problem.id for problem in run.problems]
    assert {start.problem.id for start in rollouts.starts_P} <= set(ids)


def answers(monkeypatch, grade):
    """Lets `grade(number)` say what becomes of the answers, in the order in which they come."""
    numbers = iter(range(10**6))

    def grade_many(self, submissions):
        reasons = [grade(next(numbers)) for _ in submissions]
        return [Grade(status=reason.status, reason=reason) for reason in reasons]

    monkeypatch.setattr("intfast.grading.grader.Grader.grade_many", grade_many)
    monkeypatch.setattr("intfast.grading.watch.GradeWatch.add", lambda self, grades: None)


FEW = {
    "masked": (("rl.credit.mask_truncated=true",), lambda n: (Reason.CORRECT, Reason.WRONG)[n % 2]),
    "unscored": ((), lambda n: (Reason.CORRECT, *[Reason.TIMEOUT] * 6, Reason.WRONG)[n % 8]),
    "not refilled": (("rl.refill=1",), lambda n: Reason.CORRECT if n % 64 == 0 else Reason.WRONG),
    "never refilled": (("rl.refill=1",), lambda n: Reason.WRONG),
}


@pytest.mark.parametrize("case", FEW)
def test_fewer_rollouts_than_minibatches_make_fewer_updates(run_of, monkeypatch, case):
    """32 rollouts are drawn for 32 minibatches, and not all of them take part in the loss."""
    options, grade = FEW[case]
    answers(monkeypatch, grade)
    taking_part, made = [], credit.examples
    monkeypatch.setattr(
        credit, "examples", lambda *a: taking_part.append(found := made(*a)) or found
    )
    with run_of("rl.minibatches=32", "rl.steps=2", *options) as run:
        rl.rl(run, "base_rl", "base", run.problems)
        rows, said = run.metrics.rows("base_rl"), "\n".join(run.metrics.console.lines)
    numbers = [len(found) for found in taking_part]
    assert [row["examples"] for row in rows] == numbers and max(numbers) < 32
    with_gradient = [sum(any(e.advantages) for e in found) for found in taking_part]
    assert [row["updates"] for row in rows] == with_gradient
    assert f"only {numbers[0]} rollouts to learn from, for 32 updates" in said


@pytest.mark.parametrize("minibatches", [1, 4])
def test_a_schedule_is_one_of_steps_with_or_without_an_update(run_of, monkeypatch, minibatches):
    schedule = ("rl.optim.schedule=linear", "rl.optim.floor=0.0", "rl.optim.lr=0.01")
    learning = {1, 4, 5, 9}  # steps of 32 answers
    right = (Reason.CORRECT, Reason.WRONG)
    answers(monkeypatch, lambda n: right[n % 2] if n // 32 + 1 in learning else Reason.WRONG)
    options = ("rl.steps=10", f"rl.minibatches={minibatches}", *schedule)
    with run_of(*options, run="whole") as run:
        rl.rl(run, "base_rl", "base", run.problems)
        rows, expected = run.metrics.rows("base_rl"), weights_of(run)
    rates = {row["step"]: row["lr"] for row in rows if row["updates"]}
    late = (minibatches - 1) / minibatches / 2  # the mean of a step's updates
    wanted = {step: 0.01 * (1 - (step - 1 + late) / 10) for step in learning}
    assert rates == pytest.approx(wanted)

    # Stopped between the steps and continued, it is the same, bit for bit.
    answers(monkeypatch, lambda n: right[n % 2] if n // 32 + 1 in learning else Reason.WRONG)
    drawn, calls = rl.draw, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return drawn(*arguments)

    monkeypatch.setattr(rl, "draw", interrupted)
    with run_of(*options) as run, pytest.raises(KeyboardInterrupt):
        rl.rl(run, "base_rl", "base", run.problems)
    with run_of(*options) as run:
        rl.rl(run, "base_rl", "base", run.problems)
        assert same(weights_of(run), expected)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_finished_run_is_lengthened(run_of, schedule):
    """With a constant rate it becomes the run that had the steps from the start."""
    options = (f"rl.optim.schedule={schedule}", "rl.optim.lr=0.01")
    with run_of("rl.steps=6", *options, run="whole") as run:
        rl.rl(run, "base_rl", "base", run.problems)
        expected, rows = weights_of(run), run.metrics.rows("base_rl")
    with run_of("rl.steps=3", *options) as run:
        rl.rl(run, "base_rl", "base", run.problems)
        short = collect.evaluation(run, "base_rl")
        pipeline.export(run, "base_rl")
    with run_of("rl.steps=6", "rl.checkpoint_every=5", *options) as run:
        rl.rl(run, "base_rl", "base", run.problems)
        long = collect.evaluation(run, "base_rl")
        pipeline.export(run, "base_rl")
        stored = run.folder.read_json("evaluations.json")
        said = "\n".join(run.metrics.console.lines)
        again = run.metrics.rows("base_rl")
        assert same(weights_of(run), expected) is (schedule == "constant")
        exported = load_file(run.folder.path / "export/model.safetensors")
        trained = run.decoder.head_weight_VD
        assert torch.equal(exported["model.embed_tokens.weight"], trained)
    assert [row["step"] for row in again] == [row["step"] for row in rows]
    assert stored["base_rl@3"]["problems"] == msgspec.to_builtins(short.problems)
    assert stored["base_rl"]["problems"] == msgspec.to_builtins(long.problems)
    assert "rl.steps = 6 (was 3)" in said
    # Three of six steps: half of the way from the peak to its tenth, where the old one had ended.
    sentence = "the learning rate goes on at 0.0055, not 0.001"
    assert (sentence in said) is (schedule == "linear")
    with pytest.raises(ValueError, match=r"rl\.steps: was 6, is 5"), run_of("rl.steps=5", *options):
        pass


@pytest.mark.parametrize("harm", ["delete", "cut", "flip", "unfinished", "notes", "earlier"])
def test_an_export_is_looked_at_before_it_is_called_one(run_of, harm):
    with run_of("rl.steps=1") as run:
        rl.rl(run, "base_rl", "base", run.problems)
        pipeline.export(run, "base_rl")
        file = run.folder.path / "export/model.safetensors"
        before, said = file.read_bytes(), run.metrics.console.lines
        pipeline.export(run, "base_rl")
        assert "exported again" not in " ".join(said) and file.read_bytes() == before
        if harm == "unfinished":
            (run.folder.path / "export.json").unlink()
        elif harm == "earlier":
            stored = run.folder.read_json("export.json")
            run.folder.write_json("export.json", stored | {"weights": "sft"})
        elif harm == "delete":
            file.unlink()
        elif harm == "notes":
            file.unlink()
            (file.parent / "mine").mkdir()
            (file.parent / "mine" / "notes.md").write_text("of the user")
        else:
            file.write_bytes(before[:-9] if harm == "cut" else before[:-1] + b"\xff")
        there = {p.relative_to(file.parent) for p in file.parent.rglob("*")}
        pipeline.export(run, "base_rl")
        why = {"unfinished": "not finished", "earlier": "it holds earlier weights"}.get(
            harm, "model.safetensors missing or changed"
        )
        assert f"{why}; exported again" in " ".join(said) and file.read_bytes() == before
        # What may be of somebody else is moved, never deleted.
        aside = run.folder.path / "export.1"
        is_kept = harm not in ("delete", "earlier")
        assert aside.exists() == (f"is now {aside}" in " ".join(said)) == is_kept
        if is_kept:
            assert {p.relative_to(aside) for p in aside.rglob("*")} == there


def test_every_epoch_of_the_stream_is_a_permutation(run_of):
    with run_of() as run:
        tasks = [Start(problem, ()) for problem in run.problems]
        epochs = [
            [rl._start(run, tasks, 6 * epoch + n).problem.id for n in range(6)]
            for epoch in range(4)
        ]
    assert all(sorted(epoch) == sorted(p.id for p in run.problems) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize(
    "options",
    [
        ("rl.minibatches=4",),
        ("rl.policy.kl=0.1",),
        ("rl.policy.objective=gspo", "rl.minibatches=2"),
        ("rl.policy.objective=cispo", "rl.policy.correction=truncate", "rl.minibatches=2"),
        ("rl.policy.correction=mask", "rl.policy.correction_level=sequence"),
        ("rl.credit.baseline=leave-one-out", "rl.credit.scale=group"),
        ("rl.credit.normalisation=constant", "rl.policy.entropy=0.01"),
        ("model.dtype=bfloat16",),
        ("model.activation_checkpointing=true",),
    ],
    ids=" ".join,
)
def test_the_options_of_rl_run_and_learn(run_of, tmp_path, options):
    with run_of("rl.steps=4", *options) as run:
        before = weights_of(run)
        rl.rl(run, "base_rl", "base", run.problems)
        assert not same(weights_of(run), before)
        rows = [row for row in run.metrics.rows("base_rl") if row["updates"]]
        rounding = bounds.PEER * rounding_of(run, tmp_path / "trained").max()
    expected = int(dict(o.split("=") for o in options).get("rl.minibatches", 1))
    assert {row["updates"] for row in rows} == {expected}
    assert all(row["skipped"] == 0 and row["grad_norm"] > 0 for row in rows)
    if "model.dtype=bfloat16" not in options:
        # On-policy and in fp32, the engine and the trainer give the same log-probs.
        assert max(row["sampler_diff_max"] for row in rows) < rounding


def test_micro_batches_do_not_change_the_update(run_of, monkeypatch):
    # A large eps makes Adam's first step proportional to the gradient instead of to its sign.
    monkeypatch.setattr(optim, "EPS", 10.0)
    # A large rate: the update is far above the last place of the weights. Clipping would hide that
    # all of a gradient is too large.
    options = ("rl.steps=1", "rl.optim.lr=1.0", "rl.optim.max_grad_norm=0")
    after = []
    for where, tokens in (("one", 100_000), ("many", 70)):
        with run_of(f"batch.max_tokens={tokens}", *options, run=where) as run:
            before = weights_of(run)
            rl.rl(run, "base_rl", "base", run.problems)
            after.append(weights_of(run))
            (row,) = run.metrics.rows("base_rl")
    bounds.assert_same_update(*after, before, int(row["num_tokens"]))


def sft_examples(run):
    texts = [f"<solve> {p.problem} d a # b ;" for p in run.problems]
    found = []
    for text in texts:
        ids = run.sampler.tokenizer.encode(text)
        found.append(Example(token_ids=ids, weights=[0.0] * (len(ids) - 5) + [1.0] * 5))
    return found


SFT = ("sft.epochs=5", "sft.batch_size=4", "sft.optim.lr=0.01", "rl.steps=0")


def test_sft_lowers_the_loss_and_continues_to_the_same_weights(run_of, monkeypatch):
    with run_of(*SFT, run="whole") as run:
        sft.sft(run, "int", sft_examples(run))
        expected, rows = weights_of(run), run.metrics.rows("int")
    assert len(rows) == 10
    assert rows[-1]["nll_mean"] < 0.6 * rows[0]["nll_mean"]

    update, calls = sft.update, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return update(*arguments)

    with run_of(*SFT) as run:
        monkeypatch.setattr(sft, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sft.sft(run, "int", sft_examples(run))
    monkeypatch.setattr(sft, "update", update)
    with run_of(*SFT) as run:
        sft.sft(run, "int", sft_examples(run))
        assert same(weights_of(run), expected)
        assert [row["step"] for row in run.metrics.rows("int")] == list(range(1, 11))


@pytest.mark.parametrize("data", ["intervention", "reference"])
def test_token_logprobs_are_those_of_the_whole_logits_and_change_nothing(run_of, tmp_path, data):
    with run_of(*SFT, "metrics.example_logprobs=3", f"sft.data={data}") as run:
        made = sft_examples(run)
        sft.sft(run, "int", made)
        trained = weights_of(run)
        analysis.write_tokens(run, "int", made)
        assert run.holds == "int" and same(weights_of(run), trained)
        rows = run.folder.journal("example_logprobs", TokenLogprobs)
        assert [row.example for row in rows] == analysis.spread(len(made), 3)
        for held in ("base", "trained"):
            run.hold("base" if held == "base" else "int")
            rounding = bounds.PEER * rounding_of(run, tmp_path / held).max()
            for row in rows:
                example = made[row.example]
                ids = torch.tensor(example.token_ids)
                attend = PackedAttention((len(ids),), ids.device)
                with torch.no_grad():
                    hidden = run.decoder(ids, torch.arange(len(ids)), attend)
                logprob = (hidden @ run.decoder.head_weight_VD.T).log_softmax(-1)
                expected = [
                    logprob[t - 1, ids[t]].item() if t and example.weights[t] else None
                    for t in range(len(ids))
                ]
                assert getattr(row, held) == pytest.approx(expected, abs=rounding.item())

        def refuse(*_):
            raise AssertionError("scored again")

        run.hold = refuse
        analysis.write_tokens(run, "int", made)


def test_sft_and_rl_refuse_to_train_on_nothing(run_of):
    with run_of(*SFT) as run:
        with pytest.raises(ValueError, match=r"fine-tune on \(none was drawn\)"):
            sft.sft(run, "int", [])
        with pytest.raises(ValueError, match="leaves no problem"):
            rl.rl(run, "int_rl", "base", [])


@pytest.mark.parametrize("gates", [["unparsed", "unparsed", "leak"], ["unsolved", "leak"]])
def test_nothing_to_train_on_says_at_which_gates_it_was_lost(run_of, gates):
    """The target without a filter is no help where no reply could be read."""
    with run_of(*SFT) as run:
        run.folder.journal("interventions", Intervention).append(
            Intervention(
                id=str(i), problem_id="p", attempt=0, sample=i, guided="", reply="", gate=gate
            )
            for i, gate in enumerate(gates)
        )
        with pytest.raises(sft.NoExamples) as caught:
            sft.sft(run, "int", [])
    assert f"{gates.count(gates[0])} {gates[0]}, 1 leak" in str(caught.value)
    assert ("no_filter" in str(caught.value)) is ("unsolved" in gates)


@pytest.mark.parametrize("cut", [2, 1])
def test_replies_that_hit_the_length_limit_are_no_weak_model(run_of, cut):
    with run_of(*SFT) as run:
        run.folder.journal("interventions", Intervention).append(
            Intervention(
                id=str(i), problem_id="p", attempt=0, sample=i, guided="", reply="",
                gate="unparsed", finish_reason="length" if i < cut else "stop",
            )
            for i in range(3)
        )  # fmt: skip
        with pytest.raises(sft.NoExamples) as caught:
            sft.sft(run, "int", [])
    assert f"3 unparsed ({cut} cut at the length limit)" in str(caught.value)
    advice = "2 of 3 interventions were cut at the length limit: raise intervene.sampling"
    assert (advice in str(caught.value)) is (cut == 2)
    assert ("stronger base model" in str(caught.value)) is (cut == 1)


def test_evaluation_counts_and_is_not_repeated(run_of):
    with run_of() as run:
        found = collect.evaluation(run, "base")
        assert [p.problem_id for p in found.problems] == [p.id for p in run.tests]
        assert {p.samples for p in found.problems} == {4}
        run.sampler.engine = None
        assert collect.evaluation(run, "base") == found
        stored = run.folder.read_json("evaluations.json")
    assert msgspec.convert(stored["base"], type(found)) == found


@pytest.mark.parametrize("scored", [0, 1])
def test_an_evaluation_that_could_hardly_be_graded_ends_no_run(run_of, monkeypatch, scored):
    """evaluate.ks are checked against the samples that are drawn; fewer of them may be scored."""
    answers(monkeypatch, lambda n: Reason.WRONG if n % 4 < scored else Reason.TIMEOUT)
    with run_of("evaluate.ks=[1, 4]") as run:
        collect.evaluation(run, "base")
        said = run.metrics.console.lines
        found = summary.write(run, collect.Found(selected=run.problems), 1.0)
    assert ("no answer could be graded" in " ".join(said)) is (scored == 0)
    assert ([*found["evaluations"]["base"].pass_at_k] if scored else found["evaluations"]) == (
        [1] if scored else {}
    )


def test_a_kill_before_the_last_tidying_up_leaves_no_old_checkpoint(run_of, monkeypatch):
    with run_of() as run:
        monkeypatch.setattr(checkpoint, "prune", lambda stage, step: None)
        rl.rl(run, "base_rl", "base", run.problems)
        monkeypatch.undo()
        rl.rl(run, "base_rl", "base", run.problems)
        names = sorted(p.name for p in run.stage_folder("base_rl").iterdir())
    assert names == ["step-000004", "step-000006"]


def test_checkpoints_hold_what_resume_needs(run_of):
    with run_of() as run:
        rl.rl(run, "base_rl", "base", run.problems)
        folder = run.stage_folder("base_rl")
        assert sorted(p.name for p in folder.iterdir()) == ["step-000004", "step-000006"]
        step, tensors, state = checkpoint.latest(folder, print)
    assert (step, state["finished"]) == (6, True)
    assert {name.split(".")[0] for name in tensors} == {"model", "optim"}
