"""Integrate: p(x) of one row, by naive Monte Carlo, the encoder, a refitted normal, and annealing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from elbowroom.analysis.queries.integration import integrate as compute
from elbowroom.inference.target.of_vae import log_joint_of
from elbowroom.queries.answer import Answer
from elbowroom.queries.stream import place_of
from elbowroom.runs.rows import check_row, provenance, query_rows

if TYPE_CHECKING:
    from elbowroom.analysis.plots.style import Plot
    from elbowroom.runs.fitted import FittedModel


def integrate(
    run: FittedModel, data: Any, datum: int | None, *, seed: int | None, device: str | None, **options: Any
) -> Answer:
    """Integrate p(x) of one row of the data; arguments and errors as `Run.integrate`."""
    from elbowroom.queries.answer import Form

    given, _ = Form.of(data)
    rows = query_rows(run, given)
    row = int(rows.index[0]) if datum is None else datum
    check_row(row, rows, "datum")
    place = place_of(run, device)
    batch = {name: value.to(place) for name, value in rows.experiment.batch(np.array([row])).items()}
    seed = run.experiment.spec.seed if seed is None else seed
    found = compute(log_joint_of(run.vae.to(place), batch), seed=seed, **options)
    found = found.assign_attrs({**provenance(run, rows.dataset), "datum": row, "answers": "integrate"})
    from elbowroom.analysis.plots.queries.integration import caption, integration

    draw: partial[Plot] = partial(integration, found)
    return Answer(found, [caption(found)], drawings=(draw,))
