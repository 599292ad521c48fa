"""Comparison of runs on the same held-out data, with standard errors.

For runs r and held-out data n the estimand is the mean difference of log evidence, paired by datum,

    D_r = (1/N) sum_n [ log p_r(x_n) - log p_best(x_n) ],      se = sd_n(difference) / sqrt(N),      z = D_r / se

in nats per datum. Models are compared by exact or estimated log p(x), not by the ELBO, which also depends on the guide; the
gaps show the quality of the guide. A bound is not an estimate: data for which a run has only a bound are left out of the
difference and counted. Intervals that do not overlap can still decide.

PSIS-LOO (`az.compare`) is not suitable. It estimates log p(x_n | x_-n) with log p(x_n|z_n, theta) at posterior draws as the
pointwise likelihood. Here z_n is a local latent: without x_n its posterior is the prior, which importance weights from
p(z_n|x_n) do not reach. k-hat then fails, and the sum favours latents that memorise their datum. Since the decoder is fixed and
the data are held out, log p(x_n) with z_n integrated out is the quantity that LOO would estimate.
Vehtari, Gelman and Gabry 2017, https://arxiv.org/abs/1507.04544; Merkle, Furr and Rabe-Hesketh 2019 (local latents),
https://arxiv.org/abs/1802.04452.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from elbowroom.analysis.measures.evidence_kinds import CONTRADICTED, has_value, kinds
from elbowroom.analysis.measures.population import sampled
from elbowroom.analysis.measures.table import GOOD_K, column
from elbowroom.analysis.verdict.thresholds import bad_k, known, mean_se, median
from elbowroom.errors import RunFolderError, SpecError, damaged
from elbowroom.models import measure
from elbowroom.runs.advice import audited
from elbowroom.system.files import atomic

if TYPE_CHECKING:
    from elbowroom.runs.fitted import FittedModel

PER_DATUM = (
    "log_evidence",
    "log_evidence_se",
    "log_evidence_lower",
    "log_evidence_upper",
    "elbo",
    "gap_total",
    "gap_amortization",
    "gap_covariance",
    "gap_shape",
    "missed_mass",
    "pareto_k",
)
CLEAR = 2.0  # standard errors; a larger difference counts as one
SAME = 1e-3  # nats; two runs are the same if no datum differs by more
PER_RUN = {
    "known": ("1", "data whose log p(x) is a value, exact or a trusted estimate"),
    "certified": ("1", "data with a certified posterior and a value of log p(x)"),
    "mean": ("nats", "mean log p(x) over the data whose log p(x) is known in all runs"),
    "se": ("nats", "standard error of mean over data"),
    "difference": ("nats", "mean of log p(x) less that of the best run, over data known in both"),
    "difference_se": ("nats", "its standard error, paired"),
    "largest": ("nats", "largest |difference| of a datum"),
    "z": ("1", "difference / difference_se"),
    "paired": ("1", "data that difference rests on"),
    "left_out": ("1", "data that it does not: a bound in this run or the best one"),
    "above": ("1", "of those, data whose lower bound lies above the best run's upper one"),
    "below": ("1", "of those, data whose upper bound lies below the best run's lower one"),
    "gap": ("nats", "median gap over the run's certified data"),
    "gap_lower": ("nats", "lower end of its distribution-free 95 % interval"),
    "gap_upper": ("nats", "upper end of it"),
    "bad_k": ("1", f"data with k-hat > {GOOD_K}"),
}


@dataclass(frozen=True, eq=False)
class Versus:
    """Result of a comparison; print it.

    Attributes:
        table: over `run` (means, paired differences to the best, gaps) and over (`run`, `obs_id`) (evidence and gaps of each
            datum); attrs `best`, `data_sha256` and `notes`.
    """

    table: xr.Dataset

    @property
    def best(self) -> str:
        """The run with the highest mean log p(x); "" if none is known."""
        return str(self.table.attrs["best"])

    @property
    def notes(self) -> list[str]:
        """Sentences on what limits the comparison."""
        return str(self.table.attrs["notes"]).splitlines()

    def lines(self) -> list[tuple[str, ...]]:
        """Return the rows of the printed table, the head first, with one column for each run, from best to worst."""
        order = np.argsort(-np.nan_to_num(self.table["mean"].values, nan=-np.inf), kind="stable")
        head = (
            "",
            "mean log p(x) [nats]",
            "  difference to the best, paired",
            "  z",
            "  data left out",
            "    of these surely above, below",
            "gap [nats], median",
            "  95 % interval",
            f"k-hat > {GOOD_K}",
        )
        columns = [head, *(self._column(int(i)) for i in order)]
        rows = list(zip(*columns, strict=True))
        return [row for row in rows if any(row[1:])]

    def _column(self, i: int) -> tuple[str, ...]:
        row = {name: float(self.table[name].values[i]) for name in PER_RUN}
        name, n = str(self.table["run"].values[i]), self.table.sizes["obs_id"]
        if name == self.best:
            against = ("best", "")
        elif row["largest"] <= SAME:
            against = ("the same", "")
        elif math.isfinite(row["difference"]):
            z = f"{row['z']:+.1f}" if math.isfinite(row["z"]) else "not available"
            against = (_with_error(row["difference"], row["difference_se"]), z)
        else:
            against = ("not available", "")
        left = row["left_out"] and name != self.best
        gap = (f"{row['gap']:.3f}", f"{row['gap_lower']:.3f} to {row['gap_upper']:.3f}")
        return (
            name,
            _with_error(row["mean"], row["se"], "") if math.isfinite(row["mean"]) else "not available",
            *against,
            f"{row['left_out']:.0f} of {n}",
            f"{row['above']:.0f}, {row['below']:.0f}" if left else "",
            *(gap if math.isfinite(row["gap"]) else ("not available", "")),
            f"{row['bad_k']:.0f} of {n}",
        )

    def verdict(self) -> list[str]:
        """Return the conclusions, in sentences."""
        if not self.best:
            return ["log p(x) is known for none of the data in any run: bounds alone rank no models."]
        said = []
        for i, name in enumerate(self.table["run"].values.astype(str)):
            if name == self.best:
                continue
            difference, error, largest, n = (
                float(self.table[key].values[i]) for key in ("difference", "difference_se", "largest", "paired")
            )
            if not math.isfinite(difference):
                said.append(f"{name} and {self.best} have no data where log p(x) is known in both.")
            elif largest <= SAME:
                said.append(f"{name} and {self.best} are the same: log p(x) of none of {n:.0f} data differs by {SAME} nats.")
            elif abs(difference) > CLEAR * error:
                said.append(f"{name} is worse than {self.best} by {_with_error(-difference, error, '')} nats per datum.")
            else:
                said.append(f"{name} cannot be told from {self.best}: {_with_error(difference, error)} nats per datum.")
        return [*said, *self.notes]

    def tree(self) -> dict[str, Any]:
        """Return the runs' numbers as dictionaries, lists and scalars (`--json`)."""
        number = lambda value: float(value) if math.isfinite(value) else None
        runs = [
            {"run": str(name), **{key: number(self.table[key].values[i]) for key in PER_RUN}}
            for i, name in enumerate(self.table["run"].values)
        ]
        return {"best": self.best, "data": self.table.sizes["obs_id"], "runs": runs, "verdict": self.verdict()}

    def to_csv(self, path: str | Path) -> None:
        """Write one line per datum, with a column for each quantity and run, such as `log_evidence[digits]`."""
        per_datum = [name for name in self.table if self.table[name].dims == ("run", "obs_id")]
        parts = {
            f"{name}[{run}]": self.table[name].sel(run=run).values for run in self.table["run"].values for name in per_datum
        }
        flat = xr.Dataset({name: ("obs_id", value) for name, value in parts.items()}, {"obs_id": self.table["obs_id"].values})
        with atomic(path) as temporary:
            flat.to_dataframe().to_csv(temporary)

    def __repr__(self) -> str:
        rows = self.lines()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"{self.table.sizes['obs_id']} held-out data", *text, *self.verdict()])


def compare(runs: Iterable[str | Path | FittedModel], *, allow_python: bool = False) -> Versus:
    """Compare audited runs by their held-out log p(x), paired by datum.

    Args:
        runs: two or more runs or their folders, each audited on the same rows of the same data.
        allow_python: as in `Run.load`, for folders.

    Returns:
        The comparison; print it, or read `.table`.

    Raises:
        RunFolderError: a run is missing or has no audit, its audit is of other weights, or the data differ.
        SpecError: there are fewer than two runs.

    Example:
        >>> import elbowroom as er
        >>> er.compare(["runs/digits", "runs/digits-retrained"])  # doctest: +SKIP
    """
    from elbowroom.runs.fitted import FittedModel

    given = list(runs)
    if len(given) < 2:
        raise SpecError("compare: needs at least two runs")
    loaded = [run if isinstance(run, FittedModel) else FittedModel.load(run, allow_python=allow_python) for run in given]
    places = [run.path.resolve() for run in loaded]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise SpecError(f"compare: {twice} is given twice")
    tables = [_table(run) for run in loaded]
    for run, table in zip(loaded[1:], tables[1:], strict=True):
        _check(loaded[0], tables[0], run, table)
    with damaged(" or ".join(str(run.path / "audit.nc") for run in loaded), "audit again"):
        return Versus(tabulate(_names(loaded), tables, _notes(loaded)))


def tabulate(names: Sequence[str], tables: Sequence[xr.Dataset], notes: Sequence[str] = ()) -> xr.Dataset:
    """Arrange tables of audits over `run` and `obs_id`, with paired differences to the best run.

    The tables have the same `obs_id` in any order; where budgets let only random samples be audited, the data of all samples
    are compared. `notes` are sentences for the attributes.
    """
    labels = np.sort(tables[0]["obs_id"].values)
    for table in tables:  # random samples, where a budget cut an audit short
        labels = np.intersect1d(labels, sampled(table)["obs_id"].values)
    ordered = [table.sel(obs_id=labels) for table in tables]
    each = {name: np.stack([column(table, name) for table in ordered]) for name in PER_DATUM}
    evidence = each["log_evidence"]
    value = np.stack([has_value(table) for table in ordered])
    common = value.all(0)
    per_run: dict[str, list[float]] = {name: [] for name in PER_RUN}
    means = [float(row[common].mean()) if common.any() else math.nan for row in evidence]
    if not common.any():  # no datum is known in all runs: each run is ranked by its own known data
        means = [float(row[there].mean()) if there.any() else math.nan for row, there in zip(evidence, value, strict=True)]
    best = int(np.nanargmax(means)) if np.isfinite(means).any() else None
    for i, table in enumerate(ordered):
        certain = known(table)
        gap = median(column(table, "gap_total")[certain])
        here = evidence[i][common]
        both = value[i] & value[best] if best is not None else np.zeros(len(labels), dtype=bool)
        d = evidence[i][both] - evidence[best][both] if best is not None else np.empty(0)
        mean, error = mean_se(d) if i != best else (0.0, 0.0)
        low, high = each["log_evidence_lower"], each["log_evidence_upper"]
        found = {
            "known": value[i].sum(),
            "certified": certain.sum(),
            "mean": here.mean() if here.size else math.nan,
            "se": mean_se(here)[1],
            "difference": mean,
            "difference_se": error,
            "largest": np.abs(d).max() if d.size else math.nan,
            "z": mean / error if error > 0 else math.nan,
            "paired": both.sum(),
            "left_out": (~both).sum(),
            "above": 0 if best is None else (~both & (low[i] > high[best])).sum(),
            "below": 0 if best is None else (~both & (high[i] < low[best])).sum(),
            "gap": gap[0],
            "gap_lower": gap[1],
            "gap_upper": gap[2],
            "bad_k": bad_k(table),
        }
        for name, number in found.items():
            per_run[name].append(float(number))
    said = list(notes)
    if not common.all():
        left = int((~common).sum())
        said.append(
            f"log p(x) of {left} of {len(labels)} data is only a bound in some run: they enter no mean and no difference."
        )
    if wrong := int(np.any([kinds(table) == CONTRADICTED for table in ordered], axis=0).sum()):
        said.append(
            f"log p(x) of {wrong} of {len(labels)} data is contradicted in some run: it lies below the ELBO by more than the "
            "errors allow, and no difference that rests on it can be relied on."
        )
    table = xr.Dataset(
        {
            **{name: ("run", np.array(values)) for name, values in per_run.items()},
            **{name: (("run", "obs_id"), values) for name, values in each.items()},
            "evidence_method": (("run", "obs_id"), np.stack([t["evidence_method"].values.astype(str) for t in ordered])),
        },
        coords={"run": np.array(names, dtype=str), "obs_id": labels},
        attrs={
            "best": names[best] if best is not None else "",
            "data_sha256": str(tables[0].attrs.get("data_sha256", "")),
            "notes": "\n".join(said),
        },
    )
    for name, (units, long_name) in PER_RUN.items():
        table[name].attrs = {"units": units, "long_name": long_name}
    for name in PER_DATUM:
        table[name].attrs = dict(ordered[0][name].attrs) if name in ordered[0] else {}
    return table


def _with_error(mean: float, error: float, sign: str = "+") -> str:
    """Format a mean with its standard error, which a single datum does not have."""
    return f"{mean:{sign}.3f} +- {error:.3f}" if math.isfinite(error) else f"{mean:{sign}.3f} (one datum, no error)"


def _table(run: FittedModel) -> xr.Dataset:
    """Return the audit of a run's own test data; refuse one of other weights."""
    from elbowroom.spec.warm_start import fingerprint

    table = audited(run)
    if table.attrs.get("weights_sha256") != fingerprint(run.vae.state_dict()):
        raise RunFolderError(f"{run.path}: its audit is of other weights; run `elbowroom audit {run.path}` again")
    return table


def _check(first: FittedModel, a: xr.Dataset, other: FittedModel, b: xr.Dataset) -> None:
    """Refuse audits of different data."""
    if a.attrs.get("data_sha256") != b.attrs.get("data_sha256"):
        raise RunFolderError(f"{other.path}: was fitted to other data than {first.path}; only runs on the same data compare")
    mine, theirs = np.sort(a["obs_id"].values), np.sort(b["obs_id"].values)
    if not np.array_equal(mine, theirs):
        shared = np.intersect1d(mine, theirs).size
        raise RunFolderError(
            f"{other.path}: its audit is of {theirs.size} data, of which {shared} are among the {mine.size} of {first.path}; "
            "audit the same rows (the seed splits the data, audit.observations says how many)"
        )


def _names(runs: Sequence[FittedModel]) -> list[str]:
    """Return the folders' names if they are distinct, else their paths."""
    names = [run.path.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _notes(runs: Sequence[FittedModel]) -> list[str]:
    """Return a warning if probability masses are compared with densities."""
    kinds = {str(run.path): measure.kind(run.vae) for run in runs}
    if len(set(kinds.values())) < 2:
        return []
    told = ", ".join(f"{run.experiment.spec.model.likelihood.name} ({kinds[str(run.path)]})" for run in runs)
    return [
        f"NOT comparable: {told}: a density may exceed 1 and changes with the units of x, a mass does neither; "
        "log p(x) of the two says nothing about which model is better."
    ]
