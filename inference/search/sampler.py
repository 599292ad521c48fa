"""Chains of batched HMC with fixed step sizes and jittered trajectories, in buckets of similar step size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from elbowroom.inference.mcmc.leapfrog import State, transition
from elbowroom.inference.mcmc.normals import moments
from elbowroom.inference.target.log_joint import LogJoint

# a tenth more than a quarter of a standard normal's period: successive states are slightly anti-correlated (with the jitter
# E cos = -0.15), so that a draw of a normal posterior counts as 1.36 independent ones for its mean, 0.88 for its variance
LENGTH = 1.1 * math.pi / 2
JITTER = (0.8, 1.2)
MAX_LEAPFROGS = 64
JITTERS = tuple(JITTER[0] + (JITTER[1] - JITTER[0]) * (i + 0.5) / 6 for i in range(6))  # lengths that represent the jitter
OVERHEAD = 500  # fixed cost of a gradient call, in units of chains x data
CUTS = 24  # quantiles of the step sizes at which buckets may be cut


@dataclass(frozen=True)
class Chains:
    """Draws of some data with the sampler's statistics; the second half of the chains started from the prior.

    Attributes:
        draws: (C, S, N, d).
        lp: log joint, (C, S, N).
        energy: Hamiltonian at the start of each trajectory, (C, S, N); None if the chains have none.
        accept: acceptance probabilities, (C, S, N).
        divergent: (C, S, N).
    """

    draws: Tensor
    lp: Tensor
    energy: Tensor | None
    accept: Tensor
    divergent: Tensor

    @property
    def length(self) -> int:
        """Draws per chain."""
        return self.draws.shape[1]

    def rows(self, index: Tensor) -> Chains:
        """Return the chains of some of the data."""
        return self._each(lambda values: values[0][:, :, index])

    def then(self, more: Chains) -> Chains:
        """Return these draws followed by later ones of the same chains."""
        return self._each(lambda values: torch.cat(values, 1), more)

    def after(self, first: int) -> Chains:
        """Return the chains without their first draws."""
        return self._each(lambda values: values[0][:, first:])

    def _each(self, change: Callable[[list[Tensor]], Tensor], *others: Chains) -> Chains:
        columns = [[getattr(chains, f.name) for chains in (self, *others)] for f in fields(self)]
        changed: list[Any] = [None if any(v is None for v in values) else change(values) for values in columns]
        return Chains(*changed)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean (N, d) and covariance (N, d, d) of all draws."""
        return moments(self.draws.flatten(0, 1).double())


@dataclass
class Sampler:
    """Chains of some data with their fixed metric and step sizes.

    Attributes:
        log_joint: the data's densities.
        state: of the chains.
        root: metric roots, (N, d, d).
        step: step sizes in whitened coordinates, (N,).
        generator: of all randomness.
    """

    log_joint: LogJoint
    state: State
    root: Tensor
    step: Tensor
    generator: torch.Generator

    def run(self, rows: Tensor, length: int) -> Chains:
        """Return the next `length` draws of every chain of some of the data, in the order of `rows`."""
        c, n, d = self.state.z.shape
        new = lambda *shape: torch.empty(c, length, n, *shape, dtype=self.state.z.dtype, device=self.state.z.device)
        energy = new()
        out = Chains(new(d), new(), energy, new(), torch.empty(c, length, n, dtype=torch.bool, device=self.state.z.device))
        for bucket, part in self._buckets(rows):
            self._run_bucket(part, bucket, out, energy)
        return out.rows(rows)

    def _run_bucket(self, part: LogJoint, bucket: Tensor, out: Chains, energy: Tensor) -> None:
        with part.frozen_weights():
            state, root, step = self.state.rows(bucket), self.root[bucket], self.step[bucket]
            least = float(step.min())
            for i in range(out.length):
                low, high = JITTER
                tau = LENGTH * (low + (high - low) * float(torch.rand((), generator=self.generator, device=root.device)))
                n_steps = min(math.ceil(tau / least), MAX_LEAPFROGS)
                move = transition(part.grad, state, root, step.clamp_max(tau / n_steps), n_steps, self.generator, part.leap)
                state = move.state
                out.draws[:, i, bucket], out.lp[:, i, bucket] = state.z, state.value
                energy[:, i, bucket] = move.energy
                out.accept[:, i, bucket], out.divergent[:, i, bucket] = move.accept, move.divergent
            for mine, moved in zip(self.state.parts(), state.parts(), strict=True):
                mine[:, bucket] = moved

    def metric(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the metric roots and step sizes of some of the data."""
        return self.root[rows], self.step[rows]

    def shrink(self, rows: Tensor) -> None:
        """Halve the step sizes of some of the data."""
        self.step[rows] /= 2

    def _buckets(self, rows: Tensor) -> list[tuple[Tensor, LogJoint]]:
        """Group data by step size, with their log joints; one group for all if the arguments cannot be separated by datum."""
        steps, order = self.step[rows].sort()
        groups = [group.sort().values for group in rows[order].tensor_split(cuts(steps.tolist(), len(self.state.z)))]
        if len(groups[0]) < self.log_joint.n_obs and self.log_joint.separable():
            return [(group, self.log_joint.subset(group)) for group in groups]
        return [(torch.arange(self.log_joint.n_obs, device=rows.device), self.log_joint)]


def cuts(steps: list[float], chains: int) -> list[int]:
    """Return where to cut ascending step sizes into buckets, so that the total cost of all trajectories is least.

    A bucket of n data costs (OVERHEAD + n x chains) per leapfrog, and its smallest step size sets the number of leapfrogs.
    """
    n = len(steps)
    slow = sum(step * MAX_LEAPFROGS < LENGTH for step in steps)  # data with truncated trajectories get their own bucket
    places = sorted({0, slow, *(slow + (n - slow) * i // CUTS for i in range(CUTS))} - {n})
    best: dict[int, tuple[float, list[int]]] = {n: (0.0, [])}
    for start in reversed(places):
        leapfrogs = sum(min(math.ceil(LENGTH * u / steps[start]), MAX_LEAPFROGS) for u in JITTERS) / len(JITTERS)
        best[start] = min(
            (leapfrogs * (OVERHEAD + (end - start) * chains) + best[end][0], [end, *best[end][1]])
            for end in (*places, n)
            if end > start and (start >= slow or end <= slow)
        )
    return best[0][1][:-1]
