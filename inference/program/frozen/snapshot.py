"""A snapshot of everything that a program's numbers depend on, swapped in during a computation.

A Pyro program reads weights from modules in its closure and from Pyro's parameter store. The snapshot lets it run in float64,
in eval mode and at fixed weights without changing the user's objects: the storage of the tensors is exchanged inside a scope
and restored afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from torch import Tensor

from elbowroom.inference.program.frozen import arguments
from elbowroom.inference.program.sites import Program

STORE = ("_params", "_param_to_name", "_constraints")  # the mappings of Pyro's parameter store


class Snapshot:
    """Copies of the arguments and weights of a pair of programs.

    Attributes:
        args: copies of the arguments, in `dtype`.
        kwargs: likewise.
        dtype: floating-point type of the copies; None keeps each tensor's own.
    """

    def __init__(self, programs: tuple[Callable[..., Any], ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._original = (args, kwargs)
        self._modules = _find_modules(*programs, args, kwargs)
        self._depth = 0
        self.take(None)

    def take(self, dtype: torch.dtype | None) -> None:
        """Copy the current weights and arguments, floating-point ones in `dtype`."""
        self.dtype = dtype
        self.args, self.kwargs = self._converted(self._original, dtype)
        given = {id(t) for t in self._given()}
        store = pyro.get_param_store()
        self._store = [dict(getattr(store, name)) for name in STORE]
        self._weights = [(t, self.convert(t, dtype)) for t in self.leaves() if id(t) not in given]

    def converted(self, dtype: torch.dtype) -> Snapshot:
        """Return a copy of this snapshot in another precision, without reading the current weights."""
        other = copy.copy(self)
        other.dtype, other._depth = dtype, 0
        other.args, other.kwargs = self._converted((self.args, self.kwargs), dtype)
        other._weights = [(t, self.convert(value, dtype)) for t, value in self._weights]
        return other

    @staticmethod
    def convert(t: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Copy a tensor, in `dtype` if it is floating point."""
        return t.detach().clone() if dtype is None or not t.is_floating_point() else t.detach().to(dtype, copy=True)

    @classmethod
    def _converted(cls, tree: Any, dtype: torch.dtype | None) -> Any:
        return arguments.mapped(lambda leaf: arguments.converted(leaf, lambda t: cls.convert(t, dtype)), tree)

    def _given(self) -> list[Tensor]:
        """Return the tensors of the arguments."""
        return [t for leaf in arguments.leaves(self._original) for t in arguments.tensors(leaf)]

    def leaves(self) -> list[Tensor]:
        """Return every tensor that the programs depend on: arguments, parameters, buffers, the parameter store."""
        tensors = self._given()
        for module in self._modules:
            tensors += [*module.parameters(), *module.buffers()]
        tensors += pyro.get_param_store()._params.values()
        return list({id(t): t for t in tensors}.values())

    def identity(self) -> tuple[int, ...]:
        """Return a key for the weight tensors as objects, not for their values."""
        return tuple(id(t) for t, _ in self._weights)

    def size(self) -> int:
        """Return the number of weights."""
        return sum(value.numel() for _, value in self._weights)

    @contextlib.contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Put every module into eval mode, and restore its mode on exit."""
        training = [m for root in self._modules for m in root.modules() if m.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Swap the copies in, in eval mode, without gradients in the weights and without Pyro's validation.

        Nested scopes cost nothing: open one around many evaluations.
        """
        if self._depth:
            yield
            return
        default = torch.get_default_dtype()
        store = pyro.get_param_store()
        kept = [getattr(store, name) for name in STORE]
        originals = [(t, t.data, t.requires_grad, t.grad if t.is_leaf else None) for t, _ in self._weights]
        with self.eval_mode(), pyro.validation_enabled(False):
            try:
                for name, mapping in zip(STORE, self._store, strict=True):
                    setattr(store, name, dict(mapping))
                for tensor, value in self._weights:
                    if tensor.is_leaf:
                        tensor.requires_grad_(False)
                        tensor.grad = None  # it may have another precision
                    tensor.data = value
                torch.set_default_dtype(self.dtype or default)
                self._depth += 1
                yield
            finally:
                self._depth = 0
                torch.set_default_dtype(default)
                for name, mapping in zip(STORE, kept, strict=True):
                    setattr(store, name, mapping)
                for tensor, data, requires_grad, grad in originals:
                    tensor.data = data
                    if tensor.is_leaf:
                        tensor.requires_grad_(requires_grad)
                        tensor.grad = grad


def _find_modules(*roots: Any) -> list[torch.nn.Module]:
    """Collect the nn.Modules that callables can reach.

    The search covers a module itself, the owner of a method, closures, partials, attributes of plain objects, containers, and
    globals that a function or a nested function names.
    """
    found: dict[int, torch.nn.Module] = {}
    seen: dict[int, Any] = {}  # keeps the items alive, so that no id is reused

    def visit(item: Any) -> None:
        if id(item) in seen or isinstance(item, Tensor | str | bytes | int | float | types.ModuleType | type):
            return
        seen[id(item)] = item
        if isinstance(item, torch.nn.Module):
            found[id(item)] = item
        if isinstance(item, list | tuple | set):
            for part in item:
                visit(part)
        elif isinstance(item, dict):
            for part in item.values():
                visit(part)
        elif isinstance(item, types.FunctionType):
            for cell in item.__closure__ or ():
                with contextlib.suppress(ValueError):  # an empty cell
                    visit(cell.cell_contents)
            visit(getattr(item, "__wrapped__", None))
            for name in _names(item.__code__):
                part = item.__globals__.get(name)
                if _is_users(part) or isinstance(part, torch.nn.Module | list | tuple | dict):
                    visit(part)
        elif isinstance(item, types.MethodType):
            visit(item.__self__)
            visit(item.__func__)
        elif isinstance(item, functools.partial):
            visit([item.func, item.args, item.keywords])
        elif _is_users(item) or not isinstance(item, torch.nn.Module):
            visit(getattr(item, "__dict__", None))
            visit(inspect.getattr_static(type(item), "__call__", None))

    for root in roots:
        visit(root)
    return list(found.values())


def _names(code: types.CodeType) -> set[str]:
    """Global names that a function's code uses, nested functions included."""
    nested = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*nested)


def _is_users(item: Any) -> bool:
    module = getattr(item, "__module__", None) or getattr(type(item), "__module__", None) or ""
    return module.split(".")[0] not in {"torch", "pyro", "numpy", "builtins", "math", "functools"}


def program_in(dtype: torch.dtype, program: Program) -> Program:
    """Return a program with its pinned values and tables of discrete values in `dtype`, if they are floating point."""
    pinned = {name: Snapshot.convert(value, dtype) for name, value in program.pinned.items()}
    tables = [site.values for site in program.discrete]
    discrete = tuple(
        site if table is None else dataclasses.replace(site, values=Snapshot.convert(table, dtype))
        for site, table in zip(program.discrete, tables, strict=True)
    )
    return dataclasses.replace(program, pinned=pinned, discrete=discrete)
