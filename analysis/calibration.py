r"""Is the guide calibrated? Ranks of draws that are right among draws of the guide, in two regimes that are never mixed.

    PIT = (#{s : f(z_s, x) < f(z*, x)} + V (1 + #{s : f(z_s, x) = f(z*, x)})) / (L + 1),    z_s ~ q(z|x), s = 1 .. L,  V uniform

is uniform on [0, 1], exactly and for any L, where z* and the z_s are draws of the same distribution given x.

* Regime S, `simulated`: z* ~ p(z), x ~ p(x|z*): simulation-based calibration. z* is a draw of p(z|x) for the x that the MODEL
  makes. Talts et al. 2018, https://arxiv.org/abs/1804.06788; quantities that depend on x as well, without which q(z|x) = p(z)
  passes: Modrak et al. 2023, https://doi.org/10.1214/23-BA1404.
* Regime R, `observed`: x is real, z* is a draw of a CERTIFIED posterior p(z|x), whether or not the model makes such x. A relative
  of posterior SBC (Saeilynoja, Schmitt, Buerkner and Vehtari 2025, https://arxiv.org/abs/2502.03279), which simulates further data
  from the posterior; here the posterior itself is known by a reference, and the guide is held against it at the x of interest.

Both are averages over x: errors that cancel over the data do not show, and what shows need not be there at every datum.
All is in unconstrained coordinates, in float64 on the CPU; draws come in chunks, so that memory does not grow with L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from annotated_types import Ge
from torch import Tensor

from elbowroom.analysis.uniformity import holm, uniformity
from elbowroom.errors import UnsupportedProgram
from elbowroom.inference import discrete
from elbowroom.inference.posterior import Posterior
from elbowroom.inference.simulate import simulate
from elbowroom.inference.target import LogJoint

LEVELS = (0.5, 0.8, 0.9, 0.95)
MOST = 10  # coordinates tested; their projections stand for the others
PROJECTIONS = 3
NAMED = 0.05  # familywise level at which a direction is named
BLOCK = 2**22  # draws x data x quantities held at once
OF_PRIOR = 32  # draws per datum for the prior's variance, where all data share the prior
SALT = {"guide": 32_452_843, "ties": 49_979_687, "prior": 67_867_967, "rows": 86_028_121, "truth": 104_395_301}
REPEAT = 15_487_469  # between simulations of the same data: neither is the guide's chunk's
CHUNK_STEP = 122_949_823


def simulated(
    log_joint: LogJoint, *, data: Annotated[int, Ge(1)] = 1000, draws: Annotated[int, Ge(2)] = 255, seed: int = 0
) -> xr.Dataset:
    """Calibrate the guide on data simulated from the model, whose true z is known (regime S).

    Args:
        log_joint: the model and guide; of its data only what stands beside x (covariates, holes) is used.
        data: number of simulations, whatever the number of data: rows are repeated, or chosen at random.
        draws: draws L of the guide per simulation.
        seed: random seed.

    Returns:
        Over `quantity`: the coordinates `z[j]` (the first ten), `|z|`, three projections (of z in the prior's sd, directions fixed),
        entries of the discrete sites, `log p(z)`, `log p(x|z)`, `log p(x, z)`, in which discrete sites beside continuous ones are
        summed out.

        * `pit` (quantity, simulation); NaN where a value is not a number, counted in `lost` (quantity), and where a latent is
          masked out. `infinite` (quantity): simulations with an infinite value, which has a rank like any other
        * `p_value`, exact, and `p_holm`, after Holm over the quantities; `effect` = max |ECDF - u|; `shift`, `spread`, `direction`
          (`too narrow`, `too wide`, `shifted up`, `shifted down`, `uneven`; empty where p_holm exceeds 5 %; a word about the
          guide's distribution of this quantity): see `uniformity`
        * `ecdf`, `ecdf_lower`, `ecdf_upper` (quantity, point): the ECDF and its simultaneous 95 % band
        * `coverage`, `coverage_se` (level, coordinate): share of the true z_j in the guide's central intervals, all coordinates
        * `z_score` = (E_q z_j - z*_j) / sd_q z_j and `contraction` = 1 - var_q z_j / var_prior z_j (simulation, coordinate);
          absent, with the coverage, where all latents are discrete. Schad, Betancourt and Vasishth 2021,
          https://arxiv.org/abs/1904.12765
        * `obs_id` (simulation): the datum whose covariates and holes it has

        Attributes: `regime`, `simulations`, `draws`, `seed`, and `summary`, a sentence.

    Raises:
        UnsupportedProgram: the model cannot be simulated from, see `simulate`.
    """
    n = log_joint.n_obs
    rows = torch.arange(data) % n if data > n else _some(n, data, seed)
    part = log_joint if data == n else log_joint.subset(rows.to(log_joint.device))
    if part is not None:
        other, z = simulate(part, seed)
        found = _measure(other, z, draws, seed)
    else:  # the arguments cannot be taken apart: all data, as often as it takes
        runs = []
        for k in range(math.ceil(data / n)):
            other, z = simulate(log_joint, seed + REPEAT * k)
            runs.append(_measure(other, z, draws, seed + REPEAT * k))
        rows = torch.cat([torch.arange(data // n * n) % n, _some(n, data % n, seed)])
        last = (data // n) * n + rows[data // n * n :]
        found = _joined(runs).rows(torch.cat([torch.arange(data // n * n), last]))
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
    """Calibrate the guide on the data themselves, against one certified draw of each datum's posterior (regime R).

    Where q(z|x) = p(z|x) at these x the PIT is uniform, whether or not the model is right about x. Where the PIT is uniform, q = p
    on average over these x, as far as the quantities see it. One draw per datum, so that the values are independent.

    Args:
        log_joint: the model and guide.
        reference: posteriors of the same data. Data that are neither exact nor certified are left out, and counted.
        data: most data to use, chosen at random.
        draws: draws L of the guide per datum; fresh ones, not those of the audit.
        seed: random seed; not the reference's.

    Returns:
        As `simulated`, with a datum in the place of a simulation and a certified draw in that of the true z. Attributes also:
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
    generator = torch.Generator().manual_seed(seed + SALT["truth"])
    index = torch.randint(len(flat), (n,), generator=generator).to(flat.device)
    z = flat[index, torch.arange(n, device=flat.device)].to(log_joint.device)
    part = log_joint if len(rows) == n else log_joint.subset(rows.to(log_joint.device))
    if part is not None:
        found = _measure(part, z[rows.to(z.device)], draws, seed)
    else:
        found = _measure(log_joint, z.nan_to_num(), draws, seed).rows(rows)
    aside = f" ({left_out} are not certified and left out)" if left_out else ""
    said = f"{len(rows)} of {n} data{aside}, a certified draw ({reference.method}) among {draws} guide draws each"
    facts: dict[str, Any] = {"draws": draws, "seed": seed, "left_out": left_out, "method": reference.method}
    return _dataset(found, rows, said, regime="observed", **facts)


# -- ranks ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """What was measured at n data: Q quantities, the coordinates first.

    Attributes:
        names: of the quantities.
        pit: (n, Q), NaN where a value is not a number, or masked out.
        infinite: whether a value is infinite, (n, Q).
        masked: whether the program masks the latent out, (n, Q).
        z_score: (n, d).
        contraction: (n, d).
    """

    names: list[str]
    pit: Tensor
    infinite: Tensor
    masked: Tensor
    z_score: Tensor
    contraction: Tensor

    def rows(self, index: Tensor) -> _Found:
        """Return some of the data."""
        parts = {name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **parts)


def _joined(parts: list[_Found]) -> _Found:
    columns = {k: torch.cat([getattr(p, k) for p in parts]) for k, v in vars(parts[0]).items() if isinstance(v, Tensor)}
    return replace(parts[0], **columns)


def _some(n: int, size: int, seed: int) -> Tensor:
    """Choose at most `size` of n rows, in order."""
    generator = torch.Generator().manual_seed(seed + SALT["rows"])
    return torch.randperm(n, generator=generator)[:size].sort().values


def _measure(log_joint: LogJoint, truth: Tensor, draws: int, seed: int) -> _Found:
    """Rank the truth, z (n, d), among draws of the guide; where all latents are discrete, a truth is drawn from p(c|x)."""
    with torch.no_grad():
        return _of_discrete(log_joint, draws, seed) if log_joint.dim == 0 else _of_continuous(log_joint, truth, draws, seed)


def _of_continuous(log_joint: LogJoint, truth: Tensor, draws: int, seed: int) -> _Found:
    n, d = log_joint.n_obs, log_joint.dim
    variance = _prior_variance(log_joint, draws, seed)
    generator = torch.Generator().manual_seed(0)  # of the directions: the same for every seed
    direction = torch.randn(PROJECTIONS if d > 1 else 0, d, dtype=torch.float64, generator=generator)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    names = [f"z[{j}]" for j in range(d)] + ["|z|"] + [f"projection[{k}]" for k in range(len(direction))]
    entries = [site.name for site in log_joint.program.discrete if site.name in log_joint.program.guide_sites]

    def quantities(z: Tensor, salt: int, which: Any) -> tuple[Tensor, list[str]]:
        prior, likelihood = (t.double().cpu() for t in log_joint.terms(z))
        also, labels = torch.empty(*z.shape[:2], 0, dtype=torch.float64), []
        if entries:
            also, labels = _entries({k: v for k, v in _discrete(log_joint, z, salt, which).items() if k in entries})
        u = z.double().cpu()
        if log_joint.program.active is not None:
            u = u * log_joint.program.active.cpu()
        scaled = (u / variance.sqrt()) @ direction.T
        last = torch.stack([prior, likelihood, prior + likelihood], -1)
        return torch.cat([u, u.norm(dim=-1, keepdim=True), scaled, also, last], -1), labels

    right, labels = quantities(truth[None].to(log_joint.device), seed + SALT["truth"], "model")
    names += [*labels, "log p(z)", "log p(x|z)", "log p(x, z)"]
    ranks, moments = _Ranks(right[0]), _Moments()
    for size, number in _chunks(draws, n * len(names)):
        z = log_joint.draw("guide", size, seed + SALT["guide"] + CHUNK_STEP * number)
        moments.add(z.double().cpu())
        ranks.add(quantities(z, seed + SALT["guide"] + CHUNK_STEP * number + 1, "guide")[0])
    masked = torch.zeros_like(ranks.infinite)
    if log_joint.program.active is not None:
        masked[:, :d] = ~log_joint.program.active.cpu()
    score = (moments.mean - truth.double().cpu()) / moments.variance.sqrt()
    contraction = 1 - moments.variance / variance
    hide = masked[:, :d]
    return _Found(
        names,
        ranks.pit(seed + SALT["ties"]).masked_fill(masked, torch.nan),
        ranks.infinite & ~masked,
        masked,
        score.masked_fill(hide | ~score.isfinite(), torch.nan),
        contraction.masked_fill(hide | ~contraction.isfinite(), torch.nan),
    )


def _of_discrete(log_joint: LogJoint, draws: int, seed: int) -> _Found:
    """Rank a draw of p(c|x), known exactly, among draws of q(c|x); (c, x) then has the same distribution as (c*, x)."""
    found, n = discrete.table(log_joint), log_joint.n_obs

    def quantities(index: Tensor) -> tuple[Tensor, list[str]]:
        values, names = _entries(discrete.at(log_joint, index))
        densities = (found.log_prior, found.log_likelihood, found.log_joint)
        last = [t.gather(0, index.clamp_min(0)).double().masked_fill(index < 0, torch.nan).cpu() for t in densities]
        return torch.cat([values, torch.stack(last, -1)], -1), [*names, "log p(z)", "log p(x|z)", "log p(x, z)"]

    right, names = quantities(discrete.draw(found.log_posterior, 1, seed + SALT["truth"]))
    ranks = _Ranks(right[0])
    for size, number in _chunks(draws, n * len(names)):
        ranks.add(quantities(discrete.draw(found.log_guide, size, seed + SALT["guide"] + CHUNK_STEP * number))[0])
    none = torch.empty(n, 0, dtype=torch.float64)
    masked = torch.zeros_like(ranks.infinite)
    return _Found(names, ranks.pit(seed + SALT["ties"]), ranks.infinite, masked, none, none)


def _discrete(log_joint: LogJoint, z: Tensor, seed: int, which: Any) -> dict[str, Tensor]:
    return discrete.discrete_draws(log_joint, z, seed, which=which)


def _entries(sites: dict[str, Tensor]) -> tuple[Tensor, list[str]]:
    """Lay the first ten entries of discrete sites out as quantities, (S, n, E)."""
    columns, names = [], []
    for name, value in sites.items():
        flat = value.double().cpu().flatten(2) if value.dim() > 2 else value.double().cpu()[..., None]
        columns.append(flat)
        names += [name] if flat.shape[-1] == 1 else [f"{name}[{j}]" for j in range(flat.shape[-1])]
    return torch.cat(columns, -1)[..., :MOST], names[:MOST]


class _Ranks:
    """Counts the draws below the truth, (n, Q), and equal to it."""

    def __init__(self, truth: Tensor) -> None:
        self.truth, self.total = truth, 0
        self.less, self.same = torch.zeros_like(truth), torch.zeros_like(truth)
        self.lost, self.infinite = truth.isnan(), truth.isinf()

    def add(self, values: Tensor) -> None:
        """Count draws (S, n, Q)."""
        self.total += len(values)
        self.less += (values < self.truth).sum(0)
        self.same += (values == self.truth).sum(0)
        self.lost |= values.isnan().any(0)
        self.infinite |= values.isinf().any(0)

    def pit(self, seed: int) -> Tensor:
        """Return the values, (n, Q), ties broken at random."""
        generator = torch.Generator().manual_seed(seed)
        place = torch.rand(self.truth.shape, dtype=torch.float64, generator=generator)
        return ((self.less + place * (1 + self.same)) / (self.total + 1)).masked_fill(self.lost, torch.nan)


class _Moments:
    """Mean and variance of draws that come in chunks, by the parallel form of Welford's algorithm (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, z: Tensor) -> None:
        """Take draws (S, n, d) in."""
        mean, scatter = z.mean(0), (z - z.mean(0)).square().sum(0)
        if not self.total:
            self.total, self.mean, self.scatter = len(z), mean, scatter
            return
        total, delta = self.total + len(z), mean - self.mean
        self.mean = self.mean + delta * len(z) / total
        self.scatter = self.scatter + scatter + delta.square() * self.total * len(z) / total
        self.total = total

    @property
    def variance(self) -> Tensor:
        """(n, d)."""
        return self.scatter / (self.total - 1)


def _chunks(draws: int, width: int) -> list[tuple[int, int]]:
    size = max(1, BLOCK // max(1, width))
    sizes = [size] * (draws // size) + [draws % size] * (draws % size > 0)
    return [(size, number) for number, size in enumerate(sizes)]


def _prior_variance(log_joint: LogJoint, draws: int, seed: int) -> Tensor:
    """Return var p(z_j), (1, d) where all data share the prior, and (n, d) where it depends on what stands beside them."""
    few = log_joint.sample_prior(3, seed + SALT["prior"])
    log_p = log_joint.terms(few[:, :1].expand(-1, log_joint.n_obs, -1))[0]
    shared = log_joint.program.active is None and torch.allclose(log_p, log_p[:, :1], rtol=1e-6, atol=1e-6)
    moments = _Moments()
    for size, number in _chunks(OF_PRIOR if shared else draws, log_joint.n_obs * log_joint.dim):
        z = log_joint.sample_prior(size, seed + SALT["prior"] + CHUNK_STEP * (number + 1)).double().cpu()
        moments.add(z.flatten(0, 1)[:, None] if shared else z)
    return moments.variance


# -- layout --------------------------------------------------------------------------------------------------------------------


def _dataset(found: _Found, rows: Tensor, said: str, **attrs: Any) -> xr.Dataset:
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

    The error is that of (k + 1) / (n + 2), which is not zero where all are covered.
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
