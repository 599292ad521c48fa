"""The figure of the information in each latent: rate, active variance, sensitivity of the decoder, mutual information."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from elbowroom.analysis.plots.style import ALARM, EXACT, GUIDE, INK, MUTED, WIDE, Absent, Plot, canvas, count, say, styled

UNUSED = 0.01  # nats of rate, prior variances: the limits of `latents.information`
FLOOR = 1e-4  # position of zero on a log scale
NAMED = 20  # latents with their own row
STRETCH = 30.0
PANELS = (
    ("rate_coordinate_mean", "rate of the guide\n(nats)", UNUSED),
    ("active_variance", "variance of its means\n(prior variances)", UNUSED),
    ("sensitivity", "sensitivity of the decoder\n(squared slope × prior variance)", math.expm1(2 * UNUSED)),
)
KINDS = (
    ("active", "used", EXACT, "o"),
    ("ignored", "ignored by the guide", GUIDE, "^"),
    ("collapsed", "collapsed", ALARM, "X"),
)


@styled
def information(found: xr.Dataset | None) -> Plot | Absent:
    """Draw rate, active variance and sensitivity of each latent, and bounds on the mutual information with the rate.

    `found` is the result of `latents.information.information`.
    """
    if found is None or "rate_mean" not in found:
        return Absent("information", "No figure of what the latents carry: diagnosis.nc has no information.")
    panels = [panel for panel in PANELS if panel[0] in found and np.isfinite(found[panel[0]].values).any()]
    d = found.sizes.get("coordinate", 0) if panels else 0
    height = 2.6 + (0.2 * min(d, NAMED) if d <= NAMED else 2.0)
    figure = canvas(WIDE, max(3.2, height), "What the latents carry of x")
    axes = figure.subplots(1, len(panels) + 1, squeeze=False, width_ratios=[1.0] * len(panels) + [1.25])[0]
    order, kind = _order(found), _kinds(found)
    for place, (name, label, limit) in enumerate(panels):
        _latents(axes[place], found, name, limit, order, kind)
        if d <= NAMED:
            axes[place].set_yticks(range(d), [f"z[{found['coordinate'].values[j]}]" for j in order])
        axes[place].axvline(limit, color=ALARM, linewidth=0.8, linestyle="--")
        axes[place].set_xlabel(label)
        if place:
            axes[place].tick_params(axis="y", labelleft=False)
    if panels:
        first = axes[0]
        if d > NAMED:
            first.set_ylabel("latents, the highest rate at the top")
        handles, labels = first.get_legend_handles_labels()
        if (kind != "active").any():
            figure.legend(handles, labels, loc="outside lower left", ncols=4)
    _whole(axes[-1], found)
    alt = "Bounds on the mutual information of x and z beside the mean rate and the logarithm of the number of data."
    if panels:
        alt = f"Rate, active variance and sensitivity of the decoder for each of {d} latents. {alt}"
    return Plot("information", figure, alt, _caption(found, kind), wide=True)


def _order(found: xr.Dataset) -> np.ndarray:
    if "rate_coordinate_mean" not in found:
        return np.array([], dtype=int)
    return np.argsort(-np.nan_to_num(found["rate_coordinate_mean"].values, nan=-1.0), kind="stable")


def _kinds(found: xr.Dataset) -> np.ndarray:
    """Return `active`, `ignored` or `collapsed` for each latent; a weak latent counts as active."""
    kinds = np.full(found.sizes.get("coordinate", 0), "active", dtype=object)
    for name in ("ignored", "collapsed"):
        if name in found:
            kinds[found[name].values.astype(bool)] = name
    return kinds


def _latents(axes: Axes, found: xr.Dataset, name: str, limit: float, order: np.ndarray, kind: np.ndarray) -> None:
    values = found[name].values.astype(float)[order]
    known = values[np.isfinite(values)]
    logarithmic = bool(known.max() > STRETCH * max(float(known.min()), FLOOR)) or bool(known.min() < 2 * UNUSED)
    if logarithmic:
        values = np.maximum(values, FLOOR)
    rows = np.arange(len(values))
    if name == "sensitivity" and "sensitivity_se" in found:
        error = 1.96 * found["sensitivity_se"].values[order]
        low = np.maximum(values - error, FLOOR if logarithmic else 0.0)
        axes.hlines(rows, low, values + error, color=MUTED, linewidth=1.0)
    for which, label, colour, marker in KINDS:
        some = kind[order] == which
        if some.any():
            style: dict[str, Any] = {
                "color": colour,
                "marker": marker,
                "s": 30 if len(values) <= NAMED else 12,
                "linewidth": 0,
                "zorder": 3,
            }
            axes.scatter(values[some], rows[some], label=f"{label}: {int(some.sum())}", **style)
    if logarithmic:
        axes.set_xscale("log")
        low, high = min(float(np.nanmin(values)), limit) / 2, 2 * max(float(np.nanmax(values)), limit)
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 50 else (1.0, 3.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda t, _: f"≤ {t:g}" if t <= FLOOR else f"{t:g}"))
    else:
        axes.set_xlim(0, 1.12 * max(float(known.max()), limit))
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.grid(axis="y", visible=len(values) <= NAMED)


def _mutual(found: xr.Dataset) -> tuple[float, float, float, float]:
    """Return the bounds on I(x; z) and their 95 % ends; the upper bound is at most the rate, where that is a bound."""
    value = lambda name: float(found[name]) if name in found else math.nan
    low, high = value("information_lower"), value("information_upper")
    if "aggregate_kl" not in found.attrs and math.isfinite(high):
        high = max(low, min(high, value("rate_mean")))
    ends = np.nan_to_num([value("information_lower_se"), value("information_upper_se")])
    return max(low, 0.0), max(high, 0.0), max(low - 1.96 * ends[0], 0.0), max(high + 1.96 * ends[1], 0.0)


def _whole(axes: Axes, found: xr.Dataset) -> None:
    low, high, least, most = _mutual(found)
    rate, error = float(found["rate_mean"]), float(np.nan_to_num(float(found["rate_se"])))
    text: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5}
    axes.errorbar(rate, 1, xerr=1.96 * error, fmt="s", color=GUIDE, markersize=6, linewidth=1.2)
    _beside(axes, 1, f"mean rate {say(rate)}", text)
    if math.isfinite(low):
        axes.hlines(0, least, most, color=MUTED, linewidth=1.0)
        axes.hlines(0, low, high, color=EXACT, linewidth=7)
        axes.plot([low, high], [0, 0], "|", color=EXACT, markersize=12)
        _beside(axes, 0, f"I(x; z) from {say(low)} to {say(high)}", text)
    ends = [rate + 1.96 * error, most]
    if "information_data" in found and float(found["information_data"]) > 1:
        n = float(found["information_data"])
        limit, corner = math.log(n), {"xytext": (-3, -3), "ha": "right", "va": "top"} | text
        if limit < 6 * max(end for end in ends if math.isfinite(end)):
            ends.append(limit)
            axes.axvline(limit, color=INK, linewidth=1.0, linestyle="--")
            axes.annotate(f"log {n:,.0f}", (limit, 1), xycoords=("data", "axes fraction"), **corner)
        else:
            axes.annotate(f"log {n:,.0f} = {say(limit)} →", (1, 1), xycoords="axes fraction", **corner)
    axes.set(xlim=(0, 1.08 * max(1e-3, *(end for end in ends if math.isfinite(end)))), ylim=(-0.7, 1.8), yticks=[])
    axes.set(xlabel="all latents together\n(nats per datum)")


def _beside(axes: Axes, y: float, words: str, text: dict[str, Any]) -> None:
    axes.annotate(words, (0.03, y), xycoords=axes.get_yaxis_transform(), xytext=(0, 11), **text)


def _names(found: xr.Dataset, kind: np.ndarray, which: str) -> str:
    every = [f"z[{name}]" for name in found["coordinate"].values[kind == which]]
    return ", ".join(every[:8]) + (f" and {len(every) - 8} more" if len(every) > 8 else "")


def _caption(found: xr.Dataset, kind: np.ndarray) -> str:
    text = ""
    dead, ignored = int((kind == "collapsed").sum()), int((kind == "ignored").sum())
    if len(kind):
        plural = "latents" if len(kind) > 1 else "latent"
        if not dead and not ignored:
            active = int(found["active"].sum()) if "active" in found else len(kind)
            text = f"None of {len(kind)} {plural} is collapsed or ignored; {active} {'is' if active == 1 else 'are'} active. "
        if dead:
            verb = "is" if dead == 1 else "are"
            text += (
                f"{dead} of {len(kind)} {plural} {verb} collapsed ({_names(found, kind, 'collapsed')}): neither guide nor "
                "decoder uses them, the model does without. "
            )
        if ignored:
            verb = "is" if ignored == 1 else "are"
            text += (
                f"{ignored} of {len(kind)} {plural} {verb} used by the decoder but ignored by the guide "
                f"({_names(found, kind, 'ignored')}): the encoder is at fault, not the model. "
            )
        text += "Left of the dashed lines a latent counts as unused. "
    low, high, least, most = _mutual(found)
    rate, n = float(found["rate_mean"]), float(found["information_data"]) if "information_data" in found else math.nan
    text += f"The guide spends {say(rate)} ± {say(float(found['rate_se']), 2)} nats of rate per datum (± SE over data)"
    if math.isfinite(low):
        text += f", and z tells between {say(low)} and {say(high)} nats of x"
        if most - least > 1.05 * (high - low):
            text += f" ({say(least)} to {say(most)} with the errors of these bounds)"
        if math.isfinite(n) and n > 1 and low > 0.8 * math.log(n):
            text += f"; no more than log {n:,.0f} = {say(math.log(n))} can be shown with {count(int(n))}, so it may be more"
    text += "." + _aggregate(found)
    missing = str(found.attrs.get("sensitivity", ""))
    return text + (f" Sensitivity of the decoder: {missing}; collapse rests on the guide alone." if missing else "")


def _aggregate(found: xr.Dataset) -> str:
    """Report whether the aggregate posterior equals the prior, and how far the rate exceeds the information."""
    text = ""
    if "aggregate_kl_lower" in found and np.isfinite(found["aggregate_kl_lower"]):
        error = lambda end: 1.96 * float(np.nan_to_num(found.get(f"aggregate_kl_{end}_se", 0.0)))
        low = max(0.0, float(found["aggregate_kl_lower"]) - error("lower"))
        high = max(0.0, float(found["aggregate_kl_upper"]) + error("upper"))
        text = (
            f" The rest of the rate, {say(low, 2)} to {say(high, 2)} nats, sets the aggregate posterior apart from the prior."
        )
    p = float(found["aggregate_p_value"]) if "aggregate_p_value" in found else math.nan
    if math.isfinite(p):
        said = "differs from" if p <= 0.01 else "cannot be told from"
        text += f" By a two-sample test the aggregate posterior {said} the prior (p = {say(p, 2)})."
        if p <= 0.01:
            text += " Draws from the prior then fall where the encoder puts few data."
    return text
