"""The command end to end, on the shipped base model: run, continue, dry run, and bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import TOKENIZER, Quiet
from tiny import hf_model
from transformers import AutoModelForCausalLM

from intfast import cli, intervene
from intfast.records import Attempt, Continuation, Example, Intervention
from intfast.sample import _Drawn
from intfast.study.finish import train
from intfast.study.read import TokenLogprobs
from intfast.train import main

ROOT = Path(__file__).parents[1]
SHORT = ROOT / "configs" / "quickstart_short.toml"
SMALLER = [
    f"model.path={ROOT / 'configs/quickstart/base'}",
    f"data.train={ROOT / 'configs/quickstart/train.jsonl'}",
    f"data.test={ROOT / 'configs/quickstart/test.jsonl'}",
    "data.train_limit=8",
    "data.test_limit=4",
    "attempts.max_problems=6",
    "intervene.continuations=4",
    "rl.steps=2",
    "rl.checkpoint_every=1",
    "sft.epochs=1",
    "model.threads=1",
]


def config_of(folder: Path, *overrides: str):
    return cli.load(SHORT, [*SMALLER, f"run={folder}", *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run: its folder and its summary."""
    folder = tmp_path_factory.mktemp("train") / "run"
    return folder, train(config_of(folder), Quiet())


def rows(folder: Path, name: str, kind: type) -> list:
    lines = (folder / f"{name}.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line, type=kind) for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    """What a run concluded, without times."""
    names = ["attempts", "interventions", "continuations", "examples", "problems"]
    names += ["example_logprobs"]
    found = {name: (folder / f"{name}.jsonl").read_bytes() for name in names}
    found["evaluations"] = (folder / "evaluations.json").read_bytes()
    found["weights"] = (folder / "export" / "model.safetensors").read_bytes()
    return found


def test_a_run_leaves_everything_in_its_folder(finished):
    folder, summary = finished
    attempts = rows(folder, "attempts", Attempt)
    candidates = rows(folder, "interventions", Intervention)
    continuations = rows(folder, "continuations", Continuation)
    examples = rows(folder, "examples", Example)
    assert len(attempts) == 8 * 8
    assert len({record.problem_id for record in candidates}) == len(candidates) <= 6
    reached = [r for r in candidates if r.gate in intervene.REACHED_CONTINUATION]
    assert len(continuations) == len(reached) * 4 * 3
    assert len(examples) == len(reached) > 0
    assert set(summary["evaluations"]) == {"base", "base_rl", "int", "int_rl"}
    stored = json.loads((folder / "summary.json").read_text())
    assert stored["intervention"]["gates"] == summary["intervention"]["gates"]
    for name in ("config.toml", "manifest.json", "metrics.jsonl", "report.html"):
        assert (folder / name).is_file()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["loss_head"]["sft"].startswith("plain, at most ")
    assert manifest["loss_head"] == manifest["starts"][0]["loss_head"]
    assert manifest["stop_ids"] == [TOKENIZER.eos_token_id]
    assert manifest["prompt_time"] == (folder / "prompt_time.txt").read_text()
    assert manifest["kernels"] == manifest["starts"][0]["kernels"] == "torch"
    assert manifest["kernels_reason"] == "the model is on the CPU"


def test_the_rows_say_how_the_answers_were_graded(finished):
    folder, _ = finished
    metrics = rows(folder, "metrics", dict)
    (drawn,) = [row for row in metrics if row["stage"] == "collect"]
    shares = {key: value for key, value in drawn.items() if key.startswith("grade_")}
    graded = rows(folder, "attempts", Attempt) + rows(folder, "continuations", Continuation)
    assert drawn["graded"] == len(graded) > 8 * 8 and sum(shares.values()) == pytest.approx(1)
    wrong = sum(record.reason == "wrong" for record in graded)
    assert shares["grade_wrong"] * len(graded) == pytest.approx(wrong)
    assert all("graded" in row for row in metrics if "reward" in row)


def test_a_prompt_without_room_is_dropped_aloud_and_never_cut(tmp_path, capsys):
    longest = "d a + b ; " * 300
    text = (ROOT / "configs/quickstart/train.jsonl").read_text().splitlines()[0]
    row = {"problem": f"a 7 ; {longest}? d c e :", "answer": "d 1", "reference_solution": "d 1"}
    path = tmp_path / "p.jsonl"
    path.write_text(f"{text}\n{json.dumps(row)}\n")
    words = [*arguments(tmp_path / "run"), f"data.train={path}", "--dry-run"]
    assert main(words) == 0
    assert "dropped 1 of 2 problems whose prompts" in capsys.readouterr().out
    path.write_text(json.dumps(row) + "\n")
    assert main(words) == 2
    assert "lower max_new_tokens" in capsys.readouterr().err


def test_the_seconds_of_the_rows_say_where_the_time_went(finished):
    _, summary = finished
    split = summary["seconds"]
    assert {"collect", "int", "int_rl", "base_rl", "evaluate"} <= set(split)
    assert {"generate", "grade", "prepare"} <= set(split["int_rl"])
    assert {"train", "save"} <= set(split["int"]) | set(split["int_rl"])
    counted = sum(sum(phases.values()) for phases in split.values())
    assert 0.5 * summary["seconds_last_process"] < counted < summary["seconds_last_process"]


def test_the_scored_tokens_are_those_that_sft_began_with(finished):
    folder, _ = finished
    scored = rows(folder, "example_logprobs", TokenLogprobs)
    values = [v for row in scored for v in row.base if v is not None]
    first = next(r for r in rows(folder, "metrics", dict) if r["stage"] == "int")
    assert first["num_tokens"] == len(values)
    assert -sum(values) / len(values) == pytest.approx(first["nll_mean"], abs=1e-5)


def test_the_model_located_a_step_of_its_own_attempt(finished):
    folder, _ = finished
    attempts = {(r.problem_id, r.sample): r for r in rows(folder, "attempts", Attempt)}
    for record in rows(folder, "interventions", Intervention):
        attempt = attempts[record.problem_id, record.attempt]
        assert attempt.grade == "wrong"
        assert record.prefix_ids == attempt.token_ids[: len(record.prefix_ids)]


def test_the_export_is_what_was_trained_and_loads_in_transformers(finished):
    folder, _ = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    (last,) = sorted((folder / "checkpoints" / "int_rl").glob("step-*"))[-1:]
    trained = load_file(last / "tensors.safetensors")
    ours = trained["model.model.embed_tokens.weight"]
    assert torch.equal(model.model.embed_tokens.weight, ours)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "configs/quickstart/base")
    assert not torch.equal(base.model.embed_tokens.weight, ours)


def test_a_finished_run_is_not_repeated(finished, monkeypatch):
    folder, summary = finished
    before = contents(folder)
    monkeypatch.setattr(_Drawn, "end", lambda *_: pytest.fail("generated again"))
    stages = [row["stage"] for row in rows(folder, "metrics", dict)]
    again = train(config_of(folder), Quiet())
    assert contents(folder) == before
    assert stages.count("analysis") == 1
    # Weights are loaded for the analysis, and nothing else is done.
    assert [row["stage"] for row in rows(folder, "metrics", dict)] == stages
    assert again["evaluations"] == summary["evaluations"]


# Samples: attempts, verifications, continuations, an evaluation, and rollouts of both RL arms.
@pytest.mark.parametrize("call", [2, 40, 70, 90, 130, 180])
def test_an_interrupted_run_continues_to_the_same_result(finished, tmp_path, monkeypatch, call):
    end, calls = _Drawn.end, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return end(*arguments)

    monkeypatch.setattr(_Drawn, "end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config_of(tmp_path / "run"), Quiet())
    monkeypatch.setattr(_Drawn, "end", end)
    train(config_of(tmp_path / "run"), Quiet())
    expected = contents(finished[0])
    found = contents(tmp_path / "run")
    assert [name for name in expected if found[name] != expected[name]] == []

    def stages(folder):
        # Every set of weights that is loaded is checked for parity, so a continued run has more;
        # the seconds of a collection are in a row of each process that ended one.
        metrics = [r for r in rows(folder, "metrics", dict) if r["stage"] != "collect"]
        return [(r["stage"], r["step"]) for r in metrics if "of" not in r]

    assert stages(tmp_path / "run") == stages(finished[0])


def test_continuations_are_counted_once_when_a_run_continues(tmp_path, monkeypatch):
    words = [
        "intervene.wave=1",
        "intervene.continuations=3",
        "intervene.stop=never",
        "rl.from_base=false",
    ]
    config = config_of(tmp_path / "run", *words)
    end, calls = _Drawn.end, []

    def interrupted(drawn, *rest):
        # Continuations stand behind something of an answer.
        calls.append(any(start.answer_ids for start in drawn.starts_P))
        if calls.count(True) == 6:
            raise KeyboardInterrupt
        return end(drawn, *rest)

    monkeypatch.setattr(_Drawn, "end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, Quiet())
    monkeypatch.setattr(_Drawn, "end", end)
    train(config, Quiet())
    (row,) = [row for row in rows(tmp_path / "run", "metrics", dict) if row["stage"] == "continue"]
    drawn = rows(tmp_path / "run", "continuations", Continuation)
    for start in ("intervention", "error", "prefix"):
        assert row[f"drawn_{start}"] == sum(record.start == start for record in drawn) > 0


def test_inputs_may_move_where_their_digests_agree(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    moved = [f"model.path={tmp_path / 'model'}", f"data.train={tmp_path / 'elsewhere.jsonl'}"]
    shutil.copytree(ROOT / "configs/quickstart/base", tmp_path / "model")
    shutil.copy(ROOT / "configs/quickstart/train.jsonl", tmp_path / "elsewhere.jsonl")
    config = config_of(folder, *moved)
    train(config, Quiet())
    assert {k: v for k, v in contents(folder).items() if k != "problems"} == {
        k: v for k, v in contents(finished[0]).items() if k != "problems"
    }
    stored = cli.load(folder / "config.toml")
    assert (stored.model.path, stored.data.train) == (config.model.path, config.data.train)
    starts = json.loads((folder / "manifest.json").read_text())["starts"]
    places = [tmp_path / "elsewhere.jsonl", tmp_path / "model"]
    assert [starts[-1]["paths"][name] for name in ("train", "model")] == list(map(str, places))
    assert starts[0]["paths"]["train"] == str(ROOT / "configs/quickstart/train.jsonl")

    # Other content is refused by name, wherever it lies, and the run stays what it was.
    lines = (tmp_path / "elsewhere.jsonl").read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join([*lines[1:9], lines[0]]) + "\n")
    other = arguments(folder, *moved, f"data.train={tmp_path / 'other.jsonl'}")
    assert main(other) == 2
    assert "differing:\n  train hash: was" in capsys.readouterr().err
    weights = load_file(tmp_path / "model/model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, tmp_path / "model/model.safetensors")
    assert main(arguments(folder, *moved)) == 2
    assert "model_files model.safetensors: was" in capsys.readouterr().err
    assert cli.load(folder / "config.toml") == stored


def test_a_run_that_fails_leaves_its_page(tmp_path, capsys):
    words = arguments(tmp_path / "run", "intervene.sampling.max_new_tokens=8")
    assert main(words) == 2
    said = capsys.readouterr()
    assert "6 unparsed (6 cut at the length limit)" in said.out
    assert "raise intervene.sampling.max_new_tokens = 8" in said.err
    assert f"what it did is in {tmp_path / 'run/report.html'}" in said.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "reply cut" in page and "this run has not finished" in page
    records = rows(tmp_path / "run", "interventions", Intervention)
    assert {record.finish_reason for record in records} == {"length"}


# --- the command line --------------------------------------------------------------------------


def arguments(folder: Path, *overrides: str) -> list[str]:
    return [str(SHORT), *SMALLER, f"run={folder}", *overrides]


def test_dry_run_shows_the_plan_and_writes_nothing(tmp_path, capsys):
    assert main([*arguments(tmp_path / "run"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "8 problems x 8 attempts = 64" in shown
    assert "RL: 4 problems x 8 rollouts = 32 rollouts -> 1 updates of 32" in shown
    assert "<solve> " in shown
    assert "reference <- reference_solution" in shown
    assert "AdamW moments" in shown
    assert not (tmp_path / "run").exists()


def test_the_papers_recipe_passes_a_dry_run_on_a_stand_in(tmp_path, capsys, bpe):
    hf_model("qwen3", vocab_size=512, max_position_embeddings=40960).save_pretrained(tmp_path / "m")
    bpe.save_pretrained(tmp_path / "m")
    rows = '{"problem": "1 + 1?", "answer": "2", "solution": "It is \\\\boxed{2}."}\n'
    (tmp_path / "p.jsonl").write_text(rows)
    recipe = str(ROOT / "configs" / "int_qwen3_4b.toml")
    words = [f"model.path={tmp_path / 'm'}", f"data.train={tmp_path / 'p.jsonl'}", "--dry-run"]
    assert main([recipe, *words]) == 0
    shown = capsys.readouterr().out
    assert "<|user|>1 + 1?<|end|><|assistant|>" in shown
    assert "RL: 32 problems x 8 rollouts = 256 rollouts -> 2 updates of 128, 400 steps" in shown


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path=no/such/model", "no/such/model"),
        ("data.train=no/such.jsonl", "no/such.jsonl"),
        ("data.test=no/such.jsonl", "no/such.jsonl"),
        ("rl.stesp=3", "did you mean rl.steps?"),
        ("model.device=cuda", "CUDA"),
        ("data.columns={problem='nope'}", "nope"),
        ("prompt.style=chat", "chat template"),
    ],
)
@pytest.mark.parametrize("mode", ["run", "dry"])
def test_bad_input_stops_before_any_work(tmp_path, capsys, override, message, mode):
    if override == "model.device=cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    words = [*arguments(tmp_path / "run"), override] + (["--dry-run"] if mode == "dry" else [])
    assert main(words) in (1, 2)
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert not list((tmp_path / "run").glob("*.jsonl"))


def test_problems_without_references_cannot_be_intervened_on(tmp_path, capsys):
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"problem": "a 1 ; ? a :", "answer": "a 1"}\n')
    assert main([*arguments(tmp_path / "run"), f"data.train={bare}"]) == 2
    assert "reference" in capsys.readouterr().err


def test_test_problems_among_the_training_problems_are_refused(tmp_path, capsys):
    train = f"data.test={ROOT / 'configs/quickstart/train.jsonl'}"
    assert main([*arguments(tmp_path / "run"), train]) == 2
    assert "also training problems" in capsys.readouterr().err


def test_the_module_runs_as_a_command():
    shown = subprocess.run(
        [sys.executable, "-m", "intfast.train", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "rl.group_size = 8" in shown.stdout
    assert (
        subprocess.run(
            [sys.executable, "-m", "intfast.train"], cwd=ROOT, capture_output=True, check=False
        ).returncode
        == 2
    )
