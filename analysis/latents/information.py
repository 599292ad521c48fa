"""The information in the latents: rate and distortion, mutual information, collapse.

    -ELBO = R + D,   R_n = KL(q(z|x_n) || p(z)),   D_n = -E_q log p(x_n|z),   R = I_q(x; z) + KL(q(z) || p(z))

A latent can be unused in two ways with different remedies: x carries no information about it (collapsed), or x does and the
guide ignores it. The guide's rate cannot distinguish these; the rate of a certified posterior can. Without one, the sensitivity
of the decoder on data simulated from the model is used instead; it does not detect a latent that affects x only through another
one. All values are in nats per datum.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from elbowroom.analysis.latents.aggregate import energy_test, mutual_information, mutual_information_of_table
from elbowroom.analysis.measures.gaps import guide_normals
from elbowroom.errors import UnsupportedProgram, first_line
from elbowroom.inference.compiled.policies import policy
from elbowroom.inference.mcmc.normals import HALF_LOG_2PI
from elbowroom.inference.posterior import Posterior
from elbowroom.inference.program.replay import Which
from elbowroom.inference.target import discrete
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.simulate import simulate
from elbowroom.system.memory import ARRAY, fitting, sizes

ACTIVE = 0.01  # variance of E_q z_j over data, in prior variances, above which latent j is active
COLLAPSED = 0.01  # nats
MOMENTS = 1024  # draws for the moments of a guide that is not normal: its KL is too large by about 1/1024
TESTED = 1000  # data in the test of the aggregate posterior
SIMULATED = 4096  # data simulated for the sensitivity, at least

VARIABLES: dict[str, tuple[str, str]] = {
    "rate": ("nats", "KL(q(z|x) || p(z))"),
    "distortion": ("nats", "-E_q log p(x|z)"),
    "rate_mean": ("nats", "mean of the rate over data"),
    "rate_se": ("nats", "standard error of rate_mean over data"),
    "distortion_mean": ("nats", "mean of the distortion over data"),
    "distortion_se": ("nats", "standard error of distortion_mean over data"),
    "bits_per_dimension": ("bits", "(rate + distortion) / (entries log 2)"),
    "bits_per_dimension_se": ("bits", "standard error of bits_per_dimension over data"),
    "rate_coordinate": ("nats", "KL of the guide's margin from the prior's, both as normals of the same moments"),
    "rate_coordinate_mean": ("nats", "mean of rate_coordinate over data"),
    "active_variance": ("", "variance over data of E_q z_j, in prior variances"),
    "active": ("", f"active_variance > {ACTIVE}"),
    "sensitivity": ("", "E (d log p(x|z) / d z_j)^2 times the prior variance, on data simulated from the model"),
    "sensitivity_se": ("", "standard error of sensitivity"),
    "posterior_rate": ("nats", "rate_coordinate_mean of the certified posterior in the guide's place"),
    "collapsed": ("", "x says nothing of the latent, and the guide knows"),
    "ignored": ("", "x says something of the latent, and the guide does not"),
    "name": ("", "the latent, by its site"),
    "information_lower": ("nats", "lower bound on I_q(x; z), at most log(information_data)"),
    "information_upper": ("nats", "upper bound on I_q(x; z), leave-one-out"),
    "information_data": ("", "data among which the two are found"),
    "aggregate_kl_lower": ("nats", "lower bound on KL(q(z) || p(z))"),
    "aggregate_kl_upper": ("nats", "upper bound on KL(q(z) || p(z))"),
    "aggregate_p_value": ("", "p-value of the aggregate posterior being the prior, energy distance by permutation"),
    "aggregate_effect": ("", "energy distance between the two, 0 (the same) to 1"),
    "aggregate_effect_null": ("", "its mean where they are the same"),
}


def information(
    log_joint: LogJoint,
    *,
    reference: Posterior | None = None,
    draws: int = 64,
    seed: int = 0,
    entries: int | None = None,
) -> xr.Dataset:
    """Measure the information in the latents about the data, and list the latents without any.

    Args:
        log_joint: the model and guide.
        reference: a posterior of the same data; only exact or certified data are used.
        draws: guide draws per datum for rate and distortion.
        seed: random seed.
        entries: entries of one datum, where the data are discrete: bits per dimension are then included.

    Returns:
        A Dataset over obs_id (0 .. N-1) and coordinate (of the unconstrained z; absent where all latents are discrete):

        * rate, distortion (obs_id); their means and standard errors over data; bits_per_dimension where `entries` is given.
          Data where either is not finite are left out of the means and counted (attribute `left_out`)
        * rate_coordinate (obs_id, coordinate) = log(b/s) + (s^2 + (m - a)^2) / (2 b^2) - 1/2 with m, s the guide's and a, b the
          prior's moments: the KL of the margins where both are normal, else an approximation
        * name, active_variance, active, posterior_rate, sensitivity, collapsed, ignored (coordinate). A latent that is not
          active and has a rate below .01 nats is `collapsed` where posterior_rate, the same rate of the certified posterior, is
          below .01 nats as well, else `ignored`. Without a reference (posterior_rate is NaN) 1/2 log(1 + sensitivity) is used
          instead: the rate of a normal posterior given the other latents
        * information_lower, _upper, aggregate_kl_lower, _upper with `_se` (see `latents.aggregate`); where the prior depends on
          covariates, I is the information about x and the covariates, and the aggregate KL is NaN
        * aggregate_p_value, aggregate_effect, aggregate_effect_null: one guide draw for each of at most 1,000 data against as
          many prior draws

        Attributes: `sentence`; `aggregate_kl`, the reason where it is missing; `sensitivity`, the reason where the model cannot
            be simulated (it is then NaN, and collapse is judged by the guide alone); `left_out`; `draws`. With both continuous
            and discrete latents, all values are of the continuous ones, with the others summed out.

    Raises:
        UnsupportedProgram: the tables of discrete latents are not distributions.
    """
    coords, attrs = {"obs_id": np.arange(log_joint.n_obs)}, {"draws": str(draws), "seed": str(seed)}
    found: dict[str, tuple[tuple[str, ...], np.ndarray | float]] = {}
    if log_joint.dim:
        rate, distortion = _rate(log_joint, draws, seed)
        more = mutual_information(log_joint, seed=seed + 1)
        a, b2 = _prior(log_joint, seed + 3)
        each, reason = _coordinates(log_joint, a, b2, reference, seed)
        if len(a) > 1:  # p(z|c): the identity above needs a single prior
            attrs["aggregate_kl"] = "not available: the prior differs between data"
            more |= {name: math.nan for name in more if name.startswith("aggregate_kl")}
        coords["coordinate"] = np.arange(log_joint.dim)
        found |= {name: (("obs_id", "coordinate")[-t.dim() :], t.cpu().numpy()) for name, t in each.items()}
        found["name"] = (("coordinate",), np.array(_names(log_joint)))
        if reason:
            attrs["sensitivity"] = reason
    else:
        table = discrete.table(log_joint)
        q = table.log_guide.double().exp()
        mean_of = lambda t: torch.where(q > 0, q * t.double(), 0.0).sum(0)
        rate, distortion = mean_of(table.log_guide - table.log_prior), -mean_of(table.log_likelihood)
        more = mutual_information_of_table(table)
    found |= {"rate": (("obs_id",), rate.cpu().numpy()), "distortion": (("obs_id",), distortion.cpu().numpy())}
    fine = rate.isfinite() & distortion.isfinite()
    attrs["left_out"] = str(int((~fine).sum()))
    for name, value in (("rate", rate), ("distortion", distortion)):
        more[f"{name}_mean"], more[f"{name}_se"] = _mean(value[fine])
    if entries is not None:
        mean, error = _mean((rate + distortion)[fine])
        more |= {"bits_per_dimension": mean / (entries * math.log(2)), "bits_per_dimension_se": error / (entries * math.log(2))}
    p, effect, null = _aggregate(log_joint, seed + 2)
    more |= {"aggregate_p_value": p, "aggregate_effect": effect, "aggregate_effect_null": null}
    found |= {name: ((), value) for name, value in more.items()}
    dataset = xr.Dataset(found, coords=coords, attrs=attrs)
    for name, (units, long_name) in VARIABLES.items():
        if name in dataset:
            dataset[name].attrs = {"units": units, "long_name": long_name}
    dataset.attrs["sentence"] = _sentence(dataset)
    return dataset


def _mean(values: Tensor) -> tuple[float, float]:
    if not len(values):
        return math.nan, math.nan
    return values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan


def _blocks(log_joint: LogJoint, draws: int, seed: int) -> list[tuple[int, int]]:
    most = fitting(log_joint.n_obs * max(1, log_joint.dim), ARRAY)
    return [(size, seed + 7919 * number) for number, size in enumerate(sizes(draws, most))]


def _rate(log_joint: LogJoint, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    rate = distortion = torch.zeros((), dtype=torch.float64, device=log_joint.device)
    with torch.no_grad():
        for size, number in _blocks(log_joint, draws, seed):
            z, log_q = log_joint.sample_guide(size, number)
            prior, likelihood = log_joint.terms(z)
            rate, distortion = rate + (log_q - prior).double().sum(0), distortion - likelihood.double().sum(0)
    return rate / draws, distortion / draws


def _moments(log_joint: LogJoint, which: Which, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance per datum, (N, d) each, of draws of the guide or the prior."""
    first = second = torch.zeros((), dtype=torch.float64, device=log_joint.device)
    centre: Tensor | None = None
    for size, number in _blocks(log_joint, draws, seed):
        z = log_joint.draw(which, size, number).double()
        centre = z.mean(0) if centre is None else centre
        first, second = first + (z - centre).sum(0), second + (z - centre).square().sum(0)
    assert centre is not None
    mean = first / draws
    return centre + mean, (second / draws - mean.square()) * draws / (draws - 1)


def _prior(log_joint: LogJoint, seed: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the prior's margins, (1, d), or (N, d) where covariates move them."""
    with torch.no_grad():
        points = log_joint.sample_prior(4, seed)[:, :1].double()
        height = log_joint.terms(points.expand(-1, log_joint.n_obs, -1))[0].double()
    standard = (-0.5 * points.square() - HALF_LOG_2PI).sum(-1)
    close = 1e-9 if log_joint.dtype == torch.float64 else 1e-5
    if torch.allclose(height, standard.expand_as(height), rtol=close, atol=close):
        return torch.zeros_like(points[0]), torch.ones_like(points[0])
    if not torch.allclose(height, height[:, :1].expand_as(height), rtol=close, atol=close):
        return _moments(log_joint, "model", MOMENTS, seed)
    mean, variance = _moments(log_joint, "model", max(64, 2**17 // log_joint.n_obs), seed)
    whole = mean.mean(0, keepdim=True)
    return whole, variance.mean(0, keepdim=True) + (mean - whole).square().mean(0, keepdim=True)


def _names(log_joint: LogJoint) -> list[str]:
    names = []
    for site in log_joint.sites:
        count = site.columns.stop - site.columns.start
        names += [site.name] if not site.shape else [f"{site.name}[{j}]" for j in range(count)]
    return names


def _posterior_rate(reference: Posterior | None, a: Tensor, b2: Tensor) -> Tensor:
    """Return the mean KL of the reference's margins from the prior's over certified data, (d,); NaN without such data."""
    if reference is None or not bool(reference.trusted.any()):
        return torch.full_like(a[0], torch.nan)
    rows = reference.trusted.to(a.device)
    mean, sd = (t.to(a.device).double()[rows] for t in reference.moments())
    if len(a) > 1:
        a, b2 = a[rows], b2[rows]
    return (0.5 * ((b2 / sd.square()).log() + (sd.square() + (mean - a).square()) / b2 - 1)).nanmean(0)


def _coordinates(
    log_joint: LogJoint, a: Tensor, b2: Tensor, reference: Posterior | None, seed: int
) -> tuple[dict[str, Tensor], str]:
    """Return the variables per coordinate, and the reason where there is no sensitivity."""
    q = guide_normals(log_joint)[1]
    if q is None:
        mean, variance = _moments(log_joint, "guide", MOMENTS, seed + 4)
        noise = (variance / b2).mean(0) / MOMENTS
    else:
        mean, variance = q.loc.double(), q.root.double().square().sum(-1)
        noise = torch.zeros_like(mean[0])
    each = 0.5 * ((b2 / variance).log() + (variance + (mean - a).square()) / b2 - 1)
    scaled = (mean - a) / b2.sqrt()
    active_variance = (scaled.var(0) - noise).clamp_min(0) if len(scaled) > 1 else torch.full_like(scaled[0], torch.nan)
    rate, active = each.mean(0), active_variance > ACTIVE
    try:
        reason, (sensitivity, error) = "", _sensitivity(log_joint, b2, seed + 5)
    except (UnsupportedProgram, *discrete.FAILURES) as refused:
        reason = f"not available: {first_line(refused)}"
        sensitivity = error = torch.full_like(rate, torch.nan)
    unused = (rate < COLLAPSED) & ~active
    truly = _posterior_rate(reference, a, b2)
    used = torch.where(truly.isnan(), 0.5 * torch.log1p(sensitivity), truly) >= COLLAPSED
    return {
        "rate_coordinate": each,
        "rate_coordinate_mean": rate,
        "active_variance": active_variance,
        "active": active,
        "posterior_rate": truly,
        "sensitivity": sensitivity,
        "sensitivity_se": error,
        "collapsed": unused & ~used,
        "ignored": unused & used,
    }, reason


def _sensitivity(log_joint: LogJoint, variance: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return E (d log p(x|z) / d z_j)^2 var_j over (z, x) from the joint, (d,), and its standard error."""
    squares = []
    with policy("never"):  # each is evaluated once: compiling does not pay
        for r in range(max(1, min(64, -(-SIMULATED // log_joint.n_obs)))):
            other, z = simulate(log_joint, seed + r)
            squares.append(other.parts(z[None])[3][0].double().square() * variance)
    every = torch.cat(squares)
    return every.mean(0), every.std(0) / len(every) ** 0.5


def _aggregate(log_joint: LogJoint, seed: int) -> tuple[float, float, float]:
    """Test the aggregate posterior against the prior, with one draw of each per datum."""
    rows = torch.randperm(log_joint.n_obs, generator=torch.Generator().manual_seed(seed))[:TESTED].to(log_joint.device)
    if log_joint.dim:
        q, p = log_joint.draw("guide", 1, seed)[0, rows], log_joint.draw("model", 1, seed + 1)[0, rows]
    else:
        table = discrete.table(log_joint)
        size = len(table.log_prior)
        both = (discrete.draw(t, 1, seed + i)[0, rows] for i, t in enumerate((table.log_guide, table.log_prior)))
        q, p = (torch.nn.functional.one_hot(index.clamp_min(0), size) for index in both)
    return energy_test(q, p, seed=seed)


def _sentence(found: xr.Dataset) -> str:
    rate, distortion = float(found["rate_mean"]), float(found["distortion_mean"])
    lower, upper = float(found["information_lower"]), float(found["information_upper"])
    if "aggregate_kl" not in found.attrs:
        upper = max(lower, min(upper, rate))  # the rate is an upper bound too
    words = [f"rate {rate:.2f} and distortion {distortion:.2f} nats per datum"]
    if math.isfinite(lower):
        words.append(f"z tells between {max(lower, 0):.2f} and {max(upper, 0):.2f} nats of x")
    if "collapsed" in found:
        for name, what in (("collapsed", "collapsed"), ("ignored", "used by the decoder but ignored by the guide")):
            which = [str(j) for j in found["coordinate"].values[found[name].values]]
            if which:
                words.append(f"{what}: z[{'], z['.join(which)}]")
        words.append(f"{int(found['active'].sum())} of {found.sizes['coordinate']} latents are active")
    return "; ".join(words)
