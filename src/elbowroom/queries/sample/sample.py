r"""Generate: draws of the joint p(x, z), and of p(x|z) where z comes from data.

    prior         z ~ p(z),                              x ~ p(x|z):   the model itself
    aggregate     z ~ q(z|x_i), x_i a training row,      x ~ p(x|z):   the decoder where the encoder places the data
    interpolation z = (1 - t) E[z|x_i] + t E[z|x_j],     x ~ p(x|z)
    data          z ~ p(z|x_i), the best available,      x ~ p(x|z):   posterior predictive reconstructions

A test says whether draws look like data: see `analysis.checks.two_sample`. Where draws from the prior are easier to tell from
held-out data than draws from the aggregate, the prior has mass where no datum is encoded (holes). A difference that both show
is due to the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from elbowroom.analysis.audit.requested import Methods
from elbowroom.analysis.checks.two_sample import LEAST, TwoSample, difference, tell_apart
from elbowroom.analysis.latents.decoding import draw_prior, event_dims
from elbowroom.analysis.queries.best_posterior import read
from elbowroom.errors import SpecError, UserError, nearest
from elbowroom.inference.randomness import seeded
from elbowroom.inference.target.of_vae import log_joint_of
from elbowroom.models.spaces import DISCRETE
from elbowroom.models.sphere import great_circle
from elbowroom.queries import covariates as conditions
from elbowroom.queries.answer import Form
from elbowroom.queries.sample.answer import Compared, Samples, conclude, conclude_test
from elbowroom.queries.stream import place_of, references_for
from elbowroom.runs.rows import Part, QueryRows, check_row, own_rows, provenance, query_rows
from elbowroom.system.memory import slices
from elbowroom.system.stages import stage

if TYPE_CHECKING:
    from elbowroom.models.vae import Batch
    from elbowroom.queries.answer import Answer
    from elbowroom.queries.stream import Report
    from elbowroom.runs.fitted import FittedModel

SOURCES = ("prior", "aggregate")
DEFAULT = 100  # draws
BLOCK = 4_096  # rows decoded at once
TESTED = 1_000  # rows of each sample of the two-sample test
TEST_STEP = 86_028_157  # between the seeds of draws and of the test
WORDS: dict[str, tuple[str, str]] = {
    "z": ("latent units", "draws of z"),
    "x": ("units of the data", "draws of p(x|z)"),
    "mean": ("units of the data", "E[x|z]; the likeliest category, the median of ordered codes"),
    "row": ("", "the training row whose posterior z is drawn from"),
    "auc": ("1", "probability that a classifier takes a draw for more draw-like than a datum; 1/2: cannot be told apart"),
    "auc_se": ("1", "standard error of auc"),
    "p_value": ("1", "of draws and held-out data having one distribution"),
}


def ask(
    run: FittedModel,
    n: int | None,
    *,
    source: str,
    interpolate: Sequence[int] | None,
    steps: int,
    data: Any,
    covariates: Any,
    given: Mapping[str, Any] | None,
    test: bool | int,
    level: float,
    samples: int,
    references: Methods,
    draws: int,
    keep: int,
    seed: int | None,
    device: str | None,
    report: Report | None,
    out: Path | None,
    resume: bool,
) -> Answer:
    """Generate; arguments and errors as `Run.sample`."""
    seed = run.experiment.spec.seed if seed is None else seed
    if source not in SOURCES:
        raise SpecError(f"from: unknown source {source!r}{nearest(source, SOURCES)}; one of {', '.join(SOURCES)}")
    if data is not None or interpolate is not None:
        if covariates is not None or given:
            raise SpecError("covariates: rows of data have their own; leave --covariates and --given out")
        if source != "prior":
            raise SpecError("from: with rows of data z comes from their posteriors; leave --from out")
        rows, place = rows_of(run, data), place_of(run, device)
        if interpolate is not None:
            if n is not None:
                raise SpecError("n: an interpolation has --steps; leave --n out")
            return interpolation(run, rows, interpolate, steps=steps, references=references, seed=seed, place=place)
        from elbowroom.queries.sample.reconstruct import reconstruct

        if n is not None:
            rows = replace(rows, index=rows.index[:n])
        return reconstruct(
            run, rows, Form.of(data), level=level, samples=samples, draws=draws, keep=keep, seed=seed, place=place,
            references=references, report=report, out=out, resume=resume,
        )  # fmt: skip
    return generate(run, n, source, covariates, given, test=test, seed=seed, place=place_of(run, device))


def rows_of(run: FittedModel, data: Any) -> QueryRows:
    """Return the user's rows, or those of a part of the run's own split: `train`, `validation` or `test`."""
    if data is None or (isinstance(data, str | Path) and str(data) in get_args(Part) and not Path(data).exists()):
        return query_rows(run, part="test" if data is None else str(data))
    return query_rows(run, Form.of(data)[0])


@dataclass(frozen=True)
class _Drawn:
    z: Tensor
    x: Tensor
    mean: Tensor
    row: np.ndarray | None = None


def generate(
    run: FittedModel,
    n: int | None,
    source: str,
    covariates: Any,
    given: Mapping[str, Any] | None,
    *,
    test: bool | int,
    seed: int,
    place: torch.device,
) -> Samples:
    """Draw (z, x), and test for each source whether its draws can be distinguished from held-out data."""
    free = source == "aggregate" and covariates is None and not given
    beside = None if free else conditions.read(run, covariates, given, seed=seed)
    listed = 1 if beside is None or isinstance(covariates, str) else max(len(value) for value in beside.values())
    n = (listed if listed > 1 else DEFAULT) if n is None else n
    if n < 1:
        raise SpecError(f"n: at least 1 draw is needed, got {n}")
    drawn = _draw(run, source, n, None if beside is None else tensors(run, beside, place), seed, place)
    dims = ("sample", *_event(run))
    numpy = lambda tensor: tensor.cpu().numpy()
    columns: dict[str, Any] = {
        "z": (("sample", "latent"), numpy(drawn.z)),
        "x": (dims, numpy(drawn.x)),
        "mean": (dims, numpy(drawn.mean)),
    }
    if drawn.row is not None:
        columns["row"] = ("sample", drawn.row)
    if beside is not None:
        columns |= _told(run, beside, n)
    dataset = xr.Dataset({name: (*value, _about(name)) for name, value in columns.items()}, coords=_names(run))
    said, compared = [_what(run, source, n)], None
    if test:
        result = compare(run, seed=seed + TEST_STEP, place=place, most=TESTED if test is True else int(test))
        if isinstance(result, str):
            said.append(result)
        else:
            compared, dataset = result, dataset.merge(result.table)
            said += conclude_test(result.table)
    dataset = dataset.assign_attrs({**provenance(run, None), "answers": "sample", "source": source, "seed": seed})
    return Samples.of(run, dataset, said, compared)


@stage("draws")
def _draw(run: FittedModel, source: str, n: int, beside: Batch | None, seed: int, place: torch.device) -> _Drawn:
    """Draw z from the prior or the aggregate posterior and x from p(x|z), in blocks."""
    rows = None
    if source == "aggregate":
        index = own_rows(run, "train").index
        generator = np.random.default_rng(seed)
        turns = [generator.permutation(index) for _ in range(-(-n // len(index)))]
        rows = np.concatenate(turns)[:n]
    vae, parts = run.vae.to(place), []
    with torch.no_grad(), seeded(seed):
        for some in slices(n, BLOCK):
            turn = np.arange(some.start, some.stop)
            own: Batch = {}
            if rows is None:
                told = {} if beside is None else _cycled(beside, turn)
                z = draw_prior(vae, len(turn), told)
            else:
                batch = {name: value.to(place) for name, value in run.experiment.batch(rows[turn]).items()}
                own = {name: value for name, value in batch.items() if name != "x"}
                told = own if beside is None else _cycled(beside, turn)
                arguments: dict[str, Any] = {**batch}
                z = vae.guide(**arguments)
            p = vae.decode(z, **told)
            parts.append((z, p.sample(), vae.likelihood.centre(p)))
    z, x, mean = (torch.cat(part) for part in zip(*parts, strict=True))
    return _Drawn(z, x, mean, rows)


def _cycled(beside: Batch, turn: np.ndarray) -> Batch:
    return {name: value[torch.as_tensor(turn % len(value), device=value.device)] for name, value in beside.items()}


def tensors(run: FittedModel, beside: Mapping[str, np.ndarray], place: torch.device) -> Batch:
    """Return covariates and exposure of draws as tensors."""
    return {name: torch.from_numpy(value).to(place, run.experiment.dtype) for name, value in beside.items()}


def _told(run: FittedModel, beside: Mapping[str, np.ndarray], n: int) -> dict[str, Any]:
    """Return covariates and exposure of the draws as variables."""
    turn = np.arange(n)
    found: dict[str, Any] = {}
    if "covariates" in beside:
        found["covariates"] = (("sample", "covariate"), beside["covariates"][turn % len(beside["covariates"])])
    if "exposure" in beside:
        found["exposure"] = ("sample", beside["exposure"][turn % len(beside["exposure"])])
    return found


def _event(run: FittedModel) -> tuple[str, ...]:
    return ("column",) if Samples.columns_of(run) else event_dims(run.vae)


def _names(run: FittedModel) -> dict[str, Any]:
    columns, covariates = Samples.columns_of(run), run.experiment.facts.covariates
    return ({"column": list(columns)} if columns else {}) | ({"covariate": list(covariates)} if covariates else {})


def _about(name: str) -> dict[str, str]:
    units, words = WORDS.get(name, ("", name))
    return {"units": units, "long_name": words}


def _what(run: FittedModel, source: str, n: int) -> str:
    where = "the prior p(z)" if source == "prior" else "the aggregate posterior: q(z|x) at random training rows"
    return f"{n:,} draws of (z, x): z from {where}, x from p(x|z). `mean` is E[x|z]: smoother than any datum, and no draw."


def compare(run: FittedModel, *, seed: int, place: torch.device, most: int = TESTED) -> Compared | str:
    """Test draws from the prior and from the aggregate posterior against held-out data.

    Draws have the covariates and the missing cells of held-out rows. If there are any, these are other rows than the data of
    the comparison, so that all rows are independent.

    Returns:
        The tests; or a sentence that says why there are none.
    """
    try:
        held = own_rows(run, "test")
    except UserError as refused:  # draws of the prior do not need data, so this is not an error
        return f"No two-sample test: {refused}"
    batch = {name: value.to(place) for name, value in held.experiment.batch(held.index[: 2 * most]).items()}
    paired = len(batch) > 1 or bool(batch["x"].isnan().any())
    count = min(most, len(batch["x"]) // 2 if paired else len(batch["x"]))
    if count < LEAST:
        return f"No two-sample test: it needs {LEAST * (2 if paired else 1)} held-out rows, there are {len(batch['x'])}."
    data = {name: value[:count] for name, value in batch.items()}
    like = {name: value[count : 2 * count] if paired else value[:count] for name, value in batch.items()}
    told = {name: value for name, value in like.items() if name != "x"}
    seen, found = {"data": data["x"].cpu().numpy()}, dict[str, TwoSample]()
    for number, source in enumerate(SOURCES):
        x = _draw(run, source, count, told or None, seed + number, place).x
        x = torch.where(like["x"].isnan(), torch.nan, x.to(like["x"].dtype))
        seen[source] = x.cpu().numpy()
        found[source] = tell_apart(_features(data["x"], data), _features(x, like), seed=seed)
    gap, error = difference(found["prior"], found["aggregate"])
    columns: dict[str, Any] = {
        "auc": ("source", [found[s].auc for s in SOURCES]),
        "auc_se": ("source", [found[s].se for s in SOURCES]),
        "p_value": ("source", [found[s].p_value for s in SOURCES]),
    }
    table = xr.Dataset({name: (*value, _about(name)) for name, value in columns.items()}, coords={"source": list(SOURCES)})
    table["auc_difference"] = ((), gap, {"units": "1", "long_name": "auc of the prior - auc of the aggregate posterior"})
    table["auc_difference_se"] = ((), error, {"units": "1", "long_name": "standard error of auc_difference"})
    table["tested"] = ((), count, {"units": "1", "long_name": "held-out rows, and as many draws of each source"})
    return Compared(table, seen)


def _features(x: Tensor, batch: Batch) -> np.ndarray:
    """Return the input of the classifier: x flattened, covariates and exposure."""
    beside = [batch[name].reshape(len(x), -1) for name in ("covariates", "exposure") if name in batch]
    return torch.cat([x.flatten(1), *beside], 1).double().cpu().numpy()


def interpolation(
    run: FittedModel, rows: QueryRows, ends: Sequence[int], *, steps: int, references: Methods, seed: int, place: torch.device
) -> Samples:
    """Decode points on the line between the posterior means of two rows; on a sphere on the great circle."""
    if len(ends) != 2:
        raise SpecError(f"interpolate: two rows are needed, got {len(ends)}")
    if steps < 2:
        raise SpecError(f"steps: at least 2 are needed, got {steps}")
    for row in ends:
        check_row(row, rows, "interpolate")
    vae = run.vae.to(place)
    if vae.prior.space in DISCRETE:
        raise SpecError(f"interpolate: z is {vae.prior.space}, with nothing between its values; see `explain` for each of them")
    batch, means, each = posterior_means(run, rows, ends, references, seed, place)
    t = torch.linspace(0, 1, steps).to(means)
    between = lambda a, b: a + t.reshape(-1, *[1] * a.dim()) * (b - a)
    z = great_circle(means[0], means[1], t) if vae.prior.space == "sphere" else between(means[0], means[1])
    told = {name: between(value[0], value[1]) for name, value in batch.items() if name != "x"}
    with torch.no_grad(), seeded(seed):
        p = vae.decode(z, **told)
        x, mean = p.sample(), vae.likelihood.centre(p)
    dims, numpy = ("sample", *_event(run)), lambda tensor: tensor.cpu().numpy()
    columns: dict[str, Any] = {
        "t": ("sample", numpy(t)),
        "z": (("sample", "latent"), numpy(z)),
        "x": (dims, numpy(x)),
        "mean": (dims, numpy(mean)),
    }
    dataset = xr.Dataset({name: (*value, _about(name)) for name, value in columns.items()}, coords=_names(run))
    dataset["t"].attrs = {"units": "1", "long_name": f"place between row {ends[0]} (0) and row {ends[1]} (1)"}
    status = ", ".join(f"row {row}: {words}" for row, words in zip(ends, each, strict=True))
    about = {"answers": "sample", "source": "interpolation", "seed": seed, "rows": list(ends)}
    if vae.prior.space == "sphere":
        about["path"] = "great circle between the directions of the posterior means"
    dataset = dataset.assign_attrs({**provenance(run, rows.dataset), **about})
    return Samples.of(run, dataset, conclude(dataset, status), ends=numpy(batch["x"]))


def posterior_means(
    run: FittedModel, rows: QueryRows, which: Sequence[int], references: Methods, seed: int, place: torch.device
) -> tuple[Batch, Tensor, list[str]]:
    """Return rows as a batch, their means (n, d) under the best posterior of each, and the sources of these posteriors."""
    vae, dtype = run.vae.to(place), run.experiment.dtype
    batch = {name: value.to(place) for name, value in rows.experiment.batch(np.array(which)).items()}
    found = read(log_joint_of(vae, batch), references_for(run, rows, references, place), keep=1_000, seed=seed)
    means = found.posterior.sites["z"].flatten(0, 1).to(place, dtype).mean(0)
    best = found.posterior.mean
    if vae.prior.space == "real" and vae.prior.sites == ("z",) and best is not None and best.shape == means.shape:
        means = best.to(place, dtype)  # analytic, without Monte Carlo noise
    each = [f"{source}, {status}" for source, status in zip(found.source, found.posterior.status, strict=True)]
    return batch, means, each
