import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from intfast import data
from intfast.data import load_problems, overlap, text_key, with_unique_ids
from intfast.records import Problem
from intfast.sources import named


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
                {"role": "user", "content": " P? "},
            ],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule"},
            "extra_info": {"index": "9a-7"},
        },
        ("9a-7", "be brief\n\nP?", "34", None),
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
        (2**53 + 1, "9007199254740993"),
        (1.5e300 / 1e298, "150"),
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
        {"problem": " Find  $x = 1$. ", "answer": "0.5", "id": "second"},
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
    assert report.dropped_rows == {
        "no answer": ["a.jsonl:7"],
        "no problem text": ["a.jsonl:8"],
        "answer longer than 300 characters": ["a.jsonl:9"],
        "same problem with different answers": [
            "a.jsonl:3 ('1')",
            "a.jsonl:4 ('2')",
            "a.jsonl:5 ('1')",
        ],
        "duplicate": ["a.jsonl:2 (as a.jsonl:1)"],
    }
    printed = str(report)
    assert "dropped 1: no answer: a.jsonl:7\n" in printed
    assert "different answers: a.jsonl:3 ('1'), a.jsonl:4 ('2'), a.jsonl:5 ('1')\n" in printed


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


def test_overlap_tells_copies_from_what_only_looks_alike():
    def problems(*texts, answer="1"):
        return [Problem(id=text, problem=text, answer=answer) for text in texts]

    def texts(pairs):
        return [(test.problem, trained.problem) for test, trained in pairs]

    train = problems("Find $x + 1$", "b")
    same, alike = overlap(train, problems(" Find\n $x + 1$ ", "find $x+1$", "c", "B"))
    assert texts(same) == [(" Find\n $x + 1$ ", "Find $x + 1$")]
    assert texts(alike) == [("find $x+1$", "Find $x + 1$"), ("B", "b")]
    # With another answer it is another problem.
    assert overlap(train, problems("B", answer="2")) == ([], [])
    assert overlap(train, problems("Find $x + 12$")) == ([], [])


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("3 Mg", "3 mg"),
        ("$x^2$: x\u00b2", "$x^2$: x2"),
        ("Add 1, 234", "Add 1,234"),
        ("Add 3 .5", "Add 3.5"),
        ("$a\\ b$", "$a\\b$"),
        ("2\u00bd", "21/2"),
        ("$\\Pi$", "$\\pi$"),
        ("x\u2081", "x1"),
        ("\u210d", "H"),
        ("3\u2064\u00bd", "3\u00bd"),
        ("1 -1 1", "1-1 1"),
    ],
)
def test_different_mathematics_has_different_keys(text, other, tmp_path):
    assert text_key(text) != text_key(other)
    rows = [{"problem": text, "answer": "1"}, {"problem": other, "answer": "2"}]
    problems, report = load_problems(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [p.problem for p in problems] == [text, other] and report.dropped == {}
    assert problems[0].id != problems[1].id


@pytest.mark.parametrize(
    ("text", "other"),
    [("caf\u00e9", "cafe\u0301"), ("a\u200bb", "ab"), ("a \t\n b", " a b "), ("a\u00a0b", "a b")],
)
def test_texts_that_show_the_same_have_one_key(text, other):
    assert text_key(text) == text_key(other)


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        (b"1.0", "1"),
        (b"2.50", "2.5"),
        (b"2.5E3", "2500"),
        (b"-0.0", "0"),
        (b"0.10000000000000000555", "0.10000000000000000555"),
        (b"12345678901234567890.5", "12345678901234567890.5"),
        (b"9007199254740993.0", "9007199254740993"),
        (b"0." + b"12" * 20, "0." + "12" * 20),
    ],
)
def test_numbers_of_json_are_read_as_they_are_written(written, answer, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"problem": "P?", "answer": %b}\n' % written)
    assert load_problems(str(tmp_path / "a.jsonl"))[0][0].answer == answer


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"1e400", "dropped 1: answer longer than 300 characters: a.jsonl:1"),
        (b"1e999999999", r"a.jsonl:1: column 'answer' \(answer\): .* got 1E\+999999999"),
        (b"1e99999999999999999999", r"a\.jsonl:1: not JSON \(no number that can be read: 1e9"),
    ],
)
def test_numbers_out_of_reach_are_named_and_cost_nothing(written, said, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"problem": "P?", "answer": %b}\n' % written)
    with pytest.raises(ValueError, match=said):
        load_problems(str(tmp_path / "a.jsonl"))


D = Decimal


@pytest.mark.parametrize(
    ("values", "answers"),
    [
        (pa.array([132.04, 1e10, 3e-5], pa.float32()), ["132.04", "10000000000", "0.00003"]),
        (pa.array([1.1, 2.5], pa.float16()), ["1.1", "2.5"]),
        (pa.array([0.1, 0.7], pa.float32()).dictionary_encode(), ["0.1", "0.7"]),
        (pa.array([0.1, 1e22]), ["0.1", "1" + "0" * 22]),
        (pa.array([D("1.10"), D("9" * 29 + ".5")], pa.decimal128(38, 9)), ["1.1", "9" * 29 + ".5"]),
        (
            pa.array([2**64 - 1, 2**53 + 1], pa.uint64()),
            ["18446744073709551615", "9007199254740993"],
        ),
        (pa.array(["3", "4"], pa.large_string()), ["3", "4"]),
        (pa.array(["3", "4"]).dictionary_encode(), ["3", "4"]),
    ],
    ids=lambda v: str(v.type) if isinstance(v, pa.Array) else "",
)
@pytest.mark.parametrize("nested", [False, True])
def test_no_number_is_rounded_by_the_type_of_its_column(values, answers, nested, tmp_path):
    texts = pa.array([f"p{i}" for i in range(len(answers))])
    if nested and not pa.types.is_dictionary(values.type):
        table = {"reward_model": pa.StructArray.from_arrays([values], ["ground_truth"])}
    else:
        table = {"answer": values}
    pq.write_table(pa.table({"problem": texts} | table), tmp_path / "a.parquet")
    problems, _ = load_problems(str(tmp_path / "a.parquet"))
    assert [p.answer for p in problems] == answers


def test_cells_of_other_types_are_refused_by_row(tmp_path):
    table = {"problem": ["a", "b"], "answer": [b"1", b"2"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet row 1: .* got bytes\n.*row 2: .* got bytes"):
        load_problems(str(tmp_path / "a.parquet"))
    source = write_jsonl(tmp_path / "a.jsonl", [qa(1), {"problem": 777, "answer": "1"}])
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*expected text, got the number 777"):
        load_problems(source)


def test_dropped_rows_are_told_with_the_faults(tmp_path):
    rows = [qa(1), {"problem": "b"}, qa(3, answer=["3"]), qa(4, answer="proof"), qa(1), qa(5)]
    with pytest.raises(ValueError) as caught:
        load_problems(write_jsonl(tmp_path / "a.jsonl", rows))
    assert str(caught.value).split("\n")[1:] == [
        "  a.jsonl:3: column 'answer' (answer): expected text or a number, got list",
        "and these would be dropped:",
        "  dropped 1: no answer: a.jsonl:2",
        "  dropped 1: no answer but a word for none: a.jsonl:4",
        "  dropped 1: duplicate: a.jsonl:5 (as a.jsonl:1)",
    ]


def test_a_missing_column_is_told_with_the_faults(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"qestion": "a", "answer": "1"}\n[1]\n' + '{"b": 1}\n' * 1500 + "{\n")
    with pytest.raises(ValueError) as caught:
        load_problems(str(path))
    message = str(caught.value)
    assert "no column for the problem" in message and "has 2 faults" in message
    assert "  a.jsonl:2: expected an object" in message and "  a.jsonl:1503: not JSON" in message


def test_all_rows_of_a_kind_are_named_in_short(tmp_path):
    rows = [qa(i, answer="" if i in (2, 3, 4, 9) else "1") for i in range(1, 12)]
    _, report = load_problems(write_jsonl(tmp_path / "a.jsonl", rows))
    assert report.dropped_rows == {"no answer": [f"a.jsonl:{i}" for i in (2, 3, 4, 9)]}
    assert "dropped 4: no answer: a.jsonl:2-4, 9\n" in str(report)
    many = named(f"a.jsonl:{2 * i}" for i in range(210))
    assert many.startswith("a.jsonl:0, 2, 4,") and many.endswith(", 398, and 10 more")
    assert named(["x/a row 1", "x/a row 2", "b:3", "b:4 ('7')", "b:5"]) == (
        "x/a row 1-2, b:3, b:4 ('7'), b:5"
    )


@pytest.mark.parametrize(
    "marker", ["proof", "see figure", "N/A", "?", r"\text{Proof.}", "$-$", "null", "..."]
)
def test_markers_are_no_answers(marker, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [qa(1), qa(2, answer=marker)])
    problems, report = load_problems(source)
    assert [p.answer for p in problems] == ["2"]
    assert report.dropped_rows == {"no answer but a word for none": ["a.jsonl:2"]}
    # Compared as text, any words may be the answer.
    assert load_problems(source, mode="tail:ans")[1].num_kept == 2


def test_references_that_hold_no_solution_are_left_out_and_noted(tmp_path):
    solutions = [
        r"\boxed{7}",
        "The final answer is $7$.",
        "N/A",
        "7.0",
        r"Answer: \fbox{7}.",
        7,
        "3 + 4 = 7",
        r"So $3+4=\boxed{7}$.",
        "The answer is 7, since 3 + 4 = 7.",
    ]
    rows = [qa(i, answer="7", solution=text) for i, text in enumerate(solutions, 1)]
    problems, report = load_problems(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [p.reference for p in problems] == [None] * 6 + solutions[6:]
    assert list(report.notes.values()) == [[f"a.jsonl:{i}" for i in range(1, 7)]]
    assert "noted 6: reference that holds no solution" in str(report)
    assert "left out: a.jsonl:1-6\n" in str(report)
    # Compared as text, any text may be how to get there.
    assert all(p.reference for p in load_problems(str(tmp_path / "a.jsonl"), mode="tail:ans")[0])
    # A solution that came with the answer stands in.
    rows = [qa(1, answer="3 + 4 = 7 #### 7", solution="see below")]
    [problem], report = load_problems(write_jsonl(tmp_path / "b.jsonl", rows))
    assert problem.reference == "3 + 4 = 7" and list(report.notes.values()) == [["b.jsonl:1"]]
    assert report.columns["reference"] == "solution, else the worked solutions in answer"


def test_where_answers_stand_behind_a_mark_no_text_is_taken_whole(tmp_path):
    rows = [
        {"question": "a", "answer": "4 + 4 = 8\n#### 8"},
        {"question": "b", "answer": "He has 3 left, so 9 in total."},
        {"question": "c", "answer": r"It is \boxed{5}, since 2 + 3 = 5."},
        {"question": "d", "answer": "#### 6"},
    ]
    problems, report = load_problems(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [(p.answer, p.reference) for p in problems] == [
        ("8", "4 + 4 = 8"),
        ("5", r"It is \boxed{5}, since 2 + 3 = 5."),
        ("6", None),
    ]
    assert report.dropped_rows == {"no #### and no box, where others have": ["a.jsonl:2"]}
    assert report.columns["answer"] == "behind #### in answer"
    assert report.columns["reference"] == "the worked solutions in answer"
    # A heading of Markdown is no mark, and says nothing of the other rows.
    heading = {"question": "e", "answer": "#### Step 1\nIt is \\boxed{2}.\nDone"}
    rows = [heading, {"question": "f", "answer": "7"}]
    problems, report = load_problems(write_jsonl(tmp_path / "b.jsonl", rows))
    assert [p.answer for p in problems] == ["2", "7"] and report.dropped == {}


def test_answers_of_solutions_alone(tmp_path):
    texts = [r"It is $\fbox{5}$, by 2 + 3.", r"Six: $\boxed 6$, by 1 + 5.", "2 + 5 = 7 #### 7"]
    rows = [{"problem": f"p{i}", "solution": text} for i, text in enumerate(texts)]
    problems, report = load_problems(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [p.answer for p in problems] == ["5", "6", "7"]
    assert [p.reference for p in problems] == texts
    assert report.columns["answer"] == r"last \boxed{} of solution, else behind ####"


def test_columns_that_claim_a_taken_field_are_noted(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [qa(1, Answer="9"), qa(2)])
    problems, report = load_problems(source)
    assert [p.answer for p in problems] == ["2", "3"]
    note = "column 'Answer' is not read: the answer is taken from 'answer'"
    assert report.notes == {note: []} and f"  note: {note}\n" in str(report)


def says(*turns: str, role: str = "role", content: str = "content") -> list[dict]:
    return [dict(zip((role, content), turn.split(": ", 1), strict=True)) for turn in turns]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_conversation_is_kept_whole_or_dropped_by_name(suffix, tmp_path):
    conversations = [
        says("system: Answer in base 7.", "user: Compute 3 + 5."),
        says("user: first", "assistant: no", "user: Compute 3 + 6."),
        says("user: Compute 3 + 7.", "assistant: 3 + 7 is 10, \\boxed{13}."),
        says("user: look", "tool: 5", "assistant: so"),
        says("system: ", "user: Compute 3 + 8."),
    ]
    rows = [{"messages": c, "answer": str(n)} for n, c in enumerate(conversations, 11)]
    path = tmp_path / f"a.{suffix}"
    (write_jsonl if suffix == "jsonl" else write_parquet)(path, rows)
    problems, report = load_problems(str(path))
    assert [(p.problem, p.answer, p.reference) for p in problems] == [
        ("Answer in base 7.\n\nCompute 3 + 5.", "11", None),
        ("Compute 3 + 7.", "13", "3 + 7 is 10, \\boxed{13}."),
        ("Compute 3 + 8.", "15", None),
    ]
    row = "a.jsonl:" if suffix == "jsonl" else "a.parquet row "
    reason = "a conversation that is more than one question and its answer"
    assert report.dropped_rows == {reason: [f"{row}2", f"{row}4"]}
    assert report.notes == {"system turn, now the beginning of the problem's text": [f"{row}1"]}


def test_conversations_of_the_other_spelling_and_answers_inside_them(tmp_path):
    row = says(
        "human: Compute 2 + 2.", "gpt: It is 2 + 2 = \\boxed{4}.", role="from", content="value"
    )
    [problem], report = load_problems(write_jsonl(tmp_path / "a.jsonl", [{"conversations": row}]))
    assert (problem.problem, problem.answer) == ("Compute 2 + 2.", "4")
    assert problem.reference == "It is 2 + 2 = \\boxed{4}."
    assert report.columns["answer"] == r"last \boxed{} of conversations"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Compute "}, {"text": "1 + 1"}]}]
    rows = [{"messages": parts, "answer": "2"}]
    [problem], _ = load_problems(write_jsonl(tmp_path / "b.jsonl", rows))
    assert problem.problem == "Compute 1 + 1"
    rows[0]["messages"][0]["content"][1] = {"type": "image_url", "image_url": "x"}
    with pytest.raises(ValueError, match=r'b\.jsonl:1: .*expected a list of {"role", "content"}'):
        load_problems(write_jsonl(tmp_path / "b.jsonl", rows))
    turns = says("user: What?", "assistant: That.")
    rows = [{"messages": turns, "answer": "5", "solution": "2 + 3 = 5"}]
    _, report = load_problems(write_jsonl(tmp_path / "c.jsonl", rows))
    assert report.notes == {"the assistant's turns at the end of 'messages' are not read": []}


def test_ids_are_unique_over_files_whatever_the_rows_say():
    def problems(*pairs):
        return [Problem(id=name, problem=text, answer="1") for name, text in pairs]

    content = with_unique_ids(problems(("", "a")))[0].id
    train = with_unique_ids(problems(("0", "a"), ("1", "b"), (content, "c"), (f"1-{content}", "d")))
    assert [p.id for p in train] == ["0", "1", content, f"1-{content}"]
    taken = {p.id for p in train}
    tests = problems(("0", "x"), ("1", "y"), ("2", "z"), ("", "a"), ("1", "a"))
    unique = with_unique_ids(tests, taken)
    assert len({p.id for p in unique} | taken) == 9
    assert unique[2].id == "2" and unique[0].id.startswith("0-") and len(unique[0].id) == 18
    # Hostile: rows that carry the very names which others would get.
    assert unique[3].id == f"{content}-{content}"
    assert unique[4].id == f"1-{content}-{content}"
    # What a row says and its text decide, and not its place.
    again = {p.problem: p.id for p in with_unique_ids(tests[::-1], taken)}
    assert again == {p.problem: p.id for p in unique} | {"a": again["a"]}


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
