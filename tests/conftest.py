"""Fixtures that several files share; imported before every test file."""

import os
import signal

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so it must be set before any module imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A suite that was started in the background or by nohup inherits ignored signals, and would hand
# them on to the processes that it stops.
for number, action in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, action)

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "First, x = 1.\n\nThen y = 2.\n\n\n\nSo é ≤ 3 and 数.\n\nDone",
    "naïve \U0001f600 step\n\n🇩🇪 flags\n\n",
    "step.\n\nstep.\n\n" * 20,
]


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose tokens cross characters and step ends."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast
