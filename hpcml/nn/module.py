"""Modules: trees of parameters with a forward function, under PyTorch's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

from hpcml.autograd import Context, Handle, Tensor, movement
from hpcml.backend import Array
from hpcml.nn.parameter import Parameter
from hpcml.nn.state import State


def where(module: Module) -> str:
    """What errors call a module: its name in the model, and its kind."""
    kind = type(module).__name__
    return f"{module.name} ({kind})" if module.name else kind


class Hooks:
    """Functions called around a module's forward and backward, in order; one may remove itself."""

    def __init__(self) -> None:
        self.before: list[Callable[..., Any]] = []
        self.after: list[Callable[..., Any]] = []
        self.before_backward: list[Callable[..., Any]] = []
        self.after_backward: list[Callable[..., Any]] = []

    def around(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module's forward with the hooks before and after."""
        for pre_hook in tuple(self.before):
            changed = pre_hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
        if self.after_backward or self.before_backward:
            out = _between_boundaries(module, args, kwargs)
        else:
            out = module.forward(*args, **kwargs)
        for hook in tuple(self.after):
            changed = hook(module, args, out)
            out = out if changed is None else changed
        return out


class Module(State):
    """Base class of layers and models: set parameters and modules as attributes, add `forward`."""

    training: bool = True
    name: str = ""  # qualified name in the model, once `name_parts` was called on the model

    def __init__(self) -> None:
        self._parameters: dict[str, Parameter] = {}
        self._buffers: dict[str, Tensor] = {}
        self._modules: dict[str, Module] = {}
        self._hooks: Hooks | None = None  # until the first is registered: most have none

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        parameters: dict[str, Any] | None = self.__dict__.get("_parameters")
        modules: dict[str, Any] | None = self.__dict__.get("_modules")
        if parameters is None or modules is None:
            if isinstance(value, Parameter | Module):
                raise AttributeError(
                    f"{type(self).__name__}: call super().__init__() before setting {name}"
                )
            return
        for registry, kind in ((parameters, Parameter), (modules, Module)):
            if isinstance(value, kind):
                registry[name] = value
            else:
                registry.pop(name, None)
        if name in self._buffers and not isinstance(value, Tensor):
            del self._buffers[name]
        elif name in self._buffers:
            self._buffers[name] = value

    def __delattr__(self, name: str) -> None:
        object.__delattr__(self, name)
        self._parameters.pop(name, None)
        self._buffers.pop(name, None)
        self._modules.pop(name, None)

    # --- calls and hooks ------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output; every module defines this."""
        raise TypeError(f"{type(self).__name__} defines no forward()")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output, with the hooks before and after."""
        if self._hooks is None:
            return self.forward(*args, **kwargs)
        return self._hooks.around(self, args, kwargs)

    @property
    def hooks(self) -> Hooks:
        """What is called around forward and backward."""
        if self._hooks is None:
            self._hooks = Hooks()
        return self._hooks

    def register_forward_pre_hook(self, hook: Callable[..., Any]) -> Handle:
        """Call hook(module, args) before forward; what it returns replaces args."""
        return _register(self.hooks.before, hook)

    def register_forward_hook(self, hook: Callable[..., Any]) -> Handle:
        """Call hook(module, args, output) after forward; what it returns replaces the output."""
        return _register(self.hooks.after, hook)

    def register_full_backward_pre_hook(self, hook: Callable[..., Any]) -> Handle:
        """Call hook(module, (gradient of output,)) before the module's backward."""
        return _register(self.hooks.before_backward, hook)

    def register_full_backward_hook(self, hook: Callable[..., Any]) -> Handle:
        """Call hook(module, (gradient of first input,), (gradient of output,)) after its backward.

        Where no input requires a gradient it is called, with None, before instead.
        """
        return _register(self.hooks.after_backward, hook)

    # --- the tree -------------------------------------------------------------------------------

    def named_modules(self, *, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it with their qualified names, each once, in order."""
        yield from self._named_modules(prefix, set())

    def _named_modules(self, prefix: str, seen: set[int]) -> Iterator[tuple[str, Module]]:
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for name, module in self._modules.items():
            yield from module._named_modules(f"{prefix}.{name}" if prefix else name, seen)

    def modules(self) -> Iterator[Module]:
        """This module and all below it."""
        return (module for _, module in self.named_modules())

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The modules directly below."""
        return iter(self._modules.items())

    def children(self) -> Iterator[Module]:
        """The modules directly below."""
        return iter(self._modules.values())

    def named_parameters(
        self, prefix: str = "", *, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """All parameters with qualified names; a shared one once unless told otherwise."""
        seen: set[int] = set()
        for path, module in self.named_modules(prefix=prefix):
            for name, parameter in module._parameters.items():
                if remove_duplicate and id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                yield (f"{path}.{name}" if path else name), parameter

    def parameters(self) -> Iterator[Parameter]:
        """All parameters, each once."""
        return (parameter for _, parameter in self.named_parameters())

    def name_parts(self) -> Self:
        """Tell every module and parameter its qualified name, from which its numbers are drawn."""
        for name, module in self.named_modules():
            module.name = name
        for name, parameter in self.named_parameters():
            parameter.name = name
        return self

    def apply(self, function: Callable[[Module], Any]) -> Self:
        """Call `function` on every module, children first."""
        for child in self.children():
            child.apply(function)
        function(self)
        return self

    # --- state ----------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Switch training behaviour (dropout) on or off for this module and all below."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Switch to evaluation: no dropout."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Ask for the gradients of all parameters, or freeze them."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
        return self

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    def extra_repr(self) -> str:
        """What to print between the parentheses."""
        return ""

    def __repr__(self) -> str:
        lines = [f"  ({name}): {module!r}".replace("\n", "\n  ")
                 for name, module in self._modules.items()]  # fmt: skip
        inside = "\n" + "\n".join(lines) + "\n" if lines else self.extra_repr()
        return f"{type(self).__name__}({inside})"


def _register(hooks: list[Callable[..., Any]], hook: Callable[..., Any]) -> Handle:
    hooks.append(hook)
    return Handle(hooks, hook)


@movement
def boundary(ctx: Context, x: Array, *, on_gradient: Callable[[Array], Array | None]) -> Array:
    """x itself; backward passes the gradient through `on_gradient`, which may replace it."""
    ctx.attributes = on_gradient
    return x


@boundary.adjoint
def _boundary_x(ctx: Context, g: Array) -> Array:
    changed = ctx.attributes(g)
    return g if changed is None else changed


def _between_boundaries(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call forward with the module's backward hooks at its first input and its output."""
    of_output: list[Tensor] = []

    def entering(g: Array) -> Array | None:
        gradient = Tensor(g)
        for hook in tuple(module.hooks.before_backward):
            changed = hook(module, (gradient,))
            gradient = gradient if changed is None else _first(changed)
        of_output.append(gradient)
        return leaving(None) if first is None else gradient.data

    def leaving(g: Array | None) -> Array | None:
        gradient = None if g is None else Tensor(g)
        for hook in tuple(module.hooks.after_backward):
            changed = hook(module, (gradient,), (of_output[-1],))
            gradient = gradient if changed is None else _first(changed)
        return of_output[-1].data if g is None else _data(gradient)

    needing = (i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad)
    first = next(needing, None)
    if first is not None:
        watched = boundary(args[first], on_gradient=leaving)
        args = (*args[:first], watched, *args[first + 1 :])
    out = module.forward(*args, **kwargs)
    if not isinstance(out, Tensor):
        raise TypeError(
            f"{type(module).__name__}: backward hooks need a module that returns one tensor"
        )
    return boundary(out, on_gradient=entering)


def _first(changed: Any) -> Tensor:
    return changed[0] if isinstance(changed, tuple) else changed  # type: ignore[no-any-return]


def _data(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else tensor.data
