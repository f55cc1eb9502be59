"""The page of a run: its numbers, what it leaves out, what it says is missing, hostile texts."""

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from report_run import FEW, RIGHT, Seen, make_run

from intfast.evaluate import Evaluation, ProblemCounts, compare
from intfast.records import Example, TokenLogprobs
from intfast.study import browser, page_data, report


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "run", *FEW)


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def seen(*folders):
    return Seen(report.page(folders))


# --- what the page says ------------------------------------------------------------------------


def test_the_figures_are_those_of_the_evaluations(folder):
    (run,) = seen(folder).block("runs")["runs"]
    stored = page_data.read_json(folder, "evaluations.json")
    assert [e["name"] for e in run["evaluations"]] == ["base", "int", "int_rl", "int_rl@1"]
    for row in run["evaluations"]:
        evaluation = msgspec.convert(stored[row["name"]], Evaluation)
        summary = evaluation.summary([1, 2, 4])
        assert row["accuracy"] == pytest.approx(
            [summary.accuracy.value, summary.accuracy.low, summary.accuracy.high, 3], rel=1e-5
        )
        assert row["accuracy"][0] == pytest.approx(sum(RIGHT[row["name"]]) / 12)
        if "@" not in row["name"]:
            found = {k: value for k, value, *_ in row["pass"]}
            assert found == pytest.approx(
                {k: e.value for k, e in summary.pass_at_k.items()}, rel=1e-5
            )
    paired = compare(*(msgspec.convert(stored[name], Evaluation) for name in ("int_rl", "base")))
    expected = ["InT + RL", "base", *page_data.interval(paired)]
    assert expected in run["differences"]
    assert not any("step" in title for row in run["differences"] for title in row[:2])


def test_gates_starts_and_outcomes_are_counted(folder):
    (run,) = seen(folder).block("runs")["runs"]
    found = run["intervention"]
    counts = {gate: count for gate, count, _ in found["gates"] if count}
    assert counts == {"kept": 1, "unsolved": 1, "leak": 1, "unparsed": 1}
    assert found["unlocked"] == 1 and found["cost"] == 12.0
    starts = {row["start"]: row for row in found["starts"]}
    # One of three scored on one problem, none of four on the other.
    assert starts["prefix + intervention"]["accuracy"][0] == pytest.approx(1 / 6, rel=1e-5)
    assert starts["prefix + intervention"]["attempt_coverage"][0] == 0.5
    assert starts["prefix + wrong step"]["accuracy"][0] == 0
    # Three located steps, each the second of three.
    assert found["places"] == [0, 0, 0, 3, 0, 0, 0, 0, 0, 0]
    outcomes = dict(run["outcomes"])
    assert outcomes["attempts"] == {"wrong": 4}
    assert outcomes["continuations of prefix + intervention"] == {
        "correct": 1,
        "wrong": 6,
        "timeout": 1,
    }
    assert outcomes["evaluation of InT + RL"] == {"correct": 9, "wrong": 3}


def test_seconds_curves_and_settings(folder):
    (run,) = seen(folder).block("runs")["runs"]
    assert dict(run["seconds"]) == {
        "InT": {"train": 3.0},
        "InT + RL": {"generate": 48.0, "train": 24.0},
    }
    curve = run["curves"]["int_rl"]
    assert curve["steps"] == list(range(1, 25))
    assert curve["series"]["entropy_mean"][:3] == [0.5, None, 0.5]
    settings = {key: (default, value) for key, default, value in run["settings"]}
    assert settings["data.test"] == ("absent", '"t.jsonl"')
    assert settings["evaluate.samples"] == ("128", "4")
    assert "seed" not in settings


def test_tokens_generated_and_likelihoods_of_texts(folder):
    (run,) = seen(folder).block("runs")["runs"]
    assert run["generated"] == [["attempts", 16], ["InT + RL", 4000]]
    nll, entropy = {}, {}
    for name in ("base", "InT"):
        nll[name], entropy[name] = [0.5, 0.25, 0.75], 0.5
    assert run["texts"] == [["reference", 3, 90, nll, entropy]]
    assert run["intervention"]["alone"]["attempts"] == 4


def test_the_interventions_with_all_that_belongs_to_them(folder):
    texts = seen(folder).block("items-0")
    first = texts["items"][0]
    assert texts["attempts"]["p-0/0"][0] == ["Begin \n\n", "wrong turn \n\n", "so it is 7 "]
    assert (first["gate"], first["location"]) == ("kept", 2)
    assert first["content"] == "right turn \n\n"
    marks, continued = first["chips"]["intervention"]
    assert marks == "cwuw" and continued["3"].startswith("intervention 3 goes on")
    pieces, weights, base, trained = first["tokens"]
    assert pieces == [" pre", "fix", " new", " step"] and weights == [1, 1, 1, 1]
    assert base == [-0.5, -0.25, -4, -2] and trained == [-0.75, -0.25, -0.5, -0.25]
    assert [item["tokens"] for item in texts["items"][1:]] == [None] * 3
    assert texts["left_out"] == {"examples": 0, "candidates": 0, "texts": 0}


def test_tokens_are_found_behind_the_same_prompt_and_before_a_suffix(copy):
    examples = page_data.read_rows(copy, "examples", Example)
    (row,) = page_data.read_rows(copy, "example_logprobs", TokenLogprobs)
    longer = msgspec.structs.replace(examples[0], token_ids=[*examples[0].token_ids, 30, 31])
    other = msgspec.structs.replace(examples[0], token_ids=[9, 9, 9, 10, 11, 20, 21])
    for example, is_found in ((longer, True), (other, False)):
        (copy / "examples.jsonl").write_bytes(msgspec.json.encode(example) + b"\n")
        found = browser.browse(copy)["items"][0]["tokens"]
        assert (found is not None) == is_found
    assert row.example == 0


def plain_sft(folder, kinds=("reference",), num=4):
    """Turn the SFT data of a run into others than interventions: problem i has kind i."""
    examples, scored = [], []
    (example,) = page_data.read_rows(folder, "examples", Example)
    (row,) = page_data.read_rows(folder, "example_logprobs", TokenLogprobs)
    for i, kind in enumerate(kinds):
        changed = {"kind": kind, "problem_id": example.problem_id.replace("p-0", f"p-{i % num}")}
        examples.append(msgspec.structs.replace(example, **changed))
        scored.append(msgspec.structs.replace(row, example=i))
    for name, records in (("examples", examples), ("example_logprobs", scored)):
        lines = b"".join(msgspec.json.encode(record) + b"\n" for record in records)
        (folder / f"{name}.jsonl").write_bytes(lines)
    return folder


def test_other_sft_data_have_their_tokens_too(copy):
    page = seen(plain_sft(copy, ("reference", "intervention", "star")))
    (run,) = page.block("runs")["runs"]
    assert run["trained"] == [
        ["p-0", "reference", 4, -1.6875, -0.4375],
        ["p-2", "star", 4, -1.6875, -0.4375],
    ]
    texts = page.block("items-0")
    pieces, weights, base, trained = texts["examples"][1]
    assert pieces == [" pre", "fix", " new", " step"] and weights == [1, 1, 1, 1]
    assert base == [-0.5, -0.25, -4, -2] and trained == [-0.75, -0.25, -0.5, -0.25]
    assert texts["problems"]["p-2"][0].startswith("What is 2 + 2?")
    assert run["scored"] == 3


def test_ablations_are_shown_as_they_were_measured(folder, copy):
    measured = Evaluation(
        name="int",
        seed=0,
        problems=msgspec.convert(
            page_data.read_json(folder, "evaluations.json")["int"]["problems"], list[ProblemCounts]
        ),
    ).summary([1])
    row = {"run": "x", "examples": 3, "loss_tokens": 40}
    rows = {
        "no filter": row | {"settings": ["sft.target=no_filter"], "evaluation": measured},
        "untested": row | {"settings": [], "evaluation": None},
    }
    (copy / "ablations.json").write_bytes(msgspec.json.encode(rows))
    (run,) = seen(copy).block("runs")["runs"]
    first, second = run["ablations"]
    assert (first["name"], first["settings"]) == ("no filter", ["sft.target=no_filter"])
    assert first["accuracy"] == page_data.interval(measured.accuracy)
    assert first["coverage"] == page_data.interval(measured.coverage) and first["samples"] == 4
    assert "accuracy" not in second and second["loss_tokens"] == 40


# --- sizes -------------------------------------------------------------------------------------


def test_beyond_its_budget_a_page_keeps_what_got_furthest_and_counts_the_rest(folder, monkeypatch):
    monkeypatch.setattr(browser, "ITEM_BYTES", 1200)
    texts = browser.browse(folder)
    assert [item["gate"] for item in texts["items"]] == ["kept", "unsolved"]
    assert texts["left_out"]["candidates"] == 2
    assert set(texts["problems"]) == {"p-0", "p-1"} and set(texts["attempts"]) == {"p-0/0", "p-1/0"}


def test_beyond_its_budget_a_page_keeps_a_right_and_a_wrong_continuation(folder, monkeypatch):
    monkeypatch.setattr(browser, "CONTINUATION_BYTES", 140)
    texts = browser.browse(folder)
    marks, continued = texts["items"][0]["chips"]["intervention"]
    assert marks == "cwuw"
    assert set(continued) == {0, 1, 2}
    stored = sum(len(t) for item in texts["items"] for _, t in item["chips"].values())
    assert texts["left_out"]["texts"] == 16 - stored > 0


def test_beyond_its_budget_a_page_leaves_tokens_out_and_says_so(copy, monkeypatch):
    plain_sft(copy, ("reference", "reference", "reference"))
    monkeypatch.setattr(browser, "TOKENS", 15)
    texts = browser.browse(copy)
    assert len(texts["examples"]) == len(texts["trained"]) == 2
    assert texts["left_out"]["examples"] == 1 and texts["scored"] == 3


# --- unfinished runs ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(page_data.SHOWS) - {"config.toml"}))
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    (run,) = seen(copy).block("runs")["runs"]
    assert [row[0] for row in run["missing"]] == [name]


def test_a_run_that_has_only_begun_has_a_page(copy):
    for path in copy.iterdir():
        if path.name != "config.toml":
            path.unlink()
    page = seen(copy)
    assert len(page.block("runs")["runs"][0]["missing"]) == len(page_data.SHOWS) - 1
    assert page.block("items-0")["items"] == []


def test_files_that_the_settings_do_not_ask_for_are_not_missing(tmp_path):
    plain = ["sft.epochs=0", "rl.problems=selected"]
    folder = make_run(tmp_path / "run", *FEW, *plain)
    for path in folder.glob("*.jsonl"):
        if path.stem not in ("problems", "metrics"):
            path.unlink()
    assert seen(folder).block("runs")["runs"][0]["missing"] == []


def test_a_line_that_is_being_written_is_left_alone(copy):
    path = copy / "interventions.jsonl"
    torn = path.read_bytes() + b'{"id": "half'
    path.write_bytes(torn)
    assert len(seen(copy).block("items-0")["items"]) == 4
    assert path.read_bytes() == torn


def test_an_evaluation_without_a_scored_sample_has_no_accuracy(copy):
    stored = page_data.read_json(copy, "evaluations.json")
    for problem in stored["base"]["problems"]:
        problem |= {"correct": 0, "wrong": 0, "unscored": 4, "reasons": {"timeout": 4}}
    (copy / "evaluations.json").write_text(json.dumps(stored))
    (run,) = seen(copy).block("runs")["runs"]
    base = run["evaluations"][0]
    assert base["unscored"] == 1.0 and "accuracy" not in base
    assert not any("base" in row[:2] for row in run["differences"])


# --- several runs ------------------------------------------------------------------------------


def test_runs_on_the_same_problems_are_compared_and_others_are_not(folder, tmp_path):
    other = make_run(tmp_path / "other", *FEW, "seed=1")
    page = seen(folder, other)
    found = page.block("runs")
    assert [run["name"] for run in found["runs"]] == ["run", "other"]
    assert [row[:2] for row in found["across"]] == [
        [f"other: {name}", f"run: {name}"] for name in ("base", "InT", "InT + RL")
    ]
    assert page.block("items-1")["items"]
    manifest = page_data.read_json(other, "manifest.json")
    manifest["test"]["hash"] = "another"
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert seen(folder, other).block("runs")["across"] == []


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / "all" / part / "run", *FEW) for part in ("a", "b/c")]
    names = [run["name"] for run in seen(*runs).block("runs")["runs"]]
    assert names == ["a/run", "b/c/run"]


# --- the command -------------------------------------------------------------------------------


def test_the_command_writes_where_it_says(copy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report.main([str(copy)]) == 0
    assert (copy / "report.html").read_text().startswith("<!doctype html>")
    assert report.main([str(copy), str(copy)]) == 0
    assert (tmp_path / "report.html").is_file()
    assert report.main([str(copy), "--out", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").is_file()
    assert "x.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere holds no run"),
        (["--out"], "expected a file name"),
        (["--out", "x.html"], "at least one run folder"),
        (["--open", "x"], "unknown option --open"),
    ],
)
def test_bad_arguments_are_explained(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert report.main(words) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_names_the_remedy(copy, tmp_path, capsys):
    assert report.main([str(copy), "--out", str(tmp_path / "absent" / "x.html")]) == 1
    said = capsys.readouterr().err
    assert f"make the folder {tmp_path / 'absent'}" in said and "continues" not in said
    assert report.main([str(copy), "--out", str(tmp_path)]) == 1
    assert "name a file" in capsys.readouterr().err


def test_a_damaged_journal_is_named_with_its_line(copy, capsys):
    path = copy / "attempts.jsonl"
    path.write_bytes(b'{"problem_id": 3}\n' + path.read_bytes())
    assert report.main([str(copy)]) == 2
    assert "attempts.jsonl:1" in capsys.readouterr().err
