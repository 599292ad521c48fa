"""The exact posterior of models with only discrete latents, by enumeration of their joint values.

    log p(x_n) = log sum_c p(x_n, c),   p(c | x_n) = p(x_n, c) / p(x_n),   c = 1 .. A

In models that also have continuous latents, the log joint sums out the discrete ones, so that a grid integrates only over the
continuous ones; `discrete_draws` of `elbowroom.inference.target.discrete` then draws the discrete ones given each draw.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from elbowroom.inference.posterior import Evidence, Posterior, Reference, in_chains
from elbowroom.inference.target import discrete
from elbowroom.inference.target.log_joint import LogJoint


class Enumeration(Reference):
    """The exact posterior and evidence of a model with only discrete latents, by summing over their joint values."""

    name: ClassVar[str] = "enumeration"

    def refusal(self, log_joint: LogJoint) -> str | None:
        """Refuse a model with continuous latents."""
        if log_joint.dim == 0:
            return None
        return f"enumeration needs a model whose latents are all discrete, this one has {log_joint.dim} continuous dimensions"

    def __call__(self, log_joint: LogJoint, *, keep: int, seed: int, until: float = math.inf) -> Posterior:
        """Return p(c | x_n) of every joint value, (N, A), as `probabilities`, the evidence, and independent draws.

        `until` does not interrupt the single pass over the joint values.

        Raises:
            UnsupportedProgram: see `discrete.table`.
        """
        found = discrete.table(log_joint)
        index = discrete.draw(found.log_posterior, keep, seed)
        value = found.log_evidence
        # rounding errors of each term, relative to its size, and of the sum of A terms
        size = torch.where(found.log_joint.isfinite(), found.log_joint.abs(), 0).amax(0)
        error = torch.finfo(value.dtype).eps * (4 * size + math.log2(len(found.log_joint)) + 1)
        n = log_joint.n_obs
        return Posterior(
            method=self.name,
            draws=index.new_zeros(*in_chains(index).shape, 0, dtype=value.dtype),
            sites={name: in_chains(draws) for name, draws in discrete.at(log_joint, index).items()},
            status=["exact"] * n,
            reason=[f"enumeration of all {len(found.log_joint)} joint values of the discrete sites"] * n,
            evidence=Evidence("exact", "enumeration", value, error),
            stats={"probabilities": found.log_posterior.exp().T},
            sample_stats={"lp": in_chains(found.log_joint.gather(0, index))},
        )
