"""The evidence log p(x_n) of each datum: the value or bounds, the method, and the reason for the choice.

Per datum, the first that applies:

1. exact      closed form, enumeration, grid
2. estimate   importance sampling from q*, else from the guide, with its standard error. Conditions: k-hat is below 1/2, the
   effective number of draws is large enough, and nothing contradicts it: no uncertified exact reference, no mode that the draws
   or the guide miss, no annealed bound above it
3. bounds     lower: by the guide's weights, by q*'s or by annealing, whichever is largest on draws other than those that give
   the bound; upper: reverse annealing from certified draws of the posterior, conditional on these

A bound is never a value of log p(x): `value` is then NaN. Each bound holds with a probability of at least 97.5 %, for any
distribution of the weights (see `inference.posterior.sure_bound`); log mean w itself would exceed log p(x) about half the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from elbowroom.analysis.measures.evidence_kinds import ENDING, OF_EXACT, OF_GUIDE, OF_REFIT, REFIT, WEIGHTS
from elbowroom.analysis.measures.table import MISSED, Z95
from elbowroom.inference.posterior import RISK, ROUNDED, Posterior, Reference, sure_bound
from elbowroom.inference.references.ais.ais import Annealed
from elbowroom.inference.references.ais.annealing import tune, upper
from elbowroom.inference.references.ais.paths import PriorPath, RefitPath
from elbowroom.inference.search.scout import scout
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.stages import stage

MOST = 0.25  # nats: an uncertified reference farther off contradicts, whatever its error
APART = 3.0  # standard errors by which an annealed bound must exceed an estimate to contradict it
MATTERS = 0.1  # nats by which it must also exceed the estimate
LOWER_BOUND = "importance-weighted lower bound"
REFIT_BOUND = "importance-weighted lower bound from q*"
AIS_BOUND = "annealed lower bound"
TWO_SIDED = ", conditional upper bound"
CONDITIONAL = "; the upper bound, by {}, is conditional on the certified draws that it starts from being good ones"


@dataclass(frozen=True)
class EvidenceTable:
    """The evidence per datum, (N,) each, in nats.

    Attributes:
        value: log p(x_n), NaN where there is no exact value or estimate.
        error: its numerical or standard error, NaN likewise.
        lower: value - error (exact), value - 1.96 error (estimate), or the probabilistic lower bound.
        upper: likewise above; else the conditional upper bound, NaN where there is none. Bounds hold with a probability of at
            least 97.5 %.
        method: in words.
        reason: for the choice of the method, in words.
    """

    value: np.ndarray
    error: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    method: np.ndarray
    reason: np.ndarray

    @property
    def is_exact(self) -> np.ndarray:
        """(N,) True where the value is exact up to its numerical error."""
        return np.asarray(self.reason == OF_EXACT)


def evidence_of(guide: Posterior, references: Sequence[Posterior]) -> EvidenceTable:
    """Return for each datum the first kind of evidence that applies, in the order of the module.

    Args:
        guide: the amortized posterior, with its importance-sampling evidence.
        references: posteriors, best first; `stats["missed_mass"]` is the mass in modes that the guide misses (see
            `missed_modes`).
    """
    n = guide.draws.shape[2]
    value, error, lower, upper_ = (np.full(n, np.nan) for _ in range(4))
    method, reason = np.full(n, LOWER_BOUND, dtype=object), np.full(n, "", dtype=object)
    open_ = np.ones(n, dtype=bool)
    for posterior in references:
        if posterior.evidence is None or posterior.evidence.kind != "exact":
            continue
        v, e = _numpy(posterior.evidence.value), _numpy(posterior.evidence.error)
        take = open_ & posterior.trusted.cpu().numpy() & np.isfinite(v)
        value[take], error[take], lower[take], upper_[take] = v[take], e[take], (v - e)[take], (v + e)[take]
        method[take], reason[take] = posterior.evidence.method, OF_EXACT
        open_ &= ~take
    why_not = np.full(n, "", dtype=object)
    for posterior in [*(p for p in references if p.evidence and p.evidence.kind == "estimate"), guide]:
        if posterior.evidence is None:
            continue
        v, e, by = _numpy(posterior.evidence.value), _numpy(posterior.evidence.error), posterior.evidence.method
        doubt = _doubt(posterior, guide, references)
        why_not = np.where(open_ & (why_not == ""), doubt, why_not)
        take = open_ & (doubt == "") & np.isfinite(v)
        value[take], error[take] = v[take], e[take]
        lower[take], upper_[take] = (v - Z95 * e)[take], (v + Z95 * e)[take]
        method[take] = by + ENDING
        reason[take] = OF_GUIDE if posterior is guide else OF_REFIT if by == REFIT else f"{posterior.method} certifies it"
        open_ &= ~take
    if open_.any():
        best, bound = _lower(guide, references)
        above, names = _upper(references, n)
        lower[open_], upper_[open_] = bound[open_], above[open_]
        two_sided = np.isfinite(above)
        method[open_] = np.where(two_sided, best + TWO_SIDED, best)[open_]
        text = np.array([f"no value: {w}" if w else "no value" for w in why_not], dtype=object)
        reason[open_] = np.where(two_sided, text + [CONDITIONAL.format(name) for name in names], text)[open_]
    return EvidenceTable(value, error, lower, upper_, method.astype(str), reason.astype(str))


def _numpy(t: Tensor) -> np.ndarray:
    out: np.ndarray = t.detach().cpu().double().numpy()
    return out


def _doubt(estimate: Posterior, guide: Posterior, references: Sequence[Posterior]) -> np.ndarray:
    """Return why an estimate cannot be used as log p(x), per datum; empty where it can."""
    assert estimate.evidence is not None
    value, error = _numpy(estimate.evidence.value), _numpy(estimate.evidence.error)
    doubt = np.full(len(value), "", dtype=object)

    def add(where: np.ndarray, words: str) -> None:
        doubt[where & (doubt == "")] = words

    if estimate is guide:
        if "rounded_share" in guide.stats:
            for i in np.flatnonzero(~(_numpy(guide.stats["rounded_share"]) <= ROUNDED)):
                doubt[i] = guide.reason[int(i)].removeprefix("draws of q(z|x); ")
        add(~(_numpy(guide.stats["importance_trusted"]) > 0), "the guide's importance weights cannot be trusted")
        for other in references:
            if "missed_mass" in other.stats:
                add(_numpy(other.stats["missed_mass"]) > MISSED, "the guide misses a mode")
            if "mode_unseen" in other.stats:
                add(_numpy(other.stats["mode_unseen"]) > 0, "annealed runs from the prior found a mode that q* does not reach")
    else:
        trusted = estimate.trusted.cpu().numpy()
        for i in np.flatnonzero(~trusted):
            doubt[i] = estimate.reason[int(i)]
    for other in references:
        if "unseen" in other.stats:
            add(_numpy(other.stats["unseen"]) > 0, f"the {other.method} knows of a peak that it could not resolve")
    add(_contradicted(value, error, references), "an uncertified exact reference contradicts the estimate")
    for other in references:
        if other.evidence is None or other.evidence.kind != "bound":
            continue
        ahead = _numpy(other.evidence.value) - value
        spread = np.hypot(error, _numpy(other.evidence.error))
        above = (ahead > APART * spread) & (ahead > MATTERS)
        add(above, f"the {_name_of_bound(other)} lies above the estimate: it missed a mode")
    return doubt


def _contradicted(value: np.ndarray, error: np.ndarray, references: Sequence[Posterior]) -> np.ndarray:
    """Return where an uncertified exact reference differs from importance sampling by more than both errors."""
    against = np.zeros(len(value), dtype=bool)
    for posterior in references:
        if posterior.evidence is None or posterior.evidence.kind != "exact":
            continue
        theirs, spread = _numpy(posterior.evidence.value), _numpy(posterior.evidence.error)
        allowed = 4.5 * error + np.nan_to_num(spread, nan=np.inf, posinf=np.inf)
        agrees = (np.abs(theirs - value) <= np.minimum(allowed, MOST)) | np.isnan(theirs)
        against |= ~agrees & ~posterior.trusted.cpu().numpy()
    return against


def _lower(guide: Posterior, references: Sequence[Posterior]) -> tuple[np.ndarray, np.ndarray]:
    """Return the label and value of the best lower bound per datum, chosen by draws that it is not computed from.

    A bound without `bound_first` and `bound_sure` in the stats is lowered by log 40: it then exceeds log p(x) with probability
    1/40 at most. It is chosen by its own value, so that the failure probabilities of several such bounds add up.
    """
    n, found = guide.draws.shape[2], []
    for posterior in (*references, guide):
        stats, evidence = posterior.stats, posterior.evidence
        if evidence is None or evidence.kind == "exact" or (evidence.kind == "estimate" and "bound_sure" not in stats):
            continue
        fresh = _numpy(stats["bound_sure"]) if "bound_sure" in stats else _numpy(evidence.value) + math.log(RISK)
        if _is_ais(posterior):
            first = np.fmax(_numpy(stats["ais_lower_prior"]), _numpy(stats["ais_lower_refit"]))
        else:
            first = _numpy(stats["bound_first"]) if "bound_first" in stats else fresh
        found.append((_name_of_bound(posterior), np.where(np.isnan(first) | np.isnan(fresh), -np.inf, first), fresh))
    if len(found) == 1 and "bound_all" in guide.stats:  # a single bound needs no choice: use all draws
        return np.full(n, LOWER_BOUND, dtype=object), _numpy(guide.stats["bound_all"])
    if not found:
        return np.full(n, LOWER_BOUND, dtype=object), np.full(n, np.nan)
    names, first, fresh = (np.stack(part) for part in zip(*found, strict=True))
    best = first.argmax(0)
    return names.astype(object)[best], np.take_along_axis(fresh, best[None], 0)[0]


def _is_ais(posterior: Posterior) -> bool:
    return "ais_lower_prior" in posterior.stats


def _name_of_bound(posterior: Posterior) -> str:
    by = posterior.evidence.method if posterior.evidence is not None else ""
    return AIS_BOUND if _is_ais(posterior) else {WEIGHTS: LOWER_BOUND, REFIT: REFIT_BOUND}.get(by, f"lower bound by {by}")


def _upper(references: Sequence[Posterior], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first upper bound among the references, per datum (NaN without any), and its method."""
    above, by = np.full(n, np.nan), np.full(n, "", dtype=object)
    for posterior in references:
        if posterior.evidence is not None and posterior.evidence.upper is not None:
            by[np.isnan(above)] = "reverse annealing" if _is_ais(posterior) else posterior.evidence.method
            above = np.where(np.isnan(above), _numpy(posterior.evidence.upper), above)
    return above, by


@stage("upper bounds")
def sandwich(
    log_joint: LogJoint, methods: Sequence[Reference], found: Sequence[Posterior], *, seed: int, until: float = math.inf
) -> list[Posterior]:
    """Add upper bounds to the `ais` reference: reverse annealing from certified draws of another reference.

    One draw per chain, from the first reference that is exact or certified for the datum; data with exact evidence need no
    bound. The path is the one whose forward bound was larger, with step sizes tuned anew: neither depends on the reverse run.

    Args:
        log_joint: the same data.
        methods: the references.
        found: the posterior of each.
        seed: random seed, used for nothing else.
        until: value of `time.monotonic()` after which no further block of data is started.

    Returns:
        `found`, with `evidence.upper` of `ais` filled, NaN without a certified draw or with exact evidence. An existing bound
        stays.
    """
    out = list(found)
    for k, method in enumerate(methods):
        evidence = found[k].evidence
        if not isinstance(method, Annealed) or evidence is None or evidence.upper is not None:
            continue
        bound = torch.full_like(evidence.value, torch.nan)
        exact = torch.zeros_like(bound, dtype=torch.bool)
        draws = bound.new_full((method.chains, *found[k].draws.shape[2:]), torch.nan)
        for posterior in found:
            trusted = posterior.trusted.to(bound.device)
            exact |= trusted & (posterior.evidence is not None and posterior.evidence.kind == "exact")
            flat = posterior.draws.flatten(0, 1).to(draws)
            if not len(flat):
                continue
            some = flat[torch.linspace(0, len(flat) - 1, method.chains, device=flat.device).round().long()]
            take = trusted & draws.isnan().flatten(2).any(-1).any(0) & ~some.isnan().any(-1).any(0)
            draws[:, take] = some[:, take]
        wanted = ~exact & ~draws.isnan().any(-1).any(0)
        prior, refit = found[k].stats["ais_lower_prior"], found[k].stats["ais_lower_refit"]
        from_prior = refit.isnan() | (prior > refit)
        seeds = torch.randint(2**62, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
        for path_is_prior, own in ((True, seeds[:2]), (False, seeds[2:4])):
            rows = (wanted & (from_prior == path_is_prior)).nonzero()[:, 0]
            if len(rows):
                bound[rows] = _reverse(log_joint, method, rows, draws, path_is_prior, own, seeds[4], until)
        out[k] = replace(found[k], evidence=replace(evidence, upper=bound))
    return out


def _reverse(
    log_joint: LogJoint, method: Annealed, rows: Tensor, draws: Tensor, prior: bool, seeds: list[int], scale: int, until: float
) -> Tensor:
    """Return upper bounds for some of the data, (len(rows),)."""
    home, rows, draws = draws.device, rows.to(log_joint.device), draws.to(log_joint.device)
    part, used, at = log_joint.some(rows)
    q_star = scout(log_joint).refit.q.rows(used)
    path = PriorPath(part, q_star, seed=scale) if prior else RefitPath(part, q_star, inflation=method.inflation)
    start = draws[:, used].nan_to_num()
    with torch.no_grad():
        plan = tune(path, temperatures=method.temperatures, leapfrogs=method.leapfrogs, seed=seeds[0], until=until)
        value = -sure_bound(upper(path, plan, start, seed=seeds[1], until=until).log_weights)
    return value[at].to(home)
