"""Every datum at the same points: the sum that is multiplied out once, what is kept between calls, and blocks of data."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.cases.likelihoods import CASES, fitted, outputs, width
from torch import Tensor

from elbowroom.inference.program.densities.bilinear import Bilinear, Factor, Kept
from elbowroom.inference.program.densities.factorised import shared_log_prob
from elbowroom.inference.target import shared_points
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.likelihoods.binary import Bernoulli
from elbowroom.models.networks.mlp import Linear
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE

F64 = torch.float64
N, G = 11, 7


# -- the sum ------------------------------------------------------------------------------------------------------------------


def factor(k: int) -> tuple[Bilinear, Tensor]:
    left, right, beside = torch.randn(G, k, dtype=F64), torch.randn(N, k, dtype=F64), torch.randn(N, dtype=F64)
    return Bilinear((Factor(left, (right, beside), lambda: (right, beside)),)), left @ right.T + beside


def test_a_sum_is_that_of_its_terms_in_any_order() -> None:
    (first, a), (second, b) = factor(3), factor(5)
    point, datum, rest = (torch.randn(*shape, dtype=F64) for shape in ((G, 1), (N,), (G, N)))
    number = torch.tensor(0.5, dtype=F64)
    expected = a + b + point + datum + rest + number - 2.0
    total = first + point + datum + second + rest + number + -2.0
    other = -2.0 + (number + (rest + (datum[None] + (point + second)))) + first
    for found in (total, other):
        assert isinstance(found, Bilinear)
        torch.testing.assert_close(found.dense(N), expected)
    left, right = (first + point + datum + second).columns(G, N, Kept())
    assert left.shape == (G, 3 + 5 + 2)
    torch.testing.assert_close(left @ right.T, a + b + point + datum)


def test_terms_of_no_extent_and_of_too_many_dimensions() -> None:
    torch.testing.assert_close((Bilinear() + 1.5 + torch.zeros(1, dtype=F64)).dense(N), torch.full((1, N), 1.5, dtype=F64))
    minus = Bilinear() + torch.full((G, 1), -torch.inf)
    assert (minus + torch.zeros(N)).dense(N).eq(-torch.inf).all()  # a prior without mass there
    with pytest.raises(ValueError, match=r"has shape \(2, 1, 1\)"):
        Bilinear() + torch.zeros(2, 1, 1)
    with pytest.raises(RuntimeError):
        (factor(2)[0] + torch.zeros(N + 1)).dense(N)


def test_what_is_kept_is_made_anew_when_what_it_was_made_from_changes() -> None:
    calls, kept = [], Kept()
    x = torch.arange(3.0)

    def found(*key: object) -> float:
        def make() -> Tensor:
            calls.append(key)
            return x.sum()

        return float(kept(key, make))

    assert [found(x, "a"), found(x, "a"), found(x.view(3), "a"), found(x.clone(), "a")] == [3.0] * 4
    assert len(calls) == 1
    x += 1
    assert [found(x, "a"), found(x, "a")] == [6.0] * 2
    assert len(calls) == 2
    for other in ((x, "b"), (x[:2], "b"), (x.double(), "b"), (torch.full((3,), torch.nan), "b"), (x + 1, "b"), (x,)):
        before = len(calls)
        found(*other)
        assert len(calls) == before + 1


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", ["bernoulli", "categorical", "gamma", "gamma decoder", "gaussian", "poisson", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_product_over_784_pixels_is_as_accurate_as_its_type_allows(name: str, holes: bool, dtype: torch.dtype) -> None:
    """Against float64: within some of the units in the last place of the largest sum that is added up."""
    likelihood, x = fitted(name, (784,) if name != "mixed" else None, torch.float32)
    params = outputs(likelihood, G, 1, dtype=torch.float32)
    x = torch.where(torch.rand_like(x) < 0.3, torch.nan, x) if holes else x

    def evaluate(kind: torch.dtype) -> tuple[Tensor, Bilinear]:
        like = likelihood.to(kind)
        p = like(params.to(kind))
        p = (like.incomplete(p, x.isnan()) if holes else p).expand((G, len(x)))
        found = shared_log_prob(p, x.to(kind))
        assert isinstance(found, Bilinear)
        return p.log_prob(x.to(kind)).detach(), found

    exact, precise = evaluate(F64)
    value = (precise if dtype == F64 else evaluate(dtype)[1]).dense(len(x)).detach()
    assert value.dtype == dtype
    ((left, right),) = [precise.columns(G, len(x), Kept())]
    largest = float((left.abs() @ right.abs().T).detach().max())
    assert float((value.double() - exact).abs().max()) < 8 * torch.finfo(dtype).eps * largest + 1e-6 * exact.abs().max()


# -- programs -----------------------------------------------------------------------------------------------------------------


def vae_of(name: str, dtype: torch.dtype = F64, n: int = 60) -> tuple[VAE, Tensor]:
    likelihood, x = fitted(name, dtype=dtype, n=n)
    q = DiagonalNormal(2)
    (seen,) = likelihood.feature_shape
    vae = VAE(
        Normal(2),
        likelihood,
        Linear((2,), likelihood.param_dim),
        AmortizedGuide(Linear((2 * seen,), q.param_dim), q, marks=True),
    )
    return vae.to(dtype), x


def normal_guide(y: Tensor, *_: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(torch.zeros(len(y), 2, dtype=y.dtype), 1.0).to_event(1))


def several(y: Tensor) -> None:
    """Two sites, a positive latent (a Jacobian), a mask, and a term that does not factorise."""
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        s = pyro.sample("s", dist.Gamma(torch.tensor(2.0, dtype=F64), 1.0))
        pyro.sample("a", dist.Normal(z, s[..., None]).to_event(1), obs=y[:, :2])
        pyro.sample("b", dist.Poisson(z[..., 0].exp() * s), obs=y[:, 2].abs().round())
        with pyro.poutine.mask(mask=y[:, 0] > 0):
            pyro.sample("c", dist.Bernoulli(logits=z[..., 1]), obs=(y[:, 1] > 0).to(y))
        pyro.sample("d", dist.StudentT(5.0, z[..., 1], 1.0), obs=y[:, 2])


def several_guide(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(torch.zeros(len(y), 2, dtype=F64), 1.0).to_event(1))
        pyro.sample("s", dist.LogNormal(torch.zeros(len(y), dtype=F64), 1.0))


def mixture(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=F64)))
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(torch.cat([z, z[..., :1]], -1) + c[..., None], 0.7).to_event(1), obs=y)


def covariate(y: Tensor, c: Tensor) -> None:
    """A prior that depends on the datum: log p(z|c) is of points and data both, and does not factorise here."""
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(c, 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1, keepdim=True), 0.7).expand([*z.shape[:-1], 3]).to_event(1), obs=y)


def joints() -> dict[str, Callable[[], LogJoint]]:
    y = torch.randn(N, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    made: dict[str, Callable[[], LogJoint]] = {
        "several": lambda: LogJoint(several, several_guide, y),
        "mixture": lambda: LogJoint(mixture, normal_guide, y),
        "covariate": lambda: LogJoint(covariate, normal_guide, y, y[:, :2]),
    }
    for name in ("bernoulli", "gaussian", "laplace", "mixed"):

        def of_vae(name: str = name) -> LogJoint:
            vae, x = vae_of(name, n=N)
            holed = torch.where(torch.rand_like(x) < 0.2, torch.nan, x)
            return LogJoint(vae.model, vae.guide, holed)

        made[name] = of_vae
    return made


FACTORISING = {"mixture", "bernoulli", "gaussian", "mixed"}


@pytest.mark.parametrize("name", joints())
def test_points_together_in_parts_and_in_blocks_of_data_equal_plain_evaluation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    joint = joints()[name]()
    z = torch.randn(50, joint.dim, dtype=F64)
    plain = joint(z[:, None].expand(-1, joint.n_obs, -1))
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(joint.shared(z), plain, **close)
    assert joint.shares
    assert joint.factorises == (name in FACTORISING)
    assert not joint.shared(z.clone().requires_grad_()).requires_grad
    blocks = torch.randperm(joint.n_obs)[:-1].split(3)
    for size in (shared_points.HELD, 0):  # decoded once, or for every block
        monkeypatch.setattr(shared_points, "HELD", size)
        for rows, log_p in zip(blocks, joint.shared_over(z, blocks), strict=True):
            torch.testing.assert_close(log_p, plain[:, rows], **close)
    monkeypatch.setattr(
        shared_points, "_rows", lambda joint, factorises: 8
    )  # chunks that do not divide the points, and one of few
    monkeypatch.setattr(shared_points, "ASSIGNED", 100)
    torch.testing.assert_close(torch.cat([joint.shared(part) for part in z.split(17)]), plain, **close)
    monkeypatch.setattr(shared_points, "HELD", 2**26)
    torch.testing.assert_close(torch.cat(list(joint.shared_over(z, blocks)), 1), plain[:, torch.cat(blocks)], **close)
    (whole,) = joint.shared_over(z, [torch.arange(joint.n_obs)])
    torch.testing.assert_close(whole, plain, **close)
    (one,) = joint.shared(z[:1])  # a single point does not show what depends on it
    torch.testing.assert_close(one, plain[0], **close)


@pytest.mark.parametrize("name", CASES)
def test_every_likelihood_in_single_precision(name: str) -> None:
    vae, x = vae_of(name, torch.float32)
    x = torch.where(torch.rand_like(x) < 0.2, torch.nan, x) if width(name) > 1 else x
    joint = LogJoint(vae.model, vae.guide, x, dtype=None)
    z = torch.randn(9, 2)
    found = joint.shared(z)
    assert joint.shares
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, joint(z[:, None].expand(-1, len(x), -1)), rtol=2e-5, atol=2e-4)


class Counting(torch.nn.Module):
    """A decoder that counts the points that it has decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.points = Linear((2,), 6), 0

    def forward(self, z: Tensor) -> Tensor:
        self.points += math.prod(z.shape[:-1])
        params: Tensor = self.decoder(z)
        return params


def test_a_point_is_decoded_once_however_many_blocks_of_data_there_are() -> None:
    q, decoder = DiagonalNormal(2), Counting()
    vae = VAE(Normal(2), Bernoulli((6,)), decoder, AmortizedGuide(Linear((6,), q.param_dim), q)).double()
    x = torch.bernoulli(torch.full((40, 6), 0.5, dtype=F64))
    joint, z = LogJoint(vae.model, vae.guide, x), torch.randn(100, 2, dtype=F64)
    assert joint.can_share()
    decoder.points = 0
    list(joint.shared_over(z, torch.arange(40).split(7)))
    assert decoder.points == 100
    joint.shared(z)
    assert decoder.points == 200


def test_data_that_change_between_calls_are_seen() -> None:
    """A program that closes over its data, which are no arguments and hence not of the snapshot."""
    y = torch.randn(N, 3, dtype=F64)
    joint = LogJoint(lambda: mixture(y), lambda: normal_guide(y))
    z = torch.randn(5, 2, dtype=F64)
    for _ in range(2):
        torch.testing.assert_close(joint.shared(z), joint(z[:, None].expand(-1, N, -1)))
        y += 1.0


@pytest.mark.parametrize("n", [2, 3, 5])
def test_programs_that_do_not_broadcast_are_evaluated_per_datum(n: int) -> None:
    y = torch.randn(n, dtype=F64)

    def by_place(y: Tensor) -> None:
        """With points in front, the latents of one datum are taken for one latent of all data: two of them fit two data."""
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z[:, 0], 1.0), obs=y)

    def by_dimensions(y: Tensor) -> None:
        """Runs, with one row of points for one of data."""
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z[:, 0] if z.dim() == 2 else z[..., 0].flatten(), 1.0), obs=y)

    for model in (by_place, by_dimensions):
        joint = LogJoint(model, normal_guide, y)
        z = torch.randn(4, 2, dtype=F64)
        torch.testing.assert_close(joint.shared(z), joint(z[:, None].expand(-1, n, -1)))
        assert not joint.shares
        assert any("shared grid" in note for note in joint.notes)
        blocks = torch.arange(n).split(1)
        torch.testing.assert_close(torch.cat(list(joint.shared_over(z, blocks)), 1), joint.shared(z))
