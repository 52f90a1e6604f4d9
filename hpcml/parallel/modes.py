"""How data-parallel ranks keep together: in every step, now and then, or within a bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral

from hpcml.backend import is_half
from hpcml.comm import Mesh
from hpcml.errors import UserError
from hpcml.nn import Module
from hpcml.parallel.elastic import ElasticStep
from hpcml.parallel.groups import Groups, apart
from hpcml.parallel.local import LocalStep
from hpcml.parallel.spatial.grid import NAMES
from hpcml.parallel.stale import StaleStep
from hpcml.parallel.step import Step

MODES = ("sync", "local", "async")


def choose(
    mesh: Mesh, mode: str, *, period: int, staleness: int, sync_steps: int, elastic: float
) -> Callable[..., Step]:
    """The kind of step; the arguments are those of `parallelize`.

    Raises UserError for what does not go together.
    """
    if mode not in MODES:
        raise UserError(f'data_parallel.mode="{mode}" is unknown: use one of {", ".join(MODES)}')
    _needs("period", period, 1, mode == "local" or elastic, "mode=local or elastic above 0")
    _needs("sync_steps", sync_steps, 0, mode == "local", "mode=local")
    _needs("staleness", staleness, 0, mode == "async", "mode=async")
    _needs("elastic", elastic, 0, mode == "async", "mode=async")
    counts: dict[str, object] = {
        "period": period, "sync_steps": sync_steps, "staleness": staleness,
    }  # fmt: skip
    for name, count in counts.items():
        if not isinstance(count, Integral):
            raise UserError(f"data_parallel.{name}={count} must be a whole number")
    divided = {name: mesh[name].size for name in ("pp", "tp", "cp", *NAMES) if mesh[name].size > 1}
    if mode != "sync" and divided:
        name, size = divided.popitem()
        raise UserError(
            f"data_parallel.mode={mode} with mesh.{name}={size}: ranks that divide a model keep "
            f"together: use mode=sync, or mesh.{name}=1"
        )
    ranks = mesh["dp"].size
    if elastic * ranks > 1:
        raise UserError(
            f"data_parallel.elastic={elastic} with {ranks} ranks lets the centre overshoot: use at "
            f"most 1 / {ranks}"
        )
    if mode == "async" and mesh.deterministic:
        raise UserError(
            "data_parallel.mode=async makes updates when their sums come: use mode=sync with "
            "run.deterministic=true"
        )
    if mode == "local":
        return partial(LocalStep, period=period, sync_steps=sync_steps)
    if elastic:
        return partial(ElasticStep, period=period, alpha=elastic, bound=staleness)
    return partial(StaleStep, bound=staleness) if mode == "async" else Step


def groups_of(mesh: Mesh, mode: str, model: Module, zero: Mapping[str, object]) -> Groups:
    """The groups for a mode in which ranks are apart. Collective.

    zero: the keys of that section. Raises UserError for what only sync can do.
    """
    for name, usual in (("stage", 0), ("shard_ranks", 0), ("split", "blocks")):
        if zero[name] != usual:
            raise UserError(
                f"zero.{name}={zero[name]} with data_parallel.mode={mode}: replicas differ, "
                f"so none can hold a part for another: use zero.{name}={usual}"
            )
    half = next((p.dtype for p in model.parameters() if is_half(p.dtype)), None)
    if half is not None:
        raise UserError(
            f"parameters of {half} with data_parallel.mode={mode}: use train.precision=fp32, or "
            "mode=sync"
        )
    # Of local ones the synchronous steps reduce the gradients where they lie.
    return apart(mesh, ("grads",) if mode == "local" else ())


def _needs(name: str, value: float, default: float, met: object, what: str) -> None:
    if not value >= default:
        raise UserError(f"data_parallel.{name}={value} must be {default} or more")
    if value != default and not met:
        raise UserError(f"data_parallel.{name}={value} needs {what}: set that, or {name}={default}")
