"""Chains on the densities between prior and posterior, p(z) p(x|z)^b, with any b per chain and datum.

Every chain stores log p(z), log p(x|z) and their gradients, so that changing b, by annealing or by swapping replicas, needs no
evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elbowroom.inference.mcmc.leapfrog import Move, State, transition
from elbowroom.inference.target.log_joint import LogJoint


class TemperedChains:
    """Chains z (S, *batch, N, d); each batch position, such as a temperature, has its own steps and metrics.

    Args:
        log_joint: the model and guide.
        z: start of the chains.
        parts: the densities there with their gradients, if they are known.

    Attributes:
        z: current states.
        parts: log p(z), log p(x|z), each (S, *batch, N), and their gradients, (S, *batch, N, d).
    """

    def __init__(self, log_joint: LogJoint, z: Tensor, parts: tuple[Tensor, ...] | None = None) -> None:
        self.log_joint = log_joint
        self.z = z
        self.parts = self._evaluate(z) if parts is None else parts

    @property
    def likelihood(self) -> Tensor:
        """Log p(x|z), (S, *batch, N), -inf where it is not finite."""
        value = self.parts[1]
        return value.masked_fill(~value.isfinite(), -torch.inf)

    def level(self) -> Tensor:
        """Log p(x, z), (S, *batch, N)."""
        return self.parts[0] + self.parts[1]

    def move(self, b: Tensor, root: Tensor, step: Tensor, n_steps: int, generator: torch.Generator) -> Move:
        """Move every chain by one trajectory at its b (*batch, N); the result has shape (S, batch N).

        Metric roots are (batch N, d, d), step sizes (batch N,).
        """
        shape, last = self.z.shape, self.parts

        def mixed(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            prior, likelihood, of_prior, of_likelihood = parts
            # at b = 0 the likelihood may be anything
            value = torch.where(b > 0, prior + b * likelihood, prior)
            power = b.unsqueeze(-1)
            gradient = torch.where(power > 0, of_prior + power * of_likelihood, of_prior)
            return value.flatten(1), gradient.reshape(len(value), -1, shape[-1])

        def target(z: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal last
            last = self._evaluate(z.reshape(shape))
            return mixed(last)

        state = State.of(self.z.reshape(len(self.z), -1, shape[-1]), *mixed(self.parts))
        move = transition(target, state, root, step, n_steps, generator)
        taken = move.accepted.reshape(shape[:-1])
        self.z = move.state.z.reshape(shape)
        self.parts = tuple(
            torch.where(taken.unsqueeze(-1) if new.dim() == len(shape) else taken, new, old)
            for new, old in zip(last, self.parts, strict=True)
        )
        return move

    def rows(self, index: Tensor, part: LogJoint) -> TemperedChains:
        """Return the chains (S, N, d) of some of the data, whose log joint is `part`, as they stand."""
        return TemperedChains(part, self.z[:, index], tuple(values[:, index] for values in self.parts))

    def replace(self, place: int, z: Tensor) -> None:
        """Put new states (S, N, d) at one position of the batch."""
        self.z = self.z.clone()
        self.z[:, place] = z
        parts = tuple(part.clone() for part in self.parts)
        for part, new in zip(parts, self.log_joint.parts(z), strict=True):
            part[:, place] = new
        self.parts = parts

    def permute(self, index: Tensor) -> None:
        """Permute positions within the batch: position k of a chain takes the state at index (S, K, N)."""
        self.z = self.z.gather(1, index.unsqueeze(-1).expand_as(self.z))
        self.parts = tuple(
            part.gather(1, index.unsqueeze(-1).expand_as(part) if part.dim() > index.dim() else index) for part in self.parts
        )

    def _evaluate(self, z: Tensor) -> tuple[Tensor, ...]:
        flat = self.log_joint.parts(z.reshape(-1, *z.shape[-2:]))
        return tuple(part.reshape(*z.shape[:-2], *part.shape[1:]) for part in flat)
