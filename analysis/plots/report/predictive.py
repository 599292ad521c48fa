"""The figure of prior and posterior predictive data against the observed, from the ArviZ groups of `diagnosis.nc`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from elbowroom.analysis.plots.style import EXACT, GUIDE, INK, MUTED, WIDE, Absent, Plot, canvas, count, percent, say, styled

GROUPS = ("observed_data", "posterior_predictive", "prior_predictive")
SITES = 3
OFF = "which is"
DIFFERENT = 0.1  # reported: a shift of the mean in observed sd, or a relative change of the sd
LINES = {"posterior_predictive": (EXACT, "-", "posterior predictive"), "prior_predictive": (GUIDE, "--", "prior predictive")}


class Panel(NamedTuple):
    """An observed site and its replicates, an entry of x a column: observed (n, D), replicates (s, n, D) by group."""

    observed: np.ndarray
    replicates: dict[str, np.ndarray]


@styled
def predictive(tree: xr.DataTree | None) -> Plot | Absent:
    """Draw a statistic of each datum, and the mean of each entry, of observed and of predicted data.

    `tree` holds `observed_data`, `posterior_predictive` and `prior_predictive`.
    """
    if tree is None or "observed_data" not in tree.children:
        return Absent("predictive", "No predictive distributions beside the data: diagnosis.nc has none.")
    found = _sites(tree)
    if not found:
        return Absent("predictive", "No predictive distributions beside the data: the draws of x are missing.")
    shown = dict(list(found.items())[:SITES])
    figure = canvas(WIDE, 0.5 + 2.9 * len(shown), "Observed data beside data that the model predicts")
    several = max(site.observed.shape[1] for site in shown.values()) > 1
    panels = figure.subplots(len(shown), 1 + several, squeeze=False)
    words = []
    for row, (name, site) in zip(panels, shown.items(), strict=True):
        left = row[0]
        label = _distribution(left, site)
        if several:
            _means(row[1], site)
        if len(found) > 1:
            left.set_title(name)
        words.append(_words(name if len(found) > 1 else "", site, label))
    text = " ".join(words)
    if any("prior_predictive" in site.replicates for site in shown.values()):
        differs = any(OFF in sentence.partition("by the prior predictive")[2] for sentence in words)
        text += (
            " Data drawn from the prior differ from the real ones, which speaks against the model."
            if differs
            else " Data drawn from the prior are like the real ones in this respect."
        )
    text += (
        " The posterior predictive has seen the data: its agreement says little. Whether a difference is chance the checks say."
    )
    if len(found) > len(shown):
        text += f" {len(found) - len(shown)} more observed sites are not drawn."
    alt = "Distribution over data of a statistic, and means of the entries of x, of observed and of predicted data."
    return Plot("predictive", figure, alt, text, wide=True)


def _sites(tree: xr.DataTree) -> dict[str, Panel]:
    sites = {}
    for name, values in tree["observed_data"].data_vars.items():
        x = values.transpose("obs_id", ...).values.astype(float)
        replicates = {}
        for group in LINES:
            if group in tree.children and name in tree[group].data_vars:
                y = tree[group][str(name)].transpose("chain", "draw", "obs_id", ...).values.astype(float)
                replicates[group] = y.reshape(y.shape[0] * y.shape[1], y.shape[2], -1)
        if replicates and x.size:
            sites[str(name)] = Panel(x.reshape(len(x), -1), replicates)
    return sites


def _statistic(x: np.ndarray, like: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the sum (discrete data) or the mean (others) of each datum's finite entries, and its name."""
    if x.shape[-1] == 1:
        return x[..., 0], "x"
    known = like[np.isfinite(like)]
    with np.errstate(invalid="ignore", divide="ignore"):
        total, size = np.nansum(x, -1), np.isfinite(x).sum(-1)
        if known.size and (known == np.round(known)).all() and (known >= 0).all() and np.isfinite(like).all():
            binary = known.max(initial=0.0) <= 1
            return total, "number of ones of a datum" if binary else "sum of a datum's entries"
        return np.where(size > 0, total / size, np.nan), "mean of a datum's entries"


def _bins(values: np.ndarray, whole: bool) -> np.ndarray:
    low, high = np.quantile(values, [0.001, 0.999])
    if whole and high - low <= 60:
        return np.arange(np.floor(low) - 0.5, np.ceil(high) + 1.5)
    if whole:
        step = np.ceil((high - low) / 30)
        return np.arange(np.floor(low) - 0.5, np.ceil(high) + step + 0.5, step)
    return np.linspace(low, max(high, low + 1e-9), 31)


def _distribution(axes: Axes, site: Panel) -> str:
    """Draw the statistic's distribution over data and return the statistic's name."""
    observed, label = _statistic(site.observed, site.observed)
    every = {group: _statistic(y, site.observed)[0].ravel() for group, y in site.replicates.items()}
    pooled = np.concatenate([observed, *every.values()])
    pooled = pooled[np.isfinite(pooled)]
    bins = _bins(pooled, bool((pooled == np.round(pooled)).all()))
    known = observed[np.isfinite(observed)]
    style: dict[str, Any] = {"density": True, "bins": bins}
    axes.hist(known, color=MUTED, alpha=0.35, label=f"observed, {count(known.size)}", **style)
    for group, values in every.items():
        colour, line, name = LINES[group]
        kept = values[np.isfinite(values)]
        axes.hist(kept, histtype="step", color=colour, linestyle=line, linewidth=1.5, label=name, **style)
    axes.set(xlabel=label, ylabel="density over data")
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    axes.legend(loc="upper right", ncols=3, columnspacing=1.0, handlelength=1.6)
    return label


def _mean(x: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    known = np.isfinite(x)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(known, x, 0.0).sum(axis) / known.sum(axis))


def _means(axes: Axes, site: Panel) -> None:
    observed = _mean(site.observed, 0)
    ends = [observed]
    for (group, y), marker in zip(site.replicates.items(), "o^", strict=False):
        mean = _mean(y, (0, 1))
        ends.append(mean)
        axes.scatter(observed, mean, s=16, marker=marker, color=LINES[group][0], alpha=0.75, linewidth=0, label=LINES[group][2])
    pooled = np.concatenate(ends)
    pooled = pooled[np.isfinite(pooled)]
    if pooled.size:
        axes.plot([pooled.min(), pooled.max()], [pooled.min(), pooled.max()], color=INK, linewidth=0.8)
    axes.set(xlabel="observed mean of an entry of x", ylabel="predicted mean")
    axes.legend(loc="best", handletextpad=0.2)


def _words(name: str, site: Panel, label: str) -> str:
    observed, _ = _statistic(site.observed, site.observed)
    here = observed[np.isfinite(observed)]
    mean, sd = float(here.mean()), float(here.std())
    parts = []
    for group, y in site.replicates.items():
        there = _statistic(y, site.observed)[0]
        there = there[np.isfinite(there)]
        if not there.size:
            continue
        said = f"{say(float(there.mean()))} (sd {say(float(there.std()))}) by the {LINES[group][2]}"
        if sd > 0:
            shift, spread = (float(there.mean()) - mean) / sd, float(there.std()) / sd - 1
            off = []
            if abs(shift) > DIFFERENT + 2 / np.sqrt(here.size):
                off.append(f"{'above' if shift > 0 else 'below'} the data by {say(abs(shift), 2)} sd")
            if abs(spread) > DIFFERENT + 2 / np.sqrt(2 * here.size):
                off.append(f"{percent(abs(spread))} {'wider' if spread > 0 else 'narrower'}")
            said += f", {OFF} {' and '.join(off)}" if off else ", no clear difference"
        parts.append(said)
    return (
        f"{name + ': ' if name else ''}{label[0].upper()}{label[1:]}: {say(mean)} (sd {say(sd)}) observed, {'; '.join(parts)}."
    )
