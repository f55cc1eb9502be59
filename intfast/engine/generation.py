"""One call of the native engine's `generate`: which sample decodes in which row, and when it ends.

Shapes as in records.py; R is rows of the cache, B those of a step, C columns of row state.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from intfast.engine import sampler
from intfast.engine.cache import KVCache, Prefill, Step, round_up
from intfast.engine.graphs import Graphs
from intfast.engine.protocol import Completion, OnFinished, Request
from intfast.model.decoder import Decoder
from intfast.model.fixed import BLOCK, Shapes
from intfast.state import interrupt

# Tokens of one forward over prompts.
PREFILL_TOKENS = 8192
# Rows are given to waiting samples, or leave the batch, once this share of them is free.
FREE_SHARE = 1 / 8

# Slots that a step on CUDA reads are a multiple of this: each number of them is a graph.
GRAPH_SLOTS = 256

# Integer state of a row, one column each: the next token to read and its position; the first and
# the last position that give a new token; the noise stream; top-k; then the stop ids.
_TOKEN, _POSITION, _FIRST, _LAST, _STREAM, _TOP_K, _STOPS = range(7)


class _Group(NamedTuple):
    """A prompt and its samples (request, sample) that wait for a row."""

    prompt_ids: tuple[int, ...]
    waiting: deque[tuple[int, int]]


class _Row(NamedTuple):
    """The sample that occupies a row."""

    request: int
    sample: int
    born: int
    """Number of the step that gives its first token."""
    start: int
    """Position of the last token of its prompt, the first that a step reads."""


Take = Callable[[int], dict[int, Request]]
"""protocol.More, with the numbers of the requests."""


class Generation:
    """Decodes samples in the rows of a cache; used once."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        shapes: Shapes,
        policy_version: int,
        on_finished: OnFinished,
    ) -> None:
        """cache: its last row keeps a prompt for waiting samples."""
        self.decoder, self.cache, self.shapes = decoder, cache, shapes
        self.policy_version, self.on_finished = policy_version, on_finished
        self.requests: dict[int, Request] = {}
        """Those with samples that have not ended, `left` says how many."""
        self.left: dict[int, int] = {}
        self.later: dict[int, Request] = {}
        """Those that this cache has no room for; others are not taken before they had their own."""
        self.groups: dict[tuple[int, ...], _Group] = {}
        self.kept: _Group | None = None
        """The group whose prompt is in the last row of the cache."""
        self.rows: list[_Row | None] = [None] * (cache.num_rows - 1)
        self.step_number = 0
        self.asked = self.computed = 0
        """Prompt tokens of all samples, and of these computed."""
        self.modes = False, False, 0
        """Of the samples there are: any greedy, any with top-k or top-p, the largest top-k."""

    def _take(self, requests: dict[int, Request]) -> None:
        """Let the samples of these requests wait, those that fit."""
        for p, request in requests.items():
            prompt_ids, s, num = tuple(request.prompt_ids), request.sampling, len(request.seeds)
            longer = len(prompt_ids) + s.max_new_tokens > self.cache.width
            if longer or len(s.stop_ids) > self.num_stops:
                self.later[p] = request
                continue
            self.requests[p], self.left[p] = request, num
            self.asked += len(prompt_ids) * num
            # A prompt that waits is computed once, but for its last token.
            self.computed += num + (prompt_ids not in self.groups) * (len(prompt_ids) - 1)
            group = self.groups.setdefault(prompt_ids, _Group(prompt_ids, deque()))
            group.waiting.extend((p, g) for g in range(num))
        samplings = [request.sampling for request in self.requests.values()]
        top_ks = [s.top_k for s in samplings]
        any_limit = any(s.top_k or s.top_p < 1 for s in samplings)
        most = max(top_ks, default=0) if all(top_ks) else 0
        self.modes = any(s.temperature == 0 for s in samplings), any_limit, most

    def _allocate(self, requests: Iterable[Request]) -> None:
        self.num_stops = max(len(request.sampling.stop_ids) for request in requests)
        # Of any that fits.
        num_new = self.cache.width
        # Steps are whole blocks of rows; the last block may have rows without a cache.
        num_rows = round_up(len(self.rows), BLOCK)
        device = self.cache.slots.device
        idle = [0, 0, 0, -1, 0, 1] + [-1] * self.num_stops
        self.idle_C1 = torch.tensor(idle, device=device)[:, None]
        self.state_CR = self.idle_C1.repeat(1, num_rows)
        self.active_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.temperature_R = torch.ones(num_rows, device=device)
        self.top_p_R = torch.ones(num_rows, device=device, dtype=torch.float64)
        self.token_RN = torch.zeros(num_rows, num_new, dtype=torch.int64, device=device)
        self.logprob_RN = torch.zeros(num_rows, num_new, device=device)
        self.done_R = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.graphs = Graphs() if device.type == "cuda" else None

    def run(self, requests: dict[int, Request], take: Take) -> dict[int, Request]:
        """Decode these requests, one at least, and what `take` gives; what did not fit comes back.

        A step waits for the device once, for what ended.
        """
        self._allocate(requests.values())
        self._take(requests)
        while True:
            interrupt.check()
            self._admit(take)
            if not any(self.rows):
                return self.later
            self._compact()
            done_B = self._step().tolist()
            self._end([r for r, is_done in enumerate(done_B) if is_done])
            self.step_number += 1

    def _step(self) -> Tensor:
        """One token for every row; done_B says which samples end with it."""
        rows = [r for r, row in enumerate(self.rows) if row]
        num_rows = round_up(rows[-1] + 1, BLOCK)
        last = self.step_number + max(self.rows[r].start - self.rows[r].born for r in rows)
        if self.graphs is None:
            num_slots = max(BLOCK, round_up(last + 1, self.shapes.slots))
            self._decode(num_rows, num_slots, *self.modes)
        else:
            num_slots = min(self.cache.width, round_up(last + 1, GRAPH_SLOTS))
            self.graphs.run(self._decode, num_rows, num_slots, *self.modes)
        return self.done_R[:num_rows]

    def _decode(
        self, num_rows: int, num_slots: int, any_greedy: bool, any_limit: bool, most: int
    ) -> None:
        """One token for the first rows. All that changes from step to step is in tensors that stay:
        a graph of it can be replayed."""
        state, active = self.state_CR[:, :num_rows], self.active_R[:num_rows]
        position = state[_POSITION]
        index = position - state[_FIRST]
        attend = Step(self.cache, position[: len(self.rows)], num_slots, self.shapes)
        hidden_BD = self.decoder(state[_TOKEN], position, attend)
        token, logprob = sampler.draw(
            sampler.logits(hidden_BD, self.decoder.head_weight_VD, self.shapes.head),
            sampler.uniform(state[_STREAM], index),
            self.temperature_R[:num_rows],
            (state[_TOP_K], self.top_p_R[:num_rows], most) if any_limit else None,
            any_greedy,
        )
        self.token_RN[:num_rows].scatter_(1, index[:, None], token[:, None])
        self.logprob_RN[:num_rows].scatter_(1, index[:, None], logprob[:, None])
        done_B = (position == state[_LAST]) | (state[_STOPS:] == token).any(0)
        self.done_R[:num_rows] = done_B
        state[_TOKEN] = token
        position += active

    def _admit(self, take: Take) -> None:
        """Give free rows to waiting samples, computing each new prompt once."""
        free = [r for r, row in enumerate(self.rows) if row is None]
        idle = len(free) == len(self.rows)
        if not (idle or len(free) >= max(1, FREE_SHARE * len(self.rows))):
            return
        room = len(free) - sum(len(group.waiting) for group in self.groups.values())
        if room > 0 and not self.later and (requests := take(room)):
            self._take(requests)
        prompts: dict[int, list[tuple[tuple[int, ...], list[int]]]] = defaultdict(list)
        new = []
        while self.groups and free:
            prompt_ids, group = next(iter(self.groups.items()))
            rows = free[: len(group.waiting)]
            free = free[len(rows) :]
            for r in rows:
                p, g = group.waiting.popleft()
                self.rows[r] = _Row(p, g, self.step_number, len(prompt_ids) - 1)
            new += rows
            # The last token of the prompt is left to the first step, which each sample needs.
            if group is self.kept:
                self.cache.copy([len(self.rows)] * len(rows), rows, len(prompt_ids) - 1)
            elif len(prompt_ids) > 1:
                self.kept = group if group.waiting else self.kept
                spare = [len(self.rows)] if group.waiting else []
                width = round_up(len(prompt_ids) - 1, BLOCK)
                prompts[width].append((prompt_ids[:-1], rows + spare))
            if not group.waiting:
                del self.groups[prompt_ids]
        for width, filled in prompts.items():
            at_once = min(max(1, PREFILL_TOKENS // width), self.shapes.prompts)
            for start in range(0, len(filled), at_once):
                self._prefill(width, filled[start : start + at_once])
        if new:
            self._fill(new)

    def _prefill(self, width: int, filled: list[tuple[tuple[int, ...], list[int]]]) -> None:
        """One forward over prompts, each padded to `width`; its keys and values go to its rows."""
        device = self.cache.slots.device
        rows = [r for _, targets in filled for r in targets]
        prompts = [i for i, (_, targets) in enumerate(filled) for _ in targets]
        padded = [[*prompt_ids, *[0] * (width - len(prompt_ids))] for prompt_ids, _ in filled]
        token_T = torch.tensor(padded, device=device).flatten()
        position_T = torch.arange(width, device=device).repeat(len(filled))
        # Nothing after the last layer's keys and values is used: compute it for one token.
        nothing = torch.zeros(1, dtype=torch.int64, device=device)
        self.decoder(token_T, position_T, Prefill(self.cache, width, rows, prompts), nothing)

    def _fill(self, rows: list[int]) -> None:
        """Write the state of samples that start."""
        states, temperatures, top_ps, seeds = [], [], [], []
        for r in rows:
            row = self.rows[r]
            request = self.requests[row.request]
            s = request.sampling
            stops = [*s.stop_ids, *[-1] * (self.num_stops - len(s.stop_ids))]
            last = row.start + s.max_new_tokens - 1
            states.append([request.prompt_ids[-1], row.start, row.start, last, 0, s.top_k, *stops])
            temperatures.append(s.temperature)
            top_ps.append(s.top_p)
            seeds.append(request.seeds[row.sample])
        device = self.state_CR.device
        index = torch.tensor(rows, device=device)
        self.state_CR[:, index] = torch.tensor(states, device=device).T
        self.state_CR[_STREAM, index] = sampler.stream(torch.tensor(seeds, device=device))
        self.temperature_R[index] = torch.tensor(temperatures, device=device).float()
        self.top_p_R[index] = torch.tensor(top_ps, device=device).double()
        self.active_R[index] = 1

    def _clear(self, rows: Iterable[int]) -> None:
        for r in rows:
            self.rows[r] = None
        index = torch.tensor(list(rows), device=self.state_CR.device)
        self.state_CR[:, index] = self.idle_C1
        self.active_R[index] = 0

    def _compact(self) -> None:
        """When nothing waits, move the last samples into free rows, so that steps get smaller."""
        used = [r for r, row in enumerate(self.rows) if row]
        num_rows = used[-1] + 1
        if self.groups or len(used) > (1 - FREE_SHARE) * num_rows:
            return
        if round_up(len(used), BLOCK) == round_up(num_rows, BLOCK):
            return
        source = [r for r in used if r >= len(used)]
        target = [r for r in range(len(used)) if self.rows[r] is None]
        num_slots = max(self.step_number - self.rows[r].born + self.rows[r].start for r in source)
        self.cache.copy(source, target, num_slots)
        for x in (self.temperature_R, self.top_p_R, self.active_R, self.token_RN, self.logprob_RN):
            x[target] = x[source]
        self.state_CR[:, target] = self.state_CR[:, source]
        for r, moved in zip(source, target, strict=True):
            self.rows[moved] = self.rows[r]
        self._clear(source)

    def _end(self, ended: list[int]) -> None:
        """Complete the samples that ended in this step."""
        if not ended:
            return
        for r in ended:
            row, completion = self.rows[r], self._complete(r)
            self.left[row.request] -= 1
            if not self.left[row.request]:
                del self.requests[row.request], self.left[row.request]
            self.on_finished(row.request, row.sample, completion)
        self._clear(ended)

    def _complete(self, r: int) -> Completion:
        row = self.rows[r]
        stop_ids = self.requests[row.request].sampling.stop_ids
        count = self.step_number - row.born + 1
        token_ids = self.token_RN[r, :count].tolist()
        logprobs = self.logprob_RN[r, :count].tolist()
        if not math.isfinite(sum(logprobs)):
            raise RuntimeError(
                f"requests[{row.request}]: the model's logits are not finite; "
                "its weights or activations overflowed"
            )
        return Completion(
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason="stop" if token_ids[-1] in stop_ids else "length",
            policy_version=self.policy_version,
        )
