"""The key figures and texts of a report, from the tables of a run folder.

Only values of log p(x) (exact, or a trusted estimate) enter a mean or a gap; data with bounds alone are counted and listed. All
log densities are in nats per datum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from elbowroom.analysis.measures.evidence_kinds import BOUND, CONTRADICTED, ESTIMATE, EXACT, VALUES, counts, kinds, methods
from elbowroom.analysis.measures.population import population, sampled
from elbowroom.analysis.measures.table import GOOD_K, best_reference, column, trusted
from elbowroom.analysis.plots.style import count, percent, say
from elbowroom.analysis.verdict.thresholds import mean_se


@dataclass(frozen=True)
class Figure:
    """A key figure: a number, its name, and its evidence."""

    label: str
    value: str
    unit: str
    note: str


@dataclass(frozen=True)
class WorstRow:
    """One line of the table of the worst data; every field is ready to print."""

    obs_id: int
    cells: tuple[str, ...]
    reason: str


WORST_COLUMNS = (
    ("ELBO", "nats"),
    ("log p(x)", "nats"),
    ("gap", "nats, 95% interval"),
    ("k-hat", ""),
    ("mean error", "posterior sd"),
    ("sd ratio", ""),
    ("reference", ""),
)


def _with_error(mean: float, error: float) -> str:
    """Format mean ± error with two digits of the error."""
    if not math.isfinite(mean):
        return "–"
    if not math.isfinite(error) or error <= 0:
        return say(mean, 4)
    decimals = min(max(0, 1 - math.floor(math.log10(error))), 6)
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}".replace("-", "−")


def _evidence_note(table: xr.Dataset) -> str:
    kind, by = counts(table), " and ".join(methods(table, *VALUES))
    parts = [f"{word} for {kind[name]:,}" for name, word in VALUES.items() if kind[name]]
    if kind[BOUND]:
        parts.append(f"unknown for {kind[BOUND]:,}, which are not in this mean")
    return f"{', '.join(parts)} of {count(table.sizes['obs_id'])} (by {by})"


def _bits(mean: float, error: float, entries: int | None) -> str:
    """Format mean and standard error as a code length: -log p(x) / (D log 2)."""
    if not entries or not math.isfinite(mean):
        return ""
    unit = entries * math.log(2)
    return f" {_with_error(-mean / unit, error / unit)} bits per dimension."


def of_all(table: xr.Dataset) -> list[Figure]:
    """Return the key figure for all data where a budget let only a random sample be audited; the others are the sample's."""
    if sampled(table) is table:
        return []
    found, n = population(table), table.sizes["obs_id"]
    row = found.sel(quantity="gap_total")
    mean, low, high = (float(row[name]) for name in ("mean", "lower", "upper"))
    sample = count(found.attrs["sample"])
    note = f"95 %: {say(low)} to {say(high)}, from a random sample of {sample}, which all else here is about."
    return [Figure(f"mean gap of all {n:,} data", say(mean), "nats", note)] if math.isfinite(mean) else []


def key_figures(table: xr.Dataset, entries: int | None, *, held_out: bool) -> list[Figure]:
    """Return the four to six key figures of the report.

    `entries` is the number of entries of one datum where the data are discrete: bits per dimension are then included.
    `held_out` says that the audited data took no part in the fit.
    """
    n = table.sizes["obs_id"]
    where = ", held out" if held_out else ""
    evidence, gap, k = (column(table, name) for name in ("log_evidence", "gap_total", "pareto_k"))
    figures = []
    mean, se = mean_se(evidence)
    if math.isfinite(mean):
        note = f"Mean ± SE over data; {_evidence_note(table)}.{_bits(mean, se, entries)}"
        kind = counts(table)
        label = "log p(x)" if kind[EXACT] else "estimate of log p(x)" if kind[ESTIMATE] else "contradicted log p(x)"
        figures.append(Figure(f"{label}{where}", _with_error(mean, se), "nats", note))
    else:
        mean, se = mean_se(column(table, "log_evidence_lower"))
        note = f"Mean ± SE of a probabilistic lower bound, over {count(n)}. log p(x) itself is not known for any of them."
        figures.append(Figure(f"lower bound on log p(x){where}", _with_error(mean, se), "nats", note))
    elbo, elbo_se = mean_se(column(table, "elbo"))
    figures.append(
        Figure(f"ELBO{where}", _with_error(elbo, elbo_se), "nats", f"Mean ± SE over {count(n)}.{_bits(elbo, elbo_se, entries)}")
    )
    known = gap[np.isfinite(gap)]
    if known.size:
        low, middle, high = (float(v) for v in np.quantile(known, [0.25, 0.5, 0.75]))
        bits = f", {say(middle / (entries * math.log(2)), 2)} bits per dimension" if entries else ""
        note = f"Median of log p(x) − ELBO over {count(known.size)}{bits}. Middle half: {say(low)} to {say(high)}."
        figures.append(Figure("median gap", say(middle), "nats", note))
        worst = int(np.nanargmax(gap))
        below = percent(float((known < 0.1).sum()), known.size)
        note = f"Datum {table['obs_id'].values[worst]}. {below} of the data lie below 0.1 nats."
        figures.append(Figure("largest gap", say(float(gap[worst])), "nats", note))
    else:
        note = f"log p(x) is known for none of {count(n)}, so neither is log p(x) − ELBO."
        figures.append(Figure("median gap", "–", "", note))
    good = int((k < GOOD_K).sum())
    note = f"{good:,} of {n:,}: there, weighted draws from the guide can be used."
    figures.append(Figure(f"k-hat below {GOOD_K}", percent(good, n), "", note))
    reference = best_reference(table)
    sure = int(trusted(table, reference).sum())
    name = "No reference posterior" if reference is None else f"{sure:,} of {n:,}, by {reference.replace('_', ' ')}"
    figures.append(Figure("posteriors exact or certified", percent(sure, n), "", f"{name}."))
    return figures


def worst_rows(table: xr.Dataset, size: int = 10) -> list[WorstRow]:
    """Return the data with the largest gaps, then, if these are few, those with an unknown gap."""
    gap, kind = column(table, "gap_total"), kinds(table)
    order = np.argsort(np.where(np.isfinite(gap), -gap, np.inf), kind="stable")[:size]
    reference = best_reference(table)
    if reference is None and "reference" in table.dims and table.sizes["reference"]:
        reference = str(table["reference"].values[0])
    part = table.sel(reference=reference) if reference is not None else None
    rows = []
    for n in order:
        one = {name: float(column(table, name)[n]) for name in ("elbo", "elbo_se", "log_evidence", "log_evidence_lower")}
        low, high = float(column(table, "gap_total_lower")[n]), float(column(table, "gap_total_upper")[n])
        evidence, room = "not known", f"at least {say(low)}" if 0 < low < math.inf else "not known"
        if math.isfinite(gap[n]):
            room = f"{say(float(gap[n]))} [{say(low)}, {say(high)}]"
        if math.isfinite(one["log_evidence"]):
            evidence = say(one["log_evidence"], 4) + (" (contradicted)" if kind[n] == CONTRADICTED else "")
        elif math.isfinite(one["log_evidence_lower"]):
            above = float(column(table, "log_evidence_upper")[n])
            evidence = f"≥ {say(one['log_evidence_lower'], 4)} (bound)"
            if math.isfinite(above):
                evidence = f"{say(one['log_evidence_lower'], 4)} to {say(above, 4)} (bounds)"
        cells = [f"{say(one['elbo'], 4)} ± {say(one['elbo_se'], 2)}", evidence, room, _short(column(table, "pareto_k")[n])]
        reason = ""
        if part is None:
            cells += ["–", "–", "none"]
        else:
            cells += [_short(part[name].values[n]) for name in ("mean_error", "sd_ratio")]
            cells.append(f"{str(reference).replace('_', ' ')}: {part['status'].values[n]}")
            reason = str(part["reason"].values[n]).removeprefix(f"{reference}: ") if "reason" in part else ""
        rows.append(WorstRow(int(table["obs_id"].values[n]), tuple(cells), reason))
    return rows


def _short(value: Any) -> str:
    return say(float(value), 2) if math.isfinite(float(value)) else "–"


def declared(
    spec: Mapping[str, Any] | None, split: Mapping[str, int] | None, table: xr.Dataset
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the settings of the run, as titled lists of (path, value).

    They come from the resolved spec, if there is one, the sizes of the data's parts, and the attributes of the audit's table.
    """
    blocks: list[tuple[str, list[tuple[str, str]]]] = []
    spec = dict(spec or {})
    record = spec.pop("record", None)
    for key in ("data", "model", "guide", "fit", "audit"):
        if isinstance(spec.get(key), Mapping):
            blocks.append((key, flatten(spec.pop(key))))
    other = flatten({key: value for key, value in spec.items() if key != "schema"})
    if split:
        other += [(f"{part} data", f"{size:,}") for part, size in split.items()]
    other.append(("audited data", f"{table.sizes['obs_id']:,}"))
    shown = dict(other)
    for key in ("seed", "plate", "latent_dim", "draws", "data", "notes"):
        if key in table.attrs and key not in shown and not (key in {"latent_dim", "draws", "data"} and blocks):
            other.append((key.replace("_", " "), str(table.attrs[key])))
    blocks.append(("run", other))
    if isinstance(record, Mapping):
        facts = dict(record)
        versions = facts.pop("versions", {})
        rows = flatten(facts)
        blocks.append(("record", rows + (flatten(versions) if isinstance(versions, Mapping) else [])))
    return [(title, rows) for title, rows in blocks if rows]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested mappings as (dotted path, text); a component is shown by its `name`."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            inner = dict(value)
            if "name" in inner:
                rows.append((path, str(inner.pop("name"))))
            rows += flatten(inner, f"{path}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            rows += flatten({str(i): item for i, item in enumerate(value)}, f"{path}.")
        elif isinstance(value, list):
            rows.append((path, " × ".join(map(str, value)) if key.endswith("shape") else ", ".join(map(str, value))))
        else:
            rows.append((path, "none" if value is None else str(value)))
    return rows
