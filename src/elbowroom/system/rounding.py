"""Does a number format keep apart the values of a column? At 1.7e9 float32 has steps of 128: unix seconds become few values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

STEPS = 1_000  # of the format, that the standard deviation of a column must have: then log p(x) is off by about 1e-4 nats
HALF = 32  # steps that half of the different values must extend over, where others are far from them
LEVELS = 16  # different values below which these are levels
NOISE = 1e-12  # relative difference of values that are taken for the same: rounding of what made the file
SAMPLE, WIDE = 20_000, 2_000  # rows and columns of which different values are compared


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
        for part in parts:
            x = np.asarray(part, dtype=np.float64)
            seen = ~np.isnan(x)
            if not kept:
                shift = np.where(seen, x, 0).sum(0) / np.maximum(seen.sum(0), 1)
                low, high = np.full(x.shape[1:], np.inf), np.full(x.shape[1:], -np.inf)
            off = np.where(seen, x - shift, 0)
            count, total, squares = count + seen.sum(0), total + off.sum(0), squares + (off * off).sum(0)
            low = np.minimum(low, np.where(seen, x, np.inf).min(0, initial=np.inf))
            high = np.maximum(high, np.where(seen, x, -np.inf).max(0, initial=-np.inf))
            if sum(map(len, kept)) < SAMPLE:
                kept.append(x[:: max(1, len(x) // SAMPLE)])
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
    return next(
        (found for i in np.flatnonzero(known) if (found := _half(np.concatenate([x[:, i] for x in kept]), int(i)))), None
    )


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
