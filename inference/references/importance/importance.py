"""Importance sampling as a reference: weighted draws of every posterior, its evidence, and a certificate.

The proposal is not the guide. A pilot draws from the refitted normal q*, or from the Laplace approximation, with heavier
tails: half of its draws are from a Student-t. Its Pareto-smoothed mean m and covariance C, which cover all of the posterior
that the pilot reaches, give the proposal of the scored run:

    r(z) = (1 - s) N(z; m, 1.15 C) + s t_4(z; m, 1.6^2 C),   w = p(x, z) / r(z),   z ~ r independent

The t part keeps the weights bounded if a posterior's tails are no heavier than its own (as with a normal prior); the normal,
a little wider than C, keeps them even in many dimensions. In few dimensions draws of the t are not lost, and s is 1/2; it falls
to 1/10 at 25.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from elbowroom.inference.mcmc.normals import Normals, StudentT, moments
from elbowroom.inference.posterior import ROUNDED, Evidence, Posterior, Reference, Status, concatenate, in_chains, resample
from elbowroom.inference.references.importance.guide import FINITE_K, evidence, split_bounds
from elbowroom.inference.references.importance.laplace import laplace
from elbowroom.inference.references.importance.psis import psis
from elbowroom.inference.search.modes import RUNS, Modes
from elbowroom.inference.search.scout import looked, scout
from elbowroom.inference.search.single_precision import Precision, in_precision
from elbowroom.inference.search.unseen import Unseen, unseen
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import LARGE_ARRAY, fitting

DF, INFLATION = 4, 1.6  # of the Student-t part of the proposal
WIDER = 1.15  # variance of the normal over the pilot's covariance, in the scored run
TAILS, LEAST = 2.5, 0.1  # share of the Student-t there: TAILS / d between LEAST and a half
PILOTS, FEW = (1000, 1000, 2000), 5  # draws of the pilots; latents up to which the last one suffices
SHRUNK, FEWEST = 5.0, 5.0  # draws per latent that the proposal before is worth; effective draws with which a pilot says nothing
MIN_ESS = 1000
LOOKED, SAMPLED = 1000, 100  # draws that are compared with annealed runs, and effective draws that allow it
STEP = 0.6  # of the runs in whitened coordinates, in units of d^(-1/4)


@dataclass(frozen=True)
class Proposal:
    """A mixture of a normal and a wider Student-t, per datum.

    Attributes:
        narrow: the normal.
        wide: the Student-t.
        heavy: share of the Student-t, (N,).
    """

    narrow: Normals
    wide: StudentT
    heavy: Tensor

    @classmethod
    def around(cls, q: Normals) -> Proposal:
        """Return the pilot's proposal, half and half; a normal that is not finite is replaced by a standard normal."""
        bad = ~(q.loc.isfinite().all(-1) & q.root.isfinite().flatten(1).all(-1))
        eye = torch.eye(q.loc.shape[-1], dtype=q.loc.dtype, device=q.loc.device)
        loc = q.loc.masked_fill(bad[:, None], 0.0)
        root = torch.where(bad[:, None, None], eye, q.root)
        return cls(Normals(loc, root), StudentT(loc, INFLATION * root, DF), torch.full_like(loc[:, 0], 0.5))

    def sample(self, n_draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return independent draws z (S, N, d) and their log density, (S, N), in nats."""
        z, wide = self.narrow.sample(n_draws, generator), self.wide.sample(n_draws, generator)
        heads = torch.rand(z.shape[:2], dtype=z.dtype, device=z.device, generator=generator) < self.heavy
        z = torch.where(heads[..., None], wide, z)
        narrow, tails = self.narrow.log_prob(z) + (-self.heavy).log1p(), self.wide.log_prob(z) + self.heavy.log()
        return z, torch.logaddexp(narrow, tails)

    def adapted(self, log_joint: LogJoint, generator: torch.Generator) -> Proposal:
        """Return the proposal around a pilot's weighted moments; with many latents, pilot after pilot (population Monte Carlo).

        Few effective draws tell little of a covariance: it is shrunk towards that of the proposal they came from.
        """
        found = self
        for draws in PILOTS if log_joint.dim > FEW else PILOTS[-1:]:
            found = found._moved(_Weighted.of(log_joint, found, draws, generator))
        return found

    def _moved(self, draws: _Weighted) -> Proposal:
        mean, covariance = draws.moments()
        d = mean.shape[-1]
        known = (draws.ess > FEWEST) & mean.isfinite().all(-1) & covariance.isfinite().flatten(1).all(-1)
        share = torch.where(known, draws.ess / (draws.ess + SHRUNK * d), 0.0)[:, None, None]
        mixed = share * torch.where(known[:, None, None], covariance, 0.0) + (1 - share) * self.narrow.covariance
        around = Proposal.around(Normals.from_moments(torch.where(known[:, None], mean, self.narrow.loc), mixed))
        narrow = Normals(around.narrow.loc, WIDER**0.5 * around.narrow.root)
        least = min(0.5, max(LEAST, TAILS / d))
        return Proposal(narrow, around.wide, 0.5 - share[:, 0, 0] * (0.5 - least))

    def rows(self, index: Tensor) -> Proposal:
        """Return the proposals for some of the data."""
        return Proposal(self.narrow.rows(index), self.wide.rows(index), self.heavy[index])


@dataclass(frozen=True)
class _Weighted:
    """Draws (S, N, d), their log density, raw log weights, and smoothed normalised weights, (S, N)."""

    z: Tensor
    log_p: Tensor
    log_w: Tensor
    weights: Tensor
    pareto_k: Tensor
    ess: Tensor
    none: Tensor

    @classmethod
    def of(cls, log_joint: LogJoint, proposal: Proposal, n_draws: int, generator: torch.Generator) -> _Weighted:
        z, log_r = proposal.sample(n_draws, generator)
        log_p = log_joint(z).to(log_r.dtype)
        # NaN says nothing about log p; weight 0 keeps the bound valid
        log_w = torch.where(log_p.isnan() | log_p.isposinf(), -torch.inf, log_p) - log_r
        none = ~log_w.isfinite().any(0)
        log_w = torch.where(none, 0.0, log_w)
        smoothed = psis(log_w)
        weights = smoothed.log_weights.exp()
        return cls(z, log_p, log_w, weights, smoothed.pareto_k, smoothed.ess_fraction * n_draws, none)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the weighted mean (N, d) and covariance (N, d, d)."""
        return moments(self.z, self.weights)


class ImportanceSampling(Reference):
    """Importance sampling from the refitted q* with heavier tails, Pareto-smoothed; certified datum by datum.

    A datum is certified if k-hat < 1/2 (the weights have a variance), the weights are worth at least 1,000 independent draws,
    and no mode is unseen: an annealed run from the prior that stays apart from the draws when it is continued, in a mode with
    more than 0.5 % of the mass (see `search.unseen`). log p(x, z) is computed in single precision where its rounding is too
    small to matter (see `search.single_precision`) and no latent's support has an edge.

    Args:
        draws: number of draws S per datum.
        start: of the pilot: the refitted normal, or the Laplace approximation, which takes a tenth of the time.
        runs: annealed runs that look for modes; fewer find less: the status says how small a basin they still find.
    """

    name: ClassVar[str] = "importance"

    def __init__(
        self,
        *,
        draws: Annotated[int, Ge(2000)] = 10_000,
        start: Literal["refit", "laplace"] = "refit",
        runs: Annotated[int, Ge(16)] = RUNS,
    ) -> None:
        self.draws, self.start, self.runs = draws, start, runs

    def refusal(self, log_joint: LogJoint) -> str | None:
        """Refuse a model without continuous latents."""
        return "importance needs a continuous latent, this model has none" if log_joint.dim == 0 else None

    def __call__(self, log_joint: LogJoint, *, keep: int, seed: int, until: float = math.inf) -> Posterior:
        """Return weighted moments, resampled draws, evidence and certificates.

        If the data can be separated, the memory for draws does not grow with their number. Data not reached before `until` have
        NaN everywhere.
        """
        if self.start == "refit":
            known = scout(log_joint, self.runs)
            normal, modes = known.refit.q, known.modes
        else:
            normal = laplace(log_joint, seed)
            modes = looked(log_joint, normal, self.runs)
        start = Proposal.around(normal)
        # next to an edge of a support, rounding of the values matters more than at the draws that are tested
        wanted: Precision = "double" if log_joint.has_edges else "auto"
        fast = in_precision(log_joint, normal, wanted, torch.Generator(device=log_joint.device).manual_seed(seed))
        blocks = log_joint.blocks(fitting(self.draws * log_joint.dim, LARGE_ARRAY))
        seeds = torch.randint(2**62, (len(blocks),), generator=torch.Generator().manual_seed(seed)).tolist()
        found = []
        with torch.no_grad():
            for rows, own in zip(blocks, seeds, strict=True):
                part = log_joint.subset(rows)
                if time.monotonic() > until:
                    found.append(self._late(part, keep))
                else:
                    found.append(self._block(part, fast.subset(rows), start.rows(rows), modes.rows(rows), keep, own))
        return concatenate(found)

    def _block(self, log_joint: LogJoint, fast: LogJoint, start: Proposal, modes: Modes, keep: int, seed: int) -> Posterior:
        """Return the result for some data; `fast` are their densities, in single precision where that suffices."""
        generator = torch.Generator(device=log_joint.device).manual_seed(seed)
        proposal = start.adapted(fast, generator)
        draws = _Weighted.of(fast, proposal, self.draws, generator)
        mean, covariance = draws.moments()
        kept = resample(torch.cat([draws.z, draws.log_p[..., None]], -1), draws.weights, keep, generator)
        found = _look(fast, modes, proposal, draws, generator)
        share, missed = found.share, found.matters
        lost, rounded, words = log_joint.rounded_share(draws.z, draws.log_p, draws.log_p - draws.log_w)
        value, _ = evidence(draws.log_w, draws.pareto_k, draws.ess / self.draws)
        stats = {
            "weights_pareto_k": draws.pareto_k,
            "weights_ess": draws.ess,
            "unseen_share": share,
            "mode_unseen": missed.to(share.dtype),
            **split_bounds(draws.log_w.masked_fill(rounded, -torch.inf)),  # what is left out keeps a lower bound valid
        }
        status, reason = self._words(draws, share, missed, modes, lost, words)
        return self._posterior(log_joint, kept, draws.none, status, reason, mean, covariance, value.value, value.error, stats)

    def _late(self, log_joint: LogJoint, keep: int) -> Posterior:
        n, d = log_joint.n_obs, log_joint.dim
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=log_joint.device)
        names = ("weights_pareto_k", "weights_ess", "unseen_share", "mode_unseen", *split_bounds(zeros(2, n)))
        lost = torch.ones(n, dtype=torch.bool, device=log_joint.device)
        reason = [f"{self.name}: the budget ended before this datum was reached"] * n
        status: list[Status] = ["uncertified"] * n
        stats = {name: zeros(n) for name in names}
        return self._posterior(
            log_joint, zeros(keep, n, d + 1), lost, status, reason, zeros(n, d), zeros(n, d, d), zeros(n), zeros(n), stats
        )

    def _posterior(
        self,
        log_joint: LogJoint,
        kept: Tensor,
        lost: Tensor,
        status: list[Status],
        reason: list[str],
        mean: Tensor,
        covariance: Tensor,
        value: Tensor,
        error: Tensor,
        stats: dict[str, Tensor],
    ) -> Posterior:
        """Return the result, NaN for lost data; the last column of `kept` is the log density of the draws."""

        def blank(t: Tensor, dim: int) -> Tensor:
            return t.masked_fill(lost.reshape([-1 if i == dim else 1 for i in range(t.dim())]), torch.nan)

        z, lp = kept[..., :-1], kept[..., -1]
        return Posterior(
            method=self.name,
            draws=in_chains(blank(z, 1)),
            sites={name: in_chains(blank(v, 1)) for name, v in log_joint.constrain(z).items()},
            status=status,
            reason=reason,
            mean=blank(mean, 0),
            covariance=blank(covariance, 0),
            evidence=Evidence("estimate", "importance sampling from q*", blank(value, 0), blank(error, 0)),
            stats={name: blank(v, 0) for name, v in stats.items()},
            sample_stats={"lp": in_chains(blank(lp, 1))},
        )

    def _words(
        self, draws: _Weighted, share: Tensor, missed_modes: Tensor, modes: Modes, lost: Tensor, words: str
    ) -> tuple[list[Status], list[str]]:
        """Return the status and its sentence for every datum."""
        status: list[Status] = []
        reason: list[str] = []
        columns = (draws.pareto_k, draws.ess, share, missed_modes, draws.none, lost)
        for k, ess, part, missed, none, edge in zip(*(column.tolist() for column in columns), strict=True):
            certified = False
            if none:
                sentence = "log p(x, z) is finite at none of the draws"
            elif not edge <= ROUNDED:
                sentence = f"a share {edge:.2g} {words}"
            elif missed:
                sentence = f"annealed runs from the prior found a mode (mass about {part:.2g}) that the draws hardly reach"
            elif not k < FINITE_K:
                sentence = f"k-hat {k:.2f} (must be below {FINITE_K})"
            elif not ess >= MIN_ESS:
                sentence = f"the weights are worth {ess:.0f} draws (must be at least {MIN_ESS:,})"
            else:
                certified = True
                sentence = (
                    f"k-hat {k:.2f}, the weights are worth {ess:.0f} of {self.draws:,} draws; {len(modes.end)} annealed "
                    f"runs from the prior found no mode it lacks (a basin of {modes.smallest_basin:.1%} of the prior is missed "
                    "once in 1,000)"
                )
            status.append("certified" if certified else "uncertified")
            reason.append(f"{self.name}: {sentence}")
        return status, reason


def _look(log_joint: LogJoint, modes: Modes, proposal: Proposal, draws: _Weighted, generator: torch.Generator) -> Unseen:
    """Look for modes that the draws have not seen; where the weights are worth too little, the proposal's own stand in."""
    z = resample(draws.z, draws.weights, LOOKED, generator)
    z = torch.where((draws.ess >= SAMPLED)[None, :, None], z, proposal.narrow.sample(LOOKED, generator))
    lp = log_joint(z)
    d = z.shape[-1]
    step = torch.full_like(draws.ess, STEP * d**-0.25)
    return unseen(
        log_joint,
        modes,
        in_chains(z),
        in_chains(torch.where(lp.isfinite(), lp, lp[lp.isfinite()].min())),
        proposal.narrow.root.to(log_joint.probe_points.dtype),
        step.to(log_joint.probe_points.dtype),
        generator,
    )
