"""The exact posterior of a linear-Gaussian VAE in closed form, p(z|x) = N(m, M^-1); see `elbowroom.models.linear_gaussian`."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from elbowroom.inference.posterior import Evidence, Posterior, Reference, in_chains
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.linear_gaussian import LinearGaussian
from elbowroom.models.vae import VAE


class ClosedForm(Reference):
    """The exact posterior and evidence of a linear-Gaussian VAE, for any number of latents, in float64."""

    name: ClassVar[str] = "closed_form"

    def refusal(self, log_joint: LogJoint) -> str | None:
        """Refuse all but a VAE with normal prior, linear decoder and gaussian likelihood of constant scale."""
        if self._oracle(log_joint) is None:
            return (
                "closed_form needs a VAE with normal prior, linear decoder and gaussian likelihood whose scale is not `decoder`"
            )
        return None

    @staticmethod
    def _oracle(log_joint: LogJoint) -> LinearGaussian | None:
        owner = getattr(log_joint.model, "__self__", None)
        return owner.linear_gaussian() if isinstance(owner, VAE) else None

    def __call__(self, log_joint: LogJoint, *, keep: int, seed: int, until: float = math.inf) -> Posterior:
        """Return exact moments, evidence and independent draws."""
        oracle = self._oracle(log_joint)
        if oracle is None:
            raise ValueError(self.refusal(log_joint))
        x = log_joint.data().double().flatten(1)
        mean, covariance = oracle.posterior(x)
        generator = torch.Generator(device=mean.device).manual_seed(seed)
        noise = torch.randn(keep, *mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        root = torch.linalg.cholesky(covariance)
        draws = mean + (noise @ root.T if root.dim() == 2 else torch.einsum("nij,snj->sni", root, noise))
        n = log_joint.n_obs
        return Posterior(
            method=self.name,
            draws=in_chains(draws),
            sites={name: in_chains(value) for name, value in log_joint.constrain(draws).items()},
            status=["exact"] * n,
            reason=["closed form of the linear-Gaussian model"] * n,
            mean=mean,
            covariance=covariance.expand(n, -1, -1),
            evidence=Evidence("exact", "closed form", oracle.log_evidence(x), torch.zeros_like(mean[:, 0])),
            sample_stats={"lp": in_chains(log_joint(draws))},
        )
