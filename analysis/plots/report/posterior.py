"""Figures of single posteriors, from `latent.nc`: the guide against the exact density for a few data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from scipy import ndimage

from elbowroom.analysis.plots import style
from elbowroom.analysis.plots.events import NO_LATENT, event_image, group
from elbowroom.analysis.plots.style import Absent, Plot, styled

_BITS = "A joint value is the latents in base 2, latent 0 the highest bit: of three, 4 is latent 0 alone on. "
LIGHT_BLUE, DEEP_BLUE = "#bcd8ec", "#6fadd6"


@styled
def contours(latent: xr.DataTree | None, *, width: float = style.WIDE, title: str | None = None) -> Plot | Absent:
    """Draw guide and exact posterior for the data with the smallest, a typical and the largest gap, from `latent.nc`.

    Filled regions hold 50 and 90 % of the exact posterior; lines show the same regions of the guide. All panels have the same
    scale. In one dimension the densities are drawn. `width` is in inches.
    """
    data = group(latent, "density")
    if latent is None:
        return Absent("contours", f"No picture of guide and exact posterior: {NO_LATENT}.")
    if data is None and (states := group(latent, "states")) is not None:
        return _state_bars(states, width, binary=latent.attrs.get("space") == "binary")
    if data is None:
        d = int(latent.attrs["latent_dim"])
        why = f"it can be drawn for one or two latents, this model has {d}" if d > 2 else "no datum has a known gap"
        return Absent("contours", f"No picture of guide and exact posterior: {why}.")
    cases = [data.isel(case=i) for i in range(data.sizes["case"])]
    plane = "z_row" in data
    names = [str(name) for name in np.atleast_1d(data.attrs.get("axes", ["latent 0 (prior sd)", "latent 1 (prior sd)"]))]
    figure = style.canvas(width, 0.4 * width if plane else 0.32 * width, title or "The guide against the exact posterior")
    panels = np.atleast_1d(figure.subplots(1, len(cases)))
    for axes, case in zip(panels, cases, strict=True):
        (_draw_plane if plane else _draw_line)(axes, case)
        axes.set_title(f"{case['case'].item()}: datum {int(case['obs_id'])}, gap {style.say(float(case['gap']))} nats")
    if plane:
        _same_scale(panels, cases)
        for axes, case in zip(panels, cases, strict=True):
            axes.set_xlabel(names[0])
            _inset(axes, latent, case)
        panels[0].set_ylabel(names[1])
    else:
        for axes in panels:
            axes.set_xlabel(names[0])
        panels[0].set_ylabel("posterior density")
    _legend(figure, plane)
    alt = "Exact posterior and guide of the data with the smallest, a typical and the largest gap, as regions of 50 and 90%."
    return Plot("contours", figure, alt, _contour_caption(cases), wide=True)


def _state_bars(data: xr.Dataset, width: float, *, binary: bool) -> Plot:
    """Draw the probability of each joint value of discrete latents, under guide and exact posterior."""
    cases = [data.isel(case=i) for i in range(data.sizes["case"])]
    figure = style.canvas(width, 0.3 * width, "The guide against the exact posterior")
    place, top = np.arange(data.sizes["state"]), float(max(data["posterior"].max(), data["guide"].max()))
    for axes, case in zip(np.atleast_1d(figure.subplots(1, len(cases), sharey=True)), cases, strict=True):
        axes.bar(place - 0.2, case["posterior"], 0.4, color=style.EXACT, label="exact p(z|x)")
        axes.bar(place + 0.2, case["guide"], 0.4, color=style.GUIDE, label="guide q(z|x)")
        axes.set_title(f"{case['case'].item()}: datum {int(case['obs_id'])}, gap {style.say(float(case['gap']))} nats")
        axes.set(xlabel=f"joint value of the latents{' (latent 0: highest bit)' * binary}", ylim=(0, min(1.0, 1.1 * top)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].set_ylabel("probability")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    off = [float(np.abs(case["posterior"].values - case["guide"].values).sum() / 2) for case in cases]
    named = ", ".join(f"{style.percent(value)} ({case['case'].item()})" for value, case in zip(off, cases, strict=True))
    text = (
        f"Probability that the guide puts on the wrong values (total variation distance from the exact posterior): {named}. "
        f"{_BITS * binary}Under 5% a reader of the guide is hardly misled; "
        "a value the guide gives none of is one it can never draw."
    )
    alt = "Probabilities of the joint values of the latents under guide and exact posterior."
    return Plot("contours", figure, alt, text, wide=True)


def _legend(figure: Figure, plane: bool) -> None:
    if plane:
        handles: list[Any] = [
            Patch(color=DEEP_BLUE, label="exact p(z|x), 50% region"),
            Patch(color=LIGHT_BLUE, label="90%"),
            Line2D([], [], color=style.GUIDE, linewidth=1.8, label="guide q(z|x), 50% region"),
            Line2D([], [], color=style.GUIDE, linewidth=1.2, linestyle=(0, (4, 2)), label="90%"),
        ]
    else:
        handles = [Patch(color=LIGHT_BLUE, label="exact p(z|x)"), Line2D([], [], color=style.GUIDE, label="guide q(z|x)")]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)


def _draw_plane(axes: Axes, case: xr.Dataset) -> None:
    z, w = case["z_column"].values, case["z_row"].values
    p, q = case["log_posterior"].values, case["log_guide"].values
    inner, outer = style.region_levels(p)
    axes.contourf(z, w, p, [outer, inner, p.max() + 1], colors=[LIGHT_BLUE, DEEP_BLUE])
    axes.contour(z, w, p, [outer, inner] if outer < inner else [outer], colors=style.EXACT, linewidths=0.6, linestyles="solid")
    inner, outer = style.region_levels(q)
    axes.contour(z, w, q, [outer], colors=style.GUIDE, linewidths=1.3, linestyles=[(0, (4, 2))])
    axes.contour(z, w, q, [inner], colors=style.GUIDE, linewidths=1.8, linestyles="solid")


def _draw_line(axes: Axes, case: xr.Dataset) -> None:
    z, p, q = case["z_column"].values, np.exp(case["log_posterior"].values), np.exp(case["log_guide"].values)
    axes.fill_between(z, p, color=LIGHT_BLUE)
    axes.plot(z, p, color=style.EXACT, linewidth=0.8)
    axes.plot(z, q, color=style.GUIDE)
    shown = (p > 1e-3 * p.max()) | (q > 1e-3 * q.max())
    axes.set(xlim=(z[shown].min(), z[shown].max()), ylim=(0, None))


def _frame(case: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners of the box that holds 99.7 % of posterior and guide, (2,) each."""
    z, w = case["z_column"].values, case["z_row"].values
    inside = np.zeros((len(w), len(z)), dtype=bool)
    for name in ("log_posterior", "log_guide"):
        values = case[name].values
        inside |= values >= style.region_levels(values, [0.97])[0]
    columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    return np.array([z[columns[0]], w[rows[0]]]), np.array([z[columns[-1]], w[rows[-1]]])


def _same_scale(panels: np.ndarray, cases: list[xr.Dataset]) -> None:
    """Centre each panel on its densities, with the width of the widest for all."""
    frames = [_frame(case) for case in cases]
    half = 0.54 * max(float((high - low).max()) for low, high in frames)
    for axes, (low, high) in zip(panels, frames, strict=True):
        middle = (low + high) / 2
        axes.set(xlim=middle[0] + np.array([-half, half]), ylim=middle[1] + np.array([-half, half]), aspect="equal")


def _inset(axes: Axes, latent: xr.DataTree, case: xr.Dataset) -> None:
    """Show the datum in the corner, where it is an image."""
    image = event_image(latent)
    if image is None or "x" not in case:
        return
    corner = axes.inset_axes((0.80, 0.80, 0.19, 0.19))
    low, high = style.tone(case["x"].values)
    corner.imshow(case["x"].values.reshape(image), cmap=style.tiles(), vmin=low, vmax=high)
    corner.set(xticks=[], yticks=[], facecolor=style.PAPER)
    corner.grid(False)
    corner.spines[:].set(visible=True, color=style.MUTED, linewidth=0.6)


def _contour_caption(cases: list[xr.Dataset]) -> str:
    parts = []
    for case in cases:
        p, q = case["log_posterior"].values, case["log_guide"].values
        held = style.mass_inside(p, q >= style.region_levels(q, [0.9])[0])
        parts.append(f"{style.percent(held)} ({case['case'].item()})")
    text = f"The guide's 90% region holds {', '.join(parts)} of the exact posterior; 90% would be right."
    worst = cases[-1]
    p = worst["log_posterior"].values
    regions = int(ndimage.label(p >= style.region_levels(p, [0.9])[0])[1])
    if regions > 1:
        text += f" The exact posterior of the worst datum has {regions} separate regions, which one normal cannot follow."
    shift = _shift(worst)
    if shift > 1:
        text += f" The worst guide is off centre by {style.say(shift, 2)} posterior sd: the encoder points to the wrong place."
    return text + " All panels have the same scale." * ("z_row" in worst)


def _shift(case: xr.Dataset) -> float:
    """Return the largest distance of the guide's mean from the posterior's, in posterior sd, over the axes of a picture."""
    shifts = []
    for axis in ("z_column", "z_row"):
        if axis in case:
            z = case[axis]
            p, q = (np.exp(case[name] - case[name].max()) for name in ("log_posterior", "log_guide"))
            mean, other = (float((z * w).sum() / w.sum()) for w in (p, q))
            sd = math.sqrt(float((np.square(z - mean) * p).sum() / p.sum()))
            shifts.append(abs(other - mean) / max(sd, 1e-12))
    return max(shifts)
