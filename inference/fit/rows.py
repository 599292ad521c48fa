"""The data of a fit, read a few rows at a time from memory or from a file. Both give bit-identical fits.

Grey pixels can be binarized anew in every epoch (Salakhutdinov and Murray 2008): training batches are then fresh draws, and
everything else sees one fixed draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from elbowroom.models.vae import Batch
from elbowroom.system.memory import fitting

SAMPLE = 2**28
"""Bytes of training data that means and scales are taken from (evenly spaced rows), whether or not the rest is in memory."""
CHUNK = 2**22  # entries per read
WHITE = 255.0


@dataclass(frozen=True, eq=False)
class Rows:
    """Data (N, *event).

    Attributes:
        shape: (N, *event).
        read: row positions (B,) int64 on the CPU -> (B, *event).
        whole: all rows, if they are in memory.
        grey: (N, *event) uint8; if given, a training batch is a draw from Bernoulli(grey / 255).
        beside: further arguments of the programs, by name: `covariates` (N, C), `exposure` (N,); always in memory.
        device: device of the rows that are returned.
        dtype: their precision.
    """

    shape: tuple[int, ...]
    read: Callable[[Tensor], Tensor]
    whole: Tensor | None = None
    grey: Tensor | None = None
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, x: Tensor | Rows | Mapping[str, Tensor], grey: Tensor | None = None) -> Rows:
        """Wrap a tensor in memory, alone or with covariates and exposure."""
        if isinstance(x, Rows):
            return x
        beside = {name: value for name, value in x.items() if name != "x"} if isinstance(x, Mapping) else {}
        whole = x["x"] if isinstance(x, Mapping) else x
        return cls(tuple(whole.shape), whole.__getitem__, whole, grey, beside, whole.device, whole.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> Rows:
        """Return the same rows on a device and in a precision."""
        whole = None if self.whole is None else self.whole.to(device, dtype)
        grey = None if self.grey is None else self.grey.to(device)
        beside = {name: value.to(device, dtype) for name, value in self.beside.items()}
        return replace(self, whole=whole, grey=grey, beside=beside, device=device, dtype=dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, index: Tensor) -> Batch:
        """Return rows by position, (B, *event), with their covariates and exposure."""
        x = self.whole.index_select(0, index) if self.whole is not None else self.read(index.cpu()).to(self.device, self.dtype)
        return {"x": x, **{name: value[index] for name, value in self.beside.items()}}

    def batch(self, index: Tensor, generator: torch.Generator) -> Batch:
        """Return rows for a training step: a fresh binary draw if they have grey values."""
        rows = self.take(index)
        if self.grey is not None:
            rows["x"] = torch.bernoulli(self.grey[index].to(self.dtype) / WHITE, generator=generator)
        return rows

    def first(self, n: int) -> Batch:
        """Return the first n rows, or all if there are fewer."""
        return self.take(torch.arange(min(n, len(self)), device=self.device))

    def example(self, n: int) -> Batch:
        """Return n rows that represent the batches: the first ones, with one that has a missing value (NaN) if any row has."""
        index = torch.arange(min(n, len(self)), device=self.device)
        if self.whole is not None and self.whole.is_floating_point():
            holes = self.whole.flatten(1).sum(1).isnan()
            if bool(holes.any()) and not bool(holes[index].any()):
                index[-1] = holes.nonzero()[0, 0]
        return self.take(index)

    def sample(self) -> Batch:
        """Return all rows, or evenly spaced ones of SAMPLE bytes if there are more."""
        most = fitting(math.prod(self.shape[1:]) * self.dtype.itemsize, SAMPLE)
        if len(self) <= most:
            return self.first(len(self)) if self.whole is None else {"x": self.whole, **self.beside}
        return self.take(torch.arange(most, device=self.device) * len(self) // most)

    def split(self, rows: int) -> Iterator[Batch]:
        """Yield all rows in order, `rows` at a time."""
        for index in torch.arange(len(self), device=self.device).split(rows):
            yield self.take(index)

    def bytes(self) -> Iterator[bytes]:
        """Yield every byte that a fit depends on, in parts."""
        yield str(self.shape).encode()
        for part in self.split(fitting(math.prod(self.shape[1:]), CHUNK)):
            yield part["x"].cpu().contiguous().numpy().tobytes()
        for name, value in self.beside.items():
            yield name.encode() + value.cpu().contiguous().numpy().tobytes()
        if self.grey is not None:
            yield self.grey.cpu().contiguous().numpy().tobytes()
