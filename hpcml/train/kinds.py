"""Kinds: what a section's `kind` names, built in or the user's own, and the keys it takes.

Both go the same way: `kind` stands for a callable, its keys are that callable's parameters, and a
parameter without a default that no key gives is filled from what the framework offers by that name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

from hpcml.errors import UserError
from hpcml.train import values

T = TypeVar("T", bound="Chosen")
EMPTY = inspect.Parameter.empty


@dataclass(frozen=True)
class Slot:
    """What a section of the configuration accepts as its kind."""

    builtin: Mapping[str, str]
    """Names of the built-in kinds, and the `package.module:name` each stands for."""
    passed: int = 0
    """How many leading arguments the framework passes itself, by position."""
    function_is_it: bool = False
    """A class is called with the keys; a plain function *is* the loss (or callback), whose first
    `passed` arguments come at every call. Elsewhere a function is called with the keys too."""


SLOTS = {
    "data": Slot(
        {
            "text": "hpcml.data.text:text",
            "images": "hpcml.data.images:images",
            "regression": "hpcml.data.regression:regression",
        }
    ),
    "model": Slot(
        {
            "gpt": "hpcml.models.gpt:GPT",
            "mlp": "hpcml.models.mlp:MLP",
            "resnet": "hpcml.models.resnet:ResNet",
            "meshnet": "hpcml.models.meshnet:MeshNet",
        }
    ),
    "loss": Slot(
        {
            "next_token": "hpcml.models.gpt:NextTokenLoss",
            "cross_entropy": "hpcml.nn:CrossEntropyLoss",
            "mse": "hpcml.nn:MSELoss",
        },
        2,
        True,
    ),
    "optim": Slot(
        {"sgd": "hpcml.optim:SGD", "adam": "hpcml.optim:Adam", "adamw": "hpcml.optim:AdamW"}, 1
    ),
    "callback": Slot({}, 1, True),
}


@dataclass(frozen=True)
class Chosen:
    """A section whose `kind` names a callable; `options` are the keys that go to it."""

    section: ClassVar[str]
    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> Callable[..., Any]:
        """The callable that `kind` names."""
        return find(self.section, self.kind)


def own_keys(section: type[Chosen]) -> list[str]:
    """Return the keys of a section that are the framework's, not its kind's."""
    return [f.name for f in fields(section) if f.name != "options"]


def find(section: str, kind: str) -> Callable[..., Any]:
    """Return the callable that `<section>.kind` names; the current folder can be imported from.

    Raises `UserError` for an unknown name, and for one that cannot be imported, with the reason.
    """
    builtin = SLOTS[section].builtin
    name = f'{section}.kind="{kind}"'
    target = builtin.get(kind, kind)
    if not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", target):
        near = values.suggest(kind, builtin) if builtin else "none is built in"
        raise UserError(f"{name} is unknown: {near} (or package.module:name of your own)")
    if kind not in builtin and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module_name, _, path = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UserError(f"{name} cannot be imported: {one_line(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            near = values.suggest(part, [n for n in vars(found) if not n.startswith("_")])
            raise UserError(f'{name} cannot be imported: {module_name} has no "{part}": {near}')
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{name} is a {type(found).__name__}: name a class or a function")
    return found  # type: ignore[no-any-return]


def parameters(section: str, target: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Return the parameters that keys can give, and whether any other name is accepted too.

    They are {name: inspect.Parameter}, with their annotations evaluated where that is possible. A
    parameter whose default TOML cannot write, such as a function, is none of them.
    """
    try:
        signature = inspect.signature(target, eval_str=True)
    except Exception:  # noqa: BLE001 (an annotation may fail in any way)
        try:
            signature = inspect.signature(target)
        except (TypeError, ValueError):  # compiled code may not tell
            return {}, True
    slot, every = SLOTS[section], list(signature.parameters.values())
    if not slot.function_is_it or not inspect.isclass(target):
        positional = [
            p for p in every if p.kind is not p.KEYWORD_ONLY and p.kind is not p.VAR_KEYWORD
        ]
        every = [p for p in every if p not in positional[: slot.passed]]
    named = {
        p.name: p
        for p in every
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and (p.default is EMPTY or p.default is None or values.writable(p.default))
    }
    return named, any(p.kind is p.VAR_KEYWORD for p in every)


def annotation(parameter: inspect.Parameter) -> Any:
    """Return the type a parameter's key is checked against."""
    known = parameter.annotation
    if known is EMPTY or isinstance(known, str):
        return EMPTY if parameter.default is EMPTY else values.guess(parameter.default)
    return known


def check(chosen: T, given: Mapping[str, Any]) -> T:
    """Return `chosen` with its options: the keys given, checked, and the defaults of the others."""
    name = chosen.section
    if not chosen.kind:
        if given:
            key, value = next(iter(given.items()))
            raise UserError(
                f"{name}.{key}={values.show(value)} needs a kind: set {name}.kind, or leave it out"
            )
        return replace(chosen, options={})
    known, open_ended = parameters(name, chosen.target)
    mine = own_keys(type(chosen))
    options = {
        key: p.default
        for key, p in known.items()
        if p.default is not EMPTY and p.default is not None and key not in mine
    }
    for key, value in given.items():
        if key in known:
            options[key] = values.convert(f"{name}.{key}", value, annotation(known[key]))
        elif open_ended:
            options[key] = values.convert(f"{name}.{key}", value, EMPTY)
        else:
            near = values.suggest(key, [*mine, *known], f"{name}.")
            raise UserError(
                f"unknown key {name}.{key}={values.show(value)} "
                f'(for {name}.kind="{chosen.kind}"): {near}'
            )
    return replace(chosen, options=options)


def choose(chosen: T, kind: str) -> T:
    """Return a section of another kind, with that kind's defaults."""
    return check(replace(chosen, kind=kind), {})


def require(chosen: Chosen, offers: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a kind by name: its options, and offers for what else it needs.

    Raises `UserError` that names a parameter which neither gives.
    """
    known, _ = parameters(chosen.section, chosen.target)
    arguments = dict(chosen.options)
    for name, parameter in known.items():
        if name in arguments or parameter.default is not EMPTY:
            continue
        if name not in offers:
            offered = f" (offered: {', '.join(offers)})" if offers else ""
            raise UserError(
                f'{chosen.section}.kind="{chosen.kind}" needs {name}, which has no default: '
                f"set {chosen.section}.{name}{offered}"
            )
        arguments[name] = offers[name]
    return arguments


def build(chosen: Chosen, offers: Mapping[str, Any] | None = None, *args: Any, **extra: Any) -> Any:
    """Call what a section's kind names with its keys, and return what it makes.

    `offers` fill parameters without a default that no key gives; `args` and `extra` are passed on.
    A plain function as loss or callback is returned itself, its keys bound. A `ValueError` or
    `TypeError` of the callable becomes a `UserError` with the values that are no defaults.
    """
    arguments = require(chosen, offers or {}) | extra
    target = chosen.target
    if SLOTS[chosen.section].function_is_it and not inspect.isclass(target):
        return functools.partial(target, *args, **arguments)
    try:
        return target(*args, **arguments)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        name = _with_values(chosen, arguments)
        own = chosen.kind not in SLOTS[chosen.section].builtin
        said = one_line(error) if own else " ".join(str(error).split())
        raise UserError(f"{name}: {said}") from error


def _with_values(chosen: Chosen, arguments: Mapping[str, Any]) -> str:
    """Return a section's kind and those of its values that are no defaults, for messages."""
    known, _ = parameters(chosen.section, chosen.target)
    shown = [f'{chosen.section}.kind="{chosen.kind}"']
    for key, value in arguments.items():
        default = known[key].default if key in known else EMPTY
        if values.writable(value) and (default is EMPTY or value != default):
            shown.append(f"{key}={values.show(value)}")
    return ", ".join(shown)


def one_line(error: BaseException) -> str:
    """Return an exception's type, message and place in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
    place = f" ({os.path.basename(ours[-1].filename)}, line {ours[-1].lineno})" if ours else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
