"""From posteriors to the audit table: per datum, and per datum and reference, with units and long names."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import xarray as xr

from elbowroom.analysis.measures.distances import Comparison
from elbowroom.analysis.measures.evidence import EvidenceTable
from elbowroom.analysis.measures.gaps import NAMES as PARTS
from elbowroom.analysis.measures.table import Z95
from elbowroom.inference.posterior import Posterior

log = logging.getLogger("elbowroom")

NATS = "nats"
VARIABLES: dict[str, tuple[str, str]] = {
    "elbo": (NATS, "ELBO of the amortized guide: E_q[log p(x, z) - log q(z|x)]"),
    "elbo_se": (NATS, "standard error of elbo over its draws"),
    "log_evidence": (NATS, "log p(x), exact or estimate as evidence_method says; NaN where only a bound is known"),
    "log_evidence_se": (NATS, "numerical error (exact) or standard error (estimate) of log_evidence"),
    "log_evidence_lower": (
        NATS,
        "lower end for log p(x); where evidence_method says lower bound, one that holds with 97.5 % probability",
    ),
    "log_evidence_upper": (
        NATS,
        "upper end for log p(x); where evidence_method says so a probabilistic bound, conditional on the certified draws that "
        "reverse annealing starts from; NaN where only a lower bound is known",
    ),
    "elbo_refit": (NATS, "L[q*], the ELBO of the best member of the guide's family; NaN where the family was not refitted"),
    "elbo_refit_se": (NATS, "standard error of elbo_refit over its draws"),
    "refit_shortfall": (NATS, "estimate of what the refit is still short of the best member nearby"),
    "elbo_refit_full": (NATS, "L[q_full], the ELBO of the best normal with full covariance, whatever the guide's family"),
    "elbo_refit_full_se": (NATS, "standard error of elbo_refit_full over its draws"),
    "refit_full_shortfall": (NATS, "estimate of what that refit is still short of the best normal nearby"),
    "gap_total": (NATS, "log_evidence - elbo = KL(q(z|x) || p(z|x))"),
    "gap_total_lower": (NATS, "lower end of the 95 % interval for the gap (or of the gap to the lower bound)"),
    "gap_total_upper": (NATS, "upper end of the 95 % interval for the gap (or of the gap to the upper bound), NaN without one"),
    "gap_approximation": (NATS, "log_evidence - elbo_refit: what the guide's family cannot reach"),
    "gap_approximation_lower": (
        NATS,
        "lower end for gap_approximation, less refit_shortfall; also where only bounds are known",
    ),
    "gap_approximation_upper": (NATS, "upper end for gap_approximation; NaN without an upper end for log p(x)"),
    "gap_covariance": (NATS, "elbo_refit_full - elbo_refit: the part of gap_approximation that a full covariance would close"),
    "gap_covariance_lower": (NATS, "lower end of the 95 % interval for gap_covariance, less refit_shortfall"),
    "gap_covariance_upper": (NATS, "upper end of the 95 % interval for gap_covariance, refit_full_shortfall added"),
    "gap_shape": (NATS, "log_evidence - elbo_refit_full: what no normal can reach"),
    "gap_shape_lower": (NATS, "lower end for gap_shape, less refit_full_shortfall; also where only bounds are known"),
    "gap_shape_upper": (NATS, "upper end for gap_shape; NaN without an upper end for log p(x)"),
    "gap_amortization": (
        NATS,
        "elbo_refit - elbo, what the encoder misses of its own family, by common random numbers; it and gap_approximation "
        "add up to gap_total within their errors",
    ),
    "gap_amortization_lower": (NATS, "lower end of the 95 % interval for gap_amortization"),
    "gap_amortization_upper": (NATS, "upper end of the 95 % interval for gap_amortization, refit_shortfall added"),
    "missed_mass": ("1", "share of the posterior in modes that the guide misses; NaN without a certified reference"),
    "pareto_k": ("1", "tail index k-hat of the importance weights p(x, z) / q(z|x)"),
    "ess_fraction": ("1", "effective sample size of the importance weights, as a fraction of the draws"),
    "rate": (NATS, "KL(q(z|x) || p(z))"),
    "distortion": (NATS, "-E_q log p(x|z)"),
    "rhat_max": ("1", "largest rank-normalised split R-hat over latents; NaN for independent draws"),
    "ess_bulk_min": ("1", "smallest bulk effective sample size over latents; NaN for independent draws"),
    "ess_tail_min": ("1", "smallest tail effective sample size over latents; NaN for independent draws"),
    "diverging_count": ("1", "divergent transitions; 0 where the method has none"),
    "mean_error": ("reference sd", "largest |mean_q - mean_ref| / sd_ref over latents"),
    "sd_ratio": ("1", "sd_q / sd_ref of the latent where it is farthest from 1"),
    "sliced_wasserstein": ("reference sd", "sliced 1-Wasserstein distance between guide and reference draws"),
    "noise_floor": ("reference sd", "the same distance between two halves of the reference's draws"),
    "kl_forward": (
        NATS,
        "KL(p(z|x) || q(z|x)) = E_p[log p(x, z) - log q(z|x)] - log_evidence by the reference's draws, mass that the guide "
        "misses; NaN where the reference is neither exact nor certified, or log_evidence is missing",
    ),
    "kl_forward_se": (NATS, "its Monte Carlo standard error and that of log_evidence"),
    "total_variation": (
        "1",
        "half the sum over the discrete sites' joint values of |q - p_ref|; NaN beside continuous latents",
    ),
    "weights_pareto_k": ("1", "tail index k-hat of the reference's own importance weights"),
    "weights_ess": ("1", "effective number of draws that the reference's own importance weights are worth"),
    "unseen_share": ("1", "share of the mass in annealed runs from the prior that the reference's draws do not reach"),
    "bound_lower": (NATS, "lower bound by this reference's weights: it holds with a probability of at least 97.5 %"),
    "bound_upper": (
        NATS,
        "upper bound by reverse annealing: 97.5 % likely to hold, conditional on the draws that it starts from",
    ),
    "border_mass": ("1", "share of the posterior on the grid's border"),
    "refinement_error": (NATS, "change of log p(x) under a shifted, finer grid"),
}
PER_REFERENCE = (
    "rhat_max",
    "ess_bulk_min",
    "ess_tail_min",
    "weights_pareto_k",
    "weights_ess",
    "unseen_share",
    "border_mass",
    "refinement_error",
)


def _first(references: Sequence[Posterior], name: str, n: int) -> np.ndarray:
    """Return a statistic of the first reference that has it, per datum, else NaN."""
    value = np.full(n, np.nan)
    for posterior in references:
        if name in posterior.stats:
            value = np.where(np.isnan(value), posterior.stats[name].cpu().numpy(), value)
    return value


def _gaps(guide: Posterior, ladder: EvidenceTable, elbo: np.ndarray, elbo_se: np.ndarray) -> dict[str, np.ndarray]:
    """Return the gap and its parts, with intervals."""
    gap = ladder.value - elbo
    spread = Z95 * np.hypot(elbo_se, _one_error(ladder))
    no_value = np.isnan(gap)
    stat = {name: _first([guide], name, len(elbo)) for name in PARTS}
    best, full = stat["elbo_refit"], stat["elbo_refit_full"]
    short, short_full = stat["refit_shortfall"], stat["refit_full_shortfall"]
    covariance, both = stat["covariance"], Z95 * stat["covariance_se"]
    amortization, paired = stat["amortization"], Z95 * stat["amortization_se"]
    return {
        **{name: stat[name] for name in PARTS if "refit" in name},
        "gap_total": gap,
        "gap_total_lower": np.where(no_value, ladder.lower - elbo - Z95 * elbo_se, gap - spread),
        "gap_total_upper": np.where(no_value, ladder.upper - elbo + Z95 * elbo_se, gap + spread),
        "gap_approximation": ladder.value - best,
        "gap_approximation_lower": ladder.lower - best - short - Z95 * stat["elbo_refit_se"],
        "gap_approximation_upper": ladder.upper - best + Z95 * stat["elbo_refit_se"],
        "gap_covariance": covariance,
        "gap_covariance_lower": covariance - both - short,
        "gap_covariance_upper": covariance + both + short_full,
        "gap_shape": ladder.value - full,
        "gap_shape_lower": ladder.lower - full - short_full - Z95 * stat["elbo_refit_full_se"],
        "gap_shape_upper": ladder.upper - full + Z95 * stat["elbo_refit_full_se"],
        "gap_amortization": amortization,
        "gap_amortization_lower": amortization - paired,
        "gap_amortization_upper": amortization + paired + short,
    }


def _one_error(ladder: EvidenceTable) -> np.ndarray:
    """Return the error of log p(x) as one standard error; a numerical error counts as the end of a 95 % interval."""
    return np.where(ladder.is_exact, ladder.error / Z95, ladder.error)


def tabulate(
    guide: Posterior,
    references: Sequence[Posterior],
    comparisons: Sequence[Comparison],
    ladder: EvidenceTable,
    labels: np.ndarray,
    attrs: Mapping[str, str],
) -> xr.Dataset:
    """Build the table over obs_id and reference, with units and long names."""
    n = len(labels)
    elbo, elbo_se = guide.stats["elbo"].cpu().numpy(), guide.stats["elbo_se"].cpu().numpy()
    per_datum = {
        "elbo": elbo,
        "elbo_se": elbo_se,
        "log_evidence": ladder.value,
        "log_evidence_se": ladder.error,
        "log_evidence_lower": ladder.lower,
        "log_evidence_upper": ladder.upper,
        **_gaps(guide, ladder, elbo, elbo_se),
        "missed_mass": _first(references, "missed_mass", n),
        **{name: guide.stats[name].cpu().numpy() for name in ("pareto_k", "ess_fraction", "rate", "distortion")},
    }

    def pile(values: Sequence[torch.Tensor | None]) -> np.ndarray:
        columns = [np.full(n, np.nan) if v is None else v.cpu().numpy().astype(float) for v in values]
        return np.stack(columns, 1) if columns else np.empty((n, 0))

    per_reference = {
        **{
            name: pile([getattr(c, name) for c in comparisons])
            for name in ("mean_error", "sd_ratio", "sliced_wasserstein", "noise_floor", "total_variation")
        },
        "kl_forward": pile([c.cross for c in comparisons]) - ladder.value[:, None],
        "kl_forward_se": np.hypot(pile([c.cross_se for c in comparisons]), _one_error(ladder)[:, None]),
        **{name: pile([p.stats.get(name) for p in references]) for name in PER_REFERENCE},
        "bound_lower": pile([p.stats.get("bound_sure") for p in references]),
        "bound_upper": pile([p.evidence.upper if p.evidence else None for p in references]),
        "diverging_count": pile([p.stats.get("diverging_count", torch.zeros(n)) for p in references]),
    }

    def words(get: Callable[[Posterior], Sequence[str]]) -> np.ndarray:
        return np.array([get(p) for p in references], dtype=str).T.reshape(n, len(references))

    table = xr.Dataset(
        {
            **{name: ("obs_id", value) for name, value in per_datum.items()},
            "evidence_method": ("obs_id", ladder.method),
            "evidence_reason": ("obs_id", ladder.reason),
            **{name: (("obs_id", "reference"), value) for name, value in per_reference.items()},
            "status": (("obs_id", "reference"), words(lambda p: p.status)),
            "reason": (("obs_id", "reference"), words(lambda p: p.reason)),
        },
        coords={"obs_id": labels, "reference": np.array([p.method for p in references], dtype=str)},
        attrs=dict(attrs),
    )
    for name, (units, long_name) in VARIABLES.items():
        table[name].attrs = {"units": units, "long_name": long_name}
    if not math.isfinite(float(np.nanmax(np.abs(elbo)))):
        log.warning("the ELBO of some data is not finite")
    return table
