"""The figure of intervals: guide and reference for a few data, drawn by ArviZ from `posteriors/*.nc`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from elbowroom.analysis.measures.table import best_reference, column, in_words, trusted
from elbowroom.analysis.plots.events import group
from elbowroom.analysis.plots.style import EXACT, GUIDE, HALF, INK, PAPER, Absent, Plot, bare, count, heading, say, styled

SHOWN = 4  # latents


@styled
def intervals(table: xr.Dataset, posteriors: Mapping[str, xr.DataTree], latent: xr.DataTree | None = None) -> Plot | Absent:
    """Draw central intervals of guide and reference for a few data, with ArviZ's plot_forest.

    `posteriors` maps each method to its tree. `latent` is `latent.nc`: the latents with the highest rates are drawn.
    """
    reference = best_reference(table)
    if reference is None or reference not in posteriors or "guide" not in posteriors:
        return Absent("intervals", "No intervals of guide and reference: the run folder does not hold the draws of both.")
    if "total_variation" in table and np.isfinite(table["total_variation"].sel(reference=reference).values).any():
        return Absent(  # total variation is known only where every latent is discrete
            "intervals",
            "No intervals: every latent is discrete, and its values have no quantiles to speak of. Where they are few, their "
            "joint probabilities are drawn as bars; total_variation of the table says how far the guide is off.",
        )
    gap, least = column(table, "gap_total"), column(table, "gap_total_lower")
    known = np.isfinite(gap)
    gap = np.where(known, gap, least)  # where only a bound is known, use its gap, a lower bound
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
    encoding = group(latent, "encoding")
    return encoding["rate"].values if encoding is not None and "rate" in encoding else None


def _slice(tree: xr.DataTree, obs_id: np.ndarray, names: list[str], draws: int, rate: np.ndarray | None = None) -> xr.Dataset:
    """Return some scalar latents of the chosen data, each a variable over `datum`, as one chain of `draws` draws.

    They are the `SHOWN` latents with the highest rate, or the first where the rates do not belong to these latents.
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
    """Draw the intervals with arviz-plots in this project's style."""
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
