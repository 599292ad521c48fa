"""The entries of an event: the kind of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pyro.distributions import Independent, TorchDistribution
from torch import Tensor

from elbowroom.models.columns import Column
from elbowroom.models.likelihoods.categorical import Codes
from elbowroom.models.likelihoods.mixed import Columns

EntryKind = Literal["number", "count", "binary", "ordinal", "categorical"]


def pieces(p: TorchDistribution) -> list[tuple[Tensor, TorchDistribution]]:
    """Return the scalar distributions of p(x|z), each with the indices of its entries (of flattened x).

    Their batch shape is (*batch of p, *event), or (*batch of p, columns) for a group of columns of a table.
    """
    parts = p.parts if isinstance(p, Columns) else [(torch.arange(math.prod(p.event_shape)), p)]
    return [(index, part.base_dist if isinstance(part, Independent) else part) for index, part in parts]


def coded(column: Column) -> bool:
    """Return whether the values of a column are codes."""
    return column.kind in ("binary", "ordinal", "categorical")


def entry_kinds(p: TorchDistribution, columns: Sequence[Column] | None, *, ordered: bool) -> list[EntryKind]:
    """Return the kind of each entry of x by its distribution p(x|z), at any z, and by the `columns` of a table.

    `ordered` says whether the codes of an array without columns have an order.
    """
    kinds: list[EntryKind] = ["number"] * math.prod(p.event_shape)
    for index, part in pieces(p):
        for j in index.tolist():
            if isinstance(part, Codes):
                known = None if columns is None else columns[j].kind
                sorted_codes = ordered if known is None else known != "categorical"
                kinds[j] = "ordinal" if sorted_codes else "categorical"
            elif isinstance(part, torch.distributions.Bernoulli):
                kinds[j] = "binary"
            elif part.support.is_discrete:
                kinds[j] = "count"
    return kinds
