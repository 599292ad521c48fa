"""Figures of the audit's table: the distribution of the gap, trust in importance weights, guide against reference.

Data whose reference is neither exact nor certified are counted in the captions, and left out of averages.
"""

from __future__ import annotations

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from scipy.stats import spearmanr

from elbowroom.analysis.measures.evidence_kinds import CONTRADICTED, ESTIMATE, counts, estimated
from elbowroom.analysis.measures.table import GOOD_K, LARGE_GAP, SMALL_GAP, Z95, best_reference, column, in_words, trusted
from elbowroom.analysis.plots import style
from elbowroom.analysis.plots.style import Absent, Plot, styled


@styled
def gaps(table: xr.Dataset, bits_per: int | None = None) -> Plot | Absent:
    """Draw the distribution of the gap over data.

    `bits_per` is the number of entries of one datum, to convert nats to bits per entry (discrete data).
    """
    everything = column(table, "gap_total")
    gap = np.sort(everything[np.isfinite(everything)])
    if gap.size < 2:
        n = style.count(int(gap.size))
        return Absent("gaps", f"No distribution of the gap: log p(x), hence the gap, is known for {n} of {everything.size}.")
    low, middle, high = np.quantile(gap, [0.25, 0.5, 0.75])
    stretched, unit = bool(gap[-1] > 8 * max(high, 1e-12)), max(float(middle), 1e-6)
    figure = style.canvas(style.WIDE, 3.3, "The room between ELBO and log p(x)")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    bins = _bins(gap, stretched, unit)
    for axes in (left, right):
        axes.axvspan(low, high, color=style.FAINT, alpha=0.7, linewidth=0)
        axes.axvline(middle, color=style.GUIDE, linewidth=1.5)
        if stretched:
            _asinh_axis(axes, gap, unit)
        axes.set_xlabel("gap = log p(x) − ELBO (nats)")
    left.hist(gap[gap >= 0], bins, color=style.EXACT, edgecolor=style.PAPER, linewidth=0.5, alpha=0.9)
    if (gap < 0).any():
        left.hist(gap[gap < 0], bins, color=style.ALARM, edgecolor=style.PAPER, linewidth=0.5, alpha=0.9, label="negative")
        left.legend(loc="upper right")
    sns.rugplot(x=gap, ax=left, height=0.03, color=style.INK, alpha=0.6, linewidth=0.6)
    left.set_ylabel("number of data")
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    left.annotate(
        f"median {style.say(float(middle))}",
        (middle, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        color=style.GUIDE,
        fontsize=8,
        va="top",
        bbox={"boxstyle": "round,pad=0.15", "facecolor": style.PAPER, "edgecolor": "none", "alpha": 0.85},
    )
    sns.ecdfplot(x=gap, ax=right, color=style.EXACT)
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
    between = f"the middle half between {style.say(low)} and {style.say(high)} (shaded)"
    text = f"Half of the data lose less than {style.say(middle)} nats, {between}"
    if bits_per:
        text += f"; the median is {style.say(middle / (bits_per * np.log(2)), 2)} bits per dimension"
    tail = gap[-max(1, gap.size // 20) :]
    share = float(tail.sum() / gap.sum()) if gap.sum() > 0 else np.nan
    even = tail.size / gap.size
    worst = f"worst of {gap.size} data carries" if tail.size == 1 else f"{tail.size} worst of {gap.size} data carry"
    text += f". The mean is {style.say(float(gap.mean()))}, and the {worst} {style.percent(share)} of the sum"
    if share > max(0.25, 3 * even):
        text += ": the guide fails on a few data, not on all."
    elif share > 3 * even:
        text += f", where {style.percent(even)} would be an even share: few data weigh heavily."
    else:
        text += ": the loss is spread over the data."
    negative = int((gap < 0).sum())
    if negative:
        se = np.hypot(column(table, "elbo_se"), column(table, "log_evidence_se"))
        below = int((column(table, "gap_total") < -3 * se).sum())
        beyond = "all within 3 standard errors of 0" if not below else f"{below} of them by more than 3 standard errors"
        verb = "has" if negative == 1 else "have"
        text += f" {style.count(negative)} {verb} a negative gap, {beyond}: the ELBO is itself estimated."
    if gap.size < n:
        text += f" {style.count(n - gap.size)} of {n} have no known log p(x); they are not in this figure."
    kind = counts(table)
    if kind[CONTRADICTED]:
        wrong = style.count(kind[CONTRADICTED])
        text += f" For {wrong} log p(x) is contradicted: it lies below the ELBO by more than the errors allow."
    if kind[ESTIMATE]:
        text += f" For {style.count(kind[ESTIMATE])} log p(x) is itself an {estimated(table)[0]}."
    return text + (" The axis is linear near 0 and logarithmic beyond the median." if stretched else "")


@styled
def trust(table: xr.Dataset) -> Plot | Absent:
    """Draw the gap against k-hat of the guide's importance weights."""
    gap, k = column(table, "gap_total"), column(table, "pareto_k")
    both = np.isfinite(gap) & np.isfinite(k)
    if both.sum() < 2:
        return Absent("trust", f"No comparison of gap and k-hat: both are known for {style.count(int(both.sum()))}.")
    good = both & (k < GOOD_K)
    bad = both & ~good
    figure = style.canvas(style.HALF, 4.0, "Can importance sampling mend it?")
    axes = figure.subplots()
    axes.axvline(GOOD_K, color=style.ALARM, linewidth=0.9, linestyle="--")
    for rows, marker, size, colour, sign in ((good, "o", 15, style.EXACT, "<"), (bad, "^", 20, style.ALARM, "≥")):
        label = f"k-hat {sign} {GOOD_K}: {int(rows.sum())}"
        axes.scatter(k[rows], gap[rows], s=size, marker=marker, color=colour, alpha=0.7, linewidth=0, label=label)
    axes.margins(x=0.02)
    left, right = axes.get_xlim()
    right = max(right, 1.05)
    axes.axvspan(GOOD_K, right, color=style.ALARM, alpha=0.06, linewidth=0)
    axes.set_xlim(left, right)
    if (gap[both] > 0).all() and gap[both].max() > 20 * np.median(gap[both]):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t:g}"))
    axes.set(xlabel="k-hat of the importance weights", ylabel="gap (nats)")
    axes.legend(loc="lower right", ncols=2, bbox_to_anchor=(1, 1.0), borderaxespad=0.2, handletextpad=0.2)
    alt = "Scatter of the gap against k-hat, one dot for each datum, with the limit at 0.7."
    return Plot("trust", figure, alt, _trust_caption(gap, k, both, bad))


def _trust_caption(gap: np.ndarray, k: np.ndarray, both: np.ndarray, bad: np.ndarray) -> str:
    if gap[both].max() < SMALL_GAP:
        relation = f"All gaps are below {SMALL_GAP} nats: there is little to mend."
    elif np.ptp(gap[both]) > 0 and np.ptp(k[both]) > 0:
        rho, n = float(spearmanr(gap[both], k[both]).statistic), int(both.sum())
        low, high = np.tanh(np.arctanh(np.clip(rho, -0.9999, 0.9999)) + np.array([-1, 1]) * Z95 * np.sqrt(1.06 / max(1, n - 3)))
        ends = ", ".join(f"{round(end, 2) + 0.0:.2f}" for end in (low, high))  # Fieller, Hartley and Pearson 1957
        relation = f"The rank correlation of gap and k-hat is {round(rho, 2) + 0.0:.2f} [{ends}]".replace("-0", "−0")
        found = "finds the bad data without a reference" if rho > 0.7 else "alone does not tell which gaps are large"
        relation += f": k-hat {found}."
    else:
        relation = "Gap or k-hat is the same for all data, so neither tells anything of the other."
    largest = int(np.flatnonzero(both)[np.argmax(gap[both])])
    hidden = both & (k < GOOD_K) & (gap > max(LARGE_GAP, float(np.quantile(gap[both], 0.95))))
    text = (
        f"Where k-hat is below {GOOD_K}, weighted draws from the guide can stand for the posterior; that is so for "
        f"{style.percent(float((~bad & both).sum()), float(both.sum()))} of the data. {relation}"
    )
    if gap[largest] >= SMALL_GAP:
        text += f" The datum with the largest gap has k-hat {style.say(float(k[largest]), 2)}."
    if hidden.any():
        verb = "passes" if hidden.sum() == 1 else "pass"
        text += f" {style.count(int(hidden.sum()))} among the 5% with the largest gaps {verb} k-hat."
    return text


@styled
def comparison(table: xr.Dataset) -> Plot | Absent:
    """Draw how the guide's mean, width and shape differ from the reference's, over data."""
    reference = best_reference(table)
    if reference is None:
        return Absent("comparison", "No comparison of guide and reference: no reference is exact or certified for any datum.")
    part = table.sel(reference=reference)
    rows = trusted(table, reference)
    mean, ratio, distance, floor = (
        np.asarray(part[name].values, dtype=float)[rows]
        for name in ("mean_error", "sd_ratio", "sliced_wasserstein", "noise_floor")
    )
    if not np.isfinite(distance).any():
        why = (
            "its latents are discrete, whose probabilities are compared directly"
            if not np.isfinite(ratio).any()
            else "none is known"
        )
        return Absent("comparison", f"No comparison of means and widths: {why}.")
    figure = style.canvas(
        style.WIDE, 3.2, f"The guide against the {in_words(reference)} posterior, over {style.count(int(rows.sum()))}"
    )
    first, second, third = figure.subplots(1, 3)
    _histogram(first, mean, "largest error of a mean (posterior sd)")
    first.set_ylabel("number of data")
    first.yaxis.set_major_locator(MaxNLocator(integer=True))
    _histogram(second, np.log2(ratio), "sd of guide / sd of posterior (worst latent)", zero=False)
    reach = max(0.2, 1.05 * float(np.abs(np.log2(ratio[np.isfinite(ratio) & (ratio > 0)])).max(initial=0.0)))
    marks = [m for m in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 0.7, 0.9, 1, 1.1, 1.4, 2, 4, 8, 16) if abs(np.log2(m)) <= reach]
    for fine in ((0.9, 1.1), (0.7, 1.4)):
        if len(marks) > 5:
            marks = [m for m in marks if m not in fine]
    second.set(xlim=(-reach, reach))
    second.set_xticks(np.log2(marks), [f"{m:g}" if m >= 0.5 else f"1/{1 / m:g}" for m in marks])
    second.axvline(0, color=style.INK, linewidth=1)
    second.annotate("too narrow", (0.02, 0.97), xycoords="axes fraction", fontsize=8, color=style.MUTED, va="top")
    second.annotate("too wide", (0.98, 0.97), xycoords="axes fraction", fontsize=8, color=style.MUTED, va="top", ha="right")
    sns.ecdfplot(x=floor, ax=third, color=style.MUTED, linestyle="--", label="noise floor: reference against itself")
    sns.ecdfplot(x=distance, ax=third, color=style.GUIDE, label="guide against reference")
    third.set(xlabel="sliced Wasserstein distance (posterior sd)", ylabel="share of data below", ylim=(0, 1.01), xlim=(0, None))
    third.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)
    alt = "Histograms of mean error and sd ratio of the guide, and distribution of its distance beside the noise floor."
    caption = _comparison_caption(mean, ratio, distance, floor, table.sizes["obs_id"] - int(rows.sum()))
    if "kl_forward" in part:
        caption += _both_ways(part["kl_forward"].values[rows], column(table, "gap_total")[rows])
    return Plot("comparison", figure, alt, caption, wide=True)


def _both_ways(forward: np.ndarray, gap: np.ndarray) -> str:
    """Return the conclusion from both directions of the KL divergence."""
    both = np.isfinite(forward) & np.isfinite(gap)
    if not both.any():
        return ""
    there, back = float(np.median(forward[both])), float(np.median(gap[both]))
    tells = (
        "there is mass of the posterior that the guide misses"
        if there > max(SMALL_GAP, 1.5 * back)
        else "the guide has mass where the posterior has little"
        if back > max(SMALL_GAP, 1.5 * there)
        else "neither direction stands out"
    )
    return (
        f" KL(p || q) has a median of {style.say(there, 2)} nats beside {style.say(back, 2)} of the gap, KL(q || p): {tells}."
    )


def _histogram(axes: Axes, values: np.ndarray, label: str, *, zero: bool = True) -> None:
    values = values[np.isfinite(values)]
    if values.size:
        bins = np.linspace(0 if zero else values.min(), max(values.max(), values.min() + 1e-9), 31)
        sns.histplot(x=values, bins=bins, ax=axes, color=style.EXACT, edgecolor=style.PAPER, linewidth=0.5, alpha=0.9)
        axes.axvline(np.median(values), color=style.GUIDE, linewidth=1.5)
    axes.set(xlabel=label, ylabel="")


def _comparison_caption(mean: np.ndarray, ratio: np.ndarray, distance: np.ndarray, floor: np.ndarray, left_out: int) -> str:
    narrow = style.percent(float((ratio < 1 / 1.1).sum()), float(ratio.size))
    wide = style.percent(float((ratio > 1.1).sum()), float(ratio.size))
    above = style.percent(float((distance > 2 * floor).sum()), float(distance.size))
    text = (
        f"Medians (orange): a mean is off by {style.say(float(np.median(mean)), 2)} posterior sd, a width by a factor of "
        f"{style.say(float(np.median(ratio)), 2)}, each in the datum's worst latent. By more than 10%, the guide is too narrow "
        "for "
        f"{narrow} of the data and too wide for {wide}. {above} lie farther from their reference than twice the noise floor: "
        "a difference that draws of this number can show."
    )
    if left_out:
        text += f" {style.count(left_out)} without an exact or certified reference {'is' if left_out == 1 else 'are'} left out."
    return text
