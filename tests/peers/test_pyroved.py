"""`er.adapt.pyroved` against pyroVED's own Pyro programs, which it computes in another way."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import elbowroom as er
from elbowroom.errors import UserError
from peers.imported import estimates, peer

pyroved = peer("pyroved")
pytestmark = pytest.mark.filterwarnings("ignore")

IMAGES = (torch.tensor(load_digits().images / 16).float() >= 0.5).float()
LABELS = torch.nn.functional.one_hot(torch.tensor(load_digits().target), 10).float()
N = 10


@pytest.fixture(autouse=True)
def _deterministic() -> Any:
    """pyroVED asks torch for deterministic algorithms for the whole process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def trained(invariances: list[str] | None = None, epochs: int = 3, labels: bool = False, **options: Any) -> Any:
    vae = pyroved.models.iVAE(
        (8, 8), 2, invariances, 10 if labels else 0, hidden_dim_e=[64], hidden_dim_d=[64], device="cpu", **options
    )
    trainer = pyroved.trainers.SVItrainer(vae, device="cpu")
    data = (IMAGES[:1437].reshape(-1, 64), LABELS[:1437]) if labels else (IMAGES[:1437],)
    loader = pyroved.utils.init_dataloader(*data, batch_size=128)
    for _ in range(epochs):
        trainer.step(loader)
    return vae.eval()


def log_joint(program: Any, sites: dict[str, Tensor], *args: Tensor) -> Tensor:
    return pyro.poutine.trace(pyro.poutine.condition(program, sites)).get_trace(*args).log_prob_sum()


@pytest.mark.parametrize("invariances", [None, ["r"], ["t"], ["s"], ["r", "t"], ["r", "t", "s"]], ids=str)
def test_the_densities_are_those_of_pyroved(invariances: list[str] | None) -> None:
    vae, x = trained(invariances, epochs=1), IMAGES[1437 : 1437 + N]
    pair = er.adapt.pyroved(vae)
    z = torch.randn(N, vae.z_dim)
    with torch.no_grad():
        torch.testing.assert_close(log_joint(pair.model, {"z": z}, x), log_joint(vae.model, {"latent": z}, x))
        torch.testing.assert_close(log_joint(pair.guide, {"z": z}, x), log_joint(vae.guide, {"latent": z}, x))


@pytest.mark.parametrize("sampler", ["bernoulli", "continuous_bernoulli", "gaussian"])
def test_samplers_and_classes(sampler: str) -> None:
    vae = trained(labels=True, epochs=1, sampler_d=sampler, decoder_sig=0.3)
    images, y = IMAGES[1437 : 1437 + N] * 0.8 + 0.1, LABELS[1437 : 1437 + N]
    pair, z, flat = er.adapt.pyroved(vae), torch.randn(N, 2), images.reshape(N, 64)
    for x in (images, flat):  # beside y, pyroVED itself takes flat ones alone
        with torch.no_grad():
            torch.testing.assert_close(log_joint(pair.model, {"z": z}, x, y), log_joint(vae.model, {"latent": z}, flat, y))
            torch.testing.assert_close(log_joint(pair.guide, {"z": z}, x, y), log_joint(vae.guide, {"latent": z}, flat, y))


def test_spectra_that_shift() -> None:
    spectra = IMAGES.reshape(-1, 64)
    vae = pyroved.models.iVAE((64,), 2, ["t"], device="cpu")
    x, z = spectra[:N], torch.randn(N, 3)
    with torch.no_grad():
        ours = log_joint(er.adapt.pyroved(vae).model, {"z": z}, x)
        torch.testing.assert_close(ours, log_joint(vae.model, {"latent": z}, x))


def test_the_audit_has_pyroveds_elbo_reconstruction_and_evidence() -> None:
    vae, x = trained(), IMAGES[1437 : 1437 + N]
    estimated, _, _ = estimates(er.adapt.pyroved(vae), x)
    audit = er.audit(*er.adapt.pyroved(vae), x[:4], references="grid", diagnose=False)
    with torch.no_grad():
        elbo = pyro.infer.Trace_ELBO()
        own = torch.tensor([-elbo.loss(vae.model, vae.guide, x) / N for _ in range(400)])
        loc, scale = vae.encode(x)
        mean = pyro.poutine.trace(pyro.poutine.condition(er.adapt.pyroved(vae).model, {"z": loc})).get_trace(x)
        torch.testing.assert_close(mean.nodes["x"]["fn"].mean.reshape(N, 8, 8), vae.decode(loc))
        q = torch.distributions.Normal(loc, scale)
        z = q.sample((4000,))
        weight = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) - q.log_prob(z).sum(-1)
        made = vae.decoder(z.reshape(-1, 2)).reshape(4000, N, 64)
        weight = weight + torch.distributions.Bernoulli(made, validate_args=False).log_prob(x.reshape(N, 64)).sum(-1)
        evidence = (weight.logsumexp(0) - torch.log(torch.tensor(4000.0)))[:4].mean().item()
    assert estimated.mean().item() == pytest.approx(own.mean().item(), abs=5 * own.std().item() / 20)
    assert audit.table["log_evidence"].mean().item() == pytest.approx(evidence, abs=0.02)


def test_others_are_refused() -> None:
    with pytest.raises(UserError, match=r"adapt\.pyroved: jiVAE is not supported; supported is pyroved\.models\.iVAE"):
        er.adapt.pyroved(pyroved.models.jiVAE((8, 8), 2, 3, device="cpu"))
