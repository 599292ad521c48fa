"""Mode search: many short runs per datum that start from the prior and are annealed into the posterior.

The path is p(z) p(x|z)^b. Each datum raises b independently, as far as a conditional effective sample size of its particles
allows (adaptive tempering: Del Moral, Doucet and Jasra 2012), with one trajectory per temperature. At b = 1 the runs continue
for some trajectories, and the mean of these is kept. The increments of log p(x|z) give every run its annealing weight.

A mode is unseen by other chains if a run's mean lies farther from them (in their own covariance) than 99 % of the means of
equally many consecutive states of theirs, and the runs there have more weight than the chains' own visits. Unlike R-hat, this
detects modes that the chains visit rarely or never, however many chains there are.

Runs start from independent draws of the prior: a basin that holds a share s of the prior is missed by all P runs with
probability (1 - s)^P, and annealing only lowers it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from elbowroom.inference.mcmc.leapfrog import State, transition
from elbowroom.inference.mcmc.normals import Normals, moments, safe_cholesky, whiten
from elbowroom.inference.search.tempered import TemperedChains
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.stages import stage

RUNS = 256
TEMPERATURES = 40
SETTLE, KEPT = 6, 8  # trajectories at b = 1 before the mean, and in the mean
LEAPFROGS = 3
MAX_LEAPFROGS = 8
QUARTER = math.pi / 2
JITTER = 0.6  # smallest random factor on step sizes, against periodic runs
CESS = 0.7  # smallest conditional effective sample size, as a share, after one rise of b
ACCEPT, GAIN = 0.75, 0.5  # target acceptance, and the rate at which step sizes adapt
MISS = 1e-3
OFTEN = 0.99  # quantile of the chains' segments; points beyond it were seen rarely, if at all
SLACK, FACTOR = 4.0, 1.5  # a run is unseen beyond FACTOR x (that quantile) + SLACK, in squared standard deviations
NEGLIGIBLE = 0.005  # ignored share of the mass in unseen runs
LIGHT = 0.1  # of the average weight; a lighter run is not used as a start
ENOUGH = 5.0  # with fewer effective runs, the weights are not used
PRIOR_DRAWS = 200


@dataclass(frozen=True)
class Unseen:
    """Result of the runs that other chains have not seen, per datum.

    Attributes:
        share: estimated share of the posterior's mass in the unseen runs, less that of the chains' own rare visits, (N,).
        matters: whether the share is too large to be ignored, or unknown, (N,).
    """

    share: Tensor
    matters: Tensor


@dataclass(frozen=True)
class Modes:
    """Short runs from the prior, P per datum.

    Attributes:
        mean: mean of each run's last states, (P, N, d).
        end: each run's last state, (P, N, d).
        level: mean log joint of each run's last states, (P, N).
        log_weight: annealing weights, unnormalised, (P, N).
        ladder: inverse temperatures of each datum, (T, N), from 0 to 1.
        length: number of consecutive states in a mean that is compared with a run's.
    """

    mean: Tensor
    end: Tensor
    level: Tensor
    log_weight: Tensor
    ladder: Tensor
    length: int

    @property
    def smallest_basin(self) -> float:
        """Share of the prior's mass that a basin must hold to be missed with a probability below 1e-3."""
        return 1 - MISS ** (1 / len(self.mean))

    def rows(self, index: Tensor) -> Modes:
        """Return the runs of some of the data."""
        parts = (self.mean[:, index], self.end[:, index], self.level[:, index], self.log_weight[:, index])
        return Modes(*parts, self.ladder[:, index], self.length)

    def starts(self, q: Normals, count: int) -> Tensor:
        """Return ends of `count` runs to start chains from, (count, N, d): the two farthest from q, then the others in order.

        If chains start in every mode that the runs found, R-hat shows whether they mix; random starts mostly share one mode.
        """
        u = whiten(q.root, self.mean.to(q.root.dtype) - q.loc)
        weighty = torch.softmax(self.log_weight.double(), 0) > LIGHT / len(self.mean)
        nearest = u.square().sum(-1)
        picked = []
        for _ in range(min(2, count)):
            far = torch.where(weighty, nearest, -1.0).argmax(0)
            place = far[None, :, None].expand(1, *self.end.shape[1:])
            picked.append(self.end.gather(0, place))
            nearest = torch.minimum(nearest, (u - u.gather(0, place)).square().sum(-1))
        return torch.cat([*picked, self.end[: count - len(picked)]])

    def longer(
        self,
        log_joint: LogJoint,
        root: Tensor,
        step: Tensor,
        settle: int,
        generator: torch.Generator,
        *,
        kept: int = KEPT,
        finest: float = JITTER,
    ) -> Modes:
        """Continue the runs by `settle` trajectories, then by `kept` more, and return them with the mean over the latter.

        A run that a slow start held back joins the others; one in a separate mode stays.

        Args:
            log_joint: the same data.
            root: metric roots, (N, d, d).
            step: step sizes, (N,).
            settle: trajectories before the mean.
            generator: of all randomness.
            kept: trajectories in the mean.
            finest: smallest factor on the step sizes while settling, log-uniform up to 1, so that a run can leave a narrow
                region. The mean uses full steps, like the chains that it is compared with.
        """
        state, sums, level = State.at(log_joint.grad, self.end), torch.zeros_like(self.end), torch.zeros_like(self.level)
        for i in range(settle + kept):
            n_steps = min(max(1, math.ceil(QUARTER / float(step.median()))), MAX_LEAPFROGS)
            least = finest if i < settle else JITTER
            factor = least ** float(torch.rand((), generator=generator, device=step.device))
            move = transition(log_joint.grad, state, root, step * factor, n_steps, generator, log_joint.leap)
            state = move.state
            if i < settle:
                step = _follow(step, move.accept) if least == JITTER else step
            else:
                sums, level = sums + state.z, level + state.value
        return Modes(sums / kept, state.z, level / kept, self.log_weight, self.ladder, self.length)

    def unseen_by(self, draws: Tensor, lp: Tensor, *, hops: bool = False) -> Unseen:
        """Compare the runs with chains (C, S, N, d) that have the log joint lp (C, S, N).

        With `hops`, consecutive draws jump between modes, as replicas do, and single states are compared instead of means.
        """
        draws, lp = draws.double(), lp.double()
        centre, covariance = moments(draws.flatten(0, 1))
        root = safe_cholesky(covariance)
        length, runs = (1, self.end) if hops else (self.length, self.mean)
        segments = draws[:, : draws.shape[1] // length * length].unflatten(1, (-1, length)).mean(2)
        far = whiten(root, segments.flatten(0, 1) - centre).square().sum(-1)
        reach = far.quantile(OFTEN, 0)
        distance = whiten(root, runs.double() - centre).square().sum(-1)
        limit = FACTOR * reach + SLACK
        unseen = distance > limit
        weight = torch.softmax(self.log_weight.double(), 0)
        share = ((weight * unseen).sum(0) - (far > limit).double().mean(0)).clamp_min(0)
        ess = 1 / weight.square().sum(0)
        # with few effective weights, compare the heights of log p(x, z) instead, as if the volumes were equal
        height = torch.where(unseen, self.level, -torch.inf).amax(0) - lp.flatten(0, 1).mean(0)
        reliable = ess > ENOUGH
        matters = torch.where(reliable, share > NEGLIGIBLE, (share > NEGLIGIBLE) | (height.exp() > NEGLIGIBLE))
        return Unseen(share, matters & unseen.any(0))


@stage("modes")
def search(log_joint: LogJoint, q: Normals, *, runs: int = RUNS, seed: int = 0) -> Modes:
    """Run short annealed runs from the prior into every posterior; the normals q give only the metric."""
    generator = torch.Generator(device=log_joint.device).manual_seed(seed + 1)
    with log_joint.frozen_weights():
        metric = Metric.of(log_joint, q, seed + 2)
        chains = TemperedChains(log_joint, log_joint.sample_prior(runs, seed).to(log_joint.probe_points.dtype))
        b = torch.zeros_like(chains.z[0, :, 0])
        step = torch.full_like(b, chains.z.shape[-1] ** -0.25)
        log_weight = torch.zeros_like(chains.z[..., 0])
        ladder = [b]
        for t in range(TEMPERATURES):
            if not bool((b < 1).any()):
                break
            raised = _raise(b, chains.likelihood) if t + 1 < TEMPERATURES else torch.ones_like(b)
            log_weight = log_weight + torch.where(raised > b, (raised - b) * chains.likelihood, 0.0)
            b = raised
            ladder.append(b)
            move = chains.move(b, metric.root(b), step, LEAPFROGS, generator)
            step = _follow(step, move.accept)
        found = Modes(chains.z, chains.z, log_weight, log_weight, torch.stack(ladder), KEPT)
        return found.longer(log_joint, metric.root(b), step, SETTLE, generator)


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
