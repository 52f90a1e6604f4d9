"""Layers with PyTorch's names, signatures, weight shapes, first values and state names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from hpcml.autograd import Tensor
from hpcml.nn import functional as F
from hpcml.nn.module import Module
from hpcml.nn.parameter import Constant, Normal, Parameter, Uniform


def _positive(layer: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{layer}: {name}={size} must be at least 1")


class Linear(Module):
    """y = x weight^T + bias: (..., in_features) -> (..., out_features).

    First values uniform on +-1/sqrt(in_features), as in PyTorch (He et al. 2015, a = sqrt 5).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        _positive("Linear", in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        first = Uniform(1 / math.sqrt(in_features))
        self.weight = Parameter(shape=(out_features, in_features), init=first)
        self.bias = Parameter(shape=(out_features,), init=first) if bias else None

    def forward(self, input: Any) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Embedding(Module):
    """Rows of a table: integers (...) -> (..., embedding_dim); first values standard normal."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        _positive("Embedding", num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = Parameter(shape=(num_embeddings, embedding_dim), init=Normal())

    def forward(self, input: Any) -> Tensor:
        """Integers (...) -> (..., embedding_dim)."""
        return F.embedding(input, self.weight)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class LayerNorm(Module):
    """Normalisation over the last dimensions (Ba, Kiros, Hinton 2016)."""

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...] | list[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        sizes = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
        self.normalized_shape, self.eps = tuple(sizes), eps
        _positive("LayerNorm", normalized_shape=min(self.normalized_shape))
        affine, shape = elementwise_affine, self.normalized_shape
        self.weight = Parameter(shape=shape, init=Constant(1.0)) if affine else None
        self.bias = Parameter(shape=shape, init=Constant(0.0)) if affine and bias else None

    def forward(self, input: Tensor) -> Tensor:
        """Same shape."""
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.normalized_shape}, eps={self.eps}"


class GELU(Module):
    """x Phi(x), or its tanh form."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, input: Tensor) -> Tensor:
        """Same shape."""
        return F.gelu(input, self.approximate)


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, input: Tensor) -> Tensor:
        """Same shape."""
        return F.relu(input)


class Tanh(Module):
    """Hyperbolic tangent."""

    def forward(self, input: Tensor) -> Tensor:
        """Same shape."""
        return F.tanh(input)


class Sigmoid(Module):
    """1 / (1 + exp(-x))."""

    def forward(self, input: Tensor) -> Tensor:
        """Same shape."""
        return F.sigmoid(input)


class Flatten(Module):
    """Join all dimensions but the first."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, input: Tensor) -> Tensor:
        """(N, a, b, ...) -> (N, a * b * ...)."""
        return input.flatten(self.start_dim, self.end_dim)


class Dropout(Module):
    """Zero elements with probability p while training, scale the rest by 1 / (1 - p).

    The mask of a sample depends on (seed, this module's name, the sample's number in the run).
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"Dropout: p={p} must lie between 0 and 1")
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        """Same shape; dimension 0 counts samples."""
        return F.dropout(input, self.p, self.training, name=self.name)

    def extra_repr(self) -> str:
        """Probability."""
        return f"p={self.p}"


class _Numbered(Module):
    """Modules named 0, 1, 2, ..."""

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return self.children()

    def __getitem__(self, index: int) -> Module:
        return list(self.children())[index]


class Sequential(_Numbered):
    """Modules called one after the other."""

    def __init__(self, *modules: Module) -> None:
        super().__init__()
        for number, module in enumerate(modules):
            setattr(self, str(number), module)

    def forward(self, input: Any) -> Any:
        """The last module's output."""
        for module in self.children():
            input = module(input)
        return input


class ModuleList(_Numbered):
    """A list of modules that a model calls as it likes."""

    def __init__(self, modules: Any = ()) -> None:
        super().__init__()
        for module in modules:
            self.append(module)

    def append(self, module: Module) -> ModuleList:
        """Add a module at the end."""
        setattr(self, str(len(self)), module)
        return self


class CrossEntropyLoss(Module):
    """-log softmax(input)[target]; "mean" divides by the number of targets not ignored."""

    def __init__(self, *, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(self, input: Tensor, target: Any) -> Tensor:
        """input (N, C) or (N, C, d...), target (N) or (N, d...)."""
        return F.cross_entropy(
            input, target, ignore_index=self.ignore_index, reduction=self.reduction
        )


class MSELoss(Module):
    """Mean squared error."""

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, input: Tensor, target: Any) -> Tensor:
        """Equal shapes."""
        return F.mse_loss(input, target, reduction=self.reduction)
