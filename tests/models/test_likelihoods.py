"""Every likelihood: its density, its draws, its data and their holes. A new one is tested by a row of `CASES`."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from support.cases.likelihoods import (
    CASES,
    COLUMNS,
    F64,
    LEVELS,
    alone,
    binary,
    closed_unit,
    codes,
    counted,
    counts,
    every,
    fitted,
    open_unit,
    outputs,
    positive,
    real,
    width,
)
from torch import Tensor

from elbowroom.errors import DataError
from elbowroom.inference.program.densities.bilinear import Bilinear
from elbowroom.inference.program.densities.factorised import shared_log_prob
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.columns import Column
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.likelihoods.base import Likelihood
from elbowroom.models.likelihoods.categorical import Categorical, DiscretizedLogistic, Ordinal
from elbowroom.models.likelihoods.counts import (
    Binomial,
)
from elbowroom.models.likelihoods.missing import Incomplete
from elbowroom.models.likelihoods.mixed import Columns, Mixed
from elbowroom.models.likelihoods.multinomial import Composition
from elbowroom.models.networks.mlp import Linear
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE

# -- densities -------------------------------------------------------------------------------------------------------------


def _nodes(name: str) -> tuple[Tensor, Tensor]:
    """Points of the support of one entry, and their weights in an integral or sum."""
    t = torch.linspace(-36.0, 36.0, 200_001, dtype=F64)
    step = t[1] - t[0]
    data = CASES[name][1]
    if name == "continuous_bernoulli":
        u = torch.linspace(0, 1, 20_001, dtype=F64)
        return u, torch.full_like(u, 1 / 20_000).scatter(0, torch.tensor([0, 20_000]), 0.5 / 20_000)
    if data is real:
        return 3 + t.sinh(), step * t.cosh()
    if data is positive:
        return t.exp(), step * t.exp()
    if data in (open_unit, closed_unit):
        inner = t[(t.abs() < 34)]
        x, weight = inner.sigmoid(), step * inner.sigmoid() * (-inner).sigmoid()
        atoms = torch.tensor([0.0, 1.0] if data is closed_unit else [], dtype=F64)
        return torch.cat([x, atoms]), torch.cat([weight, torch.ones_like(atoms)])
    last = {binary: 2, codes: LEVELS, counts: 4000}[data]
    return torch.arange(last, dtype=F64), torch.ones(last, dtype=F64)


@alone
def test_densities_integrate_to_one(name: str) -> None:
    likelihood, _ = fitted(name, (1,))
    p = likelihood(outputs(likelihood, 5))
    x, weight = _nodes(name)
    total = (p.log_prob(x[:, None, None]).exp() * weight[:, None]).sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["multinomial", "dirichlet_multinomial", "dirichlet_multinomial decoder"])
def test_a_row_of_counts_sums_to_one_for_every_total(name: str) -> None:
    likelihood, _ = fitted(name)
    p = likelihood(outputs(likelihood, 5))
    for total in range(5):
        rows = [x for x in itertools.product(range(total + 1), repeat=3) if sum(x) == total]
        mass = p.log_prob(torch.tensor(rows, dtype=F64)[:, None]).exp().sum(0)
        torch.testing.assert_close(mass, torch.ones_like(mass))


@every
def test_draws_lie_in_the_support_and_have_the_moments(name: str) -> None:
    likelihood, _ = fitted(name)
    with torch.no_grad():
        p = likelihood(outputs(likelihood, 4))
        n = 20_000
        x = p.sample((n,))
        assert x.shape == (n, 4, width(name))
        assert x.dtype == F64
        assert p.support.check(x).all()
        likelihood.check(x.flatten(0, 1))
        se = x.std(0) / n**0.5
        assert ((x.mean(0) - p.mean).abs() <= 4.5 * se).all(), (x.mean(0) - p.mean) / se
        square = (x - p.mean).square()
        assert ((square.mean(0) - p.variance).abs() <= 4.5 * square.std(0) / n**0.5).all()


@every
def test_the_gradient_reaches_every_parameter_and_output(name: str) -> None:
    likelihood, x = fitted(name)
    params = outputs(likelihood, len(x)).requires_grad_()
    value = likelihood(params).log_prob(x)
    assert value.shape == (len(x),)
    leaves = [params, *likelihood.parameters()]
    for gradient in torch.autograd.grad(value.sum(), leaves):
        assert gradient.isfinite().all()
        assert (gradient != 0).any()
    assert (torch.autograd.grad(likelihood(params).log_prob(x).sum(), params)[0] != 0).any(0).all()


@every
def test_single_precision_agrees_with_double(name: str) -> None:
    likelihood, x = fitted(name)
    params = outputs(likelihood, len(x))
    wide = likelihood(params).log_prob(x)
    narrow = copy.deepcopy(likelihood).float()(params.float()).log_prob(x.float())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=2e-4, atol=2e-4)


@every
def test_leading_dimensions_and_vmap(name: str) -> None:
    likelihood, x = fitted(name)
    params = outputs(likelihood, 4, len(x))
    each = torch.stack([likelihood(row).log_prob(x) for row in params])
    torch.testing.assert_close(likelihood(params).log_prob(x), each)
    torch.testing.assert_close(torch.func.vmap(lambda row: likelihood(row).log_prob(x))(params), each)
    missing = torch.rand_like(x) < 0.3
    p = lambda row: likelihood.incomplete(likelihood(row), missing).log_prob(torch.where(missing, torch.nan, x))
    torch.testing.assert_close(torch.func.vmap(p)(params), torch.stack([p(row) for row in params]))
    few = params[:, :1]
    torch.testing.assert_close(likelihood(few).log_prob(x), likelihood(few).expand((4, len(x))).log_prob(x))


@pytest.mark.parametrize("shape", [(8, 8), (2, 4, 4), ()])
@pytest.mark.parametrize("name", [n for n in CASES if n != "mixed"])
def test_images_and_numbers(name: str, shape: tuple[int, ...]) -> None:
    if "multinomial" in name and not shape:
        pytest.skip("one number is no row of counts")
    likelihood, x = fitted(name, shape)
    p = likelihood(outputs(likelihood, len(x)))
    assert p.event_shape == shape
    assert p.sample().shape == x.shape
    assert p.log_prob(x).isfinite().all()
    assert likelihood.centre(p).shape == x.shape
    assert likelihood.features(x).shape == (len(x), *likelihood.feature_shape)
    likelihood.check(x)


@every
def test_no_outlier_of_the_latent_overflows(name: str) -> None:
    likelihood, x = fitted(name, dtype=torch.float32)
    for size in (30.0, 1e3, 1e6):
        params = (size * outputs(likelihood, len(x), dtype=torch.float32)).requires_grad_()
        p = likelihood(params)
        value = p.log_prob(x)
        (gradient,) = torch.autograd.grad(value.sum(), params)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        assert p.sample().isfinite().all()


# -- holes -----------------------------------------------------------------------------------------------------------------


SEPARATE = [n for n in CASES if not any(word in n for word in ("mixed", "shared", "learned", "dirichlet"))]


@pytest.mark.parametrize("name", SEPARATE)
def test_a_hole_is_as_good_as_a_column_less(name: str) -> None:
    build, data = CASES[name]
    x = data(50, (3,)).to(F64)
    whole, less = build((3,)).to(F64), build((2,)).to(F64)
    whole.adapt(x)
    less.adapt(x[:, :2])
    params = outputs(whole, len(x))
    k = whole.param_dim // 3
    fewer = params.reshape(-1, k, 3)[..., :2].reshape(len(x), -1)
    holed = x.clone()
    holed[:, 2] = torch.nan
    whole.check(holed)
    p = whole.incomplete(whole(params), holed.isnan())
    torch.testing.assert_close(p.log_prob(holed), less(fewer).log_prob(x[:, :2]))
    draw = p.sample()
    assert draw[:, 2].isnan().all()
    assert draw[:, :2].isfinite().all()
    gradient = torch.autograd.grad(
        whole.incomplete(whole(params.requires_grad_()), holed.isnan()).log_prob(holed).sum(), params
    )
    assert (gradient[0].reshape(-1, k, 3)[..., 2] == 0).all()


@every
def test_constants_are_those_of_what_is_there(name: str) -> None:
    build, data = CASES[name]
    shape = (width(name),)
    x = data(50, shape).to(F64)
    gap = torch.full((7, *shape), torch.nan, dtype=F64)
    one, other = build(shape).to(F64), build(shape).to(F64)
    one.adapt(x)
    other.adapt(torch.cat([gap[:3], x, gap[3:]]))
    for (key, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


@every
@pytest.mark.parametrize("what", ["constant", "one row", "nothing there", "one column missing"])
def test_poor_data_leave_a_proper_density(name: str, what: str) -> None:
    build, data = CASES[name]
    x = data(12, (width(name),))
    if what == "constant":
        x = x[:1].expand(12, -1).clone()
    elif what == "one row":
        x = x[:1]
    else:
        x[:, 0 if what == "one column missing" else slice(None)] = torch.nan
    likelihood = build((width(name),))
    likelihood.adapt(x)
    assert all(buffer.isfinite().all() for buffer in likelihood.buffers())
    p = likelihood(outputs(likelihood, len(x), dtype=torch.float32))
    draw = p.sample()
    likelihood.check(draw)
    assert p.log_prob(draw).isfinite().all()
    missing = x.isnan()
    assert likelihood.incomplete(p, missing).log_prob(x).isfinite().all()
    assert likelihood.features(x).isnan().any() == missing.any()


@alone
def test_output_zero_is_a_fit_of_the_marginal(name: str) -> None:
    build, data = CASES[name]
    x = data(4000, (3,)).to(F64)
    likelihood = build((3,)).to(F64)
    likelihood.adapt(x)
    p = likelihood(torch.zeros(1, likelihood.param_dim, dtype=F64))
    if name not in ("bernoulli", "continuous_bernoulli"):
        assert ((p.mean - x.mean(0)).abs() < 0.4 * x.std(0)).all()
        assert ((p.variance.sqrt() / x.std(0)).log().abs() < math.log(2.5)).all()


@every
def test_the_state_holds_the_constants(name: str) -> None:
    likelihood, x = fitted(name)
    again = CASES[name][0]((width(name),)).to(F64)
    again.load_state_dict(likelihood.state_dict())
    params = outputs(likelihood, len(x))
    for other in (again, copy.deepcopy(likelihood)):
        assert torch.equal(other(params).log_prob(x), likelihood(params).log_prob(x))


# -- exposure --------------------------------------------------------------------------------------------------------------


@counted
def test_exposure_multiplies_the_mean(name: str) -> None:
    likelihood, x = fitted(name)
    assert likelihood.takes_exposure
    params, exposure = outputs(likelihood, len(x)), 0.5 + torch.rand(len(x), dtype=F64)
    p = likelihood(params, exposure)
    torch.testing.assert_close(p.mean, exposure[:, None] * likelihood(params).mean)
    few = params[:4, None]
    torch.testing.assert_close(likelihood(few, exposure).mean, exposure[:, None] * likelihood(few).mean)
    plain, exposed = CASES[name][0]((3,)).to(F64), CASES[name][0]((3,)).to(F64)
    plain.adapt(x)
    exposed.adapt(x, torch.full((len(x),), 4.0, dtype=F64))
    torch.testing.assert_close(exposed.log_mean, plain.log_mean - math.log(4))


def test_mixed_gives_the_exposure_to_its_counts() -> None:
    likelihood, x = fitted("mixed")
    params = outputs(likelihood, len(x))
    ratio = likelihood(params, torch.full((len(x),), 3.0, dtype=F64)).mean / likelihood(params).mean
    expected = torch.tensor([3.0 if c.kind == "count" else 1.0 for c in COLUMNS], dtype=F64)
    torch.testing.assert_close(ratio, expected.expand_as(ratio))


# -- refusals --------------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, float, str]] = [
    ("bernoulli", 0.5, "needs 0 or 1, found 0.5 at row 1, column 2"),
    ("beta", 1.0, "strictly between 0 and 1"),
    ("beta", 7.5, "log_normal or gamma"),
    ("beta_binomial", 9.0, "total_count = 9"),
    ("dirichlet_multinomial", 0.5, "dirichlet_multinomial needs whole numbers >= 0"),
    ("zero_one_inflated_beta", 1.5, "values from 0 to 1, found 1.5"),
    ("binomial", 9.0, "total_count = 9"),
    ("binomial", -1.0, "gaussian"),
    ("categorical", 5.0, "categories = 6"),
    ("categorical", 1.5, "log_normal"),
    ("continuous_bernoulli", 1.5, r"\[0, 1\]"),
    ("discretized_logistic", 7.0, "values = 8"),
    ("gamma", -3.0, "values > 0, found -3 at row 1, column 2 .1 such entries.: use model.likelihood = gaussian"),
    ("gamma", 0.0, "values > 0, found 0"),
    ("log_normal", -3.0, "gaussian"),
    ("multinomial", -2.0, "gaussian"),
    ("negative_binomial", 2.5, "whole numbers >= 0, found 2.5"),
    ("ordinal", 6.0, "categories = 7"),
    ("poisson", -17.0, "poisson needs whole numbers >= 0, found -17 at row 1, column 2 .*use model.likelihood = gaussian"),
    ("poisson", 0.5, "found 0.5"),
    ("zero_inflated_negative_binomial", -1.0, "gaussian"),
    ("zero_inflated_poisson", -1.0, "gaussian"),
]


@pytest.mark.parametrize(("name", "value", "words"), REFUSED)
def test_data_outside_are_refused_with_what_would_take_them(name: str, value: float, words: str) -> None:
    likelihood, x = fitted(name)
    likelihood.check(x)
    x = x.clamp_min(1) if name in ("categorical", "gamma") else x
    x[1, 2] = value
    with pytest.raises(DataError, match=words):
        likelihood.check(x)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Binomial((3,), None), "total_count: .*give the number"),
        (lambda: Categorical((3,), None), "categories: .*give the number"),
        (lambda: Ordinal((3,), None), "categories: .*give the number"),
        (lambda: DiscretizedLogistic((3,), None), "values: .*give the number"),
        (lambda: Mixed((3,), None), "mixed: needs a table"),
        (lambda: Mixed((8,), COLUMNS, override={"hight": "laplace"}), "no column 'hight'; did you mean 'height'"),
        (lambda: Mixed((8,), COLUMNS, override={"height": "laplac"}), "override.height: .*'laplac'; did you mean 'laplace'"),
        (lambda: Mixed((8,), COLUMNS, override={"height": "multinomial"}), "override.height: .*'multinomial'"),
        (lambda: Mixed((8,), COLUMNS, override={"visits": "binomial"}), "override.visits: binomial needs a column of codes"),
        *(
            (
                lambda name=name: Mixed((1,), (Column("city", "categorical", 3),), override={"city": name}),
                f"override.city: {name} is for",
            )
            for name in ("poisson", "gaussian", "ordinal")
        ),
    ],
)
def test_options_without_sense_are_refused(build: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_options_win_over_the_levels_of_the_data() -> None:
    assert Binomial((3,), 4, total_count=10).total_count == 10
    assert Binomial((3,), None, total_count=10).total_count == 10
    assert Categorical((3,), 4, categories=7).param_dim == 21
    assert DiscretizedLogistic((3,), None, values=256).values == 256


# -- on the grid and in training ----------------------------------------------------------------------------------------------

PLAIN = (
    "beta_binomial",
    "dirichlet_multinomial",
    "zero_one",
    "discretized_logistic",
    "laplace",
    "student_t",
    "zero_inflated",
    "negative_binomial decoder",
)


@every
@pytest.mark.parametrize("holes", [False, True])
def test_shared_points_are_evaluated_exactly(name: str, holes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    likelihood, x = fitted(name)
    p = likelihood(outputs(likelihood, 7, 1))
    if holes:
        missing = torch.rand_like(x) < 0.3
        x = torch.where(missing, torch.nan, x)
        p = likelihood.incomplete(p, missing)
    p = p.expand((7, len(x)))
    plain = p.log_prob(x)
    factorises = not name.startswith(PLAIN) and not (holes and name == "multinomial")
    if factorises:
        for kind in (dist.Independent, Incomplete, Composition, Columns):
            monkeypatch.setattr(kind, "log_prob", None)  # no other way than the product
    total = Bilinear() + shared_log_prob(p, x)
    assert (total.rest is None) == factorises
    torch.testing.assert_close(total.dense(len(x)), plain, rtol=1e-9, atol=1e-9)


def _vae(likelihood: Likelihood, marks: bool) -> VAE:
    q = DiagonalNormal(2)
    (seen,) = likelihood.feature_shape
    encoder = Linear((seen * (1 + marks),), q.param_dim)
    return VAE(Normal(2), likelihood, Linear((2,), likelihood.param_dim), AmortizedGuide(encoder, q, marks=marks)).double()


@every
@pytest.mark.parametrize("holes", [False, True])
def test_the_seam_and_training(name: str, holes: bool) -> None:
    likelihood, x = fitted(name)
    if holes:
        x = torch.where(torch.rand_like(x) < 0.3, torch.nan, x)
    vae = _vae(likelihood, holes)
    vae.adapt(x)
    log_joint = LogJoint(vae.model, vae.guide, x)
    z = torch.randn(5, 2, dtype=F64)
    p = likelihood(vae.decoder(z)[:, None])
    p = likelihood.incomplete(p, x.isnan()) if holes else p
    expected = p.log_prob(x) + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)[:, None]
    torch.testing.assert_close(log_joint(z[:, None].expand(-1, len(x), -1)), expected)
    torch.testing.assert_close(log_joint.shared(z), expected, rtol=1e-9, atol=1e-9)
    assert log_joint.shares
    assert log_joint.mode == "vmap"
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.04)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = Trace_ELBO(num_particles=2, vectorize_particles=False).differentiable_loss(vae.model, vae.guide, x)
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
        optimizer.step()
    assert sum(losses[-10:]) < sum(losses[:10])
    pyro.clear_param_store()
    assert vae.model(n=3).shape == (3, width(name))


@pytest.mark.parametrize("name", ["poisson", "zero_inflated_negative_binomial", "mixed"])
@pytest.mark.parametrize("holes", [False, True])
def test_exposure_reaches_the_seam(name: str, holes: bool) -> None:
    likelihood, x = fitted(name)
    x = torch.where(torch.rand_like(x) < 0.3, torch.nan, x) if holes else x
    exposure = 0.5 + torch.rand(len(x), dtype=F64)
    q = DiagonalNormal(2)
    encoder = Linear((likelihood.feature_shape[0] + 1,), q.param_dim)
    vae = VAE(Normal(2), likelihood, Linear((2,), likelihood.param_dim), AmortizedGuide(encoder, q)).double()
    log_joint = LogJoint(vae.model, vae.guide, x, exposure=exposure)
    z = torch.randn(5, 2, dtype=F64)
    p = likelihood(vae.decoder(z)[:, None], exposure)
    p = likelihood.incomplete(p, x.isnan()) if holes else p
    expected = p.log_prob(x) + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)[:, None]
    torch.testing.assert_close(log_joint(z[:, None].expand(-1, len(x), -1)), expected)
    torch.testing.assert_close(log_joint.shared(z), expected, rtol=1e-9, atol=1e-9)
    assert log_joint.shares
