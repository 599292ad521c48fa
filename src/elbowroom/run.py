"""A run: the object that `fit` returns and `Run.load` opens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elbowroom.analysis.audit.auditor import Audit
from elbowroom.analysis.audit.budget import Progress
from elbowroom.analysis.audit.plan import Plan as AuditPlan
from elbowroom.inference.fit.plan import Schedule
from elbowroom.inference.fit.record import Row
from elbowroom.queries.questions import Questions
from elbowroom.runs import auditing, fitting
from elbowroom.runs.fitted import FittedModel
from elbowroom.spec.experiment import Experiment

if TYPE_CHECKING:
    import pandas as pd

    from elbowroom.runs.improve import Improvement


def fit(
    experiment: Experiment | str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    report: Callable[[Schedule, Row], None] | None = None,
    allow_python: bool = False,
) -> Run:
    """Fit an experiment into a run folder.

    Everything is checked before the folder is made, so that wrong input leaves no files.

    Args:
        experiment: the experiment, or the path of its spec.
        out: the run folder; `runs/<name of the spec>` by default.
        overwrite: rename an existing run folder (to `<out>.1`) first.
        resume: continue an existing run; start a new one if there is none.
        report: called as report(plan, row) after each epoch.
        allow_python: as in `Experiment.load`, for the path of a spec.

    Returns:
        The fitted run.

    Raises:
        UserError: the spec, the data or the folder cannot be used, or the loss is not finite.
    """
    model = fitting.fit(experiment, out, overwrite=overwrite, resume=resume, report=report, allow_python=allow_python)
    return Run.of(model)


class Run(Questions, FittedModel):
    """A fitted experiment in its folder, with methods to audit it, improve it and query it.

    Attributes:
        path: the folder.
        experiment: the experiment.
        vae: the VAE with its best weights, in eval mode.
        summary: a sentence about the fit; empty for a run that was loaded.

    Example:
        >>> import elbowroom as er
        >>> run = er.Run.load("runs/digits")  # doctest: +SKIP
        >>> run.audit().verdict  # doctest: +SKIP
    """

    @classmethod
    def of(cls, model: FittedModel) -> Run:
        """Give a fitted model the methods of a run."""
        return cls(model.path, model.experiment, model.vae, model.summary)

    def audit(
        self,
        data: str | Path | np.ndarray | pd.DataFrame | None = None,
        *,
        out: str | Path | None = None,
        device: str | None = None,
        progress: Callable[[Progress], None] | None = None,
        budget: float | str | None = None,
        resume: bool = False,
    ) -> Audit:
        """Compare the guide with reference posteriors for each datum, and write the results.

        Finished parts are kept in `parts/` until the audit is complete, so that `resume` can continue an interrupted audit.

        Args:
            data: a file, an array (N, *event) or a frame to audit; by default the test split of the run.
            out: the output folder; by default the run folder, for other data `audits/<name>` in it.
            device: auto, cpu or cuda; by default the device of the spec.
            progress: called before each piece of work with a `Progress`: a sentence, the time left and the plan.
            budget: seconds that the audit may take, or a text such as `10m`; by default the spec's `audit.budget`.
            resume: return the existing audit if it is complete and of the same settings; else continue an interrupted one.
                Without a budget the result is the same, bit for bit, as without the interruption.

        Returns:
            The audit.

        Raises:
            UserError: the data do not fit the model, a reference cannot be used on it, or the budget is not a time.
        """
        return auditing.audit(self, data, out=out, device=device, progress=progress, budget=budget, resume=resume)

    def plan(
        self, data: str | Path | np.ndarray | pd.DataFrame | None = None, *, budget: float | str | None = None
    ) -> AuditPlan:
        """Check that an audit could start, and estimate its work and its time. Nothing is written (`--dry-run`).

        Args:
            data: as in `audit`.
            budget: as in `audit`.

        Returns:
            The plan; print it.

        Raises:
            UserError: as `audit`.
        """
        return auditing.plan(self, data, budget=budget)

    def audited(
        self, data: str | Path | np.ndarray | pd.DataFrame | None = None, *, out: str | Path | None = None
    ) -> Audit | None:
        """Return the existing audit if it is complete and `audit` would make the same one; else None."""
        return auditing.audited(self, data, out=out)

    def audit_folder(self, data: str | Path | np.ndarray | pd.DataFrame | None = None, out: str | Path | None = None) -> Path:
        """Return the folder that `audit` writes to."""
        return auditing.audit_folder(self, data, out)

    def report(self) -> Path:
        """Write `report.html` and the figures from the files of the run; return the path of the report."""
        return auditing.report(self)

    def improve(self, **options: Any) -> Improvement:
        """Follow the audit's advice in a new run folder, audit the same data there, and compare. This run is not changed.

        Args:
            **options: those of `runs.improve.improve`: retrain, out, set, overwrite, resume, budget, report, progress,
                allow_python.

        Returns:
            The comparison of both runs; print it.

        Raises:
            UserError: the run has no audit, or an option or the new folder cannot be used.
        """
        from elbowroom.runs.improve import improve

        found = improve(self, **options)
        return replace(found, old=self, run=Run.of(found.run))
