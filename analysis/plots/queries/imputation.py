"""Figures of imputed data: images with missing entries and their imputations, and the coverage of intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.image import AxesImage

from elbowroom.analysis.plots import style
from elbowroom.analysis.plots.style import Absent, Plot, styled
from elbowroom.analysis.queries.imputation import share
from elbowroom.models.columns import image_shape

ROWS = 6
FEWEST = 20  # smallest number of cells for which a share is drawn
LEVELS = np.linspace(0.02, 0.98, 49)
UNSEEN = "#f3e3d3"


@styled
def images(answer: xr.Dataset, x: np.ndarray, shape: Sequence[int]) -> Plot | Absent:
    """Draw some images: the original, the observed part, the mean, two draws, and the width of the interval.

    `answer` is of `impute`; x (n, *shape) is NaN where missing, and hidden cells have their true values.
    """
    name, size = "imputation", image_shape(shape)
    if size is None:
        return Absent(name, "No picture of imputed data: a datum is no image.")
    if not np.isfinite(answer["mean"].values).any():
        return Absent(name, "No picture of imputed data: its pixels are categories, which have no mean.")
    rows = np.unique(np.linspace(0, len(x) - 1, min(ROWS, len(x))).round().astype(int))
    tile = lambda values: values[rows].reshape(len(rows), *size)
    missing = ~np.isnan(tile(answer["point"].values))
    whole = tile(x)
    binary = _binary(answer)
    level = float(answer.attrs["level"])
    spread = answer["sd"].values if binary else answer["high"].values - answer["low"].values
    label = "sd" if binary else f"width of the\n{level:.0%} interval"
    shown: dict[str, np.ndarray] = {"as it was": whole} if "truth" in answer else {}
    shown |= {
        "seen": np.where(missing, np.nan, whole),
        "mean of\np(x|seen)": np.where(missing, tile(answer["mean"].values), whole),
    }
    shown |= {f"draw {i + 1}": tile(answer["samples"].values[i]) for i in range(min(2, answer.sizes.get("sample", 0)))}
    title = "What was hidden, and what the model puts there" if "truth" in answer else "What the model puts into the holes"
    figure = style.canvas(0.95 * (len(shown) + 1) + 0.9, 0.75 + 0.95 * len(rows), title)
    axes = figure.subplots()
    _tiles(axes, shown, missing, style.tone(x))
    wide = _overlay(axes, np.ma.masked_where(~missing, tile(spread)), len(shown), "cividis")
    axes.set_xticks(range(len(shown) + 1), [*shown, label])
    axes.set_xlim(-0.5, len(shown) + 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    figure.colorbar(wide, ax=axes, shrink=0.5, label=f"{label.replace(chr(10), ' ')}, units of the data", pad=0.02)
    middle = f"{style.say(float(np.nanmedian(spread)))} in the median over all missing pixels"
    caption = (
        f"{style.count(len(rows), 'image', 'images')} of {len(x):,}. The tinted part was not seen. The mean is the average of "
        "what "
        "could stand there, and no image; a draw is one image that could. "
        + (
            f"Where the seen part leaves a pixel open its probability is far from 0 and 1: its sd is {middle}."
            if binary
            else f"The interval is wide where the seen part leaves it open: {middle}."
        )
    )
    if "truth" in answer and not binary:
        caption += f" {_held(answer)}"
    names = ", ".join(key.replace("\n", " ") for key in shown)
    alt = f"Rows of small images: {names}; at the right how uncertain each pixel is."
    return Plot(name, figure, alt, caption, wide=True)


def _binary(answer: xr.Dataset) -> bool:
    """Return whether entries are 0 or 1: their intervals add nothing to the probability."""
    there = ~np.isnan(answer["point"].values)
    high = answer["high"].values[there]
    return bool(np.isfinite(answer["likeliest"].values[there]).all() and np.isfinite(high).all() and high.max() <= 1)


def _tiles(axes: Axes, shown: dict[str, np.ndarray], missing: np.ndarray, limits: tuple[float, float]) -> None:
    """Draw images in columns, and tint the missing entries."""
    style.show_tiles(axes, np.stack(list(shown.values()), 1), limits)
    axes.xaxis.tick_top()
    axes.set_yticks([])
    tint = np.ma.masked_where(~missing, np.ones(missing.shape))
    _overlay(axes, tint, list(shown).index("seen"), ListedColormap([UNSEEN]))


def _overlay(axes: Axes, images: np.ma.MaskedArray, column: int, colours: str | ListedColormap) -> AxesImage:
    """Draw images (rows, height, width) over a column of tiles, on one colour scale."""
    height, width = images.shape[1:]
    limits = (0.0, float(images.max() or 1.0))
    inset = 0.03
    for i, image in enumerate(images):
        extent = (column - 0.5 + inset, column + 0.5 - inset, i + 0.5 - inset, i - 0.5 + inset)
        drawn = axes.imshow(image, cmap=colours, vmin=limits[0], vmax=limits[1], extent=extent, aspect=height / width, zorder=3)
    return drawn


@styled
def coverage(answer: xr.Dataset) -> Plot | Absent:
    """Draw the share of hidden values within central intervals of every level, by the posterior and by the guide.

    `answer` is an answer of `impute` with hidden cells.
    """
    name = "coverage"
    if "truth" not in answer:
        return Absent(name, "No coverage of intervals: no known cells were hidden (--hide).")
    if _binary(answer):
        return _reliability(answer)
    ranks = {way: answer["rank" + way].values.reshape(answer.sizes["obs_id"], -1) for way in ("", "_guide")}
    if not np.isfinite(ranks[""]).any():
        return Absent(name, "No coverage of intervals: the hidden cells are categories.")
    figure = style.canvas(style.HALF, 4.2, "Do intervals hold what was hidden?")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=style.MUTED, lw=0.9, ls=":", label="intervals that are right")
    for way, label, colour, look in (
        ("", "best posterior", style.EXACT, "-"),
        ("_guide", "encoder's own draws", style.GUIDE, "--"),
    ):
        values = np.array([share(_inside(ranks[way], level)) for level in LEVELS])
        axes.plot(LEVELS, values[:, 0], color=colour, ls=look, label=label)
        axes.fill_between(
            LEVELS, values[:, 0] - 2 * values[:, 1], values[:, 0] + 2 * values[:, 1], color=colour, alpha=0.15, lw=0
        )
    axes.set_xlabel("level of the interval")
    axes.set_ylabel("share of the hidden cells within it")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.legend(loc="upper left")
    caption = (
        f"{_held(answer)} A line below the diagonal says that intervals are too narrow, above it too wide. Bands: two standard "
        "errors, rows taken as independent. Where the best posterior is off the diagonal the model is wrong about these data; "
        "what lies between the two lines is the encoder's error alone, which may hide some of the model's."
    )
    return Plot(name, figure, "Share of hidden cells inside intervals against the intervals' level.", caption)


def _reliability(answer: xr.Dataset) -> Plot | Absent:
    """Draw the share of hidden cells that are 1 against the predicted probability."""
    figure = style.canvas(style.HALF, 4.2, "Are the probabilities of hidden cells right?")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=style.MUTED, lw=0.9, ls=":", label="probabilities that are right")
    truth, words = answer["truth"].values.reshape(answer.sizes["obs_id"], -1), []
    for way, label, colour, mark in (
        ("", "best posterior", style.EXACT, "o"),
        ("_guide", "encoder's own draws", style.GUIDE, "s"),
    ):
        p = np.where(np.isnan(truth), np.nan, answer["mean" + way].values.reshape(truth.shape))
        place = np.minimum(np.nan_to_num(p) * 10, 9).astype(int)
        points = []
        for k in range(10):
            inside = (place == k) & ~np.isnan(p)
            if inside.sum() >= FEWEST:
                points.append((p[inside].mean(), *share(np.where(inside, truth, np.nan))))
        if not points:
            return Absent("coverage", f"No figure of probabilities: fewer than {FEWEST} hidden cells with the same one.")
        x, y, error = np.array(points).T
        axes.errorbar(x, y, 2 * error, color=colour, marker=mark, ms=4, lw=1.2, capsize=2, label=label)
        brier, right = np.nanmean((p - truth) ** 2), np.nanmean(p * (1 - p))
        words.append(f"{label}: Brier score {style.say(brier)}, {style.say(right)} if its probabilities were right")
    axes.set_xlabel("stated probability of 1")
    axes.set_ylabel("share of these cells that are 1")
    axes.set_aspect("equal")
    axes.legend(loc="upper left")
    caption = (
        f"{'; '.join(words)}. Intervals of cells that are 0 or 1 say nothing; their probabilities can be checked: points below "
        "the diagonal were stated too high. Bars: two standard errors, rows taken as independent."
    )
    return Plot("coverage", figure, "Observed share of ones against the stated probability, in ten bins.", caption)


def _inside(ranks: np.ndarray, level: float) -> np.ndarray:
    return np.where(np.isnan(ranks), np.nan, np.abs(ranks - 0.5) <= level / 2)


def _held(answer: xr.Dataset) -> str:
    """Report how many hidden cells lie within the interval, by ranks, which are also exact for integers."""
    level, words = float(answer.attrs["level"]), []
    for way, label in (("", "the best posterior"), ("_guide", "the encoder's own draws")):
        ranks = answer["rank" + way].values.reshape(answer.sizes["obs_id"], -1)
        mean, error = share(_inside(ranks, level))
        words.append(f"{style.percent(mean)} ± {100 * error:.1f} points by {label}")
    return f"Of the hidden values, {level:.0%} intervals hold {' and '.join(words)}."
