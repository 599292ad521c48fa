"""Log densities of all data at all points, as sums of products that are multiplied out only once, after the summation.

A log density (G, N) that factorises is a product L R' of points' columns L (G, k) and data's columns R (N, k). A term that
depends on the point alone, or on the datum alone, is such a product with a column of ones. A sum of such terms is the product
of the concatenated columns:

    sum_i L_i R_i' + a 1' + 1 b' = [L_1 ... a 1] [R_1 ... 1 b]'

so that prior, normalizers, base measures, Jacobians and several sites cost one matrix product and no pass over (G, N).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """One product: the columns of the points, and a function that makes those of the data.

    Attributes:
        left: (G, k).
        sources: everything that `right` depends on: tensors and other values.
        right: makes (N, k), and a further term (N,).
    """

    left: Tensor
    sources: tuple[Any, ...]
    right: Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Bilinear:
    """A sum of factors, a term per point, a term per datum, and a rest that does not factorise.

    Attributes:
        factors: the products.
        point: (G or 1, 1).
        datum: (1, N or 1).
        rest: (G, N), or None.
    """

    factors: tuple[Factor, ...] = ()
    point: Tensor | float = 0.0
    datum: Tensor | float = 0.0
    rest: Tensor | None = None

    def __add__(self, other: Bilinear | Tensor | float) -> Bilinear:
        """Return the sum; a tensor must be broadcastable to (G, N)."""
        if isinstance(other, Bilinear):
            rest = self.rest if other.rest is None else other.rest if self.rest is None else self.rest + other.rest
            return Bilinear(self.factors + other.factors, self.point + other.point, self.datum + other.datum, rest)
        if not isinstance(other, Tensor):
            return dataclasses.replace(self, point=self.point + other)
        if other.dim() > 2:
            raise ValueError(f"a log density per point and datum has shape {tuple(other.shape)}")
        other = other[(None,) * (2 - other.dim())]
        if other.shape[1] == 1:
            return dataclasses.replace(self, point=self.point + other)
        if other.shape[0] == 1:
            return dataclasses.replace(self, datum=self.datum + other)
        return dataclasses.replace(self, rest=other if self.rest is None else self.rest + other)

    __radd__ = __add__

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the sum."""
        parts = [factor.left for factor in self.factors] + [t for t in (self.point, self.datum, self.rest) if t is not None]
        kinds = [t.dtype for t in parts if isinstance(t, Tensor)]
        found = kinds[0] if kinds else torch.get_default_dtype()
        for kind in kinds:
            found = torch.promote_types(found, kind)
        return found

    def columns(self, n_points: int, n_obs: int, kept: Kept) -> tuple[Tensor, Tensor]:
        """Return the points' columns (G, K) and the data's (N, K); their product is the sum without `rest`."""
        dtype = self.dtype
        lefts = [factor.left for factor in self.factors]
        device = next((t.device for t in (*lefts, self.point, self.datum, self.rest) if isinstance(t, Tensor)), None)
        like = torch.empty(0, dtype=dtype, device=device)

        def right() -> Tensor:
            made = [factor.right() for factor in self.factors]
            datum = torch.as_tensor(self.datum, dtype=dtype, device=device).reshape(-1)
            for _, beside in made:
                datum = datum + beside
            parts = [t for t, _ in made] + [like.new_ones(n_obs, 1), datum[:, None]]
            width = sum(t.shape[1] for t in parts)
            out, start = like.new_empty(n_obs, width), 0
            for t in parts:  # the last columns are the largest: added last, they cost the others no accuracy
                out[:, start : start + t.shape[1]] = t
                start += t.shape[1]
            return out

        point = torch.as_tensor(self.point, dtype=dtype, device=device).expand(n_points, 1)
        left = torch.cat([*(t.to(dtype) for t in lefts), point, like.new_ones(n_points, 1)], 1)
        key = (n_obs, left.shape[1], dtype, self.datum, *(source for factor in self.factors for source in factor.sources))
        return left, kept(key, right)

    def dense(self, n_obs: int) -> Tensor:
        """Return the sum, (G, N)."""
        sizes = [len(t) for t in (self.point, self.rest, *(f.left for f in self.factors)) if isinstance(t, Tensor)]
        left, right = self.columns(max(sizes, default=1), n_obs, Kept())
        product = left @ right.T
        return product if self.rest is None else product + self.rest


class Kept:
    """The last result of a computation, valid while its inputs stay the same.

    Tensors are the same if they share memory that was not written to since, or hold equal numbers.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._versions: list[int] = []
        self._value: Tensor | None = None

    def __call__(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        """Return make(), or the last result if the key is the same."""
        if self._value is None or not self._holds(key):
            self._value = None  # frees the old value first
            self._value = make()
            self._key, self._versions = key, [_version(part) for part in key]
        return self._value

    def _holds(self, key: tuple[Any, ...]) -> bool:
        if len(key) != len(self._key) or self._versions != [_version(part) for part in self._key]:
            return False
        return all(map(_same, self._key, key))


def _version(part: Any) -> int:
    return part._version if isinstance(part, Tensor) and not part.is_inference() else 0


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and isinstance(a, Hashable) and bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.is_inference() or b.is_inference():
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return _version(a) == _version(b)
    return torch.equal(a, b)
