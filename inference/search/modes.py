"""Mode search: many short runs per datum that start from the prior and are annealed into the posterior.

The path is p(z) p(x|z)^b. Each datum raises b independently, as far as a conditional effective sample size of its particles
allows (adaptive tempering: Del Moral, Doucet and Jasra 2012), with one trajectory per temperature and some more at b = 1. The
increments of log p(x|z) give every run its annealing weight. `unseen` compares the runs with the draws of other chains.

Runs start from independent draws of the prior: a basin that holds a share s of the prior is missed by all P runs with
probability (1 - s)^P, and annealing only lowers it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from elbowroom.inference.mcmc.normals import Normals, safe_cholesky, whiten
from elbowroom.inference.search.tempered import TemperedChains
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.stages import stage

RUNS = 128
TEMPERATURES = 40
SETTLE = 6  # trajectories at b = 1
LEAPFROGS = 3
FEWER = 0.8  # share of the data that still move, below which only those are moved on
CESS = 0.7  # smallest conditional effective sample size, as a share, after one rise of b
ACCEPT, GAIN = 0.75, 0.5  # target acceptance, and the rate at which step sizes adapt
MISS = 1e-3
SLACK, FACTOR = 4.0, 1.5  # a state is far beyond FACTOR x (a high quantile of known states) + SLACK, in squared sd
LIGHT = 0.1  # of the average weight; a lighter run is not used as a start
PRIOR_DRAWS = 200


@dataclass(frozen=True)
class Modes:
    """Short runs from the prior, P per datum.

    Attributes:
        end: each run's last state, (P, N, d).
        log_weight: annealing weights, unnormalised, (P, N).
        ladder: inverse temperatures of each datum, (T, N), from 0 to 1.
    """

    end: Tensor
    log_weight: Tensor
    ladder: Tensor

    @property
    def smallest_basin(self) -> float:
        """Share of the prior's mass that a basin must hold to be missed with a probability below 1e-3."""
        return 1 - MISS ** (1 / len(self.end))

    def rows(self, index: Tensor) -> Modes:
        """Return the runs of some of the data."""
        return Modes(self.end[:, index], self.log_weight[:, index], self.ladder[:, index])

    def starts(self, q: Normals, count: int) -> Tensor:
        """Return ends of `count` runs to start chains from, (count, N, d): the two farthest from q, then the others in order.

        If chains start in every mode that the runs found, R-hat shows whether they mix; random starts mostly share one mode.
        """
        weighty = torch.softmax(self.log_weight.double(), 0) > LIGHT / len(self.end)
        picked = self.farthest(q.loc, q.root, min(2, count), weighty)
        return torch.cat(
            [self.end.gather(0, picked[..., None].expand(-1, *self.end.shape[1:])), self.end[: count - len(picked)]]
        )

    def farthest(self, loc: Tensor, root: Tensor, count: int, allowed: Tensor | None = None) -> Tensor:
        """Return the runs that end farthest from normals and from each other, one after the other, (count, N).

        Distances are in the normals' own standard deviations; `allowed` says which runs may be chosen, (P, N).
        """
        u = whiten(root, self.end.to(root.dtype) - loc)
        nearest, picked = u.square().sum(-1).nan_to_num(0.0), []
        for _ in range(count):
            far = (nearest if allowed is None else torch.where(allowed, nearest, -1.0)).argmax(0)
            picked.append(far)
            place = far[None, :, None].expand(1, *u.shape[1:])
            nearest = torch.minimum(nearest, (u - u.gather(0, place)).square().sum(-1).nan_to_num(0.0))
        return torch.stack(picked)


@stage("modes")
def search(log_joint: LogJoint, q: Normals, *, runs: int = RUNS, seed: int = 0) -> Modes:
    """Run short annealed runs from the prior into every posterior; the normals q give only the metric."""
    generator = torch.Generator(device=log_joint.device).manual_seed(seed + 1)
    with log_joint.frozen_weights():
        metric = Metric.of(log_joint, q, seed + 2)
        chains = TemperedChains(log_joint, log_joint.sample_prior(runs, seed).to(log_joint.probe_points.dtype))
        rows = torch.arange(log_joint.n_obs, device=log_joint.device)  # the data whose runs still move
        b = torch.zeros_like(chains.z[0, :, 0])
        step = torch.full_like(b, chains.z.shape[-1] ** -0.25)
        left = torch.full_like(rows, SETTLE)
        end, log_weight, ladder = chains.z.clone(), torch.zeros_like(chains.z[..., 0]), [b]
        for t in range(TEMPERATURES + SETTLE):
            raised = _raise(b, chains.likelihood) if t + 1 < TEMPERATURES else torch.ones_like(b)
            log_weight[:, rows] += torch.where(raised > b, (raised - b) * chains.likelihood, 0.0)
            left, b = left - (b == 1).long(), raised
            if bool((ladder[-1] < 1).any()):
                ladder.append(ladder[-1].index_copy(0, rows, b))
            move = chains.move(b, metric.root(b), step, LEAPFROGS, generator)
            step = _follow(step, move.accept)
            end[:, rows] = chains.z
            going = (left > 0).nonzero().squeeze(1)
            if not len(going):
                break
            if len(going) <= FEWER * len(rows) and log_joint.separable():
                rows, b, step, left, metric = rows[going], b[going], step[going], left[going], metric.rows(going)
                chains = chains.rows(going, log_joint.subset(rows))
        return Modes(end, log_weight, torch.stack(ladder))


@dataclass(frozen=True)
class Metric:
    """Roots for the densities between prior and posterior: precision (1 - b) / prior variance + b (covariance of q)^-1.

    Attributes:
        prior: prior precisions, (N, d).
        precision: precision of q, (N, d, d).
    """

    prior: Tensor
    precision: Tensor

    @classmethod
    def of(cls, log_joint: LogJoint, q: Normals, seed: int) -> Metric:
        """Estimate the prior's scale from quantiles of its draws, because heavy tails may have no variance."""
        draws = log_joint.sample_prior(PRIOR_DRAWS, seed).to(q.loc.dtype)
        low, high = torch.quantile(draws, torch.tensor([0.16, 0.84], dtype=draws.dtype, device=draws.device), dim=0)
        scale = ((high - low) / 2).clamp_min(1e-6)
        return cls(scale.square().reciprocal(), torch.cholesky_inverse(q.root))

    def rows(self, index: Tensor) -> Metric:
        """Return the metric of some of the data."""
        return Metric(self.prior[index], self.precision[index])

    def root(self, b: Tensor) -> Tensor:
        """Return lower-triangular roots (N, d, d) at the inverse temperatures b (N,), in their precision."""
        share = b.to(self.prior.dtype)
        mixed = torch.diag_embed((1 - share).unsqueeze(-1) * self.prior) + share[:, None, None] * self.precision
        return safe_cholesky(torch.cholesky_inverse(safe_cholesky(mixed))).to(b.dtype)


def _follow(step: Tensor, accept: Tensor) -> Tensor:
    return step * torch.exp(GAIN * (accept.mean(0) - ACCEPT))


def _raise(b: Tensor, likelihood: Tensor) -> Tensor:
    """Return the largest next b, per datum, for which the incremental weights keep CESS of the particles, by bisection."""
    low, high = b, torch.ones_like(b)
    for _ in range(20):
        middle = (low + high) / 2
        weight = torch.softmax((middle - b) * likelihood, 0)
        enough = 1 / (len(likelihood) * weight.square().sum(0)) >= CESS
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    full = torch.softmax((1 - b) * likelihood, 0)
    done = 1 / (len(likelihood) * full.square().sum(0)) >= CESS
    return torch.where(done | ~likelihood.isfinite().any(0), 1.0, low)


def floor_nan(log_p: Tensor) -> Tensor:
    """Replace NaN by -inf."""
    return torch.where(log_p.isnan(), torch.full_like(log_p, -torch.inf), log_p)


STEPS = 16


def climb(log_joint: LogJoint, z: Tensor, scale: Tensor, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Climb log p(x, z) from every start (S, N, d) by steps along the gradient; steps downwards are rejected.

    `scale` is the unit of length of the steps, (d,) or (N, d). Returns the ends, (S, N, d), and log p(x, z) there, (S, N).
    """
    return ascend(log_joint.grad, z, scale, steps)[:2]


def ascend(
    height: Callable[[Tensor], tuple[Tensor, Tensor]], z: Tensor, scale: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Climb any height, given with its gradient, as `climb` does; return also what the last quarter of the steps gained."""
    best, gradient = height(z)
    best = floor_nan(best)
    step, before = torch.full_like(best, 0.1), best
    for turn in range(steps):
        before = best if turn == steps - steps // 4 else before
        direction = (gradient * scale).nan_to_num(0.0, 0.0, 0.0)
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        trial = z + scale * direction * step.unsqueeze(-1)
        value, new_gradient = height(trial)
        better = value > best
        z = torch.where(better.unsqueeze(-1), trial, z)
        gradient = torch.where(better.unsqueeze(-1), new_gradient, gradient)
        best = torch.where(better, value, best)
        step = torch.where(better, step * 1.5, step * 0.3)
    return z, best, best - before
