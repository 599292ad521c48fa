"""Figures of the guide's calibration: one for data simulated from the model, one for the observed data.

Regime S concerns x from the model, with the z that generated it; regime R the audited x, with certified draws of their
posteriors. `checks.calibration` stores the bands with the p-values. ArviZ draws the same PIT values, a panel for each quantity,
with `arviz_plots.plot_ecdf_pit(tree, var_names="pit", group="prior_sbc", sample_dims=["simulation"])`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from elbowroom.analysis.measures.table import Z95
from elbowroom.analysis.plots import style
from elbowroom.analysis.plots.style import Absent, Plot, styled
from elbowroom.analysis.verdict.thresholds import EFFECTS

LEVEL = 0.05  # familywise
NAMED = 6  # quantities with their own colour, and coordinates drawn
LINES = (
    (style.GUIDE, "-"),
    (style.EXACT, "--"),
    (style.ALARM, "-."),
    ("#009E73", (0, (1, 1))),
    ("#56B4E9", (0, (5, 1, 1, 1, 1, 1))),
    ("#E69F00", (0, (3, 2))),
)
MARKERS = "os^Dvp"
NAMES = {"simulated": "calibration_simulated", "observed": "calibration_observed"}


@styled
def calibration(found: xr.Dataset | None, regime: str) -> Plot | Absent:
    """Draw PIT values against uniform, coverage, and, for simulated data, z-scores against contraction.

    Args:
        found: the result of `checks.calibration` for this regime.
        regime: `simulated` (S) or `observed` (R).

    Raises:
        ValueError: `found` is of the other regime.
    """
    name = NAMES[regime]
    simulated = regime == "simulated"
    if found is None or "ecdf" not in found or not found.sizes.get("quantity"):
        where = "data simulated from the model" if simulated else "the audited data"
        return Absent(name, f"No calibration of the guide on {where}: diagnosis.nc has none.")
    if found.attrs.get("regime", regime) != regime:
        raise ValueError(f"a figure of regime {regime} asked for from values of regime {found.attrs['regime']}")
    n = found.sizes["simulation"]
    title = f"On data that the model makes: {n:,} simulated, the true z of each known"
    if not simulated:
        title = f"On the real data: {n:,}, with a certified draw of each posterior in the place of the true z"
    covered = "coverage" in found
    widths = [1.5] + covered * [1.0] + (covered and simulated and "z_score" in found) * [1.0]
    figure = style.canvas(style.WIDE, 4.3, title)
    panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    bad = _failing(found)
    _ecdf(panels[0], found, bad)
    chosen = _farthest(found) if covered else np.array([], dtype=int)
    if covered:
        _coverage(panels[1], found, chosen)
    if len(widths) == 3:
        _recovery(panels[2], found, chosen)
    more = " Dots of z-score against contraction." if len(widths) == 3 else ""
    alt = (
        f"Differences of the ECDF of the PIT values from uniform with a simultaneous 95% band, {len(bad)} of "
        f"{found.sizes['quantity']} quantities fail."
        + (" Coverage of central intervals against their nominal level." if covered else "")
        + more
    )
    return Plot(name, figure, alt, _caption(found, bad, simulated), wide=True)


def _failing(found: xr.Dataset) -> np.ndarray:
    """Return the quantities that fail at the familywise level, the largest effect first."""
    effect = found["effect"].values
    bad = np.flatnonzero(found["p_holm"].values <= LEVEL)
    return bad[np.argsort(-effect[bad], kind="stable")]


def _ecdf(axes: Axes, found: xr.Dataset, bad: np.ndarray) -> None:
    u = found["point"].values
    low, high = np.nanmin(found["ecdf_lower"].values, 0) - u, np.nanmax(found["ecdf_upper"].values, 0) - u
    grid, edge = np.concatenate([[0], u, [1]]), lambda y: np.concatenate([[0], y, [0]])
    axes.fill_between(grid, edge(low), edge(high), color=style.FAINT, linewidth=0, label="95% band, all u at once")
    axes.axhline(0, color=style.MUTED, linewidth=0.8)
    fine = [q for q in range(found.sizes["quantity"]) if q not in bad]
    line: dict[str, Any]
    for number, q in enumerate(fine):
        line = {"color": style.MUTED, "linewidth": 0.8, "alpha": 0.75, "label": f"{len(fine)} within" if not number else None}
        axes.plot(grid, edge(found["ecdf"].values[q] - u), **line)
    for rank in reversed(range(len(bad))):
        q = bad[rank]
        if rank < NAMED:
            colour, look = LINES[rank]
            label = f"{found['quantity'].values[q]}: {_direction(found, q)}, {style.say(float(found['effect'].values[q]), 2)}"
            line = {"color": colour, "linestyle": look, "label": label}
        else:
            label = f"{len(bad) - NAMED} more that fail" if rank == NAMED else "_"
            line = {"color": style.ALARM, "linewidth": 0.7, "label": label}
        axes.plot(grid, edge(found["ecdf"].values[q] - u), **line)
    handles, labels = axes.get_legend_handles_labels()
    keep = [0, *range(len(labels) - 1, 0, -1)]
    axes.legend(
        [handles[i] for i in keep],
        [labels[i] for i in keep],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=2,
        columnspacing=1.2,
    )
    axes.set(xlabel="u, rank of the draw among the guide's (PIT)", ylabel="ECDF − u", xlim=(0, 1))


def _direction(found: xr.Dataset, q: int) -> str:
    return str(found["direction"].values[q]) or "off"


def _farthest(found: xr.Dataset) -> np.ndarray:
    """Return the at most `NAMED` coordinates whose coverage is farthest from nominal, in their order."""
    off = np.abs(found["coverage"].values - found["level"].values[:, None]).max(0)
    return np.sort(np.argsort(-np.nan_to_num(off, nan=-1.0), kind="stable")[:NAMED])


def _coverage(axes: Axes, found: xr.Dataset, chosen: np.ndarray) -> None:
    level = found["level"].values
    axes.plot([0.45, 1], [0.45, 1], color=style.MUTED, linewidth=0.8)
    for rank, j in enumerate(chosen):
        shift = 0.008 * (rank - (len(chosen) - 1) / 2)
        axes.errorbar(
            level + shift,
            found["coverage"].values[:, j],
            Z95 * found["coverage_se"].values[:, j],
            fmt=MARKERS[rank],
            color=LINES[rank][0],
            markersize=3.5,
            linewidth=1.0,
            label=str(found["coordinate"].values[j]),
        )
    axes.set(
        xlabel="nominal coverage (below the line: too narrow)",
        ylabel="share of true z inside" if _simulated(found) else "share of certified z inside",
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, 0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    axes.set_xticks([0.5, 0.8, 0.95])
    axes.legend(loc="lower right", ncols=1 + (len(chosen) > 3), handletextpad=0.1, columnspacing=0.8)
    left_out = found.sizes["coordinate"] - len(chosen)
    axes.set_title(f"coverage, the {len(chosen)} latents farthest off" if left_out else "coverage of central intervals")


def _simulated(found: xr.Dataset) -> bool:
    return found.attrs.get("regime") == "simulated"


def _recovery(axes: Axes, found: xr.Dataset, chosen: np.ndarray) -> None:
    axes.axhspan(-2, 2, color=style.FAINT, alpha=0.6, linewidth=0)
    axes.axhline(0, color=style.MUTED, linewidth=0.8)
    score, contraction = found["z_score"].values[:, chosen], found["contraction"].values[:, chosen]
    for rank in range(len(chosen)):
        look: dict[str, Any] = {"s": 7, "alpha": 0.35, "linewidth": 0, "color": LINES[rank][0], "marker": MARKERS[rank]}
        axes.scatter(contraction[:, rank], score[:, rank], **look)
    known = contraction[np.isfinite(contraction)]
    if known.size:
        low = float(np.quantile(known, 0.01))
        axes.set_xlim(min(low, 0.95) - 0.02, 1.01)
    height = np.abs(score[np.isfinite(score)])
    if height.size:
        reach = float(np.clip(1.1 * np.quantile(height, 0.999), 3.0, 12.0))
        axes.set_ylim(-reach, reach)
    axes.set(xlabel="contraction, 1 − var q / var prior", ylabel="z-score, (mean of q − true z) / sd of q")
    axes.set_title("are the true z found again?")


def _caption(found: xr.Dataset, bad: np.ndarray, simulated: bool) -> str:
    n, total = found.sizes["simulation"], int(np.isfinite(found["p_holm"].values).sum())
    where = "data that the model makes" if simulated else "these data"
    band = float(np.nanmax(found["ecdf_upper"].values - found["point"].values))
    if len(bad):
        names = "; ".join(
            f"{found['quantity'].values[q]} {_direction(found, q)} (by {style.say(float(found['effect'].values[q]), 2)})"
            for q in bad
        )
        worst = style.say(float(found["effect"].values[bad[0]]), 2)
        small = float(found["effect"].values[bad[0]]) < EFFECTS["difference"]
        text = (
            f"{len(bad)} of {total} quantities {'is' if len(bad) == 1 else 'are'} off at a familywise level of 5%, "
            f"the largest effect first: {names}. The guide "
            f"is not {'quite ' if small else ''}the posterior of {where}; probabilities taken from it are wrong by up to "
            f"{worst} on average over them{', which is clear but little' if small else ''}."
        )
    else:
        text = (
            f"None of {total} quantities is off at a familywise level of 5%: on average over {where} the guide cannot be told "
            f"from the posterior. With {n:,} of them a deviation of less than about {style.say(band, 2)} cannot be seen."
        )
    if "coverage" in found:
        text += _covered(found)
    if simulated and "z_score" in found:
        score, contraction = found["z_score"].values, found["contraction"].values
        score = score[np.isfinite(score)]
        if score.size:
            spread = float(score.std())
            room = max(0.05, 3 / np.sqrt(2 * n))  # three standard errors of the sd, or the relevant size
            said = ["the guide is too narrow"] if spread > 1 + room else ["it is too wide"] if spread < 1 - room else []
            if abs(score.mean()) > max(0.05, 3 / np.sqrt(n)):
                said.append("it is off centre")
            text += (
                f" z-scores have mean {style.say(float(score.mean()), 2)} and sd {style.say(spread, 3)} (0 and 1 where the "
                "guide is right: "
                f"{' and '.join(said) or 'no clear difference'}); the median contraction is "
                f"{style.say(float(np.nanmedian(contraction)), 2)} (near 0, x tells nothing of z)."
            )
    left_out = int(found.attrs.get("left_out", 0))
    if left_out:
        text += f" {style.count(left_out)} without a certified posterior {'is' if left_out == 1 else 'are'} left out."
    lost = int(found["lost"].max()) if "lost" in found else 0
    if lost:
        text += f" For some quantity {style.count(lost)} gave no number and {'is' if lost == 1 else 'are'} left out of it."
    return text


def _covered(found: xr.Dataset) -> str:
    """Report where the coverage of a latent's central intervals deviates by more than its errors."""
    level = found["level"].values[:, None]
    cover, error = found["coverage"].values, found["coverage_se"].values
    known = np.isfinite(cover)
    if not known.any():
        return ""
    limit = 3.0  # standard errors, for several latents and levels
    low, high = known & (cover < level - limit * error), known & (cover > level + limit * error)
    among = low | high if (low | high).any() else known
    at = int(np.argmax(np.where(among, np.abs(cover - level), -1.0)))
    i, j = np.unravel_index(at, cover.shape)
    its = float(np.broadcast_to(error, cover.shape)[i, j])
    text = (
        f" Farthest from nominal: the {style.percent(float(found['level'].values[i]))} interval of "
        f"{found['coordinate'].values[j]} holds {style.percent(float(cover[i, j]))} (SE {style.percent(its)})"
    )
    if low.any() and high.any():
        return text + "; some latents are too narrow, others too wide."
    if low.any():
        return text + "; the guide is too narrow."
    return text + ("; the guide is too wide." if high.any() else ", within three standard errors.")
