"""The images that the benchmarks train on: binarized MNIST where it is on this machine, else the digits of scikit-learn."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from elbowroom.data.published import MNIST

SHIFTS, WHITE, HALF = 2, 128, 8  # pixels in every direction; thresholds on scales of 255 and of 16


def images(n: int, held_out: int) -> tuple[Tensor, Tensor, str]:
    """Return training images (n, 784), held-out ones (M <= held_out, 784), float32 of 0 and 1, and what they are.

    `ELBOWROOM_DATA` names the folder with MNIST's files. Nothing is downloaded.
    """
    source = MNIST(binarize=WHITE)
    if source.missing() is None:
        x = source.load().x.reshape(-1, 784)
        return _tensor(x[:n]), _tensor(x[-held_out:]), "MNIST, a pixel 1 from grey 128 up"
    small = load_digits().images >= HALF
    rng = np.random.default_rng(0)
    what = "scikit-learn's digits, a pixel 1 from 8 up, magnified to 28 x 28 and shifted by up to 2 pixels (no MNIST at hand)"
    return _tensor(_shifted(small[300:], n, rng)), _tensor(_shifted(small[:300], held_out, rng)), what


def magnified(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return images (N, 8, 8) with each pixel a block of rows x columns, (N, 8 rows, 8 columns)."""
    return x.repeat(rows, axis=1).repeat(columns, axis=2)


def _shifted(small: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return n of the images, (n, 784), each 3 x 3 times as large, at a random place near the middle of 28 x 28."""
    large = np.pad(magnified(small, 3, 3), ((0, 0), (4, 4), (4, 4)))
    rows, (down, right) = rng.integers(len(large), size=n), rng.integers(2 * SHIFTS + 1, size=(2, n))
    return np.stack([large[r, i : i + 28, j : j + 28] for r, i, j in zip(rows, down, right, strict=True)]).reshape(n, -1)


def _tensor(x: np.ndarray) -> Tensor:
    return torch.as_tensor(x.astype(np.float32))
