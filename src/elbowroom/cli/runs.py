"""The commands that make a run and look after it: run, fit, audit, report, improve, compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elbowroom.cli.terminal import (
    AllowPython,
    Budget,
    Changes,
    Device,
    DryRun,
    Json,
    Out,
    Overwrite,
    Resume,
    RunArg,
    SpecArg,
    budgeted,
    conclude,
    finish,
    named,
    print_table,
    profiled,
    say,
    screen,
)
from elbowroom.system.stages import stage

if TYPE_CHECKING:
    from elbowroom.analysis.audit.auditor import Audit
    from elbowroom.run import Run


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (run, fit, audit, report, improve):
        app.command()(profiled(command))
    app.command()(compare)


def run(
    spec: SpecArg,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    change: Changes = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    device: Device = None,
    budget: Budget = None,
    allow_python: AllowPython = False,
) -> None:
    """Fit a spec, audit the posterior, write the report."""
    change = [*(change or []), *budgeted(budget)]
    with ExitStack() as stack:  # one claim over all three, so that no other process comes in between
        fitted, result = _fit(spec, out, overwrite, resume, change, dry_run, as_json, device, allow_python, stack)
        if fitted is not None:
            result |= _audit(fitted, None, None, as_json, device, resume) | _report(fitted.path, as_json)
    finish(result, as_json)


def fit(
    spec: SpecArg,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    change: Changes = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    device: Device = None,
    allow_python: AllowPython = False,
) -> None:
    """Fit the VAE that a spec declares."""
    fitted, result = _fit(spec, out, overwrite, resume, change, dry_run, as_json, device, allow_python)
    if fitted is not None and not as_json:
        say(f"next: elbowroom audit {named(fitted.path)}")
    finish(result, as_json)


def audit(
    run: RunArg,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="audit these data (.npz, .npy, .csv, .tsv, .parquet), not the test split"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="where to write [default: RUN; with --data RUN/audits/<name>]"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="keep the audit that is there if it is whole and the same, or go on with it")
    ] = False,
    change: Changes = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    device: Device = None,
    budget: Budget = None,
    allow_python: AllowPython = False,
) -> None:
    """Audit a fitted run: how far is q(z|x) from p(z|x), datum by datum.

    References are chosen by kind, dimension and cost (audit.references: auto); the plan and its time are said first.
    """
    with stage("imports"):
        from elbowroom.run import Run

    fitted = Run.load(run, set=[*(change or []), *budgeted(budget)], allow_python=allow_python)
    result: dict[str, Any] = {"run": str(run)}
    if dry_run:
        plan = fitted.plan(data)
        result |= {"dry_run": "everything was checked, nothing was written", "plan": plan.tree()}
        if not as_json:
            say(f"{named(run)}: {result['dry_run']}\n{plan}")
    else:
        result |= _audit(fitted, data, out, as_json, device, resume)
    finish(result, as_json)


def report(run: RunArg, as_json: Json = False) -> None:
    """Write report.html from the files of an audited run."""
    finish({"run": str(run)} | _report(run, as_json), as_json)


def improve(
    run: RunArg,
    retrain: Annotated[bool, typer.Option("--retrain", help="train prior, decoder and likelihood anew too")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="the new run [default: RUN-improved, RUN-retrained]")
    ] = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    change: Changes = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    budget: Budget = None,
    allow_python: AllowPython = False,
) -> None:
    """Carry out an audit's advice in a new run, audit the same data again, and compare before and after.

    By default prior, decoder and likelihood are kept and a better guide is trained: log p(x) cannot change. With --retrain
    everything is trained anew: that is another model, so look whether held-out log p(x) fell. What you --set wins.
    """
    with stage("imports"):
        from elbowroom.cli.progress import audit_bar
        from elbowroom.run import Run
        from elbowroom.runs.advice import propose
        from elbowroom.runs.improve import carry_out, check

    budgeted(budget)
    old = Run.load(run, allow_python=allow_python)
    proposal = propose(old, retrain=retrain, out=out, set=change or [], budget=budget, allow_python=allow_python)
    check(old, proposal, overwrite=overwrite, resume=resume)
    for note in proposal.experiment.loaded.notes:
        say(f"elbowroom: note: {note}", err=True)
    told = {"improved": str(proposal.out), "changes": [str(one) for one in proposal.changes]}
    if not as_json:
        say(str(proposal))
    if dry_run:
        said = "everything was checked, nothing was written"
        if not as_json:
            say(said)
        return finish({"run": str(run), **told, "dry_run": said}, as_json)
    options: dict[str, Any] = {"overwrite": overwrite, "resume": resume}
    if as_json:
        found = carry_out(old, proposal, **options)
    else:
        with _bar(as_json) as report, audit_bar(screen(stderr=True), say) as progress:
            found = carry_out(old, proposal, report=report, progress=progress, **options)
        print_table(("", "before", "after"), found.lines(), found.verdict())
        say(f"wrote {named(proposal.out)}/ (its report: {named(proposal.out / 'report.html')}); {named(run)} is as it was")
    finish(found.tree(), as_json)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="audited run folders", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="also write one line per datum (.csv)")] = None,
    as_json: Json = False,
    allow_python: AllowPython = False,
) -> None:
    """Compare runs on the same held-out data: log p(x) with paired differences, and gaps."""
    from elbowroom.errors import SpecError
    from elbowroom.runs.compare import compare
    from elbowroom.system.files import claimed

    if out is not None and out.is_dir():
        raise SpecError(f"{out}: this is a folder; name a file with --out")
    with claimed(out) if out is not None else nullcontext():
        found = compare(runs, allow_python=allow_python)
        if out is not None:
            found.to_csv(out)
    if not as_json:
        head, *rows = found.lines()
        print_table(head, rows, found.verdict(), title=f"{found.table.sizes['obs_id']} held-out data")
        if out is not None:
            say(f"wrote {named(out)}")
    finish(found.tree(), as_json)


@contextmanager
def _bar(as_json: bool) -> Iterator[Callable[..., None] | None]:
    if as_json:
        yield None
        return
    from elbowroom.cli.progress import progress_bar

    with progress_bar(screen(stderr=True)) as report:
        yield report


def _fit(
    spec: Path,
    out: Path | None,
    overwrite: bool,
    resume: bool,
    change: list[str] | None,
    dry_run: bool,
    as_json: bool,
    device: str | None,
    allow_python: bool = False,
    claim: ExitStack | None = None,
) -> tuple[Run | None, dict[str, Any]]:
    """Fit and say so; (None, result) after a dry run. `claim` keeps the folder locked after the fit."""
    with stage("imports"):
        from elbowroom import run as shell
        from elbowroom.data.tables import listing
        from elbowroom.runs import fitting
        from elbowroom.spec.experiment import Experiment
        from elbowroom.system.files import locked

    changes = [*(change or []), *([f"fit.device={device}"] if device is not None else [])]
    experiment = Experiment.load(spec, set=changes, allow_python=allow_python)
    path, use = fitting.ready(experiment, out, overwrite=overwrite, resume=resume)
    for note in experiment.notes:
        say(f"elbowroom: note: {note}", err=True)
    columns = listing(experiment.data)
    if dry_run:
        sentence = (
            f"{named(experiment.label)}: everything was checked, nothing was written; the run would go to {named(path)} ({use})"
        )
        plan = experiment.foreseen()
        if not as_json:
            _print_columns(columns, len(experiment.data))
            say(f"{sentence}\naudit, {plan}")
        return None, {
            "run": str(path),
            "dry_run": sentence,
            "plan": plan.tree(),
            "notes": list(experiment.notes),
            "columns": columns,
        }
    if claim is not None:
        claim.enter_context(locked(path))
    with locked(path):
        if not as_json:
            _print_columns(columns, len(experiment.data))
        with _bar(as_json) as report:
            fitted = shell.fit(experiment, path, overwrite=overwrite, resume=resume, report=report)
    if not as_json:
        conclude([f"fit: {fitted.summary}"])
        say(f"wrote {named(path)}/ (weights.pt, history.csv, spec.yaml, split.npz)")
    return fitted, {"run": str(path), "fit": fitted.summary, "notes": list(experiment.notes), "columns": columns}


def _print_columns(columns: list[list[str]], n: int) -> None:
    if columns:
        print_table(("column of x", "kind", "values", "missing"), columns, (), title=f"{n:,} rows")


def _audit(fitted: Run, data: Path | None, out: Path | None, as_json: bool, device: str | None, resume: bool) -> dict[str, Any]:
    """Audit, print the table and the verdict, say where the files are. On `resume` a whole audit is kept."""
    from elbowroom.cli.progress import audit_bar
    from elbowroom.runs import auditing

    plan: dict[str, Any] = {}
    if as_json:
        found = fitted.audit(data, out=out, device=device, resume=resume, progress=lambda step: plan.update(step.plan.tree()))
    else:
        with audit_bar(screen(stderr=True), say) as report:
            found = fitted.audit(data, out=out, device=device, resume=resume, progress=report)
    folder = auditing.audit_folder(fitted, data, out)
    if not as_json:
        _print_audit(found, folder)
    told = {"table": dict(found.lines()), "verdict": found.verdict.splitlines(), "folder": str(folder)}
    return {"audit": told | ({"plan": plan} if plan else {})}


def _print_audit(found: Audit, folder: Path) -> None:
    print_table(("", ""), found.lines(), found.verdict.splitlines(), title=f"audit of {found.table.sizes['obs_id']} data")
    posteriors = ", ".join(f"posteriors/{name}.nc" for name in found.posteriors)
    diagnosis = "diagnosis.nc, " if found.diagnosis is not None else ""
    say(f"\nwrote {named(folder)}/ (audit.nc, audit.csv, {diagnosis}{posteriors})")


def _report(run: Path, as_json: bool) -> dict[str, Any]:
    with stage("imports"):
        from elbowroom.analysis.report.report import write_report
        from elbowroom.errors import RunFolderError
        from elbowroom.system.files import locked

    if not (run / "audit.nc").is_file():
        raise RunFolderError(f"{run}: no audit.nc here; run `elbowroom audit {run}` first")
    with locked(run):
        path = write_report(run)
    if not as_json:
        say(f"wrote {named(path)}")
    return {"report": str(path)}
