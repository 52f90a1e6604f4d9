"""A training step of a model on a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hpcml import rng
from hpcml.autograd import Tensor
from hpcml.comm import Mesh
from hpcml.errors import NonFiniteError, UserError
from hpcml.nn import Module
from hpcml.nn.evaluation import evaluating
from hpcml.optim import Optimizer, clip_scale
from hpcml.parallel import data

LossFunction = Callable[..., Tensor]
Groups = Callable[[Module], Iterable[Any]]


def parallelize(
    model: Module,
    *,
    loss: LossFunction | None = None,
    optimizer: Callable[..., Optimizer],
    mesh: Mesh | None = None,
    zero: int = 0,
    microbatch: int = 0,
    grad_clip: float = 0.0,
    seed: int | None = None,
    groups: Groups | None = None,
    **settings: Any,
) -> Step:
    """Make a training step of a serially written model: `loss_value = step(batch)`.

    loss: called as loss(model(*inputs), target) for a batch (*inputs, target); it must be a mean
        over samples, because microbatches count by their samples (not by the targets that an
        `ignore_index` leaves). None: the model is called with the whole batch and returns the loss.
    optimizer: a class such as `hpcml.optim.AdamW`, made with `settings` (lr=..., ...).
    mesh: where to run; all ranks along "dp" by default.
    microbatch: samples computed at once; 0 for a rank's whole share.
    grad_clip: largest norm of the gradient; 0 for none.
    seed: parameters without values are made from it and their names, dropout masks too; by default
        the seed of `hpcml.manual_seed`.
    groups: model -> parameter groups, for settings by group; all parameters alike by default.

    Raises UserError for what this version cannot do.
    """
    mesh = Mesh() if mesh is None else mesh
    others = {name: size for name, size in mesh.sizes.items() if size > 1 and name != "dp"}
    if others:
        raise UserError(f"mesh {others}: only dp is available in this version: use Mesh(dp=...)")
    if zero != 0:
        raise UserError(f"zero={zero} is not available in this version: use zero=0")
    if microbatch < 0:
        raise UserError(f"microbatch={microbatch} must be 0 (a rank's whole share) or more")
    if not grad_clip >= 0:
        raise UserError(f"grad_clip={grad_clip} must be 0 (no limit) or more")
    seed = rng.seed() if seed is None else seed
    model.name_parts()
    parameters = groups(model) if groups else list(model.parameters())
    with rng.samples(seed, 0):  # first values depend on the seed and the names alone
        made = optimizer(parameters, **settings)
        if not isinstance(made, Optimizer):
            raise UserError(
                f"optimizer made a {type(made).__name__}: it must derive from hpcml.optim.Optimizer"
            )
        data.share_gradients(made.storage, mesh["dp"])
        data.broadcast_parameters(model, made.storage, mesh["dp"])
    return Step(model, loss, made, mesh, microbatch, grad_clip, seed)


# A run that diverges says so once, by its loss; NumPy need not warn before.
_quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")


class Step:
    """One update of the parameters for each call; see `parallelize`.

    After a call `grad_norm` holds the norm of the whole gradient before clipping.
    """

    def __init__(
        self, model: Module, loss: LossFunction | None, optimizer: Optimizer, mesh: Mesh,
        microbatch: int, grad_clip: float, seed: int,
    ) -> None:  # fmt: skip
        self.model, self.loss, self.optimizer, self.mesh = model, loss, optimizer, mesh
        self.microbatch, self.grad_clip, self.seed = microbatch, grad_clip, seed
        self.axis = mesh["dp"]
        self.samples = 0  # samples of all steps so far, over all ranks
        self.grad_norm = math.nan
        self._dtype = optimizer.storage.dtype

    @_quiet
    def __call__(self, batch: Any) -> float:
        """Compute the gradient of the batch's mean loss, update, return that loss.

        batch: the samples of all ranks, the same on every rank: a tuple of arrays with samples
        along dimension 0, or something that gives such a tuple for a slice and knows its `len`
        (then a rank loads only its own). Raises NonFiniteError, before the update, on all ranks.
        """
        self.optimizer.zero_grad()
        self.model.zero_grad()  # what the optimizer leaves out would add up for ever
        size, first = _count(batch), getattr(batch, "first", self.samples)
        total = 0.0
        for part in data.microbatches(size, self.microbatch, self.axis):
            with rng.samples(self.seed, first + part.start):
                loss = self._loss(_fields(batch, part))
                weight = (part.stop - part.start) / size
                total += loss.item() * weight
                loss.backward(np.full(loss.shape, weight, loss.dtype))
        data.reduce_gradients(self.optimizer.storage, self.axis)
        total = self._sum(total)
        self.grad_norm = self.optimizer.grad_norm()
        if not (math.isfinite(total) and math.isfinite(self.grad_norm)):
            raise NonFiniteError(
                f"step {self.optimizer.steps}: loss {total}, gradient norm {self.grad_norm}: "
                "training cannot go on; lower the learning rate or clip the gradient"
            )
        self.optimizer.step(clip_scale(self.grad_norm, self.grad_clip))
        self.samples = first + size
        return total

    @_quiet
    def evaluate(self, batches: Iterable[Any]) -> float:
        """Return the mean loss over the samples of `batches`, divided among the ranks.

        Raises NonFiniteError, on all ranks.
        """
        total, count = 0.0, 0
        with evaluating(self.model):
            for batch in batches:
                size = _count(batch)
                for part in data.microbatches(size, self.microbatch, self.axis):
                    loss = self._loss(_fields(batch, part))
                    total += loss.item() * (part.stop - part.start)
                count += size
        if count == 0:
            raise UserError("evaluate() got no samples: give it at least one batch")
        mean = self._sum(total) / count
        if not math.isfinite(mean):
            raise NonFiniteError(f"validation loss {mean}: lower the learning rate")
        return mean

    @_quiet
    def try_batch(self, fields: Sequence[Any]) -> None:
        """Evaluate the loss of a batch's fields and forget it: raises what a step would raise."""
        with evaluating(self.model):
            self._loss(fields)

    def _loss(self, fields: Sequence[Any]) -> Tensor:
        arrays = [_tensor(field, self._dtype) for field in fields]
        if self.loss is None:
            loss = self.model(*arrays)
        else:
            loss = self.loss(self.model(*arrays[:-1]), arrays[-1])
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {loss.shape}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(
                f"the loss must be a tensor of one element, the mean over samples, not {found}"
            )
        return loss

    def _sum(self, value: float) -> float:
        return float(self.axis.allreduce(np.array([value]))[0])


def _count(batch: Any) -> int:
    """Number of samples of all ranks in a batch."""
    if isinstance(batch, Mapping):
        raise UserError("a batch is a tuple of arrays, not a mapping: pass tuple(batch.values())")
    if isinstance(batch, tuple | list):
        sizes = {len(field) for field in batch}
        if len(sizes) != 1:
            raise UserError(f"batch with fields of {sorted(sizes)} samples: all must have as many")
        size = sizes.pop()
    else:
        size = len(batch)
    if size == 0:
        raise UserError("a batch of 0 samples: leave it out")
    return size


def _fields(batch: Any, part: slice) -> Sequence[Any]:
    """The samples `part` of a batch, field by field."""
    if isinstance(batch, tuple | list):
        return [field[part] for field in batch]
    found = batch[part]
    return found if isinstance(found, tuple | list) else [found]


def _tensor(field: Any, dtype: np.dtype[Any]) -> Tensor:
    """A field of a batch as a tensor; what is no integer or boolean in the model's type."""
    array = np.asarray(field)
    return Tensor(array if array.dtype.kind in "biu" else array.astype(dtype, copy=False))
