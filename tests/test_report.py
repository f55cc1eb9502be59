"""The page of a run: its numbers, what it leaves out, what it says is missing, hostile texts."""

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from report_run import FEW, RIGHT, Seen, make_run

from intfast.evaluate import wilson
from intfast.records import Example
from intfast.study import browser, report, sections, summary
from intfast.study.page_data import SHOWS, load_all
from intfast.study.paired import compare
from intfast.study.read import TokenLogprobs, read_evaluations, read_rows
from intfast.study.summary import continued_from, first_wave, starts_table
from intfast.study.tables import interval


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "run", *FEW)


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def seen(*folders):
    return Seen(report.page(folders))


def browsed(folder):
    (run,) = load_all([folder])
    return browser.browse(run)


# --- what the page says ------------------------------------------------------------------------


def test_the_figures_are_those_of_the_evaluations(folder):
    stored = read_evaluations(folder)
    head, *rows = seen(folder).tables["results"][0]
    assert head[:2] == ["weights", "accuracy %"] and "pass@4 %" in head
    assert [row[0] for row in rows] == ["base", "InT", "InT + RL"]
    for row, key in zip(rows, ("base", "int", "int_rl"), strict=True):
        summary = stored[key].summary([1, 4])
        assert summary.accuracy.value == pytest.approx(sum(RIGHT[key]) / 12)
        assert row[1] == interval(summary.accuracy)
        assert row[head.index("pass@4 %")] == interval(summary.pass_at_k[4])
        assert row[head.index("ever solved %")] == interval(summary.coverage)
    rows = seen(folder).tables["results"][1]
    assert ["InT + RL \u2212 base", interval(compare(stored["int_rl"], stored["base"]))] == next(
        row[:2] for row in rows if row[0] == "InT + RL \u2212 base"
    )
    assert not any("step" in row[0] for row in rows)


def test_charts_tell_their_values(folder):
    page = seen(folder)
    said = [text for attrs, text in page.of("title")]
    assert "k = 4\nbase: 33.3 % [0, 100] of 3 problems" in "\n".join(said)
    assert "step 1\nInT + RL: 0.0333" in said
    # The zero-advantage share; and the entropy, which only every other step has.
    assert [said.count(f"step {n}\nInT + RL: 0.5") for n in (1, 2)] == [2, 1]
    assert "step 1\nInT + RL: 25 % [25, 25] of 3 problems" in said


def test_gates_starts_and_outcomes_are_counted(folder):
    page = seen(folder)
    (run,) = load_all([folder])
    gates, starts, tenths = page.tables["interventions"]
    counts = {row[0]: row[1] for row in gates[1:]}
    assert counts == {"kept": "1", "unsolved": "1", "leak": "1", "unparsed": "1"}
    assert "1 problems have a kept one, at 12 generated" in page.text("interventions")
    rows = {row[0]: row[1:] for row in starts[1:]}
    # One of three scored on one problem, none of four on the other.
    assert rows["prefix + intervention"][0].startswith("16.67 [")
    assert rows["prefix + intervention"][1].startswith("50.0 [")
    assert rows["prefix + wrong step"][0] == "0.00 [0.00, 0.00]"
    assert rows["problem alone: the attempts"][3] == "4 (1 per problem)"
    # Three located steps, each the second of three.
    assert sections.places(run) == [0, 0, 0, 3, 0, 0, 0, 0, 0, 0]
    assert [row[1] for row in tenths[1:]] == list("0003000000")
    head, *rows = page.tables["grading"][0]
    found = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    assert found["attempts"]["wrong"] == "4"
    continued = found["continuations of prefix + intervention"]
    assert [continued[k] for k in ("answers", "correct", "wrong", "timeout")] == list("8161")
    assert found["evaluation of InT + RL"]["correct"] == "9"


def test_where_a_rule_ends_continuations_early_the_table_says_what_accuracy_counts(tmp_path):
    always = make_run(tmp_path / "never", *FEW, "intervene.stop=never")
    early = make_run(tmp_path / "early", *FEW, "intervene.stop=first_success", "intervene.wave=2")
    assert "first wave" not in seen(always).text("interventions")
    text = seen(early).text("interventions")
    assert "* of the first wave only, 2 continuations of each attempt" in text
    rows = {row[0]: row[1] for row in seen(early).tables["interventions"][1]}
    # The right one of the first two counts, on one of two problems.
    assert rows["prefix + intervention"].startswith("25.00 [")
    assert rows["prefix + intervention"].endswith("*")
    (run,) = load_all([early])
    figures = continued_from(run.interventions, run.continuations, run.config)
    table = starts_table(figures, None, first_wave(run.config))
    assert "25.00 [0.00, 50.00]*" in table.markdown()[2] and "first wave only" in table.caption


def test_seconds_tokens_texts_and_settings(folder):
    page = seen(folder)
    head, *rows = page.tables["time"][0]
    found = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert found["InT"]["train"] == "3.0" and found["InT + RL"]["generate"] == "48.0"
    assert found["all"]["time"] == "75.0 s"
    assert page.tables["time"][1][1:] == [["attempts", "16"], ["InT + RL", "4,000"]]
    head, row = page.tables["training"][0]
    assert head[:5] == ["text", "texts", "tokens", "NLL, base", "NLL, InT"]
    assert row[:4] == ["reference", "3", "90", "0.500 [0.250, 0.750]"]
    settings = {row[0]: row[1:] for row in page.tables["settings"][0]}
    assert settings["data.test"] == ["absent", '"t.jsonl"']
    assert settings["evaluate.samples"] == ["128", "4"]
    assert "seed" not in settings


def test_the_interventions_with_all_that_belongs_to_them(folder):
    texts = seen(folder).block("items-0")
    first = texts["items"][0]
    assert texts["attempts"]["p-0/0"][0] == ["Begin \n\n", "wrong turn \n\n", "so it is 7 "]
    assert (first["gate"], first["location"]) == ("kept", 2)
    assert first["content"] == "right turn \n\n"
    marks, continued, range_ = first["chips"]["intervention"]
    assert range_ == pytest.approx(wilson(1, 3))
    assert marks == "cwuw" and continued["3"].startswith("intervention 3 goes on")
    pieces, weights, base, trained = first["tokens"]
    assert pieces == [" pre", "fix", " new", " step"] and weights == [1, 1, 1, 1]
    assert base == [-0.5, -0.25, -4, -2] and trained == [-0.75, -0.25, -0.5, -0.25]
    assert [item["tokens"] for item in texts["items"][1:]] == [None] * 3
    assert texts["left_out"] == {"examples": 0, "candidates": 0, "texts": 0}


def test_tokens_are_found_behind_the_same_prompt_and_before_a_suffix(copy):
    examples = read_rows(copy / "examples.jsonl", Example)
    (row,) = read_rows(copy / "example_logprobs.jsonl", TokenLogprobs)
    longer = msgspec.structs.replace(examples[0], token_ids=[*examples[0].token_ids, 30, 31])
    other = msgspec.structs.replace(examples[0], token_ids=[9, 9, 9, 10, 11, 20, 21])
    for example, is_found in ((longer, True), (other, False)):
        (copy / "examples.jsonl").write_bytes(msgspec.json.encode(example) + b"\n")
        found = browsed(copy)["items"][0]["tokens"]
        assert (found is not None) == is_found
    assert row.example == 0


def plain_sft(folder, kinds=("reference",), num=4):
    """Turn the SFT data of a run into others than interventions: problem i has kind i."""
    examples, scored = [], []
    (example,) = read_rows(folder / "examples.jsonl", Example)
    (row,) = read_rows(folder / "example_logprobs.jsonl", TokenLogprobs)
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
    texts = page.block("items-0")
    assert "reference solution, 4 loss tokens, mean log-prob -1.688" in page.text("trained")
    assert texts["trained"] == [
        ["p-0", "reference", 4, -1.6875, -0.4375],
        ["p-2", "star", 4, -1.6875, -0.4375],
    ]
    pieces, weights, base, trained = texts["examples"][1]
    assert pieces == [" pre", "fix", " new", " step"] and weights == [1, 1, 1, 1]
    assert base == [-0.5, -0.25, -4, -2] and trained == [-0.75, -0.25, -0.5, -0.25]
    assert texts["problems"]["p-2"][0].startswith("What is 2 + 2?")
    assert page.block("runs")["runs"][0]["scored"] == 3


def test_ablations_are_shown_as_they_were_measured(folder, copy):
    measured = read_evaluations(folder)["int"].summary([1])
    row = {"run": "x", "examples": 3, "loss_tokens": 40}
    rows = {
        "no filter": row | {"settings": ["sft.target=no_filter"], "evaluation": measured},
        "untested": row | {"settings": [], "evaluation": None},
    }
    (copy / "ablations.json").write_bytes(msgspec.json.encode(rows))
    page = seen(copy)
    _, first, second = page.tables["results"][-1]
    assert first[:4] == ["no filter", "3", "40", interval(measured.accuracy)]
    assert first[5:] == [f"{interval(measured.coverage)} of 3", "sft.target=no_filter"]
    assert second == ["untested", "3", "40", "", "", "", "the recipe"]
    assert "4 samples of each held-out problem" in page.text("results")
    text = summary.ablation_table(rows).markdown()[2]
    assert text == f"| no filter | 3 | 40 | {interval(measured.accuracy)} | 3 of 3 |"


# --- sizes -------------------------------------------------------------------------------------


def test_beyond_its_budget_a_page_keeps_what_got_furthest_and_counts_the_rest(folder, monkeypatch):
    monkeypatch.setattr(browser, "ITEM_BYTES", 1200)
    texts = browsed(folder)
    assert [item["gate"] for item in texts["items"]] == ["kept", "unsolved"]
    assert texts["left_out"]["candidates"] == 2
    assert set(texts["problems"]) == {"p-0", "p-1"} and set(texts["attempts"]) == {"p-0/0", "p-1/0"}


def test_beyond_its_budget_a_page_keeps_a_right_and_a_wrong_continuation(folder, monkeypatch):
    monkeypatch.setattr(browser, "CONTINUATION_BYTES", 140)
    texts = browsed(folder)
    marks, continued, _ = texts["items"][0]["chips"]["intervention"]
    assert marks == "cwuw"
    assert set(continued) == {0, 1, 2}
    stored = sum(len(t) for item in texts["items"] for _, t, _ in item["chips"].values())
    assert texts["left_out"]["texts"] == 16 - stored > 0


def test_beyond_its_budget_a_page_leaves_tokens_out_and_says_so(copy, monkeypatch):
    plain_sft(copy, ("reference", "reference", "reference"))
    monkeypatch.setattr(browser, "TOKENS", 15)
    texts = browsed(copy)
    assert len(texts["examples"]) == len(texts["trained"]) == 2
    assert texts["left_out"]["examples"] == 1 and texts["scored"] == 3


# --- unfinished runs ---------------------------------------------------------------------------


def missing(folder):
    (run,) = load_all([folder])
    warned = [text for attrs, text in seen(folder).of("div") if attrs.get("class") == "warn"]
    assert all(name in warned[0] for name in run.missing)
    assert bool(warned) == bool(run.missing)
    return run.missing


@pytest.mark.parametrize("name", sorted(set(SHOWS) - {"config.toml"}))
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    assert missing(copy) == [name]


def test_a_run_that_has_only_begun_has_a_page(copy):
    for path in copy.iterdir():
        if path.name != "config.toml":
            path.unlink()
    assert len(missing(copy)) == len(SHOWS) - 1
    assert seen(copy).block("items-0")["items"] == []
    assert "No evaluation" in seen(copy).text("results")


def test_files_that_the_settings_do_not_ask_for_are_not_missing(tmp_path):
    plain = ["sft.epochs=0", "rl.problems=selected"]
    folder = make_run(tmp_path / "run", *FEW, *plain)
    for path in folder.glob("*.jsonl"):
        if path.stem not in ("problems", "metrics"):
            path.unlink()
    assert missing(folder) == []


def test_a_line_that_is_being_written_is_left_alone(copy):
    path = copy / "interventions.jsonl"
    torn = path.read_bytes() + b'{"id": "half'
    path.write_bytes(torn)
    assert len(seen(copy).block("items-0")["items"]) == 4
    assert path.read_bytes() == torn


def test_an_evaluation_without_a_scored_sample_has_no_accuracy(copy):
    stored = json.loads((copy / "evaluations.json").read_text())
    for problem in stored["base"]["problems"]:
        problem |= {"correct": 0, "wrong": 0, "unscored": 4, "reasons": {"timeout": 4}}
    (copy / "evaluations.json").write_text(json.dumps(stored))
    page = seen(copy)
    base = page.tables["results"][0][1]
    assert base[0] == "base" and base[-1] == ", 100.0" and set(base[1:-1]) == {""}
    assert not any("base" in row[0] for row in page.tables["results"][1])


# --- several runs ------------------------------------------------------------------------------


def test_runs_on_the_same_problems_are_compared_and_others_are_not(folder, tmp_path):
    other = make_run(tmp_path / "other", *FEW, "seed=1")
    page = seen(folder, other)
    assert [run["name"] for run in page.block("runs")["runs"]] == ["run", "other"]
    titles = [f"other: {name} \u2212 run: {name}" for name in ("base", "InT", "InT + RL")]
    assert [row[0] for row in page.tables["results"][1][1:]] == titles
    assert page.block("items-1")["items"]
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["test"]["hash"] = "another"
    (other / "manifest.json").write_text(json.dumps(manifest))
    page = seen(folder, other)
    assert not any(row[0] in titles for rows in page.tables["results"] for row in rows)
    assert "evaluated on different problems" in page.of("header")[0][1]


def test_settings_in_which_runs_differ_are_marked(folder, tmp_path):
    other = make_run(tmp_path / "other", *FEW, "seed=1")
    marked = [text for attrs, text in seen(folder, other).of("b") if attrs.get("class")]
    assert "1" in marked and '"t.jsonl"' not in marked


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / "all" / part / "run", *FEW) for part in ("a", "b/c")]
    assert [run.name for run in load_all(runs)] == ["a/run", "b/c/run"]


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
