"""Rows of sub-sampled plates, global discrete latents, missing event dimensions and undeclared supports of foreign programs."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from elbowroom.analysis.audit.auditor import audit
from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.program.sites import support_of
from elbowroom.inference.target.log_joint import LogJoint

F64 = torch.float64
X = torch.tensor([-1.3, 0.2, 0.9, 2.5], dtype=F64)
NORMAL = dist.Normal(torch.zeros((), dtype=F64), math.sqrt(2))


def model(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


# -- rows of a plate


@pytest.mark.parametrize("guides", ["drawn", "all of another plate", "the same"])
def test_rows_given_to_the_model_are_not_replaced_by_those_of_the_guide(guides: str) -> None:
    everything = 3 * torch.randn(200, dtype=F64)
    rows = torch.tensor([5, 17, 60, 133, 180])

    def of_rows(rows):
        with pyro.plate("data", 200, subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(rows), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=everything[rows])

    def guide_of_rows(rows):
        plate = {
            "drawn": lambda: pyro.plate("data", 200, subsample_size=len(rows)),
            "all of another plate": lambda: pyro.plate("data", len(rows)),
            "the same": lambda: pyro.plate("data", 200, subsample=rows),
        }[guides]()
        with plate as index:
            pyro.sample("z", dist.Normal(everything[index] / 2, math.sqrt(0.5)))

    if guides == "the same":
        found = audit(of_rows, guide_of_rows, rows, diagnose=False)
        np.testing.assert_allclose(found.table["log_evidence"].values, NORMAL.log_prob(everything[rows]).numpy(), atol=1e-6)
        assert abs(found.table["gap_total"]).max() < 1e-6
    else:
        with pytest.raises(UnsupportedProgram, match="plate 'data': the model is given its rows"):
            LogJoint(of_rows, guide_of_rows, rows)


def test_the_same_plate_of_two_sizes_is_refused() -> None:
    def longer(x):
        with pyro.plate("rows", len(x) + 1):
            pyro.sample("z", dist.Normal(torch.zeros(len(x) + 1, dtype=F64), 1.0))

    def flexible(x):
        with pyro.plate("rows", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., :1], 1.0), obs=x)

    with pytest.raises(UnsupportedProgram, match=r"plate 'rows'.* 4 .* 5 "):
        LogJoint(flexible, longer, X)


@pytest.mark.parametrize("most", [3, 4, 6, 20])
def test_a_plate_of_at_most_so_many_rows(most: int) -> None:
    """`subsample_size=min(B, len(x))`: the refits and the calibration stack rows, of which the program would take B."""

    def program(x, *, prior):
        with pyro.plate("rows", len(x), subsample_size=min(most, len(x))) as index:
            loc = torch.zeros_like(x[index]) if prior else x[index] / 2
            z = pyro.sample("z", dist.Normal(loc[:, None].expand(-1, 4), 1.0 if prior else math.sqrt(0.5)).to_event(1))
            if prior:
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[index][:, None].expand(-1, 4))

    pair = (lambda x: program(x, prior=True)), (lambda x: program(x, prior=False))
    found = audit(*pair, X, references=["importance"])
    assert found.table.sizes["obs_id"] == min(most, 4)
    rows = LogJoint(*pair, X).program.index.get("rows", torch.arange(4))
    np.testing.assert_allclose(found.table["log_evidence"].values, 4 * NORMAL.log_prob(X[rows]).numpy(), atol=0.05)
    np.testing.assert_allclose(found.table["elbo"].values, 4 * NORMAL.log_prob(X[rows]).numpy(), atol=1e-6)
    assert not LogJoint(*pair, X).separable()


# -- global discrete latents


@pytest.mark.parametrize("kind", ["Categorical", "Bernoulli", "OneHotCategorical", "Bernoulli.to_event", "Poisson"])
def test_a_global_discrete_latent_is_held_at_the_guides_mode(kind: str) -> None:
    odds = torch.tensor([0.02, 0.98], dtype=F64)
    made = {
        "Categorical": lambda p: dist.Categorical(p),
        "Bernoulli": lambda p: dist.Bernoulli(p[1]),
        "OneHotCategorical": lambda p: dist.OneHotCategorical(p),
        "Bernoulli.to_event": lambda p: dist.Bernoulli(p).to_event(1),
        "Poisson": lambda p: dist.Poisson(p[1]),
    }[kind]

    def with_regime(x):
        k = pyro.sample("regime", made(torch.full((2,), 0.5, dtype=F64))).to(F64)
        sd = 0.5 + 1.5 * (k[..., 1] if k.dim() else k)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), sd))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def with_regime_guide(x):
        pyro.sample("regime", made(odds))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, math.sqrt(0.8)))

    found = audit(with_regime, with_regime_guide, X, diagnose=False)
    expected = dist.Normal(torch.zeros((), dtype=F64), math.sqrt(5)).log_prob(X)
    np.testing.assert_allclose(found.table["log_evidence"].values, expected.numpy(), atol=1e-6)
    word = "median" if kind == "Poisson" else "mode"
    assert f"global latent 'regime' is held at the guide's {word}" in found.table.attrs["notes"]


# -- event dimensions


@pytest.mark.parametrize(("n", "d"), [(6, 3), (4, 4)])
@pytest.mark.parametrize("where", ["latent", "guide", "observed"])
def test_a_missing_to_event_is_named(n: int, d: int, where: str) -> None:
    """With as many values per datum as data Pyro does not notice: the plate's dimension would be that of the values."""

    def declared(fn, site):
        return fn if site == where else fn.to_event(1)

    def wide(x):
        with pyro.plate("rows", n):
            z = pyro.sample("z", declared(dist.Normal(torch.zeros(n, d), 1.0), "latent"))
            pyro.sample("x", declared(dist.Normal(z, 1.0), "observed"), obs=x)

    def wide_guide(x):
        with pyro.plate("rows", n):
            fn = dist.Normal(x / 2, 0.7)
            pyro.sample("z", fn if where in ("guide", "latent") else fn.to_event(1))

    with pytest.raises(UnsupportedProgram, match=r"site '[zx]' has \d entries in dimension -\d.*to_event\(1\)") as refused:
        LogJoint(wide, wide_guide, torch.randn(n, d))
    assert "\n" not in str(refused.value)


# -- supports


class Undeclared(dist.TorchDistribution):
    """A distribution without a support, as Pyro's wrapper of Zuko's flows."""

    arg_constraints: dict = {}

    def __init__(self, loc: Tensor) -> None:
        self.base = dist.Normal(loc, 0.7)
        super().__init__(loc.shape, validate_args=False)

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008 - torch's own signature
        return self.base.rsample(sample_shape)

    def log_prob(self, value):
        return self.base.log_prob(value)

    def expand(self, batch_shape, _instance=None):
        return Undeclared(self.base.loc.expand(batch_shape))


def test_a_guide_without_a_support_has_the_priors() -> None:
    def undeclared(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", Undeclared(x / 2))

    found = audit(model, undeclared, X, diagnose=False)
    expected = audit(model, guide, X, diagnose=False)
    for name in ("log_evidence", "elbo"):
        np.testing.assert_allclose(found.table[name].values, expected.table[name].values, atol=1e-6)

    def prior_undeclared(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", Undeclared(0 * x)), 1.0), obs=x)

    with pytest.raises(UnsupportedProgram, match="site 'z': Undeclared declares no support"):
        LogJoint(prior_undeclared, guide, X)


@pytest.mark.slow
def test_a_guide_through_sigmoid_and_affine_lives_on_the_interval() -> None:
    def on_interval(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.zeros((), dtype=F64), 2.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def through(x):
        with pyro.plate("rows", len(x)):
            base = dist.Normal(torch.zeros_like(x), 1.0)
            parts = [transforms.SigmoidTransform(), transforms.AffineTransform(0.0, 2.0)]
            pyro.sample("z", dist.TransformedDistribution(base, parts))

    found = audit(on_interval, through, X, diagnose=False)
    unit = dist.Normal(torch.zeros((), dtype=F64), 1.0)
    expected = (unit.cdf((2 - X) / 0.5) - unit.cdf(-X / 0.5)).log() - math.log(2)
    np.testing.assert_allclose(found.table["log_evidence"].values, expected.numpy(), atol=1e-6)
    assert (found.table["gap_total"] > 0).all()


SIGMOID, EXP = transforms.SigmoidTransform(), transforms.ExpTransform()
AFFINE, TO_INTERVAL = transforms.AffineTransform, torch.distributions.biject_to(constraints.interval(2.0, 5.0))
COMPOSED = [
    (dist.Normal(0.0, 1.0), [SIGMOID, AFFINE(0, 2)], (0, 2)),
    (dist.Normal(0.0, 1.0), [SIGMOID, AFFINE(1.0, -3.0)], (-2, 1)),
    (dist.Normal(0.0, 1.0), [transforms.ComposeTransform([SIGMOID, AFFINE(0, 2)]), EXP], (1, math.exp(2))),
    (dist.Normal(0.0, 1.0), [EXP, AFFINE(3, 1)], (3, None)),
    (dist.Normal(0.0, 1.0), [EXP, AFFINE(3, -1)], (None, 3)),
    (dist.Normal(0.0, 1.0), [EXP, AFFINE(0, 1)], (0, None)),
    (dist.Normal(0.0, 1.0), [EXP, AFFINE(0, 5)], (0, None)),
    (dist.Normal(0.0, 1.0), [AFFINE(0, 2)], (None, None)),
    (dist.Uniform(-1.0, 1.0), [AFFINE(0, 2)], (-2, 2)),
    (dist.Gamma(2.0, 1.0), [EXP], (1, None)),
    (dist.Beta(2.0, 2.0), [AFFINE(torch.tensor(1.0), torch.tensor(4.0))], (1, 5)),
    (dist.Normal(torch.zeros(2), 1.0).to_event(1), [SIGMOID, AFFINE(0, 2)], (0, 2)),
    (dist.Normal(0.0, 1.0), [TO_INTERVAL], (2, 5)),
    (dist.Normal(0.0, 1.0), [TO_INTERVAL.inv.inv, AFFINE(0.0, 1.0)], (2, 5)),
]


@pytest.mark.parametrize(("base", "parts", "ends"), COMPOSED)
def test_the_support_of_composed_transforms(base, parts, ends) -> None:
    """The image of the base's support, not the codomain of the last transform; draws lie in it and come near its ends."""
    fn = dist.TransformedDistribution(base, parts)
    support = support_of(fn)
    draws = fn.sample(torch.Size([4000]))
    assert support.check(draws).all()
    assert support.event_dim == len(fn.event_shape)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    found = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    for mine, end in zip(found, ends, strict=True):
        assert (mine is None) == (end is None)
        assert end is None or float(mine) == pytest.approx(end)


@pytest.mark.parametrize("flow", [transforms.Planar, transforms.Radial])
def test_a_flow_without_an_inverse_is_refused_in_one_line(flow) -> None:
    torch.manual_seed(0)
    x, transform = torch.randn(6, 2), flow(2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(x / 2, 0.7).to_event(1), [transform]))

    with pytest.raises(UnsupportedProgram, match="a flow must have an inverse") as refused:
        LogJoint(model, guide, x)
    assert "\n" not in str(refused.value)
