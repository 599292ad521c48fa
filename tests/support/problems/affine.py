"""Densities of affine images of independent coordinates with known normalising constants and exact draws, without a program."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from support.problems.truth import F64


@dataclass(frozen=True)
class Affine:
    """z = A u with u_j ~ N(0, 1), or the log of Gamma(shape, 1) variables, which is skewed; log Z = `log_z` per datum.

    It answers to what samplers and estimators ask of a `LogJoint`: its density, `n_obs`, `some` and `probe_points`.
    """

    matrix: Tensor
    log_z: Tensor
    shape: float | None

    @classmethod
    def made(cls, n: int, d: int, shape: float | None, seed: int) -> Affine:
        """Return n random densities in d dimensions."""
        g = torch.Generator().manual_seed(seed)
        matrix = torch.randn(n, d, d, dtype=F64, generator=g) / d**0.5 + torch.eye(d, dtype=F64)
        return cls(matrix, 3 * torch.randn(n, dtype=F64, generator=g), shape)

    @property
    def n_obs(self) -> int:
        """Data N."""
        return len(self.log_z)

    @property
    def probe_points(self) -> Tensor:
        """Values of the right type."""
        return self.matrix.new_zeros(1, *self.matrix.shape[:2])

    def __call__(self, z: Tensor) -> Tensor:
        """Return the log density at z (S, N, d), (S, N)."""
        u = torch.linalg.solve(self.matrix, z.movedim(0, -1)).movedim(-1, 0)
        constant = self.log_z - torch.linalg.slogdet(self.matrix).logabsdet
        if self.shape is None:
            return (-0.5 * u.square() - 0.5 * math.log(2 * math.pi)).sum(-1) + constant
        return (self.shape * u - u.exp() - math.lgamma(self.shape)).sum(-1) + constant

    def some(self, rows: Tensor) -> tuple[Affine, Tensor, Tensor]:
        """Return the densities of some of the data."""
        return replace(self, matrix=self.matrix[rows], log_z=self.log_z[rows]), rows, torch.arange(len(rows))

    def draws(self, *size: int) -> Tensor:
        """Return exact draws (*size, N, d) from torch's own generator."""
        n, d = self.matrix.shape[:2]
        u = torch.randn(*size, n, d, dtype=F64)
        if self.shape is not None:
            u = torch.distributions.Gamma(torch.tensor(self.shape, dtype=F64), 1.0).sample((*size, n, d)).log()
        return torch.einsum("nde,csne->csnd", self.matrix, u)
