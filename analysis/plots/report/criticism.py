"""Figures of the model's criticism: checks against their nulls, PIT of the data given z, and predictive distributions.

A check fails by the rule of the verdict `model misfit`: a small familywise p-value and an effect above its threshold.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from elbowroom.analysis.measures.table import LEVEL
from elbowroom.analysis.plots import style
from elbowroom.analysis.plots.style import Absent, Plot, styled
from elbowroom.analysis.verdict.thresholds import EFFECTS, MEASURED, effect_in_words

FAR = 6.0  # null sd, beyond which the axis is logarithmic
SITES = 3  # observed sites with their own row


def failing(found: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return which checks fail, and which deviate significantly but by less than the threshold, (statistic,) each."""
    clear = found["p_adjusted"].values <= LEVEL
    limit = np.array([EFFECTS[kind] for kind in found["effect_kind"].values.astype(str)])
    bad = clear & (np.abs(found["effect"].values) > limit)
    return bad, clear & ~bad


@styled
def checks(found: xr.Dataset | None) -> Plot | Absent:
    """Draw each statistic of the data and its null, in standard deviations of the null, with p-value and effect."""
    if found is None or not found.sizes.get("statistic"):
        why = ": diagnosis.nc has none"
        if found is not None:
            reasons = [str(found.attrs.get(name, "")) for name in ("joint", "residual")]
            why = next((f", {reason}" for reason in reasons if reason), why)
        return Absent("checks", f"No checks of the model{why}.")
    bad, slight = failing(found)
    k = found.sizes["statistic"]
    figure = style.canvas(style.WIDE, 1.3 + 0.36 * k, "Each statistic of the data within what the model gives")
    axes = figure.subplots()
    sd = found["null_sd"].values
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(sd > 0, (found["value"].values - found["null_mean"].values) / sd, np.nan)
        null = (found["null"].values - found["null_mean"].values[:, None]) / np.where(sd > 0, sd, np.nan)[:, None]
    for row in range(k):
        draws = null[row][np.isfinite(null[row])]
        if draws.size:
            axes.fill_betweenx([row - 0.3, row + 0.3], *np.quantile(draws, [0.025, 0.975]), color=style.FAINT, linewidth=0)
            axes.plot(draws, np.full(draws.size, float(row)), "|", color=style.MUTED, alpha=0.25, markersize=5)
    kinds = (
        (bad, "fails: unlikely, and by more than matters", style.ALARM, "X"),
        (slight, "unlikely, but by less than matters", style.GUIDE, "^"),
        (~(bad | slight), "no clear deviation", style.EXACT, "o"),
    )
    for rows, label, colour, marker in kinds:
        if rows.any():
            look: dict[str, Any] = {"color": colour, "marker": marker, "s": 42, "linewidth": 0, "zorder": 4}
            axes.scatter(z[rows], np.flatnonzero(rows), label=f"{label}: {int(rows.sum())}", **look)
    for row in range(k):
        look = {"fontsize": 8, "va": "center", "color": style.ALARM if bad[row] else style.INK}
        text = f"p {_p(found, row)}   effect {_effect(found, row)}"
        axes.annotate(text, (1.01, row), xycoords=axes.get_yaxis_transform(), annotation_clip=False, **look)
    axes.set_yticks(range(k), [_short(word) for word in found["words"].values.astype(str)])
    axes.tick_params(axis="y", labelcolor=style.INK, labelsize=7.5)
    axes.set_ylim(k - 0.4, -0.6)
    _wide_axis(axes, z)
    axes.set_xlabel("observed value, in standard deviations of the null from its mean (ticks: what the model gives, grey: 95%)")
    figure.legend(loc="outside lower left", ncols=3)
    axes.grid(axis="y", visible=False)
    alt = f"{k} statistics of the data within their null distributions; {int(bad.sum())} fail."
    return Plot("checks", figure, alt, _checks_caption(found, bad, slight), wide=True)


def _short(words: str) -> str:
    """Break words into at most two lines."""
    return "\n".join(textwrap.wrap(words, 48, max_lines=2, placeholder=" …"))


def _p(found: xr.Dataset, row: int) -> str:
    return f"{float(found['p_adjusted'].values[row]):.2g}"


def _effect(found: xr.Dataset, row: int) -> str:
    return effect_in_words(float(found["effect"].values[row]), str(found["effect_kind"].values[row])).replace("-", "−")


def _wide_axis(axes: Axes, z: np.ndarray) -> None:
    """Scale the axis linearly, or logarithmically from `FAR` on where an observation lies much farther out."""
    known = np.abs(z[np.isfinite(z)])
    reach = 1.15 * max(4.0, float(known.max(initial=0.0)))
    axes.set_xlim(-min(reach, 1.15 * max(4.0, float(-np.nanmin([*z, 0.0])))), min(reach, 1.15 * max(4.0, np.nanmax([*z, 0.0]))))
    if reach > 3 * FAR:
        axes.set_xscale("symlog", linthresh=FAR, linscale=1.5)
        steps = [m * 10.0**e for e in range(1, 7) for m in (1, 3)]
        axes.xaxis.set_major_locator(FixedLocator([-t for t in steps] + [-4, -2, 0, 2, 4, *steps]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t:g}".replace("-", "−")))


def _checks_caption(found: xr.Dataset, bad: np.ndarray, slight: np.ndarray) -> str:
    words, k = found["words"].values.astype(str), found.sizes["statistic"]
    tell = lambda row: f"{words[row]} (effect {_effect(found, row)}, p = {_p(found, row)})"
    limit = np.array([EFFECTS[kind] for kind in found["effect_kind"].values.astype(str)])
    by_effect = np.argsort(-np.abs(found["effect"].values) / limit, kind="stable")
    if bad.any():
        text = (
            f"{int(bad.sum())} of {k} checks fail: {'; '.join(tell(row) for row in by_effect if bad[row])}. The model does not "
            "make such data, and its posteriors, exact ones too, are those of a wrong model."
        )
    elif slight.any():
        text = (
            f"None of {k} checks fails. {int(slight.sum())} deviate more than chance allows, by less than matters: "
            f"{'; '.join(tell(row) for row in by_effect if slight[row])}."
        )
    else:
        least = float(found["p_adjusted"].min())
        text = f"None of {k} checks fails, the smallest p-value is {least:.2g}: in these respects the model makes such data."
    text += (
        " p-values hold over all checks together; those of the residuals take z as one draw of the certified posterior. "
        "Effects matter from these sizes on: "
    )
    kinds = [kind for kind in EFFECTS if kind in set(found["effect_kind"].values.astype(str))]
    text += ", ".join(f"{effect_in_words(EFFECTS[kind], kind).lstrip('+')} {MEASURED[kind]}" for kind in kinds) + "."
    for name, what in (("joint", "checks against simulated data"), ("residual", "residuals given z")):
        if reason := str(found.attrs.get(name, "")):
            text += f" {what[0].upper()}{what[1:]}: {reason}."
    return text


@styled
def pit(groups: Mapping[str, xr.Dataset]) -> Plot | Absent:
    """Draw the PIT of the data given z against uniform, of all entries and by column.

    `groups` is `pit`, or `pit_<site>` for each of several observed sites.
    """
    if not groups:
        return Absent("pit", "No PIT of the data given z: diagnosis.nc has none.")
    shown = dict(list(groups.items())[:SITES])
    figure = style.canvas(
        style.WIDE, 0.5 + 2.7 * len(shown), "Where x lies within what the model gives for it at the z of its posterior"
    )
    panels = figure.subplots(len(shown), 2, squeeze=False)
    words = []
    for (left, right), (name, found) in zip(panels, shown.items(), strict=True):
        u, difference, band = found["u"].values, found["difference"].values, float(found["band"])
        left.fill_between([0, 1], -band, band, color=style.FAINT, linewidth=0, label="95% band")
        left.axhline(0, color=style.MUTED, linewidth=0.8)
        outside = bool(np.nanmax(np.abs(difference)) > band)
        left.plot(u, difference, color=style.ALARM if outside else style.EXACT, label="all entries")
        left.set(xlabel="u (PIT)", ylabel="ECDF − u", xlim=(0, 1))
        top, bottom = (max(band, float(np.nanmax(sign * difference))) for sign in (1, -1))
        left.set_ylim(-1.2 * bottom, 1.45 * top)
        left.legend(loc="upper left", ncols=2)
        low = found["p_value"].values <= 0.05
        effect, column = found["effect"].values, found["column"].values
        for rows, colour, marker, label in (
            (~low, style.EXACT, "o", "p above 0.05"),
            (low, style.ALARM, "X", "p at most 0.05, each by itself"),
        ):
            if rows.any():
                look: dict[str, Any] = {"s": 18, "linewidth": 0, "color": colour, "marker": marker}
                right.scatter(column[rows], effect[rows], label=f"{label}: {int(rows.sum())}", **look)
        right.set(xlabel="column of x", ylabel="largest |ECDF − u|", ylim=(0, 1.25 * max(1e-9, float(np.nanmax(effect)))))
        right.set_xlim(column.min() - 0.5 - 0.02 * column.size, column.max() + 0.5 + 0.02 * column.size)
        right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        right.legend(loc="upper right", ncols=2, handletextpad=0.2)
        site = name.removeprefix("pit").removeprefix("_")
        if site:
            left.set_title(f"{site}, all entries")
            right.set_title(f"{site}, by column")
        words.append(_pit_words(site, difference, band, outside, low))
    left_out = len(groups) - len(shown)
    text = " ".join(words) + (f" {left_out} more observed sites are not drawn." if left_out else "")
    alt = "Difference of the ECDF of the PIT from uniform with its band, beside the largest difference of each column."
    return Plot("pit", figure, alt, text, wide=True)


def _pit_words(site: str, difference: np.ndarray, band: float, outside: bool, low: np.ndarray) -> str:
    largest = float(np.nanmax(np.abs(difference)))
    begin, apart = f"{site}: " if site else "", f"largest difference {style.say(largest, 2)}"
    if outside and largest > EFFECTS["difference"]:
        said = f"leaves its band ({apart}): the model is off about single entries, in mean or shape."
    elif outside:
        said = f"leaves its band by less than matters ({apart})."
    else:
        said = f"stays within its 95% band ({apart}): no fault of single entries shows on the whole."
    chance = style.percent(float(low.mean())) if low.size else "none"
    return (
        f"{begin}The PIT of all entries {said} {int(low.sum())} of {low.size} columns ({chance}) have a p-value of 0.05 or "
        "less; 5% would by chance."
    )
