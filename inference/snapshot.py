"""A snapshot of everything a program's numbers come from, swapped in for the time of a computation.

A Pyro program reads weights from modules that it closes over and from Pyro's parameter store. To evaluate it in float64, in
eval mode and at fixed weights, without changing anything that the user owns, the tensors' storage is exchanged inside a scope
and put back after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Snapshot:
    """Copies of the arguments and weights of a pair of programs.

    Args:
        programs: the callables.
        args: their arguments.
        kwargs: their keyword arguments.

    Attributes:
        args: copies of the arguments, in `dtype`.
        kwargs: likewise.
        dtype: floating-point type of the copies; None keeps each tensor's own.
    """

    def __init__(self, programs: tuple[Callable[..., Any], ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._original = (args, kwargs)
        self._modules = _find_modules(*programs, args, kwargs)
        self.take(None)

    def take(self, dtype: torch.dtype | None) -> None:
        """Copy weights and arguments as they are now, in `dtype` where they are floating point."""

        def convert(t: Any) -> Any:
            return self.convert(t, dtype) if isinstance(t, Tensor) else t

        self.dtype = dtype
        self.args, self.kwargs = pytree.tree_map(convert, self._original)
        arguments = {id(t) for t in pytree.tree_leaves(self._original) if isinstance(t, Tensor)}
        self._weights = [(t, self.convert(t, dtype)) for t in self.leaves() if id(t) not in arguments]

    @staticmethod
    def convert(t: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Copy a tensor, in `dtype` if it is floating point."""
        return t.detach().clone() if dtype is None or not t.is_floating_point() else t.detach().to(dtype, copy=True)

    def leaves(self) -> list[Tensor]:
        """Every tensor that the programs' numbers come from: arguments, parameters, buffers, the parameter store."""
        tensors = [t for t in pytree.tree_leaves(self._original) if isinstance(t, Tensor)]
        for module in self._modules:
            tensors += [*module.parameters(), *module.buffers()]
        tensors += pyro.get_param_store()._params.values()
        return list({id(t): t for t in tensors}.values())

    @contextlib.contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Put every module into eval mode, and back."""
        training = [(m, m.training) for root in self._modules for m in root.modules()]
        for module, _ in training:
            module.training = False
        try:
            yield
        finally:
            for module, was in training:
                module.training = was

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Swap the copies in, in eval mode, without gradients in the weights and without Pyro's validation."""
        default = torch.get_default_dtype()
        originals = [(t, t.data, t.requires_grad) for t, _ in self._weights]
        with self.eval_mode(), pyro.validation_enabled(False):
            try:
                for tensor, value in self._weights:
                    if tensor.is_leaf:
                        tensor.requires_grad_(False)
                    tensor.data = value
                torch.set_default_dtype(self.dtype or default)
                yield
            finally:
                torch.set_default_dtype(default)
                for tensor, data, requires_grad in originals:
                    tensor.data = data
                    if tensor.is_leaf:
                        tensor.requires_grad_(requires_grad)


def _find_modules(*roots: Any) -> list[torch.nn.Module]:
    """Collect the nn.Modules that a callable can reach: itself, its owner, its closure, partials, and named globals."""
    found: dict[int, torch.nn.Module] = {}
    seen: set[int] = set()

    def visit(item: Any) -> None:
        if id(item) in seen:
            return
        seen.add(id(item))
        if isinstance(item, torch.nn.Module):
            found[id(item)] = item
            return
        if isinstance(item, list | tuple):
            for part in item:
                visit(part)
        elif isinstance(item, dict):
            for part in item.values():
                visit(part)
        for attribute in ("__self__", "__wrapped__", "func", "fn", "model", "guide"):
            part = getattr(item, attribute, None)
            if isinstance(part, torch.nn.Module) or callable(part):
                visit(part)
        if hasattr(item, "args") and hasattr(item, "keywords"):
            visit(item.args)
            visit(item.keywords)
        code = getattr(item, "__code__", None)
        if code is not None:
            for cell in item.__closure__ or ():
                try:
                    visit(cell.cell_contents)
                except ValueError:
                    continue  # an empty cell
            for word in code.co_names:
                part = item.__globals__.get(word)
                if isinstance(part, torch.nn.Module) or (callable(part) and _is_user_code(part)):
                    visit(part)

    for root in roots:
        visit(root)
    return list(found.values())


def _is_user_code(item: Any) -> bool:
    module = getattr(item, "__module__", None) or ""
    return module.split(".")[0] not in {"torch", "pyro", "numpy", "builtins", "math"}
