"""Collection without barriers: the same records in the same order, wherever it stops."""

import random
from pathlib import Path

import pytest
import torch
from small_run import MODEL, Quiet

from benchmarks.quickstart_task import base
from benchmarks.reliability import bed
from intfast import cli, collect
from intfast.engine import queue
from intfast.model.decoder import Architecture, Decoder
from intfast.model.weights import save
from intfast.run import open_run
from intfast.sample import Sampler
from intfast.state import files

RECORDS = ("attempts", "interventions", "continuations")
RULES = {
    "never": ["intervene.stop=never"],
    "first_success": ["intervene.stop=first_success", "intervene.samples=2"],
    "one_per_problem": ["intervene.stop=first_success", "intervene.one_per_problem=true"],
    "futility": ["intervene.stop=futility", "intervene.baselines=false"],
    "some": ["attempts.max_problems=3", "attempts.unsolved_only=true", "rollout.max_rows=3"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("inputs")
    bed.prepare(folder, 0)
    return folder


def collected(inputs, name, *words, fails=lambda: None):
    """Bytes of the records of the run `name` after its collection."""
    file, *settings = bed.words(inputs, name)
    config = cli.load(Path(file), [*settings, *words])
    with open_run(config, Quiet()) as run:
        fails()
        found = collect.gather(run, [config])
    assert len(found.interventions) and len(found.attempts)
    path = Path(config.run)
    files_ = [path / f"{record}.jsonl" for record in RECORDS]
    return {file.stem: file.read_bytes() for file in files_ if file.exists()}


def in_rounds(monkeypatch):
    """Collect as several ranks do: everything waits for the slowest sample of a round."""

    def flow(self, flows, advance=None):
        queue.in_rounds(flows, lambda draws: self.together(draws, advance))

    monkeypatch.setattr(Sampler, "flow", flow)
    monkeypatch.setattr(queue, "CHUNK_SAMPLES", 12)


@pytest.mark.parametrize("rule", RULES)
def test_flows_write_what_rounds_write(inputs, rule, monkeypatch):
    flowing = collected(inputs, f"flow-{rule}", *RULES[rule])
    in_rounds(monkeypatch)
    assert collected(inputs, f"rounds-{rule}", *RULES[rule]) == flowing
    assert rule == "some" or flowing["continuations"]


@pytest.mark.parametrize("rule", ["first_success", "futility"])
def test_a_collection_that_stops_anywhere_ends_with_the_same_bytes(inputs, rule, monkeypatch):
    expected = collected(inputs, f"whole-{rule}", *RULES[rule])
    write, rnd, left = files.append, random.Random(1), [0]

    def torn(path, data):
        if path.stem in RECORDS:
            left[0] -= 1
            if left[0] == 0:
                # What is written of a line when the power goes.
                write(path, data[: rnd.randrange(len(data))])
                raise OSError("gone")
        write(path, data)

    monkeypatch.setattr(files, "append", torn)

    def arm():
        left[0] = rnd.randint(1, 6)

    stops = 0
    while stops < 12:
        try:
            found = collected(inputs, f"torn-{rule}", *RULES[rule], fails=arm)
            break
        except OSError:
            stops += 1
    else:
        left[0] = 0
        found = collected(inputs, f"torn-{rule}", *RULES[rule])
    assert stops >= 3 and found == expected


def test_verification_begins_while_attempts_at_other_problems_run(inputs, monkeypatch):
    order, write = [], files.append
    monkeypatch.setattr(
        files, "append", lambda path, data: (order.append(path.stem), write(path, data))
    )
    collected(inputs, "early", *RULES["first_success"], "rollout.max_rows=4")
    kinds = [name for name in order if name in RECORDS]
    last = len(kinds) - 1 - kinds[::-1].index("attempts")
    assert {"interventions", "continuations"} <= set(kinds[:last])


def test_guided_solutions_flow_in_the_chat_style(inputs, bpe, monkeypatch):
    model = MODEL | {"vocab_size": len(bpe), "max_position_embeddings": 4096}
    torch.manual_seed(0)
    decoder = Decoder(Architecture.from_hf(model))
    base.initialise(decoder, 0)
    save(decoder, model, inputs / "chat")
    bpe.save_pretrained(inputs / "chat")
    words = [
        f"model.path={inputs / 'chat'}",
        "prompt.style=chat",
        "prompt.separator='\n\n'",
        "grade.mode=boxed",
        "rollout.cache_gib=0.1",
    ]
    found = collected(inputs, "chat", *words)
    assert b'"guided":"' in found["interventions"].replace(b'"guided":""', b"")
    in_rounds(monkeypatch)
    assert collected(inputs, "chat-rounds", *words) == found
