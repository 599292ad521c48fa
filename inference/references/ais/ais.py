"""Annealed importance sampling as a reference: bounds on log p(x) and weighted draws from two starts.

Every datum is annealed from the prior, and from its inflated refitted normal q*. The start with the larger lower bound (less
an allowance for noise) is run again with fresh random numbers, and only that second run is reported, because the larger of two
noisy bounds is not a valid bound.

q* has missed a mode if chains from the prior give a bound that is larger by more than the errors, or if a share of their weight
ends at points that no chain from q* reached (a small share counts only if their bound is larger by as much as that share is
worth). Such an alarm is reliable; agreement of the two starts proves nothing. If chains from q* give the larger bound, the
prior's chains had too few temperatures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from elbowroom.inference.mcmc.normals import Normals, moments, whiten
from elbowroom.inference.posterior import Evidence, Posterior, Reference, in_chains, resample, sure_bound
from elbowroom.inference.references.ais.annealing import AnnealedBound, block_size, lower, tune
from elbowroom.inference.references.ais.paths import Path, PriorPath, RefitPath
from elbowroom.inference.search.scout import scout
from elbowroom.inference.target.log_joint import LogJoint

ALARM = 3.0  # standard errors between the two starts
CAUTION = 2.0  # standard errors subtracted from each bound before the comparison, because a noisier bound tends to be larger
FEW = 4.0  # below so many effective chains the standard error is unreliable
LUCK = 3.0  # nats subtracted in that case; a bound is too high by this much at most once in 20
UNSEEN, PLAIN = 0.05, 0.25  # shares of mass missed by chains from q*: ignored up to UNSEEN, an alarm by itself above PLAIN
HINT = 2.0  # standard errors between the starts that make a share between the two an alarm
FACTOR, SLACK = 1.5, 4.0  # a chain lies outside beyond FACTOR x (q*'s farthest chain) + SLACK, in squared deviations
MATTERS = 0.1  # differences of so many nats are ignored, however small the errors


class Annealed(Reference):
    """Lower bounds on log p(x), and weighted draws, by annealed importance sampling from the prior and from a refitted normal.

    Args:
        temperatures: steps from the start to the posterior; more make the bounds tighter and the weights more equal.
        chains: annealed chains per datum and start.
        leapfrogs: gradient steps per temperature.
        start: `prior`, `refit` (an inflated best normal, blind to other modes), or `both`.
        inflation: factor of the best normal's standard deviations.
    """

    name: ClassVar[str] = "ais"

    def __init__(
        self,
        *,
        temperatures: Annotated[int, Gt(1)] = 100,
        chains: Annotated[int, Ge(4)] = 32,
        leapfrogs: Annotated[int, Gt(0)] = 4,
        start: Literal["both", "prior", "refit"] = "both",
        inflation: Annotated[float, Ge(1)] = 1.3,
    ) -> None:
        self.temperatures, self.chains, self.leapfrogs = temperatures, chains, leapfrogs
        self.start, self.inflation = start, inflation

    def refusal(self, log_joint: LogJoint) -> str | None:
        """Refuse a model without continuous latents."""
        return "ais needs a continuous latent, this model has none" if log_joint.dim == 0 else None

    def __call__(self, log_joint: LogJoint, *, keep: int, seed: int, until: float = math.inf) -> Posterior:
        """Return evidence bounds, weighted moments, and draws resampled from the chains by weight; all data uncertified.

        Data not reached before the budget ended have NaN everywhere.
        """
        seeds = torch.randint(2**62, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
        q_star = scout(log_joint).refit.q
        paths = self._paths(log_joint, q_star, seeds[0])
        found = _Found.empty(log_joint, q_star, keep)
        blocks = log_joint.blocks(block_size(log_joint, self.chains))
        # each block has its own random numbers
        more = torch.randint(2**62, (len(blocks), 7), generator=torch.Generator().manual_seed(seeds[1])).tolist()
        with torch.no_grad():
            for rows, own in zip(blocks, more, strict=True):
                if time.monotonic() > until:
                    break
                self._anneal(found, rows, [path.rows(rows) for path in paths], own)
            return self._posterior(log_joint, found)

    def _paths(self, log_joint: LogJoint, q_star: Normals, seed: int) -> list[Path]:
        paths: list[Path] = []
        if self.start != "refit":
            paths.append(PriorPath(log_joint, q_star, seed=seed))
        if self.start != "prior":
            paths.append(RefitPath(log_joint, q_star, inflation=self.inflation))
        return paths

    def _anneal(self, found: _Found, rows: Tensor, paths: Sequence[Path], seeds: Sequence[int]) -> None:
        plans = [
            tune(path, temperatures=self.temperatures, leapfrogs=self.leapfrogs, seed=seeds[i]) for i, path in enumerate(paths)
        ]
        first = [
            lower(path, plan, chains=self.chains, seed=seeds[2 + i])
            for i, (path, plan) in enumerate(zip(paths, plans, strict=True))
        ]
        for path, bound in zip(paths, first, strict=True):
            found.value[path.name][rows], found.error[path.name][rows] = bound.value, bound.error
        if len(paths) == 2:
            found.unseen[rows] = unseen(first[0], first[1], found.q_star.rows(rows))
        careful = [b.value - CAUTION * b.error - LUCK * (b.ess < FEW) for b in first]
        winner = torch.stack(careful).nan_to_num(nan=-torch.inf).argmax(0)
        for i, (path, plan, bound) in enumerate(zip(paths, plans, first, strict=True)):
            mine = (winner == i).nonzero()[:, 0]
            if not len(mine):
                continue
            _, used, at = path.log_joint.some(mine)
            again = lower(path.rows(used), plan.rows(used), chains=self.chains, seed=seeds[4 + i])
            found.take(rows[mine], bound.rows(mine), again.rows(at), path.name, seeds[6])

    def _posterior(self, log_joint: LogJoint, found: _Found) -> Posterior:
        prior, refit = found.value["prior"], found.value["refit"]
        spread = (found.error["prior"].square() + found.error["refit"].square()).sqrt()
        apart = (prior - refit) / spread.clamp_min(1e-12)
        missed = self._missed(prior - refit, spread, found.unseen)
        known = found.draws.nan_to_num()  # a program may not accept NaN
        lost = found.draws.isnan().any(-1).any(0)
        blank = lambda value: value.masked_fill(lost.reshape(1, -1, *[1] * (value.dim() - 2)), torch.nan)
        stats = {
            "ais_lower_prior": prior,
            "ais_lower_refit": refit,
            "ais_disagreement": apart,
            "ais_unseen": found.unseen,
            "ais_missed": missed.to(prior.dtype),
            "ais_ess": found.ess,
            "ais_failed": found.failed,
            "bound_sure": found.sure,
        }
        return Posterior(
            method=self.name,
            draws=in_chains(found.draws),
            sites={name: in_chains(blank(value)) for name, value in log_joint.constrain(known).items()},
            status=["uncertified"] * log_joint.n_obs,
            reason=self._reasons(found, apart, missed),
            mean=found.mean,
            covariance=found.covariance,
            evidence=Evidence("bound", "annealed importance sampling", found.bound, found.bound_error),
            stats=stats,
            sample_stats={"lp": in_chains(blank(log_joint(known)))},
        )

    @staticmethod
    def _missed(gap: Tensor, spread: Tensor, share: Tensor) -> Tensor:
        """Whether q* has missed a mode, (N,): a missed share s lowers the bound of its chains by -log(1 - s) nats."""
        told = (gap > ALARM * spread) & (gap > MATTERS)
        worth = -torch.log1p(-share.clamp_max(1 - 1e-12))
        return told | (share > PLAIN) | ((share > UNSEEN) & (gap > worth / 2) & (gap > HINT * spread))

    def _reasons(self, found: _Found, apart: Tensor, missed: Tensor) -> list[str]:
        reasons = []
        gap = found.value["prior"] - found.value["refit"]
        columns = (found.bound, found.ess, found.unseen, missed, apart, gap)
        for value, ess, share, lost, sigmas, nats in zip(*(column.tolist() for column in columns), strict=True):
            if math.isnan(value):
                sentence = "the budget ended before this datum was reached"
            elif math.isinf(value):
                sentence = "no chain ended with a finite weight"
            elif lost:
                sentence = (
                    f"q* missed a mode: chains from the prior found {nats:.2g} nats more ({sigmas:.1f} standard errors), "
                )
                sentence += f"and a share {share:.2g} of the mass where no chain from q* went"
            elif sigmas < -ALARM and nats < -MATTERS:
                sentence = f"too few temperatures from the prior: chains from q* found {-nats:.2g} nats more"
            else:
                sentence = (
                    f"a lower bound on log p(x) and {ess:.0f} effective chains of {self.chains}: no certificate of the draws"
                )
            reasons.append(f"ais: {sentence}")
        return reasons


@dataclass
class _Found:
    """Results of the runs, (N, ...) each; NaN where there was no run."""

    value: dict[str, Tensor]
    error: dict[str, Tensor]
    q_star: Normals
    unseen: Tensor
    bound: Tensor
    bound_error: Tensor
    ess: Tensor
    failed: Tensor
    mean: Tensor
    covariance: Tensor
    draws: Tensor
    sure: Tensor

    @classmethod
    def empty(cls, log_joint: LogJoint, q_star: Normals, keep: int) -> _Found:
        n, d = log_joint.n_obs, log_joint.dim
        dtype = log_joint.dtype or log_joint.own_dtype

        def nan(*shape: int) -> Tensor:
            return torch.full(shape, torch.nan, dtype=dtype, device=log_joint.device)

        value, error = {"prior": nan(n), "refit": nan(n)}, {"prior": nan(n), "refit": nan(n)}
        return cls(
            value, error, q_star, nan(n), nan(n), nan(n), nan(n), nan(n), nan(n, d), nan(n, d, d), nan(keep, n, d), nan(n)
        )

    def take(self, rows: Tensor, first: AnnealedBound, again: AnnealedBound, name: str, seed: int) -> None:
        """Store the winner's second run as the bound, and the chains of both runs as particles."""
        self.bound[rows], self.bound_error[rows] = again.value, again.error
        self.ess[rows], self.failed[rows] = again.ess, again.failed
        self.sure[rows] = sure_bound(again.log_weights)
        z = torch.cat([first.z, again.z])
        log_w = torch.cat([first.log_weights, again.log_weights])
        some = log_w.isfinite().any(0)
        weights = torch.softmax(torch.where(some, log_w, 0.0), 0)
        z = torch.where(weights[..., None] > 0, z, 0.0)
        mean, covariance = moments(z, weights)
        lost = ~some[:, None]
        self.mean[rows] = mean.masked_fill(lost, torch.nan)
        self.covariance[rows] = covariance.masked_fill(lost[..., None], torch.nan)
        generator = torch.Generator(device=z.device).manual_seed(seed + (name == "refit"))
        self.draws[:, rows] = resample(z, weights, len(self.draws), generator).masked_fill(lost, torch.nan)


def unseen(prior: AnnealedBound, refit: AnnealedBound, q_star: Normals) -> Tensor:
    """Return the estimated share of p(x) that chains from the prior found where no chain from q* went, (N,).

    A chain lies outside if its squared Mahalanobis distance from q* exceeds 1.5 times that of the farthest chain from q*, plus
    4. With Z_out = mean_s w_s over the prior's chains outside, the share is Z_out / (Z_out + Z_refit).
    """
    far = [whiten(q_star.root, bound.z - q_star.loc).square().sum(-1) for bound in (prior, refit)]
    farthest = far[1].masked_fill(~refit.log_weights.isfinite(), 0.0).amax(0)
    outside = far[0] > FACTOR * farthest + SLACK
    log_out = torch.logsumexp(prior.log_weights.masked_fill(~outside, -torch.inf), 0) - math.log(len(outside))
    return torch.sigmoid((log_out - refit.value).nan_to_num(nan=-torch.inf))
