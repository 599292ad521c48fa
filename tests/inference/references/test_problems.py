"""The catalogue itself: the log joint and the truth are one model, and the truth is true."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from support.problems.catalogue import MULTIMODAL, PROBLEMS, UNIMODAL
from support.problems.densities import normal
from support.problems.truth import F64, Problem, Truth, mode_shares, quadrature
from torch import Tensor

from elbowroom.inference.references.grid.grid import Grid

FLAT = [name for name in PROBLEMS if name not in ("linear_gaussian_d5", "linear_gaussian_d20", "simplex_d5")]
GRIDDED = [
    pytest.param(name, marks=[pytest.mark.slow] * (name == "heavy_tails_d2"))
    for name in FLAT
    if name not in ("square_idle", "bimodal_unequal_d7")
]
WIDE = {  # boxes that hold every posterior of the problem, in the coordinates of `unfold`
    "banana": ((-7.0, 7.0), (-40.0, 20.0)),
    "funnel": ((-14.0, 14.0), (-36.0, 36.0)),
    "heavy_tails_d1": ((-20.0, 20.0),),
    "heavy_tails_d2": ((-11.0, 11.0), (-11.0, 11.0)),
    "positive": ((-25.0, 6.0),),
    "positive_scale": ((-25.0, 6.0),),
    "simplex_d2": ((-45.0, 30.0), (-30.0, 30.0)),
    "discrete": ((-20.0, 20.0),),
    "square": ((-16.0, 16.0),),
    "square_idle": ((-16.0, 16.0),),
}


@cache
def built(name: str, n: int = 6, seed: int = 3) -> Problem:
    return PROBLEMS[name](n, seed)


def dimension(name: str) -> int:
    """How many coordinates are not idle."""
    d = built(name).log_joint.dim
    return {"square_idle": 1, "bimodal_unequal_d7": 2}.get(name, d)


def unfold(name: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates in which a fixed lattice resolves the posterior: z(t) and the log of dz / dt."""
    if name.startswith("heavy_tails"):
        return t.sinh(), t.cosh().log().sum(-1)
    if name == "funnel":
        log_sd = 0.5 * torch.nn.functional.logsigmoid(t[..., 0])  # of w given v
        return torch.stack([t[..., 0], t[..., 1] * log_sd.exp()], -1), log_sd
    return t, torch.zeros(t.shape[:-1], dtype=F64)


@cache
def brute(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean, covariance, evidence, masses and the border's share by the midpoint rule in one wide, fine, fixed box."""
    problem, d = built(name), dimension(name)
    n, full = problem.log_joint.n_obs, problem.log_joint.dim
    sides = torch.tensor(WIDE.get(name, ((-9.0, 9.0),) * d), dtype=F64)
    low, width = sides[:, 0], sides[:, 1] - sides[:, 0]
    points = {1: 40_000, 2: 480}[d]
    axis = (torch.arange(points, dtype=F64) + 0.5) / points
    t = low + torch.cartesian_prod(*[axis] * d).reshape(-1, d) * width
    z, jacobian = unfold(name, t)
    z = torch.cat([z, torch.zeros(len(z), full - d, dtype=F64)], -1)
    idle = 0.5 * (full - d) * math.log(2 * math.pi)  # the density of idle coordinates at 0
    parts, labels = [], []
    for rows in torch.arange(len(z)).split(2048):
        u = z[rows, None].expand(-1, n, -1)
        parts.append(problem.log_density(u) + jacobian[rows, None] + idle)
        labels.append(problem.mode_of(u))
    value, label = torch.cat(parts), torch.cat(labels)
    evidence = torch.logsumexp(value, 0) + (width / points).log().sum()
    w = torch.softmax(value, 0)
    mean = w.T @ z
    second = torch.einsum("gn,gi,gj->nij", w, z, z)
    masses = torch.stack([w.where(label == k, 0).sum(0) for k in range(problem.masses.shape[1])], -1)
    edge = ((t - low).abs() < 1e-2 * width).any(-1) | ((low + width - t).abs() < 1e-2 * width).any(-1)
    return mean[:, :d], (second - mean[..., None] * mean[:, None])[:, :d, :d], evidence, masses, w[edge].sum(0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_seam_and_the_truth_are_one_model(name: str) -> None:
    problem = built(name)
    log_joint = problem.log_joint
    spread = problem.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    g = torch.Generator().manual_seed(11)
    for factor in (1.0, 3.0):
        z = problem.mean + factor * spread * torch.randn(6, log_joint.n_obs, log_joint.dim, generator=g, dtype=F64)
        torch.testing.assert_close(log_joint(z), problem.log_density(z), rtol=1e-9, atol=1e-9)
    draws, log_q = log_joint.sample_guide(50, 12)
    assert draws.isfinite().all()
    assert log_q.isfinite().all()


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_fields_have_their_shapes(name: str) -> None:
    problem = built(name)
    n, d = problem.log_joint.n_obs, problem.log_joint.dim
    assert (n, problem.name) == (6, name)
    assert (*problem.mean.shape,) == (n, d)
    assert (*problem.covariance.shape,) == (n, d, d)
    assert problem.evidence.shape == problem.error.shape == problem.unimodal.shape == (n,)
    assert (problem.error < 1e-3).all()
    assert (torch.linalg.eigvalsh(problem.covariance) > 0).all()
    torch.testing.assert_close(problem.masses.sum(-1), torch.ones(n, dtype=F64))
    assert (PROBLEMS[name](6, 4).evidence != problem.evidence).any()  # another seed, other data


@pytest.mark.parametrize("name", FLAT)
def test_the_truth_against_another_lattice(name: str) -> None:
    """Closed forms, conditional integrals and narrowed boxes: all against one wide, shifted, finer lattice."""
    problem, d = built(name), dimension(name)
    mean, covariance, evidence, masses, edge = brute(name)
    assert (edge < 1e-9).all()
    slack = problem.error + 1e-9
    variance = problem.covariance.diagonal(dim1=-2, dim2=-1)[:, :d]
    scale = variance.sqrt()
    assert ((evidence - problem.evidence).abs() <= slack).all(), (evidence - problem.evidence).abs() / slack
    assert (((mean - problem.mean[:, :d]) / scale).abs() <= slack[:, None]).all()
    relative = (covariance - problem.covariance[:, :d, :d]) / (scale[:, None] * scale[..., None])
    assert (relative.abs() <= 2 * slack[:, None, None]).all()
    torch.testing.assert_close(masses, problem.masses, atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", UNIMODAL)
def test_importance_sampling_around_the_truth_agrees(name: str) -> None:
    """Student-t proposals with the true moments: every dimension, the log joint's own density, standard errors."""
    problem = built(name)
    log_joint, d, S = problem.log_joint, problem.log_joint.dim, 20_000
    g = torch.Generator().manual_seed(13)
    df = 3 if d <= 2 else 12
    root = torch.linalg.cholesky(1.2 * problem.covariance)
    u = torch.randn(S, log_joint.n_obs, d, generator=g, dtype=F64)
    u = u / (torch.randn(df, S, log_joint.n_obs, generator=g, dtype=F64).square().mean(0))[..., None].sqrt()
    z = problem.mean + torch.einsum("nij,snj->sni", root, u)
    log_t = math.lgamma((df + d) / 2) - math.lgamma(df / 2) - d / 2 * math.log(df * math.pi)
    log_q = log_t - (df + d) / 2 * torch.log1p(u.square().sum(-1) / df) - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_w = torch.cat([log_joint(part) for part in z.split(2000)]) - log_q
    w = torch.softmax(log_w, 0)
    ess = 1 / w.square().sum(0)
    good = (ess > 2000) & problem.unimodal
    assert good.double().mean() >= 0.7, ess
    error = (1 / ess - 1 / S).sqrt()
    gap = (torch.logsumexp(log_w, 0) - math.log(S) - problem.evidence).abs()
    assert (gap < 4.5 * error + problem.error)[good].all(), gap / error
    mean = torch.einsum("sn,sni->ni", w, z)
    se = torch.einsum("sn,sni->ni", w.square(), (z - mean).square()).sqrt()
    assert ((mean - problem.mean).abs() < 4.5 * se)[good].all(), (mean - problem.mean) / se


@pytest.mark.parametrize("name", GRIDDED)
def test_the_grid_agrees_where_it_calls_itself_exact(name: str) -> None:
    problem = built(name)
    grid = Grid()(problem.log_joint, keep=100, seed=0)
    exact = torch.tensor([status == "exact" for status in grid.status])
    assert grid.evidence is not None
    assert grid.mean is not None
    assert exact.any(), grid.reason
    gap = (grid.evidence.value - problem.evidence).abs()
    beyond = 1e-6 if name.startswith("heavy_tails") else 0.0  # its box ends, and the share outside is not part of its error
    assert (gap <= grid.evidence.error + problem.error + beyond)[exact].all(), gap
    scale = problem.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert (((grid.mean - problem.mean) / scale).abs() < 1e-3)[exact].all()


def _ridge(slope: float, bend: float, thin: float, y: Tensor, points: int) -> Truth:
    """z_1 ~ N(y, 1), z_2 ~ N(-y + slope u + bend u^2, thin) with u = z_1 - y: evidence 0."""

    def log_density(z: Tensor) -> Tensor:
        u = z[..., 0] - y
        return normal(u, 0.0, 1.0) + normal(z[..., 1], -y + slope * u + bend * u.square(), thin)

    box = torch.full((len(y), 2), -12.0, dtype=F64), torch.full((len(y), 2), 12.0, dtype=F64)
    return quadrature(log_density, box, points)


def test_a_narrow_ridge_across_the_lattice_has_one_mode_and_its_closed_form() -> None:
    """A lattice sees false maxima along a ridge that runs between its points; the climb tells them from true ones."""
    y = torch.linspace(-2, 2, 5, dtype=F64)
    for slope, bend in ((0.995, 0.0), (0.37, 0.2), (-0.7, 0.3)):
        found = _ridge(slope, bend, 0.1, y, 401)
        assert found.unimodal.all()
        assert found.masses.shape == (5, 1)
        exact = torch.tensor([[1, slope], [slope, slope**2 + 2 * bend**2 + 0.1**2]], dtype=F64).expand(5, 2, 2)
        slack = found.error[:, None] + 1e-9
        assert (found.error < 1e-3).all()
        assert ((found.covariance - exact).abs() <= 2 * slack[..., None]).all()
        assert ((found.mean - torch.stack([y, bend - y], -1)).abs() <= slack).all()
        assert (found.evidence.abs() <= found.error).all()


@pytest.mark.parametrize(("slope", "bend", "thin", "points"), [(0.98, 0.0, 0.2, 25), (-0.7, 0.5, 0.02, 601)])
def test_a_poor_lattice_says_so(slope: float, bend: float, thin: float, points: int) -> None:
    """The stated error covers the true one where points are too few, or where the box lost the ends of a thin arc."""
    found = _ridge(slope, bend, thin, torch.linspace(-2, 2, 5, dtype=F64), points)
    wrong = (found.covariance[:, 0, 0] - 1).abs() + found.evidence.abs()
    assert (wrong > 1e-3).any()
    assert (found.error >= wrong).all(), found.error / wrong


@pytest.mark.parametrize("name", ["square", "bimodal_unequal_d1"])
def test_two_maxima_are_counted_on_a_line(name: str) -> None:
    problem = built(name, 60, 5)
    axis = torch.linspace(-9, 9, 40_001, dtype=F64)
    value = torch.cat([problem.log_density(part[:, None, None].expand(-1, 60, 1)) for part in axis.split(2_000)])
    peak = (value[1:-1] > value[:-2]) & (value[1:-1] >= value[2:])
    w = torch.softmax(value, 0)
    negative = w[axis < 0].sum(0) + 0.5 * w[axis == 0].sum(0)
    two = (peak.sum(0) == 2) & (torch.minimum(negative, 1 - negative) > 0.05)
    assert 0.3 < two.double().mean() < 0.98
    assert torch.equal(problem.unimodal, ~two)


def test_the_lists_say_what_the_truth_says() -> None:
    assert set(UNIMODAL) | set(MULTIMODAL) == set(PROBLEMS)
    for name in UNIMODAL:
        assert built(name).unimodal.double().mean() >= 0.75, name
    for name in MULTIMODAL:
        assert built(name).unimodal.double().mean() <= 0.5, name


def test_shares_of_the_modes_are_those_of_the_draws() -> None:
    problem = built("square_idle")
    draws = torch.ones(4, 25, 6, 7, dtype=F64)
    draws[0, :, :, 0] = -1
    draws[1:, :, :, 1:] = -5
    draws[3, :5, 2] = torch.nan
    expected = torch.tensor([0.75, 0.25], dtype=F64).repeat(6, 1)
    expected[2, 0] = 0.70  # draws that are not numbers belong to no mode
    torch.testing.assert_close(mode_shares(problem, draws), expected)


def test_the_masses_of_unequal_modes_are_the_weights() -> None:
    """The likelihood is blind to the sign: the basins hold w and 1 - w, up to what the components overlap."""
    weight = torch.tensor([0.5, 0.8, 0.93, 0.97, 0.8, 0.93, 0.97], dtype=F64)
    for name in ("bimodal_unequal_d1", "bimodal_unequal_d7"):
        masses = built(name, 70, 6).masses[:, 0].reshape(10, 7)
        assert ((masses - weight).abs() < 0.01).double().mean() > 0.85
