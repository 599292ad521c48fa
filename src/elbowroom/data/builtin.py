"""Data sets that need no file: digits that come with scikit-learn, and simulated data whose truth is known."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt

from elbowroom.data.dataset import DEFAULT_SPLIT, Dataset, Fractions, Source
from elbowroom.errors import SpecError
from elbowroom.system.archive import too_large


class Digits(Source):
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels of 0 to 16 (embedded; no download).

    Alpaydin and Kaynak 1998, https://archive.ics.uci.edu/dataset/80.

    Args:
        binarize: make a pixel 1 where it is at least this threshold (on the scale 0 to 16), else 0; null keeps grey.
        scale: what grey pixels are divided by: 16 gives values in [0, 1]. It does not matter when binarized.
        split: fractions of train, validation and test.
    """

    def __init__(
        self,
        *,
        binarize: Annotated[float, Gt(0)] | None = None,
        scale: Annotated[float, Gt(0)] = 16.0,
        split: Fractions = DEFAULT_SPLIT,
    ) -> None:
        self.binarize = binarize
        self.scale = scale
        self.split = split

    def load(self) -> Dataset:
        """Return x of shape (1797, 8, 8), with the digits as labels."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        grey = bunch.images
        if self.binarize is not None and self.binarize > grey.max():
            raise SpecError(f"data.binarize: {self.binarize:g} leaves every pixel 0: pixels go from 0 to {grey.max():g}")
        x = grey / self.scale if self.binarize is None else grey >= self.binarize
        return Dataset(x.astype(np.float32), "digits", labels=bunch.target.astype(np.int64))


class LinearGaussianData(Source):
    """Data simulated from z ~ N(0, I), x|z ~ N(W z + mu, noise^2 I), where everything is known in closed form.

    W and mu are standard normal draws. `Dataset.truth` is the program.

    Args:
        n: number of data.
        dim: length of x.
        latent_dim: length of z.
        noise: standard deviation of the noise.
        seed: of the simulation (the spec's own seed does not change the data).
        split: fractions of train, validation and test.
    """

    def __init__(
        self,
        *,
        n: Annotated[int, Ge(3)] = 2000,
        dim: Annotated[int, Ge(1)] = 8,
        latent_dim: Annotated[int, Ge(1)] = 2,
        noise: Annotated[float, Gt(0)] = 0.5,
        seed: Annotated[int, Ge(0)] = 0,
        split: Fractions = DEFAULT_SPLIT,
    ) -> None:
        self.n, self.dim, self.latent_dim, self.noise, self.seed = n, dim, latent_dim, noise, seed
        self.split = split

    def load(self) -> Dataset:
        """Return x of shape (n, dim) in float64; `Dataset.truth` is the program that made it."""
        import torch

        from elbowroom.models.linear_gaussian import LinearGaussian

        if problem := too_large(24.0 * (self.n + self.latent_dim) * (self.dim + self.latent_dim)):
            raise SpecError(f"data: linear_gaussian {problem}; make n or dim smaller")
        generator = torch.Generator().manual_seed(self.seed)
        W = torch.randn(self.dim, self.latent_dim, dtype=torch.float64, generator=generator)
        mu = torch.randn(self.dim, dtype=torch.float64, generator=generator)
        truth = LinearGaussian(W, mu, torch.full_like(mu, self.noise**2))
        _, x = truth.sample(self.n, generator)
        return Dataset(x.numpy(), "linear_gaussian", truth=truth)
