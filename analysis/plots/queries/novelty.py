"""The figure of novelty scores: log p(x) of the scored rows among the calibration rows, and the p-values that flag rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from elbowroom.analysis.plots import style
from elbowroom.analysis.plots.style import Absent, Plot, styled
from elbowroom.analysis.queries.novelty import ABOVE, BELOW, LIMITED, outside

BINS = 40
FAR = 1.5  # in ranges of the calibration rows: rows beyond are drawn at the border
NAME = "screening"


@styled
def screening(answer: xr.Dataset) -> Plot | Absent:
    """Draw the scored rows among the calibration rows, and their sorted p-values with the threshold line.

    Args:
        answer: log_evidence, decision, p_conformal of the rows; calibration_log_evidence, optionally simulated_log_evidence;
            attributes band, fdr, calibration_mixed.
    """
    rows, valid = _finite(answer["log_evidence"].values), _finite(answer["calibration_log_evidence"].values)
    if rows.size == 0 or valid.size == 0:
        return Absent(NAME, "No picture of the scores: log p(x) has a value for none of the rows, or of the calibration rows.")
    figure = style.canvas(style.WIDE, 3.6, "Are these rows like the ones that the model was fitted to?")
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    mixed = bool(answer.attrs.get("calibration_mixed", 0))
    _histograms(left, answer, rows, valid, mixed)
    _p_values(right, answer)
    alt = (
        f"Histograms of log p(x) of {rows.size} scored and {valid.size} calibration rows with the percentile band; beside them "
        "the sorted p-values of both tails with the lines that hold the false-discovery rate."
    )
    return Plot(NAME, figure, alt, _caption(answer, mixed), wide=True)


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _histograms(axes: Axes, answer: xr.Dataset, rows: np.ndarray, valid: np.ndarray, mixed: bool) -> None:
    made = _finite(answer["simulated_log_evidence"].values) if "simulated_log_evidence" in answer else np.zeros(0)
    both = np.concatenate([rows, valid, made])
    bottom, top = float(valid.min()), float(valid.max())
    reach = FAR * (top - bottom)
    low, high = max(float(both.min()), bottom - reach), min(float(both.max()), top + reach)
    span = max(high - low, 1e-9)
    edges = np.linspace(low - 0.01 * span, high + 0.01 * span, BINS + 1).tolist()
    if not mixed:
        ends = np.percentile(valid, answer.attrs["band"])
        words = f"{answer.attrs['band'][0]:g}–{answer.attrs['band'][1]:g}% of the calibration rows"
        axes.axvspan(*ends, color=style.FAINT, linewidth=0, label=words)
    kinds = (
        (valid, f"calibration rows ({valid.size:,})", style.MUTED, "-"),
        (made, f"drawn from the model ({made.size:,})", style.INK, ":"),
        (rows, f"scored rows ({rows.size:,})", style.EXACT, "-"),
    )
    for values, label, colour, line in kinds:
        if values.size:
            share = np.full(values.size, 1 / values.size)
            look: dict[str, Any] = {"color": colour, "label": label, "linestyle": line, "linewidth": 1.5}
            axes.hist(values.clip(low, high), edges, weights=share, histtype="step", **look)
    of_rule = answer["decision"].sel(rule="two_sided").values.astype(str)
    level = f"p at most {outside(tuple(answer.attrs['band'])):.3g}"
    for word, colour, marker in ((BELOW, style.ALARM, "v"), (ABOVE, style.GUIDE, "^"), (LIMITED, style.MUTED, "x")):
        some = answer["log_evidence"].values[of_rule == word]
        some = some[np.isfinite(some)].clip(low, high)
        if some.size:
            label = f"{level}: {word}" if word != LIMITED else word
            look = {"color": colour, "markersize": 5, "alpha": 0.6, "clip_on": False, "zorder": 5}
            look |= {"transform": axes.get_xaxis_transform(), "label": f"{label} ({int((of_rule == word).sum()):,})"}
            axes.plot(some, np.full(some.size, -0.035), marker, **look)
    axes.tick_params(axis="x", pad=9)
    ceiling = axes.get_ylim()[1]
    axes.set(xlabel="log p(x) [nats]" + (", rows with all kinds of holes" if mixed else ""), ylabel="share of the rows")
    axes.set_ylim(0, 1.45 * ceiling)
    axes.legend(loc="upper left", ncols=2)


def _p_values(axes: Axes, answer: xr.Dataset) -> None:
    fdr = float(answer.attrs["fdr"])
    tails = {"low": ("low tail", style.ALARM, "v"), "high": ("high tail", style.GUIDE, "^")}
    most = 0
    for tail, (label, colour, marker) in tails.items():
        p = np.sort(_finite(answer["p_conformal"].sel(tail=tail).values))
        most = max(most, p.size)
        if p.size:
            look: dict[str, Any] = {"color": colour, "label": label, "marker": marker, "markersize": 3, "linewidth": 1.2}
            axes.plot(np.arange(1, p.size + 1) / p.size, p, markevery=max(1, p.size // 60), **look)
    axes.set(xscale="log", yscale="log", xlabel="share of the rows, the smallest p-values first", ylabel="conformal p-value")
    if most:
        share = np.array([1 / most, 1.0])
        axes.plot(share, share, color=style.MUTED, linestyle=":", linewidth=1, label="if all rows were valid")
        for q, line, of in ((fdr, "--", "low tail alone"), (fdr / 2, "-.", "both tails")):
            axes.plot(share, q * share, color=style.INK, linestyle=line, linewidth=1, label=f"held to FDR {fdr:g}, {of}")
        axes.set_ylim(bottom=0.02 * fdr / most)  # room for the legend
        axes.legend(loc="lower right")
    else:
        axes.text(0.5, 0.5, "no row can be compared", color=style.MUTED, ha="center", transform=axes.transAxes)
        axes.set(xscale="linear", yscale="linear", xticks=[], yticks=[])


def _caption(answer: xr.Dataset, mixed: bool) -> str:
    band, fdr = answer.attrs["band"], float(answer.attrs["fdr"])
    decision = lambda rule: answer["decision"].sel(rule=rule).values.astype(str)
    number = lambda rule: int(np.isin(decision(rule), (BELOW, ABOVE)).sum())
    m, share = answer.sizes["obs_id"], outside(tuple(band))
    text = (
        f"{number('band'):,} of {style.count(m, 'row', 'rows')} lie outside the {band[0]:g}–{band[1]:g}% band of the "
        "calibration "
        f"rows; about {style.say(share * m, 2)} would if all were valid. "
    )
    rows, valid = _finite(answer["log_evidence"].values), _finite(answer["calibration_log_evidence"].values)
    away = np.maximum(valid.min() - rows, rows - valid.max())
    if far := int((away > FAR * (valid.max() - valid.min())).sum()):
        text += f"{style.count(far, 'row lies', 'rows lie')} beyond the axis and are drawn at its end. "
    both = decision("fdr_two_sided")
    below, above = (int((both == word).sum()) for word in (BELOW, ABOVE))
    text += (
        f"Held to a false-discovery rate of {fdr:.0%} the low tail flags {number('fdr_low'):,}; both tails together flag "
        f"{below:,} as too unlikely and {above:,} as too likely: the last point of a tail below its line, and all before it. "
    )
    if limited := int((both == LIMITED).sum()):
        text += f"{limited:,} are estimator-limited: the error of their log p(x) decides. "
    if "simulated_log_evidence" in answer:
        text += "Where the dotted histogram is not that of the calibration rows, the model does not make such data. "
    if mixed:
        text += "Rows are compared only with rows that have the same holes: the histograms mix them. "
    return text + "A row inside is not thereby valid: another kind of row can be as likely."
