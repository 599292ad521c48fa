"""The figure of the integration of p(x): estimates of log p(x) by each method against their cost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from elbowroom.analysis.measures.evidence_kinds import ENDING, ESTIMATE, kind_of
from elbowroom.analysis.measures.table import GOOD_K
from elbowroom.analysis.plots.style import ALARM, EXACT, GUIDE, INK, WIDE, Plot, canvas, say, styled
from elbowroom.analysis.queries.integration import CLOSE, SHARE, WORDS

COLOURS = {"prior": ALARM, "encoder": GUIDE, "refit": EXACT, "ais": "#009E73"}
MARKS = {"prior": "s", "encoder": "o", "refit": "^", "ais": "D"}
SHORT = {"prior": "the prior", "encoder": "the encoder", "refit": "the refitted q*", "ais": "annealing"}
DEPTH, HEIGHT = 12.0, 3.0  # largest range shown below and above log p(x), nats
FLOOR = 1e-4  # nats


@styled
def integration(found: xr.Dataset) -> Plot:
    """Draw the estimates of each method against their evaluations, with log p(x) as the target.

    `found` is the result of `queries.integration.integrate`.
    """
    figure = canvas(WIDE, 4.4, "How p(x) can be integrated: one integral, several ways")
    known = math.isfinite(float(found["log_evidence"]))
    left, *rest = figure.subplots(1, 2 if known else 1, width_ratios=[3, 2] if known else [1], squeeze=False)[0]
    for name in found["estimator"].values.astype(str):
        row = found.sel(estimator=name)
        there = np.isfinite(row["evaluations"].values)
        cost, middle, low, high, off = (row[key].values[there] for key in ("evaluations", "estimate", "low", "high", "off"))
        look: dict[str, Any] = {"color": COLOURS[name], "marker": MARKS[name], "markersize": 4}
        left.fill_between(cost, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
        left.plot(cost, middle, label=WORDS[name], **look)
        for axes in rest:
            axes.plot(cost, np.maximum(off, FLOOR), **look)
    _levels(left, found)
    for axes in rest:
        axes.axhline(CLOSE, color=INK, linewidth=1.0, linestyle=":")
        axes.set_yscale("log")
        axes.set_ylabel(f"{SHARE:.0%} of repetitions are closer than [nats]")
    for axes in (left, *rest):
        axes.set_xscale("log")
        axes.set_xlabel("evaluations of p(x, z) or its gradient behind one estimate")
    left.set_ylabel("estimate of log p(x) [nats]")
    name = found.attrs.get("datum", "")
    which = f"{f'datum {name}, ' if name != '' else ''}{found.attrs['dimensions']} latents"
    left.legend(loc="lower right", title=f"median and middle 90%; {which}", title_fontsize=8, alignment="left")
    alt = "Estimates of log p(x) by several methods, rising to the line that they should reach as the samples become more."
    return Plot("integration", figure, alt, caption(found), wide=True)


def _levels(axes: Axes, found: xr.Dataset) -> None:
    """Draw log p(x), or its bounds, and limit the axis to values near them."""
    line, low, high = (float(found[f"log_evidence{end}"]) for end in ("", "_lower", "_upper"))
    if math.isfinite(line):
        method = found.attrs["evidence_method"]
        kind = str(kind_of(line, method, found.attrs.get("evidence_reason", "")))
        by = method.removesuffix(ENDING) if kind == ESTIMATE else method
        drawn = {f"log p(x) = {say(line, 4)} nats ({by}, {kind})": line}
    else:
        drawn = {f"{end} bound on log p(x)": value for end, value in (("lower", low), ("upper", high)) if math.isfinite(value)}
    place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "xytext": (-4, 18), "textcoords": "offset points"}
    for words, value in drawn.items():
        axes.axhline(value, color=INK, linewidth=1.2, linestyle="-" if math.isfinite(line) else ":")
        axes.annotate(words, (1.0, value), fontsize=8, color=INK, ha="right", **place)
    level = line if math.isfinite(line) else low
    bottom = max(float(np.nanmin(found["low"].values)), level - DEPTH)
    top = min(float(np.nanmax(found["high"].values)), level + HEIGHT)
    axes.set_ylim(bottom - 0.04 * (top - bottom), top + 0.08 * (top - bottom))


def caption(found: xr.Dataset) -> str:
    """Return the conclusion: how much each method needs, and why."""
    if not math.isfinite(float(found["log_evidence"])):
        return (
            "No method gives a value of log p(x) that can be trusted here, only bounds (dotted); that estimates agree with "
            f"each other is no proof. {found.attrs['evidence_reason']}"
        )
    needed = dict(zip(found["estimator"].values.astype(str), found["needed"].values.tolist(), strict=True))
    most = float(np.nanmax(found["evaluations"].values))
    count = lambda value: f"{value:,.0f}" if math.isfinite(value) else f"more than {most:,.0f}"
    said = (
        f"Evaluations from which on {SHARE:.0%} of repetitions are within {CLOSE} nats of log p(x): "
        f"{'; '.join(f'{SHORT[name]} {count(value)}' for name, value in needed.items())}. Too few samples give too little, "
        "whatever the method: log p(x) is approached from below, and one sample of the encoder gives the ELBO in the mean."
    )
    naive, guided = (needed.get(name, math.nan) for name in ("prior", "encoder"))
    if "prior" in needed and math.isfinite(guided) and not naive <= guided:
        times = f"{naive / guided:,.0f}" if math.isfinite(naive) else f"more than {most / guided:,.0f}"
        said += (
            f" That is what the encoder is for: without it {times} times as many are needed; the more x says on z, the more."
        )
    if "encoder" in needed and (k := float(found["pareto_k"].sel(estimator="encoder"))) > GOOD_K:
        said += f" The encoder's weights have k-hat {k:.2f} here: its estimate converges slowly, or not where it puts no mass."
    return said
