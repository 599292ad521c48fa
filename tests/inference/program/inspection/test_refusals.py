"""Every form of program that per-datum inference does not apply to is refused by name and reason, in one line."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from support.cases.pairs import normal_guide, normal_model

from elbowroom.analysis.audit.auditor import audit
from elbowroom.errors import UnsupportedProgram, UserError
from elbowroom.inference.target.log_joint import LogJoint

X = torch.tensor([-1.3, 0.2, 0.9, 2.5], dtype=torch.float64)


def sequential(y):
    for i in pyro.plate("rows", len(y)):
        pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))


def no_plate(y):
    pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0).to_event(1))


def auxiliary(y):
    with pyro.plate("rows", len(y)):
        e = pyro.sample("noise", dist.Normal(torch.zeros_like(y), 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(e, 1.0))


def with_global(y):
    pyro.sample("w", dist.Normal(0.0, 1.0))
    normal_model(y)


def discrete_inside(y):
    with pyro.plate("rows", len(y), dim=-2):
        pyro.sample("z", dist.Normal(torch.zeros_like(y)[:, None], 1.0))
        with pyro.plate("items", 3, dim=-1):
            pyro.sample("label", dist.Poisson(torch.tensor(0.5)))


def discrete_inside_guide(y):
    with pyro.plate("rows", len(y), dim=-2):
        pyro.sample("z", dist.Normal(torch.zeros_like(y)[:, None], 1.0))


def countable(y):
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))
        pyro.sample("k", dist.Poisson(torch.ones_like(y)))


def delta_guide(y):
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Delta(torch.zeros_like(y)))


def positive_model(y):
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Exponential(torch.ones_like(y)))


def positive_guide(y):
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Uniform(torch.zeros_like(y), 5.0))


def empty_guide(y):
    with pyro.plate("rows", len(y)):
        pass


def outside_guide(y):
    pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0).to_event(1))


def coupled(y):
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))
        pyro.sample("y", dist.Normal(z - z.mean(), 0.5), obs=y)


def observed_outside(y):
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)
    pyro.sample("total", dist.Normal(z.sum(), 1.0), obs=y.sum())


def random_inside(y):
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))
        pyro.sample("y", dist.Normal(z + torch.randn(len(y)), 0.5), obs=y)


def masked_guide(y):
    with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=y > 0):
        pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))


class _HalfSphere(torch.distributions.constraints.Constraint):
    event_dim = 1

    def check(self, value):
        return torch.ones(value.shape[:-1], dtype=torch.bool)


class Nowhere(dist.ProjectedNormal):
    """A distribution whose support is a set that nobody has a map onto."""

    support = _HalfSphere()


def strange_model(y):
    with pyro.plate("rows", len(y)):
        pyro.sample("z", Nowhere(torch.ones(len(y), 3)))


def strange_guide(y):
    strange_model(y)


def moving_support(y):
    with pyro.plate("rows", len(y)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        pyro.sample("z", dist.Uniform(torch.zeros_like(y), 1.0 + k))


def partner(y):
    """Datum 2 reads the latent of datum 1; datum 0 is on its own."""
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))
        pyro.sample("y", dist.Normal(z[torch.tensor([0, 1, 1, 3])], 0.5), obs=y)


def no_latent(y):
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(torch.zeros_like(y), 0.5), obs=y)


def masked_class(y):
    with pyro.plate("rows", len(y)):
        with pyro.poutine.mask(mask=torch.arange(len(y)) > 0):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(c, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


REFUSALS = {
    "sequential plate": (sequential, sequential, r"plate 'rows' is sequential \(a Python loop; site 'z0'\): open it as a"),
    "no plate": (no_plate, no_plate, r"no plate holds a latent site \('z'\); one datum cannot be told from the next"),
    "auxiliary guide site": (normal_model, auxiliary, r"guide site 'noise' is not a latent of the model, and no site of"),
    "global latent not in the guide": (with_global, normal_guide, r"global latent 'w' is not drawn by the guide"),
    "discrete in an inner plate": (
        discrete_inside,
        discrete_inside_guide,
        r"discrete site 'label' \(Poisson\) has no finite list of values",
    ),
    "discrete without end": (countable, normal_guide, r"discrete site 'k' \(Poisson\) has no finite list of values"),
    "point mass": (normal_model, delta_guide, r"guide site 'z' is a point mass .* no density.*AutoLaplaceApproximation"),
    "support escaped": (positive_model, normal_guide, r"site 'z': the guide drew values outside the prior's support"),
    "support narrower": (positive_model, positive_guide, r"guide support Interval, prior support Positive; wrap"),
    "latent missing in the guide": (normal_model, empty_guide, r"guide: it has no site 'z'"),
    "guide site outside the plate": (normal_model, outside_guide, r"guide site 'z' lies outside plate 'rows'"),
    "coupled data": (coupled, normal_guide, r"moving the latents of some data changes log p of others"),
    "observed site outside": (observed_outside, normal_guide, r"an observed site outside plate 'rows' depends on the local"),
    "not deterministic": (random_inside, normal_guide, r"its log density changes between two evaluations at the same z"),
    "mask in the guide only": (normal_model, masked_guide, r"site 'z' is masked differently in model and guide"),
    "support without a transform": (strange_model, strange_guide, r"site 'z': no transform onto the support of Nowhere"),
    "support moved by a discrete site": (moving_support, moving_support, r"its support depends on other sites"),
    "masked discrete site": (masked_class, normal_guide, r"discrete site 'c' is masked out of some data"),
    "coupled elsewhere": (partner, normal_guide, r"moving the latents of some data changes log p of others"),
    "no latent": (no_latent, empty_guide, r"it has no latent sample site"),
}


@pytest.mark.parametrize("case", list(REFUSALS))
@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_refusals_name_site_and_reason(case: str) -> None:
    model, guide, message = REFUSALS[case]
    with pytest.raises(UnsupportedProgram, match=message) as caught:
        LogJoint(model, guide, X.float())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", [autoguide.AutoMultivariateNormal, autoguide.AutoIAFNormal])
def test_auto_guides_that_couple_the_data_are_refused(family: type) -> None:
    guide = family(normal_model)
    guide(X.float())
    if family is autoguide.AutoMultivariateNormal:
        guide.scale_tril = torch.eye(len(X)) + 0.1 * torch.ones(len(X), len(X)).tril(-1)
    with pytest.raises(UnsupportedProgram, match=f"_{family.__name__}_latent' joins all data into one vector.*AutoNormal"):
        LogJoint(normal_model, guide, X.float())


def test_a_plate_that_does_not_exist_is_named() -> None:
    with pytest.raises(UnsupportedProgram, match=r"plate='row': the model has no such plate; it has \['rows'\]"):
        LogJoint(normal_model, normal_guide, X.float(), plate="row")


def test_a_reference_that_cannot_be_used_says_why() -> None:
    with pytest.raises(UserError, match="closed_form needs a VAE with normal prior"):
        audit(normal_model, normal_guide, X.float(), references=["closed_form"])
    with pytest.raises(UserError, match="unknown reference 'gird'"):
        audit(normal_model, normal_guide, X.float(), references=["gird"])


def test_no_data_are_refused():
    with pytest.raises(UnsupportedProgram, match="a plate is empty; is there no row of data"):
        LogJoint(normal_model, normal_guide, X[:0])


@pytest.mark.parametrize(
    ("fn", "value", "said"),
    [
        (dist.Gamma(2.0, 1.0), 0.0, "-inf at the observed value 0$"),
        (dist.Gamma(0.5, 1.0), 0.0, "inf at the observed value 0$"),
        (dist.Dirichlet(torch.tensor([2.0, 2.0])), [1.0, 0.0], "-inf at the observed value$"),
    ],
)
def test_a_density_of_zero_or_infinity_within_the_support_is_named(fn, value, said) -> None:
    """At the border of a support a value may be allowed and have no probability."""
    y = torch.tensor([[0.5, 0.5], [0.5, 0.5], value]) if fn.event_dim else torch.tensor([1.0, 2.0, value])

    def model(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", fn.expand([len(y)]), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))

    with pytest.raises(UnsupportedProgram, match=f"of datum 2 is not finite .*: the log density of site 'y' is {said}"):
        LogJoint(model, guide, y)


@pytest.mark.parametrize("dim", [-1, -2])
def test_the_value_that_is_named_is_of_the_datum_that_is_named(dim: int) -> None:
    """Entry 3 of datum 2 is to blame: its entry 1 is masked, and entry 0 of datum 3 comes first where data stand last."""
    y = torch.ones(5, 4)
    y[2, 1], y[2, 3], y[3, 0] = 0.0, 0.0, 0.0
    seen = torch.ones(5, 4, dtype=torch.bool)
    seen[2, 1] = False
    rates = torch.tensor([0.5, 0.5, 2.0, 2.0]).expand(5, 4)  # densities of zero are infinite, infinite, 0, 0

    def model(y, seen, rates):
        columns = y if dim == -2 else y.T
        with pyro.plate("rows", len(y), dim=dim):
            z = pyro.sample("z", dist.Normal(torch.zeros(5, 1) if dim == -2 else torch.zeros(5), 1.0))
            with pyro.plate("columns", 4, dim=-3 - dim), pyro.poutine.mask(mask=seen if dim == -2 else seen.T):
                pyro.sample("y", dist.Gamma(rates if dim == -2 else rates.T, z.exp()), obs=columns)

    def guide(y, seen, rates):
        with pyro.plate("rows", len(y), dim=dim):
            pyro.sample("z", dist.Normal(torch.zeros(5, 1) if dim == -2 else torch.zeros(5), 1.0))

    with pytest.raises(
        UnsupportedProgram, match=r"of datum 2 is not finite .*: the log density of site 'y' is -inf at the obs"
    ):
        LogJoint(model, guide, y, seen, rates)
    y[2, 3] = 1.0
    with pytest.raises(UnsupportedProgram, match=r"of datum 3 is not finite .*site 'y' is inf at the observed value 0$"):
        LogJoint(model, guide, y, seen, rates)
    y[3, 0] = 1.0
    assert LogJoint(model, guide, y, seen, rates).n_obs == 5  # what is masked is not to blame
