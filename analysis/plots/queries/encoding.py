"""The figure of an encoding: the errors of mu and sigma, row by row."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from elbowroom.analysis.measures.table import FEW, TRUSTED
from elbowroom.analysis.plots.style import EXACT, GUIDE, INK, MUTED, WIDE, Absent, Plot, canvas, percent, say, styled

SHOWN = 12  # rows whose intervals are drawn
FAR, NARROW, BROAD = 0.5, 0.8, 1.25  # posterior sd; ratios of sd: beyond these mu or sigma counts as off


@styled
def encoding(found: xr.Dataset) -> Plot | Absent:
    """Draw the encoder's error in the mean against its ratio of standard deviations, and some rows' intervals.

    `found` is the result of `encode`, with `mu`, `sigma`, `mean`, `sd` of the latents z.
    """
    name = "encoding"
    if "mu" not in found or found["mu"].ndim != 2:
        return Absent(name, "there is no vector of continuous latents called z")
    good = np.isin(found["status"].values.astype(str), TRUSTED)
    if not good.any():
        return Absent(name, "no row has an exact or certified posterior to compare the encoder with")
    rows = found.isel(obs_id=np.flatnonzero(good))
    mu, sigma, mean, sd = (rows[key].values for key in ("mu", "sigma", "mean", "sd"))
    off, ratio = (mu - mean) / sd, sigma / sd
    figure = canvas(WIDE, 4.2, "Are mu and sigma right?")
    left, right = figure.subplots(1, 2)
    left.axhline(1, color=MUTED, linewidth=0.8)
    left.axvline(0, color=MUTED, linewidth=0.8)
    left.scatter(off.ravel(), ratio.ravel(), s=9, color=GUIDE, alpha=0.35, linewidths=0, rasterized=True)
    left.plot(0, 1, "+", color=INK, markersize=14, markeredgewidth=1.6)
    reach = float(np.quantile(np.abs(off), 0.995)) * 1.1 + 0.05
    left.set_xlim(-reach, reach)
    left.set_yscale("log")
    ticks = np.array([0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1, 1.2, 1.5, 2, 3, 5, 10])
    low, high = float(np.quantile(ratio, 0.003)) / 1.1, float(np.quantile(ratio, 0.997)) * 1.1
    left.set_ylim(low, high)
    ticks = ticks[(ticks >= low) & (ticks <= high)]
    left.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    left.set_yticks([], minor=True)
    left.set_xlabel("(mu - mean) / sd  [posterior sd]")
    left.set_ylabel("sigma / sd")
    left.set_title(f"every latent of {len(rows['obs_id']):,} rows; right is at the cross")
    _intervals(right, rows, np.abs(off))
    alt = (
        "Errors of the encoder's means and standard deviations, and the intervals of some rows beside the corrected posterior."
    )
    return Plot(name, figure, alt, caption(off, ratio, int((~good).sum())), wide=True)


def _intervals(axes: Axes, rows: xr.Dataset, off: np.ndarray) -> None:
    """Draw mu and mean with 90 % intervals in the worst latent, for rows from the best to the worst."""
    worst = off.max(1)
    order = np.argsort(worst)
    some = order[np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int)]
    for place, i in enumerate(some):
        j = int(off[i].argmax())
        mu, sigma, mean = (float(rows[key].values[i, j]) for key in ("mu", "sigma", "mean"))
        low, high = (float(rows["quantile"].values[i, j, k]) for k in (0, 2))
        axes.hlines(place + 0.15, mu - 1.645 * sigma, mu + 1.645 * sigma, color=GUIDE, linewidth=2.2)
        axes.plot(mu, place + 0.15, "o", color=GUIDE, markersize=5, label=None if place else "encoder: mu, 90% of q(z|x)")
        axes.hlines(place - 0.15, low, high, color=EXACT, linewidth=2.2)
        axes.plot(mean, place - 0.15, "s", color=EXACT, markersize=5, label=None if place else "corrected: mean, 90% of p(z|x)")
    labels = [f"row {rows['obs_id'].values[i]}, z[{int(off[i].argmax())}]" for i in some]
    axes.set_yticks(range(len(some)), labels)
    axes.set_xlabel("latent [latent units]")
    axes.set_title("from the best row (bottom) to the worst, in its worst latent")
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.16), ncols=2, frameon=False)


def caption(off: np.ndarray, ratio: np.ndarray, left_out: int) -> str:
    """Report how many means and standard deviations are off, and in which direction."""
    far = float((np.abs(off).max(1) > FAR).mean())
    narrow, broad = float((ratio.min(1) < NARROW).mean()), float((ratio.max(1) > BROAD).mean())
    matters = max(far, narrow, broad) > FEW
    said = (
        f"At {percent(far)} of the rows mu is more than {FAR:g} posterior sd from the posterior's mean in some latent; at "
        f"{percent(narrow)} sigma is below {NARROW:g} of the sd somewhere (too sure); at {percent(broad)} above {BROAD:g}. "
        f"In the median sigma / sd is {say(float(np.median(ratio)), 2)}. "
        f"{'Where that matters, use mean and sd instead.' if matters else 'mu and sigma may be used as they are.'}"
    )
    if left_out:
        said += f" {left_out:,} rows are not drawn: nothing certified their posterior."
    return said
