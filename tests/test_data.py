import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from intfast import data
from intfast.data import load_problems, overlap, text_key
from intfast.records import Problem


def write_jsonl(path: Path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return str(path)


def qa(number: int, **more) -> dict:
    return {"problem": f"What is {number} + 1?", "answer": str(number + 1), **more}


# One row of each layout: (row, id, problem, answer, reference).
SCHEMAS = {
    "DeepScaleR": (
        {"problem": "P?", "answer": "3", "solution": r"so \boxed{3}"},
        (None, "P?", "3", r"so \boxed{3}"),
    ),
    "DAPO": (
        {
            "data_source": "math_dapo",
            "prompt": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "first"},
                {"role": "assistant", "content": "no"},
                {"role": "user", "content": " P? "},
            ],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule"},
            "extra_info": {"index": "9a-7"},
        },
        ("9a-7", "P?", "34", None),
    ),
    "Polaris": (
        {"problem": "P?", "answer": "5", "difficulty": "3/8"},
        (None, "P?", "5", None),
    ),
    "Omni-MATH": (
        {
            "domain": ["Algebra"],
            "difficulty": 8.0,
            "problem": "P?",
            "solution": "S",
            "answer": "x>1",
            "source": "imo",
        },
        (None, "P?", "x>1", "S"),
    ),
    "OpenMathReasoning": (
        {
            "expected_answer": "7",
            "problem_type": "has_answer_extracted",
            "pass_rate_72b_tir": "0.5",
            "problem": "P?",
            "generated_solution": "S",
        },
        (None, "P?", "7", "S"),
    ),
    "Big-Math": (
        {"problem": "P?", "answer": "2", "llama8b_solve_rate": 0.1},
        (None, "P?", "2", None),
    ),
    "MathArena": (
        {"problem_idx": 4, "problem": "P?", "answer": 117, "problem_type": ["Algebra"]},
        ("4", "P?", "117", None),
    ),
    "IMO-AnswerBench": (
        {
            "Problem ID": "imo-bench-algebra-001",
            "Problem": "P?",
            "Short Answer": "$3$",
            "Category": "Algebra",
            "Subcategory": "Operation",
            "Source": "IMO",
        },
        ("imo-bench-algebra-001", "P?", "$3$", None),
    ),
    "AMO-Bench": (
        {
            "question_id": 2,
            "prompt": "P?",
            "solution": "S",
            "answer": r"\boxed{\frac{1}{2}}",
            "answer_type": "number",
        },
        ("2", "P?", r"\frac{1}{2}", "S"),
    ),
    "GSM8K": (
        {"question": "P?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004"},
        (None, "P?", "1,004", "2 + 2 = <<2+2=4>>4"),
    ),
    "MATH": (
        {"problem": "P?", "solution": r"\boxed{1}, no, \boxed{\frac{1}{2}}.", "level": "Level 5"},
        (None, "P?", r"\frac{1}{2}", r"\boxed{1}, no, \boxed{\frac{1}{2}}."),
    ),
    "MATH-500": (
        {
            "problem": "P?",
            "solution": "S",
            "answer": "7",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/a/1.json",
        },
        ("test/a/1.json", "P?", "7", "S"),
    ),
    "InT": (
        {
            "problem": "P?",
            "answer": "7",
            "reference_solution": "S",
            "incorrect_attempt": "A",
            "intervention": {"content": "C", "location": 3},
        },
        (None, "P?", "7", "S"),
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "P?"}], "ground_truth": 0.5},
        (None, "P?", "0.5", None),
    ),
    "quickstart": (
        {"id": "t-0", "problem": "a 7 ; ? d", "answer": "d 4 c 5", "reference_solution": "a 7 # b"},
        ("t-0", "a 7 ; ? d", "d 4 c 5", "a 7 # b"),
    ),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_known_schema(name, suffix, tmp_path):
    row, (problem_id, text, answer, reference) = SCHEMAS[name]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, [row])
    elif suffix == ".json":
        path.write_text(json.dumps([row]))
    else:
        write_parquet(path, [row])
    [problem], report = load_problems(str(path))
    assert (problem.problem, problem.answer, problem.reference) == (text, answer, reference)
    assert problem.id == problem_id if problem_id else len(problem.id) == 16
    assert problem.source.startswith(f"rows{suffix}")
    assert (report.num_read, report.num_kept, report.dropped) == (1, 1, {})


def test_report_names_columns_and_shows_an_example(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [SCHEMAS["MATH"][0], qa(1, solution="none boxed")])
    problems, report = load_problems(source)
    assert report.columns == {
        "problem": "problem",
        "answer": "answer",
        "reference": "solution",
        "id": "hash of the problem",
    }
    # The first row has no value in the answer column, which another row does have.
    assert report.dropped == {"no answer": 1}
    assert [p.answer for p in problems] == ["2"]
    printed = str(report)
    for piece in (
        "1 problems of 2 rows",
        "<- solution",
        "dropped 1: no answer",
        "example answer: 2",
    ):
        assert piece in printed
    assert report.fingerprint in printed

    source = write_jsonl(tmp_path / "b.jsonl", [SCHEMAS["MATH"][0]])
    assert load_problems(source)[1].columns["answer"] == r"last \boxed{} of solution"


def test_column_overrides(tmp_path):
    row = {"q": "P?", "a": {"b": 5}, "problem": "not this", "sol": "S", "key": "k"}
    source = write_jsonl(tmp_path / "a.jsonl", [row])
    columns = {"problem": "q", "answer": "a.b", "reference": "sol", "id": "key"}
    [problem], report = load_problems(source, columns=columns)
    assert problem == Problem(id="k", problem="P?", answer="5", reference="S", source="a.jsonl:1")
    assert report.columns == columns
    with pytest.raises(
        ValueError, match=r"no column 'keys' for id; did you mean 'key'\?\ncolumns seen: q, a, a\.b"
    ):
        load_problems(source, columns={"id": "keys"})
    with pytest.raises(ValueError, match=r"columns\.solution is unknown; known: problem, answer"):
        load_problems(source, columns={"solution": "sol"})


def test_unknown_columns_list_what_was_seen_and_the_nearest(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"qestion": "P?", "anwser": "5", "x": 1}])
    with pytest.raises(ValueError) as caught:
        load_problems(source)
    message = str(caught.value)
    assert "no column for the problem" in message and "no column for the answer" in message
    assert "nearest is 'qestion'" in message and "nearest is 'anwser'" in message
    assert "columns seen: qestion, anwser, x" in message


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (5, "5"),
        (-3, "-3"),
        (5.0, "5"),
        (0.1, "0.1"),
        (-0.0, "0"),
        (1e-7, "0.0000001"),
        (1e21, "1" + "0" * 21),
        (123456789012345678901234567890, "123456789012345678901234567890"),
        (" 5 ", "5"),
        ("007", "007"),
    ],
)
def test_numbers_become_text_exactly(value, answer, tmp_path):
    [problem], _ = load_problems(write_jsonl(tmp_path / "a.jsonl", [qa(1, answer=value)]))
    assert problem.answer == answer


def test_missing_values_in_parquet_are_missing_answers(tmp_path):
    table = pa.table({"problem": ["a", "b", "c", None], "answer": [1.0, float("nan"), None, 2.0]})
    pq.write_table(table, tmp_path / "a.parquet")
    problems, report = load_problems(str(tmp_path / "a.parquet"))
    assert [(p.problem, p.answer) for p in problems] == [("a", "1")]
    assert report.dropped == {"no answer": 2, "no problem text": 1}


def test_duplicates_and_conflicts_are_dropped_and_counted(tmp_path):
    rows = [
        {"problem": "Find $x = 1$.", "answer": "1/2", "id": "first"},
        {"problem": " find  $x=1$. ", "answer": "0.5", "id": "second"},
        {"problem": "Find y", "answer": "1"},
        {"problem": "Find y", "answer": "2"},
        {"problem": "Find y", "answer": "1"},
        {"problem": "Find z", "answer": "3"},
        {"problem": "Find z", "answer": " "},
        {"problem": "", "answer": "3"},
        {"problem": "Find w", "answer": "9" * 301},
    ]
    problems, report = load_problems(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [p.problem for p in problems] == ["Find $x = 1$.", "Find z"]
    assert problems[0].id == "first"
    assert report.dropped == {
        "no answer": 1,
        "no problem text": 1,
        "answer longer than 300 characters": 1,
        "same problem with different answers": 3,
        "duplicate": 1,
    }
    assert report.num_read == report.num_kept + sum(report.dropped.values())


def test_ids_stay_unique_whatever_the_order(tmp_path):
    rows = [qa(1, id="7"), qa(2, id="7"), qa(3, id="8"), qa(4, id=None), qa(1, id="9")]
    forward, report = load_problems(write_jsonl(tmp_path / "a.jsonl", rows))
    backward, _ = load_problems(write_jsonl(tmp_path / "b.jsonl", rows[3::-1]))
    assert len({p.id for p in forward}) == 4
    assert forward[0].id.startswith("7-") and forward[2].id == "8"
    assert {p.problem: p.id for p in forward} == {p.problem: p.id for p in backward}
    assert report.renamed_ids == 2


def test_what_the_limit_drops_is_counted(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [qa(i) for i in range(9)])
    problems, report = load_problems(source, limit=3)
    assert [p.answer for p in problems] == ["1", "2", "3"]
    assert report.dropped == {"above the limit of 3": 6}
    assert load_problems(source, limit=9)[1].dropped == {}


def test_fingerprint_is_of_content_and_order(tmp_path):
    rows = [qa(1, id="a"), qa(2, id="b")]
    prints = [
        load_problems(write_jsonl(tmp_path / f"{i}.jsonl", given))[1].fingerprint
        for i, given in enumerate(
            [rows, [*rows, rows[0]], rows[::-1], [qa(1, id="a"), qa(2, id="b", solution="S")]]
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_overlap_sees_through_spacing_and_case():
    def problems(*texts):
        return [Problem(id=text, problem=text, answer="1") for text in texts]

    train = problems("Find $x + 1$", "b")
    assert overlap(train, problems("find $x+1$ ", "c", "B")) == 2
    assert overlap(train, problems("Find $x + 12$")) == 0
    assert text_key("1 2") != text_key("12")
    assert text_key("\uff21 b") == "a b"


def test_report_goes_into_a_manifest(tmp_path):
    _, report = load_problems(write_jsonl(tmp_path / "a.jsonl", [qa(1)]))
    assert msgspec.json.decode(msgspec.json.encode(report), type=data.DataReport) == report


def test_importing_data_loads_nothing_heavy():
    program = (
        "import sys, intfast.data, intfast.grading.grader, intfast.evaluate\n"
        "print({'torch', 'pyarrow', 'datasets', 'math_verify', 'sympy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
