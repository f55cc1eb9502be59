"""analysis.json and the ablations: measured against plain computations, on a small real run."""

import json
import math
import re
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from small_run import Quiet

from intfast import cli
from intfast.collect import Found
from intfast.config import AnalysisConfig
from intfast.methods import sft_data
from intfast.model.decoder import PackedAttention
from intfast.records import Attempt, Continuation, Example, Intervention, Problem
from intfast.run import open_run
from intfast.study import ablate, analysis, summary
from intfast.study.finish import train

ROOT = Path(__file__).parents[1]
SMALL = [
    f"model.path={ROOT / 'configs/quickstart/base'}",
    f"data.train={ROOT / 'configs/quickstart/train.jsonl'}",
    f"data.test={ROOT / 'configs/quickstart/test.jsonl'}",
    "data.train_limit=6",
    "data.test_limit=3",
    "attempts.max_problems=4",
    "intervene.continuations=4",
    "intervene.wave=4",
    "intervene.baselines=false",
    "rl.steps=1",
    "rl.from_base=false",
    "sft.epochs=1",
    "model.threads=1",
    "evaluate.samples=6",
    "evaluate.ks=[1]",
    "analysis.texts=3",
]


def config_of(folder, *overrides):
    short = ROOT / "configs/quickstart_short.toml"
    return cli.load(short, [*SMALL, f"run={folder}", *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run: its folder and its summary."""
    folder = tmp_path_factory.mktemp("analysis") / "run"
    return folder, train(config_of(folder), Quiet())


def read(folder, name):
    return json.loads((folder / name).read_text())


# --- the tables of a run -----------------------------------------------------------------------


def test_a_run_writes_its_tables(finished):
    folder, _ = finished
    found = read(folder, "analysis.json")
    wrong = found["texts"]["attempt, wrong"]
    assert wrong["texts"] == 3 and set(wrong["of"]) == {"base", "int"}
    assert 0 < wrong["of"]["base"]["nll"]["value"] < 3
    assert found["texts"]["reference"]["of"]["base"]["nll"]["value"] > 0
    assert list(found["pass_at_k"]["base"]) == ["1", "2", "4", "6"]
    assert set(found["pass_at_k"]) == {"base", "int", "int_rl"}
    (curve,) = found["rl_curves"].values()
    assert curve["step"] == [1] and len(curve["reward"]) == 1
    assert curve["entropy_sampled"][0] > 0


def test_the_conditioning_table_starts_with_the_problem_alone(finished):
    _, summary = finished
    alone = summary["intervention"]["problem_alone"]
    assert alone["zero_by_selection"] and alone["accuracy"].value == 0
    assert (alone["attempts"], alone["per_problem"]) == (4 * 8, 8)


def test_after_sft_the_trained_texts_are_likelier(tmp_path):
    config = config_of(tmp_path / "run", "sft.epochs=8", "rl.steps=0", "analysis.texts=8")
    train(config, Quiet())
    texts = read(tmp_path / "run", "analysis.json")["texts"]
    trained = texts["SFT example"]["of"]
    assert trained["int"]["nll"]["value"] < 0.8 * trained["base"]["nll"]["value"]
    assert trained["int"]["likelihood"] == pytest.approx(math.exp(-trained["int"]["nll"]["value"]))


# --- the measure -------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    with open_run(config_of(tmp_path / "run", "batch.max_tokens=200"), Quiet()) as run:
        yield run


def test_the_measure_is_that_of_dense_logits(run):
    ids = run.sampler.prompt(run.problems[0])
    longer = [*ids, *ids[::-1], *ids]
    weights = [0.0] * 5 + [1.0] * (len(ids) - 5)
    examples = [
        Example(token_ids=ids, weights=weights),
        Example(token_ids=longer, weights=[0.0] * 2 + [1.0] * (len(longer) - 2)),
    ]
    for example, found in zip(examples, analysis.measure(run, examples), strict=True):
        tokens = torch.tensor(example.token_ids)
        with torch.no_grad():
            attend = PackedAttention([len(tokens)], run.device)
            hidden = run.decoder(tokens, torch.arange(len(tokens)), attend)
            logprobs = (hidden @ run.decoder.head_weight_VD.T).double().log_softmax(-1)
        rows = [t for t, weight in enumerate(example.weights) if weight]
        nll = -sum(logprobs[t - 1, example.token_ids[t]].item() for t in rows)
        entropy = -sum((logprobs[t - 1].exp() * logprobs[t - 1]).sum().item() for t in rows)
        assert found.num_tokens == len(rows)
        assert found.nll == pytest.approx(nll / len(rows), abs=1e-4)
        assert found.entropy == pytest.approx(entropy / len(rows), abs=1e-4)


def attempt(problem, grade, ids):
    return Attempt(
        problem_id=problem, sample=0, prompt_ids=[], token_ids=ids, text="", finish_reason="stop",
        grade=grade, reason="", policy_version=0,
    )  # fmt: skip


def intervention(number, problem, gate):
    return Intervention(
        id=f"i{number}", problem_id=problem, attempt=0, sample=0, guided="", reply="", gate=gate,
        prefix_ids=[7, 8], intervention_ids=[9],
    )  # fmt: skip


def test_sources_measure_the_right_tokens(run):
    held = next(f"p{n}" for n in range(99) if sft_data.is_held_out(f"p{n}", 0.2))
    kept = next(f"p{n}" for n in range(99) if not sft_data.is_held_out(f"p{n}", 0.2))
    body = run.problems[0].problem
    selected = [Problem(id=i, problem=body, answer="1") for i in (held, kept)]
    looked_at = AnalysisConfig(texts=9, held_out=0.2)
    run.config = msgspec.structs.replace(run.config, analysis=looked_at)
    interventions = [
        intervention(0, kept, "kept"),
        intervention(1, held, "kept"),
        intervention(2, kept, "unsolved"),
        intervention(3, kept, "leak"),
    ]
    right = Continuation(
        intervention_id="i0", problem_id=kept, start="intervention", sample=0, token_ids=[11, 12],
        text="", finish_reason="stop", grade="correct", reason="",
    )  # fmt: skip
    found = Found(
        selected=selected,
        attempts=[attempt(kept, "wrong", [5]), attempt("other", "correct", [6])],
        interventions=interventions,
        continuations=[right],
    )
    made = analysis.sources(run, found)
    prompt = run.sampler.prompt(selected[1])

    def spans(kind):
        (example,) = made[kind]
        ids = example.token_ids
        marked = [t for t, w in zip(ids, example.weights, strict=True) if w]
        return ids[len(prompt) :], marked, example.problem_id

    assert spans("attempt, wrong") == ([5], [5], kept)
    assert spans("intervention, kept") == ([7, 8, 9], [9], kept)
    assert spans("intervention, held out") == ([7, 8, 9], [9], held)
    assert spans("intervention, unsolved") == ([7, 8, 9], [9], kept)
    assert spans("continuation, right") == ([7, 8, 9, 11, 12], [11, 12], kept)
    assert len(made["prefix + intervention"]) == 2
    assert set(made) == {
        "attempt, wrong", "intervention, kept", "intervention, held out", "intervention, unsolved",
        "continuation, right", "prefix + intervention",
    }  # fmt: skip


def test_held_out_interventions_stay_out_of_sft(run):
    judged = [intervention(n, f"p{n}", "kept") for n in range(40)]
    problem = run.problems[0]
    problems = {r.problem_id: msgspec.structs.replace(problem, id=r.problem_id) for r in judged}
    made = list(sft_data.build_examples(run.sampler, problems, judged, [], "recipe", 0.25))
    out = {r.problem_id for r in judged} - {example.problem_id for example in made}
    assert 4 <= len(out) <= 16
    assert all(sft_data.is_held_out(problem_id, 0.25) for problem_id in out)


def test_where_a_rule_stops_early_accuracy_is_that_of_the_first_wave():
    records = [summary.Drawn("i0", n, "correct" if n == 5 else "wrong") for n in range(6)]
    continued = {"i0": "p"}
    assert summary.start_figures(continued, records, 0)["accuracy"].value == pytest.approx(1 / 6)
    first = summary.start_figures(continued, records, 0, 4)
    assert (first["accuracy"].value, first["problem_coverage"].value) == (0, 1)


# --- ablations ---------------------------------------------------------------------------------


def test_ablations_share_the_collection_and_differ_in_what_is_trained(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    config = (folder / "config.toml").read_text().replace(str(finished[0]), str(folder))
    (folder / "config.toml").write_text(config)
    rows = [json.loads(line) for line in (folder / "continuations.jsonl").read_text().splitlines()]
    rows[0]["grade"] = rows[-1]["grade"] = "correct"
    (folder / "continuations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = ablate.ablate(folder, [], Quiet())
    examples = {name: row["examples"] for name, row in found.items()}
    tokens = {name: row["loss_tokens"] for name, row in found.items()}
    assert examples["prefix + intervention"] == 2 < examples["no filter"]
    assert tokens["intervention only"] < tokens["prefix + intervention"]
    assert tokens["with a right suffix"] > tokens["prefix + intervention"]
    assert all(row["evaluation"].num_samples == 3 * 6 for row in found.values())
    assert set(read(folder, "ablations.json")) == set(ablate.ABLATIONS)
    assert "<td>no filter</td>" in re.sub(r' class="\w*"', "", (folder / "report.html").read_text())
    attempts = (folder / "attempts.jsonl").read_bytes()
    assert (folder / "ablations/no-filter/attempts.jsonl").read_bytes() == attempts
    assert ablate.main([str(folder), "sft.batch_size=3"]) == 2
    said = capsys.readouterr().err
    assert "sft.batch_size: was" in said and f"delete {folder / 'ablations'}" in said
    assert "run=FOLDER" not in said


@pytest.mark.parametrize(
    "word",
    [
        "attempts.max_problems=4",
        "sft.target=no_filter",
        "--sft.target=recipe",
        "run=x",
        "rl.steps=3",
        "seeed=1",
        "sft={epochs=1}",
        "data.train=x.jsonl",
        "sft.data=reference",
        "grade.mode=x",
    ],
)
def test_ablate_refuses_what_belongs_to_the_collection_or_is_varied(finished, capsys, word):
    assert ablate.main([str(finished[0]), "evaluate.samples=2", word]) == 2
    said = capsys.readouterr().err
    key = word.removeprefix("--").split("=")[0]
    assert said.startswith(f"error: {key}: ") and "expected settings of seed, " in said
    assert not (finished[0] / "ablations").exists()


def test_ablate_refuses_what_is_no_run(tmp_path, capsys):
    assert ablate.main([str(tmp_path)]) == 2
    assert "expected a run folder" in capsys.readouterr().err
    assert ablate.main([]) == 2
    assert ablate.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m intfast.study ablate RUN")
