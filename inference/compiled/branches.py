"""Branches on values, `if bool(tensor)`, in functions that are traced: their outcomes are recorded first, then replayed.

While a function is traced its tensors have no values. A recording run with values finds what each branch comes to, in order,
and the trace follows it. Under `vmap` a branch sees all rows of the data at once: it is followed where it holds for any of
them (a hole anywhere), which the caller has to compare with a plain evaluation of every row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from elbowroom.inference.compiled.graph import Untraceable


class Branches(TorchFunctionMode):
    """Records the outcomes of branches, or replays them.

    Args:
        allowed: says of the tensor that a branch tests whether its outcome may be kept; by default any may.
        outcomes: to replay; None records.

    Attributes:
        outcomes: what each branch came to, in order.
        tested: what each branch tests, in order, where outcomes are replayed.
    """

    def __init__(self, allowed: Callable[[Tensor], bool] | None = None, outcomes: list[bool] | None = None) -> None:
        super().__init__()
        self.allowed = allowed
        self.recording = outcomes is None
        self.outcomes: list[bool] = [] if outcomes is None else outcomes
        self.tested: list[Tensor] = []
        self._left: Iterator[bool] = iter(self.outcomes)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.__bool__:
            return func(*args, **(kwargs or {}))
        if self.recording:
            self.outcomes.append(self._outcome(args[0]))
            return self.outcomes[-1]
        outcome = next(self._left, None)
        if outcome is None:
            raise Untraceable("it branches differently when it is traced")
        self.tested.append(args[0])
        return outcome

    def _outcome(self, tensor: Tensor) -> bool:
        if self.allowed is not None and not self.allowed(tensor):
            raise Untraceable("it branches on a latent value")
        return bool(plain(tensor).any())


def plain(tensor: Tensor) -> Tensor:
    """Return the whole tensor of which `vmap` shows one row."""
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def levels(tensor: Tensor) -> set[int]:
    """Return the levels of `vmap` that a tensor has rows in."""
    functorch, found = torch._C._functorch, set()
    while functorch.is_batchedtensor(tensor):
        found.add(functorch.maybe_get_level(tensor))
        tensor = functorch.get_unwrapped(tensor)
    return found
