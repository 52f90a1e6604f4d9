"""What is gathered as a unit: the modules whose parameters are fetched and let go together.

A model may declare it with patterns of module names, `units = ("encoder.*", "head")`. By default
a list or sequence of modules is opened, and so is all that contains one: each of its entries is a
unit, as is every other module below the root.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from math import prod

from hpcml.errors import UserError
from hpcml.nn import Module, ModuleList, Parameter, Sequential


def users(model: Module) -> Iterator[tuple[Module, list[Parameter]]]:
    """Modules in order of definition, each with the parameters that its forward asks for itself.

    Those of a unit are all below it; of a module that is opened, its own. A parameter shared by two
    modules is with both.
    """
    patterns = _patterns(model)
    yield from _users(model, "", patterns)


def _users(
    module: Module, name: str, patterns: Sequence[str]
) -> Iterator[tuple[Module, list[Parameter]]]:
    if name and _is_unit(module, name, patterns):
        yield module, list(module.parameters())
        return
    own = list(dict.fromkeys(module._parameters.values()))
    if own:
        yield module, own
    for child_name, child in module.named_children():
        yield from _users(child, f"{name}.{child_name}" if name else child_name, patterns)


def _is_unit(module: Module, name: str, patterns: Sequence[str]) -> bool:
    if patterns:
        return any(fnmatchcase(name, pattern) for pattern in patterns)
    return not any(isinstance(part, ModuleList | Sequential) for part in module.modules())


def _patterns(model: Module) -> tuple[str, ...]:
    declared = getattr(model, "units", ())
    of_names = isinstance(declared, tuple | list) and all(isinstance(one, str) for one in declared)
    patterns = tuple(declared) if of_names else ()  # else something of the user's by the same name
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f'{type(model).__name__}.units: no module is called "{pattern}"; there are '
                f"{', '.join(names[1:6])}, ..."
            )
    return patterns


def divide(
    model: Module, chosen: Sequence[Parameter], links: Sequence[Sequence[Parameter]] = ()
) -> list[list[Parameter]]:
    """The `chosen` parameters of a model by unit, each once, in order of definition.

    links: units that are given, and are not joined.

    Small neighbours are joined as long as the result is no larger than the largest unit: fewer
    messages, no more memory. But what a head follows that is tied, or the largest unit, stays apart
    from what it follows: it is used beside that head. And what is used at several ends is in
    backward there for long: to it no more is joined than it has itself, and the rest of its module
    is another unit. Sizes are those of whole tensors: the same on ranks that divide them.
    """
    wanted, seen = {id(p) for p in chosen}, set[int]()
    tied, found = set[int](), list[list[Parameter]]()
    for parameters in links or [parameters for _, parameters in users(model)]:
        own = [p for p in parameters if id(p) in wanted]
        if own:
            found.append([p for p in own if id(p) not in seen])
            tied.update(id(p) for p in own if id(p) in seen)
            seen.update(map(id, own))
    parted, rests = list[list[Parameter]](), set[int]()
    for unit in found:
        several, rest = ([p for p in unit if (id(p) in tied) == both] for both in (True, False))
        if several and rest:
            parted += [several, rest]
            rests.add(id(rest[0]))
        else:
            parted.append(unit)
    elsewhere = [p for p in chosen if id(p) not in seen]  # the optimizer has them, not the model
    if elsewhere:
        parted.append(elsewhere)
    return [unit for unit in (parted if links else _join(parted, tied, rests)) if unit]


def _join(
    units: Sequence[list[Parameter]], tied: Collection[int], rests: Collection[int]
) -> list[list[Parameter]]:
    """Units that are empty here are those of tied parameters, which an earlier one has.

    rests: the first parameters of units that stay apart from the one before.
    """
    sizes = [sum(prod(p.whole_shape) for p in unit) for unit in units]
    largest = max(sizes)
    most = [
        min(largest, 2 * size) if any(id(p) in tied or id(p) in rests for p in unit) else largest
        for unit, size in zip(units, sizes, strict=True)
    ]
    joined, size, limit = [list(units[0])], sizes[0], most[0]
    for number, unit in enumerate(units[1:], 1):
        before_head = units[number + 1 : number + 2] == [[]] or (
            number == len(units) - 2 and sizes[-1] == largest
        )
        apart = before_head or any(id(p) in rests for p in unit)
        limit = min(limit, most[number])
        if size + sizes[number] <= limit and not apart:
            joined[-1] += unit
            size += sizes[number]
        else:
            joined.append(list(unit))
            size, limit = sizes[number], most[number]
    return joined
