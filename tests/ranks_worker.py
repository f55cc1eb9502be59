"""What one rank of tests/test_ranks.py does; alone, or started by torch.distributed.run.

ranks_worker.py train NAME [key=value ...]     the command, with the fault that FAULT plants
ranks_worker.py runs FOLDER NAME...            whole runs, of the settings in RUNS
ranks_worker.py world FOLDER                   checks of a world of several, into world.json
FAULT=KIND:RANK:STEP                           at an RL step a rank raises, hangs, is killed, stops
                                               (raise, hang, kill, stop), or orphan: torchrun is;
                                               path: a file is missing before any work
"""

import inspect
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import small_run
import torch
from test_memory import measured_peak
from tiny import config_dict

from benchmarks.quickstart_task import base
from intfast import checks, cli, intake, loss, parity, pipeline, ranks, rl, train, update
from intfast.batch import pack
from intfast.config import BatchConfig, OptimConfig
from intfast.engine import memory
from intfast.model import optim
from intfast.model.decoder import Architecture, Decoder
from intfast.records import Example, Problem
from intfast.run import open_run
from intfast.state import checkpoint, interrupt, runfolder
from intfast.state.metrics import make_console
from intfast.state.saver import Saver
from intfast.study import finish

CONFIG = Path(__file__).parents[1] / "configs/quickstart_short.toml"
FEW = ["data.train_limit=6", "data.test_limit=3", "watchdog_s=120", "evaluate.samples=2"]
FEW += ["evaluate.ks=[1]", "analysis.texts=2", "rl.from_base=false"]
RUNS = {
    "full": [
        *("attempts.samples=4", "intervene.continuations=4", "sft.epochs=1", "rl.steps=1"),
        *("rl.problems_per_step=2", "rl.group_size=4"),
    ],
    # Two updates a step of several micro-batches each, and log-probs that are scored before them.
    "rl": [
        *("sft.epochs=0", "attempts.unsolved_only=false", "rl.steps=3", "rl.checkpoint_every=1"),
        *("rl.minibatches=2", "rl.policy.kl=0.01", "rl.group_size=8", "batch.max_tokens=512"),
        *("parity.every=1", "rl.sampling={temperature=1.5}"),
    ],
}


def rewards(groups_P_G):
    """In place of the grades: the model solves none of so few problems."""
    return [[float(sum(g.completion.token_ids) % 2) for g in group] for group in groups_P_G]


rl.rewards = rewards


def whole_run(arguments: list[str]) -> None:
    """A run from its problems to its page, in silence."""
    console = make_console()
    console.quiet = True
    with open_run(cli.load(str(CONFIG), [*FEW, *arguments]), console) as opened:
        finish.finish(opened, pipeline.train(opened))


# --- faults ------------------------------------------------------------------------------------


def plant(fault: str) -> None:
    """Let a rank fail when it comes to the updates of an RL step."""
    kind, rank, at = fault.split(":")
    if rank != "all" and int(rank) != ranks.launched().rank:
        return
    sound = rl.minibatches
    if kind == "path":

        def missing(config):
            raise ValueError("data.train: there is no such file")

        checks.check_paths = missing

    def faulty(opened, rollouts, advantages, step):
        if step == int(at):
            if kind == "raise":
                raise RuntimeError("planted")
            if kind == "hang":
                time.sleep(3600)
            # "orphan": torchrun itself is killed.
            who = os.getppid() if kind == "orphan" else os.getpid()
            os.kill(who, signal.SIGTERM if kind == "stop" else signal.SIGKILL)
        return sound(opened, rollouts, advantages, step)

    rl.minibatches = faulty


# --- updates, against one process --------------------------------------------------------------


def stage_of(decoder: Decoder, optimizer: optim.Optimizer) -> SimpleNamespace:
    """What an update needs of a stage."""
    engine = SimpleNamespace(weights_changed=lambda: None)
    opened = SimpleNamespace(
        decoder=decoder, device=torch.device("cpu"), sampler=SimpleNamespace(engine=engine)
    )
    return SimpleNamespace(run=opened, optimizer=optimizer, name="test")


def updates(
    dtype: torch.dtype, poison: float = 0.0, **how: object
) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """(masters and weights, rows) after three updates of a random model, clipped and decaying.

    poison  is added to the loss of the micro-batch that begins with the second sequence
    how     options of the optimizer
    """

    def loss_of(hidden_ND, head_VD, batch):
        total, stats = loss.sft_loss(hidden_ND, head_VD, batch)
        if poison and 1 in batch.examples_S:
            total = total + poison * hidden_ND.sum()
            stats = stats | {"loss_sum": stats["loss_sum"] + poison}
        return total, stats

    decoder = Decoder(Architecture.from_hf(small_run.MODEL))
    base.initialise(decoder, 0)
    decoder.to(dtype)
    config = OptimConfig(lr=0.005, weight_decay=0.5, max_grad_norm=0.1, schedule="constant")
    optimizer = optim.Optimizer(decoder.named_parameters(), config, 3, **how)
    stage = stage_of(decoder, optimizer)
    draw, rows = torch.Generator().manual_seed(1), []
    for _ in range(3):
        # Of different lengths, so that not every rank has as many.
        ids = [torch.randint(4, 60, (n,), generator=draw).tolist() for n in (30, 9, 21, 12, 40)]
        made = [Example(token_ids=x, weights=[0.0] + [1.0] * (len(x) - 1)) for x in ids]
        packed = pack(made, BatchConfig(max_tokens=44))
        rows.append(update.update(stage, packed, packed.weight_sum, loss_of))
    state = sum(t.nbytes for t in optimizer._state().values())
    rows[0]["state"] = state / sum(p.numel() for p in decoder.parameters())
    tensors, _ = optimizer.state_tensors()
    found = {
        name: torch.cat(ranks.now().gather(tensor.detach().clone())).view(tensor.shape)
        for name, tensor in tensors.items()
    }
    found |= {f"model.{name}": p.detach().clone() for name, p in decoder.named_parameters()}
    optimizer.close()
    return found, rows


def distance(found, truth, counted=("grad_norm", "loss")) -> dict[str, float]:
    """How far updates are from those of one process, relatively; whether ranks are apart."""
    (tensors, rows), (expected, right) = found, truth
    # A 16-bit weight may round the other way; its master tells.
    kept = [n for n in expected if expected[n].dtype == torch.float32]
    kept = [n for n in kept if n.startswith(("model.", "master."))]
    gaps = [float((tensors[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in kept]
    model = {n: t.double().sum().item() for n, t in tensors.items() if n.startswith("model.")}
    first, *others = ranks.now().gather(model)
    return {
        "weights": max(gaps, default=0.0),
        **{
            key: max(abs(a[key] / b[key] - 1) for a, b in zip(rows, right, strict=True))
            for key in counted
        },
        "apart": float(any(other != first for other in others)),
    }


def changed(method: str, body) -> None:
    """Let a method of Ranks be another one where there are several."""
    sound = getattr(ranks.Ranks, method)
    changed.back = lambda: setattr(ranks.Ranks, method, sound)
    setattr(
        ranks.Ranks,
        method,
        lambda self, *given: (body if self.world > 1 else sound)(self, *given),
    )


def decay_by_part() -> None:
    """Let the optimizer ask its flat parts whether they are matrices."""
    source = inspect.getsource(optim)
    assert source.count("self._parameters[name].ndim > 1") == 1
    planted = source.replace("self._parameters[name].ndim > 1", "self._masters[name].ndim > 1")
    space = {"__name__": "planted"}
    sys.modules["planted"] = sys.modules[optim.__name__]
    exec(compile(planted, "planted", "exec"), space)
    sound = optim.Optimizer
    changed.back = lambda: setattr(optim, "Optimizer", sound)
    optim.Optimizer = space["Optimizer"]


def parted() -> None:
    """Let the ranks of a dealt gradient round each for itself where squares are short."""
    sound = optim.adamw
    changed.back = lambda: setattr(optim, "adamw", sound)
    optim.adamw = lambda *columns, part, **how: sound(*columns, part=0, **how)


def memory_of(folder: Path) -> dict[str, list[float]]:
    """Setting -> [bytes by the plan, at most] of an update: optimizer, gradients, micro-batch.

    Without what gloo holds: its threads let go of a tensor when they come to it.
    """
    here = ranks.now()
    here.reduce = lambda tensor: here.part(tensor).clone()
    here.spread = lambda tensor: None
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 768, "head_dim": 32}
    shape |= {"num_hidden_layers": 6, "max_position_embeddings": 512}
    architecture = Architecture.from_hf(config_dict("qwen3", **shape))
    made = [Example(token_ids=[5] * 65, weights=[0.0] + [1.0] * 64) for _ in range(4)]
    packed = pack(made, BatchConfig(max_tokens=65))
    found = {}
    for words in (
        [],
        ["ranks.gradients=dealt"],
        ["model.dtype=float32", "ranks.gradients=dealt"],
        ["model.optimizer_state=split", "ranks.gradients=dealt"],
        ["model.optimizer_state=short", "ranks.gradients=dealt"],
    ):
        words = ["model.dtype=bfloat16", "model.activation_checkpointing=false", *words]
        words.append(f"run={folder}")
        config = cli.load(str(CONFIG), words)
        target = memory.Target("cpu", "native", 2**40, 2**40, ranks.now().world)
        plan = memory.Plan(config, architecture, target).changed("batch.max_tokens", 65)
        named = ("fp32 masters", "AdamW", "gradients", "a micro-batch")
        planned = sum(item.training for item in plan.items() if item.what.startswith(named))
        decoder = Decoder(architecture, getattr(torch, config.model.dtype))
        for parameter in decoder.parameters():
            parameter.data.normal_(0, 0.02)

        def work(decoder=decoder, config=config) -> None:
            optimizer = optim.Optimizer(
                decoder.named_parameters(), OptimConfig(), 3,
                state=config.model.optimizer_state, dealt=config.ranks.gradients == "dealt",
            )  # fmt: skip
            for _ in range(2):
                update.update(stage_of(decoder, optimizer), packed, 1.0, loss.sft_loss)

        found[" ".join(words[2:-1]) or "whole"] = [planned, measured_peak(work)]
    del here.reduce, here.spread
    return found


def saved_beside(folder: Path) -> bool:
    """Whether ranks that write in a thread leave what was there when they were asked to."""
    decoder = Decoder(Architecture.from_hf(small_run.MODEL), torch.bfloat16)
    base.initialise(decoder, 0)
    optimizer = optim.Optimizer(decoder.named_parameters(), OptimConfig(), 3, state="split")
    saver, model = Saver(folder, beside=True), dict(decoder.named_parameters())
    want = {name: p.detach().clone() for name, p in model.items()}
    saver.save(1, model | optimizer.state_tensors()[0], {"step": 1})
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    assert not list(folder.glob("step-*"))  # a checkpoint only where all say so
    while saver._writing is not None:
        saver.check()
    optimizer.close()
    _, found, state = checkpoint.latest(folder, print)
    same = all(torch.equal(found[name].detach(), tensor) for name, tensor in want.items())
    return same and state == {"step": 1}


MUTANTS = {
    "no reduce": lambda: changed("reduce", lambda self, tensor: self.part(tensor).clone()),
    "no gather": lambda: changed("spread", lambda self, tensor: None),
    "norm of own part": lambda: changed("sum", lambda self, number: number),
    "own loss": lambda: changed("collect", lambda self, shares, made: made),
    "decay by part": decay_by_part,
}


# --- a world -----------------------------------------------------------------------------------


def refused(work) -> list[str]:
    """What every rank raised, as "Name: text"; "" for one that raised nothing."""
    said = ""
    try:
        work()
    except (ValueError, RuntimeError, interrupt.Stopped) as error:
        said = f"{type(error).__name__}: {error}"
    return ranks.now().gather(said)


def guards(folder: Path) -> dict[str, list[str]]:
    """What ranks say that do not see, hold or want the same."""
    here = ranks.now()
    config = cli.load(str(CONFIG), [f"run={folder}"])
    problems = [Problem(id=f"{n}", problem=f"1 + {n}", answer="2") for n in range(2)]
    mine = folder / f"{here.rank}"
    mine.mkdir()
    decoder = Decoder(Architecture.from_hf(small_run.MODEL))
    base.initialise(decoder, 0)
    found = {
        "same": refused(lambda: intake.compare_ranks(config, problems)),
        "data": refused(lambda: intake.compare_ranks(config, problems[here.rank :])),
        "folder": refused(lambda: runfolder.meet(mine)),
        "same weights": refused(lambda: parity._check_ranks(decoder, "step 3")),
    }
    with torch.no_grad():
        next(decoder.parameters()).view(-1)[7] += here.rank * 1e-6
    found["weights"] = refused(lambda: parity._check_ranks(decoder, "step 3"))
    interrupt._State.requested = signal.SIGTERM if here.rank else None
    found["stop inside"] = refused(interrupt.check)
    found["stop where they meet"] = refused(lambda: interrupt.check(meets=True))
    interrupt._State.requested = None
    return found


def world(folder: Path) -> None:
    """Check the world that there is; rank 0 writes what was found."""
    found = {"guards": guards(folder), "updates": {}, "mutants": {}}
    for dtype in (torch.float32, torch.bfloat16):
        with ranks.alone():
            truth = updates(dtype)
        made = updates(dtype)
        found["updates"][str(dtype)] = distance(made, truth)
        found["state"] = [made[1][0]["state"], truth[1][0]["state"]]
        for name, mutate in MUTANTS.items():
            mutate()
            found["mutants"][f"{name}, {dtype}"] = distance(updates(dtype), truth)
            changed.back()
    narrow = torch.bfloat16
    for state in ("fp32", "split", "short"):
        with ranks.alone():
            truth = updates(narrow, state=state)
        made = updates(narrow, state=state, dealt=True)
        found["updates"][f"dealt, {state}"] = distance(made, truth)
        found["state"] += [made[1][0]["state"], truth[1][0]["state"]]
    MUTANTS["no reduce"]()
    found["mutants"]["no reduce, dealt"] = distance(updates(narrow, dealt=True), truth)
    changed.back()
    parted()
    found["apart"] = [distance(updates(narrow, state="short", dealt=True), made, ())["weights"]]
    changed.back()
    found["memory"] = ranks.now().gather(memory_of(folder))
    found["beside"] = saved_beside(folder / "beside")
    with ranks.alone():
        still = updates(torch.float32, float("nan"))
    found["skipped"] = distance(updates(torch.float32, float("nan")), still, ())
    causes = [row.get("cause") for row in updates(torch.float32, float("nan"), dealt=True)[1]]
    found["causes"] = [*ranks.now().gather(causes), [row["cause"] for row in still[1]]]
    # A rank alone, in the midst of several.
    found["first"] = ranks.now().gather(ranks.now().first(lambda: ranks.now().world))
    if ranks.now().is_main:
        (folder / "world.json").write_text(json.dumps(found))


def main(kind: str, *rest: str) -> int:
    """See the top."""
    if kind == "train":
        if fault := os.environ.get("FAULT"):
            plant(fault)
        return train.main([str(CONFIG), *FEW, *RUNS[rest[0]], *rest[1:]])
    with ranks.joined(lambda: torch.device("cpu"), 60):
        if kind == "world":
            world(Path(rest[0]))
        for name in rest[1:]:
            run = Path(rest[0]) / name
            whole_run([f"run={run}", *RUNS[name]])
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
