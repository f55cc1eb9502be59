"""Several ranks against one process: what is dealt, gathered, summed, written, stopped and lost.

Worlds are started as users start them, as processes with a limit of their own; see ranks_worker.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from small_run import MODEL

from intfast import plan, ranks, train
from intfast.config import Config
from intfast.engine import device, memory
from intfast.model.decoder import Architecture
from intfast.ranks import Ranks
from intfast.state import checkpoint
from intfast.study import __main__ as study

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("ranks_worker.py")
LIMIT_S = 400


class World:
    """A started world, or one process; `end` waits for it."""

    WORKER = WORKER

    def __init__(self, num: int | None, *words: object, fault: str = "") -> None:
        """num: ranks of torchrun; None without it."""
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num)]
        self.mark = uuid.uuid4().hex
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MARK": self.mark}
        self.process = subprocess.Popen(
            [sys.executable, *(launch if num else []), str(self.WORKER), *map(str, words)],
            env=environment | {"GLOO_SOCKET_IFNAME": "lo", "FAULT": fault},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )

    def end(self) -> tuple[int, str]:
        """(exit code, all that was printed); nothing of it lives on."""
        try:
            said, _ = self.process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert not list(living(self.mark)), said
        return self.process.returncode, said


def living(mark: str):
    """The processes that have a mark in their environment."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                yield path.parent.name
        except OSError:
            continue


def sound(num: int | None, *words: object) -> str:
    code, said = World(num, *words).end()
    assert code == 0, said
    return said


def codes(said: str) -> set[str]:
    """The exit codes of ranks, as torchrun lists them; those that it ended itself have -15."""
    return set(re.findall(r"exitcode\s+: (-?\d+)", said)) - {"-15"}


def tensors(run: Path, stage: str, step: int) -> dict[str, torch.Tensor]:
    paths = sorted((run / f"checkpoints/{stage}/step-{step:06d}").glob("tensors*"))
    if len(paths) == 1:
        return load_file(paths[0])
    return {name: part.detach() for name, part in checkpoint._parts(paths).items()}


def gap(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest difference of a weight, over the largest weight of its parameter."""
    assert left.keys() == right.keys()
    assert all(left[n].shape == right[n].shape for n in left)
    model = [name for name in left if name.startswith("model.")]
    return max(float((left[n] - right[n]).abs().max() / left[n].abs().max()) for n in model)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def rows(run: Path, *keys: str) -> list[list]:
    """These values of all rows of metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    return [
        [row.get(key) for key in ("stage", "step", *keys)]
        for row in map(msgspec.json.decode, lines)
    ]


def near(left: list[list], right: list[list], rel: float) -> bool:
    """Whether rows are the same, but for the last digits of their fractions."""
    bound = [
        [pytest.approx(x, rel=rel, abs=1e-8) if isinstance(x, float) else x for x in row]
        for row in right
    ]
    return left == bound


# --- without processes -------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_item_is_dealt_once(world):
    draw = torch.Generator().manual_seed(world)
    for num in (0, 1, 5, 40):
        sizes = torch.randint(1, 100, (num,), generator=draw).tolist()
        shares = Ranks(0, world).deal(sizes)
        assert shares == Ranks(world - 1, world).deal(sizes) and len(shares) == world
        assert sorted(index for share in shares for index in share) == list(range(num))
        assert all(share == sorted(share) for share in shares)
        load = [sum(sizes[index] for index in share) for share in shares]
        # The largest first: never apart by more than one item.
        assert max(load) - min(load) <= max(sizes, default=0)
    groups = [["a", "b", "c"], [], ["d"], ["e", "f"]]
    found = [Ranks(rank, world).share(groups) for rank in range(world)]
    dealt = [(p, g) for mine, _ in found for p, group in enumerate(mine) for g in group]
    assert sorted(dealt) == [(0, 0), (0, 1), (0, 2), (2, 0), (3, 0), (3, 1)]
    for mine_P, items_P in found:
        assert items_P == [[x[g] for g in m] for x, m in zip(groups, mine_P, strict=True)]
        # Not by groups: no rank has two more than another.
        assert abs(sum(map(len, items_P)) - 6 / world) < 1
    parts = [Ranks(rank, world).part(torch.arange(48).view(6, 8)) for rank in range(world)]
    assert torch.equal(torch.cat([part.flatten() for part in parts]), torch.arange(48))


def test_one_process_waits_for_nobody_and_starts_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    with ranks.joined(None, 1.0) as one:
        assert (one.rank, one.world, one.neighbours, one.name) == (0, 1, 1, "")
        assert one is ranks.now() and one.is_main and not one.waiting
        made = [object()]
        assert one.gather(made[0]) == made and one.agree(7) == 7
        assert one.first(lambda: made) is made and one.together([[0]], [made]) == [made]
        assert one.deal([3, 4]) == [[0, 1]] and one.collect([[0]], made) is made
        tensor = torch.ones(3, 2)
        assert one.part(tensor) is tensor and one.sum(tensor) is tensor
        with one.in_turn() as is_mine:
            assert is_mine
    assert not torch.distributed.is_initialized()


def test_fewer_cards_than_ranks_are_refused(monkeypatch):
    told = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "here")
    assert ranks.launched().world == 1  # and no port: of another launcher
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(device, "_cuda_fault", lambda: ("", True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device.pick_device(Config()) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeError, match=r"4 ranks on this machine, but 2 GPUs.*CUDA_VISIBLE"):
        device.pick_device(Config())


def test_a_dry_run_plans_other_worlds(capsys):
    words = [str(ROOT / "configs/quickstart_short.toml"), "data.train_limit=4", "run=none"]
    assert train.main([*words, "--dry-run", "--ranks", "4"]) == 0
    said = capsys.readouterr().out
    assert "Layout: 4 ranks, data parallel" in said and "AdamW moments, fp32, 1/4" in said
    assert f"torchrun --standalone --nproc-per-node 4 -m intfast.train {shlex.join(words)}" in said
    assert train.main([*words, "--dry-run"]) == 0 and "Layout" not in capsys.readouterr().out
    assert train.main([*words, "--dry-run", "--ranks", "7"]) == 2
    assert "7 ranks do not divide" in capsys.readouterr().err
    assert train.main([*words, "--dry-run", "--ranks"]) == 2


def test_the_plan_deals_what_is_dealt():
    architecture = Architecture.from_hf(MODEL)
    num = memory.num_parameters(architecture)

    def needs(world):
        planned = memory.Plan(Config(), architecture, memory.Target("cuda", "vllm", 1, 1, world))
        return {item.what.split(",")[0]: item.training for item in planned.items()}, planned

    one, _ = needs(1)
    four, planned = needs(4)
    per = [one[name] / num for name in ("weights", "fp32 masters", "AdamW moments", "gradients")]
    assert per == [2, 4, 8, 4]
    per = [four[name] / num for name in ("weights", "fp32 masters", "AdamW moments", "gradients")]
    assert sum(per) == pytest.approx(2 + 4 + 12 / 4, abs=1e-3)
    said = "\n".join(plan.layout(planned, ["a b.toml", "rl.steps=3"]))
    assert "--nproc-per-node 4 -m intfast.train 'a b.toml' rl.steps=3" in said
    assert f"{4 * num * 3 / 4 / 1e9:.3g} GB of gradients" in said
    assert not memory.indivisible(architecture, 4)
    with pytest.raises(ValueError, match=r"7 ranks do not divide .* first model\.embed_tokens"):
        list(plan.layout(needs(7)[1], []))


# --- two ranks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of one process, one/, and of two ranks, two/, with what two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "two").mkdir()
    sound(None, "runs", folder / "one", "full", "rl")
    sound(2, "world", folder / "two", "full", "rl")
    return folder


def test_records_are_those_of_one_process_byte_for_byte(runs):
    names = sorted(path.name for path in (runs / "one/full").glob("*.jsonl"))
    assert "continuations.jsonl" in names and "example_logprobs.jsonl" in names
    for name in {*names, "evaluations.json"} - {"metrics.jsonl"}:
        found = [(runs / world / "full" / name).read_bytes() for world in ("one", "two")]
        assert found[0] == found[1] and found[0], name
    # The same files, nothing left over, and the same counts in the rows.
    left, right = ({p.name for p in (runs / w / "full").iterdir()} for w in ("one", "two"))
    assert left == right
    keys = ("reward", "graded", "accuracy", "num_tokens", "examples", "loss")
    assert near(*(rows(runs / world / "full", *keys) for world in ("one", "two")), rel=1e-6)
    starts = msgspec.json.decode((runs / "two/full/manifest.json").read_bytes())["starts"]
    assert [start["ranks"] for start in starts] == [2]


def test_updates_are_those_of_one_process_to_rounding(runs):
    keys = ("reward", "zero_advantage", "length", "updates")
    assert rows(runs / "one/rl", *keys) == rows(runs / "two/rl", *keys)
    # Every step had a group with variance, or this would show nothing.
    assert len([row for row in rows(runs / "one/rl", "grad_norm") if row[2]]) == 3
    found = [rows(runs / w / "rl", "grad_norm", "loss", "kl_mean") for w in ("one", "two")]
    assert near(*found, rel=1e-4)
    one, two = (tensors(runs / world / "rl", "base_rl", 3) for world in ("one", "two"))
    assert gap(one, tensors(runs / "one/rl", "base_rl", 2)) > 0 and gap(one, two) < 1e-5
    found = msgspec.json.decode((runs / "two/world.json").read_bytes())
    for name, apart in found["updates"].items():
        # Chance takes a square of other last bits the other way.
        bound = 1e-3 if "short" in name else 1e-5
        assert apart["weights"] < bound and apart["grad_norm"] < 1e-6, name
        assert apart["loss"] < 1e-6 and not apart["apart"], name
    # Bytes a parameter of masters and moments, in bfloat16: of two ranks, of one process.
    assert found["state"] == [6, 12, 6, 12, 5, 10, 3, 6]
    # Gradients that are dealt in every micro-batch; and chance that went by rank, to be seen.
    assert {"dealt, fp32", "dealt, split", "dealt, short"} <= found["updates"].keys()
    assert found["apart"][0] > 1e-4
    # Not finite on one rank: nobody steps, and all say the same as one process.
    assert found["skipped"] == {"weights": 0.0, "apart": 0.0}
    assert len({tuple(causes) for causes in found["causes"]}) == 1
    assert found["first"] == [1, 1]


def test_mutants_of_the_update_are_seen(runs):
    found = msgspec.json.decode((runs / "two/world.json").read_bytes())["mutants"]
    assert len(found) == 11
    for name, apart in found.items():
        shows = "loss" if "loss" in name else "weights"
        assert apart[shows] > 1e-3, name
        assert apart["apart"] == ("gather" in name), name


def test_memory_of_a_rank_is_as_planned(runs):
    """Against the peak of torch's allocator, in each of two ranks; gloo's own part left out."""
    found = msgspec.json.decode((runs / "two/world.json").read_bytes())["memory"]
    assert [len(rank) for rank in found] == [5, 5]
    for rank in found:
        for words, (planned, peak) in rank.items():
            assert 0.85 < planned / peak < 1.15, words
        whole, dealt, _, split, short = (peak for _, peak in rank.values())
        assert whole > dealt > split > short


def test_ranks_write_beside_the_steps_and_all_at_once(runs):
    found = msgspec.json.decode((runs / "two/world.json").read_bytes())
    assert found["beside"]
    names = sorted(p.name for p in (runs / "two/rl/checkpoints/base_rl/step-000003").iterdir())
    parts = [f"tensors-{rank:02}-of-02.safetensors" for rank in range(2)]
    assert names == ["manifest.json", "state.json", *parts]


class Together(Ranks):
    """One process in place of rank 0: what all gather is given."""

    def gather(self, mine):
        return self.found


def write_as(stage, step, tensors, world, monkeypatch):
    """A checkpoint that so many ranks wrote, one after the other."""
    checkpoint.begin(stage, step)
    found = []
    for rank in range(world):
        with monkeypatch.context() as patch:
            patch.setattr(ranks, "_now", Ranks(rank, world))
            found.append(checkpoint.write(stage, step, checkpoint.own(tensors), {"step": step}))
    together = Together()
    together.found = found
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "_now", together)
        return checkpoint.commit(stage, step, found[0])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_whatever_number_of_ranks_wrote_is_read_whole(tmp_path, monkeypatch, world):
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "w": torch.randn(6, 4, generator=draw),
        "h": torch.randn(16, generator=draw).bfloat16(),
        "s": torch.tensor(1.5).view(1).repeat(4),
    }
    folder = write_as(tmp_path, 3, tensors, world, monkeypatch)
    step, found, state = checkpoint.latest(tmp_path, pytest.fail)
    assert (step, state) == (3, {"step": 3}) and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(found[name].detach(), tensor)
    # Each rank its share and no more.
    sizes = [path.stat().st_size for path in folder.glob("tensors*")]
    assert len(sizes) == world and max(sizes) < 144 // world + 500


@pytest.mark.parametrize("fault", ["missing", "flipped", "short", "of another world"])
def test_a_damaged_file_of_one_rank_is_passed_over(tmp_path, monkeypatch, fault):
    write_as(tmp_path, 1, {"w": torch.ones(8)}, 2, monkeypatch)
    folder = write_as(tmp_path, 2, {"w": torch.full((8,), 2.0)}, 2, monkeypatch)
    path = folder / "tensors-01-of-02.safetensors"
    data = path.read_bytes()
    if fault == "missing":
        path.unlink()
    elif fault == "of another world":
        path.rename(folder / "tensors-01-of-03.safetensors")
    else:
        path.write_bytes(data[:-1] + (b"" if fault == "short" else bytes([data[-1] ^ 1])))
    said = []
    step, found, _ = checkpoint.latest(tmp_path, said.append)
    assert step == 1 and torch.equal(found["w"].detach(), torch.ones(8))
    assert len(said) == 1 and "tensors-01-of-02.safetensors" in said[0]


def test_what_is_not_finite_on_one_rank_is_saved_by_none(tmp_path, monkeypatch):
    bad = {"w": torch.ones(8), "m": torch.tensor([1.0, 1.0, 1.0, float("nan")])}
    with pytest.raises(ValueError, match="nan or inf in m;"):
        write_as(tmp_path, 1, bad, 2, monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_differ_are_refused_by_name(runs):
    found = msgspec.json.decode((runs / "two/world.json").read_bytes())["guards"]
    assert found["same"] == found["same weights"] == found["stop inside"] == ["", ""]
    for name, words in (
        ("data", "Refused: rank 1: data is"),
        ("folder", "Refused: rank 1: sees another folder"),
        ("weights", "RuntimeError: parity of step 3: rank 1 holds other weights than rank 0 in 1"),
        # Asked of one rank, done by both.
        ("stop where they meet", "Stopped: stopped by SIGTERM"),
    ):
        assert found[name][0] == found[name][1] and found[name][0].startswith(words), name


def test_a_world_of_one_is_no_world(runs):
    sound(1, "runs", runs / "single", "rl")
    assert equal(tensors(runs / "single/rl", "base_rl", 3), tensors(runs / "one/rl", "base_rl", 3))
    keys = ("reward", "loss", "grad_norm")
    assert rows(runs / "single/rl", *keys) == rows(runs / "one/rl", *keys)


def test_a_killed_rank_ends_all_and_any_world_continues(runs):
    killed = runs / "killed"
    code, said = World(2, "train", "rl", f"run={killed}", fault="kill:1:3").end()
    assert code != 0 and "-9" in codes(said), said
    shutil.copytree(killed, runs / "moved")
    sound(2, "train", "rl", f"run={killed}")
    assert equal(tensors(killed, "base_rl", 3), tensors(runs / "two/rl", "base_rl", 3))
    # What two ranks saved, one process reads, and says so.
    said = sound(None, "train", "rl", f"run={runs / 'moved'}")
    assert "not bit for bit: ranks was 2, is 1" in said, said
    assert gap(tensors(runs / "moved", "base_rl", 3), tensors(runs / "two/rl", "base_rl", 3)) < 1e-5


def test_one_rank_that_fails_or_stops_ends_all(runs):
    # At once: two worlds on one machine do not meet.
    raised = World(2, "train", "rl", f"run={runs / 'raised'}", fault="raise:1:2")
    stopped = World(2, "train", "rl", f"run={runs / 'stopped'}", fault="stop:1:2")
    code, said = raised.end()
    assert code != 0 and "rank 1: error: planted" in said, said
    code, said = stopped.end()
    assert code != 0 and codes(said) == {"143"}, said
    assert "step 2 is saved" in said and said.count("stopped by SIGTERM;") == 1, said
    assert equal(tensors(runs / "stopped", "base_rl", 2), tensors(runs / "two/rl", "base_rl", 2))
    # Without torchrun nobody would end the others: they end after the step, and saved it.
    hung = World(2, "train", "rl", f"run={runs / 'stopped'}", fault="orphan:0:3")
    code, said = hung.end()
    assert code == -9 and "step 3 is saved" in said, said
    assert equal(tensors(runs / "stopped", "base_rl", 3), tensors(runs / "two/rl", "base_rl", 3))


@pytest.mark.parametrize("who,whose", [("1", "rank 1: "), ("all", "")])
def test_what_ranks_miss_is_said_once_before_any_work(tmp_path, who, whose):
    run = tmp_path / "none"
    code, said = World(2, "train", "rl", f"run={run}", fault=f"path:{who}:0").end()
    assert code != 0 and not run.exists()
    assert re.findall("error: (.*)", said)[0] == f"{whose}data.train: there is no such file", said
    assert said.count("no such file") == 1, said


@pytest.mark.parametrize("command", ["report", "compare", "ablate", "regrade"])
def test_commands_of_one_process_are_refused_under_torchrun(monkeypatch, capsys, tmp_path, command):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("RANK", "0")
    file = tmp_path / "c.toml"
    file.write_text("")
    assert study.main([command, str(file)]) == 2
    said = capsys.readouterr().err
    assert said == "error: this command is of one process, got 2 ranks; start it without torchrun\n"


def test_a_rank_that_hangs_ends_itself_and_all(runs):
    hangs = ["train", "rl", f"run={runs / 'hangs'}", "watchdog_s=12"]
    code, said = World(2, *hangs, fault="hang:1:2").end()
    assert code != 0 and "124" in codes(said), said
    # The other waited for it as long, and was not taken for stuck.
    assert re.findall(r"(.*)error: no progress for", said) == ["rank 1: "], said
