"""A linear-Gaussian state-space model, step by step in Pyro, whose log p(x) and smoothing posterior are known exactly.

z_t = A z_(t-1) + N(0, Q),  x_t = C z_t + N(0, R),  z_0 = 0            t = 1, ..., length of the sequence
q(z_t | z_(t-1), x_t) = N(F z_(t-1) + G x_t, s^2)                      the guide
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

F64 = torch.float64


def normal(z: Tensor, loc: Tensor, scale: Tensor) -> Any:
    return dist.Normal(loc, scale.expand_as(loc))


@dataclass
class StateSpace:
    """The model and its guide; `inside`: masks inside the distributions, not around the sites."""

    k: int = 2
    inside: bool = False
    width: float = 0.5

    def __post_init__(self) -> None:
        k, generator = self.k, torch.Generator().manual_seed(3)
        turn = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=F64))[0]
        self.a, self.c = 0.8 * turn, torch.randn(k, k, generator=generator, dtype=F64)
        self.q, self.r = torch.linspace(0.6, 1.0, k, dtype=F64), torch.linspace(0.5, 0.9, k, dtype=F64)  # scales
        self.f, self.g = 0.4 * turn, 0.5 * torch.linalg.pinv(self.c)
        self.s = torch.full((k,), self.width, dtype=F64)

    def data(self, lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draw x (N, T, k), and mask (N, T)."""
        generator, x = torch.Generator().manual_seed(seed), torch.zeros(len(lengths), max(lengths), self.k, dtype=F64)
        noise = lambda: torch.randn(len(lengths), self.k, generator=generator, dtype=F64)
        z = torch.zeros(len(lengths), self.k, dtype=F64)
        for t in range(x.shape[1]):
            z = z @ self.a.T + self.q * noise()
            x[:, t] = z @ self.c.T + self.r * noise()
        mask = torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None]
        return torch.where(mask[..., None], x, 0.0), mask

    def _site(self, name: str, loc: Tensor, scale: Tensor, mask: Tensor, obs: Tensor | None = None) -> Tensor:
        around: AbstractContextManager[Any] = nullcontext() if self.inside else poutine.mask(mask=mask)
        fn = dist.Normal(loc, scale).to_event(1)
        with around:
            return pyro.sample(name, fn.mask(mask) if self.inside else fn, obs=obs)

    def model(self, x: Tensor, mask: Tensor) -> None:
        with pyro.plate("sequences", len(x)):
            z = torch.zeros(len(x), self.k, dtype=x.dtype)
            for t in pyro.markov(range(x.shape[1])):
                z = self._site(f"z_{t}", z @ self.a.T, self.q, mask[:, t])
                self._site(f"x_{t}", z @ self.c.T, self.r, mask[:, t], obs=x[:, t])

    def guide(self, x: Tensor, mask: Tensor) -> None:
        with pyro.plate("sequences", len(x)):
            z = torch.zeros(len(x), self.k, dtype=x.dtype)
            for t in pyro.markov(range(x.shape[1])):
                z = self._site(f"z_{t}", z @ self.f.T + x[:, t] @ self.g.T, self.s, mask[:, t])

    # -- exact, of one sequence (L, k) -----------------------------------------------------------------------------------------

    def log_evidence(self, x: Tensor) -> Tensor:
        """Return log p(x) by the Kalman filter."""
        mean, cov, total = torch.zeros(self.k, dtype=F64), torch.zeros(self.k, self.k, dtype=F64), torch.zeros((), dtype=F64)
        for x_t in x:
            mean, cov = self.a @ mean, self.a @ cov @ self.a.T + self.q.square().diag()
            of_x = self.c @ cov @ self.c.T + self.r.square().diag()
            total = total + dist.MultivariateNormal(self.c @ mean, of_x).log_prob(x_t)
            gain = torch.linalg.solve(of_x, self.c @ cov).T
            mean, cov = mean + gain @ (x_t - self.c @ mean), cov - gain @ self.c @ cov
        return total

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (L k,) and covariance of p(z | x), solved at once."""
        steps, k = len(x), self.k
        chain = torch.eye(steps * k, dtype=F64)
        chain[k:, :-k] -= torch.block_diag(*[self.a] * (steps - 1)) if steps > 1 else 0.0
        emit, prior = torch.block_diag(*[self.c] * steps), (1 / self.q.square()).repeat(steps)
        noise = (1 / self.r.square()).repeat(steps)
        cov = torch.linalg.inv(chain.T @ (prior[:, None] * chain) + emit.T @ (noise[:, None] * emit))
        return cov @ emit.T @ (noise * x.flatten()), cov

    def of_guide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (L k,) and covariance of q(z | x)."""
        steps, k = len(x), self.k
        chain = torch.eye(steps * k, dtype=F64)
        chain[k:, :-k] -= torch.block_diag(*[self.f] * (steps - 1)) if steps > 1 else 0.0
        root = torch.linalg.inv(chain)
        return root @ (x @ self.g.T).flatten(), root @ torch.diag(self.s.square().repeat(steps)) @ root.T

    def gap(self, x: Tensor) -> Tensor:
        """Return KL(q(z|x) || p(z|x))."""
        q, p = (dist.MultivariateNormal(*moments) for moments in (self.of_guide(x), self.posterior(x)))
        return torch.distributions.kl_divergence(q, p)

    def gap_by_step(self, x: Tensor) -> Tensor:
        """Return E_q KL(q(z_t | z_<t, x) || p(z_t | z_<t, x)), (L,), by conditioning the two normals."""
        (q_mean, q_cov), (p_mean, p_cov), k, found = self.of_guide(x), self.posterior(x), self.k, []
        for t in range(len(x)):
            here, before = slice(t * k, t * k + k), slice(0, t * k)
            slope = torch.linalg.solve(p_cov[before, before], p_cov[before, here]).T
            cov = p_cov[here, here] - slope @ p_cov[before, here]
            to_z = torch.zeros(k, t * k, dtype=F64)  # of q's mean less p's, as a function of z_<t
            if t:
                to_z[:, -k:] = self.f
            shift = q_mean[here] - p_mean[here] - slope @ (q_mean[before] - p_mean[before])
            second = shift.outer(shift) + (to_z - slope) @ q_cov[before, before] @ (to_z - slope).T
            spread = self.s.square().diag()
            inverse = torch.linalg.inv(cov)
            found.append(0.5 * ((inverse @ (spread + second)).trace() - k + cov.logdet() - spread.logdet()))
        return torch.stack(found)
