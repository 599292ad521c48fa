"""Branches on tensor values (`if bool(tensor)`) in traced functions: their outcomes are recorded, then replayed.

Tensors have no values while a function is traced. A run with values first records the outcome of each branch, and the trace
then follows these outcomes. Under `vmap` one test covers all rows of the data: its outcome is true if it is true for any row
(for example, if any row has a missing value). The caller must compare the result with a plain evaluation of every row.
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
        allowed: says whether the outcome of a branch on this tensor may be recorded; None allows all.
        outcomes: outcomes to replay; None records.

    Attributes:
        outcomes: the outcome of each branch, in order.
        tested: the tensor that each branch tests, in order; filled during replay.
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
    """Return the whole tensor, of which `vmap` shows one row."""
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def levels(tensor: Tensor) -> set[int]:
    """Return the levels of `vmap` at which a tensor is batched."""
    functorch, found = torch._C._functorch, set()
    while functorch.is_batchedtensor(tensor):
        found.add(functorch.maybe_get_level(tensor))
        tensor = functorch.get_unwrapped(tensor)
    return found
