"""Annealing paths: a line of densities from a density that can be sampled to the posterior, and the metric along it.

    log gamma_b(z) = base(z) + b slope(z),   0 <= b <= 1,   gamma_0 normalised,   Z_1 = p(x)
    from the prior:  base = log p(z),   slope = log p(x|z)
    from q0:         base = log q0(z),  slope = log p(x, z) - log q0(z)

The metric at b is the root of a covariance; its precision is interpolated between those of the two ends, which is exact for a
linear-Gaussian model. It is only a preconditioner. All densities are in nats, in unconstrained coordinates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from elbowroom.inference.mcmc.normals import Normals, StudentT
from elbowroom.inference.target.log_joint import LogJoint

PRIOR_DRAWS, FEWEST = 256, 32  # draws for the scale of the prior; fewer if there are many data
ENTRIES = 2**23  # of those draws
QUANTILES = (0.15865525, 0.84134475)  # one standard deviation of a normal to either side
FLOOR = 1e-12  # least eigenvalue of q*'s covariance, relative to the prior's


class Start(Protocol):
    """A normalised density per datum that can be sampled: `Normals`, `StudentT`."""

    def sample(self, n_draws: int, generator: torch.Generator) -> Tensor:
        """Draw z (S, N, d)."""
        ...

    def log_prob_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density at z (S, N, d), (S, N), and its gradient (S, N, d)."""
        ...


@dataclass(frozen=True)
class Metric:
    """Metric roots along a path, basis diag((1 - b) first + b last)^(-1/2).

    Attributes:
        basis: (N, d, d); its columns are directions common to both ends.
        first: precision along the columns at b = 0, (N, d).
        last: at b = 1, (N, d).
    """

    basis: Tensor
    first: Tensor
    last: Tensor

    def root(self, b: float) -> Tensor:
        """Return the root at b, (N, d, d); not triangular."""
        return self.basis * ((1 - b) * self.first + b * self.last).rsqrt()[:, None, :]

    def rows(self, index: Tensor) -> Metric:
        """Return the metric of some of the data."""
        return Metric(self.basis[index], self.first[index], self.last[index])

    @classmethod
    def between(cls, scale: Tensor, last: Normals | None) -> Metric:
        """Return the metric from independent coordinates with standard deviations `scale` (N, d) to `last`, if given.

        With D = diag(scale) and D^-1 C D^-1 = V diag(l) V', the interpolated precision is
        D^-1 V diag((1 - b) + b / l) V' D^-1. Data with a `last` that is not finite keep `scale` throughout.
        """
        one = torch.ones_like(scale)
        if last is None:
            return cls(torch.diag_embed(scale), one, one)
        relative = last.root / scale[..., None]
        usable = relative.isfinite().flatten(1).all(-1)
        eye = torch.eye(scale.shape[-1], dtype=scale.dtype, device=scale.device)
        relative = torch.where(usable[:, None, None], relative, eye)
        values, vectors = torch.linalg.eigh(relative @ relative.mT)
        return cls(scale[..., None] * vectors, one, 1 / values.clamp_min(FLOOR))


class Path(ABC):
    """A path of densities for every datum of a LogJoint.

    Attributes:
        log_joint: the log joint.
        metric: of each density.
        name: `prior` or `refit`.
    """

    log_joint: LogJoint
    metric: Metric
    name: str

    @abstractmethod
    def sample(self, n_draws: int, generator: torch.Generator) -> Tensor:
        """Draw from gamma_0: z (S, N, d)."""

    @abstractmethod
    def parts(self, z: Tensor, b: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return base (S, N), slope (S, N) and the gradient of base + b slope (S, N, d)."""

    @abstractmethod
    def rows(self, index: Tensor) -> Path:
        """Return the path of some of the data; see `LogJoint.subset`."""


class PriorPath(Path):
    """From the prior to the posterior: p(z) p(x|z)^b.

    q_star, a normal near each posterior, is for the metric; None keeps the prior's scale, measured on draws. With `metric`, the
    scale is not measured.
    """

    name = "prior"

    def __init__(
        self, log_joint: LogJoint, q_star: Normals | None = None, *, seed: int = 0, metric: Metric | None = None
    ) -> None:
        self.log_joint = log_joint
        if metric is None:
            n_draws = max(FEWEST, min(PRIOR_DRAWS, ENTRIES // (log_joint.n_obs * log_joint.dim)))
            draws = log_joint.sample_prior(n_draws, seed)
            levels = torch.tensor(QUANTILES, dtype=draws.dtype, device=draws.device)
            low, high = draws.quantile(levels, 0)  # heavy tails have no variance
            scale = (high - low) / 2
            scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
            metric = Metric.between(scale, q_star)
        self.metric = metric

    def sample(self, n_draws: int, generator: torch.Generator) -> Tensor:
        """Draw from the prior: z (S, N, d)."""
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        return self.log_joint.sample_prior(n_draws, int(seed))

    def parts(self, z: Tensor, b: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return log p(z), log p(x|z), (S, N) each, and the gradient of log p(z) + b log p(x|z), (S, N, d)."""
        return self.log_joint.tempered(z, b)

    def rows(self, index: Tensor) -> PriorPath:
        """Return the path of some of the data."""
        part = self.log_joint.subset(index)
        return self if part is self.log_joint else PriorPath(part, metric=self.metric.rows(index))


class RefitPath(Path):
    """From an inflated q* to the posterior: q0(z)^(1 - b) p(x, z)^b.

    q0 has the standard deviations of q* times `inflation`; it is a Student-t with `df` degrees of freedom, or normal for None.
    """

    name = "refit"

    def __init__(self, log_joint: LogJoint, q_star: Normals, *, inflation: float = 1.3, df: int | None = None) -> None:
        self.log_joint, self.q_star, self.inflation, self.df = log_joint, q_star, inflation, df
        wide = q_star.inflated(inflation)
        self.start: Start = wide if df is None else StudentT(wide.loc, wide.root, df)
        one = torch.ones_like(q_star.loc)
        self.metric = Metric(q_star.root, one / inflation**2, one)

    def sample(self, n_draws: int, generator: torch.Generator) -> Tensor:
        """Draw from q0: z (S, N, d)."""
        return self.start.sample(n_draws, generator)

    def parts(self, z: Tensor, b: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return log q0, log p(x, z) - log q0, (S, N) each, and the gradient along the path at b, (S, N, d)."""
        base, base_gradient = self.start.log_prob_grad(z)
        value, gradient = self.log_joint.grad(z)
        return base, value - base, (1 - b) * base_gradient + b * gradient

    def rows(self, index: Tensor) -> RefitPath:
        """Return the path of some of the data."""
        part, q = self.log_joint.subset(index), self.q_star.rows(index)
        return self if part is self.log_joint else RefitPath(part, q, inflation=self.inflation, df=self.df)
