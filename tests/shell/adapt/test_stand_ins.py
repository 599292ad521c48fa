"""The adapters of the peers on stand-ins with the peers' names and attributes: what is computed, and what is refused.

`tests/peers` compares with the peers' own packages, in an environment that has them.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import elbowroom as er
from elbowroom.errors import UserError

N, D, K = 4, 9, 2
BITS = torch.rand(N, D).round()


def named(name: str, module: str, base: type = SimpleNamespace) -> Any:
    """A class of that name that says it is of that module."""
    return type(name, (base,), {"__module__": module})


class Encoder(nn.Module):
    """pythae's encoder: a mapping with two names."""

    def __init__(self, inputs: int = D, outputs: int = K) -> None:
        super().__init__()
        self.mu, self.log = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.reshape(len(x), -1)
        return {"embedding": self.mu(x), "log_covariance": self.log(x)}


class Decoder(nn.Module):
    def __init__(self, shape: tuple[int, ...] = (D,)) -> None:
        super().__init__()
        self.out, self.shape = nn.Linear(K, D), shape

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        return {"reconstruction": torch.sigmoid(self.out(z)).reshape(z.shape[0], *self.shape)}


def of_pythae(name: str = "VAE", loss: str = "bce", shape: tuple[int, ...] = (D,), **more: Any) -> Any:
    config = SimpleNamespace(reconstruction_loss=loss, input_dim=shape)
    vae = named(name, f"pythae.models.{name.lower()}", nn.Module)()
    vae.encoder, vae.decoder = Encoder(), Decoder(shape)
    vae.model_config, vae.latent_dim = config, K
    for key, value in more.items():
        setattr(vae, key, value)
    return vae


def log_joint(model: Any, z: Tensor, *args: Any, **more: Tensor) -> Tensor:
    """log p(x, z) of all data together."""
    return poutine.trace(poutine.condition(model, {"z": z, **more})).get_trace(*args).log_prob_sum()


@pytest.mark.parametrize("shape", [(D,), (1, 3, 3)])
@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_pythae_against_its_formulas(loss: str, shape: tuple[int, ...]) -> None:
    vae, x, z = of_pythae(loss=loss, shape=shape), BITS.reshape(N, *shape), torch.randn(N, K)
    model, guide = er.adapt.pythae(vae)
    made = vae.decoder(z)["reconstruction"]
    if loss == "bce":
        likelihood = -nn.functional.binary_cross_entropy(made, x, reduction="sum")
    else:
        likelihood = -0.5 * ((made - x) ** 2).sum() - N * D / 2 * math.log(2 * math.pi)
    prior = -0.5 * (z**2).sum() - N * K / 2 * math.log(2 * math.pi)
    torch.testing.assert_close(log_joint(model, z, x), prior + likelihood)
    found = vae.encoder(x)
    q = torch.distributions.Normal(found["embedding"], found["log_covariance"].exp().sqrt()).log_prob(z).sum()
    torch.testing.assert_close(log_joint(guide, z, x), q)


def test_pythae_vamp_has_the_mixture_of_its_guide_as_prior() -> None:
    pseudo = nn.Sequential(nn.Linear(3, D), nn.Hardtanh(0.0, 1.0))
    vae = of_pythae("VAMP", pseudo_inputs=pseudo, idle_input=torch.eye(3))
    z = torch.randn(N, K)
    found = vae.encoder(pseudo(torch.eye(3)))
    parts = torch.distributions.Normal(found["embedding"], (0.5 * found["log_covariance"]).exp())
    prior = (parts.log_prob(z[:, None]).sum(-1).logsumexp(1) - math.log(3)).sum()
    likelihood = -nn.functional.binary_cross_entropy(vae.decoder(z)["reconstruction"], BITS, reduction="sum")
    pair = er.adapt.pythae(vae)
    torch.testing.assert_close(log_joint(pair.model, z, BITS), prior + likelihood)
    audit = er.audit(*pair, BITS, references="grid", diagnose=False)
    assert (audit.table["gap_total"] > 0).all()


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("VAE", ""),
        ("VAMP", ""),
        ("IWAE", "importance-weighted bound"),
        ("MIWAE", "importance-weighted"),
        ("BetaVAE", "KL weight 1"),
    ],
)
def test_pythae_says_where_training_was_by_another_objective(name: str, note: str) -> None:
    pair = er.adapt.pythae(of_pythae(name))
    text = repr(pair)
    if note:  # an audit repeats it
        assert set(pair.notes) <= set(er.LogJoint(*pair, BITS).notes)
    assert note in text
    assert bool(note) == ("trained" in text)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (
            of_pythae("VAE_IAF"),
            "adapt.pythae: VAE_IAF is not supported; supported are pythae's own VAE, IWAE, CIWAE, MIWAE, PIWAE, VAMP",
        ),
        (named("VAE", "mine")(), "adapt.pythae: VAE is not supported; supported are pythae's own VAE"),
        (
            of_pythae(loss="ssim"),
            "adapt.pythae: reconstruction_loss 'ssim' is no likelihood that is known; supported: mse, bce",
        ),
    ],
)
def test_pythae_refusals(model: Any, text: str) -> None:
    with pytest.raises(UserError) as caught:
        er.adapt.pythae(model)
    assert str(caught.value).startswith(text)


# -- pyroVED -----------------------------------------------------------------------------------------------------------------


class Spatial(nn.Module):
    """A decoder of coordinates and code: a bump at the origin of the moved coordinates, as wide as the code says."""

    def forward(self, grid: Tensor, z: Tensor) -> Tensor:
        turned = grid[..., 0] + (2 * grid[..., 1] if grid.shape[-1] > 1 else 0)
        return torch.sigmoid(turned + z.sum(-1, keepdim=True))


class Joined(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, D)

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.out(z)).reshape(-1, 3, 3)


class Pixels(nn.Module):
    """pyroVED's encoder: of x, or of a list [x, y]."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.loc, self.scale = nn.Linear(width, outputs), nn.Linear(width, outputs)

    def forward(self, x: Any) -> tuple[Tensor, Tensor]:
        given = torch.cat([part.reshape(len(part), -1) for part in (x if isinstance(x, list) else [x])], -1)
        return self.loc(given), nn.functional.softplus(self.scale(given))


def of_pyroved(invariances: list[str] | None, c_dim: int = 0, ndim: int = 2) -> Any:
    vae = named("iVAE", "pyroved.models.ivae", nn.Module)()
    coord = 0 if invariances is None else len(invariances) + ("t" in invariances and ndim == 2)
    axis = torch.linspace(-1, 1, 3)
    vae.invariances, vae.coord, vae.ndim, vae.c_dim, vae.z_dim = invariances, coord, ndim, c_dim, 2 + coord
    vae.grid = torch.cartesian_prod(axis, axis) if ndim == 2 else torch.linspace(-1, 1, D)[:, None]
    vae.t_prior = torch.tensor([0.1, 0.2]) if ndim == 2 else torch.tensor(0.1)
    vae.sc_prior = torch.tensor(0.3)
    vae.encoder_z = Pixels(D + c_dim, vae.z_dim)
    vae.decoder = Spatial() if coord else Joined(2 + c_dim)
    vae.sampler_d = lambda mean: dist.Bernoulli(mean, validate_args=False)
    return vae


def turned_by_hand(vae: Any, z: np.ndarray) -> np.ndarray:
    """The probabilities of one datum, by the formulas of the module's docstring."""
    grid, names = vae.grid.double().numpy(), vae.invariances
    if vae.ndim == 1:
        shift, code = z[0] * 0.1, z[1:]
        return 1 / (1 + np.exp(-(grid[:, 0] + shift + code.sum())))
    out = []
    for v in grid:
        rest = list(z)
        if "r" in names:
            phi = rest.pop(0)
            v = np.array([v[0] * np.cos(phi) - v[1] * np.sin(phi), v[0] * np.sin(phi) + v[1] * np.cos(phi)])
        shift = np.array([rest.pop(0) * 0.1, rest.pop(0) * 0.2]) if "t" in names else 0.0
        v = v * (1 + 0.3 * rest.pop(0)) if "s" in names else v
        v = v + shift
        out.append(1 / (1 + np.exp(-(v[0] + 2 * v[1] + sum(rest)))))
    return np.array(out)


@pytest.mark.parametrize("invariances", [["r"], ["t"], ["s"], ["r", "t"], ["r", "t", "s"]], ids="".join)
def test_pyroved_coordinates_against_the_formulas(invariances: list[str]) -> None:
    vae = of_pyroved(invariances)
    z = torch.randn(N, vae.z_dim)
    p = np.stack([turned_by_hand(vae, row) for row in z.double().numpy()])
    exact = scipy.stats.norm.logpdf(z.double()).sum() + scipy.stats.bernoulli.logpmf(BITS.double(), p).sum()
    assert log_joint(er.adapt.pyroved(vae).model, z, BITS.reshape(N, 3, 3)).item() == pytest.approx(exact, rel=1e-5)


def test_pyroved_spectra_that_shift() -> None:
    vae = of_pyroved(["t"], ndim=1)
    z = torch.randn(N, vae.z_dim)
    p = np.stack([turned_by_hand(vae, row) for row in z.double().numpy()])
    exact = scipy.stats.norm.logpdf(z.double()).sum() + scipy.stats.bernoulli.logpmf(BITS.double(), p).sum()
    assert log_joint(er.adapt.pyroved(vae).model, z, BITS).item() == pytest.approx(exact, rel=1e-5)


def test_pyroved_with_and_without_classes() -> None:
    images, y = BITS.reshape(N, 3, 3), torch.eye(3)[[0, 1, 2, 0]]
    for c_dim, args in ((0, (images,)), (3, (images, y))):
        vae = of_pyroved(None, c_dim)
        model, guide = er.adapt.pyroved(vae)
        audit = er.audit(model, guide, *args, references="grid", diagnose=False)
        pyro.set_rng_seed(0)
        elbo = -pyro.infer.Trace_ELBO(num_particles=2000, vectorize_particles=False).loss(model, guide, *args) / N
        assert audit.table["elbo"].mean().item() == pytest.approx(elbo, abs=0.1)


def test_pyroved_says_what_an_audit_of_many_coordinates_can_say() -> None:
    assert "expect bounds of log p(x)" in repr(er.adapt.pyroved(of_pyroved(["r", "t"])))
    assert "expect bounds of log p(x)" in repr(er.adapt.pyroved(of_pyroved(["r"])))
    assert "bounds" not in repr(er.adapt.pyroved(of_pyroved(None)))


def test_pyroved_refusals() -> None:
    with pytest.raises(UserError, match=r"adapt\.pyroved: jiVAE is not supported; supported is pyroved\.models\.iVAE"):
        er.adapt.pyroved(named("jiVAE", "pyroved.models.jivae")())
    with pytest.raises(UserError, match=r"c_dim=3; it takes y \(N, 3\) as a second argument"):
        er.audit(*er.adapt.pyroved(of_pyroved(None, 3)), BITS.reshape(N, 3, 3))
    with pytest.raises(UserError, match="c_dim=0; it takes x alone"):
        er.audit(*er.adapt.pyroved(of_pyroved(None)), BITS.reshape(N, 3, 3), torch.eye(4))


# -- scvi-tools --------------------------------------------------------------------------------------------------------------

COUNTS = torch.poisson(torch.full((N, D), 3.0)) + 1


class Module(nn.Module):
    """scvi-tools' module, in a few lines."""

    def __init__(self, observed: bool, likelihood: str = "nb") -> None:
        super().__init__()
        self.use_observed_lib_size, self.gene_likelihood, self.n_latent = observed, likelihood, K
        self.minified_data_type, self.shift = None, 0.0
        self.encode, self.out, self.px_r = Pixels(D, K), nn.Linear(K, D), nn.Parameter(torch.zeros(D))
        self.library = Pixels(D, 1)
        self.z_encoder = SimpleNamespace(z_transformation=lambda z: z)
        self.register_buffer("library_log_means", torch.tensor([[3.0, 4.0]]))
        self.register_buffer("library_log_vars", torch.tensor([[0.5, 0.25]]))

    def _compute_local_library_params(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        return self.library_log_means[0, batch], self.library_log_vars[0, batch]

    def _get_inference_input(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": tensors["X"]}

    def _get_generative_input(self, tensors: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"z": found["z"], "library": found["library"], "batch": tensors["batch"]}

    def inference(self, x: Tensor) -> dict[str, Any]:
        qz = torch.distributions.Normal(*self.encode(x.log1p()))
        ql = None if self.use_observed_lib_size else torch.distributions.Normal(*self.library(x.log1p()))
        return {"qz": qz, "ql": ql, "z": qz.rsample()}

    def generative(self, z: Tensor, library: Tensor, batch: Tensor) -> dict[str, Any]:
        mu = library.exp() * self.out(z).softmax(-1)
        px = named("NegativeBinomial", "scvi.distributions")(mu=mu, theta=self.px_r.exp())
        return {"px": px, "pz": torch.distributions.Normal(torch.zeros_like(z) + self.shift, torch.ones_like(z))}


def of_scvi(observed: bool = True, name: str = "SCVI", module: str = "VAE", **options: Any) -> Any:
    batch = torch.tensor([[0], [1], [1], [0]])

    def loader(adata: Any, indices: list[int], batch_size: int) -> Any:
        return [{"X": COUNTS[indices], "batch": batch[indices], "extra": None}]

    inside = named(module, "scvi.module._vae", Module)(observed)
    for key, value in options.items():
        setattr(inside, key, value)
    made = named(name, "scvi.model._scvi")
    return made(module=inside, adata=SimpleNamespace(n_obs=N), _make_data_loader=loader)


@pytest.mark.parametrize("observed", [True, False])
def test_scvi_against_its_formulas(observed: bool) -> None:
    scvi = of_scvi(observed)
    pair = er.adapt.scvi(scvi)
    args, z, library = pair.rows(range(N)), torch.randn(N, K), COUNTS.sum(1, keepdim=True).log()
    assert "extra" not in args[0]
    mu = (library.exp() * scvi.module.out(z).softmax(-1)).detach()
    exact = scipy.stats.nbinom.logpmf(COUNTS, 1.0, 1 / (1 + mu)).sum() + scipy.stats.norm.logpdf(z).sum()
    given = {} if observed else {"library": library}
    if not observed:
        mean, variance = np.array([3.0, 4.0, 4.0, 3.0]), np.array([0.5, 0.25, 0.25, 0.5])
        exact += scipy.stats.norm.logpdf(library[:, 0], mean, np.sqrt(variance)).sum()
    assert log_joint(pair.model, z, *args, **given).item() == pytest.approx(exact, rel=1e-5)
    q = torch.distributions.Normal(*scvi.module.encode(COUNTS.log1p())).log_prob(z).sum()
    if not observed:
        q = q + torch.distributions.Normal(*scvi.module.library(COUNTS.log1p())).log_prob(library).sum()
    torch.testing.assert_close(log_joint(pair.guide, z, *args, **given), q)
    assert ("the library size is read from x" in repr(pair)) == observed


def test_scvi_rows_are_audited() -> None:
    pair = er.adapt.scvi(of_scvi(False, "LinearSCVI", "LDVAE"))
    audit = er.audit(*pair, *pair.rows([2, 0]), diagnose=False)
    assert audit.table.sizes["obs_id"] == 2
    assert "vmap" not in audit.table.attrs.get("notes", "")
    assert set(audit.posteriors.trees()["guide"].posterior) == {"z", "library"}


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (
            of_scvi(name="TOTALVI"),
            "adapt.scvi: TOTALVI is not supported; supported are scvi.model.SCVI and scvi.model.LinearSCVI",
        ),
        (of_scvi(module="MULTIVAE"), "adapt.scvi: SCVI is not supported; supported are"),
        (object(), "adapt.scvi: object is not supported; supported are"),
        (of_scvi(gene_likelihood="gamma"), "adapt.scvi: no gene_likelihood 'gamma'; supported: nb, zinb, poisson, normal"),
        (of_scvi(minified_data_type="latent"), "adapt.scvi: the model's data are minified, so the counts are gone; give it"),
        (of_scvi(shift=1.0), "adapt.scvi: the model's prior is Normal; supported is the standard normal"),
    ],
)
def test_scvi_refusals(model: Any, text: str) -> None:
    with pytest.raises(UserError) as caught:
        er.adapt.scvi(model)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("rows", [[], [-1], [4], [0, 9]])
def test_scvi_has_the_cells_of_its_table_alone(rows: list[int]) -> None:
    with pytest.raises(UserError, match=r"rows must be some of 0 \.\. 3, the cells of the model's AnnData"):
        er.adapt.scvi(of_scvi()).rows(rows)
