"""Figures of the latent space: the guide's means, and E[x|z] over the space. Drawn from `latent.nc` alone."""

from __future__ import annotations

import math

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.patches import Ellipse
from matplotlib.ticker import MaxNLocator

from elbowroom.analysis.measures.table import Z95
from elbowroom.analysis.plots import sequence as plots_sequence
from elbowroom.analysis.plots import sphere, style
from elbowroom.analysis.plots.events import NO_LATENT, event_image, event_sequence, group, units_of_rows
from elbowroom.analysis.plots.style import Absent, Plot, styled


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
    space = str(latent.attrs.get("space", "real")) if latent is not None else "real"
    if space in ("one_hot", "binary"):
        return _usage(encoding, label, space)
    if space == "sphere":
        return _on_sphere(encoding, label)
    standard = latent is None or bool(latent.attrs.get("standard", 1))
    prior = None if standard else encoding["prior_z"].values
    unit = " (prior sd)" if standard else ""
    line = loc.shape[1] == 1 or (space == "simplex" and loc.shape[1] == 2)  # two shares that sum to one are a single number
    figure = style.canvas(style.WIDE, 3.2, "The latent space") if line else style.canvas(style.HALF, 5.0, "The latent space")
    axes = figure.subplots()
    if line:
        _latent_line(axes, loc[:, 0], label, None if prior is None else prior[:, 0])
        axes.set(xlabel=f"mean of q(z|x), latent 0{unit}", ylabel="density")
        shown = [0]
    else:
        shown = sorted(int(j) for j in np.argsort(-rate, kind="stable")[:2])
        _latent_plane(axes, loc[:, shown], scale[:, shown], label, None if prior is None else prior[:, shown])
        axes.set(xlabel=f"latent {shown[0]}{unit}", ylabel=f"latent {shown[1]}{unit}")
    caption = _latent_caption(loc, scale, rate, shown, label is not None, standard)
    return Plot("latent_space", figure, _latent_alt(label), caption, wide=line)


def _on_sphere(encoding: xr.Dataset, label: np.ndarray | None) -> Plot:
    """Draw the guide's means, and draws from the prior, in a picture of the sphere."""
    loc, rate, prior = encoding["loc"].values, encoding["rate"].values, encoding["prior_z"].values
    d = loc.shape[1]
    shown = sorted(int(j) for j in np.argsort(-rate, kind="stable")[:2])
    figure = style.canvas(style.WIDE if d == 3 else style.HALF, 5.0, "The latent space")
    axes = figure.subplots()
    sphere.frame(axes, d, shown)
    grey = sphere.places(prior, shown)
    axes.scatter(grey[:, 0], grey[:, 1], s=5, color=style.MUTED, alpha=0.35, edgecolor="none", zorder=0.5)
    places, spans = sphere.places(loc, shown), np.array([180.0, 1.0] if d == 3 else [1.0, 1.0])
    values = [None] if label is None else list(np.unique(label))
    palette = [style.EXACT] if label is None else sns.color_palette("colorblind", max(len(values), 10))
    named = []
    for value, colour in zip(values, palette, strict=False):
        rows = np.full(len(loc), True) if value is None else label == value
        axes.scatter(places[rows, 0], places[rows, 1], s=14, color=colour, edgecolor=style.PAPER, linewidth=0.3, zorder=3)
        middle = sphere.places(loc[rows].mean(0, keepdims=True), shown)[0]  # means of angles are those of points
        named += [] if value is None else [(str(value), middle / spans)]
    _named(axes, named, 0.15, spans)
    return Plot("latent_space", figure, _latent_alt(label), f"{sphere.said(loc, shown)} {_rates(rate)}.", wide=d == 3)


def _usage(encoding: xr.Dataset, label: np.ndarray | None, space: str) -> Plot:
    """Draw how often each category (or binary latent) is on, under the guide over data and under the prior."""
    loc, prior = encoding["loc"].values, encoding["prior_z"].values.mean(0)
    figure = style.canvas(style.WIDE, 3.2, "The latent space")
    axes = figure.subplots()
    values = [None] if label is None else list(np.unique(label))
    palette = [style.EXACT] if label is None else sns.color_palette("colorblind", max(len(values), 10))
    bottom, place = np.zeros(loc.shape[1]), np.arange(loc.shape[1])
    for value, colour in zip(values, palette, strict=False):
        part = loc if value is None else loc * (label == value)[:, None]
        name = "guide, mean over data" if value is None else str(value)
        axes.bar(place, part.mean(0), bottom=bottom, color=colour, label=name)
        bottom = bottom + part.mean(0)
    axes.plot(place, prior, linestyle="none", marker="_", markersize=16, color=style.INK, label="prior")
    what = "category" if space == "one_hot" else "latent"
    axes.set(xlabel=what, ylabel="probability" if space == "one_hot" else "probability of 1")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=6)
    used = int((loc.max(0) > 0.5).sum()) if space == "one_hot" else int((loc.var(0) > 0.01).sum())
    sure = float(loc.max(1).mean()) if space == "one_hot" else float(np.maximum(loc, 1 - loc).mean())
    rate = float(encoding["rate"].values.sum())
    text = (
        f"How often each {what} is {'chosen' if space == 'one_hot' else 'on'}, by the guide over these data (bars"
        f"{', by label' if label is not None else ''}) and by the prior (dashes). {used} of {loc.shape[1]} are in use "
        f"({'most probable for some datum' if space == 'one_hot' else 'variance of the probability above 0.01'}); the guide's "
        f"choice has a mean probability of {style.percent(sure)}. Rate: {style.say(rate)} nats per datum."
    )
    return Plot("latent_space", figure, f"Use of each {what} under guide and prior.", text, wide=True)


def _latent_line(axes: Axes, loc: np.ndarray, label: np.ndarray | None, prior: np.ndarray | None) -> None:
    groups = {"all": loc} if label is None else {str(v): loc[label == v] for v in np.unique(label)}
    palette = sns.color_palette("colorblind", max(len(groups), 10))
    low, high = (-3.2, 3.2) if prior is None else np.quantile(prior, (0.01, 0.99)).tolist()
    bins = np.linspace(min(low, loc.min()), max(high, loc.max()), 41)
    axes.hist(
        list(groups.values()), bins.tolist(), stacked=True, density=True, color=palette[: len(groups)], label=list(groups)
    )
    if prior is None:
        z = np.linspace(bins[0], bins[-1], 300)
        axes.plot(z, np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi), color=style.INK, linestyle="--", label="prior density")
    else:
        axes.hist(
            prior, bins.tolist(), density=True, histtype="step", color=style.INK, linestyle="--", label="draws from the prior"
        )
    axes.legend(loc="upper right", ncols=2)


def _latent_plane(axes: Axes, loc: np.ndarray, scale: np.ndarray, label: np.ndarray | None, prior: np.ndarray | None) -> None:
    if prior is not None:
        axes.scatter(prior[:, 0], prior[:, 1], s=5, color=style.MUTED, alpha=0.35, edgecolor="none", zorder=0.5)
    for mass in (0.5, 0.9, 0.99) if prior is None else ():
        radius = math.sqrt(-2 * math.log(1 - mass))
        axes.add_patch(
            Ellipse((0, 0), 2 * radius, 2 * radius, fill=False, edgecolor=style.MUTED, linestyle=(0, (4, 3)), lw=0.8)
        )
        axes.annotate(
            f"{mass:.0%}",
            (radius * math.cos(-0.7), radius * math.sin(-0.7)),
            fontsize=7,
            color=style.MUTED,
            ha="center",
            va="center",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": style.PAPER, "edgecolor": "none"},
            zorder=3.5,
        )
    values = [None] if label is None else list(np.unique(label))
    palette = [style.EXACT] if label is None else sns.color_palette("colorblind", max(len(values), 10))
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
        axes.scatter(loc[rows, 0], loc[rows, 1], s=11, color=colour, edgecolor=style.PAPER, linewidth=0.3, zorder=3)
    if prior is None:
        extent = max(3.2, 1.04 * float(np.abs(loc).max()))
        middle, half = np.zeros(2), np.full(2, extent)
    else:
        both = np.concatenate([loc, np.quantile(prior, (0.005, 0.995), axis=0)])
        middle, half = (both.max(0) + both.min(0)) / 2, 0.54 * (both.max(0) - both.min(0))
        extent = float(half.max())
    named = [] if label is None else [(str(value), np.median(loc[label == value], 0)) for value in values]
    _named(axes, named, 0.15 * extent)
    axes.set(xlim=middle[0] + half[0] * np.array([-1, 1]), ylim=middle[1] + half[1] * np.array([-1, 1]))
    axes.set_aspect("equal" if prior is None else "auto")


def _named(axes: Axes, named: list[tuple[str, np.ndarray]], distance: float, unit: np.ndarray | float = 1.0) -> None:
    """Write labels at their places, in units of the axes, pushed apart."""
    for (text, _), place in zip(named, _apart([place for _, place in named], distance), strict=True):
        x, y = (place * unit).tolist()
        box = {
            "boxstyle": "circle,pad=0.18",
            "facecolor": style.PAPER,
            "edgecolor": style.MUTED,
            "linewidth": 0.6,
            "alpha": 0.85,
        }
        axes.text(x, y, text, fontsize=11, weight="bold", ha="center", va="center", color=style.INK, zorder=4, bbox=box)


def _apart(places: list[np.ndarray], distance: float) -> list[np.ndarray]:
    """Push points (2,) apart until they are `distance` apart, each pair equally, for at most 100 rounds."""
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


def _latent_caption(
    loc: np.ndarray, scale: np.ndarray, rate: np.ndarray, shown: list[int], labelled: bool, standard: bool
) -> str:
    d = loc.shape[1]
    draws = loc + scale * np.random.default_rng(0).standard_normal((200, *loc.shape))
    inside, low, high = _mean_interval((np.square(draws[..., shown]).sum(-1) < _radius2(len(shown))).mean(0))
    stacked = ", stacked by label" if labelled else ""
    what = f"The distribution of the means of q(z|x) over data{stacked}, beside the prior's density. "
    if d > 1:
        around = "dashed, the regions of 50, 90 and 99% of the prior" if standard else "grey, draws from the prior"
        what = f"Each dot is the mean of q(z|x) of one datum, its halo one sd; {around}. "
    dead = [int(j) for j in range(d) if loc[:, j].var() < 0.01]
    if low <= 0.9 <= high:
        fit = "cannot be told from the prior by this"
    else:
        fit = f"is {'close to' if abs(inside - 0.9) < 0.03 else 'wider than' if inside < 0.9 else 'narrower than'} the prior"
    verdict = (
        f"{style.percent(inside)} of the draws from q over these data lie where 90% of the prior does (95% interval over data: "
        f"{style.percent(low)} to {style.percent(high)}): as a whole, q {fit}."
    )
    if not standard:
        verdict = "Where the dots leave the prior's draws, the model's own samples do not look like these data."
    active = (
        f" {len(dead)} of {d} latents are unused (variance of the means below 0.01)." if dead else " Every latent is in use."
    )
    other = f" Shown are the two latents of {d} with the highest rate." if d > 2 else ""
    return f"{what}{verdict} {_rates(rate)}.{active}{other}"


def _rates(rate: np.ndarray) -> str:
    order = np.argsort(-rate, kind="stable")
    listed = ", ".join(f"latent {j}: {style.say(rate[j])}" for j in order[:6]) + (" and so on" if len(rate) > 6 else "")
    return f"Rate in nats per datum: {listed}"


def _mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of shares of data, (N,), and its 95 % interval over data, within 0 and 1."""
    mean, n = float(values.mean()), len(values)
    half = Z95 * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def _radius2(d: int, mass: float = 0.9) -> float:
    """Return the squared radius that holds `mass` of N(0, I_d), d = 1 or 2."""
    return 1.6448536269514722**2 if d == 1 else -2 * math.log(1 - mass)


@styled
def plane(latent: xr.DataTree | None) -> Plot | Absent:
    """Draw E[x|z] over the latent plane (or line) at prior quantiles, or around the sphere."""
    data = group(latent, "plane")
    if data is None:
        return Absent("plane", f"No picture of E[x|z]: {NO_LATENT}.")
    latents = [int(j) for j in np.atleast_1d(data.attrs["latents"])]
    expected, columns = _in_column_units(latent, data["expected_x"].values)
    axes_z = [data["z_column"].values] + ([data["z_row"].values] if "z_row" in data else [])
    image = event_image(latent)
    space = "real" if latent is None else str(latent.attrs.get("space", "real"))
    vertex = {"one_hot": "category", "simplex": "vertex of the simplex"}.get(space)
    around = space == "sphere"
    unit = " (prior sd)" if latent is None or latent.attrs.get("standard", 1) else ""
    rest = "" if latent is None or latent.attrs["latent_dim"] <= 2 else ", the other latents at the prior's median"
    if image is not None:
        flat = expected if len(axes_z) == 2 else expected[None]
        tiles = flat.reshape(*flat.shape[:2], *image)
        figure = (
            style.canvas(style.HALF, 5.0, "What the decoder makes of it: E[x|z]")
            if len(axes_z) == 2
            else style.canvas(style.WIDE, 1.5, "What the decoder makes of it: E[x|z]")
        )
        axes = figure.subplots()
        style.show_tiles(axes, tiles[::-1], style.tone(expected))
        scale, digits = ("value", 1) if space == "binary" else ("prior quantiles", 2)
        names = [vertex] if vertex is not None else [f"latent {j} ({scale})" for j in latents]
        names, digits = (_around(latents, len(axes_z)), 3) if around else (names, digits)
        ticks = np.unique(np.linspace(0, len(axes_z[0]) - 1, 5 if vertex is None else 10).round().astype(int))
        axes.set_xticks(ticks, [style.say(axes_z[0][t], digits) if vertex is None else str(t) for t in ticks])
        axes.set_xlabel(names[0])
        if len(axes_z) == 2:
            axes.set_yticks(len(axes_z[1]) - 1 - ticks, [style.say(axes_z[1][t], digits) for t in ticks])
            axes.set_ylabel(names[1])
        else:
            axes.set_yticks([])
    elif event_sequence(latent) is not None:
        figure = style.canvas(style.WIDE, 0.6 + 2.4 * len(axes_z), "What the decoder makes of it: E[x|z]")
        cuts = [_cut(expected, k, len(axes_z)) for k in range(len(axes_z))]
        named = _around(latents, len(axes_z)) if around else [vertex or f"latent {j}{unit}" for j in latents]
        plots_sequence.along(figure, list(zip(named, axes_z, cuts, strict=True)))
    else:
        size = (style.WIDE, 3.4) if len(axes_z) == 1 else (style.HALF, 5.0)
        figure = style.canvas(*size, "What the decoder makes of it: E[x|z]")
        panels = np.atleast_1d(figure.subplots(len(axes_z), 1))
        named = _around(latents, len(axes_z)) if around else [vertex or f"latent {j}{unit}" for j in latents]
        for k, (axes, z) in enumerate(zip(panels, axes_z, strict=True)):
            cut = _cut(expected, k, len(axes_z))
            _profile(axes, z, cut.reshape(len(z), -1), named[k], columns, first=k == 0)
    alt = f"The decoder's expected datum at prior quantiles of {' and '.join(f'latent {j}' for j in latents)}."
    if around:
        alt = "The decoder's expected datum around the sphere."
        caption = _around_caption(expected, len(axes_z), latents, 2 if latent is None else int(latent.attrs["latent_dim"]))
    else:
        caption = _plane_caption(expected, len(axes_z), latents, rest) if vertex is None else _vertex_caption(expected, vertex)
    if columns:
        caption += units_of_rows(latent)
        caption = caption.replace("data units", "sd of the data").replace("the data's units", "sd of the data")
    return Plot("plane", figure, alt, caption, wide=figure.get_figwidth() > style.HALF)


def _around(latents: list[int], sides: int) -> list[str]:
    """Return the names of the axes of the plane of a sphere: the angle, and the latent that is left of three."""
    return [f"{sphere.angle(*latents)} (degrees)", *(f"latent {k}" for k in range(3) if k not in latents)][:sides]


def _around_caption(expected: np.ndarray, sides: int, latents: list[int], d: int) -> str:
    flat = expected.reshape(*expected.shape[:sides], -1)
    change = float(np.sqrt(np.square(flat - flat.mean(tuple(range(sides)))).mean()))
    i, j = latents
    where = f"around the circle of latents {i} and {j}" + ", the others at 0" * (d > 2)
    if sides == 2:
        where = f"over the sphere: equal tiles are equal areas, and the left edge meets the right; 0 degrees is latent {i}"
    return f"The expected datum {where}. It varies by {style.say(change)} (root mean square per entry, in the data's units)."


def _cut(expected: np.ndarray, k: int, d: int) -> np.ndarray:
    """Return E[x|z] (value, *event) along the k-th of d latents, the other at its middle value."""
    if d == 1:
        return expected
    return expected[expected.shape[0] // 2] if k == 0 else expected[:, expected.shape[1] // 2]


def _in_column_units(latent: xr.DataTree | None, expected: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return E[x|z] of a table in standard deviations of the audited data, and its columns; other x unchanged."""
    beside = group(latent, "reconstruction")
    if latent is None or beside is None or "columns" not in latent.attrs:
        return expected, []
    sd = beside["x_sd"].values
    columns = [str(name) for name in np.atleast_1d(latent.attrs["columns"])]
    return (expected - beside["x_mean"].values) / np.where(sd > 0, sd, 1.0), columns


def _profile(axes: Axes, z: np.ndarray, expected: np.ndarray, label: str, columns: list[str], *, first: bool) -> None:
    """Draw expected entries (z, entry): as lines if there are few, else as a heat map."""
    unit = "sd of the data" if columns else "data units"
    if expected.shape[1] <= 8:
        palette = sns.color_palette("colorblind", 8)
        for i in range(expected.shape[1]):
            axes.plot(z, expected[:, i], color=palette[i], label=columns[i] if columns else f"entry {i}")
        axes.set(xlabel=label, ylabel=f"E[x|z] ({unit})")
        if first:
            axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return
    axes.grid(False)
    mesh = axes.pcolormesh(z, np.arange(expected.shape[1]), expected.T, cmap="cividis", shading="nearest", rasterized=True)
    axes.set(xlabel=label, ylabel="entry of x")
    axes.figure.colorbar(mesh, ax=axes, label=f"E[x|z] ({unit})", pad=0.02)


def _vertex_caption(expected: np.ndarray, vertex: str) -> str:
    flat = expected.reshape(len(expected), -1)
    between = np.sqrt(np.square(flat[:, None] - flat[None]).mean(-1)) + np.where(np.eye(len(flat)) > 0, np.inf, 0)
    i, j = np.unravel_index(int(between.argmin()), between.shape)
    return (
        f"The expected datum of each {vertex}. The two most alike, {i} and {j}, differ by {style.say(float(between[i, j]))} "
        "(root "
        "mean square per entry, in the data's units): alike ones share a meaning, and one of them may be spare."
    )


def _plane_caption(expected: np.ndarray, d: int, latents: list[int], rest: str) -> str:
    flat = expected.reshape(*expected.shape[:d], -1)
    if d == 1:
        change = float(np.sqrt(np.square(flat - flat.mean(0)).mean()))
        return (
            f"The expected datum along latent {latents[0]}, at evenly spaced prior quantiles{rest}. Over the prior it varies "
            f"by {style.say(change)} (root mean square per entry, in the data's units)."
        )
    along = [float(np.sqrt(np.square(flat - flat.mean(axis, keepdims=True)).mean())) for axis in (1, 0)]
    ratio = max(along) / max(min(along), 1e-12)
    most = latents[int(np.argmax(along))]
    verdict = (
        f"latent {most} does {style.say(ratio, 2)} times as much as the other"
        if ratio > 1.5
        else "the two latents share the work about evenly"
    )
    return (
        f"Equal steps are equal shares of the prior{rest}, so this is what the model believes data to look like. Moving along "
        f"latent {latents[0]} changes an entry of E[x|z] by {style.say(along[0])} (root mean square, data units), along latent "
        f"{latents[1]} by {style.say(along[1])}: {verdict}."
    )
