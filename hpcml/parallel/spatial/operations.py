"""What ranks divide is followed through the operations of a user's own forward.

Layers are divided; what a module's own forward calls between them is not known beforehand. So of
each result of a primitive it is noted which of its dimensions are divided, by the rules of
`rules.py`, and what would take a part for the whole is refused, by the name of the module and of
the operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from hpcml.autograd import Tensor
from hpcml.autograd.mode import Noted, watching
from hpcml.autograd.operators import array_of
from hpcml.backend import Array, is_array
from hpcml.errors import UserError
from hpcml.nn import Module
from hpcml.nn.module import where
from hpcml.parallel.spatial.cuts import Cut, of_space, shown
from hpcml.parallel.spatial.ends import too_late
from hpcml.parallel.spatial.grid import Grid
from hpcml.parallel.spatial.rules import BY_SIZES, RULES, NeedsWhole, Operand


def watch(model: Module, grid: Grid, pointwise: set[int]) -> None:
    """Follow the operations of the model while it runs; pointwise: modules that are declared so."""
    found = _Operations(grid, pointwise)
    for module in model.modules():
        if module is not model:
            module.register_forward_pre_hook(found.enter)
            module.register_forward_hook(found.leave)
    serial: Callable[..., Any] = model.forward

    def forward(*args: Any, **named: Any) -> Any:
        found.begin(model)
        with watching(found):
            return serial(*args, **named)

    model.forward = forward  # type: ignore[method-assign]


class _Operations:
    """What looks at the uses of primitives, and knows whose forward is running."""

    def __init__(self, grid: Grid, pointwise: set[int]) -> None:
        self.grid, self.pointwise = grid, pointwise
        self._running: list[Module] = []
        self._uses: Counter[int] = Counter()
        self._agreed: dict[tuple[Any, ...], list[Cut | None]] = {}

    def begin(self, model: Module) -> None:
        """A pass begins; the one before may not have come to its end."""
        self._running = [model]
        self._uses.clear()

    def enter(self, module: Module, _: Any) -> None:
        """A hook before a module."""
        self._running.append(module)

    def leave(self, module: Module, inputs: tuple[Any, ...], out: Any) -> None:
        """A hook after it: of one that computes each pixel by itself, what comes are pixels."""
        self._running.pop()
        cuts = self.grid.cuts
        if id(module) not in self.pointwise or not any(
            isinstance(one, Tensor) and of_space(cuts.of(one.data)) for one in inputs
        ):
            return
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor) and cuts.of(one.data) is None:
                if one.ndim != len(self.grid.whole) + 2:
                    raise UserError(
                        f'{where(module)} is declared "pointwise" and makes {one.ndim} dimensions '
                        f"of images that {self.grid.axis.name} divides: these are not of pixels: "
                        f'declare where the region ends, spatial = {{"{module.name}": "gather"}}'
                    )
                cuts.note(one.data, self.grid.space)

    @property
    def _lenient(self) -> bool:
        """Whether what is running is declared to take blocks."""
        return any(id(module) in self.pointwise for module in self._running)

    def __call__(self, name: str, inputs: tuple[Any, ...], how: dict[str, Any]) -> Noted | None:
        """Note what is divided of the result; refuse a use that would take a part for the whole."""
        cuts, operands = self.grid.cuts, []
        divided, apart = False, name in BY_SIZES
        for one in (*inputs, how["condition"]) if "condition" in how else inputs:
            array = array_of(one)
            if not is_array(array):
                continue
            cut = cuts.of(array)
            fixed = getattr(one, "is_parameter", False) or array.ndim == 0
            certain = cut is not None or fixed
            cut = cut or (None,) * array.ndim
            whole = all(part is None for part in cut)
            divided = divided or not whole
            # What is whole may have been made with the sizes of a block.
            apart = apart or (whole and not fixed)
            operands.append(Operand(array.shape, cut, certain))
        known = all(one.known for one in operands)
        if not divided:
            return self._noted_whole if known else None
        made = self._cut(name, operands, how, apart)
        if made is not None:
            return lambda out: cuts.note(out, made)
        return self._noted_pixels if self._lenient else None

    def _noted_whole(self, out: Array) -> None:
        self.grid.cuts.note(out, (None,) * out.ndim)

    def _noted_pixels(self, out: Array) -> None:
        if out.ndim == len(self.grid.whole) + 2:
            self.grid.cuts.note(out, self.grid.space)

    def _cut(
        self, name: str, operands: list[Operand], how: dict[str, Any], apart: bool
    ) -> Cut | None:
        """What is divided of the result; None: nothing is known.

        apart: sizes decide, which differ from rank to rank.
        """
        block = next((one for one in operands if of_space(one.cut)), None)
        made: Cut | None = None
        rule = RULES.get(name)
        if rule is not None:
            try:
                made = rule(operands, how)
            except NeedsWhole:
                made = None
        if apart:
            made = self._alike(name, operands, made)
        if block is None:  # of samples, which most of what is not known computes one by one
            if made is None and rule is not None and name != "reshape":
                part = next(one for one in operands if any(p is not None for p in one.cut))
                raise self._refusal(name, part)
            return made
        if not self.grid.inside:
            raise too_late(self._running[-1], self.grid)
        if made is None and not self._lenient:
            raise self._refusal(name, block)
        return made

    def _alike(self, name: str, operands: list[Operand], made: Cut | None) -> Cut | None:
        """What all ranks find divided of a result; None where they do not find the same.

        They tell each other once for each use in a pass of images of a size and so many samples.
        """
        module = id(self._running[-1])
        number = self._uses[module]
        self._uses[module] += 1
        key = self.grid.whole, self.grid.given, module, number, name
        if key not in self._agreed:
            self._agreed[key] = self.grid.axis.allgather_object(made)
        return made if all(one == made for one in self._agreed[key]) else None

    def _refusal(self, name: str, part: Operand) -> UserError:
        module, grid = self._running[-1], self.grid
        parts = "blocks of images" if of_space(part.cut) else "samples"
        place = module.name or "name of a layer"
        return UserError(
            f"{where(module)} calls {name} on {shown(part.shape, part.cut)}, {parts} that "
            f"{grid.axis.name} divides, and would take a part for the whole: use a layer of "
            f'hpcml.nn, or declare where the region ends, spatial = {{"{place}": "gather"}}, or '
            'the module as "pointwise"'
        )
