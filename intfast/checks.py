"""What cannot work, or would have no effect: one message a fault, and nowhere else a rule.

Every message says the setting, what is expected, what is there, and what to change. `cli.load` puts
them behind the mistakes of a file; `check` is for a config that was built in Python, `check_paths`
for one that is about to be used: what a stored one names may be gone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec

from intfast import sources, words
from intfast.config import SAMPLED, Config

MAY_CHANGE = {
    *("run", "model.path", "data.train", "data.test", "rl.steps", "rl.checkpoint_every"),
    *("watchdog_s", "metrics.trackers", "metrics.example_logprobs", "parity.every"),
    *("model.memory_gib", "model.activation_checkpointing", "batch.max_tokens", "grade.workers"),
    *("rollout.cache_gib", "rollout.max_rows", "rollout.sleep", "ranks.tp"),
    "ranks.gradients",
}
"""What a run that was moved, out of memory, or stopped by a check may be continued with: no part of
what it computes (on a CPU to the last bit, but for `batch.max_tokens` and ranks). Inputs must have
the digests they had; `rl.steps`, with its schedule, may only grow."""
Range = tuple[str, str, Callable[[Any], bool]]
"""Settings, what is expected of each, and whether a value is that; an absent one always is."""
RANGES: tuple[Range, ...] = (
    (
        "data.train_limit data.test_limit rollout.max_rows "
        "attempts.samples attempts.wrong_per_problem attempts.max_problems intervene.samples "
        "intervene.max_step_tokens intervene.wave intervene.min_correct batch.max_tokens "
        "sft.batch_size sft.samples sft.prefix_tokens rl.problems_per_step rl.minibatches "
        "rl.until_tokens rl.checkpoint_every rl.evaluate_every evaluate.samples ranks.tp",
        "a whole number >= 1",
        lambda x: x >= 1,
    ),
    (
        "grade.digits intervene.continuations sft.epochs rl.steps rl.refill parity.every "
        "analysis.texts metrics.example_logprobs",
        "a whole number >= 0",
        lambda x: x >= 0,
    ),
    ("rl.group_size rollout.context", "a whole number >= 2", lambda x: x >= 2),
    ("model.threads grade.workers", "a whole number from 1 to 1024", lambda x: 1 <= x <= 1024),
    # No timer of the system counts further.
    ("watchdog_s", "a number >= 0; at most a thousand million", lambda x: 0 <= x <= 1e9),
    (
        "model.memory_gib rl.policy.clip_high rl.policy.kl sft.optim.weight_decay "
        "rl.optim.weight_decay sft.optim.max_grad_norm rl.optim.max_grad_norm",
        "a number >= 0",
        lambda x: 0 <= x < math.inf,
    ),
    ("grade.timeout_s sft.optim.lr rl.optim.lr", "a number > 0", lambda x: 0 < x < math.inf),
    (
        "sft.optim.floor rl.optim.floor rl.policy.clip_low sft.prefix_whole",
        "a number from 0 to 1",
        lambda x: 0 <= x <= 1,
    ),
    (
        "sft.optim.warmup_ratio rl.optim.warmup_ratio analysis.held_out",
        "a share, 0 <= share < 1",
        lambda x: 0 <= x < 1,
    ),
    ("intervene.futility", "0 < number < 1", lambda x: 0 < x < 1),
    ("rl.policy.entropy", "a finite number", math.isfinite),
    ("rollout.cache_gib", '"auto" or a number > 0', lambda x: x == "auto" or 0 < x < math.inf),
    (
        "rl.hint",
        '"off", "shortest" or a share between 0 and 1',
        lambda x: isinstance(x, str) or 0 < x < 1,
    ),
    (
        "run model.path data.train data.test",
        "a path; ~ is the home folder, and nothing else begins with it (./~ does not)",
        lambda x: x and not x.startswith("~"),
    ),
    (
        "prompt.separator",
        "a text or re: with a regular expression; the paper's is a blank line",
        lambda x: _pattern(x.removeprefix("re:")) if x[:3] == "re:" else x,
    ),
    (
        "prompt.domain",
        '"math", "general" or the path of a .toml file',
        lambda x: x in ("math", "general") or x.endswith(".toml"),
    ),
    (
        "grade.function",
        'a name, as in "package.module:function"',
        lambda x: re.fullmatch(r"|(trl:)?[\w.]+:[\w.]+|reasoning-gym|verifiers:[\w./-]+", x),
    ),
    ("grade.correct_at", "a finite number", math.isfinite),
    ("grade.range", "[low, high], low < high", lambda x: -math.inf < x[0] < x[1] < math.inf),
    (
        "grade.mode",
        '"boxed", "stated" or "tail:WORD"',
        lambda x: x in ("boxed", "stated") or (x.startswith("tail:") and x != "tail:"),
    ),
    (
        "rl.policy.correction_bounds",
        "0 <= low < 1 <= high",
        lambda x: 0 <= x[0] < 1 <= x[1] < math.inf,
    ),
    ("metrics.trackers", "each once", lambda x: len(set(x)) == len(x)),
)
SAMPLING: tuple[Range, ...] = (
    # Below, logits divided by it leave fp32.
    ("temperature", "a number >= 0; 0 or from 0.001", lambda x: x == 0 or 0.001 <= x < math.inf),
    ("top_p", "0 < top_p <= 1; from 1e-9", lambda x: 1e-9 <= x <= 1),
    ("top_k", "a whole number >= 0", lambda x: x >= 0),
    ("max_new_tokens", "a whole number >= 1", lambda x: x >= 1),
)


def _pattern(text: str) -> bool:
    """Whether a text is a regular expression that matches something."""
    with contextlib.suppress(re.error):
        return bool(text) and bool(re.compile(text, re.MULTILINE))
    return False


def check(config: Config) -> None:
    """Raise one ValueError with all that is wrong with a config that was built in Python."""
    try:
        msgspec.convert(msgspec.to_builtins(config), Config)
    except msgspec.ValidationError as error:
        raise ValueError(f"config: {error}; expected are the types that --help lists") from error
    if found := faults(config):
        raise ValueError("\n  ".join(["the config cannot work:", *found]))


def check_paths(config: Config) -> None:
    """Raise one ValueError that names every setting whose path cannot be used, before any reading.

    Names of the hub are not looked up.
    """
    found = []
    for name, find in (
        ("run", _run_folder),
        ("data.train", sources.locate),
        ("data.test", sources.locate),
        ("model.path", model_folder),
        ("prompt.domain", words.read),
    ):
        try:
            if (path := attrgetter(name)(config)) is not None:
                find(path)
        except (OSError, ValueError) as error:
            found.append(f"\n  {name}: " + str(error).replace("\n", "\n    "))
    if found:
        count = f"{len(found)} path" + ("s" if len(found) > 1 else "")
        raise ValueError(f"{count} cannot be used{''.join(found)}")


def _run_folder(path: str) -> None:
    place = next(place for place in (Path(path), *Path(path).parents) if place.exists())
    if not place.is_dir():
        raise ValueError(f"expected a folder, {place} is a file; use another run=FOLDER")
    if not os.access(place, os.W_OK):
        raise ValueError(f"{place} cannot be written; use another run=FOLDER")


def model_folder(path: str | os.PathLike[str]) -> None:
    """Raise ValueError for what is neither a model folder nor like a name of the hub."""
    folder = Path(path)
    if not folder.is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
        raise ValueError(
            f"model {str(path)!r}: expected a folder with config.json and *.safetensors, or a hub "
            "id such as Qwen/Qwen3-0.6B; there is no such folder"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: expected a model folder, found no config.json in it")


def faults(config: Config) -> list[str]:
    """All that is wrong with a config whose values have the right types; empty when it is sound."""
    rules = [_ranges(config)]
    if None not in msgspec.structs.astuple(config.sampling):
        parts = (_whole, _interventions, _rl, _greedy, _objective, _unused)
        rules += [part(config) for part in parts]
    messages = []
    for path, is_right, text in itertools.chain(*rules):
        if not is_right:
            expected, _, remedy = text.partition("; ")
            said = f"{path}: expected {expected}, got {attrgetter(path)(config)!r}"
            messages.append(f"{said}; {remedy}" if remedy else said)
    return messages


Rules = Iterator[tuple[str, bool, str]]
"""Setting, whether it is right, and what is expected of it; behind ";" the remedy."""


def _ranges(config: Config) -> Rules:
    for names, expected, is_right in RANGES:
        for name in names.split():
            value = attrgetter(name)(config)
            yield name, value is None or is_right(value), expected
    for path in ("sampling", *SAMPLED.split()):
        for name, expected, is_right in SAMPLING:
            value = attrgetter(f"{path}.{name}")(config)
            # A fault of the run's `[sampling]` is not repeated for every stage that starts from it.
            base = getattr(config.sampling, name)
            if path == "sampling" or (value is not base and value != base):
                yield f"{path}.{name}", value is not None and is_right(value), expected


def _unused(config: Config) -> Rules:
    """A changed setting that this config never reads is a misunderstanding."""
    sft, rl, policy, stop = config.sft, config.rl, config.rl.policy, config.intervene.stop
    objective = f'rl.policy.objective = "{policy.objective}"'
    function = f'grade.function = "{config.grade.function}"'
    finds = not config.grade.function or config.grade.function == "reasoning-gym"
    bounds = "rl.policy.correction_level rl.policy.correction_bounds"
    for paths, is_idle, because in (
        ("sft.optim.floor", sft.optim.schedule == "constant", 'sft.optim.schedule = "constant"'),
        ("rl.optim.floor", rl.optim.schedule == "constant", 'rl.optim.schedule = "constant"'),
        ("intervene.futility", stop != "futility", f'intervene.stop = "{stop}"'),
        (
            "prompt.system prompt.template_args prompt.instruction prompt.domain",
            config.prompt.style == "compact",
            'prompt.style = "compact"',
        ),
        (
            "model.optimizer_state",
            config.model.dtype == "float32",
            'model.dtype = "float32" (a parameter is its own master)',
        ),
        ("grade.correct_at grade.range", not config.grade.function, "no grade.function"),
        ("grade.digits", bool(config.grade.function), function),
        ("grade.mode", not finds, function),
        ("rl.evaluate_every", config.data.test is None, "no data.test"),
        ("rl.from_base", not rl.steps, "rl.steps = 0"),
        ("rl.from_base", not sft.epochs, "sft.epochs = 0 (from the base anyway)"),
        ("rl.method rl.method_args", not rl.steps, "rl.steps = 0"),
        ("rl.policy.clip_low rl.policy.clip_high", policy.objective == "reinforce", objective),
        ("rl.policy.dual_clip", policy.objective not in ("grpo", "gspo"), objective),
        ("rl.policy.kl_estimator", policy.kl == 0, "rl.policy.kl = 0"),
        (bounds, policy.correction == "off", 'rl.policy.correction = "off"'),
    ):
        for path in paths.split() if is_idle else ():
            default = attrgetter(path)(Config())
            text = f"its default {default!r}; it has no effect with {because}, remove it"
            yield path, attrgetter(path)(config) == default, text


def _whole(config: Config) -> Rules:
    is_text = config.prompt.style == "chat" or not config.prompt.separator.startswith("re:")
    yield "prompt.separator", is_text, 'a text with prompt.style = "compact"'
    is_named = config.data.train is not None
    yield "data.train", is_named, 'a problem file; name one: data.train = "my.jsonl"'
    is_trained = bool(config.sft.epochs or config.rl.steps)
    yield "rl.steps", is_trained, "> 0, as sft.epochs = 0; nothing would be trained"
    is_asked = config.sft.data != "bare_prefix" or config.prompt.style == "chat"
    text = 'not "bare_prefix" with prompt.style = "compact"; there it is the same as "prefix"'
    yield "sft.data", is_asked, text
    samples = config.evaluate.samples
    are_drawn = all(1 <= k <= samples for k in config.evaluate.ks)
    yield "evaluate.ks", are_drawn, f"numbers from 1 to evaluate.samples = {samples}"


def _interventions(config: Config) -> Rules:
    attempts, stage = config.attempts, config.intervene
    text = f"<= attempts.samples = {attempts.samples}; lower it, or draw more attempts"
    yield "attempts.wrong_per_problem", attempts.wrong_per_problem <= attempts.samples, text
    is_enough = not 0 < stage.continuations < stage.min_correct
    text = f"<= intervene.continuations = {stage.continuations}; lower it, or draw more"
    yield "intervene.min_correct", is_enough, text
    is_one = stage.stop != "futility" or stage.min_correct == 1
    text = '1 with intervene.stop = "futility", which speaks of one; or stop at "first_success"'
    yield "intervene.min_correct", is_one, text
    stops = stage.stop != "never" or not stage.one_per_problem
    text = 'false with intervene.stop = "never"; use stop = "first_success" or "futility"'
    yield "intervene.one_per_problem", stops, text
    is_supervised = bool(config.sft.epochs) and config.sft.data == "intervention"
    by_rl = config.rl.steps > 0 and config.rl.problems == "unlocked"
    for reader, reads in (
        (f'sft.target = "{config.sft.target}"', is_supervised and config.sft.target != "no_filter"),
        ("intervene.baselines = true", stage.baselines),
        ('rl.problems = "unlocked"', by_rl),
    ):
        text = f"> 0, as {reader} needs them; or change {reader.partition(' ')[0]}"
        yield "intervene.continuations", not reads or stage.continuations > 0, text


def _rl(config: Config) -> Rules:
    rl = config.rl
    rollouts = rl.problems_per_step * rl.group_size
    text = f"a divisor of rl.problems_per_step x rl.group_size = {rollouts}"
    yield "rl.minibatches", rollouts % max(1, rl.minibatches) == 0, text
    longest = rl.sampling.max_new_tokens
    fits = not rl.steps or config.batch.too_long == "alone" or config.batch.max_tokens >= longest
    text = f"room for a prompt and rl.sampling.max_new_tokens = {longest}; raise it"
    yield "batch.max_tokens", fits, text
    text = '"constant" with rl.until_tokens; they leave the number of steps open'
    yield "rl.optim.schedule", not rl.until_tokens or rl.optim.schedule == "constant", text


def _greedy(config: Config) -> Rules:
    """Samples of one prompt are equal where only the likeliest token is drawn."""
    intervenes = config.needs_interventions
    for samples, sampling, is_drawn in (
        ("attempts.samples", "attempts.sampling", config.needs_attempts),
        ("intervene.samples", "intervene.sampling", intervenes),
        ("intervene.continuations", "intervene.continuation", intervenes),
        (
            "sft.samples",
            "intervene.sampling",
            bool(config.sft.epochs) and config.sft.data in ("star", "regft"),
        ),
        ("rl.group_size", "rl.sampling", True),
        ("evaluate.samples", "evaluate.sampling", config.data.test is not None),
    ):
        number, found = attrgetter(samples, sampling)(config)
        several = is_drawn and number > 1
        text = (
            f", as the {samples} = {number} of a prompt would be equal; draw one, or not greedily"
        )
        warm, wide = not several or found.temperature != 0, not several or found.top_k != 1
        yield f"{sampling}.temperature", warm, "a number > 0" + text
        yield f"{sampling}.top_k", wide, "0 or more than 1" + text


def _objective(config: Config) -> Rules:
    policy, sampling = config.rl.policy, config.rl.sampling
    lowest = 1 + policy.clip_high
    is_above = policy.dual_clip == 0 or lowest < policy.dual_clip < math.inf
    yield "rl.policy.dual_clip", is_above, f"0 (off) or more than 1 + clip_high = {lowest:g}; use 3"
    is_full = sampling.top_p == 1 and sampling.top_k == 0
    text = (
        '"off", or the full distribution; the kept tokens of a truncated one are not replayed '
        "(vLLM returns them from 0.28 on and on CUDA only): set rl.sampling.top_p = 1 and "
        "rl.sampling.top_k = 0"
    )
    yield "rl.policy.correction", policy.correction == "off" or is_full, text
    default = Config().rl.policy.correction_bounds[0]
    is_read = policy.correction != "truncate" or policy.correction_bounds[0] == default
    text = f'{default} below with rl.policy.correction = "truncate"'
    text += "; the lower bound has no effect, leave its default"
    yield "rl.policy.correction_bounds", is_read, text
