"""What one rank of tests/test_shards_world.py does, started by torch.distributed.run.

shards_worker.py FOLDER TP             updates of shards against one process, into FOLDER/world.json
shards_worker.py FOLDER TP MODEL       vLLM on that model folder, its own shards trained
shards_worker.py FOLDER TP MODEL break the same, with a broken alias on the last rank
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from engine_cases import request, vllm
from ranks_worker import refused
from tiny import config_dict

from benchmarks.quickstart_task import base
from intfast import loss, parity, ranks, update
from intfast.batch import pack
from intfast.config import BatchConfig, OptimConfig
from intfast.model import optim, shards, weights
from intfast.model.architecture import Architecture
from intfast.model.decoder import Decoder
from intfast.model.shards import Shards
from intfast.records import Example
from intfast.state import checkpoint

MODEL = config_dict("qwen3", num_attention_heads=8, num_key_value_heads=4, vocab_size=152)
CONFIG = OptimConfig(lr=0.005, weight_decay=0.5, max_grad_norm=0.1, schedule="constant")
STEPS = 3


def opened(dtype):
    """(run, optimizer) on the same random weights, whole or in shards."""
    config = Architecture.from_hf(MODEL)
    whole = Decoder(config)
    base.initialise(whole, 0)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + torch.arange(parameter.numel()) % 3 / 5)
    here = ranks.now()
    own = Shards(config, here) if here.tp > 1 else None
    decoder = Decoder(config, dtype, shards=own)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(shards.own(own, name, whole.get_parameter(name)))
    optimizer = optim.Optimizer(decoder.named_parameters(), CONFIG, STEPS, own)
    engine = SimpleNamespace(weights_changed=lambda: None)
    run = SimpleNamespace(
        decoder=decoder, device=torch.device("cpu"), sampler=SimpleNamespace(engine=engine)
    )
    return run, optimizer


def step(run, optimizer, number, poison=None):
    """The row of one update; poison: the parameter that gets a gradient that is not finite."""
    draw = torch.Generator().manual_seed(number)
    ids = [torch.randint(4, 150, (n,), generator=draw).tolist() for n in (30, 9, 21, 12, 40)]
    made = [Example(token_ids=x, weights=[0.0] + [1.0] * (len(x) - 1)) for x in ids]
    packed = pack(made, BatchConfig(max_tokens=44))

    def loss_of(hidden_ND, head_VD, batch, **dealt):
        total, stats = loss.sft_loss(hidden_ND, head_VD, batch, **dealt)
        if poison and ranks.now().tp_rank == ranks.now().tp - 1:
            # A loss of the same value, whose gradient by one shard is not a number.
            total = total + (0 * run.decoder.get_parameter(poison).sum()).sqrt()
        return total, stats

    stage = SimpleNamespace(run=run, optimizer=optimizer, name="test")
    return update.update(stage, packed, packed.weight_sum, loss_of)


def whole(part):
    """A tensor of a checkpoint, made of the parts of all ranks."""
    if isinstance(part, torch.Tensor):
        return part.detach().clone()
    flat = ranks.now().gather(part.detach().clone())

    def shard(rank):
        parts = [x.reshape(-1) for x in flat[rank :: ranks.now().tp]]
        return torch.cat(parts).view(part.shard_shape(rank))

    return part.joined(shard)


def tensors(run, optimizer):
    """Everything that a checkpoint takes of this rank."""
    state, counters = optimizer.state_tensors()
    found = {f"optim.{name}": tensor for name, tensor in state.items()}
    found |= {f"model.{name}": tensor for name, tensor in shards.state(run.decoder).items()}
    return found, counters


def updated(dtype):
    """(tensors, rows) after all updates."""
    run, optimizer = opened(dtype)
    rows = [step(run, optimizer, number) for number in range(STEPS)]
    found = {name: whole(part) for name, part in tensors(run, optimizer)[0].items()}
    optimizer.close()
    return found, rows


def distance(found, truth):
    """How far from one process, relatively; on rank 0."""
    (tensors, rows), (expected, right) = found, truth
    kept = [n for n in expected if expected[n].dtype == torch.float32]
    kept = [n for n in kept if n.startswith(("model.", "optim.master."))]
    gaps = {
        n: float((tensors[n] - expected[n]).abs().max() / expected[n].abs().max())
        for n in kept
        if ranks.now().is_main
    }
    # Adam's first steps are near the sign of the gradient, so that weights show gross faults only.
    return {
        "weights": max(gaps.values(), default=0.0),
        "grad_norm": abs(rows[0]["grad_norm"] / right[0]["grad_norm"] - 1),
        "loss": max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(rows, right, strict=True)),
    }


def resumed(folder, dtype):
    """Whether what was saved after a step goes on to the same bits, from the files of all ranks."""
    run, optimizer = opened(dtype)
    step(run, optimizer, 0)
    found, counters = tensors(run, optimizer)
    checkpoint.save(folder, 1, found, {"optim": counters})
    rows = [step(run, optimizer, number) for number in (1, 2)]
    one = {name: p.detach().clone() for name, p in run.decoder.named_parameters()}
    run, optimizer = opened(dtype)
    _, stored, state = checkpoint.latest(folder, print)
    with torch.no_grad():
        for name, parameter in run.decoder.named_parameters():
            mine = stored[f"model.{name}"].detach()
            parameter.copy_(shards.own(run.decoder.shards, name, mine))
    moments = {k.removeprefix("optim."): x for k, x in stored.items() if k.startswith("optim.")}
    optimizer.load_state_tensors(moments, state["optim"])
    again = [step(run, optimizer, number) for number in (1, 2)]
    two = dict(run.decoder.named_parameters())
    same = all(torch.equal(one[name], two[name]) for name in one)
    return ranks.now().gather(same and rows == again)


def drifted(name):
    """What ranks say where the last of them holds another number in a parameter."""
    run, _ = opened(torch.float32)
    here = ranks.now()
    with torch.no_grad():
        run.decoder.get_parameter(name).view(-1)[3] += 1e-5 * (here.rank == here.world - 1)
    return refused(lambda: parity._check_ranks(run.decoder, "step 3"))


def counted_twice(self, grads):
    """The mutant: the norm takes what is whole on every rank from each of them."""
    left = optim.total_norm([*grads.values()]).square()
    return ranks.now().sum(left).sqrt().item()


def world(folder):
    here = ranks.now()
    found = {"updates": {}}
    for dtype in (torch.float32, torch.bfloat16):
        with ranks.alone():
            truth = updated(dtype)
        found["updates"][str(dtype)] = distance(updated(dtype), truth)
    with ranks.alone():
        truth = updated(torch.float32)
    sound = optim.Optimizer._norm
    optim.Optimizer._norm = counted_twice
    found["counted twice"] = distance(updated(torch.float32), truth)
    optim.Optimizer._norm = sound
    sound, shards.is_partial = shards.is_partial, lambda name: False
    found["not summed"] = distance(updated(torch.float32), truth)
    shards.is_partial = sound
    found["resumed"] = resumed(folder / "stage", torch.bfloat16)
    # One shard has a bad gradient: all skip, and name it.
    run, optimizer = opened(torch.float32)
    before = [p.detach().clone() for p in run.decoder.parameters()]
    name = "model.layers.1.mlp.down_proj.weight"
    row = step(run, optimizer, 0, poison=name)
    kept = all(map(torch.equal, before, run.decoder.parameters()))
    found["skipped"] = here.gather([row["skipped"], kept, row.get("cause", "")])
    found["drifted"] = {
        name: drifted(f"model.{name}")
        for name in ("embed_tokens.weight", "layers.0.self_attn.o_proj.weight", "norm.weight")
    }
    found["tokens"] = refused(lambda: here.require_same("tokens", lambda: f"{here.rank}"))
    found["same tokens"] = refused(lambda: here.require_same("tokens", lambda: "1 2"))
    if here.is_main:
        (folder / "world.json").write_text(json.dumps(found))


def on_vllm(folder, model, breaks):
    """Samples, an update in place of vLLM's shards, samples again: what trainer and vLLM say."""
    here = ranks.now()
    engine = vllm(model)
    decoder = engine.decoder
    whole, _ = weights.load(model)
    cut = {n: decoder.shards.cut(n, p) for n, p in whole.named_parameters()}
    same = all(torch.equal(p, cut[n]) for n, p in decoder.named_parameters())
    addresses = [p.data_ptr() for p in decoder.parameters()]
    asked = [request([3 + n, 7, 11, 9], seeds=(n, n + 50)) for n in range(3)]

    def gap(score):
        found = [
            (r.prompt_ids, c) for r, g in zip(asked, engine.generate(asked), strict=True) for c in g
        ]
        scored = score([[*ids, *c.token_ids] for ids, c in found])
        gaps = [
            torch.tensor(s[-len(c.token_ids) :]) - torch.tensor(c.logprobs)
            for s, (_, c) in zip(scored, found, strict=True)
        ]
        return float(torch.cat(gaps).abs().max()), [c.token_ids for _, c in found]

    found = {"same": same, "before": gap(engine.score)[0]}
    optimizer = optim.Optimizer(
        decoder.named_parameters(), OptimConfig(lr=0.02, max_grad_norm=0), 1, decoder.shards
    )
    run = SimpleNamespace(
        decoder=decoder, device=torch.device("cpu"), sampler=SimpleNamespace(engine=engine)
    )
    old = engine.score([[3, 7, 11, 9, 5]])
    step(run, optimizer, 0)
    found["moved"] = abs(engine.score([[3, 7, 11, 9, 5]])[0][-1] - old[0][-1])
    if breaks and here.rank == here.world - 1:
        parameter = decoder.get_parameter("model.layers.0.mlp.down_proj.weight")
        parameter.data = parameter.data.clone()
    found["after"], tokens = gap(engine.score)
    found["addresses"] = addresses == [p.data_ptr() for p in decoder.parameters()]
    found["version"] = engine.policy_version
    everyone = here.gather((found, tokens))
    if here.is_main:
        (folder / "vllm.json").write_text(json.dumps([mine for mine, _ in everyone]))
        assert all(drawn == tokens for _, drawn in everyone)


if __name__ == "__main__":
    with ranks.joined(lambda: torch.device("cpu"), 60, int(sys.argv[2])):
        if len(sys.argv) > 3:
            on_vllm(Path(sys.argv[1]), Path(sys.argv[3]), len(sys.argv) > 4)
        else:
            world(Path(sys.argv[1]))
