"""The base of element-wise optimizers, and SGD, Adam and AdamW, fused over flat storage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from hpcml import kernels, memory
from hpcml.autograd import Tensor
from hpcml.backend import Array, is_half
from hpcml.kernels import narrow, widen
from hpcml.nn.parameter import Parameter
from hpcml.optim.flat import FlatStorage, Piece

_AT_ONCE = 1 << 15

Params = Iterable[Parameter] | Iterable[dict[str, Any]]


class Optimizer:
    """Base class: keeps parameters in flat storage and updates what this rank owns in one pass.

    params: parameters, or groups `{"params": [...], "lr": ..., ...}` with settings of their own. A
    subclass names its state arrays in `states` and updates one flat slice in `update`. Parameters
    that get no gradient in a step are updated with a gradient of zero.
    """

    states: tuple[str, ...] = ()

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        groups = list(params)
        if not groups:
            raise ValueError(f"{type(self).__name__} got no parameters")
        if isinstance(groups[0], Tensor):
            groups = [{"params": groups}]
        self.param_groups: list[dict[str, Any]] = []
        self.steps = 0
        seen: set[int] = set()
        for given in groups:
            if not isinstance(given, dict) or "params" not in given:
                raise TypeError(
                    f"{type(self).__name__} takes Parameters or groups {{'params': [...], ...}}, "
                    f"not {given!r:.60}"
                )
            group = {**defaults, **given, "params": _trainable(given["params"], seen)}
            if group["params"]:
                self._check(group)
                self.param_groups.append(group)
        if not self.param_groups:
            raise ValueError(f"{type(self).__name__}: no parameter requires a gradient")
        self._storage: FlatStorage | None = None
        self._state: dict[str, Array] = {}

    @property
    def storage(self) -> FlatStorage:
        """Where the parameters lie; made when it is first needed, unless `place` was called."""
        if self._storage is None:
            self.place()
        assert self._storage is not None
        return self._storage

    @property
    def state(self) -> dict[str, Array]:
        """The arrays named in `states`: what this rank owns, bucket after bucket."""
        if self._storage is None:
            self.place()
        return self._state

    def place(self, **how: Any) -> None:
        """Lay parameters, gradients and state out anew; `how`: as for `FlatStorage`."""
        self._storage = FlatStorage([group["params"] for group in self.param_groups], **how)
        dtype = np.dtype(np.float32) if is_half(self._storage.dtype) else self._storage.dtype
        self._state = {
            name: memory.zeros((self._storage.state_size,), dtype, "optim", self._storage.device)
            for name in self.states
        }

    def _check(self, group: dict[str, Any]) -> None:
        """Refuse settings that make no sense; subclasses add theirs."""
        for name in ("lr", "weight_decay", "eps", "momentum"):
            if name in group and not group[name] >= 0:
                raise ValueError(f"{name}={group[name]} must be 0 or more")
        betas = group.get("betas", (0.0, 0.0))
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must be two numbers of at least 0 and below 1")

    def settings(self) -> list[dict[str, Any]]:
        """What each group has beside its parameters: the learning rate and so on, as of now."""
        return [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.param_groups
        ]

    @contextmanager
    def using(self, settings: Sequence[dict[str, Any]]) -> Iterator[None]:
        """Within, the groups have these settings: for an update that comes late."""
        now = self.settings()
        for group, then in zip(self.param_groups, settings, strict=True):
            group.update(then)
        try:
            yield
        finally:
            for group, before in zip(self.param_groups, now, strict=True):
                group.update(before)

    def zero_grad(self) -> None:
        """Forget the gradients; the next backward overwrites them, so nothing is cleared."""
        for parameter in self.storage.parameters:
            parameter.gradient = None

    def grad_norm(self) -> float:
        """Euclidean norm of all gradients together."""
        self.storage.finish_gradients()
        return math.sqrt(self.storage.squares().sum())

    def step(self, scale: float = 1.0) -> None:
        """Update all parameters once; the gradients count `scale` times (clipping, loss scale)."""
        self.storage.finish_gradients()
        self.steps += 1
        for piece in self.storage.pieces:
            group = self.param_groups[piece.group]
            state = {name: array[piece.state] for name, array in self.state.items()}
            if piece.values is None:
                self.update(group, piece.data, piece.grad, state, scale)
            else:
                self._update_halves(group, piece, state, scale)

    def _update_halves(
        self, group: dict[str, Any], piece: Piece, state: dict[str, Array], scale: float
    ) -> None:
        """Update the float32 masters of 16-bit parameters, so many at once as the cache holds."""
        assert piece.values is not None
        if not isinstance(piece.grad, np.ndarray):  # a GPU's kernels take 16 bits as they are
            self.update(group, piece.data, piece.grad, state, scale)
            narrow(piece.data, piece.values)
            return
        for start in range(0, piece.grad.size, _AT_ONCE):
            part = slice(start, min(start + _AT_ONCE, piece.grad.size))
            mine = {name: array[part] for name, array in state.items()}
            self.update(group, piece.data[part], widen(piece.grad[part]), mine, scale)
            narrow(piece.data[part], piece.values[part])

    def update(
        self, group: dict[str, Any], data: Array, grad: Array, state: dict[str, Array], scale: float
    ) -> None:
        """Update the flat slice `data` in place from `grad` * scale; `steps` counts from 1."""
        raise TypeError(f"{type(self).__name__} defines no update()")


def _trainable(params: Any, seen: set[int]) -> list[Parameter]:
    """The parameters that want a gradient; the same one twice is an error."""
    found = []
    for parameter in [params] if isinstance(params, Tensor) else params:
        if not isinstance(parameter, Parameter):
            raise TypeError(f"an optimizer takes Parameters, not {type(parameter).__name__}")
        if id(parameter) in seen:
            raise ValueError(f"parameter {parameter.name} is given twice")
        seen.add(id(parameter))
        if parameter.requires_grad:
            found.append(parameter)
    return found


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum (Sutskever et al. 2013) as in PyTorch."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening,
                    "weight_decay": weight_decay, "nesterov": nesterov}  # fmt: skip
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov=True with momentum={group['momentum']}, dampening={group['dampening']}: "
                "it needs momentum above 0 and dampening=0"
            )
        if group["momentum"]:
            self.states = ("momentum_buffer",)  # none is kept where no group has momentum

    def update(
        self, group: dict[str, Any], data: Array, grad: Array, state: dict[str, Array], scale: float
    ) -> None:
        """velocity = momentum velocity + (1 - dampening) g, data -= lr velocity."""
        lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
        if not momentum:
            kernels.of(data).sgd_plain_update(data, grad, scale, lr, decay)
            return
        rest = 1.0 if self.steps == 1 else 1.0 - group["dampening"]  # PyTorch's first step
        kernels.of(data).sgd_update(
            data, grad, state["momentum_buffer"], scale, lr, momentum, rest, decay,
            group["nesterov"],
        )  # fmt: skip


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015); weight decay is added to the gradient."""

    states = ("exp_avg", "exp_avg_sq")
    decoupled = False

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def update(
        self, group: dict[str, Any], data: Array, grad: Array, state: dict[str, Array], scale: float
    ) -> None:
        """Algorithm 1 of the paper, bias corrections included."""
        beta1, beta2 = group["betas"]
        kernels.of(data).adam_update(
            data, grad, state["exp_avg"], state["exp_avg_sq"],
            scale, group["lr"], beta1, beta2, group["eps"], group["weight_decay"],
            1 - beta1**self.steps, math.sqrt(1 - beta2**self.steps), self.decoupled,
        )  # fmt: skip


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    decoupled = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)


def clip_scale(norm: float, max_norm: float) -> float:
    """The factor that brings a gradient of norm `norm` to at most `max_norm`; 0 means no limit.

    Pascanu, Mikolov, Bengio 2013; the 1e-6 is PyTorch's.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
