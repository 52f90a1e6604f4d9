"""A model as a chain of links, between any two of which a pipeline may be cut.

A model declares what its forward calls one after the other, by names of modules (or patterns, for
lists of modules) and of methods:

    class GPT(Module):
        chain = ("transformer.embed", "transformer.h.*", "transformer.ln_f", "lm_head")

A module has the parameters below it. A method has those of the module that it belongs to and no
other link has. What a link returns is what the next one is called with: a tensor, or a tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from hpcml.errors import UserError
from hpcml.nn import Module, Parameter, Sequential


@dataclass(frozen=True)
class Link:
    """What a model calls between two places where it may be cut."""

    name: str
    call: Callable[..., Any]
    modules: tuple[Module, ...]
    """All that it uses, with those below them."""
    parameters: tuple[Parameter, ...]
    """Theirs, in order of definition; one that links share is with each of them."""


def links(model: Module) -> list[Link]:
    """The links of a model, in order; raises UserError for a declaration that does not fit it."""
    kind = type(model).__name__
    names = [name for entry in _declared(model) for name in _names(model, entry)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f'{kind}.chain: "{name}" is in it {names.count(name)} times: once each')
    found = {name: _find(model, name) for name in names}
    whole = {id(m) for part in found.values() if isinstance(part, Module) for m in part.modules()}
    made = [_link(model, name, part, whole) for name, part in found.items()]
    _check(model, made)
    return made


def cuttable(model: Module) -> bool:
    """Whether a model says where it may be cut, and can be."""
    with suppress(UserError):
        return bool(links(model))
    return False


def _entries(model: Module) -> tuple[str, ...]:
    declared = getattr(model, "chain", ())
    if type(model) is Sequential:
        return ("*",)
    names = isinstance(declared, tuple | list) and all(isinstance(one, str) for one in declared)
    return tuple(declared) if names else ()  # else something of the user's by the same name


def _declared(model: Module) -> tuple[str, ...]:
    declared = _entries(model)
    if not declared:
        raise UserError(
            f"{type(model).__name__} declares no chain, which a pipeline needs: set in the model "
            'chain = ("embed", "blocks.*", "head"), what forward calls one after the other, or '
            "mesh.pp=1"
        )
    return declared


def _names(model: Module, entry: str) -> Iterator[str]:
    """What an entry stands for: itself, or the modules that a pattern fits, in order."""
    if not any(sign in entry for sign in "*?["):
        yield entry
        return
    fitting = [n for n in _paths(model, entry.count(".")) if fnmatchcase(n, entry)]
    if not fitting:
        names = ", ".join(name for name, _ in model.named_modules() if name)
        raise UserError(
            f'{type(model).__name__}.chain: no module is called "{entry}": there are {names:.200}'
        )
    yield from fitting


def _paths(module: Module, depth: int) -> Iterator[str]:
    """All names of that depth; a module that is there twice is called twice, so both count."""
    for name, child in module.named_children():
        if depth == 0:
            yield name
        else:
            yield from (f"{name}.{path}" for path in _paths(child, depth - 1))


def _find(model: Module, name: str) -> Any:
    """The module, or the method, of that name."""
    found: Any = model
    for part in name.split("."):
        found = found._modules.get(part) or getattr(found, part, None)
        if found is None or not callable(found):
            raise UserError(
                f'{type(model).__name__}.chain: "{name}" is neither a module nor a method: name '
                "what forward calls"
            )
    return found


def _link(model: Module, name: str, part: Any, whole: set[int]) -> Link:
    if isinstance(part, Module):
        return Link(name, part, tuple(part.modules()), tuple(part.parameters()))
    owner = _find(model, name.rpartition(".")[0]) if "." in name else model
    modules = tuple(_rest(owner, whole))
    parameters = dict.fromkeys(p for m in modules for p in m._parameters.values())
    return Link(name, part, modules, tuple(parameters))


def _rest(module: Module, whole: set[int]) -> Iterator[Module]:
    """A module and those below it that are not in the chain themselves."""
    yield module
    for child in module.children():
        if id(child) not in whole:
            yield from _rest(child, whole)


def _check(model: Module, made: list[Link]) -> None:
    """Every parameter must have a link; only parameters may be shared."""
    kind = type(model).__name__
    known = {id(p) for link in made for p in link.parameters}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            raise UserError(
                f'{kind}.chain: nothing in it has the parameter "{name}": add its module'
            )
    seen: dict[int, str] = {}
    for link in made:
        for module in link.modules:
            owner = seen.setdefault(id(module), link.name)
            if owner != link.name and (module._parameters or module._buffers):
                raise UserError(
                    f'{kind}.chain: "{owner}" and "{link.name}" both have the module '
                    f'"{module.name}": make a module of one of them, or one link of both'
                )
