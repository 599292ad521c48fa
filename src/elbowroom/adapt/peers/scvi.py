"""`er.adapt.scvi`: SCVI and LinearSCVI of scvi-tools.

    z ~ N(0, I_d)
    l ~ N(m_b, v_b), the log library size, with mean and variance of the cell's batch b; or l = log sum_g x_g, observed
    x_g ~ NB or ZINB with mean exp(l) f_g(z, b, covariates) and inverse dispersion theta_g, or Poisson, or normal

    q(z|x) = N(mu(x), sigma(x)^2),  q(l|x) = N(nu(x), tau(x)^2)

All networks run by scvi-tools' own code (`module.inference`, `module.generative`), so that covariates enter as they do there.
Where the library is observed, p(x|z) is conditioned on a function of x itself: it is that density whose -ELBO scvi-tools
minimises, not one that adds up to 1 over x; log p(x) of two such models compares only where both observe it.

Lopez, Regier, Cole, Jordan, Yosef (2018), https://www.nature.com/articles/s41592-018-0229-2;
Svensson, Gayoso, Yosef, Pachter (2020), https://doi.org/10.1093/bioinformatics/btaa169; read at scvi-tools 1.4.2 (2026-12).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from elbowroom.adapt.distributions import in_pyro
from elbowroom.adapt.pair import Pair, Programs
from elbowroom.adapt.peers.kinds import of_library
from elbowroom.errors import UserError

WHERE = "adapt.scvi"
MODELS, MODULES = ("SCVI", "LinearSCVI"), ("VAE", "LDVAE")
LIKELIHOODS = ("nb", "zinb", "poisson", "normal")
OBSERVED = "the library size is read from x, so log p(x) is that of scvi-tools' objective: compare it with such models alone"


def scvi(model: Any) -> Pair:
    """Make a Pyro pair of a trained SCVI or LinearSCVI model.

    Sites: `z` (d), `library` (the log library size, 1) where the model infers it, and `x` (genes). -ELBO is the model's own
    (`reconstruction_loss + kl_local`) per cell, at KL weight 1. Batches, covariates, size factors, all dispersions and the
    logistic normal (whose `z` is before the softmax) go through the model's own networks.

    Args:
        model: an `scvi.model.SCVI` or `LinearSCVI`, with its AnnData.

    Returns:
        The pair, whose `rows` gives cells by number: `er.audit(*pair, *pair.rows(range(40)))`.

    Raises:
        UserError: another class, a likelihood or prior that is not supported, or data that were minified.
    """
    module = getattr(model, "module", None)
    if not of_library(model, "scvi", MODELS, exact=False) or not of_library(module, "scvi", MODULES):
        raise UserError(
            f"{WHERE}: {type(model).__name__} is not supported; supported are scvi.model.SCVI and scvi.model.LinearSCVI"
        )
    assert module is not None
    if module.gene_likelihood not in LIKELIHOODS:
        raise UserError(f"{WHERE}: no gene_likelihood {module.gene_likelihood!r}; supported: {', '.join(LIKELIHOODS)}")
    if module.minified_data_type is not None:
        raise UserError(f"{WHERE}: the model's data are minified, so the counts are gone; give it the whole AnnData")
    parts = _Parts(module)
    programs = Programs(parts.p_z, parts.q_z, parts.p_x, parts.size)
    found = Pair(
        programs.model,
        programs.guide,
        [OBSERVED] if module.use_observed_lib_size else [],
        functools.partial(_rows, model),
    )
    parts.check(*found.rows([0]))
    return found


def _rows(model: Any, which: Sequence[int]) -> tuple[Any, ...]:
    """Return one batch of the model's own data loader."""
    numbers, total = [int(row) for row in which], int(model.adata.n_obs)
    if not numbers or min(numbers) < 0 or max(numbers) >= total:
        raise UserError(f"{WHERE}: rows must be some of 0 .. {total - 1}, the cells of the model's AnnData")
    loader = model._make_data_loader(adata=model.adata, indices=numbers, batch_size=len(numbers))
    tensors = {name: value for name, value in next(iter(loader)).items() if value is not None}
    return (tensors,)


class _Undrawn(TorchFunctionMode):
    """Puts zeros in the place of normal draws: `inference` draws a z beside q(z|x), which is not used.

    The draw would keep the guide from being evaluated for many draws at once (torch.func.vmap).
    """

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Call `func`, but for `normal_`."""
        return args[0].zero_() if getattr(func, "__name__", "") == "normal_" else func(*args, **(kwargs or {}))


class _Parts:
    """Prior, guide and likelihood by the module's own methods."""

    def __init__(self, module: Any) -> None:
        self.module = module

    @staticmethod
    def size(tensors: Mapping[str, Tensor]) -> int:
        """N, the number of cells."""
        return len(tensors["X"])

    def p_z(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """p(z), and p(l) by the cell's batch."""
        zero = tensors["X"].new_zeros(self.module.n_latent)
        found = {"z": dist.Normal(zero, torch.ones_like(zero)).to_event(1)}
        if not self.module.use_observed_lib_size:
            mean, variance = self.module._compute_local_library_params(tensors["batch"])
            found["library"] = dist.Normal(mean, variance.sqrt()).to_event(1)
        return found

    def q_z(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """q(z|x), and q(l|x)."""
        with _Undrawn():
            found = self.module.inference(**self.module._get_inference_input(tensors))
        q = {"z": in_pyro(found["qz"], WHERE).to_event(1)}
        if not self.module.use_observed_lib_size:
            q["library"] = in_pyro(found["ql"], WHERE).to_event(1)
        return q

    def p_x(self, z: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> tuple[Any, Tensor]:
        """p(x|z, l), and the counts."""
        return in_pyro(self.generated(z, tensors)["px"], WHERE), tensors["X"]

    def generated(self, z: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Any:
        """Run the module's decoder."""
        library = z["library"] if "library" in z else tensors["X"].sum(1, keepdim=True).log()
        given = {"z": self.module.z_encoder.z_transformation(z["z"]), "library": library}
        return self.module.generative(**self.module._get_generative_input(tensors, given))

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse a module whose prior is not N(0, 1).

        Raises:
            UserError: it is another.
        """
        with torch.no_grad():
            z = {site: fn.expand([1]).mean for site, fn in self.p_z(tensors).items()}
            p = self.generated(z, tensors)["pz"]
        if not (isinstance(p, torch.distributions.Normal) and bool((p.loc == 0).all()) and bool((p.scale == 1).all())):
            raise UserError(f"{WHERE}: the model's prior is {type(p).__name__}; supported is the standard normal")
