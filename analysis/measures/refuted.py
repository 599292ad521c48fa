"""Exact values that something else in the audit refutes: nothing may stand as exact against what was seen.

A value of log p(x) is refuted by an importance-sampling estimate above it by more than both errors: a sum over positive weights
cannot find mass that is not there, whereas a lattice can overlook it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from elbowroom.analysis.measures.evidence_kinds import ERRORS
from elbowroom.inference.posterior import Posterior

LEAST = 1e-3  # nats by which an estimate must exceed the value as well
MANY = 3.0  # stated errors of the exact value


def refute(posterior: Posterior, others: Sequence[Posterior]) -> Posterior:
    """Return an exact posterior with the data marked `uncertified` whose log p(x) lies below trusted estimates of others."""
    evidence = posterior.evidence
    if evidence is None or evidence.kind != "exact" or not bool(posterior.trusted.any()):
        return posterior
    status, reason = list(posterior.status), list(posterior.reason)
    for other in others:
        theirs = other.evidence
        if theirs is None or theirs.kind != "estimate":
            continue
        ahead = theirs.value.cpu() - evidence.value.cpu()
        allowed = ERRORS * theirs.error.cpu() + MANY * evidence.error.cpu() + LEAST
        against = (ahead > allowed) & _sure(other) & posterior.trusted
        for i in against.nonzero()[:, 0].tolist():
            status[i] = "uncertified"
            reason[i] = (
                f"{posterior.method}: contradicted: {theirs.method} by {other.method} puts log p(x) {float(ahead[i]):.2g} nats "
                "higher, by more than both errors; a part of the mass was missed"
            )
    return posterior if status == list(posterior.status) else dataclasses.replace(posterior, status=status, reason=reason)


def overlooked(posterior: Posterior, exact: Posterior) -> Posterior:
    """Return a certified posterior with the data marked `uncertified` whose draws miss a peak that an exact method has seen.

    `exact` states in `stats["unseen"]` that it could not resolve a peak, and in `stats["highest"]` how high log p(x, z) rises.
    The best of many draws from a posterior of d dimensions lies within about one nat per dimension of its peak.
    """
    if "unseen" not in exact.stats or "lp" not in posterior.sample_stats:
        return posterior
    best = posterior.sample_stats["lp"].flatten(0, 1).amax(0).cpu()
    rises = exact.stats["highest"].cpu() - best
    against = (exact.stats["unseen"].cpu() > 0) & (rises > 1.0 + posterior.draws.shape[-1]) & posterior.trusted
    if not bool(against.any()):
        return posterior
    status, reason = list(posterior.status), list(posterior.reason)
    for i in against.nonzero()[:, 0].tolist():
        status[i] = "uncertified"
        reason[i] = (
            f"{posterior.method}: a point that the {exact.method} knows lies {float(rises[i]):.2g} nats above every draw"
        )
    return dataclasses.replace(posterior, status=status, reason=reason)


def _sure(other: Posterior) -> Tensor:
    """Return where an estimate can be trusted, (N,)."""
    if "importance_trusted" in other.stats:
        return other.stats["importance_trusted"].cpu() > 0
    return other.trusted
