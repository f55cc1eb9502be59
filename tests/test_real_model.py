"""The commands for a real model: honest problems, an exact comparison, a tokenizer made whole."""

import json
import random
import re
import sys

import pytest
import tiny
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import __main__ as command
from benchmarks import fidelity, real_model, word_problems
from intfast.engine import sampler
from intfast.prompts import split_steps


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_word_problems_are_what_their_references_say(steps):
    rows = word_problems.make_all(40, steps, seed=1)
    assert len({row.problem for row in rows}) == 40
    assert rows == word_problems.make_all(40, steps, seed=1)
    for row in rows:
        claims = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", row.reference_solution)
        assert 1 <= len(claims) <= steps
        for left, sign, right, value in claims:
            assert int(left) + int(sign + right) == int(value) > 0
        assert claims[-1][-1] == row.answer
        assert row.reference_solution.endswith(f"\\boxed{{{row.answer}}}.")
        assert len(split_steps(row.reference_solution, "\n\n")) == len(claims) + 2
        numbers = re.findall(r"\d+", row.problem)
        assert numbers == [claims[0][0], *(claim[2] for claim in claims)]


def compare(monkeypatch, folder, results):
    argv = ["fidelity", "--device", "cpu", "--model", str(folder), "--results", str(results)]
    argv += ["--prompts", "3", "--paragraphs", "2", "--new", "12"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *argv])
    command.main()
    return json.loads((results / "cpu.jsonl").read_text())["figures"]


@pytest.fixture
def folder(bpe, tmp_path):
    tiny.hf_model(
        "llama", vocab_size=512, max_position_embeddings=1024, tie_word_embeddings=True
    ).save_pretrained(tmp_path / "model")
    bpe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_is_the_same_here_and_in_transformers(monkeypatch, folder, tmp_path):
    found = compare(monkeypatch, folder, tmp_path)
    assert found["export"]["different"] == 0 < found["export"]["tensors"]
    assert found["greedy"]["equal"] == found["greedy"]["answers"] == 3
    assert found["text"]["tokens"] > 300 and found["sampled"]["tokens"] > 30


def test_a_wrong_log_prob_ends_the_comparison(monkeypatch, folder, tmp_path):
    draw = sampler.draw

    def rounded(*args):
        token, logprob = draw(*args)
        return token, logprob.bfloat16().float()

    monkeypatch.setattr(sampler, "draw", rounded)
    with pytest.raises(RuntimeError, match="engine's own log-probs"):
        compare(monkeypatch, folder, tmp_path)


def test_gates_of_an_unfinished_run_become_a_row(monkeypatch, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.json").write_text('{"model": "m"}')
    rows = [{"problem_id": "a", "reason": "wrong"}, {"problem_id": "a", "reason": "correct"}]
    (run / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["benchmarks", "gates", "--run", str(run), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match=r"no interventions\.jsonl"):
        command.main()
    (run / "interventions.jsonl").write_text('{"gate": "unparsed"}\n{"gate": "kept"}\n')
    command.main()
    (row,) = (tmp_path / "cpu.jsonl").read_text().splitlines()
    assert json.loads(row)["figures"] == {
        "attempts": {"wrong": 1, "correct": 1},
        "candidates": {"unparsed": 1, "kept": 1},
        "attempted_problems": 1,
    }


def test_a_comparison_needs_a_model(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "fidelity", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"real_model makes one"):
        command.main()


def test_greedy_margins_name_the_first_difference(monkeypatch, folder, tmp_path):
    real = fidelity.greedy

    def sabotaged(decoder, *args):
        decoder.model.norm.weight.data.neg_()
        return real(decoder, *args)

    monkeypatch.setattr(fidelity, "greedy", sabotaged)
    found = compare(monkeypatch, folder, tmp_path)["greedy"]
    assert found["equal"] == 3 - len(found["margins"]) < 3
    assert all(margin > 0 for margin in found["margins"])


def test_the_pre_tokenizer_of_the_file_is_put_back(bpe):
    """As transformers loads it, line feeds before a digit come apart."""
    text = "so\n\n1. Add"
    own = PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer)
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert "\n\n" not in real_model.pieces(own, text)
    real_model.restore_digits(own)
    assert "\n\n" in real_model.pieces(own, text)
    rnd = random.Random(0)
    number = str(rnd.randrange(10**9))
    assert real_model.pieces(own, number) == list(number)
