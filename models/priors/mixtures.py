"""Priors that are mixtures with learned components: of normals, or of the guide's own posteriors (VampPrior)."""

from __future__ import annotations

import math
from typing import Annotated, Any

import pyro.distributions as dist
import torch
from annotated_types import Ge
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from elbowroom.models.priors.base import Located, Prior

SCALE_FLOOR = 1e-5
_UNIT = math.log(math.expm1(1.0))  # softplus(_UNIT) = 1


class GaussianMixture(Located):
    """A mixture of diagonal normals with learned weights, locations and scales.

    p(z) = sum_k w_k N(z; m_k, diag(s_k^2)); given covariates every component is moved by A c. The locations start as draws
    from N(0, I), the scales at 1, the weights equal.

    Args:
        latent_dim: width d of z (a fact).
        covariate_dim: number of covariates (a fact).
        components: number K of normals.
        covariates: condition on the covariates of the data: location from c by a linear map.
    """

    def __init__(
        self, latent_dim: int, covariate_dim: int = 0, *, components: Annotated[int, Ge(1)] = 10, covariates: bool = False
    ) -> None:
        super().__init__(latent_dim, covariate_dim, covariates=covariates)
        self.logits = nn.Parameter(torch.zeros(components))
        self.locs = nn.Parameter(torch.randn(components, latent_dim))
        self.scales = nn.Parameter(torch.zeros(components, latent_dim))

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return the mixture; with c (N, C) its batch shape is (N,)."""
        loc = self.locs + self.location(covariates)[..., None, :]
        scale = softplus(self.scales + _UNIT) + SCALE_FLOOR
        return _mixture(self.logits, dist.Normal(loc, scale.expand_as(loc)).to_event(1))


class Vamp(Prior):
    """The variational mixture of posteriors: p(z) = 1/K sum_k q(z | u_k), with learned pseudo-inputs u_k.

    q is the guide of the model, so that the prior trains the encoder too. The pseudo-inputs live in the space of the encoder's
    view of a datum; they start as rows of the training data, with missing entries at their column's mean. If the encoder also
    reads covariates, each pseudo-input has its own learned ones: p(z) itself does not depend on c.
    Tomczak and Welling 2018, https://arxiv.org/abs/1705.07120.

    Args:
        latent_dim: width d of z (a fact).
        covariate_dim: number of covariates (a fact).
        feature_shape: shape of what the encoder sees of one datum (a fact).
        guide: the amortized guide (a fact); it is used and not owned, its weights are not in this module's state.
        components: number K of pseudo-inputs.

    Raises:
        ValueError: the guide's family has no density on R^d.
    """

    guide: Any

    def __init__(
        self,
        latent_dim: int,
        covariate_dim: int,
        feature_shape: tuple[int, ...],
        guide: Any,
        *,
        components: Annotated[int, Ge(1)] = 50,
    ) -> None:
        super().__init__()
        if guide.family.space != "real" or guide.family.sites != self.sites:
            raise ValueError(
                "vamp: it mixes densities q(z|u) on R^d, which this guide family does not have; use diagonal_normal, "
                "or another prior"
            )
        self.latent_dim = latent_dim
        object.__setattr__(self, "guide", guide)  # not a submodule, because the VAE owns and saves it
        beside = _beside(guide, feature_shape, covariate_dim)
        # in units of the encoder's input, so that one learning rate suits data of any scale
        self.inputs = nn.Parameter(torch.randn(components, *feature_shape))
        self.beside = nn.Parameter(torch.zeros(components, beside)) if beside else None
        self.adapted: Tensor
        self.register_buffer("adapted", torch.tensor(False))

    @property
    def pseudo_inputs(self) -> Tensor:
        """The pseudo-inputs u_k in units of the features, (K, *feature)."""
        return self.guide.loc + self.guide.scale * self.inputs

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return 1/K sum_k q(z | u_k)."""
        q = self.guide.family(self.guide.params(self.pseudo_inputs, self.beside))
        return _mixture(self.inputs.new_zeros(len(self.inputs)), q)

    def adapt(self, features: Tensor) -> None:
        """Initialise the pseudo-inputs with rows of the training data, (N, *feature), once; trained ones stay unchanged.

        A flag in the state records this, so that a loaded model keeps its pseudo-inputs.
        """
        if bool(self.adapted) or len(features) == 0:
            return
        k, n = len(self.inputs), len(features)
        rows = torch.linspace(0, n - 1, k).round().long().to(features.device) if k <= n else torch.arange(k) % n
        standard = ((features[rows] - self.guide.loc) / self.guide.scale).nan_to_num(nan=0.0)
        if k > n:  # equal pseudo-inputs would stay equal
            noise = torch.randn(standard.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            standard = standard + 0.1 * noise.to(standard)
        with torch.no_grad():
            self.inputs.copy_(standard)
            self.adapted.fill_(True)


def _mixture(logits: Tensor, components: TorchDistribution) -> TorchDistribution:
    """Return the mixture over the last batch dimension of `components`, with weights softmax(logits) (K,)."""
    weights = dist.Categorical(logits=logits.expand(components.batch_shape), validate_args=False)
    # a mixture validates by branching on values, which vmap cannot do
    return dist.MixtureSameFamily(weights, components, validate_args=False)


def _beside(guide: Any, feature_shape: tuple[int, ...], covariate_dim: int) -> int:
    """Return how many numbers the encoder reads besides features and marks: covariates, and perhaps a log exposure."""
    shape = tuple(guide.encoder.in_shape)
    for count in (covariate_dim, covariate_dim + 1):
        if tuple(guide.encoder.joined_shape(feature_shape, marks=guide.marks, covariates=count)) == shape:
            return count
    raise ValueError(f"vamp: the encoder reads {shape}, which does not fit features of shape {tuple(feature_shape)}")
