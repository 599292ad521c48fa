"""`er.adapt.torch`: losses written by hand, a linear model against its closed form, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import elbowroom as er
from elbowroom.adapt.written import LIKELIHOODS
from elbowroom.errors import DataError, UserError

N, D, K = 7, 6, 2


class Written(nn.Module):
    """The VAE of a thousand repositories."""

    def __init__(self, outputs: int = D, head: Callable[[Tensor], Tensor] = torch.sigmoid, inputs: int = D) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU())
        self.mu, self.logvar = nn.Linear(8, K), nn.Linear(8, K)
        self.out, self.head = nn.Linear(K, outputs), head

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.hidden(x)
        return self.mu(h), self.logvar(h)

    def decode(self, z: Tensor) -> Tensor:
        return self.head(self.out(z))


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum()


def parts(pair: object, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x|z), KL(q || p) in closed form, and z, of one run."""
    model, guide = pair
    q = poutine.trace(guide).get_trace(*args)
    p = poutine.trace(poutine.replay(model, q)).get_trace(*args)
    divergence = dist.kl.kl_divergence(q.nodes["z"]["fn"], p.nodes["z"]["fn"]).sum()
    return p.nodes["x"]["fn"].log_prob(p.nodes["x"]["value"]).sum(), divergence, q.nodes["z"]["value"]


def same(head: Tensor) -> Tensor:
    return head


BITS, GREY = torch.rand(N, D).round(), torch.rand(N, D) * 0.9 + 0.05
COUNTS, REAL = torch.poisson(torch.full((N, D), 2.0)), torch.randn(N, D)
CLASSES = torch.randint(3, (N, 4))
LOSSES = {  # name -> the VAE, data, the loss as it is written by hand, summed over a batch, and its constant
    "bernoulli": (Written(), BITS, lambda r, x: F.binary_cross_entropy(r, x, reduction="sum"), 0.0),
    "bernoulli_logits": (
        Written(head=same),
        BITS,
        lambda r, x: F.binary_cross_entropy_with_logits(r, x, reduction="sum"),
        0.0,
    ),
    "continuous_bernoulli": (
        Written(),
        GREY,
        lambda r, x: F.binary_cross_entropy(r, x, reduction="sum") - (2 * torch.atanh(1 - 2 * r) / (1 - 2 * r)).log().sum(),
        0.0,
    ),
    "mse": (Written(head=same), REAL, lambda r, x: F.mse_loss(r, x, reduction="sum"), N * D / 2 * math.log(math.pi)),
    "normal": (
        Written(head=same),
        REAL,
        lambda r, x: 0.5 * F.mse_loss(r, x, reduction="sum"),
        N * D / 2 * math.log(2 * math.pi),
    ),
    "laplace": (Written(head=same), REAL, lambda r, x: F.l1_loss(r, x, reduction="sum"), N * D * math.log(2)),
    "poisson": (
        Written(head=torch.exp),
        COUNTS,
        lambda r, x: F.poisson_nll_loss(r, x, log_input=False, eps=0, reduction="sum"),
        torch.lgamma(COUNTS + 1).sum(),
    ),
    "poisson_log": (
        Written(head=same),
        COUNTS,
        lambda r, x: F.poisson_nll_loss(r, x, reduction="sum"),
        torch.lgamma(COUNTS + 1).sum(),
    ),
    "categorical": (
        Written(12, lambda a: a.unflatten(-1, (4, 3)), inputs=4),
        CLASSES,
        lambda r, x: F.cross_entropy(r.movedim(-1, 1), x, reduction="sum"),
        0.0,
    ),
}


def test_every_likelihood_has_its_loss() -> None:
    assert set(LOSSES) == set(LIKELIHOODS)


@pytest.mark.parametrize("name", LOSSES)
def test_the_elbo_is_the_loss_written_by_hand(name: str) -> None:
    vae, x, loss, constant = LOSSES[name]
    vae.eval()
    encode = vae.encode if x.is_floating_point() else lambda x: vae.encode(x.float())
    with torch.no_grad():
        likelihood, divergence, z = parts(er.adapt.torch(encode=encode, decode=vae.decode, likelihood=name), x)
        mu, logvar = encode(x)
        torch.testing.assert_close(likelihood, -(loss(vae.decode(z), x) + constant), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(divergence, kl(mu, logvar))


def test_a_decoder_of_mean_and_log_variance() -> None:
    vae = Written(2 * D, same).eval()
    pair = er.adapt.torch(encode=vae.encode, decode=lambda z: vae.decode(z).chunk(2, -1), likelihood="normal")
    with torch.no_grad():
        likelihood, _, z = parts(pair, REAL)
        mean, logvar = vae.decode(z).chunk(2, -1)
        loss = F.gaussian_nll_loss(mean, REAL, logvar.exp(), full=True, reduction="sum")
    torch.testing.assert_close(likelihood, -loss)


def test_images_and_a_flat_decoder() -> None:
    vae = Written().eval()
    images = BITS.reshape(N, 1, 2, 3)
    pair = er.adapt.torch(encode=vae.encode, decode=vae.decode)
    with torch.no_grad():
        likelihood, _, z = parts(pair, images)
        loss = F.binary_cross_entropy(vae.decode(z), BITS, reduction="sum")
    torch.testing.assert_close(likelihood, -loss)
    shaped = er.adapt.torch(encode=vae.encode, decode=lambda z: vae.decode(z).reshape(-1, 1, 2, 3))
    assert poutine.trace(shaped.model).get_trace(images).nodes["x"]["value"].shape == (N, 1, 2, 3)


LOADINGS, OFFSET, NOISE = torch.randn(K, D, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, D), 0.5
LINEAR = REAL[:4].double()


def linear(**options: object) -> object:
    """Factor analysis, with a guide that is a little off."""
    decode = lambda z: z @ LOADINGS.to(z) + OFFSET.to(z)
    encode = lambda x: (0.3 * x @ LOADINGS.T.to(x), x.new_zeros(len(x), K) - 1)
    given = {"encode": encode, "decode": decode, "likelihood": lambda mean: dist.Normal(mean, NOISE), **options}
    return er.adapt.torch(**given)


def covariance(scale: float = 1.0) -> Tensor:
    loadings = LOADINGS.double()
    return scale**2 * loadings.T @ loadings + NOISE**2 * torch.eye(D, dtype=torch.float64)


def test_log_p_of_a_linear_model_is_the_closed_form() -> None:
    audit = er.audit(*linear(), LINEAR, references="grid")
    exact = dist.MultivariateNormal(OFFSET.double(), covariance()).log_prob(LINEAR)
    torch.testing.assert_close(torch.tensor(audit.table["log_evidence"].values), exact, rtol=0, atol=1e-5)
    assert (audit.table["gap_total"] > 0).all()


@pytest.mark.parametrize(
    "prior",
    [
        dist.Normal(0.0, 2.0),
        dist.Normal(torch.zeros(K), 2.0).to_event(1),
        torch.distributions.Normal(torch.zeros(K), 2.0 * torch.ones(K)),
        torch.distributions.MultivariateNormal(torch.zeros(K), 4.0 * torch.eye(K)),
        lambda: torch.distributions.Independent(torch.distributions.Normal(torch.zeros(K), 2.0), 1),
    ],
    ids=["scalar", "event", "batch", "multivariate", "callable"],
)
def test_priors(prior: object) -> None:
    audit = er.audit(*linear(prior=prior), LINEAR, references="grid")
    exact = dist.MultivariateNormal(OFFSET.double(), covariance(2.0)).log_prob(LINEAR)
    torch.testing.assert_close(torch.tensor(audit.table["log_evidence"].values), exact, rtol=0, atol=1e-5)


def test_a_trained_mixture_as_prior_is_read_anew() -> None:
    means = nn.Parameter(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))

    def mixture() -> object:
        parts = torch.distributions.Independent(torch.distributions.Normal(means, torch.ones(2, K)), 1)
        return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(2)), parts)

    pair = linear(prior=mixture)
    for shift in (0.0, 3.0):
        with torch.no_grad():
            means += shift
        audit = er.audit(*pair, LINEAR, references="grid")
        centres = OFFSET.double() + means.detach().double() @ LOADINGS.double()
        each = dist.MultivariateNormal(centres, covariance()).log_prob(LINEAR[:, None])
        exact = each.logsumexp(1) - math.log(2)
        torch.testing.assert_close(torch.tensor(audit.table["log_evidence"].values), exact, rtol=0, atol=1e-5)


def test_distributions_in_place_of_tensors() -> None:
    pair = linear(
        encode=lambda x: torch.distributions.Normal(0.3 * x @ LOADINGS.T.to(x), x.new_full((len(x), K), math.exp(-0.5))),
        decode=lambda z: torch.distributions.Normal(z @ LOADINGS.to(z) + OFFSET.to(z), NOISE),
    )
    one, other = (er.audit(*p, LINEAR, references="grid", diagnose=False).table for p in (pair, linear()))
    assert abs(one["elbo"] - other["elbo"]).max() < 1e-5
    assert abs(one["log_evidence"] - other["log_evidence"]).max() < 1e-9


def test_conditions_go_to_all_callables() -> None:
    c = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)[:, None]
    pair = linear(
        encode=lambda x, c: (0.3 * (x - c) @ LOADINGS.T.to(x), x.new_zeros(len(x), K) - 1),
        decode=lambda z, c: z @ LOADINGS.to(z) + OFFSET.to(z) + c,
        prior=lambda c: dist.Normal(c.new_zeros(len(c), K), 1.0),
    )
    audit = er.audit(*pair, LINEAR, c, references="grid")
    exact = dist.MultivariateNormal(OFFSET.double() + c, covariance()).log_prob(LINEAR)
    torch.testing.assert_close(torch.tensor(audit.table["log_evidence"].values), exact, rtol=0, atol=1e-5)


def test_modules_in_train_mode_are_audited_in_eval_mode_and_put_back() -> None:
    vae = Written().train()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    model, guide = er.adapt.torch(encode=vae.encode, decode=vae.decode)
    one = er.audit(model, guide, BITS, references="grid", diagnose=False).table["elbo"]
    assert all(module.training for module in vae.modules())
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    two = er.audit(model, guide, BITS[:3], references="grid", diagnose=False).table["elbo"]
    assert abs(one[:3] - two).max() < 0.2  # batch norm does not look at the other rows; the draws are others


def test_grey_pixels_are_refused_unless_the_formula_is_meant() -> None:
    vae = Written().eval()
    with pytest.raises(DataError, match="site 'x'.*validate_args=False"):
        er.audit(*er.adapt.torch(encode=vae.encode, decode=vae.decode), GREY)
    loose = er.adapt.torch(encode=vae.encode, decode=vae.decode, validate_args=False)
    audit = er.audit(*loose, GREY, references="grid", diagnose=False)
    assert "no probability" in audit.table.attrs["notes"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"encode": 3}, "adapt.torch: encode must be callable, a function or a module; got 3"),
        ({"decode": None}, "adapt.torch: decode must be callable, a function or a module; got None"),
        (
            {"likelihood": "bernouli"},
            "adapt.torch: no likelihood 'bernouli'; did you mean 'bernoulli'?; or give one as a callable",
        ),
        ({"likelihood": 3}, "adapt.torch: likelihood must be a name or callable; got 3"),
        ({"prior": "gamma"}, "adapt.torch: no prior 'gamma'; allowed: laplace, normal; or give one as a callable"),
        ({"prior": 3}, "adapt.torch: prior must be a name, a distribution or callable; got 3"),
    ],
)
def test_what_cannot_be_a_vae_is_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(UserError) as caught:
        linear(**options)
    assert str(caught.value) == text


def three(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x[:, :K], x[:, :K], x[:, :K]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"encode": three},
            "adapt.torch: encode returned 3 values; return (mu, logvar) or a distribution: lambda x: vae.encode(x)[:2]",
        ),
        ({"encode": lambda x: x}, "adapt.torch: encode returned a Tensor; return (mu, logvar) or a distribution"),
        ({"encode": lambda x: (x, x[:, :2])}, "adapt.torch: encode returned mu (4, 6) and logvar (4, 2); shapes must agree"),
        ({"encode": lambda x: (x[:1], x[:1])}, "adapt.torch: encode gave z of shape (1, 6) for 4 data; the rows come first"),
        ({"encode": lambda x: "z"}, "adapt.torch: encode: it returned a str, where a distribution is needed"),
        ({"decode": lambda z: {"x": z}}, "adapt.torch: decode returned dict; return a tensor, several, or a distribution"),
        ({"decode": lambda z: z}, "adapt.torch: decode: a draw of its p(x|z) has shape (4, 2), the data have (4, 6)"),
        (
            {"decode": lambda z: (z, z), "likelihood": "mse"},
            "adapt.torch: decode returned 2 tensors, too many for likelihood 'mse'; give likelihood as a callable",
        ),
        ({"likelihood": lambda mean: mean}, "adapt.torch: likelihood: it returned a Tensor, where a distribution is needed"),
        (
            {"prior": dist.Normal(torch.zeros(3), 1.0)},
            "adapt.torch: prior has draws of shape (3,), the latents of one datum (2,); give it that shape",
        ),
        ({"prior": lambda: 3}, "adapt.torch: prior: it returned an int, where a distribution is needed"),
    ],
)
def test_wrong_results_are_named_in_a_line(options: dict[str, object], text: str) -> None:
    model, guide = linear(**options)
    with pytest.raises(UserError) as caught:
        er.audit(model, guide, LINEAR)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_a_pair_of_callables_holds_no_rows() -> None:
    with pytest.raises(UserError, match="rows: this model holds no data; give the rows themselves"):
        linear().rows([0])


def test_it_says_what_it_is() -> None:
    assert repr(linear()) == "Pair(model, guide)"
    assert er.adapt.__all__ == ["Pair", "pythae", "pyroved", "scvi", "torch"]
    assert "adapt" in dir(er)
