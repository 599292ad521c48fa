"""The command line. Exit codes: 0 done, 2 the user's input (one line on stderr), 1 our fault, 130 interrupted.

Only typer is imported at the top, so that `elbowroom --help` is quick; each command imports what it needs.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elbowroom.cli import queries as uses
from elbowroom.cli.terminal import (
    AllowPython,
    Budget,
    Changes,
    Device,
    DryRun,
    Echo,
    Json,
    Out,
    Overwrite,
    Resume,
    RunArg,
    SpecArg,
    budgeted,
    finish,
    print_table,
    profiled,
    screen,
)
from elbowroom.errors import UserError, nearest
from elbowroom.system.stages import stage

if TYPE_CHECKING:
    from elbowroom.analysis.audit.auditor import Audit
    from elbowroom.run import Run

_ClickException: Any = typer.BadParameter.__mro__[2]
"""Click's base class of usage errors; typer carries its own copy of click and does not export it."""

_USERS_DISK = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
}

app = typer.Typer(
    name="elbowroom",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
spec_app = typer.Typer(help="Copy, show or describe specs.", rich_markup_mode=None)
app.add_typer(spec_app, name="spec")
uses.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("elbowroom"))
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _elbowroom(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
) -> None:
    """How much room is there between your ELBO and the truth? Fit a VAE, then audit its posterior."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
@profiled
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


@app.command()
@profiled
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
        typer.echo(f"next: elbowroom audit {fitted.path}")
    finish(result, as_json)


@app.command()
@profiled
def audit(
    run: RunArg,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="audit these data (.npz, .npy, .csv, .parquet), not the test split"),
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
            typer.echo(f"{run}: {result['dry_run']}\n{plan}")
    else:
        result |= _audit(fitted, data, out, as_json, device, resume)
    finish(result, as_json)


@app.command()
@profiled
def report(run: RunArg, as_json: Json = False) -> None:
    """Write report.html from the files of an audited run."""
    finish({"run": str(run)} | _report(run, as_json), as_json)


@app.command()
@profiled
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
        typer.echo(f"elbowroom: note: {note}", err=True)
    told = {"improved": str(proposal.out), "changes": [str(one) for one in proposal.changes]}
    if not as_json:
        typer.echo(str(proposal))
    if dry_run:
        said = "everything was checked, nothing was written"
        if not as_json:
            typer.echo(said)
        return finish({"run": str(run), **told, "dry_run": said}, as_json)
    options: dict[str, Any] = {"overwrite": overwrite, "resume": resume}
    if as_json:
        found = carry_out(old, proposal, **options)
    else:
        with _bar(as_json) as report, audit_bar(screen(stderr=True), typer.echo) as progress:
            found = carry_out(old, proposal, report=report, progress=progress, **options)
        print_table(("", "before", "after"), found.lines(), found.verdict())
        typer.echo(f"wrote {proposal.out}/ (its report: {proposal.out / 'report.html'}); {run} is as it was")
    finish(found.tree(), as_json)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="audited run folders", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="also write one line per datum (.csv)")] = None,
    as_json: Json = False,
    allow_python: AllowPython = False,
) -> None:
    """Compare runs on the same held-out data: log p(x) with paired differences, and gaps."""
    from elbowroom.errors import SpecError
    from elbowroom.runs.compare import compare

    if out is not None and out.is_dir():
        raise SpecError(f"{out}: this is a folder; name a file with --out")
    found = compare(runs, allow_python=allow_python)
    if out is not None:
        found.to_csv(out)
    if not as_json:
        head, *rows = found.lines()
        print_table(head, rows, found.verdict(), title=f"{found.table.sizes['obs_id']} held-out data")
        if out is not None:
            typer.echo(f"wrote {out}")
    finish(found.tree(), as_json)


@app.command()
def components(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="prior, likelihood, network, ...")] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="one component, or python:my_file.py:Class")] = None,
    check: Annotated[bool, typer.Option("--check", help="build each and test that it keeps its promises")] = False,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="OPTION=VALUE", help="with --check NAME: an option; may be repeated")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print Elbowroom's own as a page in Markdown")] = False,
    as_json: Json = False,
    allow_python: AllowPython = False,
) -> None:
    """List what a spec can name. With a kind, also what each option means and what goes with what."""
    from elbowroom.conformance import catalogue

    if markdown:
        typer.echo(catalogue.markdown(), nl=False)
        return
    found, broken = catalogue.collect(kind, name, allow_python=allow_python)
    problems: dict[str, list[str]] = {}
    if check:
        problems = catalogue.check(found, broken, catalogue.options_of(change, name), None if as_json else typer.echo)
    if as_json:
        typer.echo(json.dumps(catalogue.as_json(found, broken, problems if check else None), indent=2, default=str))
    elif not check:
        catalogue.show(found, broken, screen(), whole=kind is not None)
    if any(problems.values()):
        raise typer.Exit(2)


@spec_app.callback(invoke_without_command=True)
def _spec(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@spec_app.command("init")
def spec_init(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="the spec to copy; without it, list them")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="where to [default: NAME.yaml]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file that is there")] = False,
    as_json: Json = False,
) -> None:
    """Copy a spec that comes with elbowroom."""
    from elbowroom.errors import SpecError
    from elbowroom.spec import spec
    from elbowroom.system.files import write_text

    if name is None:
        finish({"specs": spec.shipped()}, as_json)
        if not as_json:
            typer.echo("\n".join(spec.shipped()))
        return
    text = spec.shipped_text(name.removesuffix(".yaml"))
    target = out or Path(f"{name.removesuffix('.yaml')}.yaml")
    if target.exists() and not overwrite:
        raise SpecError(f"{target}: is there already; use --overwrite or another --out")
    write_text(target, text)
    if not as_json:
        typer.echo(f"wrote {target}; next: elbowroom run {target}")
    finish({"spec": str(target)}, as_json)


@spec_app.command("show")
def spec_show(spec: SpecArg, change: Changes = None, as_json: Json = False, allow_python: AllowPython = False) -> None:
    """Print a spec with every default filled in."""
    from elbowroom.spec import document
    from elbowroom.spec.spec import load

    loaded = load(spec, change or [], allow_python=allow_python)
    for note in loaded.notes:
        typer.echo(f"elbowroom: note: {note}", err=True)
    tree = loaded.spec.tree()
    typer.echo(json.dumps(tree, indent=2) if as_json else document.write(tree), nl=as_json)


@spec_app.command("schema")
def spec_schema() -> None:
    """Print the JSON schema of specs, for editors."""
    from elbowroom.spec.spec import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    told = logging.getLogger("elbowroom.compiled")  # what is compiled, what is not, and why
    if not told.handlers:
        told.addHandler(Echo())
        told.setLevel(logging.INFO)
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="elbowroom", standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except _ClickException as error:
        _fail(f"{_usage_problem(error)}; see `{_command(error)} --help`")
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("elbowroom: interrupted; a fit and an audit go on with --resume", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in _USERS_DISK:
            raise
        _fail(f"{error.filename or 'disk'}: {error.strerror}")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    typer.echo(f"elbowroom: {message}", err=True)
    sys.exit(2)


def _usage_problem(error: Any) -> str:
    """Say a usage error in one line, with the nearest option or command."""
    context, name = getattr(error, "ctx", None), getattr(error, "option_name", None)
    if context is not None and name is not None:
        offered = [o for parameter in context.command.params for o in parameter.opts if o.startswith("--")]
        return f"no such option {name}{nearest(name, offered)}".rstrip("?")
    message = " ".join(error.format_message().split()).rstrip(".?").replace("argument(s)", "argument")
    return message[:1].lower() + message[1:].replace(". Did you mean", "; did you mean")


def _command(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return " ".join(["elbowroom", *(context.command_path.split()[1:] if context is not None else ())])


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
        from elbowroom.spec.experiment import Experiment
        from elbowroom.system.files import locked

    changes = [*(change or []), *([f"fit.device={device}"] if device is not None else [])]
    experiment = Experiment.load(spec, set=changes, allow_python=allow_python)
    path, use = shell.ready(experiment, out, overwrite=overwrite, resume=resume)
    for note in experiment.notes:
        typer.echo(f"elbowroom: note: {note}", err=True)
    if dry_run:
        sentence = f"{experiment.label}: everything was checked, nothing was written; the run would go to {path} ({use})"
        plan = experiment.foreseen()
        if not as_json:
            typer.echo(f"{sentence}\naudit, {plan}")
        return None, {"run": str(path), "dry_run": sentence, "plan": plan.tree(), "notes": list(experiment.notes)}
    if claim is not None:
        claim.enter_context(locked(path))
    with locked(path), _bar(as_json) as report:
        fitted = shell.fit(experiment, path, overwrite=overwrite, resume=resume, report=report)
    if not as_json:
        screen().print(f"fit: {fitted.summary}", highlight=False)
        typer.echo(f"wrote {path}/ (weights.pt, history.csv, spec.yaml, split.npz)")
    return fitted, {"run": str(path), "fit": fitted.summary, "notes": list(experiment.notes)}


def _audit(fitted: Run, data: Path | None, out: Path | None, as_json: bool, device: str | None, resume: bool) -> dict[str, Any]:
    """Audit, print the table and the verdict, say where the files are. On `resume` a whole audit is kept."""
    from elbowroom.cli.progress import audit_bar

    plan: dict[str, Any] = {}
    if as_json:
        found = fitted.audit(data, out=out, device=device, resume=resume, progress=lambda step: plan.update(step.plan.tree()))
    else:
        with audit_bar(screen(stderr=True), typer.echo) as report:
            found = fitted.audit(data, out=out, device=device, resume=resume, progress=report)
    folder = fitted.audit_folder(data, out)
    if not as_json:
        _print_audit(found, folder)
    told = {"table": dict(found.lines()), "verdict": found.verdict.splitlines(), "folder": str(folder)}
    return {"audit": told | ({"plan": plan} if plan else {})}


def _print_audit(found: Audit, folder: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = screen()
    table = Table(title=f"audit of {found.table.sizes['obs_id']} data", title_justify="left", show_header=False)
    for quantity, value in found.lines():
        table.add_row(escape(quantity), escape(value))
    console.print()
    console.print(table)
    for sentence in found.verdict.splitlines():
        console.print(sentence, highlight=False)
    posteriors = ", ".join(f"posteriors/{name}.nc" for name in found.posteriors)
    diagnosis = "diagnosis.nc, " if found.diagnosis is not None else ""
    typer.echo(f"\nwrote {folder}/ (audit.nc, audit.csv, {diagnosis}{posteriors})")


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
        typer.echo(f"wrote {path}")
    return {"report": str(path)}


if __name__ == "__main__":
    main()
