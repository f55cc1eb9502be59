"""The table of methods of RL: `rl.method` -> what it changes; and their settings, checked."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import msgspec

from intfast.config import Config
from intfast.methods.bread import Bread
from intfast.methods.capo import Capo
from intfast.methods.flawed import Flawed
from intfast.methods.laser import Laser
from intfast.methods.method import Method
from intfast.methods.online_int import OnlineInt
from intfast.methods.questa import Questa
from intfast.methods.teacher import Opsd, Sdpo
from intfast.methods.vppo import Vppo
from intfast.model.decoder import Decoder
from intfast.run import Run

METHODS: dict[str, type[Method]] = {
    "outcome": Method,
    "vppo": Vppo,
    "capo": Capo,
    "questa": Questa,
    "bread": Bread,
    "flawed": Flawed,
    "opsd": Opsd,
    "sdpo": Sdpo,
    "laser": Laser,
    "online_int": OnlineInt,
}


def own(config: Config) -> Any:
    """The method's own settings; raises ValueError where `rl.method_args` holds others."""
    kind = METHODS[config.rl.method].Settings
    try:
        return msgspec.convert(config.rl.method_args, kind)
    except msgspec.ValidationError as error:
        known = ", ".join(f"{f.name} = {f.default!r}" for f in msgspec.structs.fields(kind))
        raise ValueError(
            f'rl.method_args: {error}; rl.method = "{config.rl.method}" knows {known or "none"}'
        ) from error


def check(config: Config) -> Config:
    """The config; raises one ValueError for what its method cannot work with."""
    settings, found = own(config), []
    for path, is_right, text in METHODS[config.rl.method].rules(config, settings):
        if not is_right and config.rl.steps:
            expected, _, remedy = text.partition("; ")
            said = f"{path}: expected {expected}, got {attrgetter(path)(config)!r}"
            found.append(f"{said}; {remedy}" if remedy else said)
    if found:
        raise ValueError("\n  ".join([f'rl.method = "{config.rl.method}" cannot work:', *found]))
    return config


def start(run: Run, stage: str, frozen: Decoder | None) -> Method:
    """The method of an RL stage; frozen: the policy that it starts from, where it is kept."""
    return METHODS[check(run.config).rl.method](run, own(run.config), stage, frozen)
