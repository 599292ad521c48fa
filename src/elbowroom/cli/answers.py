"""Where an answer goes, whether it is there already, and how it is written.

An answer is several files: `<name>.nc`, and beside it a table, figures, completed data. They are made in `<name>.nc.parts/`,
then moved to their places, the named one last, as a sign that the others belong to it. It says what it answers (`asked`), so
that `--resume` keeps it only where that is the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elbowroom.cli.terminal import conclude, finish, named, say, screen
from elbowroom.system.stages import into

if TYPE_CHECKING:
    import xarray as xr

    from elbowroom.queries.answer import Answer
    from elbowroom.run import Run

APART = ("out", "report", "resume", "overwrite", "dry_run", "budget")  # options on which no number depends
FILES = ("data", "covariates", "calibration")  # options that may name a file: what is in it counts, not its name
STAGED = "finished"  # folder in which files wait for the last one
Report = Callable[[int, int], None]


def asked(run: Run, question: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that the answer to a question depends on: options, data, weights, versions.

    Files stand for their contents; the default of the seed and of the device for what they are.
    """
    from elbowroom.queries.stream import place_of
    from elbowroom.runs.rows import provenance

    facts: dict[str, Any] = {name: _plain(name, value) for name, value in given.items() if name not in APART}
    facts["seed"] = run.experiment.spec.seed if given.get("seed") is None else given["seed"]
    facts["device"] = place_of(run, given.get("device")).type
    theirs = {name: value for name, value in provenance(run, None).items() if name not in ("experiment", "data")}
    return {"question": question, **facts, **theirs, "torch": metadata.version("torch")}


def _plain(name: str, value: Any) -> Any:
    """Return an option as JSON holds it."""
    from elbowroom.system.files import sha256_of

    if name in FILES and value is not None and Path(value).is_file():
        with Path(value).open("rb") as handle:
            return f"sha256 {sha256_of(iter(lambda: handle.read(1 << 20), b''))}"
    return json.loads(json.dumps(value, default=str))


@contextmanager
def answering(
    run: Run, name: str, facts: Mapping[str, Any], data: Path | None, out: Path | None, *, overwrite: bool, resume: bool,
    dry_run: bool, as_json: bool,
) -> Iterator[tuple[Path, Report | None, xr.Dataset | None]]:  # fmt: skip
    """Claim the file that an answer goes to, and check it before anything is computed.

    That is `RUN/answers/<name>-<data>.nc`, or what the user named.

    Yields:
        The file, what shows the progress, and the answer that is there and is kept.

    Raises:
        UserError: the file is there, and neither to be replaced nor the answer to the same question; another process writes
            it; or it lies behind a link in the run folder.
    """
    from elbowroom.errors import SpecError
    from elbowroom.queries.answer import check_suffix
    from elbowroom.spec import run_folder
    from elbowroom.system.files import claimed, refuse_links

    name_of_file = name if data is None else f"{name}-{run_folder.name_for(data)}"
    target = check_suffix(out) if out is not None else run.path / run_folder.ANSWERS / f"{name_of_file}.nc"
    if overwrite and resume:
        raise SpecError("--overwrite and --resume contradict each other: one starts anew, the other goes on")
    if target.exists() and not overwrite and not resume:
        raise SpecError(f"{target}: is there already; use --overwrite, or another --out")
    if out is None:
        refuse_links(run.path)
    into(run.path if out is None else target.parent)
    with nullcontext() if dry_run else claimed(target):
        there = whole(target, facts) if resume and target.exists() else None
        if as_json or there is not None:
            yield target, None, there
            return
        from elbowroom.cli.progress import rows_bar

        with rows_bar(screen(stderr=True), name) as report:
            yield target, report, None


def whole(target: Path, facts: Mapping[str, Any]) -> xr.Dataset | None:
    """Return the answer that is there; None where the time ended it early, or a file beside it is missing.

    Raises:
        UserError: it answers another question, or does not say what it answers; names the first difference.
    """
    from elbowroom.analysis import idata
    from elbowroom.components.schema import short
    from elbowroom.errors import SpecError
    from elbowroom.queries.stream import CUT

    way_out = "use --overwrite, or another --out"
    if target.suffix != ".nc":
        raise SpecError(f"{target}: is there already, and only .nc says what it answers; {way_out}")
    found = idata.read_table(target)
    theirs = json.loads(found.attrs.get("asked", "{}"))
    if not theirs:
        raise SpecError(f"{target}: does not say what it answers; {way_out}")
    ours = json.loads(json.dumps(dict(facts)))
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        if theirs.get(key) != ours.get(key):
            what = f"{key} is {short(theirs.get(key))} there, {short(ours.get(key))} here"
            raise SpecError(f"{target}: is another answer ({what}); {way_out}")
    beside = [target.with_name(name) for name in json.loads(found.attrs["files"])]
    return found if CUT not in found.attrs and all(path.is_file() for path in beside) else None


def keep(there: xr.Dataset, target: Path, as_json: bool, **more: Any) -> None:
    """Say that the answer that is there is kept; `more` goes into the JSON."""
    from elbowroom.queries import stream

    stream.finish(target)
    said = f"{named(target)}: is whole and answers the same question about the same data and weights; kept as it is"
    if not as_json:
        say(said)
    files = [target.with_name(name) for name in json.loads(there.attrs["files"])]
    finish({"files": [str(path) for path in files], "said": json.loads(there.attrs["said"]), "kept": said, **more}, as_json)


def planned(run: Path, answer: Answer, as_json: bool) -> None:
    """Say what an answer would take, instead of the answer."""
    checked = "everything was checked, nothing was written"
    if not as_json:
        say("\n".join([f"{named(run)}: {checked}", *answer.said]))
    finish({"dry_run": checked, "said": list(answer.said), "seconds": answer.dataset.attrs["seconds"]}, as_json)


def done(
    answer: Answer, target: Path, out: Path | None, as_json: bool, facts: Mapping[str, Any],
    besides: Callable[[Path], Sequence[Path]], **more: Any,
) -> None:  # fmt: skip
    """Write an answer and what `besides` makes of it; say where, and what to conclude. `more` goes into the JSON."""
    written = write(answer, target, facts, besides, table=out is None)
    if not as_json:
        conclude(answer.said)
        say(f"wrote {', '.join(map(named, written))}")
    finish({"files": [str(path) for path in written], "said": list(answer.said), **more}, as_json)


def write(
    answer: Answer, target: Path, facts: Mapping[str, Any], besides: Callable[[Path], Sequence[Path]], *, table: bool
) -> list[Path]:
    """Write an answer's files, `target` last; what is there stays until all new files are made. Return their paths."""
    from elbowroom.analysis.plots.drawing import NotDrawn, attempt, tell
    from elbowroom.queries import stream
    from elbowroom.system.files import refuse_link, sync_folder

    parts = stream.parts_of(target)
    refuse_link(parts)
    staged = parts / STAGED
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        made = target.with_suffix(".csv").name if table else None
        names = [answer.save(staged / made).name] if made is not None else []
        figures = attempt("of this answer", lambda: answer.save_figures(staged / target.name))
        if isinstance(figures, NotDrawn):
            tell(target, [figures])
            figures = []
        names += [path.name for path in [*figures, *besides(staged / target.name)]]
        names = [target.name, *names]
        about = {"asked": json.dumps(dict(facts)), "said": json.dumps(answer.said), "files": json.dumps(names)}
        replace(answer, dataset=answer.dataset.assign_attrs(about)).save(staged / target.name)
        target.unlink(missing_ok=True)
        for name in reversed(names):
            (staged / name).replace(target.with_name(name))
        sync_folder(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        with suppress(OSError):
            parts.rmdir()
    if stream.CUT not in answer.dataset.attrs:  # else --resume goes on from the rows that are done
        stream.finish(target)
    return [target.with_name(name) for name in names]
