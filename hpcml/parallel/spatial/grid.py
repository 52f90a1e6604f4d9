"""Which block of an image each rank has, and how it gets what it reads of others.

The axes `sp_d`, `sp_h` and `sp_w` cut depth, height and width: the last spatial dimension is the
width. An activation of n elements along a dimension is cut as evenly as possible, the first ranks
having one more: its blocks are a function of n alone, whatever made it. So a layer that shrinks an
image, by a stride or for want of padding, leaves blocks of the same rule, and a rank reads what its
block of the *output* needs, which may be more or less than its block of the input and a rim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpcml import collectives
from hpcml.autograd import Tensor
from hpcml.comm import Axis, Mesh
from hpcml.errors import UserError
from hpcml.nn import Module
from hpcml.nn.module import where
from hpcml.nn.part import Range, blocks
from hpcml.parallel.spatial.cuts import WORDS, Cut, Cuts
from hpcml.parallel.spatial.exchange import Exchange

NAMES = ("sp_d", "sp_h", "sp_w")
"""The axes that cut images, outermost first."""

Sizes = tuple[int, ...]
Reads = tuple[tuple[Range, ...], ...]
"""Along each dimension, what each rank reads: (first, end), counted in the whole image."""

INSIDE, GATHERED, SAMPLES, OUTSIDE = "inside", "gathered", "samples", "outside"


def ranks_of(mesh: Mesh) -> int:
    """How many ranks divide an image."""
    return mesh[NAMES].size


class Grid:
    """The ranks that divide images, and where in a model they are: one object for all its layers.

    state: "inside" the region in which ranks have blocks; "gathered" after it, where each has all,
    or "samples", where each has some of the samples; "outside" of the model.
    """

    def __init__(self, mesh: Mesh, overlap: bool | None = None) -> None:
        """overlap: compute beside the exchange of halos; None: where that gains."""
        self.mesh = mesh
        self.axis: Axis = mesh[NAMES]
        self.overlaps = self.axis.overlaps if overlap is None else overlap
        self._axes = tuple(mesh[name] for name in NAMES)
        self.whole: Sizes = ()
        """Of the images of this pass."""
        self.count = 0
        """Of their samples, where ranks divide these."""
        self.given = 0
        """Samples that the model was called with."""
        self.ended = OUTSIDE
        """The state in which the loss found the model's outputs."""
        self.state = OUTSIDE
        self.gathers = False
        """Whether the model gives all of its outputs to every rank."""
        self.cuts = Cuts()
        """What is divided of the arrays of this pass."""
        self.space: Cut = ()
        """Of blocks of images (N, C, *S)."""
        self._images: tuple[bool, ...] = ()
        self._calls: Counter[int] = Counter()
        self._sizes: dict[tuple[Any, ...], Sizes] = {}
        self._plans: dict[tuple[Any, ...], Any] = {}

    @property
    def inside(self) -> bool:
        """Whether ranks have blocks here."""
        return self.state == INSIDE

    @property
    def share(self) -> float:
        """Of a gradient, what each rank has here: all ranks compute the same after a gather."""
        return 1 / self.axis.size if self.state == GATHERED else 1.0

    # --- blocks ---------------------------------------------------------------------------------

    def axes(self, dims: int) -> tuple[Axis, ...]:
        """Those of an image of so many dimensions."""
        return self._axes[3 - dims :]

    def ranges(self, sizes: Sizes) -> Reads:
        """Along each dimension the blocks of all ranks."""
        pairs = zip(sizes, self.axes(len(sizes)), strict=True)
        return tuple(tuple(blocks(n, axis.size)) for n, axis in pairs)

    def mine(self, of_ranks: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        """Of what ranks have along each dimension, what this rank has."""
        axes = self.axes(len(of_ranks))
        return tuple(one[axis.rank] for one, axis in zip(of_ranks, axes, strict=True))

    def block(self, sizes: Sizes) -> tuple[slice, ...]:
        """This rank's block of an image of these sizes."""
        return tuple(slice(*mine) for mine in self.mine(self.ranges(sizes)))

    def require(self, where: str, what: str, sizes: Sizes) -> None:
        """Raise UserError unless every rank has some of an image of these sizes."""
        dims = len(sizes)
        for n, axis, name, word in zip(
            sizes, self.axes(dims), NAMES[3 - dims :], WORDS[3 - dims :], strict=True
        ):
            if n < axis.size:
                raise UserError(
                    f"{where}: {what} of {sizes} cannot be cut along its {word} among {axis.size} "
                    f"ranks: set mesh.{name}={max(n, 1)} or fewer, take larger images, or let the "
                    "divided region end before (spatial in the model, or spatial.end)"
                )

    # --- a pass ---------------------------------------------------------------------------------

    def begin(self, whole: Sizes, given: Sequence[bool] = (True,)) -> None:
        """A pass begins with images of these sizes; raises UserError if they cannot be cut.

        given: of each input, whether it is an image that is cut.
        """
        dims = len(whole)
        if not 1 <= dims <= 3:
            raise UserError(
                f"{self.axis.name} cuts images (N, C, ...) of one to three dimensions, not an "
                f"input with {dims} after the second: set mesh.sp_d, sp_h and sp_w to 1"
            )
        for name, axis in zip(NAMES[: 3 - dims], self._axes[: 3 - dims], strict=True):
            if axis.size > 1:
                shape = ", ".join(("N", "C", *"DHW"[3 - dims :]))
                raise UserError(
                    f"mesh.{name}={axis.size} cuts what images ({shape}) do not have: set "
                    f"mesh.{name}=1"
                )
        self.require("the input", "images", whole)
        self.whole, self.count, self._images = whole, 0, tuple(given)
        self.space = (None, None, *(
            dim if axis.size > 1 else None
            for dim, axis in enumerate(self.axes(dims), 3 - dims)
        ))  # fmt: skip

    def enter(self, x: Tensor, others: Sequence[Any] = ()) -> None:
        """The model is called with this rank's block, and others."""
        own = tuple(end - first for first, end in self.mine(self.ranges(self.whole)))
        if not self.whole or x.shape[2:] != own:
            raise UserError(
                f"a model that {self.axis.name} divides got something else: give it this rank's "
                f"block (N, C, ...), as `cut` makes it of images of {self.whole}"
            )
        self.state, self.given = INSIDE, len(x.data)
        self._calls.clear()
        self.cuts.clear()
        for place, one in enumerate((x, *others)):
            if isinstance(one, Tensor):
                cut = place < len(self._images) and self._images[place]
                self.cuts.note(one.data, self.space if cut else (None,) * one.ndim)

    def sizes(self, module: Module, x: Tensor) -> Sizes:
        """Sizes of the whole of which x (N, C, *S) is this rank's block.

        The ranks tell each other once for each layer, each of its calls in a pass, and size of the
        images: then all know.
        """
        call = self._calls[id(module)]
        self._calls[id(module)] += 1
        key = self.whole, id(module), call
        found = self._sizes.get(key)
        if found is None:
            found = self._sizes[key] = self._agreed(module, x)
        own = tuple(end - first for first, end in self.mine(self.ranges(found)))
        if own != x.shape[2:]:
            raise UserError(
                f"{where(module)}: a block came that is none of {found}, which came before: what "
                "comes in call after call must not depend on more than the sizes of the images"
            )
        return found

    def _agreed(self, module: Module, x: Tensor) -> Sizes:
        dims = len(self.whole)
        if x.ndim != dims + 2:
            raise UserError(
                f"{where(module)}: {x.shape} came, which is no block of images of {self.whole}: "
                "let the divided region end before (spatial in the model)"
            )
        axes = self.axes(dims)
        every = self.axis.allgather(np.array([x.shape[2:]], np.int64))
        every = every.reshape(*(axis.size for axis in axes), dims)
        total = []
        for dim in range(dims):
            of_ranks = np.moveaxis(every[..., dim], dim, -1)
            lines = of_ranks.reshape(-1, of_ranks.shape[-1])
            even = [end - first for first, end in blocks(int(lines[0].sum()), lines.shape[1])]
            if (lines != even).any():
                raise UserError(
                    f"{where(module)}: blocks of {[list(map(int, line)) for line in lines]} along "
                    f"the {WORDS[3 - dims + dim]} came, which are not those of one image: a layer "
                    "before it has worked on blocks as if they were whole"
                )
            total.append(int(lines[0].sum()))
        return tuple(total)

    # --- what layers read -----------------------------------------------------------------------

    def plan(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """`make()`, kept: what a layer works out once for each size of its input."""
        if key not in self._plans:
            self._plans[key] = make()
        return self._plans[key]

    def exchange(self, sizes: Sizes, reads: Reads, *, periodic: bool = False) -> Exchange:
        """How each rank gets what it reads, of an image of these sizes. Local."""
        names = NAMES[3 - len(sizes) :]
        key = sizes, reads, periodic
        return self.plan(key, lambda: Exchange(self.mesh, names, *key))  # type: ignore[no-any-return]

    # --- ways in and out ------------------------------------------------------------------------

    def cut(self, array: Any, sizes: Sizes) -> Any:
        """This rank's block of an array (..., *sizes)."""
        return array[(..., *self.block(sizes))]

    def joined(self, module: Module, x: Any) -> Any:
        """All of what `module` gave, outputs of blocks or of samples, on every rank. Collective."""
        if isinstance(x, dict):
            return {name: self.joined(module, one) for name, one in x.items()}
        if isinstance(x, tuple | list):
            return type(x)(self.joined(module, one) for one in x)
        if not isinstance(x, Tensor) or self.state == GATHERED:
            return x
        if self.state == SAMPLES:
            counts = [end - first for first, end in self.samples(self.count)]
            return collectives.all_gather(x, self.axis, 0, to="R", counts=counts)
        return self.gather(x, self.sizes(module, x))

    def gather(self, x: Tensor, sizes: Sizes) -> Tensor:
        """All of the images: S -> R along each axis."""
        for dim, (axis, cut) in enumerate(
            zip(self.axes(len(sizes)), self.ranges(sizes), strict=True), 2
        ):
            counts = [end - first for first, end in cut]
            x = collectives.all_gather(x, axis, dim, to="R", counts=counts)
        return x

    def to_samples(self, x: Tensor, sizes: Sizes) -> Tensor:
        """All of the images of this rank's samples: S of space -> S(0)."""
        for dim, (axis, cut) in enumerate(
            zip(self.axes(len(sizes)), self.ranges(sizes), strict=True), 2
        ):
            counts = [end - first for first, end in cut]
            samples = [end - first for first, end in blocks(x.shape[0], axis.size)]
            x = collectives.all_to_all(x, axis, 0, dim, split_counts=samples, concat_counts=counts)
        return x

    def samples(self, count: int) -> list[Range]:
        """The samples that each rank has of so many, in their order."""
        found = [(0, count)]
        for axis in self._axes:
            found = [
                (first + low, first + high)
                for first, end in found
                for low, high in blocks(end - first, axis.size)
            ]
        return found

    def own(self, state: str) -> Range | None:
        """In a state where ranks divide samples, those of this rank."""
        return self.samples(self.count)[self.axis.rank] if state == SAMPLES else None

    @property
    def own_samples(self) -> Range | None:
        """Where ranks divide samples, those of this rank."""
        return self.own(self.state)
