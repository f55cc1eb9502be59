"""Runs of seconds: a random model of the quickstart's kind, its problems, engines that recite."""

import json
from pathlib import Path

import bounds
import torch
from transformers import AutoModelForCausalLM

from benchmarks.quickstart_task import base, task
from intfast.engine.protocol import Completion
from intfast.model.decoder import Architecture, Decoder
from intfast.model.weights import save
from intfast.tokens import encode

MODEL = base.MODEL_CONFIG | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
TOKENIZER = task.build_tokenizer()


class Quiet:
    """A console that keeps what was said."""

    is_terminal = False

    def __init__(self):
        self.lines = []

    def print(self, *texts, **_):
        self.lines += map(str, texts)


class Script:
    """An engine that answers from a list of texts, and remembers what it was asked."""

    policy_version = 0

    def __init__(self, texts, tokenizer=TOKENIZER):
        self.texts = list(texts)
        self.requests = []
        self.tokenizer = tokenizer

    def generate(self, requests_P, on_finished=None, more=None):
        first = len(self.requests)
        while requests_P := requests_P or (more(1) if more else []):
            begin = len(self.requests) - first
            self.requests += requests_P
            for p, request in enumerate(requests_P, begin):
                for g in range(len(request.seeds)):
                    on_finished(p, g, self._next())
            requests_P = []

    def _next(self):
        ids = [*encode(self.tokenizer, self.texts.pop(0)), self.tokenizer.eos_token_id]
        return Completion(
            token_ids=ids, logprobs=[0.0] * len(ids), finish_reason="stop", policy_version=0
        )


def write_inputs(folder: Path, **changes) -> Path:
    """A random model folder, six training and three test problems; `changes` are of MODEL."""
    torch.manual_seed(0)
    decoder = Decoder(Architecture.from_hf(MODEL | changes))
    base.initialise(decoder, 0)
    save(decoder, MODEL | changes, folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    for split, count in (("train", 6), ("test", 3)):
        rows = task.problem_rows(0, split, count)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rounding_of(run, folder: Path):
    """Errors of log-probs that transformers has with the weights that `run` holds, in `folder`."""
    save(run.decoder, run.config.model.path, folder)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=run.decoder.head_weight_VD.dtype)
    ids = [encode(run.sampler.tokenizer, problem.problem) for problem in run.problems]
    return bounds.log_prob_errors(hf.eval(), ids)


def words(inputs: Path, run: Path, max_new_tokens: int) -> list[str]:
    """Settings of a run of RL alone on those inputs."""
    sampling = f"{{temperature=1.0, top_p=1.0, top_k=0, max_new_tokens={max_new_tokens}}}"
    return [
        f"run={run}",
        f"model.path={inputs / 'base'}",
        "model.dtype=float32",
        "model.device=cpu",
        f"data.train={inputs / 'train.jsonl'}",
        f"data.test={inputs / 'test.jsonl'}",
        "prompt.style=compact",
        "prompt.separator=' ;'",
        "grade.mode=tail:ans",
        "rollout.cache_gib=0.1",
        "batch.max_tokens=200",
        "sft.epochs=0",
        "rl.problems=selected",
        "rl.minibatches=1",
        "rl.optim.lr=0.01",
        f"rl.sampling={sampling}",
        f"attempts.sampling={sampling}",
        f"evaluate.sampling={sampling}",
        "evaluate.ks=[1]",
    ]
