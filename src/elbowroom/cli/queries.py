"""The commands that put a fitted model to use: encode, and so on. Each is a question, and its answer with its error.

They are made of the methods of `Questions`: an option has its name, its default and the first sentence of its docs from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from elbowroom.cli.terminal import SHARED, AllowPython, Json, RunArg, finish, profiled, screen
from elbowroom.components.signatures import Option, first_sentence, options, summary
from elbowroom.queries.questions import Questions
from elbowroom.system.stages import into, stage

if TYPE_CHECKING:
    from elbowroom.queries.answer import Answer
    from elbowroom.run import Run


def _values(given: Sequence[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE, a number where it looks like one."""
    from elbowroom.errors import SpecError

    found: dict[str, Any] = {}
    for text in given or ():
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise SpecError(f"--given {text}: write NAME=VALUE, such as --given age=40")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            found[name.strip()] = value.strip()
    return found


def _names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",") if name.strip()]


@dataclass(frozen=True)
class Own:
    """What the command line has of its own for an option.

    Attributes:
        metavar: what stands for its value.
        kind: what it is read as, where its type says more than one thing; else such is text.
        read: makes of that, or of nothing, what the method takes.
        least: its smallest value.
        most: its largest.
        flag: its name.
    """

    metavar: str | None = None
    kind: Any = None
    read: Callable[[Any], Any] = lambda value: value
    least: int | None = None
    most: int | None = None
    flag: str | None = None


QUESTIONS = ("encode", "score", "impute", "integrate", "sample", "explain")
PYTHON_ONLY = ("report", "of")  # no options of commands
PAIR = Own("I J", tuple[int, int] | None)
OWN = {
    "band": Own("A-B"),
    "budget": Own("TIME"),
    "calibration": Own("FILE", Path | None),
    "covariates": Own("FILE"),
    "data": Own("[DATA]", Path | None),
    "device": Own("DEVICE"),
    "draws": Own(least=100),
    "given": Own("NAME=VALUE", list[str] | None, _values),
    "hide": Own("CELLS"),
    "holes": Own("KIND"),
    "interpolate": PAIR,
    "keep": Own(least=100),
    "latents": PAIR,
    "methods": Own("NAMES", read=_names),
    "others": Own("SOURCE"),
    "references": Own("NAMES"),
    "repeats": Own(least=5),
    "samples": Own(least=0),
    "seed": Own(least=0, most=2**31 - 1),
    "source": Own("SOURCE", flag="--from"),
    "temperatures": Own(least=2),
    "test": Own(kind=bool),
    "explain.draws": Own(),
    "integrate.samples": Own(least=10),
    "sample.data": Own("FILE", Path | None),
}
OutFile = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        help=f"{first_sentence(SHARED['out'])}; RUN/answers/<question>-<data>.nc and .csv by default",
    ),
]
Again = Annotated[bool, typer.Option("--overwrite", help="replace the answer that is there")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for question in QUESTIONS:
        app.command()(profiled(command(question, getattr(Questions, question))))


def command(question: str, method: Callable[..., Any]) -> Callable[..., None]:
    """Make the command of a question from its method's signature and docs."""
    offered = {option.name: option for option in options(method, positional=True)}

    def ask(run: Path, *, out: Path | None, overwrite: bool, as_json: bool, allow_python: bool, **given: Any) -> None:
        fitted, data, resume = _open(run, allow_python), given.get("data"), given.get("resume", False)
        counts = "report" in offered and (question != "sample" or (data is not None and given["interpolate"] is None))
        quiet, name = as_json or not counts, _name(question, given)  # a bar counts rows
        with answering(fitted, name, data, out, overwrite=overwrite, resume=resume, as_json=quiet) as (target, report):
            if "report" in offered:
                given |= {"report": report, "out": target}
            answer = getattr(fitted, question)(**{name: own(question, name).read(value) for name, value in given.items()})
            if given.get("dry_run"):
                return planned(run, answer, as_json)
            done(answer, target, out, as_json, **_besides(question, answer, target, out))

    parameters: dict[str, tuple[Any, Any]] = {"run": (RunArg, Parameter.empty)}
    parameters |= {name: _parameter(question, option) for name, option in offered.items() if name not in PYTHON_ONLY}
    parameters |= {"out": (OutFile, None), "overwrite": (Again, False)}
    parameters |= {"as_json": (Json, False), "allow_python": (AllowPython, False)}
    ask.__name__, ask.__doc__ = question, summary(method)
    ask.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=value) for name, (kind, value) in parameters.items()]
    )
    return ask


def own(question: str, name: str) -> Own:
    """Return what the command line has of its own for an option of a question."""
    return OWN.get(f"{question}.{name}") or OWN.get(name) or Own()


def _parameter(question: str, option: Option) -> tuple[Any, Any]:
    """Return the annotation and the default from which typer makes an option, or the argument DATA."""
    here, default = own(question, option.name), option.default
    words: dict[str, Any] = {"help": option.sentence, "metavar": here.metavar}
    if here.metavar == "[DATA]":
        return Annotated[here.kind, typer.Argument(**words, show_default=False)], default
    kinds = {*(get_args(option.annotation) or [option.annotation])} - {type(None)}
    kind = here.kind or (option.annotation if kinds in ({bool}, {int}, {float}) else str | None)
    flag = here.flag or f"--{option.name.replace('_', '-')}"
    if default is True:
        flag += f"/--no{flag[1:]}"
    value = ",".join(default) if isinstance(default, tuple) else default
    return Annotated[kind, typer.Option(flag, **words, min=here.least, max=here.most)], value


def _name(question: str, given: dict[str, Any]) -> str:
    """Name an answer by what it is about: the row, the source, the two rows."""
    source, rows = given.get("source", "prior"), given.get("interpolate") or ()
    about = [given.get("datum"), None if source == "prior" else source, *rows]
    return "-".join([question, *(str(one) for one in about if one is not None)])


def _besides(question: str, answer: Any, target: Path, out: Path | None) -> dict[str, Any]:
    """Write what a question has beside its answer, and return it for `done`."""
    if question == "score":
        from elbowroom.queries.score.conclusions import counts

        return {"decisions": counts(answer.dataset)}
    if question == "impute":
        return {"also": [answer.save_completed(target)]}
    return {"also": [answer.save(target.with_suffix(".npz"))]} if question == "sample" and out is None else {}


def _open(run: Path, allow_python: bool) -> Run:
    with stage("imports"):
        from elbowroom.run import Run

    return Run.load(run, allow_python=allow_python)


@contextmanager
def answering(
    run: Run, question: str, data: Path | None, out: Path | None, *, overwrite: bool, resume: bool, as_json: bool
) -> Iterator[tuple[Path, Callable[[int, int], None] | None]]:
    """Check where the answer goes before anything is computed; yield the file and what shows the progress.

    That is `RUN/answers/<question>-<data>.nc`, or what the user named.
    """
    from elbowroom.errors import SpecError
    from elbowroom.queries.answer import check_suffix
    from elbowroom.spec import run_folder

    name = question if data is None else f"{question}-{run_folder.name_for(data)}"
    target = check_suffix(out) if out is not None else run.path / run_folder.ANSWERS / f"{name}.nc"
    if target.exists() and not overwrite:
        raise SpecError(f"{target}: is there already; use --overwrite, or another --out")
    if overwrite and resume:
        raise SpecError("--overwrite and --resume contradict each other: one starts anew, the other goes on")
    into(run.path if out is None else target.parent)
    if as_json:
        yield target, None
        return
    from elbowroom.cli.progress import rows_bar

    with rows_bar(screen(stderr=True), question) as report:
        yield target, report


def planned(run: Path, answer: Answer, as_json: bool) -> None:
    """Say what an answer would take, instead of the answer."""
    checked = "everything was checked, nothing was written"
    if not as_json:
        typer.echo("\n".join([f"{run}: {checked}", *answer.said]))
    finish({"dry_run": checked, "said": list(answer.said), "seconds": answer.dataset.attrs["seconds"]}, as_json)


def done(answer: Answer, target: Path, out: Path | None, as_json: bool, *, also: Sequence[Path] = (), **more: Any) -> None:
    """Write an answer, and say where (`also` is written already) and what to conclude; `more` goes into the JSON."""
    from elbowroom.analysis.plots.drawing import NotDrawn, attempt, tell
    from elbowroom.queries import stream

    written = [answer.save(target)]
    if out is None:
        written.append(answer.save(target.with_suffix(".csv")))
    figures = attempt("of this answer", lambda: answer.save_figures(target))
    if isinstance(figures, NotDrawn):
        tell(target, [figures])
    else:
        written += figures
    written += also
    stream.finish(target)
    if not as_json:
        for sentence in answer.said:
            screen().print(sentence, highlight=False, markup=False)
        typer.echo(f"wrote {', '.join(map(str, written))}")
    finish({"files": [str(path) for path in written], "said": list(answer.said), **more}, as_json)
