"""Parallel tempering for posteriors that single chains do not cross: replicas at p(z) p(x|z)^b that swap states.

Every datum has its own ladder of inverse temperatures, taken from the mode search, so that neighbours overlap. The replica at
b = 0 is drawn afresh from the prior each time, so b = 1 can be reached from everywhere in the prior. After every move, even and
odd neighbours swap, in random order, with probability min(1, exp((b_i - b_j) (log p(x|z_j) - log p(x|z_i)))). Chains are
independent ensembles, so R-hat and ESS keep their usual meaning.

A fixed alternation of even and odd swaps (Syed, Bouchard-Cote, Deligiannidis and Doucet 2022,
https://doi.org/10.1111/rssb.12464) would move replicas up and down in step: the autocorrelation at b = 1 returns after each
round trip, beyond the lags at which Geyer's estimator stops, and the ESS would be overstated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from elbowroom.inference.mcmc.leapfrog import DualAveraging, Move
from elbowroom.inference.mcmc.normals import Normals
from elbowroom.inference.search.modes import Metric, Modes
from elbowroom.inference.search.sampler import Chains
from elbowroom.inference.search.tempered import TemperedChains
from elbowroom.inference.target.log_joint import LogJoint

REPLICAS = 14  # temperatures at most
WARMUP = 150
LEAPFROGS = (2, 6)
PRIOR_BATCH = 64


class Tempering:
    """C ensembles of replicas (`chains`) of some data.

    The mode search gives the ladder and starts, the normals q the metric and starts. `seed` is that of the prior's draws,
    `generator` drives everything else.
    """

    def __init__(
        self,
        log_joint: LogJoint,
        modes: Modes,
        q: Normals,
        chains: int,
        generator: torch.Generator,
        seed: int,
    ) -> None:
        self.log_joint, self.chains, self.generator, self.seed = log_joint, chains, generator, seed
        metric = Metric.of(log_joint, q, seed)
        self.b = _ladder(modes.ladder.double()).to(log_joint.probe_points.dtype)  # (K, N)
        k, n = self.b.shape
        d = log_joint.dim
        self.root = torch.stack([metric.root(b) for b in self.b]).flatten(0, 1)  # (K N, d, d)
        # all replicas of an ensemble start at one point, half of the ensembles from q*, half from the runs: R-hat then shows
        # whether they forget their start slowly
        ends = modes.starts(q, chains // 2).to(q.loc.dtype)
        start = torch.cat([q.sample(chains - len(ends), generator), ends]).to(log_joint.probe_points.dtype)
        self.z = start.unsqueeze(1).expand(chains, k, n, d).clone()
        self.step = torch.full((k * n,), d**-0.25, dtype=start.dtype, device=start.device)
        with log_joint.frozen_weights():
            everyone = _Replicas(TemperedChains(log_joint, self.z), self.b, self.root, self.step)
            adaptation = DualAveraging(self.step)
            for _ in range(WARMUP):
                everyone.step = adaptation.step
                adaptation.update(self._sweep(everyone).accept.mean(0))
        self.z = everyone.bridge.z
        self.step = adaptation.final()

    def run(self, rows: Tensor, length: int) -> Chains:
        """Return the next `length` draws at b = 1 of every ensemble of some of the data, in the order of `rows`."""
        part, rows, kept = self.log_joint.some(rows)
        draws, lp, accept, divergent = [], [], [], []
        with part.frozen_weights():
            some = _Replicas(TemperedChains(part, self.z[:, :, rows]), self.b[:, rows], *self._of(rows))
            for _ in range(length):
                move = self._sweep(some)
                cold = slice((len(self.b) - 1) * len(rows), None)
                draws.append(some.bridge.z[:, -1, kept])
                lp.append(some.bridge.level()[:, -1, kept])
                accept.append(move.accept[:, cold][:, kept])
                divergent.append(move.divergent[:, cold][:, kept])
        self.z[:, :, rows] = some.bridge.z
        return Chains(torch.stack(draws, 1), torch.stack(lp, 1), None, torch.stack(accept, 1), torch.stack(divergent, 1))

    def metric(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the metric roots and step sizes of some of the data at b = 1."""
        return self.root.unflatten(0, self.b.shape)[-1, rows], self.step.view(self.b.shape)[-1, rows]

    def shrink(self, rows: Tensor) -> None:
        """Halve the step sizes of some of the data."""
        self.step.view(self.b.shape)[:, rows] /= 2

    def _of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the roots and step sizes of some of the data, replica by replica."""
        k, n = self.b.shape
        return self.root.unflatten(0, (k, n))[:, rows].flatten(0, 1), self.step.view(k, n)[:, rows].flatten()

    def _sweep(self, some: _Replicas) -> Move:
        """Move every replica, redraw the hottest from the prior, swap neighbours."""
        n_steps, first = (
            int(torch.randint(low, high, (), generator=self.generator, device=some.b.device))
            for low, high in (LEAPFROGS, (0, 2))
        )
        move = some.bridge.move(some.b, some.root, some.step, n_steps, self.generator)
        some.bridge.replace(0, some.fresh(self))
        for parity in (first, 1 - first):
            self._swap(some, parity)
        return move

    def _swap(self, some: _Replicas, parity: int) -> None:
        likelihood = some.bridge.likelihood  # (C, K, N)
        c, k, n = likelihood.shape
        first = torch.arange(parity, k - 1, 2, device=likelihood.device)
        if not len(first):
            return
        gain = (some.b[first] - some.b[first + 1]) * (likelihood[:, first + 1] - likelihood[:, first])
        log_u = torch.rand(gain.shape, dtype=gain.dtype, device=gain.device, generator=self.generator).log()
        swap = log_u < gain.nan_to_num(nan=-torch.inf)
        index = torch.arange(k, device=likelihood.device)[:, None].expand(c, k, n).clone()
        index[:, first] = torch.where(swap, first[:, None] + 1, first[:, None])
        index[:, first + 1] = torch.where(swap, first[:, None], first[:, None] + 1)
        some.bridge.permute(index)


@dataclass
class _Replicas:
    """Replicas of some of the data: chains (C, K, N, d), temperatures (K, N), roots (K N, d, d), step sizes (K N,)."""

    bridge: TemperedChains
    b: Tensor
    root: Tensor
    step: Tensor
    prior: list[Tensor] = field(default_factory=list)

    def fresh(self, ensembles: Tempering) -> Tensor:
        """Return new draws of the prior, (C, N, d)."""
        if not self.prior:
            ensembles.seed += 1
            chains = len(self.bridge.z)
            batch = self.bridge.log_joint.sample_prior(chains * PRIOR_BATCH, ensembles.seed)
            self.prior = list(batch.to(self.bridge.z.dtype).split(chains))
        return self.prior.pop()


def _ladder(ladder: Tensor) -> Tensor:
    """Thin each datum's ladder (T, N), 0 .. 1, to at most REPLICAS temperatures, the same number for all."""
    used = 1 + (ladder < 1).sum(0)  # rungs up to the first 1
    count = min(REPLICAS, int(used.max()))
    place = torch.linspace(0, 1, count, dtype=ladder.dtype, device=ladder.device)[:, None] * (used - 1)
    below = place.floor().long().clamp_max(len(ladder) - 1)
    above = (below + 1).clamp_max(len(ladder) - 1)
    share = place - below
    low, high = ladder.gather(0, below), ladder.gather(0, above)
    return torch.where(low > 0, low.clamp_min(1e-300) ** (1 - share) * high**share, high * share)
