"""Explain: the effect of each latent on E[x|z], and which latents matter; see `analysis.latents.effects`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from elbowroom.analysis.audit.requested import Methods
from elbowroom.analysis.latents.effects import Cells, curved
from elbowroom.analysis.latents.effects import explain as compute
from elbowroom.analysis.latents.entries import entry_kinds
from elbowroom.analysis.latents.information import information
from elbowroom.errors import SpecError, nearest
from elbowroom.inference.target.of_vae import log_joint_of
from elbowroom.models.likelihoods.categorical import Ordinal
from elbowroom.models.likelihoods.mixed import Mixed
from elbowroom.models.spaces import DISCRETE
from elbowroom.queries import covariates
from elbowroom.queries.answer import Answer
from elbowroom.queries.sample.answer import Samples
from elbowroom.queries.sample.sample import SOURCES, posterior_means, rows_of, tensors
from elbowroom.queries.stream import place_of
from elbowroom.runs.rows import check_row, layout_of, provenance

if TYPE_CHECKING:
    import pandas as pd

    from elbowroom.models.vae import Batch
    from elbowroom.runs.fitted import FittedModel
    from elbowroom.runs.rows import QueryRows

MOST = 1_000  # rows used for rates and the aggregate posterior
NAMED = 8  # most latents named in a sentence


@dataclass(frozen=True, eq=False, repr=False)
class Explained(Answer):
    """The effect of each latent: `answer["plane"]`, `["traversal"]`, `["effect"]`, `["state_x"]`, and `frame()`."""

    def frame(self) -> pd.DataFrame:
        """Return one line per latent, step and column with the effect; without effect curves one line per latent (state)."""
        data = self.dataset
        if "effect" in data:
            names = ["effect_z", "effect", "effect_error", "effect_low", "effect_high"]
            order = ["latent", "step", "cell", *names]
            return data[names].to_dataframe().reset_index()[order]
        if "state_prior" in data:
            names = [str(name) for name in data.data_vars if data[name].dims == ("state",)]
        else:
            names = [str(name) for name in data.data_vars if data[name].dims == ("latent",)]
        return data[names].to_dataframe().reset_index()


def explain(
    run: FittedModel,
    data: Any,
    *,
    datum: int | None,
    latents: Sequence[int] | None,
    others: Any,
    given: Mapping[str, Any] | None,
    points: int,
    steps: int,
    draws: int,
    references: Methods,
    seed: int | None,
    device: str | None,
) -> Explained:
    """Explain the latents; arguments and errors as `Run.explain`."""
    if others not in SOURCES:
        raise SpecError(f"others: unknown source {others!r}{nearest(others, SOURCES)}; one of {', '.join(SOURCES)}")
    for name, value, least in (("points", points, 2), ("steps", steps, 2), ("draws", draws, 20)):
        if value < least:
            raise SpecError(f"{name}: at least {least} are needed, got {value}")
    seed = run.experiment.spec.seed if seed is None else seed
    rows, place = rows_of(run, data), place_of(run, device)
    if datum is not None:
        check_row(datum, rows, "datum")
    told = None if not given else covariates.read(run, None, given)
    vae = run.vae.to(place)
    some = rows.index[np.unique(np.linspace(0, len(rows) - 1, min(MOST, len(rows))).round().astype(int))]
    batch = {name: value.to(place) for name, value in rows.experiment.batch(some).items()}
    beside = None if told is None else tensors(run, told, place)
    base, status = None, ""
    if datum is not None:
        one, means, each = posterior_means(run, rows, [datum], references, seed, place)
        base, status = means[0], each[0]
        if vae.prior.space in DISCRETE:
            base = (base > 0.5).to(base)
        beside = {name: value for name, value in one.items() if name != "x"} if beside is None else beside
    cells = _cells(run, rows, place) if curved(vae.likelihood.event_shape) else None
    found = compute(
        vae, batch, latents=latents, base=base, told=beside, cells=cells, others=others, points=points, steps=steps,
        draws=draws, seed=seed,
    )  # fmt: skip
    carried = information(log_joint_of(vae, batch), seed=seed)
    kept = [name for name in carried.data_vars if "obs_id" not in carried[name].dims and name not in found]
    found = found.merge(carried[kept].drop_vars("obs_id", errors="ignore"), combine_attrs="override")
    found = found.assign_attrs({**provenance(run, rows.dataset), "answers": "explain", "seed": seed, "rows": len(some)})
    if datum is not None:
        found = found.assign_attrs(datum=datum, datum_posterior=status)
    return Explained(found, conclude(found), drawings=_drawings(run, found, carried, batch))


def _cells(run: FittedModel, rows: QueryRows, place: torch.device) -> Cells | None:
    """Return names of the cells that have effect curves."""
    vae, layout = run.vae, layout_of(run)
    few = {name: value[:1].to(place) for name, value in rows.experiment.batch(rows.index[:1]).items() if name != "x"}
    columns = run.experiment.facts.columns if isinstance(vae.likelihood, Mixed) else None
    with torch.no_grad():
        p = vae.decode(torch.zeros(1, vae.prior.latent_dim, dtype=run.experiment.dtype, device=place), **few)
    kinds = entry_kinds(p, columns, ordered=isinstance(vae.likelihood, Ordinal))
    names = Samples.columns_of(run) or [f"x[{j}]" for j in range(vae.likelihood.event_shape[0])]
    levels = {} if layout is None else {name: tuple(found) for name, found in layout.levels.items()}
    return Cells.of(p, names, kinds, levels)


def conclude(found: xr.Dataset) -> list[str]:
    """Say which latents matter, and what the answer describes."""
    order, d = [int(k) for k in np.atleast_1d(found.attrs["order"])], int(found.attrs["latent_dim"])
    rate, total = found["rate"].values, float(found["rate_mean"])
    listed = ", ".join(f"latent {k} {rate[k]:.2f}" for k in order[:NAMED]) + (" and so on" if d > NAMED else "")
    said = [f"Rate in nats per datum, by latent: {listed}; {total:.2f} ± {float(found['rate_se']):.2f} together."]
    if "reach" in found:
        reach, unit = found["reach"].values, "sd of the data" if "cell_sd" in found else "units of the data"
        far = [int(k) for k in np.argsort(-reach, kind="stable")[:NAMED]]
        said.append(
            f"E[x|z] moves along them, from {found.attrs['start']}, by (root mean square per entry, {unit}): "
            f"{', '.join(f'latent {k} {reach[k]:.3g}' for k in far)}."
        )
    for name, what in (
        ("collapsed", "collapsed: x says nothing of"),
        ("ignored", "used by the decoder and ignored by the guide:"),
    ):
        which = found["name"].values[found[name].values.astype(bool)] if name in found else []
        if len(which):
            said.append(f"{what[0].upper()}{what[1:]} {', '.join(map(str, which))}.")
    if "effect" in found:
        said.append(_strongest(found))
    if "state_use" in found:
        use, prior = found["state_use"].values, found["state_prior"].values
        idle = int((use < 0.1 / len(use)).sum())
        top = int(use.argmax())
        said.append(
            f"Of {len(use)} states state {top} is the commonest, in {use[top]:.0%} of the data (prior {prior[top]:.0%}); "
            f"{idle} are hardly used (less than a tenth of an even share)."
        )
    said.append(
        "Latents are coordinates of this fit: another seed may rotate, swap or flip them; what E[x|z] can be does not change."
    )
    return said


def _strongest(found: xr.Dataset) -> str:
    """Name the columns with the largest share of variance of E[x|z] from the most important latent."""
    k = int(np.atleast_1d(found.attrs["order"])[0])
    share = found["share"].sel(latent=k).values
    first = np.argsort(-share, kind="stable")[:3]
    parts = [f"{share[j]:.0%} of {found['cell'].values[j]}" for j in first]
    where = "prior" if found.attrs["others"] == "prior" else "aggregate posterior"
    return f"Of the variance of E[x|z], the others drawn from the {where}, latent {k} alone has {', '.join(parts)}."


def _drawings(run: FittedModel, found: xr.Dataset, carried: xr.Dataset, batch: Batch) -> list[Any]:
    """Return the functions that draw the figures: effects of a table, states, traversals, the plane, information of latents."""
    x = batch["x"].double().cpu().numpy()
    sequence = any(getattr(network, "sequences", False) for network in (run.vae.decoder, run.vae.posterior.encoder))
    columns, standard = Samples.columns_of(run), bool(_standard(run))

    def drawing(name: str) -> Any:
        def draw() -> Any:
            from elbowroom.analysis.plots.queries import effects as plots_explanation
            from elbowroom.analysis.plots.report import information as plots_information

            if name == "information":
                return plots_information.information(carried)
            return getattr(plots_explanation, name)(found, x, columns, sequence=sequence, standard=standard)

        return draw

    names = [
        *(["effects"] if "effect" in found else []),
        *(["states"] if "state_x" in found else []),
        *(["traversals"] if "traversal" in found else []),
        *(["plane"] if found.attrs["space"] not in DISCRETE else []),
        "information",
    ]
    return [drawing(name) for name in names]


def _standard(run: FittedModel) -> bool:
    from elbowroom.analysis.latents.decoding import is_standard

    return is_standard(run.vae)
