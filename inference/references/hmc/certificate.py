"""Certificates of Markov chains: whether the draws of a datum can be trusted, with the reason.

A certificate requires all of: rank-normalised split R-hat < 1.01 for every latent and for the log density; bulk ESS >= 1,000;
tail ESS and the ESS of mean and sd >= 400 (the latter are not rank-normalised, so that a rare mode shows); no divergence;
E-BFMI > 0.3; means and spreads of chains started from q* and from the prior that agree within 4.5 standard errors; and no mode
that the annealed runs found and the chains did not. Otherwise the datum is `uncertified`, and the reason names the criterion.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from elbowroom.inference.mcmc import diagnostics
from elbowroom.inference.posterior import Status
from elbowroom.inference.search.modes import Modes
from elbowroom.inference.search.sampler import Chains
from elbowroom.inference.search.unseen import Unseen

RHAT = 1.01
ESS_BULK, ESS_TAIL = 1000, 400
BFMI = 0.3
AGREE = 4.5  # standard errors
STUCK = 1.3  # an R-hat that longer chains will not repair


@dataclass(frozen=True)
class Certificate:
    """Diagnostics per datum, (N,) each, and whether they meet the criteria."""

    rhat_max: Tensor
    ess_bulk_min: Tensor
    ess_tail_min: Tensor
    ess_mean_min: Tensor
    diverging_count: Tensor
    bfmi_min: Tensor
    disagreement: Tensor
    unseen_share: Tensor
    unseen: Tensor
    runs: int
    smallest_basin: float

    def rows(self, index: Tensor) -> Certificate:
        """Return the certificates of some of the data."""
        columns: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            columns[f.name] = value[index] if isinstance(value, Tensor) else value
        return Certificate(**columns)

    def amended(self, index: Tensor, unseen: Unseen) -> Certificate:
        """Return a copy with a new result about the modes of some of the data."""
        share, matters = self.unseen_share.clone(), self.unseen.clone()
        share[index], matters[index] = unseen.share, unseen.matters
        return replace(self, unseen_share=share, unseen=matters)

    @property
    def holds(self) -> Tensor:
        """(N,) True where every criterion is met; NaN meets none."""
        return (
            (self.rhat_max < RHAT)
            & (self.ess_bulk_min >= ESS_BULK)
            & (self.ess_tail_min >= ESS_TAIL)
            & (self.ess_mean_min >= ESS_TAIL)
            & (self.diverging_count == 0)
            & ((self.bfmi_min > BFMI) | self.bfmi_min.isposinf())
            & (self.disagreement < AGREE)
            & ~self.unseen
        )

    @property
    def stuck(self) -> Tensor:
        """(N,) True where longer chains would not help."""
        return ~(self.rhat_max < STUCK) | self.unseen

    def stats(self) -> dict[str, Tensor]:
        """Return the diagnostics by name."""
        names = (
            "rhat_max",
            "ess_bulk_min",
            "ess_tail_min",
            "ess_mean_min",
            "diverging_count",
            "bfmi_min",
            "disagreement",
            "unseen_share",
        )
        return {name: getattr(self, name).double() for name in names}

    def words(self, method: str) -> tuple[list[Status], list[str]]:
        """Return the status and its sentence for every datum."""
        status: list[Status] = []
        reason: list[str] = []
        columns = (
            self.holds,
            self.rhat_max,
            self.ess_bulk_min,
            self.ess_tail_min,
            self.ess_mean_min,
            self.diverging_count,
            self.bfmi_min,
            self.disagreement,
            self.unseen_share,
            self.unseen,
        )
        for holds, rhat, bulk, tail, plain, diverging, bfmi, differ, share, unseen in zip(
            *(c.tolist() for c in columns), strict=True
        ):
            if holds:
                status.append("certified")
                reason.append(
                    f"{method}: R-hat {rhat:.3f}, bulk ESS {bulk:.0f}, tail ESS {tail:.0f}; {self.runs} annealed runs from the "
                    f"prior found no mode it lacks (a basin of {self.smallest_basin:.1%} of the prior is missed once in 1,000)"
                )
                continue
            if unseen:
                sentence = f"annealed runs from the prior found a mode (mass about {share:.2g}) that the chains hardly visited"
            elif diverging:
                sentence = f"{diverging:.0f} divergent trajectories"
            elif not rhat < RHAT:
                sentence = f"R-hat {rhat:.3f} (must be below {RHAT})"
            elif not bulk >= ESS_BULK:
                sentence = f"bulk ESS {bulk:.0f} (must be at least {ESS_BULK:,})"
            elif not tail >= ESS_TAIL:
                sentence = f"tail ESS {tail:.0f} (must be at least {ESS_TAIL})"
            elif not plain >= ESS_TAIL:
                sentence = f"ESS of mean or sd {plain:.0f} (must be at least {ESS_TAIL}): a rare mode, or heavy tails"
            elif not bfmi > BFMI:
                sentence = f"E-BFMI {bfmi:.2f} (must exceed {BFMI})"
            else:
                sentence = f"chains from q* and from the prior differ by {differ:.1f} standard errors"
            status.append("uncertified")
            reason.append(f"{method}: {sentence}")
        return status, reason


def certify(chains: Chains, modes: Modes) -> Certificate:
    """Judge the chains of every datum by themselves; their second half started from the prior.

    What annealed runs from the prior (`modes`, of the same data) saw and the chains did not is judged by `unseen`, and enters
    by `Certificate.amended`.
    """
    draws = chains.draws.double()
    n = draws.shape[2]
    rhats, bulk, tail = diagnostics.by_ranks(draws)
    rhat = torch.maximum(rhats.amax(-1), diagnostics.rhat(chains.lp))
    if chains.energy is None:
        bfmi = torch.full((n,), torch.inf, dtype=draws.dtype, device=draws.device)
    else:
        bfmi = diagnostics.ebfmi(chains.energy).amin(0)
    return Certificate(
        rhat_max=rhat,
        ess_bulk_min=bulk.amin(-1),
        ess_tail_min=tail.amin(-1),
        ess_mean_min=torch.minimum(diagnostics.ess_mean(draws), diagnostics.ess_sd(draws)).amin(-1),
        diverging_count=chains.divergent.sum((0, 1)),
        bfmi_min=bfmi,
        disagreement=_disagreement(draws),
        unseen_share=torch.zeros_like(rhat),
        unseen=torch.zeros_like(rhat, dtype=torch.bool),
        runs=len(modes.end),
        smallest_basin=modes.smallest_basin,
    )


def _disagreement(draws: Tensor) -> Tensor:
    """Return the largest difference of means and spreads between the two halves of the chains, in standard errors, (N,)."""
    centre = draws.mean((0, 1))
    worst = torch.zeros(draws.shape[2], dtype=draws.dtype, device=draws.device)
    for quantity in (draws, (draws - centre).square()):
        first, second = quantity.tensor_split(2)
        error = torch.hypot(diagnostics.mcse_mean(first), diagnostics.mcse_mean(second))
        differ = (first.mean((0, 1)) - second.mean((0, 1))).abs() / error
        worst = torch.maximum(worst, differ.nan_to_num(nan=torch.inf).amax(-1))
    return worst
