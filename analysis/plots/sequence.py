"""Figures of sequences (T, F): each feature against the step, few features in panels, many in heat maps.

These functions draw into an existing figure; missing entries, such as padding, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from elbowroom.analysis.plots.style import EXACT, GUIDE, INK, say, tone

FEW = 4
"""Features that have a panel each; more are drawn as a heat map."""

STEPS = 3
"""Values of a latent that heat maps are drawn for."""

VALUES = 5
"""Values of a latent that lines are drawn for."""


def tall(features: int) -> int:
    """Return the number of panel rows for draws and reconstructions."""
    return features if features <= FEW else 2


def draws(figure: Figure, sets: Mapping[str, np.ndarray]) -> None:
    """Draw mean and standard deviation of each step, or heat maps, of `sets` of sequences.

    `sets` maps names to sequences (N, T, F), NaN where missing, those of the model first.
    """
    some = next(iter(sets.values()))
    if some.shape[-1] <= FEW:
        panels = figure.subplots(1, some.shape[-1], squeeze=False)[0]
        for j, axes in enumerate(panels):
            for (name, x), colour in zip(sets.items(), (GUIDE, EXACT), strict=False):
                mean = _mean(x[..., j])
                sd = np.sqrt(_mean(np.square(x[..., j] - mean)))
                step = np.arange(len(mean))
                axes.plot(step, mean, color=colour, marker=_marker(step), label=f"{name}: mean, ± sd")
                axes.fill_between(step, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
            _name(axes, j)
        panels[0].set_ylabel("x (data units)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return
    limits = tone(np.concatenate([x.ravel() for x in sets.values()]))
    grid = figure.subplots(2, len(sets), sharex=True, sharey=True, squeeze=False)
    for column, (name, x) in enumerate(sets.items()):
        last = int(np.isfinite(x).any(-1).sum(1).argmax())  # the longest sequence
        for axes, values, title in zip(grid[:, column], (x[last], _mean(x)), ("one", "mean"), strict=True):
            _heat(axes, values, limits, f"{name}: {title}" + ("" if title == "one" else f" of {len(x)}"))
    _outer(figure, grid, limits, "x")


def beside(figure: Figure, x: np.ndarray, expected: np.ndarray, titles: Sequence[str], what: str = "E[x|q]") -> None:
    """Draw sequences x (n, T, F), NaN where missing, and their expectation, which the figure calls `what`."""
    n, features = len(x), x.shape[-1]
    ends = [int(np.flatnonzero(row)[-1]) + 1 if row.any() else row.size for row in np.isfinite(x).any(-1)]
    if features <= FEW:
        grid = figure.subplots(features, n, sharey="row", squeeze=False)
        for i, end in enumerate(ends):
            step = np.arange(end)
            for j in range(features):
                axes = grid[j, i]
                axes.plot(step, x[i, :end, j], "o", color=INK, markersize=3.5, label="x")
                axes.plot(step, expected[i, :end, j], color=GUIDE, marker=_marker(step), markersize=2.5, label=what)
                _name(axes, None)
                if j < features - 1:
                    axes.set_xlabel("")
                if i == 0:
                    axes.set_ylabel(f"feature {j}" if features > 1 else "x (data units)")
            grid[0, i].set_title(titles[i])
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return
    limits = tone(x)
    grid = figure.subplots(2, n, sharex="col", sharey=True, squeeze=False)
    for i, end in enumerate(ends):
        _heat(grid[0, i], x[i, :end], limits, titles[i])
        _heat(grid[1, i], expected[i, :end], limits, "")
    _outer(figure, grid, limits, "x")
    grid[0, 0].set_ylabel("x: feature")
    grid[1, 0].set_ylabel(f"{what}: feature")


def along(figure: Figure, cuts: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Draw E[x|z] at values of a latent: a line each for every feature, or heat maps.

    `cuts` holds for each row of panels the name of the variable, its values (n,) and E[x|z] (n, T, F).
    """
    features = cuts[0][2].shape[-1]
    if features <= FEW:
        grid = figure.subplots(len(cuts), features, sharex=True, sharey="col", squeeze=False)
        for k, (row, (name, z, expected)) in enumerate(zip(grid, cuts, strict=True)):
            chosen = _evenly(len(z), VALUES)
            colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(chosen)))
            for j, axes in enumerate(row):
                for n, colour in zip(chosen, colours, strict=True):
                    step = np.arange(expected.shape[1])
                    axes.plot(step, expected[n, :, j], color=colour, linewidth=1.2, marker=_marker(step), label=say(z[n], 2))
                _name(axes, j if features > 1 and k == 0 else None)
                if k < len(cuts) - 1:
                    axes.set_xlabel("")
            row[0].set_ylabel("E[x|z] (data units)")
            row[-1].legend(title=name, title_fontsize=7, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return
    limits = tone(np.concatenate([expected.ravel() for _, _, expected in cuts]))
    grid = figure.subplots(len(cuts), STEPS, sharex=True, sharey=True, squeeze=False)
    for row, (name, z, expected) in zip(grid, cuts, strict=True):
        chosen = _evenly(len(z), STEPS)
        for axes, n in zip(row, chosen, strict=False):
            _heat(axes, expected[n], limits, f"{name}: {say(z[n], 2)}")
        for axes in row[len(chosen) :]:
            axes.remove()
    _outer(figure, grid, limits, "E[x|z]")


def _mean(x: np.ndarray) -> np.ndarray:
    """Return the mean over finite values of the first axis; NaN where there is none."""
    seen = np.isfinite(x)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = np.where(seen, x, 0.0).sum(0) / seen.sum(0)
    return mean


def _marker(step: np.ndarray) -> str | None:
    """Return a marker where a line would have too few points to be visible."""
    return "o" if len(step) == 1 else None


def _evenly(n: int, count: int) -> list[int]:
    return sorted({round(place) for place in np.linspace(0, n - 1, count)})


def _name(axes: Axes, feature: int | None) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if feature is not None:
        axes.set_title(f"feature {feature}")


def _heat(axes: Axes, x: np.ndarray, limits: tuple[float, float], title: str) -> None:
    """Draw one sequence (T, F): steps to the right, features upwards."""
    axes.grid(False)
    axes.set_facecolor("#eef1f4")
    axes.imshow(
        np.ma.masked_invalid(x.T),
        cmap="cividis",
        vmin=limits[0],
        vmax=limits[1],
        aspect="auto",
        origin="lower",
        interpolation="none",
    )
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def _outer(figure: Figure, grid: np.ndarray, limits: tuple[float, float], what: str) -> None:
    """Label the outer axes of heat maps, and their colour scale."""
    for axes in grid[-1]:
        axes.set_xlabel("step")
    for axes in grid[:, 0]:
        axes.set_ylabel("feature")
    shades = matplotlib.cm.ScalarMappable(Normalize(*limits), "cividis")
    figure.colorbar(shades, ax=list(figure.axes), label=f"{what} (data units)", pad=0.02)
