"""`er.adapt.pythae` against pythae: its loss, its reconstruction, its estimate of log p(x)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import elbowroom as er
from elbowroom.errors import UserError
from peers.imported import peer

pythae = peer("pythae")
models = peer("pythae.models")
pytestmark = pytest.mark.filterwarnings("ignore")

PIXELS = torch.tensor(load_digits().data / 16).float()
BITS = (PIXELS >= 0.5).float()
N, D = 12, 64


def trained(name: str, loss: str, shape: tuple[int, ...] = (D,), latent: int = 2, epochs: int = 3, **options: Any) -> Any:
    """A model of that class, trained a little by its own loss."""
    torch.manual_seed(0)
    config = getattr(models, f"{name}Config")(input_dim=shape, latent_dim=latent, reconstruction_loss=loss, **options)
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


@pytest.mark.parametrize("shape", [(D,), (1, 8, 8)])
@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_vae_has_the_loss_and_the_evidence_of_pythae(loss: str, shape: tuple[int, ...]) -> None:
    vae = trained("VAE", loss, shape)
    x = test_rows(loss).reshape(N, *shape)
    constant = 0.0 if loss == "bce" else D / 2 * math.log(2 * math.pi)
    audit = er.audit(*er.adapt.pythae(vae), x, references="grid", diagnose=False)
    with torch.no_grad():
        own = [-vae({"data": x}).loss.item() - constant for _ in range(400)]
        nll = vae.get_nll(x, n_samples=2000, batch_size=2000)
    se = torch.tensor(own).std().item() / 20
    assert audit.table["elbo"].mean().item() == pytest.approx(sum(own) / 400, abs=5 * se)
    assert audit.table["log_evidence"].mean().item() == pytest.approx(-nll, abs=0.05)
    assert (
        abs(audit.table["log_evidence"].mean().item() + nll) < audit.table["gap_total"].mean().item()
    )  # it could tell them apart


def test_reconstructions_are_those_of_pythae() -> None:
    vae, x = trained("VAE", "bce"), test_rows("bce")
    model, guide = er.adapt.pythae(vae)
    import pyro

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
    import pyro

    p = pyro.poutine.trace(pair.model).get_trace(x).nodes["z"]["fn"]
    with torch.no_grad():
        torch.testing.assert_close(p.log_prob(z), vae._log_p_z(z) - math.log(2 * math.pi))
    audit = er.audit(*pair, x, references="grid", diagnose=False)
    with torch.no_grad():
        nll = vae.get_nll(x, n_samples=2000, batch_size=2000)
    assert audit.table["log_evidence"].mean().item() == pytest.approx(-nll, abs=0.05)


@pytest.mark.parametrize("name", ["IWAE", "CIWAE", "MIWAE", "PIWAE", "BetaVAE", "DisentangledBetaVAE", "INFOVAE_MMD"])
def test_the_other_objectives_have_the_same_model(name: str) -> None:
    vae = trained(name, "bce", epochs=1)
    x = test_rows("bce")
    audit = er.audit(*er.adapt.pythae(vae), x, references="grid", diagnose=False)
    with torch.no_grad():
        nll = vae.get_nll(x, n_samples=2000, batch_size=2000)
    assert audit.table["log_evidence"].mean().item() == pytest.approx(-nll, abs=0.05)


def test_iwae_bound_lies_between_the_elbo_and_the_evidence() -> None:
    vae = trained("IWAE", "bce", number_samples=10)
    x = test_rows("bce")
    table = er.audit(*er.adapt.pythae(vae), x, references="grid", diagnose=False).table
    with torch.no_grad():
        own = -sum(bound(vae, x) for _ in range(100)) / 100
    assert table["elbo"].mean().item() < own < table["log_evidence"].mean().item()


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
    config = getattr(models, f"{name}Config")(input_dim=(D,), latent_dim=2)
    with pytest.raises(UserError, match=f"adapt.pythae: {name} is not supported; supported are pythae's own VAE, IWAE"):
        er.adapt.pythae(getattr(models, name)(config))


def test_a_subclass_is_refused() -> None:
    class Mine(models.VAE):
        pass

    with pytest.raises(UserError, match="Mine is not supported"):
        er.adapt.pythae(Mine(models.VAEConfig(input_dim=(D,), latent_dim=2)))
