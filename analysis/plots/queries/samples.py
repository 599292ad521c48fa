"""Figures of generated data: draws of each source with held-out data, interpolations, reconstructions with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from elbowroom.analysis.plots import sequence as plots_sequence
from elbowroom.analysis.plots import style
from elbowroom.analysis.plots.style import Absent, Plot, styled
from elbowroom.models.columns import image_shape

COLOURS = {"data": style.INK, "aggregate": style.EXACT, "prior": style.GUIDE}
WORDS = {"data": "held-out data", "aggregate": "draws: aggregate posterior", "prior": "draws: prior"}
PANELS = 12  # columns shown
SIDE = 8  # tiles
FEW_VALUES = 12
Sets = Mapping[str, np.ndarray]
Texts = Mapping[str, Sequence[str]]


@styled
def samples(
    found: xr.Dataset, shown: Sets | None, columns: Sequence[str], texts: Texts, *, caption: str, sequence: bool = False
) -> Plot | Absent:
    """Draw held-out data and draws of each source; without a test the draws and their E[x|z].

    Args:
        found: x and mean (sample, *event); auc (source) where there was a test.
        shown: `data`, `prior`, `aggregate` -> x (n, *event); None without a test.
        columns: names of a table's columns.
        texts: column -> the texts of its codes.
        caption: the conclusion of the test.
        sequence: whether the data are sequences, not images.
    """
    name, event = "samples", found["x"].shape[1:]
    sets = {WORDS[key]: shown[key] for key in COLOURS if key in shown} if shown is not None else {}
    image = None if sequence else image_shape(event)
    title = "Do its draws look like data?" if sets else "What the model generates"
    if not sets:
        caption = "Draws of p(x|z); the mean E[x|z] is smoother than any datum. They were not tested."
    alt = "Held-out data beside draws from the aggregate posterior and from the prior."
    if image is not None:
        tiles = sets or {"draws of p(x|z)": found["x"].values, "E[x|z] of the same": found["mean"].values}
        figure = style.canvas(3.4 * len(tiles) + 0.2, 3.95, title)
        limits = style.tone(np.concatenate([x.ravel() for x in tiles.values()]))
        for axes, (words, x) in zip(figure.subplots(1, len(tiles)), tiles.items(), strict=True):
            style.show_tiles(axes, _square(x, image), limits)
            axes.set(xticks=[], yticks=[], title=_titled(words, found))
        return Plot(name, figure, alt, caption, wide=True)
    if len(event) == 2 and sequence:
        figure = style.canvas(style.WIDE, 4.0, title)
        plots_sequence.draws(figure, dict(list((sets or {"draws": found["x"].values}).items())[::-2]))
        return Plot(name, figure, alt, caption, wide=True)
    if len(event) != 1:
        return Absent(name, "No picture of the draws: a datum is no image, table or sequence.")
    named = list(columns) or [f"entry {j}" for j in range(event[0])]
    figure = style.canvas(style.WIDE, 0.9 + 1.75 * math.ceil(min(len(named), PANELS) / 4), title)
    _margins(figure, sets or {"draws": found["x"].values}, named, texts)
    if len(named) > PANELS:
        caption += f" Shown are the first {PANELS} of {len(named)} columns, one by one; the test sees them together."
    return Plot(name, figure, "Distributions of each column in held-out data and in draws.", caption, wide=True)


def _titled(words: str, found: xr.Dataset) -> str:
    for key, label in WORDS.items():
        if label == words and key != "data":
            row = found.sel(source=key)
            return f"{words}\nAUC {float(row['auc']):.2f} ± {float(row['auc_se']):.2f}"
    return f"{words}\n{int(found['tested']):,} rows" if "tested" in found else words


def _square(x: np.ndarray, image: tuple[int, int]) -> np.ndarray:
    side = min(SIDE, max(1, math.isqrt(len(x))))
    return np.asarray(x[: side**2].reshape(side, side, *image), dtype=np.float64)


def _margins(figure: Any, sets: Sets, names: Sequence[str], texts: Texts) -> None:
    """Draw the distribution of each column in each set."""
    number = min(len(names), PANELS)
    across = min(4, number)
    grid = figure.subplots(math.ceil(number / across), across, squeeze=False)
    shades = {WORDS[key]: colour for key, colour in COLOURS.items()}
    for j, axes in enumerate(grid.flat):
        if j >= number:
            axes.remove()
            continue
        values = {words: x[:, j][np.isfinite(x[:, j])] for words, x in sets.items()}
        every = np.concatenate(list(values.values()))
        levels = np.unique(every)
        if names[j] in texts or len(levels) <= FEW_VALUES:
            _bars(axes, values, shades, texts.get(names[j]), levels)
        else:
            low, high = np.quantile(next(iter(values.values())), [0.005, 0.995])
            pad = 0.15 * (high - low)
            bins = np.linspace(low - pad, high + pad, 31).tolist()
            for words, x in values.items():
                data = words == WORDS["data"]
                axes.hist(
                    np.clip(x, bins[0], bins[-1]), bins, density=True, histtype="stepfilled" if data else "step",
                    color=shades.get(words, style.EXACT), alpha=0.2 if data else 1.0, lw=1.3, label=words,
                )  # fmt: skip
            axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_yticks([])
        axes.set_xlabel(names[j])
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.supylabel("share or density", fontsize=9)
    figure.legend(handles, labels, loc="outside lower center", ncols=3)


def _bars(axes: Axes, values: Sets, shades: Mapping[str, str], texts: Sequence[str] | None, levels: np.ndarray) -> None:
    places = np.arange(len(texts)) if texts else levels
    counts = {words: np.array([(x == place).mean() for place in places]) for words, x in values.items()}
    order = np.argsort(-next(iter(counts.values())), kind="stable")[:6] if texts else np.arange(len(places))
    width = 0.8 / len(counts)
    for k, (words, share) in enumerate(counts.items()):
        at = np.arange(len(order)) + (k - (len(counts) - 1) / 2) * width
        axes.bar(
            at,
            share[order],
            width,
            color=shades.get(words, style.EXACT),
            alpha=0.35 if words == WORDS["data"] else 1,
            label=words,
        )
    named = [str(texts[i])[:11] for i in order] if texts else [f"{places[i]:g}" for i in order]
    axes.set_xticks(range(len(order)), named, rotation=30 if texts else 0, ha="right" if texts else "center", fontsize=7)


@styled
def interpolation(
    found: xr.Dataset, ends: np.ndarray, columns: Sequence[str], texts: Texts, *, caption: str, sequence: bool = False
) -> Plot | Absent:
    """Draw E[x|z] and one draw of x along the line between two rows, the `ends` (2, *event), which are drawn at its ends.

    `found` holds t, x and mean over sample. The other arguments are as in `samples`.
    """
    event, t = found["x"].shape[1:], found["t"].values
    title = "From one row to another"
    first, last = (int(row) for row in np.atleast_1d(found.attrs["rows"]))
    image = None if sequence else image_shape(event)
    if image is not None:
        n = len(t)
        figure = style.canvas(min(style.WIDE, 0.9 * (n + 2) + 1.2), 2.5, title)
        strip = np.full((2, n + 2, *image), np.nan)
        for i, of in enumerate(("mean", "x")):
            strip[i, 1:-1] = found[of].values.reshape(n, *image)
        strip[0, 0], strip[0, -1] = ends.reshape(2, *image)
        axes = figure.subplots()
        style.show_tiles(axes, strip, style.tone(strip))
        axes.set_xticks(range(n + 2), [f"row {first}", *[f"{v:.2f}" for v in t], f"row {last}"])
        axes.set_yticks([0, 1], ["E[x|z]", "a draw of x"])
        axes.set_xlabel("t: z = (1 - t) E[z|first row] + t E[z|last row]")
        return Plot("interpolation", figure, f"E[x|z] between rows {first} and {last}.", caption, wide=True)
    if sequence and len(event) == 2:
        figure = style.canvas(style.WIDE, 3.0, title)
        plots_sequence.along(figure, [("t", t, found["mean"].values)])
        return Plot("interpolation", figure, f"E[x|z] between rows {first} and {last}.", caption, wide=True)
    if len(event) != 1:
        return Absent("interpolation", "No picture of the interpolation: a datum is no image, table or sequence.")
    names = list(columns) or [f"entry {j}" for j in range(event[0])]
    number = min(len(names), PANELS)
    figure = style.canvas(style.WIDE, 0.7 + 1.75 * math.ceil(number / 4), title)
    grid = figure.subplots(math.ceil(number / min(4, number)), min(4, number), squeeze=False)
    for j, panel in enumerate(grid.flat):
        if j >= number:
            panel.remove()
            continue
        panel.plot(t, found["mean"].values[:, j], color=style.EXACT, label="E[x|z]; of text the likeliest level")
        panel.plot([0, 1], ends[:, j], color=style.INK, linestyle="none", marker="o", ms=5, label=f"rows {first} and {last}")
        if names[j] in texts:
            panel.set_yticks(range(len(texts[names[j]])), [str(v)[:11] for v in texts[names[j]]], fontsize=7)
            panel.set_ylim(-0.4, len(texts[names[j]]) - 0.6)
        panel.set(title=names[j], xlabel="t" if j >= number - 4 else "")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return Plot("interpolation", figure, f"Columns between rows {first} and {last}.", caption, wide=True)


@styled
def reconstructions(found: xr.Dataset, shape: Sequence[int], names: Sequence[str], *, sequence: bool = False) -> Plot | Absent:
    """Draw rows with their reconstructions: images as tiles, columns of numbers against their means with intervals.

    `found` holds truth, mean, low, high, sd, samples over obs_id; `shape` is of one datum; `names` are of the columns.
    """
    name, level = "reconstructions", float(found.attrs["level"])
    image = None if sequence else image_shape(shape)
    truth, mean = (found[key].values.astype(np.float64).reshape(len(found["obs_id"]), -1) for key in ("truth", "mean"))
    there = np.isfinite(truth) & np.isfinite(mean)
    if not there.any():
        return Absent(name, "No picture of reconstructions: the entries are categories, which have no mean.")
    off = np.sqrt(np.where(there, np.square(truth - mean), 0.0).sum(1) / np.maximum(there.sum(1), 1))
    held = _inside(found)
    caption = (
        f"Rows whose reconstruction is best (left) to worst (right) by root mean squared error: {style.say(float(off.min()))} "
        f"to {style.say(float(off.max()))}, median {style.say(float(np.median(off)))}. {held}"
    )
    if image is not None:
        order = np.argsort(off, kind="stable")
        rows = order[np.unique(np.linspace(0, len(order) - 1, min(12, len(order))).round().astype(int))]
        sd = found["sd"].values.reshape(len(truth), -1)
        shown = {"datum": truth[rows], "E[x|datum]": mean[rows]}
        for i in range(min(2, found.sizes.get("sample", 0))):
            shown[f"draw {i + 1}"] = found["samples"].values[i].reshape(len(truth), -1)[rows]
        figure = style.canvas(
            style.WIDE, 0.9 + 0.78 * (len(shown) + 1), "What the model makes of rows that it sees: E[x|datum]"
        )
        top, bottom = figure.subplots(2, 1, height_ratios=[len(shown), 1])
        style.show_tiles(top, np.stack([v.reshape(-1, *image) for v in shown.values()]), style.tone(truth))
        top.set_yticks(range(len(shown)), list(shown))
        top.set_xticks([])
        style.show_tiles(bottom, sd[rows].reshape(1, -1, *image), (0.0, float(np.nanmax(sd[rows]))))
        bottom.set_yticks([0], ["sd"])
        bottom.set_xticks(range(len(rows)), [str(found["obs_id"].values[r]) for r in rows])
        bottom.set_xlabel("row")
        caption += f" sd: dark where the datum leaves a pixel open, at most {style.say(float(np.nanmax(sd[rows])))}."
        return Plot(name, figure, "Data, their reconstructions and the standard deviation of each pixel.", caption, wide=True)
    if sequence and len(shape) == 2:
        order = np.argsort(off, kind="stable")
        rows = order[np.unique(np.linspace(0, len(order) - 1, min(3, len(order))).round().astype(int))]
        figure = style.canvas(style.WIDE, 4.0, "What the model makes of rows that it sees: E[x|datum]")
        x, expected = (of[rows].reshape(len(rows), *shape) for of in (truth, mean))
        plots_sequence.beside(figure, x, expected, [f"row {found['obs_id'].values[r]}" for r in rows], "E[x|datum]")
        return Plot(name, figure, "Sequences and their reconstructions.", caption, wide=True)
    numbers = [j for j in range(truth.shape[1]) if np.isfinite(mean[:, j]).any()][:PANELS]
    if len(shape) != 1 or not numbers:
        return Absent(name, "No picture of reconstructions: a datum is no image, and has no columns of numbers.")
    across = min(4, len(numbers))
    figure = style.canvas(
        style.WIDE if across > 2 else style.HALF,
        0.7 + 2.3 * math.ceil(len(numbers) / across),
        "Columns, and what is made of them",
    )
    grid = figure.subplots(math.ceil(len(numbers) / across), across, squeeze=False)
    low, high = (found[key].values.reshape(truth.shape) for key in ("low", "high"))
    few = np.unique(np.linspace(0, len(truth) - 1, min(150, len(truth))).round().astype(int))
    for k, axes in enumerate(grid.flat):
        if k >= len(numbers):
            axes.remove()
            continue
        x, m = truth[few, numbers[k]], mean[few, numbers[k]]
        axes.vlines(x, low[few, numbers[k]], high[few, numbers[k]], color=style.EXACT, alpha=0.25, lw=1)
        axes.plot(x, m, linestyle="none", marker="o", ms=2.5, color=style.EXACT)
        ends = [np.nanmin(x), np.nanmax(x)]
        axes.plot(ends, ends, color=style.MUTED, lw=0.9, ls=":")
        axes.set(title=names[numbers[k]], xlabel="datum", ylabel="" if k % across else f"mean, {level:.0%} interval")
    caption = f"Where the points follow the dotted line z carries the column; a flat cloud says that it does not. {held}"
    return Plot(name, figure, "Means and intervals of reconstructed columns against the data.", caption, wide=across > 2)


def _inside(found: xr.Dataset) -> str:
    truth, low, high = (found[key].values for key in ("truth", "low", "high"))
    there = np.isfinite(truth) & np.isfinite(low)
    if not there.any():
        return ""
    share = float(((low <= truth) & (truth <= high))[there].mean())
    return f"{float(found.attrs['level']):.0%} intervals hold {style.percent(share)} of the cells."
