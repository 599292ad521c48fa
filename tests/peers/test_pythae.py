"""`er.adapt.pythae` against pythae: its loss, its reconstruction, its estimate of log p(x)."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import elbowroom as er
from elbowroom.errors import UserError
from peers.imported import estimates, peer

pythae = peer("pythae")
models = peer("pythae.models")
pytestmark = pytest.mark.filterwarnings("ignore")

PIXELS = torch.tensor(load_digits().data / 16).float()
BITS = (PIXELS >= 0.5).float()
N, D = 12, 64


def config_of(name: str) -> Any:
    """Its class: VAEConfig, VAE_IAF_Config."""
    return getattr(models, f"{name}_Config" if "_" in name else f"{name}Config")


def trained(name: str, loss: str, shape: tuple[int, ...] = (D,), latent: int = 2, epochs: int = 3, **options: Any) -> Any:
    """A model of that class, trained a little by its own loss."""
    torch.manual_seed(0)
    config = config_of(name)(input_dim=shape, latent_dim=latent, reconstruction_loss=loss, **options)
    model = getattr(models, name)(config)
    x = (BITS if loss == "bce" else PIXELS).reshape(-1, *shape)
    step = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(1437).split(128):
            step.zero_grad()
            model({"data": x[rows]}).loss.backward()
            step.step()
    return model.eval()


def test_rows(loss: str) -> Tensor:
    return (BITS if loss == "bce" else PIXELS)[1437 : 1437 + N]


test_rows.__test__ = False  # type: ignore[attr-defined]


def own_evidence(vae: Any, x: Tensor) -> float:
    """Mean log p(x) by `get_nll`, which returns log p(x), not its negative."""
    with torch.no_grad():
        return float(vae.get_nll(x, n_samples=4000, batch_size=4000))


@pytest.mark.parametrize("shape", [(D,), (1, 8, 8)], ids=["flat", "image"])
@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_vae_has_the_loss_and_the_evidence_of_pythae(loss: str, shape: tuple[int, ...]) -> None:
    vae = trained("VAE", loss, shape)
    x = test_rows(loss).reshape(N, *shape)
    constant = 0.0 if loss == "bce" else D / 2 * math.log(2 * math.pi)
    elbo, error, evidence = estimates(er.adapt.pythae(vae), x)
    with torch.no_grad():
        own = torch.tensor([-vae({"data": x}).loss.item() - constant for _ in range(400)])
    se = math.hypot(own.std().item() / 20, (error**2).sum().sqrt().item() / N)
    assert elbo.mean().item() == pytest.approx(own.mean().item(), abs=5 * se)
    off = abs(evidence.mean().item() - own_evidence(vae, x))
    assert off < 0.03
    assert off < 0.5 * (evidence - elbo).mean().item()  # it tells them apart


def test_the_audit_by_a_grid_has_the_evidence_of_pythae() -> None:
    vae, x = trained("VAE", "bce"), test_rows("bce")[:4]
    table = er.audit(*er.adapt.pythae(vae), x, references="grid", diagnose=False).table
    assert table["log_evidence"].mean().item() == pytest.approx(own_evidence(vae, x), abs=0.03)


def test_reconstructions_are_those_of_pythae() -> None:
    vae, x = trained("VAE", "bce"), test_rows("bce")
    model, guide = er.adapt.pythae(vae)
    q = pyro.poutine.trace(guide).get_trace(x).nodes["z"]["fn"]
    with torch.no_grad():
        own = vae.encoder(x).embedding
        torch.testing.assert_close(q.mean, own)
        at = pyro.poutine.trace(pyro.poutine.condition(model, {"z": own})).get_trace(x).nodes["x"]["fn"]
        torch.testing.assert_close(at.mean, vae.decoder(own).reconstruction)


def test_vamp_has_its_own_prior() -> None:
    vae = trained("VAMP", "bce", number_components=7)
    x, pair = test_rows("bce"), er.adapt.pythae(vae)
    z = torch.randn(N, 2)
    p = pyro.poutine.trace(pair.model).get_trace(x).nodes["z"]["fn"]
    with torch.no_grad():
        torch.testing.assert_close(p.log_prob(z), vae._log_p_z(z) - math.log(2 * math.pi))
    assert estimates(pair, x)[2].mean().item() == pytest.approx(own_evidence(vae, x), abs=0.03)


@pytest.mark.parametrize("name", ["IWAE", "CIWAE", "MIWAE", "PIWAE", "BetaVAE", "DisentangledBetaVAE", "INFOVAE_MMD"])
def test_the_other_objectives_have_the_same_model(name: str) -> None:
    """At the same z, the pair's log weights are those of `get_nll`, written out."""
    vae, x, z = trained(name, "bce"), test_rows("bce"), torch.randn(N, 2)
    pair = er.adapt.pythae(vae)
    with torch.no_grad():
        out, made = vae.encoder(x), vae.decoder(z).reconstruction
        log_q = -0.5 * (out.log_covariance + (z - out.embedding) ** 2 / out.log_covariance.exp()).sum()
        own = -0.5 * (z**2).sum() - log_q - torch.nn.functional.binary_cross_entropy(made, x, reduction="sum")
        p, q = (pyro.poutine.trace(pyro.poutine.condition(f, {"z": z})).get_trace(x).log_prob_sum() for f in pair)
    torch.testing.assert_close(p - q, own)
    elbo, _, evidence = estimates(pair, x)
    assert (evidence > elbo).all()
    if name.endswith("IWAE"):  # the others' guides are far off: both estimates have heavy tails
        assert evidence.mean().item() == pytest.approx(own_evidence(vae, x), abs=0.1)


def test_iwae_bound_lies_between_the_elbo_and_the_evidence() -> None:
    vae = trained("IWAE", "bce", number_samples=10)
    x = test_rows("bce")
    elbo, _, evidence = estimates(er.adapt.pythae(vae), x)
    with torch.no_grad():
        own = -sum(bound(vae, x) for _ in range(100)) / 100
    assert elbo.mean().item() < own < evidence.mean().item()


def bound(vae: Any, x: Tensor) -> float:
    """-log (1/K sum w): what IWAE bounds. pythae reports -sum softmax(w) log w in its place, which is below it."""
    out = vae.encoder(x)
    q = torch.distributions.Normal(out.embedding, (0.5 * out.log_covariance).exp())
    z = q.sample((10,))
    p = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) - q.log_prob(z).sum(-1)
    made = vae.decoder(z.reshape(-1, 2)).reconstruction.reshape(10, len(x), -1)
    w = p + torch.distributions.Bernoulli(made).log_prob(x).sum(-1)
    return -(w.logsumexp(0) - math.log(10)).mean().item()


@pytest.mark.parametrize("name", ["VAE_LinNF", "VAE_IAF", "SVAE"])
def test_other_guides_are_refused(name: str) -> None:
    config = config_of(name)(input_dim=(D,), latent_dim=2)
    with pytest.raises(UserError, match=f"adapt.pythae: {name} is not supported; supported are pythae's own VAE, IWAE"):
        er.adapt.pythae(getattr(models, name)(config))


def test_a_subclass_is_refused() -> None:
    class Mine(models.VAE):
        pass

    with pytest.raises(UserError, match="Mine is not supported"):
        er.adapt.pythae(Mine(models.VAEConfig(input_dim=(D,), latent_dim=2)))
