import json
import sys
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from intfast.data import load_problems


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


# ---- faulty files


def test_all_faults_of_a_file_at_once(tmp_path):
    lines = [
        json.dumps(qa(1)).encode(),
        b'{"problem": "broken", ',
        b"[1, 2]",
        b'"text"',
        b"null",
        b"",
        json.dumps(qa(2, answer=True)).encode(),
        json.dumps(qa(3, answer=["4"])).encode(),
        json.dumps({"problem": 5.5, "answer": {"x": 1}}).encode(),
        json.dumps({"problem": [{"role": "system", "content": "x"}], "answer": "1"}).encode(),
        b'{"problem": "\xff", "answer": "1"}',
        b'{"problem": "p", "answer": NaN}',
        b"[" * 3000,
        json.dumps(qa(4)).encode(),
        b'{"problem": "cut off", "answ',
    ]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError) as caught:
        load_problems(str(path))
    message = str(caught.value)
    assert "has 13 faults" in message
    expected = {
        2: "not JSON",
        3: "expected an object with columns, got a list",
        4: "got text",
        5: "got null",
        7: "column 'answer' (answer): expected text or a number, got bool",
        8: "got list",
        9: "got dict",
        10: "with a user turn",
        11: "not UTF-8",
        12: "not JSON",
        13: "nested too deeply",
        15: "was it cut off?",
    }
    for number, text in expected.items():
        assert any(
            f"bad.jsonl:{number}:" in line and text in line for line in message.split("\n")
        ), text
    # Both cells of line 9 are named.
    assert "bad.jsonl:9: column 'problem' (problem): expected text, got the number 5.5" in message
    assert message.count("bad.jsonl:") == len(expected) + 1
    assert message.count("cut off?") == 1


def test_long_fault_listings_are_capped(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("{\n" * 57)
    with pytest.raises(ValueError, match="57 faults;") as caught:
        load_problems(str(path))
    message = str(caught.value)
    assert message.endswith("  and 37 more: bad.jsonl:21-57")
    assert message.count("  bad.jsonl:") == 20


def test_byte_order_mark_and_blank_lines_are_harmless(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(qa(1)).encode() + b"\r\n\n  \n")
    assert load_problems(str(path))[1].num_read == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"data": []}', "one list of objects, it holds an object"),
        ("a.json", b'{"a": 1}\n{"a": 2}', r"not JSON .*JSON lines belong in \.jsonl"),
        ("a.json", b"[]", "holds no rows"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b"{}\n", "columns seen: none"),
        ("a.csv", b"a,b\n", r"not a problem file; expected \.jsonl, \.json, \.parquet"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet cannot be read by datasets: Parquet"),
        ("a.parquet", b"", r"a\.parquet cannot be read by datasets"),
        ("a.arrow", b"nothing", r"a\.arrow cannot be read by datasets"),
    ],
)
def test_files_of_another_kind(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_problems(str(tmp_path / name))


def test_a_split_that_is_not_there_leaves_no_temporary_folder(tmp_path, monkeypatch):
    write_parquet(tmp_path / "data" / "train.parquet", [qa(1)])
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(ValueError, match="has no split 'dev'") as caught:
        load_problems(f"{tmp_path / 'data'}@dev")
    assert caught.value and not list((tmp_path / "temporary").iterdir())


def test_truncated_parquet_is_refused(tmp_path):
    path = Path(write_parquet(tmp_path / "a.parquet", [qa(i) for i in range(50)]))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot be read by datasets"):
        load_problems(str(path))


def test_json_faults_name_the_row_from_one(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([qa(1), 5, qa(2, answer=[])]))
    with pytest.raises(
        ValueError, match=r"a\.json row 2: .*got a number\n.*a\.json row 3: .*got list"
    ):
        load_problems(str(tmp_path / "a.json"))


def test_missing_path_lists_what_is_near(tmp_path):
    write_jsonl(tmp_path / "train_hard.jsonl", [qa(1)])
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError) as caught:
        load_problems(str(tmp_path / "train_hrad.jsonl"))
    message = str(caught.value)
    assert "train_hrad.jsonl does not exist" in message
    assert "did you mean" in message and "holds: train_hard.jsonl" in message
    assert "notes.txt" not in message
    with pytest.raises(ValueError, match=r"holds: train_hard\.jsonl"):
        load_problems(str(tmp_path / "no" / "such" / "folder"))


def test_missing_relative_path(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "train.jsonl", [qa(1)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"did you mean train\.jsonl\?"):
        load_problems("trian.jsonl")
    with pytest.raises(ValueError, match=r"data/x\.jsonl does not exist"):
        load_problems("data/x.jsonl")


# ---- folders and splits


def answers(source: str, **settings) -> list[str]:
    return [p.answer for p in load_problems(source, **settings)[0]]


def test_sharded_folder_and_choice_of_split(tmp_path):
    folder = tmp_path / "set"
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", [qa(1), qa(2), qa(3)])
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", [qa(4)])
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", [qa(9)])
    (folder / "dataset_infos.json").write_text("{}")
    write_jsonl(folder / ".cache" / "train.jsonl", [qa(77)])
    problems, report = load_problems(str(folder))
    assert [p.answer for p in problems] == ["2", "3", "4", "5"]
    assert problems[3].source == f"{folder}@train row 4"
    assert (report.split, report.note) == ("train", "split 'train' of train, test")
    assert answers(str(folder), purpose="test") == ["10"]
    assert answers(f"{folder}@test") == ["10"]
    with pytest.raises(ValueError, match="no split 'dev'; it has: train, test"):
        load_problems(f"{folder}@dev")


def test_evaluation_data_in_a_split_called_train(tmp_path):
    write_parquet(tmp_path / "aime" / "data" / "train-00000-of-00001.parquet", [qa(1)])
    problems, report = load_problems(str(tmp_path / "aime"), purpose="test")
    assert len(problems) == 1
    assert report.note == "split 'train', the only one"


def test_several_splits_without_the_wanted_one(tmp_path):
    for name in ("cot-00000-of-00001", "tir-00000-of-00001"):
        write_jsonl(tmp_path / "omr" / f"{name}.jsonl", [qa(1)])
    with pytest.raises(ValueError, match=r"none called 'train': cot, tir; name one: .*omr@cot"):
        load_problems(str(tmp_path / "omr"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["main/train.jsonl", "socratic/train.jsonl"], "several datasets .main, socratic."),
        (["train.jsonl", "test.parquet"], "cannot be read by datasets: .*same data file format"),
        ([], r"holds no \.jsonl, \.json"),
    ],
)
def test_folders_that_are_not_one_dataset(names, message, tmp_path):
    for name in names:
        (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / name, [qa(1)])
    with pytest.raises(ValueError, match=message):
        load_problems(str(tmp_path))


def test_split_folders(tmp_path):
    write_jsonl(tmp_path / "train" / "0000.jsonl", [qa(1)])
    write_jsonl(tmp_path / "test" / "0000.jsonl", [qa(2)])
    assert answers(str(tmp_path)) == ["2"]
    assert answers(str(tmp_path), purpose="test") == ["3"]


def test_a_single_file_has_no_split(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [qa(1)])
    with pytest.raises(ValueError, match="is one file and has no splits; remove @test"):
        load_problems(f"{source}@test")


def test_folders_saved_by_datasets(tmp_path):
    made = datasets.Dataset.from_list
    made([qa(1), qa(2)]).save_to_disk(tmp_path / "one")
    assert answers(str(tmp_path / "one")) == ["2", "3"]
    splits = {"train": made([qa(3)]), "test": made([qa(4)])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict")
    assert answers(str(tmp_path / "dict")) == ["4"]
    assert answers(str(tmp_path / "dict"), purpose="test") == ["5"]


def test_one_fault_is_not_plural(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl has 1 fault; correct"):
        load_problems(str(path))


# ---- optional packages and the hub


def test_missing_packages_name_their_extra(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "a.parquet", [qa(1)])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match=r"a\.parquet needs .*pip install -e '\.\[datasets\]'"):
        load_problems(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match=r"no file .* org/name.*pip install -e '\.\[datasets\]'"):
        load_problems("org/name:main@test")


def test_nothing_is_written_but_to_a_temporary_folder(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "set" / "train.parquet", [qa(1)])
    home = tmp_path / "home"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert answers(source) == answers(str(tmp_path / "set")) == ["2"]
    assert not home.exists() and not list((tmp_path / "temporary").iterdir())


def test_hub_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []

    def load_dataset(name, config, *, streaming, cache_dir):
        assert streaming and Path(cache_dir).is_dir()
        calls.append((name, config))
        if name == "org/gone":
            raise FileNotFoundError("gone")
        made = datasets.Dataset.from_list
        return {"train": made([qa(1)]), "test": made([qa(1), qa(2)])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    problems, report = load_problems("org/name:main@test")
    assert calls == [("org/name", "main")]
    assert problems[1].source == "org/name:main@test row 2"
    assert report.note == "split 'test', as asked"
    load_problems("org/name", purpose="train")
    assert calls[-1] == ("org/name", None)
    with pytest.raises(RuntimeError, match="could not be loaded: gone"):
        load_problems("org/gone")
