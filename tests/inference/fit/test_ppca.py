"""A trained linear VAE reaches the probabilistic-PCA maximum likelihood, which is known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elbowroom.inference.fit.plan import Session
from elbowroom.inference.fit.svi import fit
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.linear_gaussian import LinearGaussian
from elbowroom.models.networks.mlp import Linear
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE

F64 = torch.float64


def simulated(n: int = 2000, width: int = 8, seed: int = 0) -> Tensor:
    """Data with eigenvalues of the loadings about 6, 3 and 1.2 above a noise of 0.25."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, 3, dtype=F64, generator=generator)).Q
    oracle = LinearGaussian(
        basis * torch.tensor([6.0, 3.0, 1.2], dtype=F64).sqrt(),
        torch.linspace(-1, 1, width, dtype=F64),
        torch.full((width,), 0.25, dtype=F64),
    )
    return oracle.sample(n, generator)[1]


def linear(width: int, dim: int, scale: float | str, seed: int) -> VAE:
    torch.manual_seed(seed)
    family = DiagonalNormal(dim)
    encoder = Linear((width,), family.param_dim)
    return VAE(Normal(dim), Gaussian((width,), scale=scale), Linear((dim,), width), AmortizedGuide(encoder, family))


OPTIONS = {"epochs": 60, "batch_size": 100, "learning_rate": 2e-2, "dtype": "float64", "device": "cpu"}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_reaches_the_maximum_likelihood_and_its_rates(seed: int) -> None:
    x = simulated(seed=seed)
    vae = linear(8, 3, "shared", seed)
    fit(vae, x, x[:0], Session(seed=seed), **OPTIONS)
    oracle = vae.linear_gaussian()
    assert oracle is not None
    best = LinearGaussian.maximum_likelihood(x, 3)
    short = (best.log_evidence(x).mean() - oracle.log_evidence(x).mean()).item()
    assert 0 <= short < 0.05
    q = vae.posterior(x)
    with torch.no_grad():
        elbo = oracle.log_evidence(x) - oracle.kl(q.mean, torch.diag_embed(q.variance), x)
        assert (best.log_evidence(x).mean() - elbo.mean()).item() < 0.05
        # the diagonal guide makes W orthogonal: rate_j = 1/2 log(l_j / s2), one latent for each eigenvalue
        rate = 0.5 * (q.mean.square() + q.variance - 1 - q.variance.log()).mean(0)
    centred = x - x.mean(0)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred / len(x)).flip(0)
    expected = 0.5 * (eigenvalues[:3] / eigenvalues[3:].mean()).log()
    assert ((rate.sort(descending=True).values / expected - 1).abs() < 0.05).all()


def test_latents_below_the_fixed_noise_collapse_and_only_they() -> None:
    """With s2 fixed at 2, exactly the latents whose eigenvalue exceeds 2 survive (l = 6.25 and 3.25, not 1.45)."""
    x = simulated()
    vae = linear(8, 3, 2.0**0.5, seed=0)
    fit(vae, x, x[:0], Session(seed=0), **OPTIONS)
    with torch.no_grad():
        active = vae.posterior(x).mean.var(0).sort(descending=True).values
    centred = x - x.mean(0)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred / len(x)).flip(0)
    assert (eigenvalues > 2).sum() == 2
    # Var_x[a_j] = 1 - s2 / l_j for the survivors
    torch.testing.assert_close(active[:2], 1 - 2 / eigenvalues[:2], atol=0.05, rtol=0)
    assert active[2] < 0.01
