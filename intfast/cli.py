"""Config files: load with overrides, report every mistake at once, explain, write back.

`load("configs/x.toml", ["rl.steps=100"])` returns a checked `Config` or raises one `ValueError`
that lists every mistake with its path, what was expected, and the nearest valid name.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import difflib
import functools
import inspect
import os
import re
import textwrap
import tomllib
import typing
from collections.abc import Container, Iterable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from intfast import checks
from intfast.config import SAMPLED, Config
from intfast.safe_text import redact

ABSENT = "absent"
"""How an optional setting without a value is shown, and unset on the command line."""
_OPTIM = "intfast/model/optim.py"
GONE = {
    "optim.beta1": f"the constant BETAS of {_OPTIM}",
    "optim.beta2": f"the constant BETAS of {_OPTIM}",
    "optim.eps": f"the constant EPS of {_OPTIM}",
    "optim.max_skipped": f"the constant MAX_SKIPPED of {_OPTIM}",
    "optim.decay_vectors": "norms and biases are not decayed",
    "optim.warmup_steps": "use optim.warmup_ratio, a share of the steps",
    "credit.eps": "the constant EPS of intfast/credit.py",
    "credit.process": 'use rl.method = "vppo" or "capo"',
    "credit.process_weight": "use rl.method_args, such as {alpha = 0.5}",
    "credit.process_rollouts": "all wrong rollouts are verified",
    "credit.process_margin": "use rl.method_args = {margin = 1.0}",
    "credit.process_clamp": "use rl.method_args = {clamp = true}",
    "rl.hint_shares": "use rl.hint = 0.5, or the constant SHARES of intfast/methods/guided.py",
    "rl.hint_samples": "the constant SAMPLES of intfast/methods/guided.py",
    "policy.correction_low": "use policy.correction_bounds = [low, high]",
    "policy.correction_high": "use policy.correction_bounds = [low, high]",
    "metrics.project": 'the project in wandb and trackio is "intfast"',
    "rollout.graphs": "the constant CUDA_GRAPHS of intfast/engine/vllm_start.py",
    "rollout.chunk_samples": "the constant CHUNK_SAMPLES of intfast/engine/protocol.py",
    "grade.max_unscored": "the constant MAX_UNSCORED of intfast/grading/watch.py",
    "parity.threshold": "the dtype decides: THRESHOLDS of intfast/parity.py",
    "weights": 'use rollout.engine = "vllm_copy" for weights.share = false',
    "sft.loss_on": 'use sft.target = "intervention" for loss on the intervention alone',
    "sft.suffix": 'use sft.target = "suffix"',
    "sft.filter": 'use sft.target = "no_filter" for sft.filter = false',
    "sft.rows": 'use sft.target = "one_per_problem" for sft.rows = "one"',
    "sft.held_out": "use analysis.held_out",
}
"""Settings of older versions, with or without their first section -> what there is instead."""
_NAMED = re.compile(r"(?:^  (?=[\w.]+:)|did you mean )([\w.]+)")
"""The setting that an error is about, or the one that was meant."""


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The checked config of a TOML file with `key.sub=value` texts on top.

    Raises ValueError with all mistakes at once; a missing file names its neighbours.
    """
    tree = _read_toml(expanded(path)) if path is not None else {}
    errors = [error for text in overrides if (error := _override(tree, text))]
    config = _build(Config, None, tree, "", errors)
    # A rule that reads a setting in whose place a default stands would name what nobody wrote.
    unread = [name for error in errors for name in _NAMED.findall(error)]
    errors += [
        f"  {fault}"
        for fault in checks.faults(config)
        if not any(re.search(rf"\b{re.escape(name)}\b", fault) for name in unread)
    ]
    errors += [
        f"  {path}: holds a secret, which would be stored in the run folder; remove it there and "
        "log in beforehand (hf auth login, or the environment variable HF_TOKEN)"
        for path, *_, value, _ in walk(base=config)
        if redact(str(value)) != str(value)
    ]
    if errors:
        where = f"{path}: " if path is not None else ""
        count = f"{len(errors)} error" + ("s" if len(errors) > 1 else "")
        raise ValueError(redact("\n".join([f"{where}{count} in the configuration", *errors])))
    return config


def expanded(path: str | Path) -> Path:
    """A path of the command line, with ~ as the home folder."""
    return Path(os.path.expanduser(path))


def _read_toml(path: Path) -> dict[str, Any]:
    if str(path).startswith("-"):
        raise ValueError(_unknown_option(str(path)))
    if not path.is_file():
        folders = [f for f in (path, path.parent) if f.is_dir() and any(f.glob("*.toml"))]
        folder = folders[0] if folders else Path()
        near = ", ".join(sorted(str(p) for p in folder.glob("*.toml"))) or "none"
        what = f"{path} is a folder" if path.is_dir() else f"no config file {path}"
        raise ValueError(f"{what}; .toml files in {folder}: {near}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    # Of the digits of a number, too, or of the depth of lists.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}; correct it") from error


def _override(tree: dict[str, Any], text: str) -> str | None:
    """Put one `key.sub=value` into the tree; the message of a mistake, or None."""
    key, equals, value = text.removeprefix("--").partition("=")
    if not equals and text.startswith("-"):
        return f"  {_unknown_option(text)}"
    if not equals:
        return f'  "{text}": expected key=value, for example rl.steps=100'
    *parents, leaf = key.split(".")
    kind, node = Config, tree
    for part in parents:
        kind, node = _inner(kind, part), node.setdefault(part, {})
        if not isinstance(node, dict):
            return f"  {key}: {part} is not a section"
    kind = _inner(kind, leaf)
    if value == ABSENT and type(None) in typing.get_args(kind):
        value = None
    elif kind is not str:
        # What is no TOML is left as text: it does not fit, which `_build` says.
        with contextlib.suppress(ValueError, RecursionError):
            value = tomllib.loads(f"x = {value}")["x"]
    node[leaf] = value
    return None


def _inner(kind: Any, name: str) -> Any:
    """The type of a field of a section, or of an entry of a table; str where there is neither."""
    if typing.get_origin(kind) is dict:
        return typing.get_args(kind)[1]
    return _field_types(kind).get(name, str)


def _unknown_option(text: str) -> str:
    near = difflib.get_close_matches(text, {"--dry-run", "--help"} - {text}, n=1)
    return f"unknown option {text}" + (f"; did you mean {near[0]}?" if near else "")


def _build(kind: type, base: Any, tree: Any, path: str, errors: list[str]) -> Any:
    """A Struct from a nested dict, collecting every mistake under its dotted path.

    base: the defaults that the section above gives this one; None for those of `kind`
    """
    if not isinstance(tree, dict):
        errors.append(f"  {path}: expected a section, got {tree!r}")
        return base
    types, values = _field_types(kind), {}
    for name, value in tree.items():
        dotted = f"{path}.{name}" if path else name
        if name not in types:
            # A section is no misspelt value.
            known = [n for n in types if _is_struct(types[n]) or not isinstance(value, dict)]
            errors.append(f"  {dotted}: {_unknown(dotted, name, known)}")
        elif _is_struct(types[name]):
            default = getattr(base, name) if base else _field_defaults(kind)[name]
            values[name] = _build(types[name], default, value, dotted, errors)
        else:
            numbers = value if isinstance(value, list) else [value]
            # NaN is below nothing.
            fits = all(abs(x) < 2**63 for x in numbers if isinstance(x, int | float))
            with contextlib.suppress(msgspec.ValidationError):
                values |= {name: msgspec.convert(value, types[name])} if fits else {}
            if name not in values:
                expected = _type_text(types[name]) + ("" if fits else ", finite and below 2**63")
                errors.append(f"  {dotted}: expected {expected}, got {value!r}")
    return msgspec.structs.replace(base, **values) if base else kind(**values)


def _unknown(dotted: str, name: str, known: Iterable[str]) -> str:
    """Why there is no such setting: it is of an older version, misspelt, or of another section."""
    if found := GONE.get(dotted) or GONE.get(dotted.partition(".")[2]):
        return f"no longer a setting; {found}"
    if near := _near(name, known):
        return f"unknown setting; did you mean {dotted.removesuffix(name)}{near}?"
    elsewhere = [path for path, *_ in walk() if path.rsplit(".", 1)[-1] == name.lower()]
    if elsewhere:
        return f"unknown setting; did you mean {' or '.join(elsewhere[:3])}?"
    return f"unknown setting; known here: {', '.join(known)}"


def _near(name: str, known: Iterable[str]) -> str:
    """The one of `known` of which a name is a misspelling, or ""."""
    # Looser, "gradient" would be "grade"; capitals and hyphens are habits of other programs.
    plain = name.lower().replace("-", "_")
    return next(iter(difflib.get_close_matches(plain, known, n=1, cutoff=0.8)), "")


# --- explain ---------------------------------------------------------------------------------


def walk(
    kind: type = Config, path: str = "", base: Any = None, tables: Container[str] = ()
) -> Iterator[tuple[str, str, Any, str]]:
    """(dotted path, type, value in `base`, explanation) of every value, in the order of the tree.

    tables: sections that are one row, with what they hold that is not None
    """
    base = Config() if base is None else base
    documents, types = _field_docs(kind), _field_types(kind)
    for name in sorted(types, key=lambda name: _is_struct(types[name])):
        field_type = types[name]
        dotted = f"{path}.{name}" if path else name
        value, text = getattr(base, name), documents.get(name, "")
        if dotted in tables:
            own = {k: v for k, v in msgspec.structs.asdict(value).items() if v is not None}
            yield dotted, "table: what differs from [sampling]", own, text
        elif _is_struct(field_type):
            yield from walk(field_type, dotted, value, tables)
        else:
            yield dotted, _type_text(field_type), value, text


def settings() -> Iterator[tuple[str, str, Any, str]]:
    """The rows of `walk` for a reader: what a stage changes of `[sampling]` is one setting."""
    return walk(base=SimpleNamespace(**_field_defaults(Config)), tables=SAMPLED.split())


def explain(may_change: Container[str] = (), part: str = "") -> str:
    """The text behind `--help`: every setting with its type, default and meaning.

    may_change  settings of which it is said that a continued run may change them
    part        the section, or the name, of the settings that are explained; all where empty
    Raises ValueError where no setting has that part.
    """
    entries, parts = [], {}
    for path, kind, default, text in settings():
        parts |= dict.fromkeys([*path.split("."), path, path.rpartition(".")[0]])
        if f".{part}." not in f".{path}." and part:
            continue
        shown = ABSENT if default is None else _toml_value(default)
        text += " A continued run may change it." if path in may_change else ""
        lines = textwrap.wrap(text, 92, initial_indent="      ", subsequent_indent="      ")
        entries.append((path, "\n".join([f"  {path} = {shown}   ({kind})", *lines])))
    if not entries:
        near = _near(part, parts)
        remedy = f"did you mean {near}?" if near else f"known: {', '.join(_field_types(Config))}"
        raise ValueError(f"no setting or section {part}; {remedy}")
    return _in_sections(entries)


def differences(config: Config, other: Config | None = None) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (value in `other`, value in `config`) where they differ; default: Config().

    What a stage takes from `[sampling]` in both differs there alone.
    """
    other = other or Config()
    paths = [path for one in (config, other) for path, _ in _own(one)]
    pairs = {path: (attrgetter(path)(other), attrgetter(path)(config)) for path in paths}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def to_toml(config: Config) -> str:
    """The resolved config as a TOML file that `load` reads back to an equal Config."""
    given = [(path.rpartition("."), value) for path, value in _own(config) if value is not None]
    given.sort(key=lambda row: row[0][0])
    lines = (("".join(path), f"{path[2]} = {_toml_value(value)}") for path, value in given)
    return _in_sections(lines) + "\n"


def _in_sections(entries: Iterable[tuple[str, str]]) -> str:
    """The texts of dotted paths, with a [section] before the first of each."""
    lines, section = [], ""
    for path, text in entries:
        head = path.rpartition(".")[0]
        lines += ["", f"[{head}]", text] if head != section else [text]
        section = head
    return "\n".join(lines).strip("\n")


def _own(config: Config) -> Iterator[tuple[str, Any]]:
    """(path, value) of all settings but those of a stage's sampling that follow from the rest."""
    plain = Config(sampling=config.sampling)
    for path, _, value, _ in walk(base=config):
        is_stage = path.rpartition(".")[0] in SAMPLED.split()
        if not is_stage or value != attrgetter(path)(plain):
            yield path, value


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    # JSON and TOML write booleans, numbers and basic strings the same way.
    return msgspec.json.encode(value).decode()


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


# --- what the Structs say of themselves ---


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


@functools.cache
def _field_types(kind: Any) -> dict[str, Any]:
    """Name -> type of the fields of a section; of anything else, none."""
    return typing.get_type_hints(kind) if _is_struct(kind) else {}


@functools.cache
def _field_defaults(kind: type) -> dict[str, Any]:
    """Name -> default, where it is a value: of all fields of Config, and of every section."""
    return {field.name: field.default for field in msgspec.structs.fields(kind)}


def _type_text(kind: Any) -> str:
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    arguments = [a for a in typing.get_args(kind) if a is not type(None)]
    match typing.get_origin(kind):
        case None:
            return names[kind]
        case typing.Literal:
            return "one of " + ", ".join(f'"{choice}"' for choice in arguments)
        case builtins.list:
            inner = _type_text(arguments[0])
            return f"list, each {inner}" if inner.startswith("one of") else f"list of {inner}s"
        case builtins.dict:
            return "table of texts" if arguments[1] is str else "table"
        case builtins.tuple:
            return "list of two numbers"
        case _:
            return " or ".join(map(_type_text, arguments))


@functools.cache
def _field_docs(kind: type) -> dict[str, str]:
    """The string that follows each field in the source: the one place where it is explained."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    return {
        field.target.id: " ".join(ast.literal_eval(text.value).split())
        for field, text in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
