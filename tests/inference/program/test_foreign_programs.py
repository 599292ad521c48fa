"""The log joint and the audit on Pyro programs that know nothing of Elbowroom, against grids written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from elbowroom.analysis.audit.auditor import audit
from elbowroom.analysis.verdict.summary import summary
from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.target.log_joint import LogJoint

F64 = torch.float64


def trapezoid(log_density: Callable[..., Tensor], *axes: Tensor) -> Tensor:
    """log of the integral of exp(log_density) over a product of equidistant axes."""
    values = log_density(*torch.meshgrid(*axes, indexing="ij"))
    volume = math.prod((axis[1] - axis[0]).item() for axis in axes)
    return torch.logsumexp(values.flatten(), 0) + math.log(volume)


def check(result, expected: Tensor, atol: float = 1e-6) -> None:
    table = result.table
    assert set(table["status"].values.flatten()) == {"exact"}, set(table["reason"].values.flatten())
    torch.testing.assert_close(torch.tensor(table["log_evidence"].values), expected, atol=atol, rtol=0)
    assert (table["gap_total"] > -3 * table["elbo_se"]).all()


X = torch.tensor([-1.3, 0.2, 0.9, 2.5], dtype=F64)


def test_two_sites_in_a_hierarchy() -> None:
    def model(y):
        with pyro.plate("rows", len(y)):
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            low = pyro.sample("low", dist.Normal(torch.tanh(top), 0.5))
            pyro.sample("y", dist.Normal(low**2, 0.7), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            top = pyro.sample("top", dist.Normal(0.1 * y, 1.0))
            pyro.sample("low", dist.Normal(0.5 * top, 0.8))

    axis = torch.linspace(-7, 7, 1401, dtype=F64)
    expected = [
        trapezoid(
            lambda a, b, y=y: (
                dist.Normal(0.0, 1.0).log_prob(a)
                + dist.Normal(torch.tanh(a), 0.5).log_prob(b)
                + dist.Normal(b**2, 0.7).log_prob(y)
            ),
            axis,
            axis,
        )
        for y in X
    ]
    result = audit(model, guide, X)
    check(result, torch.stack(expected))
    assert set(result.posteriors["grid"].posterior.data_vars) == {"top", "low"}


def test_a_positive_latent_is_integrated_with_its_jacobian() -> None:
    counts = torch.tensor([0.0, 3.0, 11.0], dtype=F64)

    def model(k):
        with pyro.plate("cells", len(k)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
            pyro.sample("k", dist.Poisson(rate), obs=k)

    def guide(k):
        with pyro.plate("cells", len(k)):
            pyro.sample("rate", dist.LogNormal((k + 2).log() - 0.4, 0.5))

    result = audit(model, guide, counts)
    # gamma-Poisson: negative binomial evidence, gamma posterior
    exact = torch.lgamma(counts + 2) - torch.lgamma(counts + 1) + 2 * math.log(0.5) - (counts + 2) * math.log(1.5)
    check(result, exact)
    draws = result.posteriors["grid"].posterior["rate"].values.reshape(-1, 3)
    mean, sd = ((counts + 2) / 1.5).numpy(), ((counts + 2) / 1.5**2).sqrt().numpy()
    assert (draws > 0).all()
    assert (abs(draws.mean(0) - mean) < 4.5 * sd / len(draws) ** 0.5).all()


def test_a_covariate_needs_no_naming() -> None:
    dose = torch.tensor([0.0, 1.0, -2.0, 0.5], dtype=F64)

    def model(response, dose):
        with pyro.plate("patients", len(response)):
            effect = pyro.sample("effect", dist.Normal(dose, 1.0))
            pyro.sample("response", dist.StudentT(4.0, effect, 0.5), obs=response)

    def guide(response, dose):
        with pyro.plate("patients", len(response)):
            pyro.sample("effect", dist.Normal(0.7 * response + 0.2 * dose, 0.6))

    axis = torch.linspace(-30, 30, 60001, dtype=F64)
    expected = [
        trapezoid(lambda z, y=y, c=c: dist.Normal(c, 1.0).log_prob(z) + dist.StudentT(4.0, z, 0.5).log_prob(y), axis)
        for y, c in zip(X, dose, strict=True)
    ]
    check(audit(model, guide, X, dose), torch.stack(expected))


@pytest.mark.parametrize("way", ["poutine.mask", "obs_mask"])
def test_an_observation_mask_hides_what_it_masks(way: str) -> None:
    y = torch.tensor([[0.4, 5.0], [-1.0, 0.3], [2.0, -7.0]], dtype=F64)
    seen = torch.tensor([[True, False], [True, True], [False, False]])
    weight = torch.tensor([1.5, -0.7], dtype=F64)

    def model(y, seen):
        with pyro.plate("rows", len(y), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0))
            with pyro.plate("columns", 2, dim=-1):
                if way == "obs_mask":
                    pyro.sample("y", dist.Normal(z * weight, 0.5), obs=y, obs_mask=seen)
                else:
                    with pyro.poutine.mask(mask=seen):
                        pyro.sample("y", dist.Normal(z * weight, 0.5), obs=y)

    def guide(y, seen):
        with pyro.plate("rows", len(y), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(len(y), 1, dtype=F64), 0.8))

    axis = torch.linspace(-9, 9, 4001, dtype=F64)
    expected = [
        trapezoid(
            lambda z, row=row, s=s: (
                dist.Normal(0.0, 1.0).log_prob(z)
                + sum(dist.Normal(z * weight[j], 0.5).log_prob(row[j]) for j in range(2) if s[j])
            ),
            axis,
        )
        for row, s in zip(y, seen, strict=True)
    ]
    result = audit(model, guide, y, seen)
    check(result, torch.stack(expected))
    assert abs(result.table["log_evidence"].values[2]) < 1e-6  # a row that was never seen has log p = 0
    if way == "obs_mask":
        assert "y_unobserved" in result.table.attrs["notes"]


def test_a_subsampled_plate_is_unscaled_and_replayed() -> None:
    class Pair(nn.Module):
        def model(self, y):
            with pyro.plate("data", 100, subsample_size=7) as index:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(z, 0.5), obs=y[index])

        def guide(self, y):
            with pyro.plate("data", 100, subsample_size=7) as index:
                pyro.sample("z", dist.Normal(0.8 * y[index], 0.45))

    torch.manual_seed(3)
    y = torch.randn(100, dtype=F64)
    pair = Pair()
    log_joint = LogJoint(pair.model, pair.guide, y)
    index = log_joint.program.index["data"]
    assert log_joint.n_obs == 7
    result = audit(pair.model, pair.guide, y)
    expected = dist.Normal(0.0, math.sqrt(1.25)).log_prob(y[index])
    check(result, expected)
    # N(0.8 y, 0.2) is the posterior; the guide's variance is 0.2025
    kl = 0.5 * (0.2025 / 0.2 - 1 - math.log(0.2025 / 0.2))
    assert abs(result.table["gap_total"] - kl).max() < 5e-4


def test_a_plate_that_is_not_outermost_and_a_latent_with_inner_plate() -> None:
    y = torch.randn(2, 3, dtype=F64)  # 2 replicates inside, 3 data

    def model(y):
        with pyro.plate("replicates", 2, dim=-2), pyro.plate("units", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def guide(y):
        with pyro.plate("replicates", 2, dim=-2), pyro.plate("units", 3, dim=-1):
            pyro.sample("z", dist.Normal(0.7 * y, 0.5))

    with pytest.raises(UnsupportedProgram, match=r"could be any of \['replicates', 'units'\] .*; say which holds the data"):
        LogJoint(model, guide, y)
    log_joint = LogJoint(model, guide, y, plate="units")
    assert (log_joint.n_obs, log_joint.dim) == (3, 2)
    expected = dist.Normal(0.0, math.sqrt(1.25)).log_prob(y).sum(0)
    check(audit(model, guide, y, plate="units"), expected)


def within(y):
    """A place between 0 and a width, which is a latent too."""
    with pyro.plate("rows", len(y)):
        width = pyro.sample("width", dist.Gamma(3.0, 1.0))
        place = pyro.sample("place", dist.Uniform(torch.zeros_like(width), width))
        pyro.sample("y", dist.Normal(place, 0.5), obs=y)


def guide_within(y):
    with pyro.plate("rows", len(y)):
        width = pyro.sample("width", dist.LogNormal(torch.ones_like(y), 0.5))
        pyro.sample("place", dist.Uniform(torch.zeros_like(width), width))


def test_the_density_where_a_support_depends_on_an_earlier_site() -> None:
    """The density of (log width, logit of the share) is that of (width, place) times width x width share (1 - share)."""
    joint = LogJoint(within, guide_within, X[:2])
    assert joint.sites[1].transform is None
    z = joint.probe_points
    width, share = z[..., 0].exp(), z[..., 1].sigmoid()
    of_model = dist.Gamma(3.0, 1.0).log_prob(width) - width.log() + dist.Normal(width * share, 0.5).log_prob(X[:2])
    of_guide = dist.LogNormal(1.0, 0.5).log_prob(width) - width.log()
    jacobian = 2 * width.log() + share.log() + (-share).log1p()
    torch.testing.assert_close(joint(z), of_model + jacobian)
    torch.testing.assert_close(joint.log_guide(z), of_guide + jacobian)


@pytest.mark.slow
def test_a_support_that_depends_on_an_earlier_site() -> None:
    # in (width, share) the integral is over a fixed box
    w = torch.linspace(0, 40, 8001, dtype=F64)[1:]
    s = (torch.arange(400, dtype=F64) + 0.5) / 400
    expected = [
        trapezoid(lambda w, s, y=y: dist.Gamma(3.0, 1.0).log_prob(w) + dist.Normal(w * s, 0.5).log_prob(y), w, s) for y in X[:2]
    ]
    result = audit(within, guide_within, X[:2], references=["grid"], diagnose=False)
    check(result, torch.stack(expected), atol=1e-4)


def test_simplex_latent() -> None:
    counts = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 9.0]], dtype=F64)
    alpha = torch.tensor([1.5, 0.8, 1.0], dtype=F64)

    def model(counts):
        with pyro.plate("documents", len(counts)):
            share = pyro.sample("share", dist.Dirichlet(alpha))
            total = int(counts.sum(-1).max())
            pyro.sample("counts", dist.Multinomial(total, share, validate_args=False), obs=counts)

    def guide(counts):
        with pyro.plate("documents", len(counts)):
            pyro.sample("share", dist.Dirichlet(counts + 1.0))

    result = audit(model, guide, counts)
    n = counts.sum(-1)
    coefficient = torch.lgamma(n + 1) - torch.lgamma(counts + 1).sum(-1)
    log_beta = lambda a: torch.lgamma(a).sum(-1) - torch.lgamma(a.sum(-1))
    exact = coefficient + log_beta(counts + alpha) - log_beta(alpha)
    check(result, exact, atol=1e-4)
    assert result.posteriors["grid"].posterior["share"].dims[-1] == "share_dim_0"


def test_a_discrete_local_site_is_summed_out_in_model_and_guide() -> None:
    def model(y):
        with pyro.plate("rows", len(y)):
            kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.7])))
            z = pyro.sample("z", dist.Normal(2.0 * kind - 1.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            kind = pyro.sample("kind", dist.Categorical(logits=torch.stack([-y, y], -1)))
            pyro.sample("z", dist.Normal(0.8 * y + 0.2 * (2.0 * kind - 1.0), 0.45))

    mixture = [math.log(p) + dist.Normal(m, math.sqrt(1.25)).log_prob(X) for p, m in ((0.3, -1.0), (0.7, 1.0))]
    result = audit(model, guide, X)
    check(result, torch.logsumexp(torch.stack(mixture), 0))
    # the guide's conditionals are the true ones up to their width; its q(kind) is not: E_q over z of the marginal
    z = torch.tensor([[[0.3]] * 4], dtype=F64)
    log_joint = LogJoint(model, guide, X)
    logits = torch.log_softmax(torch.stack([-X, X], -1), -1)
    by_hand = torch.logsumexp(
        torch.stack([logits[:, k] + dist.Normal(0.8 * X + 0.2 * (2.0 * k - 1.0), 0.45).log_prob(z[0, :, 0]) for k in (0, 1)]),
        0,
    )
    torch.testing.assert_close(log_joint.log_guide(z)[0], by_hand)


def test_a_masked_latent_is_removed_for_its_datum() -> None:
    present = torch.tensor([True, False, True, True])

    def model(y, present):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.poutine.mask(mask=present):
                extra = pyro.sample("extra", dist.LogNormal(torch.zeros_like(y), 1.0))
            pyro.sample("y", dist.Normal(z + torch.where(present, extra, torch.zeros_like(y)), 0.5), obs=y)

    def guide(y, present):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(0.5 * y, 0.7))
            with pyro.poutine.mask(mask=present):
                pyro.sample("extra", dist.LogNormal(torch.zeros_like(y), 0.8))

    axis = torch.linspace(-8, 8, 2001, dtype=F64)
    with_extra = [
        trapezoid(
            lambda z, u, y=y: (
                dist.Normal(0.0, 1.0).log_prob(z)
                + dist.Normal(0.0, 1.0).log_prob(u)
                + dist.Normal(z + u.exp(), 0.5).log_prob(y)
            ),
            axis,
            axis,
        )
        for y in X
    ]
    expected = torch.stack(with_extra)
    expected[1] = dist.Normal(0.0, math.sqrt(1.25)).log_prob(X[1])
    result = audit(model, guide, X, present)
    check(result, expected, atol=1e-5)
    extra = result.posteriors["guide"].posterior["extra"]
    assert extra.isel(obs_id=1).isnull().all()
    assert extra.isel(obs_id=0).notnull().all()


def test_a_global_latent_is_pinned_at_the_guides_median_and_recorded() -> None:
    def model(y):
        shift = pyro.sample("shift", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def guide(y):
        pyro.sample("shift", dist.LogNormal(torch.tensor(0.4, dtype=F64), 0.3))
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(0.8 * y, 0.5))

    result = audit(model, guide, X)
    check(result, dist.Normal(math.exp(0.4), math.sqrt(1.25)).log_prob(X))
    assert "'shift' is held at the guide's median" in result.table.attrs["notes"]
    assert "the ELBO is not SVI's" in result.table.attrs["notes"]
    assert "The global latent 'shift' is held at the guide's median" in result.verdict
    assert "mean ELBO [nats], at the median of the global latents" in dict(summary(result.table))


@pytest.mark.parametrize("kind", ["recurrent", "branch"])
def test_programs_that_vmap_cannot_run_fall_back_with_a_reason(kind: str) -> None:
    torch.manual_seed(1)
    cell = nn.GRU(1, 3, batch_first=True).double()
    head = nn.Linear(3, 1).double()
    y = torch.randn(5, 4, dtype=F64)

    def decode(z):
        if kind == "branch":  # a branch on the values of z
            return (z if z.mean() > 0 else z.clone()).expand(-1, 4)
        steps = z.unsqueeze(1).expand(-1, 4, -1)
        return head(cell(steps)[0]).squeeze(-1)

    def model(y):
        with pyro.plate("sequences", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(decode(z), 0.5).to_event(1), obs=y)

    def guide(y):
        with pyro.plate("sequences", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y), 1, dtype=F64), 1.0).to_event(1))

    log_joint = LogJoint(model, guide, y)
    assert log_joint.mode == "repeat"
    assert any("vmap over draws does not apply" in note for note in log_joint.notes)
    z = torch.randn(3, 5, 1, dtype=F64)
    by_hand = torch.stack(
        [dist.Normal(0.0, 1.0).log_prob(u[:, 0]) + dist.Normal(decode(u), 0.5).log_prob(y).sum(-1) for u in z]
    )
    torch.testing.assert_close(log_joint(z), by_hand)


def test_the_loop_is_left_when_arguments_cannot_be_repeated() -> None:
    y = X.clone()

    def model():
        with pyro.plate("rows", 4):
            z = pyro.sample("z", dist.Normal(torch.zeros(4, dtype=F64), 1.0))
            shift = 0.0 if z.sum() > 1e9 else 1.0
            pyro.sample("y", dist.Normal(z + shift, 0.5), obs=y)

    def guide():
        with pyro.plate("rows", 4):
            pyro.sample("z", dist.Normal(0.5 * y, 0.5))

    log_joint = LogJoint(model, guide)
    assert log_joint.mode == "loop"
    assert len([note for note in log_joint.notes if "does not apply" in note]) == 2
    z = torch.randn(3, 4, 1, dtype=F64)
    expected = dist.Normal(0.0, 1.0).log_prob(z[..., 0]) + dist.Normal(z[..., 0] + 1, 0.5).log_prob(y)
    torch.testing.assert_close(log_joint(z), expected)


@pytest.mark.parametrize("which", ["norm over dim=1", "first column"])
def test_a_program_that_counts_dimensions_from_the_left_is_drawn_from_rightly(which: str) -> None:
    """In an outer plate of draws dim=1 is another dimension: the draws would come from another distribution, unnoticed."""

    def model(y):
        with pyro.plate("rows", len(y)):
            a = pyro.sample("a", dist.Normal(torch.zeros(4, dtype=F64), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(mean_of(a), 0.1).to_event(1))
            pyro.sample("y", dist.Normal(b.sum(-1), 1.0), obs=y)

    def mean_of(a):
        return a / a.norm(dim=1, keepdim=True) if which == "norm over dim=1" else a[:, :1].expand_as(a)

    def guide(y):
        with pyro.plate("rows", len(y)):
            a = pyro.sample("a", dist.Normal(torch.zeros(4, dtype=F64), 1.0).to_event(1))
            pyro.sample("b", dist.Normal(mean_of(a), 0.1).to_event(1))

    log_joint = LogJoint(model, guide, X)
    for z in (log_joint.sample_guide(500, seed=0)[0], log_joint.sample_prior(500, seed=0)):
        a, b = z[..., :4], z[..., 4:]
        expected = a / a.norm(dim=-1, keepdim=True) if which == "norm over dim=1" else a[..., :1].expand_as(a)
        residual = (b - expected).std().item()
        assert abs(residual - 0.1) < 4.5 * 0.1 / (2 * b.numel()) ** 0.5
    assert any("drawn one at a time" in note for note in log_joint.notes)


def test_a_decoder_that_does_not_broadcast_is_audited_all_the_same() -> None:
    """Concatenating a covariate needs two dimensions: the prior is then drawn one at a time, and the grid is per datum."""
    dose = torch.tensor([[0.0], [1.0], [-1.0], [0.5]], dtype=F64)

    def model(y, dose):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(torch.cat([z, dose], -1).sum(-1), 0.5), obs=y)

    def guide(y, dose):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(0.8 * (y[:, None] - dose), 0.5).to_event(1))

    check(audit(model, guide, X, dose), dist.Normal(dose[:, 0], math.sqrt(1.25)).log_prob(X))


def test_an_angle_is_held_in_one_period() -> None:
    def model(y):
        with pyro.plate("rows", len(y)):
            angle = pyro.sample("angle", dist.VonMises(torch.zeros_like(y), 0.5))
            pyro.sample("y", dist.Normal(torch.cos(angle), 0.5), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("angle", dist.VonMises(torch.zeros_like(y), 0.7))

    axis = torch.linspace(-math.pi, math.pi, 4001, dtype=F64)[1:]
    expected = [
        trapezoid(
            lambda a, y=y: dist.VonMises(torch.zeros((), dtype=F64), 0.5).log_prob(a) + dist.Normal(a.cos(), 0.5).log_prob(y),
            axis,
        )
        for y in X
    ]
    check(audit(model, guide, X), torch.stack(expected), atol=2e-4)


def test_a_mixture_prior_has_the_support_of_its_components() -> None:
    def model(y):
        with pyro.plate("rows", len(y)):
            parts = dist.Normal(torch.tensor([-1.0, 2.0], dtype=F64), 0.5)
            weights = dist.Categorical(torch.tensor([0.4, 0.6], dtype=F64))
            z = pyro.sample("z", dist.MixtureSameFamily(weights, parts).expand([len(y)]))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y, 0.5))

    scale = math.sqrt(0.5)
    parts = torch.stack(
        [math.log(0.4) + dist.Normal(-1.0, scale).log_prob(X), math.log(0.6) + dist.Normal(2.0, scale).log_prob(X)]
    )
    check(audit(model, guide, X), torch.logsumexp(parts, 0))
