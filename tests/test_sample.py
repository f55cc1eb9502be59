"""What an engine may hand back: every sample that was asked for, whole."""

from contextlib import nullcontext
from types import SimpleNamespace

import msgspec
import pytest

from intfast.engine.protocol import Completion, Request, Sampling
from intfast.sample import Sampler

SAMPLING = Sampling(max_new_tokens=3, stop_ids=(2,))
REQUESTS = [
    Request(prompt_ids=[5], seeds=[0, 1], sampling=SAMPLING),
    Request(prompt_ids=[6, 7], seeds=[3], sampling=SAMPLING),
]
CUT = Completion(token_ids=[7, 8, 9], logprobs=[-1.0] * 3, finish_reason="length", policy_version=0)
ENDED = Completion(token_ids=[7, 2], logprobs=[-1.0] * 2, finish_reason="stop", policy_version=0)
ALONE = Completion(token_ids=[2], logprobs=[-1.0], finish_reason="stop", policy_version=0)


def sampler(answer) -> Sampler:
    """A sampler over an engine that answers so."""
    engine = SimpleNamespace(generate=lambda requests, on_finished: answer)
    found = Sampler.__new__(Sampler)
    found.engine, found.phase = engine, lambda name: nullcontext()
    return found


@pytest.mark.parametrize("first", [CUT, ENDED, ALONE])
def test_what_was_asked_for_is_returned(first):
    answer = [[first, CUT], [ENDED]]
    assert sampler(answer).complete(REQUESTS) == answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "returned 0 samples of 0 requests, asked for were 3 of 2"),
        ([[CUT, CUT]], "returned 2 samples of 1 requests"),
        ([[CUT], [CUT, CUT]], "returned 3 samples of 2 requests"),
    ],
)
def test_missing_samples_stop_the_run(answer, message):
    with pytest.raises(RuntimeError, match=message):
        sampler(answer).complete(REQUESTS)


@pytest.mark.parametrize(
    ("good", "changes", "message"),
    [
        (CUT, {"token_ids": [], "logprobs": []}, "has 0 tokens, expected 1 to 3"),
        (CUT, {"token_ids": [7] * 4, "logprobs": [-1.0] * 4}, "has 4 tokens, expected 1 to 3"),
        (CUT, {"logprobs": [-1.0] * 2}, "has 2 log-probs for 3 tokens"),
        (CUT, {"token_ids": [7, -1, 9]}, "has the token id -1"),
        (ENDED, {"finish_reason": "length"}, 'ended by "length" after 2 of 3 tokens'),
        (ENDED, {"token_ids": [7, 8]}, 'ended by "stop" with token 8'),
        (ENDED, {"finish_reason": "abort"}, "ended by 'abort'"),
    ],
)
def test_a_sample_that_is_not_whole_stops_the_run(good, changes, message):
    bad = msgspec.structs.replace(good, **changes)
    with pytest.raises(RuntimeError, match=f"sample 0 of request 1 {message}"):
        sampler([[CUT, ENDED], [bad]]).complete(REQUESTS)
