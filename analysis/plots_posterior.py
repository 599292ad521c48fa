"""Figures of single posteriors: the guide against the exact density of a few data, and the intervals of their draws.

Drawn from `latent.nc`, `audit.nc` and `posteriors/*.nc` alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from scipy import ndimage

from elbowroom.analysis.canvas import (
    EXACT,
    GUIDE,
    HALF,
    INK,
    MUTED,
    PAPER,
    TILES,
    WIDE,
    Absent,
    Plot,
    bare,
    canvas,
    count,
    heading,
    mass_inside,
    percent,
    region_levels,
    say,
    styled,
    tone,
)
from elbowroom.analysis.plots import NO_LATENT, event_image, group
from elbowroom.analysis.table import best_reference, column, in_words, trusted

SHOWN = 4  # latents of a forest

_BITS = "A joint value is the latents in base 2, latent 0 the highest bit: of three, 4 is latent 0 alone on. "
LIGHT_BLUE, DEEP_BLUE = "#bcd8ec", "#6fadd6"


@styled
def contours(latent: xr.DataTree | None, *, width: float = WIDE, title: str | None = None) -> Plot | Absent:
    """Draw guide and exact posterior for the data with the smallest, a typical and the largest gap.

    Filled: the regions that hold 50 and 90 % of the exact posterior; lines: the same of the guide. All panels have the same
    scale. In one dimension: the densities themselves.

    Args:
        latent: the tree of latent.nc.
        width: of the figure, in inches.
        title: another title.
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
    figure = canvas(width, 0.4 * width if plane else 0.32 * width, title or "The guide against the exact posterior")
    panels = np.atleast_1d(figure.subplots(1, len(cases)))
    for axes, case in zip(panels, cases, strict=True):
        (_draw_plane if plane else _draw_line)(axes, case)
        axes.set_title(f"{case['case'].item()}: datum {int(case['obs_id'])}, gap {say(float(case['gap']))} nats")
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
    figure = canvas(width, 0.3 * width, "The guide against the exact posterior")
    place, top = np.arange(data.sizes["state"]), float(max(data["posterior"].max(), data["guide"].max()))
    for axes, case in zip(np.atleast_1d(figure.subplots(1, len(cases), sharey=True)), cases, strict=True):
        axes.bar(place - 0.2, case["posterior"], 0.4, color=EXACT, label="exact p(z|x)")
        axes.bar(place + 0.2, case["guide"], 0.4, color=GUIDE, label="guide q(z|x)")
        axes.set_title(f"{case['case'].item()}: datum {int(case['obs_id'])}, gap {say(float(case['gap']))} nats")
        axes.set(xlabel=f"joint value of the latents{' (latent 0: highest bit)' * binary}", ylim=(0, min(1.0, 1.1 * top)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].set_ylabel("probability")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    off = [float(np.abs(case["posterior"].values - case["guide"].values).sum() / 2) for case in cases]
    named = ", ".join(f"{percent(value)} ({case['case'].item()})" for value, case in zip(off, cases, strict=True))
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
            Line2D([], [], color=GUIDE, linewidth=1.8, label="guide q(z|x), 50% region"),
            Line2D([], [], color=GUIDE, linewidth=1.2, linestyle=(0, (4, 2)), label="90%"),
        ]
    else:
        handles = [Patch(color=LIGHT_BLUE, label="exact p(z|x)"), Line2D([], [], color=GUIDE, label="guide q(z|x)")]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)


def _draw_plane(axes: Axes, case: xr.Dataset) -> None:
    z, w = case["z_column"].values, case["z_row"].values
    p, q = case["log_posterior"].values, case["log_guide"].values
    inner, outer = region_levels(p)
    axes.contourf(z, w, p, [outer, inner, p.max() + 1], colors=[LIGHT_BLUE, DEEP_BLUE])
    axes.contour(z, w, p, [outer, inner] if outer < inner else [outer], colors=EXACT, linewidths=0.6, linestyles="solid")
    inner, outer = region_levels(q)
    axes.contour(z, w, q, [outer], colors=GUIDE, linewidths=1.3, linestyles=[(0, (4, 2))])
    axes.contour(z, w, q, [inner], colors=GUIDE, linewidths=1.8, linestyles="solid")


def _draw_line(axes: Axes, case: xr.Dataset) -> None:
    z, p, q = case["z_column"].values, np.exp(case["log_posterior"].values), np.exp(case["log_guide"].values)
    axes.fill_between(z, p, color=LIGHT_BLUE)
    axes.plot(z, p, color=EXACT, linewidth=0.8)
    axes.plot(z, q, color=GUIDE)
    shown = (p > 1e-3 * p.max()) | (q > 1e-3 * q.max())
    axes.set(xlim=(z[shown].min(), z[shown].max()), ylim=(0, None))


def _frame(case: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners of the box that holds 99.7 % of posterior and guide, (2,) each."""
    z, w = case["z_column"].values, case["z_row"].values
    inside = np.zeros((len(w), len(z)), dtype=bool)
    for name in ("log_posterior", "log_guide"):
        values = case[name].values
        inside |= values >= region_levels(values, [0.97])[0]
    columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    return np.array([z[columns[0]], w[rows[0]]]), np.array([z[columns[-1]], w[rows[-1]]])


def _same_scale(panels: np.ndarray, cases: list[xr.Dataset]) -> None:
    """Centre each panel on its densities, and give all the width that the widest of them needs."""
    frames = [_frame(case) for case in cases]
    half = 0.54 * max(float((high - low).max()) for low, high in frames)
    for axes, (low, high) in zip(panels, frames, strict=True):
        middle = (low + high) / 2
        axes.set(xlim=middle[0] + np.array([-half, half]), ylim=middle[1] + np.array([-half, half]), aspect="equal")


def _inset(axes: Axes, latent: xr.DataTree, case: xr.Dataset) -> None:
    """Show the datum itself in the corner, where it is an image."""
    image = event_image(latent)
    if image is None or "x" not in case:
        return
    corner = axes.inset_axes((0.80, 0.80, 0.19, 0.19))
    low, high = tone(case["x"].values)
    corner.imshow(case["x"].values.reshape(image), cmap=TILES, vmin=low, vmax=high)
    corner.set(xticks=[], yticks=[], facecolor=PAPER)
    corner.grid(False)
    corner.spines[:].set(visible=True, color=MUTED, linewidth=0.6)


def _contour_caption(cases: list[xr.Dataset]) -> str:
    parts = []
    for case in cases:
        p, q = case["log_posterior"].values, case["log_guide"].values
        held = mass_inside(p, q >= region_levels(q, [0.9])[0])
        parts.append(f"{percent(held)} ({case['case'].item()})")
    text = f"The guide's 90% region holds {', '.join(parts)} of the exact posterior; 90% would be right."
    worst = cases[-1]
    p = worst["log_posterior"].values
    regions = int(ndimage.label(p >= region_levels(p, [0.9])[0])[1])
    if regions > 1:
        text += f" The exact posterior of the worst datum has {regions} separate regions, which one normal cannot follow."
    shift = _shift(worst)
    if shift > 1:
        text += f" The worst guide is off centre by {say(shift, 2)} posterior sd: the encoder points to the wrong place."
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


@styled
def intervals(table: xr.Dataset, posteriors: Mapping[str, xr.DataTree], latent: xr.DataTree | None = None) -> Plot | Absent:
    """Draw central intervals of guide and reference for a few data, through ArviZ's plot_forest.

    Args:
        table: the audit.
        posteriors: method -> DataTree with group `posterior`, dims chain, draw, obs_id, ...
        latent: `latent.nc`, which knows the rate of each latent: the highest are drawn, as in the pictures of the latent space.
    """
    reference = best_reference(table)
    if reference is None or reference not in posteriors or "guide" not in posteriors:
        return Absent("intervals", "No intervals of guide and reference: the run folder does not hold the draws of both.")
    if "total_variation" in table and np.isfinite(table["total_variation"].sel(reference=reference).values).any():
        return Absent(  # a distance between probabilities is known only where every latent is discrete
            "intervals",
            "No intervals: every latent is discrete, and its values have no quantiles to speak of. Where they are few, their "
            "joint probabilities are drawn as bars; total_variation of the table says how far the guide is off.",
        )
    gap, least = column(table, "gap_total"), column(table, "gap_total_lower")
    known = np.isfinite(gap)
    gap = np.where(known, gap, least)  # where only a bound is known, the gap is at least the bound's
    gap[~trusted(table, reference)] = np.nan
    order = np.argsort(gap)[: int(np.isfinite(gap).sum())]
    if not len(order):
        return Absent("intervals", "No intervals: no datum has both a trusted posterior and a gap.")
    rows = order[np.unique(np.linspace(0, len(order) - 1, min(5, len(order))).round().astype(int))]
    obs_id = table["obs_id"].values[rows]
    if not all(np.isin(obs_id, posteriors[m]["posterior"].to_dataset()["obs_id"].values).all() for m in ("guide", reference)):
        return Absent("intervals", "No intervals: the files of draws and audit.nc hold different data; run the audit again.")
    least_of = lambda n: "" if known[n] else "≥ "
    names = [f"#{i}, gap {least_of(n)}{say(float(gap[n]), 2)}" for i, n in zip(obs_id, rows, strict=True)]
    methods = (("guide q(z|x)", "guide"), (f"{in_words(reference)} p(z|x)", reference))
    sizes = [posteriors[method]["posterior"].sizes for _, method in methods]
    draws = min(size["chain"] * size["draw"] for size in sizes)
    slices = {label: _slice(posteriors[method], obs_id, names, draws, _rate(latent)) for label, method in methods}
    figure = _forest(slices)
    off, total = _disagreement(slices)
    text = (
        f"Central 50 and 95% intervals and means, drawn by ArviZ from posteriors/*.nc for {count(len(rows))} from the smallest "
        f"to the largest gap. The guide's 50% interval misses the reference's mean in {off} of {total} cases"
    )
    text += ": who reads these off the guide is misled there." if off > total / 4 else "."
    alt = "Forest plot of the intervals of guide and reference draws for some data."
    return Plot("intervals", figure, alt, text)


def _rate(latent: xr.DataTree | None) -> np.ndarray | None:
    """Return the rate of each latent, None where it is not known."""
    encoding = group(latent, "encoding")
    return encoding["rate"].values if encoding is not None and "rate" in encoding else None


def _slice(tree: xr.DataTree, obs_id: np.ndarray, names: list[str], draws: int, rate: np.ndarray | None = None) -> xr.Dataset:
    """Return some scalar latents of the chosen data, each a variable over `datum`, as one chain of so many draws.

    They are the `SHOWN` of the highest rate, where the rates are those of these latents, else the first.
    """
    posterior = tree["posterior"].to_dataset().sel(obs_id=obs_id)
    every: dict[str, Any] = {}
    for site, values in posterior.data_vars.items():
        flat = values.transpose("chain", "draw", "obs_id", ...).values
        flat = flat.reshape(1, -1, flat.shape[2], int(np.prod(flat.shape[3:])))
        flat = flat[:, np.linspace(0, flat.shape[1] - 1, draws).round().astype(int)]
        for j in range(flat.shape[-1]):
            name = str(site) if flat.shape[-1] == 1 else f"{site}[{j}]"
            every[name] = (("chain", "draw", "datum"), flat[..., j])
    chosen = list(every)[:SHOWN]
    if rate is not None and len(rate) == len(every):
        best = np.sort(np.argsort(-rate, kind="stable")[:SHOWN])
        chosen = [list(every)[j] for j in best]
    return xr.Dataset({name: every[name] for name in chosen}, coords={"datum": names})


def _forest(slices: Mapping[str, xr.Dataset]) -> Figure:
    """Draw the intervals with arviz-plots, and dress its figure as ours."""
    import arviz_plots
    from matplotlib import pyplot

    trees = {label: xr.DataTree.from_dict({"posterior": part}) for label, part in slices.items()}
    collection = arviz_plots.plot_forest(
        trees,
        combined=True,
        backend="matplotlib",
        ci_kind="eti",
        ci_probs=(0.5, 0.95),
        color=[GUIDE, EXACT],
        figure_kwargs={"figsize": (HALF, 4.0), "width_ratios": [1, 1.7]},
    )
    figure: Figure = collection.viz["figure"].item()
    pyplot.close(figure)
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
    names, axes = figure.axes[:2]
    bare(names)
    names.set_xticks([])
    for text in names.texts:
        text.set(fontsize=8, color=INK)
    rows = sum(part.sizes["datum"] * len(part.data_vars) for part in slices.values()) / len(slices)
    names.set_ylim(rows - 0.4, -0.9) if names.yaxis_inverted() else names.set_ylim(-0.9, rows - 0.4)
    axes.set_xlabel("value of the latent")
    heading(figure, "Intervals from the draws", HALF)
    handles = [Line2D([], [], color=colour, marker="o", markerfacecolor=PAPER) for colour in (GUIDE, EXACT)]
    figure.legend(handles, list(slices), loc="outside lower center", ncols=2)
    return figure


def _disagreement(slices: Mapping[str, xr.Dataset]) -> tuple[int, int]:
    """Count the latents whose reference mean lies outside the guide's central 50 % interval, and all of them."""
    guide, reference = slices.values()
    outside = total = 0
    for site in guide.data_vars:
        low, high = (guide[site].quantile(p, ("chain", "draw")).values for p in (0.25, 0.75))
        mean = reference[site].mean(("chain", "draw")).values
        outside += int(((mean < low) | (mean > high)).sum())
        total += mean.size
    return outside, total
