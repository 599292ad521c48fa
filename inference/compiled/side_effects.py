"""Changes that a program makes outside its parameters and buffers while it is tried and traced.

A graph holds tensor operations only. It would freeze everything else at the time of tracing: a call counter, stored values,
draws from Python's or NumPy's random numbers. A network that uses such things therefore cannot be a graph. To find out, the
program is run once and everything is restored afterwards.

Covered are the attributes of modules; the lists, dictionaries, generators and user objects that they hold; and the global
generators of Python and NumPy. Global variables of the user's files are not covered.
"""

from __future__ import annotations

import functools
import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STORES = ("_parameters", "_buffers", "_modules")
OWN = frozenset(vars(nn.Module()))  # torch's: train mode, hooks, the stores
PLAIN = (bool, int, float, complex, str, bytes, type(None))
LIBRARIES = sys.stdlib_module_names | {"torch", "pyro", "numpy"}
DEEP = 6  # containers and objects within each other

Kept = tuple[str, Any, Callable[[], Any], Callable[[Any], None]]


class SideEffects:
    """Copies of everything that modules and their submodules hold besides parameters and buffers."""

    def __init__(self, *modules: nn.Module) -> None:
        self._kept: list[Kept] = []  # name, value, how to read and to write it
        self._seen: dict[int, Any] = {}  # keeps the items alive, so that no id is reused
        self._keep("Python's random numbers", random.getstate, random.setstate)
        self._keep("NumPy's random numbers", np.random.get_state, np.random.set_state)
        for module in modules:
            self._visit(module, "", 0)

    def changed(self) -> str:
        """Return the name of something that has changed since the copy, or ""."""
        for name, before, read, _ in self._kept:
            now = read()
            if not _same(before, now):
                keys = [*before, *now] if isinstance(before, dict) else []
                missing = object()
                own = (key for key in keys if not _same(before.get(key, missing), now.get(key, missing)))
                return _join(name, next(own, ""))
        return ""

    def put_back(self) -> None:
        """Restore everything that has changed."""
        for _, before, read, write in self._kept:
            if not _same(before, read()):
                write(before)

    def _keep(self, name: str, read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        self._kept.append((name, read(), read, write))

    def _visit(self, item: Any, name: str, depth: int) -> None:
        if depth > DEEP or id(item) in self._seen or isinstance(item, (*PLAIN, nn.Parameter, type, types.ModuleType)):
            return
        self._seen[id(item)] = item
        if isinstance(item, Tensor):
            self._keep(name, lambda: item.detach().clone(), lambda before: item.detach().copy_(before))
        elif isinstance(item, np.ndarray):
            self._keep(name, item.copy, lambda before: np.copyto(item, before))
        elif isinstance(item, torch.Generator):
            self._keep(name, item.get_state, item.set_state)
        elif isinstance(item, np.random.Generator):
            bits: Any = item.bit_generator
            self._keep(name, lambda: bits.state, lambda before: setattr(bits, "state", before))
        elif isinstance(item, random.Random):
            self._keep(name, item.getstate, item.setstate)
        elif isinstance(item, list):
            self._keep(name, lambda: tuple(item), lambda before: item.__setitem__(slice(None), before))
            self._visit_all(enumerate(item), name, depth)
        elif isinstance(item, dict):
            self._keep(name, lambda: dict(item), functools.partial(_refill, item))
            self._visit_all(item.items(), name, depth)
        elif isinstance(item, nn.Module) or type(item).__module__.split(".")[0] not in LIBRARIES:
            self._visit_attributes(item, name, depth)

    def _visit_attributes(self, item: Any, name: str, depth: int) -> None:
        """Copy the attributes of an object, without cached properties and the attributes that torch manages."""
        held = getattr(item, "__dict__", None)
        if not isinstance(held, dict):
            return
        once = {key for key, value in _of_class(type(item)).items() if isinstance(value, functools.cached_property)}
        left = once | OWN if isinstance(item, nn.Module) else once

        def read() -> dict[Any, Any]:
            return {key: value for key, value in held.items() if key not in left}

        def write(before: dict[Any, Any]) -> None:
            for key in read():
                del held[key]
            held.update(before)

        self._keep(name, read, write)
        self._visit_all(read().items(), name, depth)
        if isinstance(item, nn.Module):
            for store in STORES:  # the tensors in them are copied by others
                part = held[store]
                self._keep(name, part.copy, functools.partial(_refill, part))
            for key, module in item._modules.items():  # however deep they are
                self._visit(module, _join(name, key), 0)

    def _visit_all(self, items: Any, name: str, depth: int) -> None:
        for key, value in items:
            self._visit(value, _join(name, key), depth + 1)


@contextmanager
def left_alone(*modules: nn.Module) -> Iterator[SideEffects]:
    """Restore on exit what a program changed besides parameters and buffers."""
    state = SideEffects(*modules)
    try:
        yield state
    finally:
        state.put_back()


def _of_class(kind: type) -> dict[str, Any]:
    return {key: value for base in reversed(kind.__mro__) for key, value in vars(base).items()}


def _join(name: str, key: Any) -> str:
    return f"{name}.{key}".strip(".")


def _refill(part: dict[Any, Any], before: dict[Any, Any]) -> None:
    part.clear()
    part.update(before)


def _same(one: Any, other: Any) -> bool:
    """Say whether two values are identical, equal numbers or arrays, or containers of such."""
    if one is other:
        return True
    if type(one) is not type(other) or isinstance(one, nn.Parameter):
        return False
    if isinstance(one, PLAIN):
        return bool(one == other) or (one != one and other != other)  # NaN
    if isinstance(one, Tensor):
        return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
    if isinstance(one, np.ndarray):
        return one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(value, other[key]) for key, value in one.items())
    return False
