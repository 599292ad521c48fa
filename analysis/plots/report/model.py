"""Figures of the model alone: draws from the prior and reconstructions, with data."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from elbowroom.analysis.measures.table import SMALL_GAP
from elbowroom.analysis.plots import sequence as plots_sequence
from elbowroom.analysis.plots.events import (
    NO_LATENT,
    event_image,
    event_sequence,
    group,
    in_units,
    mean_over,
    name_entries,
    units_of_rows,
)
from elbowroom.analysis.plots.style import EXACT, GUIDE, INK, WIDE, Absent, Plot, canvas, say, show_tiles, styled, tone


@styled
def prior_samples(latent: xr.DataTree | None, observed: np.ndarray | None) -> Plot | Absent:
    """Draw data from the prior, with observed data where these are stored."""
    data = group(latent, "prior")
    if data is None:
        return Absent("prior_samples", f"No draws from the prior: {NO_LATENT}.")
    expected, x = data["expected_x"].values, data["x"].values
    image, sequence = event_image(latent), event_sequence(latent)
    real = None if observed is None else observed.reshape(len(observed), -1)
    if image is not None:
        columns = min(5, len(x))
        n = columns * min(4, len(x) // columns)
        blocks = [("E[x|z], z from the prior", expected[:n]), ("x from p(x|z), at the same z", x[:n])]
        if observed is not None and len(observed) >= n:
            blocks.append(("data", observed[:n]))
        figure = canvas(WIDE, 0.75 + 3.3 * (n // columns) / columns * image[0] / image[1], "Draws from the model")
        limits = tone(x if observed is None else observed)
        for axes, (title, values) in zip(np.atleast_1d(figure.subplots(1, len(blocks))), blocks, strict=True):
            show_tiles(axes, values.reshape(n // columns, columns, *image), limits)
            axes.set(title=title, xticks=[], yticks=[])
    elif sequence is not None:
        figure = canvas(WIDE, 3.0 if sequence[1] <= plots_sequence.FEW else 4.6, "Draws from the model")
        plots_sequence.draws(figure, {"model (prior draws)": x} | ({} if observed is None else {"data": observed}))
    else:
        figure = canvas(WIDE, 3.0, "Draws from the model")
        axes = figure.subplots()
        sets = {"model (prior draws)": x.reshape(len(x), -1)} | ({} if real is None else {"data": real})
        _spread_by_entry(axes, latent, {name: in_units(latent, values) for name, values in sets.items()})
    text = _prior_caption(latent, x.reshape(len(x), -1), real)
    alt = "Draws from the prior through the decoder" + ("." if real is None else ", with real data for comparison.")
    return Plot("prior_samples", figure, alt, text + units_of_rows(latent), wide=True)


def _spread_by_entry(axes: Axes, latent: xr.DataTree | None, sets: Mapping[str, np.ndarray]) -> None:
    for (name, values), colour, shift in zip(sets.items(), (GUIDE, EXACT), (-0.12, 0.12), strict=False):
        entry = np.arange(values.shape[1]) + shift
        axes.errorbar(
            entry,
            mean_over(values, 0),
            np.sqrt(mean_over(np.square(values - mean_over(values, 0)), 0)),
            fmt="o",
            color=colour,
            markersize=3.5,
            linewidth=1,
            label=f"{name}: mean ± sd",
        )
    name_entries(axes, latent)
    axes.legend(loc="lower right", ncols=2, bbox_to_anchor=(1, 1), borderaxespad=0.2)


def _prior_caption(latent: xr.DataTree | None, x: np.ndarray, real: np.ndarray | None) -> str:
    x, real = in_units(latent, x), None if real is None else in_units(latent, real)
    totals = mean_over(x, 1)
    error = float(totals.std() / math.sqrt(len(x)))
    text = f"{len(x)} draws have a mean entry of {say(float(totals.mean()))} ± {say(error)} (SE)"
    if real is None:
        return f"{text}. The run folder keeps no data to compare them with."
    other = mean_over(real[np.isfinite(real).any(1)], 1)
    its = float(other.std()) / math.sqrt(len(real))
    se = math.hypot(error, its)
    far = abs(float(totals.mean() - other.mean())) / max(se, 1e-12)
    verdict = "so on this average the model is like its data" if far < 3 else f"which is {say(far, 2)} standard errors away"
    return (
        f"{text}; the audited data have {say(float(other.mean()))} ± {say(its)}, {verdict}. This compares one average "
        "only: look at the shapes for what it cannot see."
    )


@styled
def reconstructions(latent: xr.DataTree | None) -> Plot | Absent:
    """Draw data and the decoder's expectation under the guide, in the order of the gap."""
    data = group(latent, "reconstruction")
    if data is None or not data.sizes["obs_id"]:
        return Absent("reconstructions", f"No reconstructions: {NO_LATENT}.")
    x, expected = data["x"].values, data["expected_x"].values
    gap, obs_id = data["gap"].values, data["obs_id"].values
    image, sequence = event_image(latent), event_sequence(latent)
    names = [f"{say(g, 2)}" if np.isfinite(g) else "–" for g in gap]
    if image is not None:
        tile = min(0.93, (WIDE - 0.8) / len(x))
        figure = canvas(WIDE, 1.05 + 2 * tile * image[0] / image[1], "Reconstructions, by the room between ELBO and log p(x)")
        axes = figure.subplots()
        show_tiles(axes, np.stack([x, expected]).reshape(2, len(x), *image), tone(x))
        axes.set_yticks([0, 1], ["x", "E[x|q]"])
        axes.tick_params(axis="y", labelsize=9, labelcolor=INK)
        axes.set_xticks(range(len(x)), [f"{n}\n#{i}" for n, i in zip(names, obs_id, strict=True)])
        axes.set_xlabel("gap of the datum (nats), and its obs_id")
    elif sequence is not None:
        keep = _few(len(x))
        height = 1.0 + 1.75 * plots_sequence.tall(sequence[1])
        figure = canvas(WIDE, height, "Reconstructions, by the room between ELBO and log p(x)")
        titles = [f"#{obs_id[n]}, gap {names[n]} nats" for n in keep]
        plots_sequence.beside(figure, x[keep], expected[keep], titles)
    else:
        keep = _few(len(x))
        figure = canvas(WIDE, 2.9, "Reconstructions, by the room between ELBO and log p(x)")
        for axes, n in zip(np.atleast_1d(figure.subplots(1, len(keep), sharey=True)), keep, strict=True):
            entry = np.arange(x[n].size)
            shown, wanted = (in_units(latent, values[n].reshape(1, -1))[0] for values in (x, expected))
            axes.plot(entry, shown, "o", color=INK, markersize=3.5, label="x")
            axes.plot(entry, wanted, color=GUIDE, label="E[x|q]")
            name_entries(axes, latent)
            axes.set_title(f"#{obs_id[n]}, gap {names[n]} nats")
        for axes in figure.axes[1:]:
            axes.set_ylabel("")
        figure.axes[0].legend()
    off = in_units(latent, x.reshape(len(x), -1)) - in_units(latent, expected.reshape(len(x), -1))
    error = np.sqrt(mean_over(np.square(off), 1))
    unit = "sd of the data" if latent is not None and "columns" in latent.attrs else "data units"
    return Plot(
        "reconstructions",
        figure,
        f"{len(x)} data and their reconstructions from the guide, from the smallest gap to the largest.",
        _reconstruction_caption(error, gap, unit) + units_of_rows(latent),
        wide=True,
    )


def _few(n: int) -> np.ndarray:
    """Return the positions of at most four of n data, evenly spread."""
    return np.unique(np.linspace(0, n - 1, min(n, 4)).round().astype(int))


def _reconstruction_caption(error: np.ndarray, gap: np.ndarray, unit: str) -> str:
    text = (
        f"Root mean square error per entry runs from {say(float(error.min()))} to {say(float(error.max()))} ({unit}) over "
        "these data"
    )
    if np.isfinite(gap).all() and gap.max() < SMALL_GAP:
        return f"{text}. All gaps are below {SMALL_GAP} nats, too small for the guide to show in a reconstruction."
    if not np.isfinite(gap).all() or len(gap) < 3:
        return f"{text}. They have no known gap to order them by; they stand in the order of their ELBO."
    half = len(gap) // 2
    sides = (error[:half], error[half:])
    low, high = (float(side.mean()) for side in sides)
    noise = [float(side.std(ddof=1)) / math.sqrt(len(side)) if len(side) > 1 else math.nan for side in sides]
    clear = not high - low <= 2 * math.hypot(*noise)  # also true for NaN errors, of very few data
    verdict = (
        "data with a large gap are also reconstructed worse"
        if high > 1.15 * low and clear
        else "reconstruction does not show it: a datum can be reconstructed well while its posterior is wrong"
    )
    said = [
        f"{say(mean)}{f' ± {say(se, 2)}' if math.isfinite(se) else ''}" for mean, se in zip((low, high), noise, strict=True)
    ]
    return (
        f"{text}, which are spread evenly over the ranks of the gap, smallest to the left. Mean error (± SE) of the left "
        f"half {said[0]}, of the right half {said[1]}: {verdict}."
    )
