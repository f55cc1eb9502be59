"""Problems and rewards of other libraries, where they are installed: TRL, reasoning-gym, verifiers.

A source is `KIND:NAME`, with `:key=value,...` behind it for what the library takes; a scoring
function is `trl:module:function`, `reasoning-gym`, or `verifiers:NAME`. Names come from a person's
settings. Nothing here imports more of intfast, since a grading worker loads it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

Row = tuple[str, dict[str, Any]]
Extract = Callable[[str], str | None]
Scorer = Callable[[dict[str, Any], str], Any]
GYM, VERIFIERS, TRL = "reasoning-gym", "verifiers", "trl"
DERIVATIONS = ("answer_cot", "states")
"""What reasoning-gym calls the way to an answer, in the metadata of the tasks that keep it."""


def is_source(source: str) -> bool:
    """Whether a source of problems is a library's and not a file's."""
    return source.partition(":")[0] in (GYM, VERIFIERS)


def rows(source: str, purpose: str) -> tuple[str, Iterator[Row]]:
    """What there is to say of a source, and its rows.

    Raises ValueError for a name or setting that the library does not know, RuntimeError without it.
    """
    kind, _, rest = source.partition(":")
    name, _, words = rest.partition(":")
    settings = {}
    # A value may be a list, with commas of its own.
    for word in re.split(r",(?=\s*[A-Za-z_]\w*=)", words) if words else ():
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{source}: expected {kind}:NAME:key=value,..., got {word!r}")
        try:
            settings[key.strip()] = json.loads(value)
        except ValueError:
            settings[key.strip()] = value
    return (_gym_rows if kind == GYM else _verifiers_rows)(name, settings, purpose)


def scorer(name: str, extract: Extract) -> tuple[Callable[..., Any], bool]:
    """A scoring function by its name in the settings, and whether it takes lists.

    extract: the answer of a text, as grade.mode finds it; for libraries that score bare answers
    Raises whatever its import raises, and ValueError for what is no scoring function.
    """
    kind, _, rest = name.partition(":")
    if kind == GYM and not rest:
        return _gym_scorer(extract), False
    if kind == VERIFIERS:
        return _verifiers_scorer(rest), False
    module, _, path = (rest if kind == TRL else name).partition(":")
    function = attrgetter(path)(importlib.import_module(module))
    if kind == TRL:
        return _trl_scorer(function), True
    return function, takes_lists(function)


def takes_lists(function: Callable[..., Any]) -> bool:
    """Whether a function is scores(problems, completions). Raises ValueError for any signature but
    this and score(problem, completion)."""
    expected = "expected score(problem, completion) or scores(problems, completions)"
    try:
        given = inspect.signature(function)
        given.bind(None, None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{expected}, got {function}: {error}") from error
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"{expected}, got a coroutine: remove async")
    return [*given.parameters][:2] == ["problems", "completions"]


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(f"{package} is missing ({error}): pip install {package}") from error


# --- reasoning-gym -----------------------------------------------------------------------------


def _gym_rows(name: str, settings: dict[str, Any], purpose: str) -> tuple[str, Iterator[Row]]:
    gym = _library("reasoning_gym", GYM)
    # Held-out problems are others than those of training, unless somebody says a seed.
    settings = {"seed": int(purpose == "test")} | settings
    try:
        made = gym.create_dataset(name, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{GYM}:{name}: {error}") from error

    def found() -> Iterator[Row]:
        for number, entry in enumerate(made, 1):
            told = [entry["metadata"].get(key) for key in DERIVATIONS]
            if way := next(filter(None, told), None):
                steps = way if isinstance(way, str) else "\n\n".join(map(str, way))
                entry = entry | {"reference": f"{steps}\n\n<answer>{entry['answer']}</answer>"}
            yield f"{name}:{number}", entry

    return f"{len(made)} made with {settings}", found()


def _gym_scorer(extract: Extract) -> Scorer:
    gym = _library("reasoning_gym", GYM)
    score_of = functools.cache(gym.get_score_answer_fn)

    def score(problem: dict[str, Any], completion: str) -> Any:
        begin = completion.rfind("<answer>")
        end = completion.find("</answer>", begin)
        said = completion[begin + 8 : end].strip() if 0 <= begin < end else extract(completion)
        # Which task it is the row says; it can name those of the library and no others.
        return score_of(problem["metadata"]["source_dataset"])(said, problem) if said else 0.0

    return score


# --- verifiers ---------------------------------------------------------------------------------


def _environment(name: str, settings: dict[str, Any]) -> Any:
    library = _library(VERIFIERS, VERIFIERS)
    if not hasattr(library, "load_environment"):
        raise RuntimeError(
            f"verifiers {library.__version__} has no load_environment: environments "
            "that are a dataset and a rubric need verifiers 0.1"
        )
    environment = library.load_environment(name, **settings)
    if not isinstance(environment, library.SingleTurnEnv):
        raise ValueError(f"{VERIFIERS}:{name}: expected a SingleTurnEnv, got {type(environment)}")
    return environment


def _verifiers_rows(name: str, settings: dict[str, Any], purpose: str) -> tuple[str, Iterator[Row]]:
    made = _environment(name, settings)
    table = made.get_eval_dataset() if purpose == "test" else made.get_dataset()
    # A prompt holds the question, with what the system says before it.
    kept = [column for column in table.column_names if column != "question"]
    found = (dict(row) for row in table.select_columns(kept))
    return f"{len(table)} rows", ((f"{name}:{n}", row) for n, row in enumerate(found, 1))


def _verifiers_scorer(name: str) -> Scorer:
    rubric = _environment(name, {}).rubric
    library, errors = _library(VERIFIERS, VERIFIERS), []
    # A rubric counts an exception of its functions as 0, and tells nobody but its log.
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())
    logging.getLogger(VERIFIERS).addHandler(handler)
    # Made here, as a worker may open no pipe later.
    loop = importlib.import_module("asyncio").new_event_loop()

    def score(problem: dict[str, Any], completion: str) -> float:
        state = library.State(input=problem)
        state["completion"] = [{"role": "assistant", "content": completion}]
        state["task"], state["trajectory"] = problem.get("task", ""), []
        state["timing"] = None
        errors.clear()
        loop.run_until_complete(rubric.score_rollout(state))
        if errors:
            raise RuntimeError(errors[0])
        return state["reward"]

    return score


# --- TRL ---------------------------------------------------------------------------------------


def _trl_scorer(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reward function of TRL: keyword columns, lists in, a list out."""
    takes = inspect.signature(function).parameters
    takes_all = any(p.kind == p.VAR_KEYWORD for p in takes.values())

    def scores(problems: list[dict[str, Any]], completions: list[str]) -> Any:
        columns = dict.fromkeys(itertools.chain.from_iterable(problems))
        given = {name: [row.get(name) for row in problems] for name in columns}
        prompts = given.pop("prompt", [row.get("problem", row.get("question")) for row in problems])
        # A prompt that is a text has a text for its completion; else both are conversations.
        said = completions
        if not ("prompt" in columns and isinstance(prompts[0], str)):
            said = [[{"role": "assistant", "content": text}] for text in completions]
        given |= {"prompts": prompts, "completions": said, "completion_ids": [[]] * len(said)}
        given["trainer_state"] = None
        return function(**{k: v for k, v in given.items() if takes_all or k in takes})

    return scores
