"""Figures of the audit: the guide against the exact posterior, the gap, and how far importance weights can be trusted.

Drawn from `audit.nc`, `latent.nc` and `posteriors/*.nc` alone. Data whose reference is neither exact nor certified are counted
and named, and enter no average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from scipy import ndimage
from scipy.stats import spearmanr

from elbowroom.analysis.canvas import (
    ALARM,
    EXACT,
    FAINT,
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

GOOD_K = 0.7
TRUSTED = ("exact", "certified")
LIGHT_BLUE, DEEP_BLUE = "#bcd8ec", "#6fadd6"


def column(table: xr.Dataset, name: str) -> np.ndarray:
    """Return a per-datum variable of the audit, (N,), NaN where the audit has none."""
    return table[name].values.astype(float) if name in table else np.full(table.sizes["obs_id"], np.nan)


def best_reference(table: xr.Dataset) -> str | None:
    """Return the reference that is exact or certified for the most data, the first of equals; None without any."""
    if "reference" not in table.dims or not table.sizes["reference"] or "status" not in table:
        return None
    trusted = np.isin(table["status"].values.astype(str), TRUSTED).sum(0)
    return str(table["reference"].values[int(np.argmax(trusted))]) if trusted.any() else None


def trusted(table: xr.Dataset, reference: str | None) -> np.ndarray:
    """Return which data the reference is exact or certified for, (N,)."""
    if reference is None:
        return np.zeros(table.sizes["obs_id"], dtype=bool)
    return np.isin(table["status"].sel(reference=reference).values.astype(str), TRUSTED)


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
    if data is None:
        d = int(latent.attrs["latent_dim"])
        why = f"it can be drawn for one or two latents, this model has {d}" if d > 2 else "no datum has a known gap"
        return Absent("contours", f"No picture of guide and exact posterior: {why}.")
    cases = [data.isel(case=i) for i in range(data.sizes["case"])]
    plane = "z_row" in data
    figure = canvas(width, 0.4 * width if plane else 0.32 * width, title or "The guide against the exact posterior")
    panels = np.atleast_1d(figure.subplots(1, len(cases)))
    for axes, case in zip(panels, cases, strict=True):
        (_draw_plane if plane else _draw_line)(axes, case)
        axes.set_title(f"{case['case'].item()}: datum {int(case['obs_id'])}, gap {say(float(case['gap']))} nats")
    if plane:
        _same_scale(panels, cases)
        for axes, case in zip(panels, cases, strict=True):
            axes.set_xlabel("latent 0 (prior sd)")
            _inset(axes, latent, case)
        panels[0].set_ylabel("latent 1 (prior sd)")
    else:
        panels[0].set_ylabel("posterior density")
    _legend(figure, plane)
    alt = "Exact posterior and guide of the data with the smallest, a typical and the largest gap, as regions of 50 and 90%."
    return Plot("contours", figure, alt, _contour_caption(cases), wide=True)


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
    axes.set(xlim=(z[shown].min(), z[shown].max()), ylim=(0, None), xlabel="latent 0 (prior sd)")


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
    q = worst["log_guide"].values
    held = mass_inside(q, p >= region_levels(p, [0.99])[0])
    if held < 0.8:
        text += f" Only {percent(held)} of its guide lies where 99% of its posterior is: the encoder points to the wrong place."
    return text + " All panels have the same scale." * ("z_row" in worst)


@styled
def gaps(table: xr.Dataset, bits_per: int | None = None) -> Plot | Absent:
    """Draw the distribution of the gap over data.

    Args:
        table: the audit.
        bits_per: number of entries of one datum, where nats may be turned into bits per entry (discrete data).
    """
    everything = column(table, "gap_total")
    gap = np.sort(everything[np.isfinite(everything)])
    if gap.size < 2:
        n = count(int(gap.size))
        return Absent("gaps", f"No distribution of the gap: log p(x), hence the gap, is known for {n} of {everything.size}.")
    low, middle, high = np.quantile(gap, [0.25, 0.5, 0.75])
    stretched, unit = bool(gap[-1] > 8 * max(high, 1e-12)), max(float(middle), 1e-6)
    figure = canvas(WIDE, 3.3, "The room between ELBO and log p(x)")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    bins = _bins(gap, stretched, unit)
    for axes in (left, right):
        axes.axvspan(low, high, color=FAINT, alpha=0.7, linewidth=0)
        axes.axvline(middle, color=GUIDE, linewidth=1.5)
        if stretched:
            _asinh_axis(axes, gap, unit)
        axes.set_xlabel("gap = log p(x) − ELBO (nats)")
    left.hist(gap[gap >= 0], bins, color=EXACT, edgecolor=PAPER, linewidth=0.5, alpha=0.9)
    if (gap < 0).any():
        left.hist(gap[gap < 0], bins, color=ALARM, edgecolor=PAPER, linewidth=0.5, alpha=0.9, label="negative: estimation error")
        left.legend(loc="upper right")
    sns.rugplot(x=gap, ax=left, height=-0.025, clip_on=False, color=INK, alpha=0.35, linewidth=0.6)
    left.set_ylabel("number of data")
    left.set_xlabel("gap = log p(x) − ELBO (nats)", labelpad=8)
    left.annotate(
        f"median {say(float(middle))}",
        (middle, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        color=GUIDE,
        fontsize=8,
        va="top",
        bbox={"boxstyle": "round,pad=0.15", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.85},
    )
    sns.ecdfplot(x=gap, ax=right, color=EXACT)
    for axes in (left, right):
        axes.set_xlim(min(0.0, float(bins[0])), float(bins[-1]))
    right.set(ylabel="share of data with a smaller gap", ylim=(0, 1.01))
    alt = "Histogram with rug, and cumulative distribution, of the gap over data; the median is marked, quartiles are shaded."
    return Plot("gaps", figure, alt, _gap_caption(table, gap, everything.size, bits_per, stretched), wide=True)


def _bins(gap: np.ndarray, stretched: bool, unit: float) -> np.ndarray:
    n = int(np.clip(2 * np.sqrt(gap.size), 10, 48))
    if not stretched:
        return np.linspace(gap[0], max(gap[-1], gap[0] + 1e-9), n + 1)
    return np.sinh(np.linspace(np.arcsinh(gap[0] / unit), np.arcsinh(gap[-1] / unit), n + 1)) * unit


def _asinh_axis(axes: Axes, values: np.ndarray, unit: float) -> None:
    """Scale the x axis linearly up to `unit` and logarithmically beyond it, with ticks at 1, 2, 5 times powers of ten."""
    axes.set_xscale("asinh", linear_width=unit)
    decades = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5)]
    ticks = [0.0, *(t for t in decades if unit / 4 <= t <= 1.2 * values[-1])]
    ticks = [-t for t in decades if unit / 4 <= t <= -values[0]] + ticks
    kept: list[float] = []
    span = np.arcsinh(values[-1] / unit) - np.arcsinh(values[0] / unit)
    for tick in sorted(ticks):
        if not kept or (np.arcsinh(tick / unit) - np.arcsinh(kept[-1] / unit)) > 0.07 * span:
            kept.append(tick)
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t:g}".replace("-", "−")))


def _gap_caption(table: xr.Dataset, gap: np.ndarray, n: int, bits_per: int | None, stretched: bool) -> str:
    low, middle, high = (float(v) for v in np.quantile(gap, [0.25, 0.5, 0.75]))
    text = f"Half of the data lose less than {say(middle)} nats, the middle half between {say(low)} and {say(high)} (shaded)"
    if bits_per:
        text += f"; the median is {say(middle / (bits_per * np.log(2)), 2)} bits per dimension"
    tail = gap[-max(1, gap.size // 20) :]
    share = float(tail.sum() / gap.sum()) if gap.sum() > 0 else np.nan
    text += f". The mean is {say(float(gap.mean()))}, and the worst {count(tail.size)} carry {percent(share)} of the sum"
    text += ": the guide fails on a few data, not on all." if share > 0.25 else ": the loss is spread over the data."
    negative = int((gap < 0).sum())
    if negative:
        se = np.hypot(column(table, "elbo_se"), column(table, "log_evidence_se"))
        below = int((column(table, "gap_total") < -3 * se).sum())
        beyond = "all within 3 standard errors of 0" if not below else f"{below} of them by more than 3 standard errors"
        text += f" {count(negative)} {'has' if negative == 1 else 'have'} a negative gap, {beyond}: the ELBO is itself estimated."
    if gap.size < n:
        text += f" {count(n - gap.size)} of {n} have no known log p(x); they are not in this figure."
    return text + (" The axis is linear near 0 and logarithmic beyond the median." if stretched else "")


@styled
def trust(table: xr.Dataset) -> Plot | Absent:
    """Draw the gap against k-hat of the guide's importance weights."""
    gap, k = column(table, "gap_total"), column(table, "pareto_k")
    both = np.isfinite(gap) & np.isfinite(k)
    if both.sum() < 2:
        return Absent("trust", f"No comparison of gap and k-hat: both are known for {count(int(both.sum()))}.")
    good = both & (k < GOOD_K)
    bad = both & ~good
    figure = canvas(HALF, 4.0, "Can importance sampling mend it?")
    axes = figure.subplots()
    axes.axvspan(GOOD_K, max(1.05, 1.05 * float(k[both].max())), color=ALARM, alpha=0.06, linewidth=0)
    axes.axvline(GOOD_K, color=ALARM, linewidth=0.9, linestyle="--")
    axes.scatter(k[good], gap[good], s=15, color=EXACT, alpha=0.65, linewidth=0, label=f"k-hat < {GOOD_K}: {int(good.sum())}")
    axes.scatter(k[bad], gap[bad], s=20, marker="^", color=ALARM, alpha=0.8, linewidth=0, label=f"k-hat ≥ {GOOD_K}: {int(bad.sum())}")
    axes.margins(x=0.02)
    if (gap[both] > 0).all() and gap[both].max() > 20 * np.median(gap[both]):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t:g}"))
    axes.set(xlabel="k-hat of the importance weights", ylabel="gap (nats)")
    axes.legend(loc="upper left", handletextpad=0.2, title=None)
    alt = "Scatter of the gap against k-hat, one dot for each datum, with the limit at 0.7."
    return Plot("trust", figure, alt, _trust_caption(gap, k, both, bad))


def _trust_caption(gap: np.ndarray, k: np.ndarray, both: np.ndarray, bad: np.ndarray) -> str:
    if np.ptp(gap[both]) > 0 and np.ptp(k[both]) > 0:
        rho = float(spearmanr(gap[both], k[both]).statistic)
        relation = f"The rank correlation of gap and k-hat is {rho:.2f}"
        relation = relation.replace("-0", "−0")
        relation += (
            ": k-hat finds the bad data without a reference." if rho > 0.7 else ": k-hat alone does not tell which gaps are large."
        )
    else:
        relation = "Gap or k-hat is the same for all data."
    largest = int(np.flatnonzero(both)[np.argmax(gap[both])])
    hidden = both & (k < GOOD_K) & (gap > np.quantile(gap[both], 0.95))
    text = (
        f"Where k-hat is below {GOOD_K}, weighted draws from the guide can stand for the posterior; that is so for "
        f"{percent(float((~bad & both).sum()), float(both.sum()))} of the data. {relation} The datum with the largest gap has "
        f"k-hat {say(float(k[largest]), 2)}."
    )
    if hidden.any():
        text += f" {count(int(hidden.sum()))} among the 5% with the largest gaps {'pass' if hidden.sum() > 1 else 'passes'} k-hat."
    return text


@styled
def comparison(table: xr.Dataset) -> Plot | Absent:
    """Draw how the guide's mean, width and whole shape differ from the reference's, over data."""
    reference = best_reference(table)
    if reference is None:
        return Absent("comparison", "No comparison of guide and reference: no reference is exact or certified for any datum.")
    part = table.sel(reference=reference)
    rows = trusted(table, reference)
    mean, ratio, distance, floor = (
        np.asarray(part[name].values, dtype=float)[rows]
        for name in ("mean_error", "sd_ratio", "sliced_wasserstein", "noise_floor")
    )
    figure = canvas(WIDE, 3.2, f"The guide against the {_words(reference)} posterior, over {count(int(rows.sum()))}")
    first, second, third = figure.subplots(1, 3)
    _histogram(first, mean, "largest error of a mean (posterior sd)")
    first.set_ylabel("number of data")
    _histogram(second, np.log2(ratio), "sd of guide / sd of posterior (worst latent)", zero=False)
    reach = max(0.6, 1.05 * float(np.abs(np.log2(ratio[np.isfinite(ratio) & (ratio > 0)])).max(initial=0.5)))
    marks = [m for m in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 0.7, 1, 1.4, 2, 4, 8, 16) if abs(np.log2(m)) <= reach]
    if len(marks) > 5:
        marks = [m for m in marks if m not in (0.7, 1.4)]
    second.set(xlim=(-reach, reach))
    second.set_xticks(np.log2(marks), [f"{m:g}" if m >= 0.5 else f"1/{1 / m:g}" for m in marks])
    second.axvline(0, color=INK, linewidth=1)
    second.annotate("too narrow", (0.02, 0.97), xycoords="axes fraction", fontsize=8, color=MUTED, va="top")
    second.annotate("too wide", (0.98, 0.97), xycoords="axes fraction", fontsize=8, color=MUTED, va="top", ha="right")
    sns.ecdfplot(x=floor, ax=third, color=MUTED, linestyle="--", label="noise floor: reference against itself")
    sns.ecdfplot(x=distance, ax=third, color=GUIDE, label="guide against reference")
    third.set(xlabel="sliced Wasserstein distance (posterior sd)", ylabel="share of data below", ylim=(0, 1.01), xlim=(0, None))
    third.legend(loc="lower right")
    alt = "Histograms of mean error and sd ratio of the guide, and distribution of its distance beside the noise floor."
    caption = _comparison_caption(mean, ratio, distance, floor, table.sizes["obs_id"] - int(rows.sum()))
    return Plot("comparison", figure, alt, caption, wide=True)


def _words(reference: str) -> str:
    return {"closed_form": "closed-form", "grid": "exact grid"}.get(reference, reference)


def _histogram(axes: Axes, values: np.ndarray, label: str, *, zero: bool = True) -> None:
    values = values[np.isfinite(values)]
    if values.size:
        bins = np.linspace(0 if zero else values.min(), max(values.max(), values.min() + 1e-9), 31)
        sns.histplot(x=values, bins=bins, ax=axes, color=EXACT, edgecolor=PAPER, linewidth=0.5, alpha=0.9)
        axes.axvline(np.median(values), color=GUIDE, linewidth=1.5)
    axes.set(xlabel=label, ylabel="")


def _comparison_caption(mean: np.ndarray, ratio: np.ndarray, distance: np.ndarray, floor: np.ndarray, left_out: int) -> str:
    narrow = percent(float((ratio < 1 / 1.1).sum()), float(ratio.size))
    wide = percent(float((ratio > 1.1).sum()), float(ratio.size))
    above = percent(float((distance > 2 * floor).sum()), float(distance.size))
    text = (
        f"Medians (orange): a mean is off by {say(float(np.median(mean)), 2)} posterior sd, a width by a factor of "
        f"{say(float(np.median(ratio)), 2)}, each in the datum's worst latent. By more than 10%, the guide is too narrow for "
        f"{narrow} of the data and too wide for {wide}. {above} lie farther from their reference than twice the noise floor: "
        "a difference that draws of this number can show."
    )
    if left_out:
        text += f" {count(left_out)} without an exact or certified reference {'is' if left_out == 1 else 'are'} left out."
    return text


@styled
def intervals(table: xr.Dataset, posteriors: Mapping[str, xr.DataTree]) -> Plot | Absent:
    """Draw central intervals of guide and reference for a few data, through ArviZ's plot_forest.

    Args:
        table: the audit.
        posteriors: method -> DataTree with group `posterior`, dims chain, draw, obs_id, ...
    """
    reference = best_reference(table)
    if reference is None or reference not in posteriors or "guide" not in posteriors:
        return Absent("intervals", "No intervals of guide and reference: the run folder does not hold the draws of both.")
    gap = column(table, "gap_total")
    gap[~trusted(table, reference)] = np.nan
    order = np.argsort(gap)[: int(np.isfinite(gap).sum())]
    rows = order[np.unique(np.linspace(0, len(order) - 1, min(5, len(order))).round().astype(int))]
    obs_id = table["obs_id"].values[rows]
    if not all(np.isin(obs_id, posteriors[m]["posterior"]["obs_id"].values).all() for m in ("guide", reference)):
        return Absent("intervals", "No intervals: the files of draws and audit.nc hold different data; run the audit again.")
    names = [f"#{i}, gap {say(float(gap[n]), 2)}" for i, n in zip(obs_id, rows, strict=True)]
    slices = {
        label: _slice(posteriors[method], obs_id, names)
        for label, method in (("guide q(z|x)", "guide"), (f"{_words(reference)} p(z|x)", reference))
    }
    figure = _forest(slices)
    off, total = _disagreement(slices)
    text = (
        f"Central 50 and 95% intervals and means, drawn by ArviZ from posteriors/*.nc for {count(len(rows))} from the smallest to "
        f"the largest gap. The guide's 50% interval misses the reference's mean in {off} of {total} cases"
    )
    text += ": who reads these off the guide is misled there." if off > total / 4 else "."
    alt = "Forest plot of the intervals of guide and reference draws for some data."
    return Plot("intervals", figure, alt, text)


def _slice(tree: xr.DataTree, obs_id: np.ndarray, names: list[str]) -> xr.Dataset:
    """Return at most four scalar latents of the chosen data, each a variable over `datum`."""
    posterior = tree["posterior"].to_dataset().sel(obs_id=obs_id)
    out: dict[str, Any] = {}
    for site, values in posterior.data_vars.items():
        flat = values.transpose("chain", "draw", "obs_id", ...).values
        flat = flat.reshape(*flat.shape[:3], -1)
        for j in range(flat.shape[-1]):
            name = str(site) if flat.shape[-1] == 1 else f"{site}[{j}]"
            if len(out) < 4:
                out[name] = (("chain", "draw", "datum"), flat[..., j])
    return xr.Dataset(out, coords={"datum": names})


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
    figure.set_layout_engine("constrained")
    names, axes = figure.axes[:2]
    bare(names)
    names.set_xticks([])
    for text in names.texts:
        text.set(fontsize=8, color=INK)
    rows = sum(part.sizes["datum"] * len(part.data_vars) for part in slices.values()) / len(slices)
    names.set_ylim(rows - 0.4, -0.6) if names.yaxis_inverted() else names.set_ylim(-0.6, rows - 0.4)
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
