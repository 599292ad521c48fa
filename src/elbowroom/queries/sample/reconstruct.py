r"""Reconstruct: replicates of observed rows, x_rep ~ p(x|z), z ~ p(z|x), by the best posterior of each row.

    E[x_rep | x] = E_{p(z|x)} E[x|z],        interval: quantiles of x_rep

x_rep is a new draw of x with the same z. Since the row itself determined the posterior of z, intervals contain more of its
cells than their level. The computation is that of `impute`, applied to every observed cell.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elbowroom.analysis.audit.requested import Methods
from elbowroom.analysis.measures.table import GOOD_K, TRUSTED
from elbowroom.errors import SpecError
from elbowroom.models.likelihoods.multinomial import Multinomial
from elbowroom.queries.answer import Form
from elbowroom.queries.impute.answer import Imputed
from elbowroom.queries.impute.cells import Entries, sequential
from elbowroom.queries.impute.impute import check_level, imputer
from elbowroom.queries.stream import described, references_for, stream
from elbowroom.runs.rows import QueryRows

if TYPE_CHECKING:
    import torch

    from elbowroom.analysis.plots.style import Absent, Plot
    from elbowroom.queries.stream import Report
    from elbowroom.runs.fitted import FittedModel


SAID = {  # replaces texts of `impute`
    "uniform where p(x|x_obs) is right": "narrower than uniform, as the row itself has told which z",
    "completed rows: draws of the missing cells together, what was seen as it was": "draws of x_rep",
    "what a completed row has": "a reconstructed row",
    "the value that was hidden": "the row itself",
    "hidden value": "value",
    "missing cells": "observed cells",
    "given what was seen": "",
    "x_obs": "row",
}


def reconstruct(
    run: FittedModel,
    rows: QueryRows,
    asked_with: tuple[Any, Form],
    *,
    level: float,
    samples: int,
    draws: int,
    keep: int,
    references: Methods,
    seed: int,
    place: torch.device,
    report: Report | None = None,
    out: Path | None = None,
    resume: bool = False,
) -> Imputed:
    """Reconstruct every observed cell of some rows; see `Run.sample`."""
    check_level(level, keep)
    data, form = asked_with
    if isinstance(run.vae.likelihood, Multinomial):
        raise SpecError(
            "sample: under multinomial the entries of a row share their total, and are not reconstructed one by one"
        )
    entries = Entries.of(run, rows)
    methods = references_for(run, rows, references, place)
    options = {
        "references": described(methods),
        "level": level,
        "samples": samples,
        "draws": draws,
        "keep": keep,
    }
    keep = max(keep, samples)
    compute = imputer(run, entries, methods, level=level, draws=draws, keep=keep, samples=samples, replicate=True)
    found = stream(
        run, rows, compute, question="reconstruct", options=options, seed=seed, device=place, out=out, resume=resume,
        report=report,
    )  # fmt: skip
    found = found.assign_attrs(answers="sample", source="posterior", level=level)
    for variable in found.data_vars.values():
        for ours, theirs in SAID.items():
            variable.attrs["long_name"] = variable.attrs["long_name"].replace(ours, theirs)
    if form.index is not None:
        form = replace(form, index=form.index[rows.index])
    given = data if not isinstance(data, str) or Path(data).exists() else None
    answer = Imputed(found, (), form, entries=entries, original=rows.dataset, given=given, rows=rows.index)
    return replace(answer, said=conclude(answer), drawings=[_drawing(answer, sequence=sequential(run))])


def _drawing(answer: Imputed, *, sequence: bool) -> Callable[[], Plot | Absent]:
    def draw() -> Plot | Absent:
        from elbowroom.analysis.plots.queries import samples as plots_samples

        return plots_samples.reconstructions(answer.dataset, answer.entries.shape, answer.entries.names, sequence=sequence)

    return draw


def conclude(answer: Imputed) -> list[str]:
    """Say how close the reconstructions are, and how reliable they are."""
    data, status = answer.dataset, answer.dataset["status"].values
    n, level = len(status), float(data.attrs["level"])
    sources = ", ".join(f"{name} at {count:,}" for name, count in Counter(data["source"].values.tolist()).most_common())
    good, left = int(np.isin(status, TRUSTED).sum()), int((status == "amortized").sum())
    said = [
        f"Reconstructions of {n:,} rows; draws of p(z|x): {sources}; {good:,} rows are exact or certified, "
        f"{n - good - left:,} are reweighted draws of the encoder, {left:,} its own draws (k-hat above {GOOD_K})."
    ]
    truth, low, high = (answer._flat(name) for name in ("truth", "low", "high"))
    inside = np.where(np.isnan(truth) | np.isnan(low), np.nan, (low <= truth) & (truth <= high))
    if np.isfinite(inside).any():
        rows = np.nanmean(inside[np.isfinite(inside).any(1)], axis=1)
        error = rows.std(ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
        share = float(np.nanmean(inside))
        verdict = (
            "more than their level is usual: each row has told which z, and whole numbers push the ends out"
            if share >= level - 2 * error
            else "less than their level: p(x|z) is too narrow for these rows"
        )
        said.append(f"{level:.0%} intervals hold {share:.1%} ± {error:.1%} of the cells they were drawn from; {verdict}.")
    return said
