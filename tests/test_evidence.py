"""The cells of the evidence: each a run of its own on the same problems, whole solutions right."""

import json

from benchmarks import evidence
from benchmarks.quickstart_task import task
from intfast.study import compare


def test_cells_have_folders_of_their_own_and_settings_that_a_comparison_takes(tmp_path):
    assert len({cell.name for cell in evidence.CELLS}) == len(evidence.CELLS)
    for cell in evidence.CELLS:
        data = evidence._problems(tmp_path, 0, cell.q, {"train": 4, "test": 2}, cell.rewrite)
        words = [evidence.CONFIG, *data, *cell.words(), f"run={tmp_path / cell.name}"]
        plan = compare.read_plan(words)
        config = plan.config("reference_rl", plan.seeds[0])
        updates = config.attempts.max_problems * config.sft.epochs
        assert updates == 96 * (16 if cell.strength == "hard" else 8)


def test_a_programs_rewrites_are_right_and_lack_only_what_the_reference_lacks():
    for row in task.problem_rows(0, "train", 30):
        whole = evidence._rewritten(row, 0.0)["reference_solution"]
        assert task.first_wrong_step(row["problem"], whole) is None
        partial = evidence._rewritten(row, 1.0)["reference_solution"]
        *steps, answer = partial.split(" ; ")
        assert answer == f"ans {row['answer']}"
        stated = row["reference_solution"].split(" , ")[:-1]
        assert {step.split()[0] for step in steps} == {line.split()[-2] for line in stated}


def test_what_is_drawn_is_shared_once_it_is_whole(tmp_path):
    whole, begun = (tmp_path / name / "seed-3/collection" for name in ("a", "b"))
    for folder, more in ((whole, ["interventions.jsonl"]), (begun, [])):
        folder.mkdir(parents=True)
        for name in (*evidence.SHARED, *more):
            (folder / name).write_text(json.dumps(str(folder)))
    evidence._share(tmp_path, tmp_path / "c", "3,4")
    given = tmp_path / "c/seed-3/collection"
    assert {path.name for path in given.iterdir()} == set(evidence.SHARED)
    assert all(json.loads(path.read_text()) == str(whole) for path in given.iterdir())
    assert not (tmp_path / "c/seed-4").exists()
