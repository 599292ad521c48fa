"""Modes that annealed runs from the prior have found and other draws of a posterior have not.

The runs that end farthest from the draws, and from each other, are continued with the draws' own kernel. A run is in another
mode if it stays apart: the means of its first and of its last states both lie beyond nearly all means of equally many
consecutive states of the draws (like is compared with like: states of HMC are antithetic, and a mean of them varies far less
than a mean of independent states). A run that had only not settled joins the others; two modes that exchange are one.

How much mass such a mode holds, the annealing weights say where a few runs in it are effective. Where not, their sum may be far
too small, and the heights of log p(x, z) are compared too, as if the volumes were equal: the larger share counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from elbowroom.inference.mcmc import diagnostics
from elbowroom.inference.mcmc.leapfrog import State
from elbowroom.inference.mcmc.normals import moments, safe_cholesky, whiten
from elbowroom.inference.search.modes import FACTOR, SLACK, Modes, climb
from elbowroom.inference.search.sampler import Sampler
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.stages import stage

CANDIDATES = 4  # runs that are continued
CLIMB = 16  # steps up first: a run that a steep region held back climbs out of it
SETTLE, LONGEST = 8, 100  # trajectories before the means, and at most, for draws that are correlated
HALF = 10  # trajectories in each of two means
OFTEN = 0.99  # quantile of the draws' means; what lies beyond was seen rarely, if at all
MOVES = 0.3  # acceptance of a run that moves
NEGLIGIBLE = 0.005  # ignored share of the mass in a mode
ENOUGH = 5.0  # effective runs in a mode, with fewer of which their weights say little
NEIGHBOURS = 64  # draws to which a run may be nearer than to the mode


@dataclass(frozen=True)
class Unseen:
    """Result of the runs that other draws have not seen, per datum.

    Attributes:
        share: estimated share of the posterior's mass in modes that the draws did not see, (N,).
        matters: whether there is such a mode, and its share is too large to be ignored, (N,).
    """

    share: Tensor
    matters: Tensor

    def rows(self, index: Tensor) -> Unseen:
        """Return the result for some of the data."""
        return Unseen(self.share[index], self.matters[index])


@stage("unseen modes")
def unseen(
    log_joint: LogJoint,
    modes: Modes,
    draws: Tensor,
    lp: Tensor,
    root: Tensor,
    step: Tensor,
    generator: torch.Generator,
    *,
    hops: bool = False,
) -> Unseen:
    """Continue the farthest runs with the draws' kernel, and return what stays apart.

    Args:
        log_joint: the data.
        modes: annealed runs from the prior, of the same data.
        draws: draws of the posterior in chains, (C, S, N, d).
        lp: their log joint, (C, S, N).
        root: metric roots of their kernel, (N, d, d).
        step: its step sizes, (N,).
        generator: of all randomness.
        hops: consecutive draws jump between modes, as replicas do: single states are compared instead of means.
    """
    draws, lp = draws.double(), lp.double()
    centre, covariance = moments(draws.flatten(0, 1))
    scale = safe_cholesky(covariance)
    ess = diagnostics.ess_mean(draws).amin(-1).nan_to_num(nan=1.0).clamp_min(1.0)
    slowest = float((draws.shape[0] * draws.shape[1] / ess).max())
    settle = min(max(SETTLE, math.ceil(3 * slowest)), LONGEST)
    index = modes.farthest(centre, scale, CANDIDATES)
    start = modes.end.gather(0, index[..., None].expand(-1, *modes.end.shape[1:])).to(root.dtype)
    with log_joint.frozen_weights():
        start = climb(log_joint, start, root.square().sum(-1).sqrt(), CLIMB)[0]
        sampler = Sampler(log_joint, State.at(log_joint.grad, start), root, step, generator)
        runs = sampler.run(torch.arange(log_joint.n_obs, device=root.device), settle + 2 * HALF)
    states, level = runs.draws[:, settle:].double(), runs.lp[:, settle:].double()  # (K, 2 HALF, N, d)
    distance = lambda z: whiten(scale, z.flatten(0, -3) - centre).square().sum(-1).unflatten(0, z.shape[:-2])
    known = distance(draws)
    limit = (FACTOR * _rarely_beyond(known) + SLACK).expand(len(states), -1)
    nearest = distance(states).quantile(0.1, 1)  # of most of its states
    if not hops:
        length = min(HALF, draws.shape[1])
        known = distance(draws[:, : draws.shape[1] // length * length].unflatten(1, (-1, length)).mean(2))
        moves = runs.accept[:, settle:].mean(1) > MOVES  # a run that stands still has no mean
        of_means = FACTOR * _rarely_beyond(known) + SLACK
        limit = torch.where(moves, of_means, limit)
        nearest = torch.where(
            moves, torch.minimum(distance(states[:, :HALF].mean(1)), distance(states[:, HALF:].mean(1))), nearest
        )
    apart = nearest > limit  # (K, N)
    height = torch.where(apart, level.mean(1), -torch.inf).amax(0) - lp.mean((0, 1))
    weight = torch.softmax(modes.log_weight.double(), 0)
    there = weight * _nearer(modes.end.double(), states.mean(1), apart, draws, scale)
    effective = there.sum(0).square() / there.square().sum(0)  # NaN without any
    rare = (known.flatten(0, 1) > limit.amax(0)).double().mean(0)
    by_weight = (there.sum(0) - rare).clamp_min(0)
    share = torch.where(effective > ENOUGH, by_weight, torch.maximum(by_weight, height.sigmoid()))
    share = torch.where(apart.any(0), share, 0.0)
    return Unseen(share, share > NEGLIGIBLE)


def _rarely_beyond(distance: Tensor) -> Tensor:
    """Return the quantile OFTEN of distances (C, S, N) of each datum, (N,), from the largest alone."""
    columns = distance.flatten(0, 1).T.contiguous()
    place = OFTEN * (columns.shape[1] - 1)
    below = min(math.floor(place), columns.shape[1] - 1)
    largest = columns.topk(columns.shape[1] - below, 1).values
    return torch.lerp(largest[:, -1], largest[:, max(-2, -largest.shape[1])], place - below)


def _nearer(ends: Tensor, others: Tensor, apart: Tensor, draws: Tensor, scale: Tensor) -> Tensor:
    """Return which runs (P, N) end nearer to a mode (K, N, d) that is apart than to any of some draws."""
    flat = draws.flatten(0, 1)
    some = flat[torch.linspace(0, len(flat) - 1, min(NEIGHBOURS, len(flat)), device=flat.device).round().long()]
    u, to, of = (whiten(scale, z - 0.0) for z in (ends, others, some))

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return (a.movedim(1, 0).unsqueeze(2) - b.movedim(1, 0).unsqueeze(1)).square().sum(-1).movedim(0, -1)  # (A, B, N)

    mode = torch.where(apart, squared(u, to), torch.inf).amin(1)
    return mode < squared(u, of).amin(1)
