"""The arguments of a pair of programs: leaves, each of which has its rows along one dimension, or has none.

A leaf is a tensor, a `PackedSequence` (sequences of different lengths, as torch.nn.GRU takes them, of which each is a row), or
anything else, which is left as it is. https://pytorch.org/docs/stable/generated/torch.nn.utils.rnn.PackedSequence.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree


def leaves(tree: Any) -> list[Any]:
    """Return the leaves of arguments, a PackedSequence as one."""
    return pytree.tree_leaves(tree, is_leaf=_packed)


def with_leaves(tree: Any, new: Sequence[Any]) -> Any:
    """Return arguments of the same structure with other leaves, in the order of `leaves`."""
    return pytree.tree_unflatten(new, pytree.tree_structure(tree, is_leaf=_packed))


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to every leaf."""
    return pytree.tree_map(function, tree, is_leaf=_packed)


def tensors(leaf: Any) -> list[Tensor]:
    """Return the tensors that a leaf consists of; none if it is something else."""
    if isinstance(leaf, PackedSequence):
        return [t for t in leaf if t is not None]
    return [leaf] if isinstance(leaf, Tensor) else []


def converted(leaf: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the tensors of a leaf; lengths and orders of a PackedSequence are copied as they are."""
    if isinstance(leaf, PackedSequence):
        rest = [None if t is None else t.clone() for t in leaf[1:]]
        return PackedSequence(convert(leaf.data), *rest)
    return convert(leaf) if isinstance(leaf, Tensor) else leaf


def sizes(leaf: Any) -> tuple[int, ...]:
    """Return the sizes of a leaf's dimensions, any of which may be that of the rows: of a PackedSequence, one."""
    if isinstance(leaf, PackedSequence):
        return (int(leaf.batch_sizes[0]),)
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else ()


def numbers(leaf: Any) -> int:
    """Return how many numbers a leaf holds."""
    return sum(t.numel() for t in tensors(leaf)[:1])


def take(leaf: Any, dim: int | None, rows: Tensor) -> Any:
    """Return some rows of a leaf, in the order given, any of them several times; all of it if it has no rows."""
    if dim is None:
        return leaf
    return _sequences(leaf, rows) if isinstance(leaf, PackedSequence) else leaf.index_select(dim, rows)


def repeat(leaf: Any, dim: int | None, times: int) -> Any:
    """Return all rows of a leaf, `times` over; all of it once if it has no rows."""
    if dim is None:
        return leaf
    if isinstance(leaf, PackedSequence):
        return _sequences(leaf, torch.arange(sizes(leaf)[0]).repeat(times))
    return leaf.repeat(*[times if i == dim else 1 for i in range(leaf.dim())])


def _packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedSequence)


def _sequences(packed: PackedSequence, rows: Tensor) -> PackedSequence:
    """Return the sequences `rows`, packed: entry t of the sequence at place s is offset_t + s in `data`.

    Sequences are kept longest first. Where they stand so already, and did before, no order is stated, as
    `enforce_sorted=True` has it; otherwise both orders are.
    """
    rows, counts = rows.to(packed.batch_sizes.device), packed.batch_sizes
    offset = counts.cumsum(0) - counts
    place = rows if packed.unsorted_indices is None else packed.unsorted_indices.to(rows.device)[rows]
    length = (counts[:, None] > place).sum(0)
    order = length.argsort(descending=True, stable=True)
    steps = torch.arange(int(length.max()))[:, None]
    there = steps < length[order]
    entry = (offset[: len(steps), None] + place[order])[there]
    device = packed.data.device
    data = packed.data.index_select(0, entry.to(device))
    if packed.sorted_indices is None and bool((order == torch.arange(len(order))).all()):
        return PackedSequence(data, there.sum(1))
    return PackedSequence(data, there.sum(1), order.to(device), order.argsort().to(device))
