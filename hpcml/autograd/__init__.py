"""Automatic differentiation: tensors, primitives with one adjoint for each input, backward."""

from hpcml.autograd.gradcheck import gradcheck
from hpcml.autograd.primitive import (
    Context,
    Primitive,
    enable_grad,
    no_grad,
    primitive,
    saved_tensors_hooks,
)
from hpcml.autograd.tensor import Handle, Tensor, from_dlpack

__all__ = [
    "Context",
    "Handle",
    "Primitive",
    "Tensor",
    "enable_grad",
    "from_dlpack",
    "gradcheck",
    "no_grad",
    "primitive",
    "saved_tensors_hooks",
]
