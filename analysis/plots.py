"""Figures of the model: its latent space, and what the decoder makes of it. Drawn from `latent.nc` alone.

Each function returns a `Plot`, whose caption is computed from the numbers that it draws, or an `Absent` that says what was
missing. The other figures are in `plots_training`, `plots_audit` (the table) and `plots_posterior` (single data).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.patches import Ellipse
from matplotlib.ticker import MaxNLocator

from elbowroom.analysis.canvas import (
    EXACT,
    GUIDE,
    HALF,
    INK,
    MUTED,
    PAPER,
    WIDE,
    Absent,
    Plot,
    canvas,
    image_shape,
    percent,
    say,
    show_tiles,
    styled,
    tone,
)
from elbowroom.analysis.table import SMALL_GAP

NO_LATENT = "the run folder has no latent.nc, which describes the decoder: run the audit again to make it"


def group(latent: xr.DataTree | None, name: str) -> xr.Dataset | None:
    """Return one group of latent.nc, None where it is missing."""
    return latent[name].to_dataset() if latent is not None and name in latent.children else None


def event_image(latent: xr.DataTree | None) -> tuple[int, int] | None:
    """Return (height, width) where the data are images."""
    if latent is None or "event_shape" not in latent.attrs:
        return None
    return image_shape(np.atleast_1d(latent.attrs["event_shape"]).tolist(), latent.attrs.get("image_shape"))


@styled
def latent_space(latent: xr.DataTree | None) -> Plot | Absent:
    """Draw the guide's means at the audited data over the prior, coloured by label."""
    encoding = group(latent, "encoding")
    if encoding is None:
        return Absent("latent_space", f"No picture of the latent space: {NO_LATENT}.")
    loc, scale = encoding["loc"].values, encoding["scale"].values
    label = encoding["label"].values if "label" in encoding else None
    if label is not None and len(np.unique(label)) > 12:
        label = None
    rate = encoding["rate"].values
    line = loc.shape[1] == 1
    figure = canvas(WIDE, 3.2, "The latent space") if line else canvas(HALF, 5.0, "The latent space")
    axes = figure.subplots()
    if line:
        _latent_line(axes, loc[:, 0], label)
        shown = [0]
    else:
        shown = sorted(int(j) for j in np.argsort(-rate, kind="stable")[:2])
        _latent_plane(axes, loc[:, shown], scale[:, shown], label)
        axes.set(xlabel=f"latent {shown[0]} (prior sd)", ylabel=f"latent {shown[1]} (prior sd)")
    return Plot(
        "latent_space", figure, _latent_alt(label), _latent_caption(loc, scale, rate, shown, label is not None), wide=line
    )


def _latent_line(axes: Axes, loc: np.ndarray, label: np.ndarray | None) -> None:
    groups = {"all": loc} if label is None else {str(v): loc[label == v] for v in np.unique(label)}
    palette = sns.color_palette("colorblind", max(len(groups), 10))
    bins = np.linspace(min(-3.2, loc.min()), max(3.2, loc.max()), 41)
    axes.hist(
        list(groups.values()), bins.tolist(), stacked=True, density=True, color=palette[: len(groups)], label=list(groups)
    )
    z = np.linspace(bins[0], bins[-1], 300)
    axes.plot(z, np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi), color=INK, linestyle="--", label="prior density")
    axes.set(xlabel="mean of q(z|x), latent 0 (prior sd)", ylabel="density")
    axes.legend(loc="upper right", ncols=2)


def _latent_plane(axes: Axes, loc: np.ndarray, scale: np.ndarray, label: np.ndarray | None) -> None:
    for mass in (0.5, 0.9, 0.99):
        radius = math.sqrt(-2 * math.log(1 - mass))
        axes.add_patch(Ellipse((0, 0), 2 * radius, 2 * radius, fill=False, edgecolor=MUTED, linestyle=(0, (4, 3)), lw=0.8))
        axes.annotate(
            f"{mass:.0%}",
            (radius * math.cos(-0.7), radius * math.sin(-0.7)),
            fontsize=7,
            color=MUTED,
            ha="center",
            va="center",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": PAPER, "edgecolor": "none"},
            zorder=3.5,
        )
    values = [None] if label is None else list(np.unique(label))
    palette = [EXACT] if label is None else sns.color_palette("colorblind", max(len(values), 10))
    cover = float(scale.prod(1).sum()) / 4  # how often the halos would cover a disc of two prior sd
    alpha = float(np.clip(0.5 / max(cover, 1e-9), 0.012, 0.15))
    for value, colour in zip(values, palette, strict=False):
        rows = np.full(len(loc), True) if value is None else label == value
        size = 2 * scale[rows]
        spread = EllipseCollection(
            size[:, 0], size[:, 1], np.zeros(len(size)), units="xy", offsets=loc[rows], transOffset=axes.transData
        )
        spread.set(facecolor=colour, alpha=alpha, edgecolor="none")
        axes.add_collection(spread)
        axes.scatter(loc[rows, 0], loc[rows, 1], s=11, color=colour, edgecolor=PAPER, linewidth=0.3, zorder=3)
    extent = max(3.2, 1.04 * float(np.abs(loc).max()))
    named = [] if label is None else [(str(value), np.median(loc[label == value], 0)) for value in values]
    for (text, _), place in zip(named, _apart([place for _, place in named], 0.15 * extent), strict=True):
        axes.text(
            float(place[0]),
            float(place[1]),
            text,
            fontsize=11,
            weight="bold",
            ha="center",
            va="center",
            color=INK,
            zorder=4,
            bbox={"boxstyle": "circle,pad=0.18", "facecolor": PAPER, "edgecolor": MUTED, "linewidth": 0.6, "alpha": 0.85},
        )
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")


def _apart(places: list[np.ndarray], distance: float) -> list[np.ndarray]:
    """Push points (2,) apart until they keep `distance`, each pair sharing the way, for at most 100 rounds."""
    moved = [place.astype(float) + 1e-6 * n for n, place in enumerate(places)]
    for _ in range(100):
        crowded = False
        for i in range(len(moved)):
            for j in range(i):
                step = moved[i] - moved[j]
                length = float(np.hypot(*step))
                if length < 0.999 * distance:
                    push = step / length * (distance - length) / 2
                    moved[i], moved[j], crowded = moved[i] + push, moved[j] - push, True
        if not crowded:
            break
    return moved


def _latent_alt(label: np.ndarray | None) -> str:
    colours = "" if label is None else ", coloured and marked by label"
    return f"Guide means of the audited data in the latent space{colours}, over contours of the prior."


def _latent_caption(loc: np.ndarray, scale: np.ndarray, rate: np.ndarray, shown: list[int], labelled: bool) -> str:
    d = loc.shape[1]
    draws = loc + scale * np.random.default_rng(0).standard_normal((200, *loc.shape))
    inside = float((np.square(draws[..., shown]).sum(-1) < _radius2(len(shown))).mean())
    order = np.argsort(-rate, kind="stable")
    rates = ", ".join(f"latent {j}: {say(rate[j])}" for j in order[:6]) + (" and so on" if d > 6 else "")
    stacked = ", stacked by label" if labelled else ""
    what = f"The distribution of the means of q(z|x) over data{stacked}, beside the prior's density. "
    if d > 1:
        what = (
            "Each dot is the mean of q(z|x) of one datum, its halo one sd; dashed, the regions of 50, 90 and 99% of the prior. "
        )
    dead = [int(j) for j in range(d) if loc[:, j].var() < 0.01]
    fit = "close to the prior" if abs(inside - 0.9) < 0.03 else ("wider than the prior" if inside < 0.9 else "narrower")
    verdict = f"{percent(inside)} of the draws from q over these data lie where 90% of the prior does: as a whole, q is {fit}."
    active = (
        f" {len(dead)} of {d} latents are unused (variance of the means below 0.01)." if dead else " Every latent is in use."
    )
    other = f" Shown are the two latents of {d} with the highest rate." if d > 2 else ""
    return f"{what}{verdict} Rate in nats per datum: {rates}.{active}{other}"


def _radius2(d: int, mass: float = 0.9) -> float:
    """Return the squared radius that holds `mass` of N(0, I_d), d = 1 or 2."""
    return 1.6448536269514722**2 if d == 1 else -2 * math.log(1 - mass)


@styled
def plane(latent: xr.DataTree | None) -> Plot | Absent:
    """Draw E[x|z] over the latent plane (or line) at prior quantiles."""
    data = group(latent, "plane")
    if data is None:
        return Absent("plane", f"No picture of E[x|z]: {NO_LATENT}.")
    latents = [int(j) for j in np.atleast_1d(data.attrs["latents"])]
    expected = data["expected_x"].values
    axes_z = [data["z_column"].values] + ([data["z_row"].values] if "z_row" in data else [])
    image = event_image(latent)
    rest = "" if latent is None or latent.attrs["latent_dim"] <= 2 else ", the other latents at the prior's median"
    if image is not None:
        flat = expected if len(axes_z) == 2 else expected[None]
        tiles = flat.reshape(*flat.shape[:2], *image)
        figure = (
            canvas(HALF, 5.0, "What the decoder makes of it: E[x|z]")
            if len(axes_z) == 2
            else canvas(WIDE, 1.5, "What the decoder makes of it: E[x|z]")
        )
        axes = figure.subplots()
        show_tiles(axes, tiles[::-1], tone(expected))
        ticks = np.linspace(0, len(axes_z[0]) - 1, 5).round().astype(int)
        axes.set_xticks(ticks, [say(axes_z[0][t], 2) for t in ticks])
        axes.set_xlabel(f"latent {latents[0]} (prior quantiles)")
        if len(axes_z) == 2:
            axes.set_yticks(len(axes_z[1]) - 1 - ticks, [say(axes_z[1][t], 2) for t in ticks])
            axes.set_ylabel(f"latent {latents[1]} (prior quantiles)")
        else:
            axes.set_yticks([])
    else:
        size = (WIDE, 3.4) if len(axes_z) == 1 else (HALF, 5.0)
        figure = canvas(*size, "What the decoder makes of it: E[x|z]")
        panels = np.atleast_1d(figure.subplots(len(axes_z), 1))
        for k, (axes, z) in enumerate(zip(panels, axes_z, strict=True)):
            cut = expected
            if len(axes_z) == 2:
                cut = expected[expected.shape[0] // 2] if k == 0 else expected[:, expected.shape[1] // 2]
            _profile(axes, z, cut.reshape(len(z), -1), f"latent {latents[k]} (prior sd)", first=k == 0)
    names = " and ".join(f"latent {j}" for j in latents)
    alt = f"The decoder's expected datum at prior quantiles of {names}."
    return Plot("plane", figure, alt, _plane_caption(expected, len(axes_z), latents, rest), wide=figure.get_figwidth() > HALF)


def _profile(axes: Axes, z: np.ndarray, expected: np.ndarray, label: str, *, first: bool) -> None:
    """Draw expected entries (z, entry): a line each when they are few, else a heatmap."""
    if expected.shape[1] <= 8:
        palette = sns.color_palette("colorblind", 8)
        for i in range(expected.shape[1]):
            axes.plot(z, expected[:, i], color=palette[i], label=f"entry {i}")
        axes.set(xlabel=label, ylabel="E[x|z] (data units)")
        if first:
            axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return
    axes.grid(False)
    mesh = axes.pcolormesh(z, np.arange(expected.shape[1]), expected.T, cmap="cividis", shading="nearest", rasterized=True)
    axes.set(xlabel=label, ylabel="entry of x")
    axes.figure.colorbar(mesh, ax=axes, label="E[x|z] (data units)", pad=0.02)


def _plane_caption(expected: np.ndarray, d: int, latents: list[int], rest: str) -> str:
    flat = expected.reshape(*expected.shape[:d], -1)
    if d == 1:
        change = float(np.sqrt(np.square(flat - flat.mean(0)).mean()))
        return (
            f"The expected datum along latent {latents[0]}, at evenly spaced prior quantiles{rest}. Over the prior it varies "
            f"by {say(change)} (root mean square per entry, in the data's units)."
        )
    along = [float(np.sqrt(np.square(flat - flat.mean(axis, keepdims=True)).mean())) for axis in (1, 0)]
    ratio = max(along) / max(min(along), 1e-12)
    most = latents[int(np.argmax(along))]
    verdict = (
        f"latent {most} does {say(ratio, 2)} times as much as the other"
        if ratio > 1.5
        else "the two latents share the work about evenly"
    )
    return (
        f"Equal steps are equal shares of the prior{rest}, so this is what the model believes data to look like. Moving along "
        f"latent {latents[0]} changes an entry of E[x|z] by {say(along[0])} (root mean square, data units), along latent "
        f"{latents[1]} by {say(along[1])}: {verdict}."
    )


@styled
def prior_samples(latent: xr.DataTree | None, observed: np.ndarray | None) -> Plot | Absent:
    """Draw data from the prior, beside real ones where these are kept."""
    data = group(latent, "prior")
    if data is None:
        return Absent("prior_samples", f"No draws from the prior: {NO_LATENT}.")
    expected, x = data["expected_x"].values, data["x"].values
    image = event_image(latent)
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
    else:
        figure = canvas(WIDE, 3.0, "Draws from the model")
        axes = figure.subplots()
        _spread_by_entry(axes, {"model (prior draws)": x.reshape(len(x), -1)} | ({} if real is None else {"data": real}))
    alt = "Draws from the prior through the decoder" + ("." if real is None else ", with real data for comparison.")
    return Plot("prior_samples", figure, alt, _prior_caption(x.reshape(len(x), -1), real), wide=True)


def _spread_by_entry(axes: Axes, sets: Mapping[str, np.ndarray]) -> None:
    for (name, values), colour, shift in zip(sets.items(), (GUIDE, EXACT), (-0.12, 0.12), strict=False):
        entry = np.arange(values.shape[1]) + shift
        axes.errorbar(
            entry, values.mean(0), values.std(0), fmt="o", color=colour, markersize=3.5, linewidth=1, label=f"{name}: mean ± sd"
        )
    axes.set(xlabel="entry of x", ylabel="x (data units)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right", ncols=2, bbox_to_anchor=(1, 1), borderaxespad=0.2)


def _prior_caption(x: np.ndarray, real: np.ndarray | None) -> str:
    totals = x.mean(1)
    error = float(totals.std() / math.sqrt(len(x)))
    text = f"{len(x)} draws have a mean entry of {say(float(totals.mean()))} ± {say(error)} (SE)"
    if real is None:
        return f"{text}. The run folder keeps no data to compare them with."
    other = real.mean(1)
    se = math.hypot(error, float(other.std()) / math.sqrt(len(real)))
    far = abs(float(totals.mean() - other.mean())) / max(se, 1e-12)
    verdict = "so on this average the model is like its data" if far < 3 else f"which is {say(far, 2)} standard errors away"
    return (
        f"{text}; the audited data have {say(float(other.mean()))}, {verdict}. This compares one average only: look at the "
        "shapes for what it cannot see."
    )


@styled
def reconstructions(latent: xr.DataTree | None) -> Plot | Absent:
    """Draw data beside the decoder's expectation under the guide, in the order of the gap."""
    data = group(latent, "reconstruction")
    if data is None or not data.sizes["obs_id"]:
        return Absent("reconstructions", f"No reconstructions: {NO_LATENT}.")
    x, expected = data["x"].values, data["expected_x"].values
    gap, obs_id = data["gap"].values, data["obs_id"].values
    image = event_image(latent)
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
    else:
        keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), 4)).round().astype(int))
        figure = canvas(WIDE, 2.9, "Reconstructions, by the room between ELBO and log p(x)")
        for axes, n in zip(np.atleast_1d(figure.subplots(1, len(keep), sharey=True)), keep, strict=True):
            entry = np.arange(x[n].size)
            axes.plot(entry, x[n].ravel(), "o", color=INK, markersize=3.5, label="x")
            axes.plot(entry, expected[n].ravel(), color=GUIDE, label="E[x|q]")
            axes.set(title=f"#{obs_id[n]}, gap {names[n]} nats", xlabel="entry of x")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.axes[0].set_ylabel("x (data units)")
        figure.axes[0].legend()
    error = np.sqrt(np.square(x - expected).reshape(len(x), -1).mean(1))
    return Plot(
        "reconstructions",
        figure,
        f"{len(x)} data and their reconstructions from the guide, from the smallest gap to the largest.",
        _reconstruction_caption(error, gap),
        wide=True,
    )


def _reconstruction_caption(error: np.ndarray, gap: np.ndarray) -> str:
    text = (
        f"Root mean square error per entry runs from {say(float(error.min()))} to {say(float(error.max()))} (data units) over "
        "these data"
    )
    if np.isfinite(gap).all() and gap.max() < SMALL_GAP:
        return f"{text}. All gaps are below {SMALL_GAP} nats, too small for the guide to show in a reconstruction."
    if not np.isfinite(gap).all() or len(gap) < 3:
        return f"{text}. They have no known gap to order them by; they stand in the order of their ELBO."
    half = len(gap) // 2
    low, high = float(error[:half].mean()), float(error[half:].mean())
    verdict = (
        "data with a large gap are also reconstructed worse"
        if high > 1.15 * low
        else "reconstruction does not show it: a datum can be reconstructed well while its posterior is wrong"
    )
    return (
        f"{text}, which are spread evenly over the ranks of the gap, smallest to the left. Mean error of the left half "
        f"{say(low)}, of the right half {say(high)}: {verdict}."
    )
