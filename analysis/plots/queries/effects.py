"""Figures of the effects of latents: effect curves, states, traversals, the plane of E[x|z]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import seaborn as sns
import xarray as xr

from elbowroom.analysis.plots import sequence as plots_sequence
from elbowroom.analysis.plots.report import latent as plots_latent
from elbowroom.analysis.plots.style import INK, WIDE, Absent, Plot, canvas, percent, say, show_tiles, styled, tone
from elbowroom.models.columns import image_shape

PANELS = 12
ROWS = 8  # latents, states
CURVES = 2  # latents in one panel
LINES = 6  # columns in colour


def _order(found: xr.Dataset) -> list[int]:
    return [int(k) for k in np.atleast_1d(found.attrs["order"])]


def _unit(standard: bool) -> str:
    return " (prior sd)" if standard else ""


@styled
def effects(
    found: xr.Dataset, x: np.ndarray, columns: Sequence[str], *, sequence: bool = False, standard: bool = True
) -> Plot | Absent:
    """Draw the mean of each column along the latents with the highest rate, with the band over the other latents.

    Args:
        found: the result of `latents.effects.explain`.
        x: data, (n, D).
        columns: names of the columns.
        sequence: whether the data are sequences.
        standard: whether the prior is the standard normal.
    """
    shown = _order(found)[:CURVES]
    curve = found["effect"].values[shown]
    labels = [str(v) for v in found["cell"].values]
    chosen = _telling(curve, labels)
    across = min(4, len(chosen))
    down = math.ceil(len(chosen) / across)
    figure = canvas(WIDE, 0.9 + 1.9 * down, "What each latent does to the columns: E[x|z] along it, averaged over the others")
    grid = figure.subplots(down, across, squeeze=False)
    palette = sns.color_palette("colorblind", max(3, CURVES))
    for place, axes in enumerate(grid.flat):
        if place >= len(chosen):
            axes.remove()
            continue
        j = chosen[place]
        for i, k in enumerate(shown):
            row = found.sel(latent=k).isel(cell=j)
            z = row["effect_z"].values
            axes.fill_between(z, row["effect_low"], row["effect_high"], color=palette[i], alpha=0.16, linewidth=0)
            axes.plot(z, row["effect"], color=palette[i], linestyle=("-", "--", ":")[i], label=_legend(found, k))
        axes.set_title(labels[j] if len(labels[j]) < 30 else f"{labels[j][:28]}…")
        axes.set_ylabel("probability" if "=" in labels[j] else "")
        if place >= len(chosen) - across:
            axes.set_xlabel(f"latent{_unit(standard)}")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    names = " and ".join(f"latent {k}" for k in shown)
    where = "the prior" if found.attrs["others"] == "prior" else "the aggregate posterior"
    share = found["share"].sel(latent=shown[0]).values
    most = int(np.argmax(share))
    alone = f"Latent {shown[0]} alone decides {labels[most]} most: {percent(share[most])} of the variance of its E[x|z]"
    caption = f"Lines: the mean of the column at values of {names}."
    if len(_order(found)) > 1:
        caption = (
            f"Lines: the mean of the column at values of {names}, the other latents drawn from {where}; bands: the middle 90% "
            "that these make of it. A steep line in a narrow band is a column that this latent decides; a flat one in a wide "
            f"band belongs to the others. {alone}."
        )
    if len(labels) > len(chosen):
        caption += f" Shown are the {len(chosen)} of {len(labels)} columns and levels that move most."
    return Plot("effects", figure, f"Mean of each column along {names}.", caption, wide=True)


def _legend(found: xr.Dataset, k: int) -> str:
    return f"latent {k}: rate {say(float(found['rate'].values[k]))} nats; mean, middle 90% over the others"


def _telling(curve: np.ndarray, labels: Sequence[str]) -> list[int]:
    """Return the cells to show, in their order: of each column the one that changes most, then further levels."""
    span = np.ptp(curve, axis=1).max(0)
    ranked = np.argsort(-span, kind="stable").tolist()
    column = [label.split("=", 1)[0] for label in labels]
    first = [j for i, j in enumerate(ranked) if column[j] not in {column[other] for other in ranked[:i]}]
    return sorted((first + [j for j in ranked if j not in first])[:PANELS])


@styled
def states(
    found: xr.Dataset, x: np.ndarray, columns: Sequence[str], *, sequence: bool = False, standard: bool = True
) -> Plot | Absent:
    """Draw E[x|z] of each state, with its frequency in the data. Arguments as in `effects`."""
    name, event = "states", x.shape[1:]
    image = None if sequence else image_shape(event)
    use, prior = found["state_use"].values, found["state_prior"].values
    order = np.argsort(-use, kind="stable")
    title = "What each state of the discrete latents looks like: E[x|z]"
    caption = _states_caption(found)
    if image is not None:
        across = min(10, len(order))
        down = math.ceil(len(order) / across)
        tiles = found["state_x"].values[order].reshape(len(order), *image)
        figure = canvas(min(WIDE, 1.03 * across + 0.4), 0.5 + 1.45 * down, title)
        grid = figure.subplots(down, across, squeeze=False)
        limits = tone(tiles)
        for place, axes in enumerate(grid.flat):
            if place >= len(order):
                axes.remove()
                continue
            s = order[place]
            show_tiles(axes, tiles[place][None, None], limits)
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{_called(found, s)}\n{percent(use[s])} of data", fontsize=8)
        return Plot(name, figure, "E[x|z] of each state, the commonest first.", caption, wide=True)
    if sequence and len(event) == 2:
        figure = canvas(WIDE, 3.0, title)
        plots_sequence.along(figure, [("state", np.arange(len(order)), found["state_x"].values)])
        return Plot(name, figure, "E[x|z] of each state.", caption, wide=True)
    if "state_cell" not in found:
        return Absent(name, "No picture of states: a datum is no image and has too many entries.")
    cells = found["state_cell"].values
    labels = [str(v) for v in found["cell"].values]
    shown = _telling(cells[None], labels)
    scale = found["cell_sd"].values[shown]
    middle = (use[:, None] * cells).sum(0)[shown]
    off = (cells[order][:, shown] - middle) / scale
    figure = canvas(WIDE, 1.4 + 0.34 * len(order), title)
    axes = figure.subplots()
    axes.grid(False)
    most = float(np.abs(off).max())
    mesh = axes.imshow(off, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    for i, s in enumerate(order):
        for place, j in enumerate(shown):
            dark = abs(off[i, place]) > 0.6 * most
            axes.text(place, i, say(float(cells[s, j])), ha="center", va="center", fontsize=7, color="white" if dark else INK)
    axes.set_yticks(
        range(len(order)), [f"{_called(found, s)}: {percent(use[s])} of data, prior {percent(prior[s])}" for s in order]
    )
    axes.set_xticks(range(len(shown)), [labels[j] for j in shown], rotation=30, ha="right")
    figure.colorbar(mesh, ax=axes, label="above the mean over states (sd of the data)", pad=0.02)
    return Plot(name, figure, "Mean of each column in each state, against the mean over states.", caption, wide=True)


def _called(found: xr.Dataset, state: int) -> str:
    if found.attrs["space"] == "one_hot":
        return f"state {state}"
    return "z = " + "".join(f"{v:.0f}" for v in found["state_z"].values[state])


def _states_caption(found: xr.Dataset) -> str:
    use, prior, guide = (found[name].values for name in ("state_use", "state_prior", "state_guide"))
    called = [_called(found, state) for state in range(len(use))]
    off = int(np.abs(use - prior).argmax())
    wrong = int(np.abs(use - guide).argmax())
    table = "state_cell" in found
    flat = (found["state_cell"] / found["cell_sd"]).values if table else found["state_x"].values.reshape(len(use), -1)
    apart = np.sqrt(np.square(flat[:, None] - flat[None]).mean(-1)) + np.where(np.eye(len(flat)) > 0, np.inf, 0)
    i, j = np.unravel_index(int(apart.argmin()), apart.shape)
    return (
        f"States by how often data are in them, by the exact posterior. Furthest from the prior is {called[off]}, with "
        f"{percent(use[off])} of the data and {percent(prior[off])} of the prior; the guide is furthest off at {called[wrong]} "
        f"({percent(guide[wrong])} by the guide, {percent(use[wrong])} exactly). Most alike are {called[int(i)]} and "
        f"{called[int(j)]}, {say(float(apart.min()))} apart (root mean square per entry{', sd of the data' if table else ''}): "
        "one of them may be spare."
    )


@styled
def traversals(
    found: xr.Dataset, x: np.ndarray, columns: Sequence[str], *, sequence: bool = False, standard: bool = True
) -> Plot | Absent:
    """Draw E[x|z] as each latent moves in turn, the highest rate first. Arguments as in `effects`."""
    name, event, order = "traversals", x.shape[1:], _order(found)[:ROWS]
    image = None if sequence else image_shape(event)
    z, expected = found["traversal_z"].values, found["traversal"].values
    rate, reach = found["rate"].values, found["reach"].values
    start = f"row {found.attrs['datum']}: {found.attrs['start']}" if "datum" in found.attrs else found.attrs["start"]
    title = f"One latent at a time, from {start}"
    top = int(np.argmax(reach))
    rest = f" Shown are the {len(order)} of {len(rate)} latents with the highest rate." if len(rate) > len(order) else ""
    unit = "sd of the data" if "cell_sd" in found else "units of the data"
    through = "from 0 to 1" if found.attrs["space"] == "binary" else "through the prior's quantiles"
    turned = ", rescaled so that z stays on the sphere" if found.attrs["space"] == "sphere" else ""
    caption = (
        f"Each row moves one latent {through} and leaves the others at {start}{turned}. Latent {top} changes "
        f"E[x|z] most, by {say(float(reach[top]))} (root mean square per entry, {unit})"
        + (f", latent {int(np.argmin(reach))} least, by {say(float(reach.min()))}" if len(reach) > 1 else "")
        + f": a row of equal tiles is a latent that does nothing here.{rest}"
    )
    alt = "E[x|z] along each latent."
    if image is not None:
        steps = z.shape[1]
        tiles = expected[order].reshape(len(order), steps, *image)
        figure = canvas(min(WIDE, 0.82 * steps + 1.9), 0.85 + 0.82 * len(order), title)
        axes = figure.subplots()
        show_tiles(axes, tiles, tone(tiles))
        p = (np.arange(steps) + 0.5) / steps
        ticks = [f"{100 * v:.0f}%" for v in p] if found.attrs["space"] != "binary" else ["0", "1"]
        axes.set_xticks(range(steps), ticks)
        axes.set_xlabel("prior quantile of the latent" if found.attrs["space"] != "binary" else "value of the latent")
        axes.set_yticks(range(len(order)), [f"latent {k}\n{say(float(rate[k]))} nats" for k in order])
        return Plot(name, figure, alt, caption, wide=True)
    if sequence and len(event) == 2:
        few = order[:3]
        figure = canvas(WIDE, 0.6 + 2.4 * len(few), title)
        plots_sequence.along(figure, [(f"latent {k}{_unit(standard)}", z[k], expected[k]) for k in few])
        return Plot(name, figure, alt, caption, wide=True)
    if len(event) != 1:
        return Absent(name, "No picture of traversals: a datum is no image, table or sequence.")
    few = order[:4]
    sd = np.nanstd(x, 0)
    if "traversal_cell" in found:
        cell, labels = found["traversal_cell"].values, [str(v) for v in found["cell"].values]
        lines = (cell - cell.mean((0, 1))) / found["cell_sd"].values
    else:
        lines, labels = (expected - np.nanmean(x, 0)) / np.where(sd > 0, sd, 1.0), [f"x[{j}]" for j in range(x.shape[1])]
    figure = canvas(WIDE, 3.6, title)
    panels = figure.subplots(1, len(few), sharey=True, squeeze=False)[0]
    first = np.argsort(-np.ptp(lines[few], axis=1).max(0), kind="stable")[:LINES]  # same colour in all panels
    for axes, k in zip(panels, few, strict=True):
        axes.plot(z[k], lines[k], color=INK, alpha=0.25, lw=0.9)
        for j, shade in zip(first.tolist(), sns.color_palette("colorblind", LINES), strict=False):
            axes.plot(z[k], lines[k][:, j], color=shade, label=labels[j])
        axes.set(title=f"latent {k}: {say(float(rate[k]))} nats", xlabel=f"latent {k}{_unit(standard)}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=LINES)
    panels[0].set_ylabel("E[x|z], about its mean (sd of the data)")
    return Plot(name, figure, alt, caption.replace("equal tiles", "flat lines").replace("row", "panel", 1), wide=True)


def plane(
    found: xr.Dataset, x: np.ndarray, columns: Sequence[str], *, sequence: bool = False, standard: bool = True
) -> Plot | Absent:
    """Draw E[x|z] over two latents, as in the report. Arguments as in `effects`."""
    coords: dict[str, Any] = {key: found[key] for key in ("z_column", "z_row") if key in found}
    flat = xr.Dataset({"expected_x": found["plane"]}, coords=coords, attrs={"latents": found.attrs["plane_of"]})
    attrs: dict[str, Any] = {"event_shape": list(x.shape[1:]), "latent_dim": found.attrs["latent_dim"]}
    attrs |= {"space": found.attrs["space"], "standard": int(standard)}
    groups = {"plane": flat}
    if columns:
        attrs["columns"] = list(columns)
        dims = found["plane"].dims[-1:]
        groups["reconstruction"] = xr.Dataset({"x_mean": (dims, np.nanmean(x, 0)), "x_sd": (dims, np.nanstd(x, 0))})
    if sequence:
        attrs["sequence"] = 1
    tree = xr.DataTree.from_dict(groups)
    tree.attrs.update(attrs)
    return plots_latent.plane(tree)
