"""What an engine may hand back: every sample that was asked for, whole."""

from types import SimpleNamespace

import msgspec
import pytest

from intfast.config import SamplingConfig
from intfast.engine.protocol import Completion
from intfast.grading.grader import Grader
from intfast.records import Problem
from intfast.sample import Sampler, Start

SAMPLING = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=3)
PROBLEM = Problem(id="p", problem="?", answer="1")
STARTS = [Start(PROBLEM, [0, 1], prompt_ids=[5]), Start(PROBLEM, [3], prompt_ids=[6, 7])]
CUT = Completion(token_ids=[7, 8, 9], logprobs=[-1.0] * 3, finish_reason="length", policy_version=0)
ENDED = Completion(token_ids=[7, 2], logprobs=[-1.0] * 2, finish_reason="stop", policy_version=0)
ALONE = Completion(token_ids=[2], logprobs=[-1.0], finish_reason="stop", policy_version=0)


def sampler(answer) -> Sampler:
    """A sampler over an engine that answers so."""

    def generate(requests, on_finished):
        for p, group in enumerate(answer):
            for g, completion in enumerate(group):
                on_finished(p, g, completion)

    style = SimpleNamespace(stop_ids=(2,))
    tokenizer = SimpleNamespace(decode=lambda ids, **_: str(ids))
    return Sampler(SimpleNamespace(generate=generate), tokenizer, style, Grader(), 10)


def drawn(answer):
    """What a sampler takes for the completions of STARTS."""
    groups = sampler(answer).sample(STARTS, SAMPLING)
    return [[graded.completion for graded in group] for group in groups]


@pytest.mark.parametrize("first", [CUT, ENDED, ALONE])
def test_what_was_asked_for_is_returned(first):
    answer = [[first, CUT], [ENDED]]
    assert drawn(answer) == answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "returned 0 samples of 2 requests, asked for were 3 of 2"),
        ([[CUT, CUT]], "returned 2 samples of 2 requests"),
        ([[CUT], [CUT, CUT]], "returned 3 samples of 2 requests"),
    ],
)
def test_missing_samples_stop_the_run(answer, message):
    with pytest.raises(RuntimeError, match=message):
        drawn(answer)


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
        drawn([[CUT, ENDED], [bad]])
