"""`er.adapt.pythae`: VAEs of pythae with a normal guide.

    z ~ N(0, I_d); with VAMP: z ~ 1/C sum_c q(z|u_c), at the trained pseudo-inputs u_c
    x_j ~ N(decoder(z)_j, 1) for reconstruction_loss "mse", whose loss is 0.5 (x_j - decoder(z)_j)^2;  Bernoulli for "bce"
    q(z|x) = N(mu(x), exp(log_covariance(x)))

-ELBO is the model's loss, at KL weight 1; for "mse" plus D/2 log 2 pi, D entries per datum, which pythae leaves out of the loss
and puts into `get_nll`. `get_nll` draws `batch_size` samples whatever a smaller `n_samples` says.

Chadebec, Vincent, Allassonniere (2022), https://arxiv.org/abs/2206.08309; Burda, Grosse, Salakhutdinov (2016),
https://arxiv.org/abs/1509.00519; Tomczak, Welling (2018), https://arxiv.org/abs/1705.07120; read at pythae 0.1.2 (2026-12).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from elbowroom.adapt.pair import Pair, Programs, at_many, in_shape, rows_of
from elbowroom.adapt.peers.kinds import of_library
from elbowroom.errors import UserError

WHERE = "adapt.pythae"
WEIGHTED = ("BetaVAE", "DisentangledBetaVAE", "BetaTCVAE", "FactorVAE", "INFOVAE_MMD")
IMPORTANCE = ("IWAE", "CIWAE", "MIWAE", "PIWAE")
SUPPORTED = ("VAE", *IMPORTANCE, "VAMP", *WEIGHTED)
OTHER_WEIGHT = "it was trained by another objective than the ELBO; the pair's ELBO has KL weight 1 and no further terms"
OTHER_BOUND = "it was trained by an importance-weighted bound; the pair's ELBO is that of a single draw, which is lower"


def pythae(model: Any, *, validate_args: bool | None = None) -> Pair:
    """Make a Pyro pair of a model of pythae: VAE, IWAE, CIWAE, MIWAE, PIWAE, VAMP, and those with other weights of KL.

    Sites: `z` (d) and `x`, as the data are shaped.

    Args:
        model: a model of `pythae.models`, of one of these classes itself.
        validate_args: False takes grey pixels under "bce", as pythae does: that density is no probability, and the audit says
            so.

    Returns:
        The pair: `er.audit(*pair, x)`, for x (N, *input_dim).

    Raises:
        UserError: another class (flows in the guide, other geometries, adversarial losses), or a reconstruction loss that is no
            likelihood.
    """
    kind = type(model).__name__
    if not of_library(model, "pythae", SUPPORTED):
        raise UserError(f"{WHERE}: {kind} is not supported; supported are pythae's own {', '.join(SUPPORTED)}")
    loss = model.model_config.reconstruction_loss
    if loss not in ("mse", "bce"):
        raise UserError(f"{WHERE}: reconstruction_loss {loss!r} is no likelihood that is known; supported: mse, bce")
    parts = _Parts(model, loss, validate_args)
    programs = Programs(parts.p_z, parts.q_z, parts.p_x, rows_of)
    notes = [OTHER_WEIGHT] if kind in WEIGHTED else [OTHER_BOUND] if kind in IMPORTANCE else []
    return Pair(programs.model, programs.guide, notes)


class _Parts:
    """Prior, guide and likelihood by the model's networks."""

    def __init__(self, model: Any, loss: str, validate_args: bool | None) -> None:
        self.vae, self.loss, self.checked = model, loss, validate_args
        self.vamp = type(model).__name__ == "VAMP"

    def q_z(self, x: Tensor) -> dict[str, Any]:
        """q(z|x)."""
        found = self.vae.encoder(x)
        return {"z": dist.Normal(found["embedding"], (0.5 * found["log_covariance"]).exp()).to_event(1)}

    def p_z(self, x: Tensor) -> dict[str, Any]:
        """p(z): standard normal, or the mixture of the guide at the pseudo-inputs."""
        if not self.vamp:
            zero = x.new_zeros(self.vae.latent_dim)
            return {"z": dist.Normal(zero, torch.ones_like(zero)).to_event(1)}
        inputs = self.vae.pseudo_inputs(self.vae.idle_input.to(x.device))
        parts = self.q_z(inputs.reshape(-1, *self.vae.model_config.input_dim))["z"]
        weights = dist.Categorical(logits=x.new_zeros(len(inputs)))
        return {"z": dist.MixtureSameFamily(weights, parts)}

    def p_x(self, z: Mapping[str, Tensor], x: Tensor) -> tuple[Any, Tensor]:
        """p(x|z), and x in its shape."""
        made = at_many(lambda z: self.vae.decoder(z)["reconstruction"], z["z"])
        p = dist.Bernoulli(made, validate_args=self.checked) if self.loss == "bce" else dist.Normal(made, torch.ones_like(made))
        return p, in_shape(x, p, WHERE)
