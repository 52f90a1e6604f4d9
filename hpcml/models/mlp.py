"""Multi-layer perceptron; without hidden layers, linear regression."""

from __future__ import annotations

from itertools import pairwise

from hpcml.autograd import Tensor
from hpcml.nn import GELU, Linear, Module, ReLU, Sequential, Sigmoid, Tanh

_ACTIVATIONS = {"relu": ReLU, "gelu": GELU, "tanh": Tanh, "sigmoid": Sigmoid}


class MLP(Module):
    """(N, in_features) -> (N, out_features) through hidden layers of the given widths."""

    chain = ("flatten", "layers.*")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: tuple[int, ...] = (64,),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f'activation="{activation}": use one of {", ".join(_ACTIVATIONS)}')
        sizes = [in_features, *hidden]
        layers: list[Module] = []
        for width, following in pairwise(sizes):
            layers += [Linear(width, following), _ACTIVATIONS[activation]()]
        self.layers = Sequential(*layers, Linear(sizes[-1], out_features))
        # In pairs; a layer that is left over is on every tensor-parallel rank.
        linear = [name for name, layer in self.layers.named_children() if isinstance(layer, Linear)]
        styles = ["column", "row"] * (len(linear) // 2)
        self.splits = {f"layers.{name}": s for name, s in zip(linear, styles, strict=False)}

    def flatten(self, input: Tensor) -> Tensor:
        """(N, ...) -> (N, in_features)."""
        return input.flatten(1)

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_features) -> (N, out_features)."""
        return self.layers(self.flatten(input))  # type: ignore[no-any-return]
