"""Simulation-based calibration of the guide: ranks of draws from the posterior among draws of the guide.

    PIT = (#{s : f(z_s, x) < f(z*, x)} + V (1 + #{s : f(z_s, x) = f(z*, x)})) / (L + 1),    z_s ~ q(z|x), s = 1 .. L,  V uniform

is exactly uniform on [0, 1], for any L, if z* and the z_s are draws of the same distribution given x. There are two regimes,
which are never mixed:

* Regime S, `simulated`: z* ~ p(z), x ~ p(x|z*). z* is then a draw of p(z|x) for an x that the model generates. Talts et al.
  2018, https://arxiv.org/abs/1804.06788. Some quantities f also depend on x; without these, q(z|x) = p(z) passes the test:
  Modrak et al. 2023, https://doi.org/10.1214/23-BA1404.
* Regime R, `observed`: x is real, and z* is a draw of a certified posterior p(z|x), whether or not the model fits x. Related to
  posterior SBC (Saeilynoja, Schmitt, Buerkner and Vehtari 2025, https://arxiv.org/abs/2502.03279), which simulates further data
  from the posterior instead.

Both are averages over x: errors of opposite sign can cancel over the data, and a deviation need not be present at every datum.
Coordinates are unconstrained, in float64 on the CPU. Draws are processed in chunks, so that memory does not grow with L.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from annotated_types import Ge
from torch import Tensor

from elbowroom.analysis.checks.ranks import Found, joined, measure
from elbowroom.analysis.checks.uniformity import holm, uniformity
from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.posterior import Posterior
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.simulate import simulate_for_guide

LEVELS = (0.5, 0.8, 0.9, 0.95)
MOST = 10  # coordinates tested one by one; the projections cover the others
NAMED = 0.05  # familywise level at which a direction is reported
REPEAT = 15_487_469  # seed offset between simulations of the same data
CHOICE, DRAW = 86_028_121, 141_650_939  # seed offsets: choice of data, choice of certified draws


def simulated(
    log_joint: LogJoint, *, data: Annotated[int, Ge(1)] = 1000, draws: Annotated[int, Ge(2)] = 255, seed: int = 0
) -> xr.Dataset:
    """Calibrate the guide on data simulated from the model, where the true z is known (regime S).

    Args:
        log_joint: the model and guide. Of its data only the covariates and the pattern of missing values are used.
        data: number of simulations. Rows of the data are repeated, or chosen at random, to reach this number.
        draws: draws L of the guide per simulation.
        seed: random seed.

    Returns:
        A table over `quantity`: the first ten coordinates `z[j]`, `|z|`, three projections (of z in units of the prior's sd,
        onto fixed directions), entries of the discrete sites that the guide draws, `log p(z)`, `log p(x|z)` and `log p(x, z)`.
        In these densities discrete sites are summed out where there are continuous ones.

        * `pit` (quantity, simulation): NaN where a value is NaN (counted in `lost` (quantity)) or the latent is masked out.
          `infinite` (quantity): number of simulations with an infinite value, which is ranked like any other
        * `p_value`, exact, and `p_holm`, adjusted by Holm's method over the quantities; `effect` = max |ECDF - u|; `shift`,
          `spread`, `direction` (the error of the guide's distribution of this quantity: `too narrow`, `too wide`, `shifted up`,
          `shifted down`, `uneven`; empty where p_holm exceeds 5 %): see `uniformity`
        * `ecdf`, `ecdf_lower`, `ecdf_upper` (quantity, point): the ECDF and its simultaneous 95 % band
        * `coverage`, `coverage_se` (level, coordinate): share of the true z_j in the guide's central intervals, all coordinates
        * `z_score` = (E_q z_j - z*_j) / sd_q z_j and `contraction` = 1 - var_q z_j / var_prior z_j (simulation, coordinate).
          These and the coverage are absent where all latents are discrete. Schad, Betancourt and Vasishth 2021,
          https://arxiv.org/abs/1904.12765
        * `obs_id` (simulation): the datum whose covariates and missing values the simulation has

        Attributes: `regime`, `simulations`, `draws`, `seed`, and `summary`, a sentence.

    Raises:
        UnsupportedProgram: the model cannot be simulated from, or the guide does not read what is simulated, see
            `simulate_for_guide`.
    """
    n = log_joint.n_obs
    rows = torch.arange(data) % n if data > n else _some(n, data, seed)
    if data == n or log_joint.separable():
        other, z = simulate_for_guide(log_joint.subset(rows.to(log_joint.device)), seed)
        found = measure(other, z, draws, seed)
    else:  # the data cannot be subset: simulate all of them repeatedly
        runs = []
        for k in range(math.ceil(data / n)):
            other, z = simulate_for_guide(log_joint, seed + REPEAT * k)
            runs.append(measure(other, z, draws, seed + REPEAT * k))
        rows = torch.cat([torch.arange(data // n * n) % n, _some(n, data % n, seed)])
        last = (data // n) * n + rows[data // n * n :]
        found = joined(runs).rows(torch.cat([torch.arange(data // n * n), last]))
    said = f"{len(rows)} simulated data, {draws} guide draws each"
    return _dataset(found, rows, said, regime="simulated", draws=draws, seed=seed, left_out=0, method="")


def observed(
    log_joint: LogJoint,
    reference: Posterior,
    *,
    data: Annotated[int, Ge(1)] = 1000,
    draws: Annotated[int, Ge(2)] = 255,
    seed: int = 0,
) -> xr.Dataset:
    """Calibrate the guide on the observed data, against one certified draw of each datum's posterior (regime R).

    If q(z|x) = p(z|x) at these x, the PIT is uniform, whether or not the model fits x. If the PIT is uniform, q = p on average
    over these x, as far as the quantities can show. One draw per datum keeps the values independent.

    Args:
        log_joint: the model and guide.
        reference: posteriors of the same data. Data that are neither exact nor certified are left out and counted.
        data: largest number of data used; they are chosen at random.
        draws: fresh draws L of the guide per datum, not those of the audit.
        seed: random seed; it must differ from the reference's.

    Returns:
        The table of `simulated`; `simulation` counts the data, and a certified draw replaces the true z. Further attributes:
        `left_out`, the number of data that are not certified, and `method`, that of the reference.

    Raises:
        UnsupportedProgram: no datum is certified.
        ValueError: the reference is of other data.
    """
    n = log_joint.n_obs
    if len(reference.status) != n:
        raise ValueError(f"the reference is of {len(reference.status)} data, the model and guide of {n}")
    trusted = reference.trusted.nonzero()[:, 0]
    left_out = n - len(trusted)
    if not len(trusted):
        raise UnsupportedProgram(f"{reference.method} certified none of {n} data")
    rows = trusted[_some(len(trusted), data, seed)]
    flat = reference.draws.flatten(0, 1)
    generator = torch.Generator().manual_seed(seed + DRAW)
    index = torch.randint(len(flat), (n,), generator=generator).to(flat.device)
    z = flat[index, torch.arange(n, device=flat.device)].to(log_joint.device)
    z = torch.where(reference.trusted[:, None].to(z.device), z, z.nan_to_num())  # what is not certified may be run, not used
    part, used, at = log_joint.some(rows.to(log_joint.device))
    found = measure(part, z[used], draws, seed).rows(at.cpu())
    aside = f" ({left_out} are not certified and left out)" if left_out else ""
    said = f"{len(rows)} of {n} data{aside}, a certified draw ({reference.method}) among {draws} guide draws each"
    facts: dict[str, Any] = {"draws": draws, "seed": seed, "left_out": left_out, "method": reference.method}
    return _dataset(found, rows, said, regime="observed", **facts)


def _some(n: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + CHOICE)
    return torch.randperm(n, generator=generator)[:size].sort().values


def _dataset(found: Found, rows: Tensor, said: str, **attrs: Any) -> xr.Dataset:
    d = found.z_score.shape[1]
    shown = [q for q in range(len(found.names)) if not MOST <= q < d]
    names, pit = np.array([found.names[q] for q in shown]), found.pit[:, shown].T.numpy()
    judged = [uniformity(values) for values in pit]
    p = np.array([one.p_value for one in judged])
    p_holm = holm(p)
    points = judged[0].points
    same = lambda values: values if len(values) == len(points) else np.full(len(points), np.nan)
    lost = (found.pit.isnan() & ~found.masked).sum(0)[shown].numpy()
    direction = [one.direction if q <= NAMED else "" for one, q in zip(judged, p_holm, strict=True)]
    table = xr.Dataset(
        {
            "pit": (("quantity", "simulation"), pit),
            "p_value": ("quantity", p),
            "p_holm": ("quantity", p_holm),
            **{name: ("quantity", np.array([getattr(one, name) for one in judged])) for name in ("effect", "shift", "spread")},
            "direction": ("quantity", np.array(direction, dtype=str)),
            "lost": ("quantity", lost),
            "infinite": ("quantity", found.infinite.sum(0)[shown].numpy()),
            "ecdf": (("quantity", "point"), np.stack([same(one.ecdf) for one in judged])),
            "ecdf_lower": (("quantity", "point"), np.stack([same(one.lower) for one in judged])),
            "ecdf_upper": (("quantity", "point"), np.stack([same(one.upper) for one in judged])),
        },
        coords={"quantity": names, "point": points, "obs_id": ("simulation", rows.numpy())},
        attrs={**attrs, "simulations": len(rows)},
    )
    if d:
        coverage, error = _coverage(found.pit[:, :d])
        table = table.assign_coords(coordinate=np.array(found.names[:d]), level=np.array(LEVELS))
        table["coverage"] = (("level", "coordinate"), coverage)
        table["coverage_se"] = (("level", "coordinate"), error)
        table["z_score"] = (("simulation", "coordinate"), found.z_score.numpy())
        table["contraction"] = (("simulation", "coordinate"), found.contraction.numpy())
    for name, words in LONG_NAMES.items():
        if name in table:
            table[name].attrs = {"units": "1", "long_name": words}
    table.attrs["summary"] = _sentence(table, said)
    return table


LONG_NAMES = {
    "pit": "rank of the true (regime R: a certified) draw among the guide's, as a share",
    "p_value": "exact p-value of uniformity",
    "p_holm": "p-value after Holm over the quantities",
    "effect": "largest deviation of the ECDF of the PIT values from uniform",
    "shift": "sqrt(12) (mean - 1/2) of the PIT values",
    "spread": "sqrt(180) (mean squared distance from 1/2, less 1/12) of the PIT values",
    "direction": "what is wrong with the guide's distribution of this quantity; empty where p_holm exceeds 5 %",
    "lost": "data left out because a value is not a number",
    "infinite": "data with an infinite value, ranked like any other",
    "ecdf": "empirical distribution function of the PIT values",
    "ecdf_lower": "lower end of its simultaneous 95 % band under uniformity",
    "ecdf_upper": "upper end of its simultaneous 95 % band under uniformity",
    "coverage": "share of the true (certified) z_j in the guide's central intervals",
    "coverage_se": "standard error of coverage, of (k + 1) / (n + 2)",
    "z_score": "(E_q z_j - z*_j) / sd_q z_j",
    "contraction": "1 - var_q z_j / var_prior z_j",
}


def _coverage(pit: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of PIT values in each central interval and its standard error, (levels, d) each.

    The error is that of (k + 1) / (n + 2), so that it is not zero where all values are covered.
    """
    known = pit.isfinite()
    n = known.sum(0).double()
    inside = torch.stack([((pit - 0.5).abs() <= level / 2).sum(0) for level in LEVELS]).double()
    share = (inside + 1) / (n + 2)
    return (inside / n).numpy(), (share * (1 - share) / (n + 2)).sqrt().numpy()


def _sentence(table: xr.Dataset, said: str) -> str:
    bad = np.flatnonzero(table["p_holm"].values <= NAMED)
    order = bad[np.argsort(-table["effect"].values[bad], kind="stable")]
    words = [
        f"{table['quantity'].values[q]} {table['direction'].values[q]} (off by {table['effect'].values[q]:.2g})"
        for q in order[:4]
    ]
    total = int(np.isfinite(table["p_holm"].values).sum())
    if not total:
        what = "no quantity has finite values"
    elif not len(bad):
        what = f"none of {total} quantities deviates at a familywise level of 5 %"
    else:
        more = ", ..." if len(order) > len(words) else ""
        what = f"{len(bad)} of {total} quantities are off at a familywise level of 5 %: {', '.join(words)}{more}"
    lost, infinite = int(table["lost"].max()), int(table["infinite"].max())
    notes = [f"{lost} data are left out of a quantity, whose values are not numbers there"] if lost else []
    notes += [f"{infinite} data have infinite values of a quantity, which are ranked"] if infinite else []
    return ". ".join([f"{said}: {what}", *notes]) + "."
