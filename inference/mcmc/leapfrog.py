"""Hamiltonian dynamics for many data and chains at once: one gradient of sum log p serves all data.

State z (S, N, d): chain s of datum n. With a root L per datum (L L' about the posterior's covariance), z = L u, momentum
r ~ N(0, I) in the coordinates u, and energy H = -log p(z) + r'r / 2:

    r <- r + step/2 L' grad log p(z),   z <- z + step L r,   r <- r + step/2 L' grad log p(z)

The end of a trajectory is accepted with probability min(1, exp(H_0 - H_1)), separately for each chain of each datum. The root
is only a preconditioner: the invariant distribution is p for any L. Neal 2011, Handbook of MCMC, chapter 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from elbowroom.inference.mcmc.normals import apply, apply_t

Target = Callable[[Tensor], tuple[Tensor, Tensor]]
"""z (S, N, d) -> log density (S, N) and its gradient (S, N, d)."""

DIVERGENT = 1000.0  # nats of energy error


@dataclass(frozen=True)
class State:
    """Positions z (S, N, d), log densities (S, N) and gradients (S, N, d) of the chains."""

    z: Tensor
    value: Tensor
    gradient: Tensor

    @classmethod
    def at(cls, target: Target, z: Tensor) -> State:
        """Evaluate the target at z."""
        value, gradient = target(z)
        return cls(z, *_finite(value, gradient))

    @classmethod
    def of(cls, z: Tensor, value: Tensor, gradient: Tensor) -> State:
        """Take known values."""
        return cls(z, *_finite(value, gradient))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return positions, log densities and gradients."""
        return self.z, self.value, self.gradient

    def rows(self, index: Tensor) -> State:
        """Return the chains of some of the data."""
        return State(self.z[:, index], self.value[:, index], self.gradient[:, index])


@dataclass(frozen=True)
class Move:
    """The result of one trajectory; all but the state are (S, N).

    Attributes:
        state: the new state of the chains.
        accept: acceptance probability.
        accepted: whether the proposal was taken.
        divergent: whether the energy error exceeded 1,000 nats or was not finite.
        energy: energy at the start of the trajectory, with its fresh momentum.
    """

    state: State
    accept: Tensor
    accepted: Tensor
    divergent: Tensor
    energy: Tensor


def _finite(value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Set non-finite densities to -inf (never accepted) and their gradients to 0, so that chains cannot affect each other."""
    bad = ~(value.isfinite() & gradient.isfinite().all(-1))
    return value.masked_fill(bad, -torch.inf), gradient.masked_fill(bad.unsqueeze(-1), 0.0)


def leap(
    target: Target, z: Tensor, momentum: Tensor, size: Tensor, root: Tensor, kick: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move every chain by one drift and the kick after it.

    z and momentum (in whitened coordinates) are (S, N, d), step sizes broadcastable to (S, N, 1), metric roots L (N, d, d);
    kick is the share of a full kick: 1, or 1/2 at the end of a trajectory. Returns positions, momenta, log densities (S, N) and
    gradients; where not finite, -inf and 0.
    """
    z = z + size * apply(root, momentum)
    value, gradient = _finite(*target(z))
    return z, momentum + kick * size * apply_t(root, gradient), value, gradient


Leap = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
"""`leap` of one target."""


def transition(
    target: Target,
    state: State,
    root: Tensor,
    step: Tensor | float,
    n_steps: int,
    generator: torch.Generator,
    leaps: Leap | None = None,
) -> Move:
    """Move every chain by one trajectory of `n_steps` leapfrogs and accept or reject.

    Metric roots L are (N, d, d), lower triangular; the step size, in whitened coordinates, is a number, (N,) or (S, N). `leaps`
    is a faster `leap` for this target, if there is one.
    """
    leaps = leaps or partial(leap, target)
    z, value, gradient = state.z, state.value, state.gradient
    size = torch.as_tensor(step, dtype=z.dtype, device=z.device).unsqueeze(-1)
    momentum = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
    energy = 0.5 * momentum.square().sum(-1) - value
    momentum = momentum + 0.5 * size * apply_t(root, gradient)
    full, half = torch.ones_like(size.flatten()[0]), torch.full_like(size.flatten()[0], 0.5)
    for i in range(n_steps):
        z, momentum, value, gradient = leaps(z, momentum, size, root, full if i + 1 < n_steps else half)
    change = 0.5 * momentum.square().sum(-1) - value - energy
    change = change.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    # a chain that starts at zero density accepts any point with finite density
    change = torch.where(state.value.isneginf() & value.isfinite(), -torch.inf, change)
    accept = (-change).exp().clamp_max(1.0)
    accepted = torch.rand(accept.shape, dtype=z.dtype, device=z.device, generator=generator) < accept
    taken = accepted.unsqueeze(-1)
    new = State(
        torch.where(taken, z, state.z),
        torch.where(accepted, value, state.value),
        torch.where(taken, gradient, state.gradient),
    )
    return Move(new, accept, accepted, change > DIVERGENT, energy)


class DualAveraging:
    """Nesterov's dual averaging of log step sizes, one per datum (Hoffman and Gelman 2014, section 3.2).

    Args:
        step: first step sizes, any shape.
        target: acceptance probability aimed at.

    Attributes:
        step: the step sizes to use next, of the same shape.
    """

    GAMMA, T0, KAPPA = 0.05, 10.0, 0.75

    def __init__(self, step: Tensor, target: float = 0.8) -> None:
        self.target = target
        self.mu = (10 * step).log()
        self.step = step
        self.error = torch.zeros_like(step)
        self.average = torch.zeros_like(step)
        self.count = 0

    def update(self, accept: Tensor) -> None:
        """Update the step sizes with the mean acceptance probability of the last trajectory, of the shape of `step`."""
        self.count += 1
        weight = 1 / (self.count + self.T0)
        self.error = (1 - weight) * self.error + weight * (self.target - accept)
        log_step = self.mu - math.sqrt(self.count) / self.GAMMA * self.error
        share = self.count**-self.KAPPA
        self.average = share * log_step + (1 - share) * self.average
        self.step = log_step.exp()

    def final(self) -> Tensor:
        """Return the averaged step sizes, to be used after adaptation."""
        return self.average.exp() if self.count else self.step
