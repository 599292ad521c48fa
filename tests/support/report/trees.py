"""Small trees of a diagnosis, for sound and for faulty cases, and what a figure of them draws."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from elbowroom.analysis.checks.uniformity import holm, uniformity
from elbowroom.analysis.plots.style import Absent, Plot
from elbowroom.analysis.report import report
from elbowroom.analysis.verdict import judgement
from elbowroom.analysis.verdict.thresholds import MISFIT as thresholds_MISFIT
from elbowroom.analysis.verdict.thresholds import MODE_MISSED
from support.report.run_folder import INJECTION

SPLITS = ("test", "train", "validation", "simulated")


@pytest.fixture(scope="module", autouse=True)
def coarse():
    """Write small pictures: what is said is tested here, and sizes are in test_report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "DPI", 40)
        yield


def sbc(regime: str, *, n: int = 300, narrow: float = 1.0, shift: float = 0.0, d: int = 2, seed: int = 0) -> xr.Dataset:
    """Ranks of true draws among those of a normal guide that is too narrow by a factor, or shifted."""
    from scipy.special import ndtr

    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, d)) / narrow - shift
    pit = np.concatenate([ndtr(z).T, rng.uniform(size=(2, n))])
    found = [uniformity(values) for values in pit]
    names = [f"z[{j}]" for j in range(d)] + ["log p(z)", "log p(x|z)"]
    p_holm = holm(np.array([one.p_value for one in found]))
    level = np.array([0.5, 0.8, 0.9, 0.95])
    inside = np.stack([(np.abs(pit[:d] - 0.5) <= one / 2).mean(1) for one in level])
    stack = lambda name: (("quantity", "point"), np.stack([getattr(one, name) for one in found]))
    return xr.Dataset(
        {
            "pit": (("quantity", "simulation"), pit),
            "p_holm": ("quantity", p_holm),
            "effect": ("quantity", np.array([one.effect for one in found])),
            "direction": (
                "quantity",
                np.array([one.direction if p <= 0.05 else "" for one, p in zip(found, p_holm, strict=True)]),
            ),
            "lost": ("quantity", np.zeros(len(names), dtype=int)),
            "ecdf": stack("ecdf"),
            "ecdf_lower": stack("lower"),
            "ecdf_upper": stack("upper"),
            "coverage": (("level", "coordinate"), inside),
            "coverage_se": (("level", "coordinate"), np.sqrt(inside * (1 - inside) / n)),
            "z_score": (("simulation", "coordinate"), z),
            "contraction": (("simulation", "coordinate"), rng.uniform(0.8, 0.95, size=(n, d))),
        },
        coords={"quantity": names, "point": found[0].points, "level": level, "coordinate": names[:d]},
        attrs={"regime": regime, "left_out": 3 if regime == "observed" else 0, "simulations": n},
    )


def gaps(
    n: int = 40, *, encoder: float = 0.0, covariance: float = 0.0, shape: float = 0.01, bounds: int = 0, told: bool = True
):
    """An audit whose parts of the gap scatter by a tenth about given medians; for the last `bounds` only bounds are known."""
    wobble = 1 + 0.1 * np.linspace(-1, 1, n)
    unknown = np.arange(n) >= n - bounds
    part = lambda value: np.where(unknown, np.nan, value * wobble)
    total = part(encoder + covariance + shape)
    columns = {
        "log_evidence": np.where(unknown, np.nan, -20.0),
        "gap_total": total,
        "gap_total_lower": np.where(unknown, 5.0, total - 0.01),
        "gap_shape": part(shape),
        "gap_approximation": part(covariance + shape),
        "missed_mass": np.zeros(n),
        "elbo_se": np.full(n, 0.01),
        "log_evidence_se": np.zeros(n),
        "pareto_k": np.zeros(n),
    }
    nothing = np.full(n, np.nan)
    columns |= {"gap_amortization": part(encoder) if told else nothing, "gap_covariance": part(covariance) if told else nothing}
    status = np.where(unknown, "uncertified", "exact")[:, None]
    return xr.Dataset(
        {name: ("obs_id", values) for name, values in columns.items()} | {"status": (("obs_id", "reference"), status)},
        coords={"obs_id": np.arange(n), "reference": ["grid"]},
    )


def latents(rate, *, collapsed=(), ignored=(), n: int = 100, lower: float | None = None) -> xr.Dataset:
    """What latents of the given rates carry."""
    rate = np.asarray(rate, dtype=float)
    flag = lambda rows: np.isin(np.arange(len(rate)), rows)
    total = float(rate.sum())
    lower = 0.8 * total if lower is None else lower
    scalars = {
        "information_data": n,
        "information_lower": lower,
        "information_upper": lower + 0.1,
        "information_lower_se": 0.01,
        "information_upper_se": 0.01,
        "rate_mean": total,
        "rate_se": 0.05,
        "aggregate_p_value": 0.5,
    }
    sensitivity = np.where(flag(collapsed), 0.0, np.maximum(5 * rate, 1.0))
    return xr.Dataset(
        {
            "rate_coordinate_mean": ("coordinate", rate),
            "active_variance": ("coordinate", rate / 2),
            "active": ("coordinate", rate > 0.02),
            "sensitivity": ("coordinate", sensitivity),
            "sensitivity_se": ("coordinate", 0.05 * sensitivity),
            "collapsed": ("coordinate", flag(collapsed)),
            "ignored": ("coordinate", flag(ignored)),
            **{name: ((), value) for name, value in scalars.items()},
        },
        coords={"coordinate": np.arange(len(rate))},
    )


def criticism(z, p, effect, kinds=None) -> xr.Dataset:
    """Checks whose observations lie z null standard deviations out."""
    k = len(z)
    null = np.random.default_rng(0).normal(10, 2, size=(k, 200))
    return xr.Dataset(
        {
            "value": ("statistic", null.mean(1) + np.asarray(z) * null.std(1)),
            "null_mean": ("statistic", null.mean(1)),
            "null_sd": ("statistic", null.std(1)),
            "p_value": ("statistic", np.asarray(p)),
            "p_adjusted": ("statistic", np.asarray(p)),
            "effect": ("statistic", np.asarray(effect)),
            "words": ("statistic", np.array([f"check {i} <b>of entries</b>" for i in range(k)])),
            "effect_kind": ("statistic", np.array(kinds or ["relative"] * k)),
            "null": (("statistic", "replicate"), null),
        },
        coords={"statistic": [f"s{i}" for i in range(k)]},
        attrs={"joint": "", "residual": ""},
    )


def pit(largest: float, columns: int = 12, low: int = 0) -> xr.Dataset:
    """PIT that bulges by `largest` in the middle."""
    u = np.arange(1, 101) / 100
    p = np.where(np.arange(columns) < low, 0.005, 0.5)
    return xr.Dataset(
        {
            "effect": ("column", np.full(columns, 0.1)),
            "p_value": ("column", p),
            "difference": ("u", 4 * largest * u * (1 - u)),
            "band": ((), 0.02),
        },
        coords={"column": np.arange(columns), "u": u},
    )


def predictions(shift: float = 0.0, d: int = 6, counts: bool = True, holes: bool = False, n: int = 100) -> xr.DataTree:
    """Counts (or real numbers) and replicates of them, those from the prior shifted."""
    rng = np.random.default_rng(0)
    make = (lambda m, s: rng.poisson(m, s).astype(float)) if counts else (lambda m, s: rng.normal(m, 1.0, s))
    x, posterior, prior = make(4.0, (n, d)), make(4.0, (1, 20, n, d)), make(4.0 + shift, (1, 20, n, d))
    if holes:
        x[::3, 0] = np.nan
    many = ("chain", "draw", "obs_id", "x_dim_0")
    return xr.DataTree.from_dict(
        {
            "observed_data": xr.Dataset({"x": (many[2:], x)}),
            "posterior_predictive": xr.Dataset({"x": (many, posterior)}),
            "prior_predictive": xr.Dataset({"x": (many, prior)}),
        }
    )


def verdicts(*found: judgement.Judgement) -> xr.Dataset:
    return judgement.as_dataset(list(found))


MISFIT = judgement.Judgement(
    thresholds_MISFIT,
    0.3,
    np.nan,
    np.nan,
    "effect",
    f"1 of 3 checks fails {INJECTION}",
    "p at most 0.01",
    "Try another likelihood.",
)
MISSED = judgement.Judgement(
    MODE_MISSED, 0.25, 0.2, 0.3, "share of the data", "the guide misses a mode", "modes are missed", "Use a mixture."
)


def whole(*, missing: str = "", leave_out=()) -> xr.DataTree:
    """A whole diagnosis with faults."""
    groups = {
        "verdicts": verdicts(MISSED, MISFIT),
        "prior_sbc": sbc("simulated", n=300, narrow=0.6),
        "posterior_sbc": sbc("observed", n=80, seed=1),
        "information": latents([2.0, 1.0]),
        "checks": criticism([0.2, 9.0, 4.0], [0.9, 0.0025, 0.005], [0.01, 0.4, 0.05]),
        "pit": pit(0.01),
        "train": gaps(encoder=0.05),
        "simulated": gaps(encoder=0.2, bounds=4),
    }
    tree = xr.DataTree.from_dict({name: group for name, group in groups.items() if name not in leave_out})
    if "predictive" not in leave_out:
        for name, child in predictions().children.items():
            tree[name] = child
    tree.attrs["missing"] = missing
    return tree


def drawn_lines(plot: Plot) -> list[np.ndarray]:
    """Return the y values of all lines of a figure."""
    return [np.asarray(line.get_ydata(), dtype=float) for axes in plot.figure.axes for line in axes.lines]


def contains(plot: Plot, values: np.ndarray) -> bool:
    """Whether some line of the figure goes through these values, but for its ends."""
    return any(len(y) == len(values) + 2 and np.allclose(y[1:-1], values) for y in drawn_lines(plot))


def saved(plot: Plot | Absent) -> Plot:
    """Draw the figure to the last stroke."""
    assert isinstance(plot, Plot), plot
    plot.figure.savefig("/dev/null", format="png", dpi=40)
    assert plot.alt
    assert "nan" not in plot.caption.lower().split()
    assert "not known" not in plot.caption
    return plot
