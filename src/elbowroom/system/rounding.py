"""Does a number format keep apart the values of a column? At 1.7e9 float32 has steps of 128: unix seconds become few values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

STEPS = 1_000  # of the format, that the standard deviation of a column must have: then log p(x) is off by about 1e-4 nats
HALF = 32  # steps that half of the different values must extend over, where others are far from them
LEVELS = 16  # different values below which these are levels
NOISE = 1e-12  # relative difference of values that are taken for the same: rounding of what made the file
PIECE = 2**17  # entries at once
SAMPLE, WIDE = 2**20, 2_000  # entries and columns of which different values are compared


@dataclass(frozen=True)
class Coarse:
    """A column whose values a format does not keep apart.

    Attributes:
        index: its place in a datum.
        size: how large its values are.
        spread: how far they are apart: a standard deviation, or the range of half of the different values.
        step: of the format, at this size.
        half: whether `spread` is that range.
    """

    index: tuple[int, ...]
    size: float
    spread: float
    step: float
    half: bool = False

    def __str__(self) -> str:
        what = "half of its different values lie within" if self.half else "it varies by"
        return f"{what} {self.spread:.3g} at {self.size:.6g}"


def coarse(parts: Iterable[Any], dtype: str) -> Coarse | None:
    """Return the first column that a format is too coarse for; positions of images and sequences are compared with the widest.

    Args:
        parts: the rows of an array (n, *event), piece by piece; NaN is left out.
        dtype: `float32` or `float64`.
    """
    count = shift = total = squares = low = high = np.zeros(())
    kept: list[np.ndarray] = []
    with np.errstate(over="ignore", invalid="ignore"):
        for x in _pieces(parts):
            here = (~np.isnan(x)).sum(0)
            whole = bool((here == len(x)).all())
            if not kept:
                shift = np.where(here > 0, np.nansum(x, 0) / np.maximum(here, 1), 0)
                low, high = np.full(x.shape[1:], np.inf), np.full(x.shape[1:], -np.inf)
            off = x - shift if whole else np.nan_to_num(x - shift)
            count, total, squares = count + here, total + off.sum(0), squares + np.einsum("n...,n...->...", off, off)
            low, high = np.fmin(low, np.fmin.reduce(x, 0)), np.fmax(high, np.fmax.reduce(x, 0))
            if sum(part.size for part in kept) < SAMPLE:
                kept.append(x)
        if not kept or not np.ndim(count):
            return None
        n = np.maximum(count, 1)
        sd = np.where(low < high, np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0)), 0)
        size = np.hypot(shift + total / n, sd)
        step = _step(size, dtype)
        known = (low < high) & np.isfinite(size) & np.isfinite(step)
    wide = sd if sd.ndim == 1 else np.full_like(sd, sd[known].max(initial=0))
    bad = known & (wide < STEPS * step)
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        return Coarse(index, float(size[index]), float(wide[index]), float(step[index]))
    if dtype != "float32" or sd.ndim != 1 or len(sd) > WIDE:
        return None
    some = np.concatenate(kept)
    halves = (_half(some[:, column], int(column)) for column in np.flatnonzero(known))
    return next(filter(None, halves), None)


def _pieces(parts: Iterable[Any]) -> Iterator[np.ndarray]:
    """Yield rows in double precision, so few at once that they stay in the processor's cache."""
    for part in parts:
        rows = max(1, PIECE // max(1, math.prod(part.shape[1:])))
        for start in range(0, len(part), rows):
            yield np.asarray(part[start : start + rows], dtype=np.float64)


def _step(size: Any, dtype: str) -> Any:
    return np.spacing(np.asarray(size, dtype=dtype)).astype(np.float64)


def _half(values: np.ndarray, column: int) -> Coarse | None:
    """Return the narrowest half of the different values where the format has few steps there; None where it has enough."""
    x = np.unique(values[np.isfinite(values)])
    if len(x) >= LEVELS:
        x = x[np.concatenate([[True], np.diff(x) > NOISE * np.abs(x[1:])])]
    if len(x) < LEVELS:
        return None
    reach = len(x) - len(x) // 2
    width = x[reach - 1 :] - x[: len(x) - reach + 1]
    start = int(np.argmin(width))
    size = float(max(abs(x[start]), abs(x[start + reach - 1])))
    step = float(_step(size, "float32"))
    return Coarse((column,), size, float(width[start]), step, half=True) if width[start] < HALF * step else None
