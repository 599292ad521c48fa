"""The best available posterior for each datum, used by `encode`, `score` and `impute`.

Per datum, the first that applies:

1. a reference that is exact or certified for it (closed form, enumeration, grid; importance sampling from q*; hmc, ...)
2. draws of the guide, resampled by their Pareto-smoothed importance weights, where k-hat is below min(0.7, 1 - 1/log10 S), S
   draws. They are `uncertified`,
   since regions without guide draws are not corrected
3. draws of the guide without correction: `amortized`

The default reference is the first applicable of closed form, enumeration, a grid for at most three latents, and importance
sampling: from the Laplace approximation, and from the refitted normal q* for the rows that this does not certify. Chains are
left to audits: they take ten times longer.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elbowroom.analysis.audit.plan import choose
from elbowroom.analysis.audit.requested import Methods, requested
from elbowroom.analysis.measures.evidence import EvidenceTable, evidence_of
from elbowroom.analysis.measures.missed_modes import missed_mass
from elbowroom.inference.mcmc.normals import moments
from elbowroom.inference.posterior import Posterior, Reference, completed, in_chains, resample, rows_of, spread
from elbowroom.inference.references.closed_form import ClosedForm
from elbowroom.inference.references.enumeration import Enumeration
from elbowroom.inference.references.grid.grid import MAX_DIM, Grid
from elbowroom.inference.references.importance.guide import amortized
from elbowroom.inference.references.importance.importance import ImportanceSampling
from elbowroom.inference.references.importance.psis import good_k, psis
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.stages import stage

RESAMPLED, GUIDE = "guide, importance-resampled", "guide"
QUICK, RUNS = 4_000, 32  # draws of the first importance sampling, and runs that look for modes
UNNEEDED, LATE = "not needed here: an earlier one is exact or certified", "the budget ended before a reference was run"
SEED_STEP, RESAMPLE_STEP, DISCRETE_STEP = 7_927, 32_452_867, 15_485_867  # between guide, references and resampling


@dataclass(frozen=True)
class Reading:
    """The guide and the best posterior of every datum.

    Attributes:
        guide: the amortized posterior, with its ELBO, k-hat and importance-sampling evidence.
        posterior: the best posterior per datum, with status and reason of its source.
        source: its method per datum: a reference's name, `guide, importance-resampled` or `guide`.
        evidence: log p(x): value, bounds, kind and reason, per datum.
        references: the reference posteriors that were computed, best first.
    """

    guide: Posterior
    posterior: Posterior
    source: list[str]
    evidence: EvidenceTable
    references: list[Posterior]


def methods_for(log_joint: LogJoint, references: Methods = "auto") -> list[Reference]:
    """Return the references to use, best first.

    Args:
        log_joint: the model and guide; a part of the data is enough.
        references: `auto` (see the module), or names and Reference objects; `none` for the guide alone (enumeration where all
            latents are discrete). See `requested`.

    Raises:
        UserError: for an unknown name, or a method that cannot be used for this model.
    """
    wanted = requested(references)
    if wanted != "auto" and (wanted or log_joint.dim):
        return choose(wanted, log_joint).references if wanted else []
    if log_joint.dim == 0:  # enumeration costs no more than draws of the guide
        found: list[Reference] = [Enumeration()]
    else:
        found = [ClosedForm(), *([Grid()] if log_joint.dim <= MAX_DIM else [])]
    found = [method for method in found if method.refusal(log_joint) is None][:1]
    return found or [ImportanceSampling(draws=QUICK, start="laplace", runs=RUNS), ImportanceSampling(runs=RUNS)]


def read(
    log_joint: LogJoint,
    methods: Sequence[Reference],
    *,
    draws: int = 1_000,
    keep: int = 400,
    seed: int = 0,
    until: float = math.inf,
) -> Reading:
    """Compute the best posterior of every datum.

    Args:
        log_joint: the model and guide.
        methods: references, best first; see `methods_for`.
        draws: draws per datum for the guide's estimates and importance weights.
        keep: draws per datum of the posterior; a multiple of 4.
        seed: random seed.
        until: value of `time.monotonic()` after which references stop; rows that they have not reached say so.
    """
    guide = amortized(log_joint, draws=draws, keep=draws, seed=seed)
    guide = completed(log_joint, guide, seed + DISCRETE_STEP, which="guide")
    references: list[Posterior] = []
    late = False
    for number, method in enumerate(methods, start=1):
        trusted = torch.stack([torch.zeros(log_joint.n_obs, dtype=torch.bool), *(p.trusted for p in references)]).any(0)
        rows = (~trusted).nonzero()[:, 0]
        late = bool(len(rows)) and time.monotonic() > until
        if late or not len(rows):
            break
        start, (part, used, at) = seed + SEED_STEP * number, log_joint.some(rows.to(log_joint.device))
        with stage(method.name):
            found = method(part, keep=keep, seed=start, until=until)
            found = completed(part, found, start + DISCRETE_STEP)
        if bool((found.trusted & ~found.settled).any()):  # else the guide's own estimate of log p(x) is not asked
            found.stats["missed_mass"] = missed_mass(part, guide if part is log_joint else rows_of(guide, used), found)
        whole = len(rows) == log_joint.n_obs
        references.append(found if whole else spread(rows_of(found, at), rows, log_joint.n_obs, UNNEEDED))
    posterior, source = _best(log_joint, guide, references, keep, seed + RESAMPLE_STEP, LATE if late else "")
    return Reading(guide, posterior, source, evidence_of(guide, references), references)


def _best(
    log_joint: LogJoint, guide: Posterior, references: Sequence[Posterior], keep: int, seed: int, note: str
) -> tuple[Posterior, list[str]]:
    """Combine, datum by datum, the first source that applies; `note` is said of the rows that no reference settles."""
    n = log_joint.n_obs
    place = np.full(n, -1)
    for k, reference in enumerate(references):
        place[(place < 0) & reference.trusted.numpy()] = k
    sources, rest = list(references), place < 0
    if rest.any():
        corrected = _resampled(log_joint, guide, keep, seed)
        good = np.array([source == "uncertified" for source in corrected.status])
        place[rest & good], place[rest & ~good] = len(sources), len(sources) + 1
        reason = [f"{why}; {note}" if note else why for why in _with_doubts(corrected.reason, references)]
        sources += [dataclasses.replace(corrected, reason=reason), dataclasses.replace(guide, reason=reason)]
    names = [*(p.method for p in references), RESAMPLED, GUIDE]
    return _chosen(sources, torch.as_tensor(place), keep), [names[k] for k in place]


def _with_doubts(reason: Sequence[str], references: Sequence[Posterior]) -> list[str]:
    """Add to each reason why no reference applies: a reference may have found what the guide's draws miss."""
    return ["; ".join([own, *(p.reason[i] for p in references)]) for i, own in enumerate(reason)]


def _resampled(log_joint: LogJoint, guide: Posterior, keep: int, seed: int) -> Posterior:
    """Resample guide draws by their importance weights: `uncertified` where k-hat is small enough, else `amortized`."""
    if log_joint.dim == 0:
        return guide
    z, log_p, log_q = (t.flatten(0, 1) for t in (guide.draws, guide.sample_stats["lp"], guide.sample_stats["log_q"]))
    smoothed = psis((log_p.double() - log_q.double()).nan_to_num(nan=-torch.inf, posinf=-torch.inf))
    weights = smoothed.log_weights.exp().nan_to_num(0.0)
    generator = torch.Generator(device=z.device).manual_seed(seed + 1)
    kept = in_chains(resample(z, weights.to(z.dtype), keep, generator))
    flat = kept.flatten(0, 1)
    sites = {name: value.unflatten(0, kept.shape[:2]) for name, value in log_joint.constrain(flat).items()}
    mean, covariance = moments(z.double(), weights)
    k, limit = smoothed.pareto_k.cpu(), good_k(len(z))
    good = (k < limit).tolist()
    reason = [
        f"draws of the guide, resampled by their importance weights: k-hat {float(value):.2f}, which is below {limit:.2f}"
        if ok
        else f"draws of the guide as they are: k-hat {float(value):.2f} of their importance weights is not below {limit:.2f}"
        for value, ok in zip(k, good, strict=True)
    ]
    found = Posterior(
        method=RESAMPLED,
        draws=kept,
        sites=sites,
        mean=mean,
        covariance=covariance,
        status=["uncertified" if ok else "amortized" for ok in good],
        reason=reason,
    )
    return completed(log_joint, found, seed + DISCRETE_STEP)


def _chosen(sources: Sequence[Posterior], place: Tensor, keep: int) -> Posterior:
    rows = torch.arange(len(place))
    first = sources[0]
    shape = (first.draws.shape[0], min(keep // first.draws.shape[0], *(p.draws.shape[1] for p in sources)))

    def pick(parts: Sequence[Tensor]) -> Tensor:
        """Return draws (chain, draw, N, ...), each datum's own."""
        stacked = torch.stack([part[: shape[0], : shape[1]] for part in parts])
        return stacked[place.to(stacked.device), :, :, rows.to(stacked.device)].movedim(0, 2)

    means, covariances = zip(*(_moments(p) for p in sources), strict=True)
    take = lambda parts: torch.stack([part.double() for part in parts])[place.to(parts[0].device), rows.to(parts[0].device)]
    return dataclasses.replace(
        first,
        method="best",
        draws=pick([p.draws for p in sources]),
        sites={name: pick([p.sites[name] for p in sources]) for name in first.sites},
        mean=take(means),
        covariance=take(covariances),
        status=[sources[k].status[i] for i, k in enumerate(place.tolist())],
        reason=[sources[k].reason[i] for i, k in enumerate(place.tolist())],
        evidence=None,
        stats={},
        sample_stats={},
    )


def _moments(posterior: Posterior) -> tuple[Tensor, Tensor]:
    """Return mean (N, d) and covariance (N, d, d) in unconstrained coordinates: those stored, else of the draws."""
    if posterior.mean is not None and posterior.covariance is not None:
        return posterior.mean, posterior.covariance
    return moments(posterior.draws.flatten(0, 1).double())
