"""The figure of the gap's parts, for the splits of the data and for data simulated from the model.

Only data with a value of log p(x) and a certified posterior are drawn. Data with bounds alone are counted in the caption.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from elbowroom.analysis.measures.table import SMALL_GAP, column
from elbowroom.analysis.plots.style import EXACT, INK, MUTED, PAPER, WIDE, Absent, Plot, canvas, count, say, styled
from elbowroom.analysis.verdict.thresholds import CAUSE, median
from elbowroom.analysis.verdict.thresholds import known as thresholds_known

PARTS = {
    "gap_amortization": ("amortization", "what the encoder misses of its family"),
    "gap_approximation": ("approximation", "what its family cannot reach"),
    "gap_covariance": ("covariance", "what a full covariance would gain"),
    "gap_shape": ("shape", "what no normal can reach"),
    "gap_total": ("total", "log p(x) − ELBO"),
}
PLATE = {"boxstyle": "round,pad=0.05", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.8}
ENOUGH = 2  # data of a split needed for a median with an interval


@styled
def parts(tables: Mapping[str, xr.Dataset]) -> Plot | Absent:
    """Draw medians, their 95 % intervals and the quartiles of the parts of the gap.

    `tables` holds audits by the name of their data, such as `test`, `train`, `simulated`, the audited ones first.
    """
    name = "parts"
    known = {split: thresholds_known(table) for split, table in tables.items()}
    shown = {split: table for split, table in tables.items() if known[split].sum() >= ENOUGH}
    if not shown:
        return Absent(name, "No parts of the gap: log p(x) has a value beside a certified posterior for none of the data.")
    values = _parts_of(shown, known)
    drawn = [part for part in PARTS if any(found.get(part, _finite([])).size >= ENOUGH for found in values.values())]
    figure = canvas(WIDE, 1.55 + 0.42 * len(shown), "What the gap consists of, and on which data")
    panels = np.atleast_1d(figure.subplots(1, len(drawn), sharex=True, sharey=True))
    for axes, part in zip(panels, drawn, strict=True):
        for row, split in enumerate(shown):
            _row(axes, row, values[split].get(part, _finite([])))
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_title(f"{PARTS[part][0]}\n{PARTS[part][1]}", fontsize=8.5)
        axes.set_xlabel("nats per datum")
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(shown)), [f"{_word(split)} ({int(known[split].sum())})" for split in shown])
    panels[0].tick_params(axis="y", labelsize=9, labelcolor=INK)
    panels[0].set_ylim(len(shown) - 0.5, -0.6)
    panels[0].set_xlim(*_limits(values))
    alt = (
        f"Medians with 95% intervals and quartiles of the gap's {', '.join(PARTS[part][0] for part in drawn)}, one row "
        f"for each of: {', '.join(_word(split) for split in shown)}."
    )
    return Plot(name, figure, alt, _caption(tables, known, values), wide=True)


def _parts_of(tables: Mapping[str, xr.Dataset], known: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Return the parts that add up to the gap, the same of each split: approximation in two where a guide is normal."""
    found = {
        split: {part: _finite(column(table, part)[known[split]]) for part in PARTS if part in table}
        for split, table in tables.items()
    }
    sizes = [{part: values.size for part, values in of_split.items()} for of_split in found.values()]
    halved = any(size.get("gap_covariance", 0) >= ENOUGH for size in sizes)
    whole = not halved and any(size.get("gap_approximation", 0) >= ENOUGH for size in sizes)
    left_out = ("gap_covariance", "gap_shape") if whole else ("gap_approximation",)
    return {
        split: {part: values for part, values in of_split.items() if part not in left_out} for split, of_split in found.items()
    }


def _word(split: str) -> str:
    return "training" if split == "train" else split


def _finite(values: np.ndarray | list[float]) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    return values[np.isfinite(values)]


def _limits(values: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[float, float]:
    """Return the range of quartiles and intervals, with room for the numbers; tails lie outside."""
    ends = [0.0]
    for found in values.values():
        for part in found.values():
            if part.size >= ENOUGH:
                ends += [*np.quantile(part, [0.25, 0.75]), *median(part)[1:]]
    span = max(max(ends) - min(ends), 1e-3)
    return min(ends) - 0.05 * span, max(ends) + 0.12 * span


def _row(axes: Axes, row: int, values: np.ndarray) -> None:
    if values.size < ENOUGH:
        axes.annotate(
            "not known", (0.03, row), xycoords=axes.get_yaxis_transform(), fontsize=8, color=MUTED, va="center", bbox=PLATE
        )
        return
    middle, low, high = median(values)
    axes.hlines(row, *np.quantile(values, [0.25, 0.75]), color=MUTED, linewidth=1.0)
    axes.hlines(row, low, high, color=EXACT, linewidth=4.5, alpha=0.45)
    axes.plot(middle, row, "o", color=EXACT, markersize=6)
    axes.annotate(
        say(middle, 2), (middle, row), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8, color=INK, bbox=PLATE
    )


def _interval(values: np.ndarray) -> str:
    middle, low, high = (say(value, 2) for value in median(values))
    return f"{middle} nats [{low}, {high}]"


def _caption(
    tables: Mapping[str, xr.Dataset], known: Mapping[str, np.ndarray], values: Mapping[str, Mapping[str, np.ndarray]]
) -> str:
    first = next(iter(values))
    total = values[first].get("gap_total", _finite([]))
    text = (
        "Dots are medians, thick bars their 95% intervals, thin lines the middle half of the data; the parts of a datum add up "
        "to its gap, their medians need not."
    )
    if total.size >= ENOUGH:
        text += f" On {_word(first)} data the median gap is {_interval(total)}: {_cause(values[first])}"
    for split, found in values.items():
        if split != first and found["gap_total"].size >= ENOUGH and total.size >= ENOUGH:
            text += _against(first, split, values)
    below = [PARTS[part][0] for part in PARTS if any(part in found and median(found[part])[2] < 0 for found in values.values())]
    if below:
        text += (
            f" The negative {' and '.join(below)} is error: no part can be negative, and the noise that the refits "
            "share over data moves all of them one way."
        )
    for split, table in tables.items():
        missing = table.sizes["obs_id"] - int(known[split].sum())
        if missing:
            verb = "is" if missing == 1 else "are"
            text += (
                f" {count(missing)} of {table.sizes['obs_id']} ({_word(split)}) {verb} not drawn: only bounds on log p(x), "
                "or no certified posterior."
            )
    return text


def _cause(found: Mapping[str, np.ndarray]) -> str:
    """Name the largest part of the gap and its remedy."""
    if np.median(found["gap_total"]) <= SMALL_GAP:
        return f"not above {SMALL_GAP} nats, so little is to be gained for a typical datum by any part."
    medians = {
        part: max(float(np.median(found[part])), 0.0)
        for part in PARTS
        if part != "gap_total" and found.get(part, _finite([])).size >= ENOUGH
    }
    if "gap_amortization" not in medians:
        return "family and encoder cannot be told apart, because the guide's family was not refitted."
    encoder = medians.pop("gap_amortization")
    family = sum(medians.values())
    share = encoder / (encoder + family) if encoder + family > 0 else 0.0
    if share > 1 - CAUSE:
        return "most of it is amortization: the encoder is to be mended, not the family."
    largest = max(medians, key=lambda part: medians[part])
    words = {
        "gap_approximation": "approximation: a richer family would gain most",
        "gap_covariance": "covariance: a family with full covariance would gain most",
        "gap_shape": "shape: no normal reaches it, a flow or a mixture may",
    }
    if share >= CAUSE:
        return f"encoder and family both count. Amortization asks for a better encoder, and {words[largest]}."
    return f"most of it is {words[largest]}."


def _against(first: str, split: str, values: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """Describe how a split's median gap, or its amortization, differs from that of the audited data."""
    medians = {part: [median(values[which].get(part, _finite([]))) for which in (first, split)] for part in PARTS}
    apart = lambda here, there: here[2] < there[1] or there[2] < here[1]
    part = next((name for name in ("gap_total", "gap_amortization") if apart(*medians[name])), None)
    if part is None:
        return f" On {_word(split)} data it is {_interval(values[split]['gap_total'])}, no clear difference."
    here, there = medians[part]
    smaller = there[0] < here[0]
    why = {
        ("train", True): "the encoder knows its training data better than others",
        ("simulated", True): "the encoder does better on data that the model makes than on real ones",
        ("simulated", False): "the encoder has not learnt all that the model makes",
    }.get((split, smaller))
    what = "it" if part == "gap_total" else "amortization"
    return (
        f" On {_word(split)} data {what} is {_interval(values[split][part])}, clearly {'smaller' if smaller else 'larger'}"
        + (f" than {say(here[0], 2)}" if part != "gap_total" else "")
        + (f": {why}." if why else ".")
    )
