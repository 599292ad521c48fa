"""Searches of every posterior before a reference runs: q*, the best normal, and the modes.

Both are computed once per `LogJoint` and shared by all methods. They are preconditioners, starting points and alarms: no
reference's answer depends on their correctness.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from elbowroom.inference.mcmc.normals import Normals, Refit
from elbowroom.inference.search.best_normal import refit
from elbowroom.inference.search.modes import RUNS, Modes, search
from elbowroom.inference.search.single_precision import in_precision
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.stages import stage

SEED = 1_000_003  # independent of the methods' seeds

_known: weakref.WeakKeyDictionary[LogJoint, Scout] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Scout:
    """The searches' results for every posterior.

    Attributes:
        refit: q*, the best normal with full covariance.
        modes: short annealed runs from the prior.
    """

    refit: Refit
    modes: Modes


def scout(log_joint: LogJoint, runs: int = RUNS) -> Scout:
    """Return the searches' results for a `LogJoint`, by at least so many runs; they are computed at the first call."""
    found = _known.get(log_joint)
    if found is None:
        with log_joint.frozen_weights(), stage("refit"):
            best = refit(log_joint, family="full", seed=SEED)
    else:
        best = found.refit
    if found is None or len(found.modes.end) < runs:
        found = Scout(best, looked(log_joint, best.q, runs))
        _known[log_joint] = found
    return found


def looked(log_joint: LogJoint, q: Normals, runs: int) -> Modes:
    """Search for modes by so many runs, in single precision where that suffices; the normals q give the metric."""
    generator = torch.Generator(device=log_joint.device).manual_seed(SEED + 1)
    return search(in_precision(log_joint, q, "auto", generator), q, runs=runs, seed=SEED + 10)
