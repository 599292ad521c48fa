"""Follow the advice of an audit: fit again, audit the same data again, and compare.

There are two ways, which answer different questions.

* Frozen (the default): prior, decoder and likelihood stay as they are, bit for bit, and only the guide is trained. log p(x)
  cannot change. Since gap = log p(x) - ELBO = KL(q(z|x) || p(z|x)), a smaller gap means a better q for the same p.
* Retrained: everything is trained anew under the changed spec. This gives another p with other posteriors; for example, a
  decoder that ignores z has no gap at all. A smaller gap is an improvement only if held-out log p(x) does not fall.

The comparison is paired by datum. Cremer, Li and Duvenaud 2018, https://arxiv.org/abs/1801.03558.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from elbowroom.analysis.measures.population import population, sampled
from elbowroom.analysis.measures.table import GOOD_K, column
from elbowroom.analysis.verdict.summary import interval, mean_in_words
from elbowroom.analysis.verdict.thresholds import bad_k, known, mean_se, median
from elbowroom.errors import RunFolderError
from elbowroom.inference.fit.warm_start import GUIDE
from elbowroom.runs import auditing, fitting
from elbowroom.runs.advice import Changes, audited, propose
from elbowroom.system.files import locked

if TYPE_CHECKING:
    from elbowroom.analysis.audit.budget import Progress
    from elbowroom.inference.fit.plan import Schedule
    from elbowroom.inference.fit.record import Row
    from elbowroom.runs.fitted import FittedModel

ERRORS, ROUNDING = 4.5, 1e-3  # standard errors and nats by which two estimates of the same log p(x) may differ


def improve(
    run: FittedModel,
    *,
    retrain: bool = False,
    out: str | Path | None = None,
    set: Iterable[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    budget: float | str | None = None,
    report: Callable[[Schedule, Row], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    allow_python: bool = False,
) -> Improvement:
    """Follow an audit's advice in a new run folder, audit the same data, and compare; the old run is not changed.

    Args:
        run: an audited run.
        retrain: as in `propose`.
        out: as in `propose`.
        set: as in `propose`.
        overwrite: rename an existing run in the new folder first.
        resume: continue an existing fit or audit.
        budget: time that the audit may take.
        report: called as report(plan, row) after each epoch.
        progress: called before each piece of work of the audit.
        allow_python: as in `Experiment.load`.

    Raises:
        UserError: as `propose` and `check` before anything is written; later as `fit` and `Run.audit`.
    """
    proposal = propose(run, retrain=retrain, out=out, set=set, budget=budget, allow_python=allow_python)
    return carry_out(run, proposal, overwrite=overwrite, resume=resume, report=report, progress=progress)


def carry_out(
    run: FittedModel,
    proposal: Changes,
    *,
    overwrite: bool = False,
    resume: bool = False,
    report: Callable[[Schedule, Row], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Improvement:
    """Fit and audit a proposal, write its report, and compare it with the old run; arguments as `improve`."""
    check(run, proposal, overwrite=overwrite, resume=resume)
    before, path = audited(run), proposal.out
    with locked(path):
        fitted = fitting.fit(proposal.experiment, path, overwrite=overwrite, resume=resume, report=report)
        after = auditing.audit(fitted, progress=progress, resume=resume)
        auditing.report(fitted)
    return Improvement(run, fitted, before, after.table, proposal)


def check(run: FittedModel, proposal: Changes, *, overwrite: bool = False, resume: bool = False) -> None:
    """Check everything that `carry_out` needs, and write nothing; a UserError if folder or experiment cannot be used."""
    new, old = proposal.out.resolve(), run.path.resolve()
    where = "is" if new == old else "lies in" if new.is_relative_to(old) else "holds" if old.is_relative_to(new) else None
    if where is not None:
        raise RunFolderError(
            f"{proposal.out}: {where} the run that is to be improved, {run.path}, which is kept; name another with --out"
        )
    fitting.ready(proposal.experiment, proposal.out, overwrite=overwrite, resume=resume)


@dataclass(frozen=True, eq=False)
class Improvement:
    """A run before and after its improvement, audited on the same data.

    Attributes:
        old: the run before.
        run: the run after, in its own folder.
        before: the table of the old audit, over `obs_id`.
        after: the table of the new audit.
        proposal: what was changed and why.
    """

    old: FittedModel
    run: FittedModel
    before: xr.Dataset
    after: xr.Dataset
    proposal: Changes

    @property
    def same_model(self) -> bool:
        """Whether prior, decoder and likelihood are the same, bit for bit."""
        states = [
            {name: value.cpu() for name, value in run.vae.state_dict().items() if not name.startswith(GUIDE)}
            for run in (self.old, self.run)
        ]
        return states[0].keys() == states[1].keys() and all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    def difference(self) -> tuple[float, float, int]:
        """Return the mean of log p(x) after - before over data where both are known, its standard error, and their number."""
        d = self._paired("log_evidence")
        return *mean_se(d), int(d.size)

    def removed(self) -> float:
        """Return by which share the median gap fell, over data whose gap is known in both audits."""
        before, after = (float(np.median(part)) if part.size else math.nan for part in self._both("gap_total"))
        return 1 - after / before if before > 0 else math.nan

    def lines(self) -> list[tuple[str, ...]]:
        """Return the rows (quantity, before, after) of the table."""
        tables = self._shared()
        rows: list[tuple[str, ...]] = [
            ("gap [nats], median (95 % interval)", *(_interval(part) for part in self._both("gap_total")))
        ]
        if any(sampled(table) is not table for table in (self.before, self.after)):
            found = [population(table).sel(quantity="gap_total") for table in (self.before, self.after)]
            rows.append(("mean gap of all data [nats], 95 %", *map(interval, found)))
        for name in ("amortization", "covariance", "shape"):
            rows.append((f"  {name}, median", *(_median(part) for part in self._both(f"gap_{name}"))))
        rows.append(("mean ELBO [nats]", *(mean_in_words(part) for part in self._both("elbo"))))
        rows.append(("mean log p(x) [nats], held out", *(mean_in_words(part) for part in self._both("log_evidence"))))
        mean, error, n = self.difference()
        rows.append((f"  paired difference, {n} data", "", f"{mean:+.3f} +- {error:.3f}" if n else "not available"))
        rows.append(("exact or certified", *(f"{int(known(t).sum())} of {t.sizes['obs_id']}" for t in tables)))
        rows.append(
            (f"k-hat > {GOOD_K}", *(f"{bad} of {t.sizes['obs_id']}" for bad, t in zip(self._bad_k(), tables, strict=True)))
        )
        return rows

    def verdict(self) -> list[str]:
        """Return the conclusions, in sentences."""
        said = [self._data(), self._gap(), self._retrained() if self.proposal.retrain else self._frozen(), self._tails()]
        return [sentence for sentence in said if sentence]

    def tree(self) -> dict[str, Any]:
        """Return everything as dictionaries, lists and scalars (`--json`)."""
        mean, error, n = self.difference()
        medians = {}
        for name in ("gap_total", "gap_amortization", "gap_covariance", "gap_shape"):
            medians[name] = [dict(zip(("median", "lower", "upper"), median(part), strict=True)) for part in self._both(name)]
        return {
            "run": str(self.old.path),
            "improved": str(self.run.path),
            "retrained": self.proposal.retrain,
            "changes": [change._asdict() for change in self.proposal.changes],
            "table": [list(row) for row in self.lines()],
            "gaps": {name: {"before": _plain(b), "after": _plain(a)} for name, (b, a) in medians.items()},
            "removed": _number(self.removed()),
            "log_evidence_difference": {"mean": _number(mean), "se": _number(error), "data": n},
            "same_model": self.same_model,
            "verdict": self.verdict(),
        }

    def __repr__(self) -> str:
        rows = "\n".join(f"  {name:<36}{before:<26}{after}" for name, before, after in self.lines())
        head = f"  {'':<36}{'before':<26}after"
        return "\n".join([f"{self.old.path} -> {self.run.path}", head, rows, *self.verdict()])

    def _shared(self) -> tuple[xr.Dataset, xr.Dataset]:
        """Return both tables, restricted to the data of both audits."""
        before, after = sampled(self.before), sampled(self.after)  # random samples, where a budget cut the audits short
        both = np.intersect1d(before["obs_id"].values, after["obs_id"].values)
        return before.sel(obs_id=both), after.sel(obs_id=both)

    def _bad_k(self) -> tuple[int, int]:
        """Return how many of the shared data have a k-hat that is too large or unknown, before and after."""
        before, after = self._shared()
        return bad_k(before), bad_k(after)

    def _data(self) -> str:
        """Say which data are compared, if the audits are of different data."""
        tables = (sampled(self.before), sampled(self.after), self._shared()[0])
        old, new, shared = (table.sizes["obs_id"] for table in tables)
        return "" if old == new == shared else f"Compared are the {shared} data of both audits ({old} before, {new} after)."

    def _both(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a column before and after, for data that are certified and have a value in both audits."""
        both = _common(self.before, self.after)
        a, b = (column(table.sel(obs_id=both), name) for table in (self.before, self.after))
        if np.isnan(a).all() or np.isnan(b).all():  # for example the parts of a gap under a guide that is not normal
            return a[~np.isnan(a)], b[~np.isnan(b)]
        there = ~np.isnan(a) & ~np.isnan(b)
        return a[there], b[there]

    def _paired(self, name: str) -> np.ndarray:
        before, after = self._both(name)
        return after - before if before.shape == after.shape else np.empty(0)

    def _gap(self) -> str:
        fell = self._paired("gap_total")
        if not fell.size:
            return "The gap is known for none of the data in both audits: nothing can be said of it."
        share = self.removed()
        (middle, _, _), (old, _, _) = median(self._both("gap_total")[1]), median(self._both("gap_total")[0])
        what = f"{share:.0%} of it is gone" if share > 0 else "none of it is gone"
        return f"Median gap {old:.3f} -> {middle:.3f} nats: {what}; it fell at {int((fell < 0).sum())} of {fell.size} data."

    def _frozen(self) -> str:
        if not self.same_model:
            return "The model is NOT the same in the two runs: compare them as after retraining."
        both = _common(self.before, self.after)
        d = self._paired("log_evidence")
        if not d.size:
            return "The model is the same, bit for bit; log p(x) is known for none of the data in both audits."
        error = np.hypot(*(np.nan_to_num(column(t.sel(obs_id=both), "log_evidence_se")) for t in (self.before, self.after)))
        wrong = int((np.abs(d) > ERRORS * error + ROUNDING).sum())
        largest = float(np.abs(d).max())
        if wrong:
            return (
                f"The model is the same, bit for bit, but log p(x) of {wrong} of {d.size} data differs by more than the stated "
                f"errors (largest difference {largest:.2g} nats): the references are not to be relied on there."
            )
        return (
            "The model is the same, bit for bit, and so is log p(x) within its numerical error, as it must be (largest "
            f"difference {largest:.1g} nats): what changed is q alone, a smaller gap is a better q for the same p."
        )

    def _retrained(self) -> str:
        mean, error, n = self.difference()
        if not n:
            return "This is another p, and log p(x) is known for none of the data in both audits: gaps alone say nothing here."
        said = f"This is another p: mean held-out log p(x) changed by {mean:+.3f} +- {error:.3f} nats ({n} data, paired)"
        smaller = self.removed() > 0
        if mean < -2 * error:
            return f"{said}: it FELL. A smaller gap is no gain here: it was bought with a worse model."
        if mean > 2 * error:
            end = "and the smaller gap good news" if smaller else "though the gap did not shrink: improve its guide next"
            return f"{said}: it rose, so the model is better, {end}."
        end = ", so a smaller gap is good news" if smaller else ""
        return f"{said}, no more than noise{end}."

    def _tails(self) -> str:
        old, new = self._bad_k()
        if new <= old:
            return ""
        return (
            f"k-hat exceeds {GOOD_K} at {new} data, {old} before: its weights p / q have heavier tails. To draw importance "
            "samples from it, look at guide.family = flow or an objective such as iwae."
        )


def _common(before: xr.Dataset, after: xr.Dataset) -> np.ndarray:
    """Return the labels of data that are certified in both audits."""
    labels = [table["obs_id"].values[known(table)] for table in (sampled(before), sampled(after))]
    return np.intersect1d(*labels)


def _interval(values: np.ndarray) -> str:
    middle, low, high = median(values)
    return "not available" if math.isnan(middle) else f"{middle:.3f} ({low:.3f} to {high:.3f})"


def _median(values: np.ndarray) -> str:
    return f"{np.median(values):.3f}" if values.size else "not available"


def _number(value: float) -> float | None:
    """Return None for values that are not finite, which JSON cannot hold."""
    return float(value) if math.isfinite(value) else None


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}
