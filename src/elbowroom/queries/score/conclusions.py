"""Conclusions from scores: how many rows each rule flags, what this means, and what no score can promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import xarray as xr

from elbowroom.analysis.measures.evidence_kinds import BOUND, NONE, of_guide
from elbowroom.analysis.measures.evidence_kinds import counts as of_kind
from elbowroom.analysis.queries.novelty import ALONE, INSIDE, LIMITED, enough, outside


def counts(dataset: xr.Dataset) -> dict[str, dict[str, int]]:
    """Return for each rule the number of rows with each decision."""
    return {
        str(rule): dict(sorted(Counter(dataset["decision"].sel(rule=rule).values.astype(str).tolist()).items()))
        for rule in dataset["rule"].values
    }


def flagged(of_rule: Mapping[str, int]) -> int:
    """Return how many rows a rule flags, from its `counts`."""
    return sum(count for word, count in of_rule.items() if word not in (INSIDE, LIMITED, ALONE))


def conclude(dataset: xr.Dataset) -> list[str]:
    """Say what the scores are, what each rule flags, what this means, and what no score can promise."""
    m, n = dataset.sizes["obs_id"], int(dataset.attrs["calibration_rows"])
    methods, kind = Counter(dataset["evidence_method"].values.astype(str).tolist()), of_kind(dataset)
    said = [f"{m:,} rows; evidence: " + ", ".join(f"{name} at {number:,}" for name, number in methods.most_common()) + "."]
    if unable := kind[NONE]:
        said.append(f"At {unable:,} rows the model cannot be evaluated (evidence_reason says why): look at them.")
    if lost := kind[BOUND]:
        said.append(
            f"{lost:,} rows have bounds alone: these are no log p(x), and decide only where both ends agree. The p-values of "
            "the ELBO (p_score) are valid there too."
        )
    if own := int(of_guide(dataset).sum()):
        said.append(
            f"At {own:,} rows log p(x) is estimated by the encoder's own draws alone: a mode of p(z|x) that the encoder misses "
            "is not in it, nor in its error."
        )
    (bottom, top), fdr = np.asarray(dataset.attrs["band"], dtype=float), float(dataset.attrs["fdr"])
    found, level = counts(dataset), outside((float(bottom), float(top)))
    told = {
        "band": f"outside the {bottom:g}-{top:g} % band of {n:,} calibration rows",
        "low": f"low tail, p at most {level:.3g}",
        "two_sided": f"both tails, p at most {level:.3g}",
        "fdr_low": f"low tail, false-discovery rate {fdr:g}",
        "fdr_two_sided": f"both tails, false-discovery rate {fdr:g}",
    }
    said.append("Flagged: " + "; ".join(f"{flagged(found[rule]):,} ({words})" for rule, words in told.items()) + ".")
    if limited := max(of_rule.get(LIMITED, 0) for of_rule in found.values()):
        said.append(f"Up to {limited:,} rows are estimator-limited: the error of log p(x) is what decides, so no rule does.")
    if alone := found["two_sided"].get(ALONE, 0):
        said.append(_no_comparison(dataset, alone, enough(level)))
    said.append(
        f"If all rows were valid, about {level * (m - alone):,.1f} would be flagged at p {level:.3g} by chance. The rules for "
        f"the false-discovery rate flag so that on average at most {fdr:.0%} of what they flag is valid, as long as valid rows "
        "are exchangeable with the calibration rows."
    )
    compared = dataset["compared_with"].values[dataset["compared_with"].values >= enough(level)]
    like = int(compared.min()) if compared.size else n
    beyond = int(np.ceil((m - alone) / (fdr * (like + 1)) * (1 - 1e-12)))
    if beyond > 1:
        said.append(
            f"p cannot get below 1 / {like + 1:,}: at this rate nothing can be flagged in the low tail unless {beyond:,} rows "
            f"lie beyond all calibration rows (two-sided {2 * beyond:,} in one tail); more calibration rows would lower that."
        )
    if "p_model" in dataset:
        said.append(_of_model(dataset))
    elif reason := str(dataset.attrs["not_simulated"]):
        said.append(f"No p-values by the model: {reason}.")
    said.append(
        "No score can promise that a row is valid: a row of another kind can be as likely under p as the valid ones (the row "
        "that is likeliest of all is hardly ever seen), and p(x) is that of this model, not of the world."
    )
    return said


def _no_comparison(dataset: xr.Dataset, alone: int, needed: int) -> str:
    by = str(dataset.attrs["holes"])
    same = "the same holes" if by == "pattern" else "as many cells"
    words = (
        f"{alone:,} rows are not compared: fewer than {needed} calibration rows have {same}, and p(x) of the cells that are "
        "there is another quantity for other cells."
    )
    return words + (" --holes count compares rows with equally many cells." if by == "pattern" else "")


def _of_model(dataset: xr.Dataset) -> str:
    """Say whether the calibration rows themselves look like draws of the model."""
    made, real = (dataset[f"{name}_log_evidence"].values for name in ("simulated", "calibration"))
    made, real = made[~np.isnan(made)], real[~np.isnan(real)]
    if not made.size or not real.size:
        return "Simulated rows have no value of log p(x): no p-values by the model."
    middle = float((made[:, None] <= np.median(real)).mean())
    return (
        f"p_model is by {made.size:,} rows that the model made: the median calibration row is likelier than {middle:.0%} of "
        "them (50% if the model were right)."
    )
