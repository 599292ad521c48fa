"""The conclusions that an audit supports, and those that it does not, one sentence each."""

from __future__ import annotations

import numpy as np
import xarray as xr

from elbowroom.analysis.measures.evidence_kinds import BOUND, CONTRADICTED, ESTIMATE, EXACT, VALUES, counts, estimated
from elbowroom.analysis.measures.table import GOOD_K, MISSED, best_reference, column, trusted
from elbowroom.analysis.plots.style import count, percent, say
from elbowroom.analysis.verdict import thresholds
from elbowroom.analysis.verdict.remedies import Remedies


def conclusions(table: xr.Dataset) -> tuple[list[str], list[str]]:
    """Return the supported conclusions, and the unsupported ones."""
    n, kind, cures = table.sizes["obs_id"], counts(table), Remedies.of(table)
    gap, k = column(table, "gap_total"), column(table, "pareto_k")
    known = gap[np.isfinite(gap)]
    reference = best_reference(table)
    sure = trusted(table, reference)
    how = " or ".join(word for name, word in VALUES.items() if kind[name])
    may, may_not = [], []
    if known.size and (kind[EXACT] or kind[ESTIMATE]):
        median, low, high = (say(value) for value in thresholds.median(known))
        may.append(
            f"log p(x) is {how} for {known.size:,} of {count(n)}; the ELBO lies {median} nats [{low}, {high}] below it "
            "at the median (in brackets, here and below, its 95% interval). That much this guide loses, with this decoder held "
            "as it is."
        )
    told = _blame(table)
    if told:
        may.append(told)
    if sure.any():
        part = table.sel(reference=reference)
        mean, ratio = (np.asarray(part[name].values, dtype=float)[sure] for name in ("mean_error", "sd_ratio"))
        fine = (mean < 0.5) & (ratio > 0.8) & (ratio < 1.25)
        may.append(
            f"For {percent(float(fine.sum()), float(n))} of the data the guide is near its reference: every mean within half a "
            "posterior sd and every sd within 25%."
            + (
                f" For the others use the reference's draws, {cures.draws.format(reference=reference)}."
                if fine.sum() < n
                else ""
            )
        )
    good = int((k < GOOD_K).sum())
    if good:
        may.append(
            f"For {count(good)} (k-hat below {GOOD_K}) expectations under the posterior can be had by weighting draws from the "
            "guide, unless it misses a mode altogether, which k-hat cannot see."
        )
    may_not.append(
        "That the decoder is right: every posterior, exact ones too, is that of the trained decoder. A better fit changes "
        "p(z|x) itself, and a small gap can belong to a poor model."
    )
    if kind[CONTRADICTED]:
        may_not.append(
            f"Anything about the gap of {count(kind[CONTRADICTED])}: there log p(x) is contradicted, it lies below the ELBO by "
            "more than the errors allow."
        )
    if kind[BOUND]:
        may_not.append(
            f"Anything about the gap of {count(kind[BOUND])} of {n:,} but its bounds: for them only probabilistic bounds on "
            "log p(x) are known, an upper one only where the table has it and conditional on certified draws. They are no "
            "estimates, and enter no mean, median or figure of the gap."
        )
    if kind[ESTIMATE]:
        words, _, accepted = estimated(table)
        may_not.append(
            f"Exact values of log p(x) for {count(kind[ESTIMATE])}: theirs is an {words} with the standard error given, "
            f"accepted because {accepted}."
        )
    lost = int((column(table, "missed_mass") > MISSED).sum())
    if lost:
        may_not.append(
            f"Anything that the guide or its weights say of {count(lost)}: it misses a mode of their posterior (missed_mass)."
        )
    unsure = n - int(sure.sum())
    if unsure:
        may_not.append(
            f"How the guide compares with the posterior of {count(unsure)}: "
            + ("there is no reference." if reference is None else "their reference is not certified, and they are left out.")
        )
    if known.size and not told:
        may_not.append(
            "Whether the family or the encoder is to blame: the gap adds both, and for this guide they are not told apart. A "
            f"richer family ({cures.shape}) or a longer fit of the encoder will tell."
        )
    if good < n:
        may_not.append(f"Importance-weighted results for {count(n - good)} where k-hat is {GOOD_K} or more, or not known.")
    may_not.append("Anything about data unlike the audited ones: other data can have a larger gap than the worst one here.")
    return may, may_not


def _blame(table: xr.Dataset) -> str:
    """Return the shares of encoder and family in the gap, in words; empty where they are not separated."""
    encoder, family = column(table, "gap_amortization"), column(table, "gap_approximation")
    rows = thresholds.known(table) & np.isfinite(encoder) & np.isfinite(family)
    if not rows.any():
        return ""
    parts = [thresholds.median(values[rows]) for values in (encoder, family)]
    said = [f"{say(middle)} nats [{say(low)}, {say(high)}]" for middle, low, high in parts]
    return (
        f"What makes the gap, over {count(int(rows.sum()))}: at the median the encoder misses {said[0]} of what its own family "
        f"could reach (amortization), and the family is {said[1]} short of log p(x) (approximation)."
    )
