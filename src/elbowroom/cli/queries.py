"""The commands that put a fitted model to use: encode, and so on. Each is a question, and its answer with its error.

They are made of the methods of `Questions`: an option has its name, its default and the first sentence of its docs from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from elbowroom.cli.answers import answering, asked, done, keep, planned
from elbowroom.cli.terminal import SHARED, AllowPython, Json, RunArg, profiled
from elbowroom.components.signatures import Option, first_sentence, options, summary
from elbowroom.queries.questions import Questions
from elbowroom.system.stages import stage

if TYPE_CHECKING:
    import xarray as xr

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
Keep = Annotated[
    bool,
    typer.Option(
        "--resume", help=f"{first_sentence(SHARED['resume'])}; an answer that is there is kept if it is whole and the same"
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for question in QUESTIONS:
        app.command()(profiled(command(question, getattr(Questions, question))))


def command(question: str, method: Callable[..., Any]) -> Callable[..., None]:
    """Make the command of a question from its method's signature and docs."""
    offered = {option.name: option for option in options(method, positional=True)}

    def ask(run: Path, *, out: Path | None, overwrite: bool, as_json: bool, allow_python: bool, **given: Any) -> None:
        fitted, data, resume = _open(run, allow_python), given.get("data"), given["resume"]
        counts = "report" in offered and (question != "sample" or (data is not None and given["interpolate"] is None))
        quiet, name = as_json or not counts, _name(question, given)  # a bar counts rows
        taken = {name: own(question, name).read(value) for name, value in given.items() if name in offered}
        facts = asked(fitted, question, taken)
        ways = {"overwrite": overwrite, "resume": resume, "dry_run": given.get("dry_run", False), "as_json": quiet}
        with answering(fitted, name, facts, data, out, **ways) as claim:
            target, report, there = claim
            if there is not None:
                return keep(there, target, as_json, **_decisions(question, there))
            if "report" in offered:
                taken |= {"report": report, "out": target}
            answer = getattr(fitted, question)(**taken)
            if given.get("dry_run"):
                return planned(run, answer, as_json)
            besides = partial(_besides, question, answer, out)
            done(answer, target, out, as_json, facts, besides, **_decisions(question, answer.dataset))

    parameters: dict[str, tuple[Any, Any]] = {"run": (RunArg, Parameter.empty)}
    parameters |= {name: _parameter(question, option) for name, option in offered.items() if name not in PYTHON_ONLY}
    parameters |= {"out": (OutFile, None), "overwrite": (Again, False), "resume": (Keep, False)}
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


def _besides(question: str, answer: Any, out: Path | None, target: Path) -> list[Path]:
    """Write what a question has beside its answer, and return the files."""
    if question == "impute":
        return [answer.save_completed(target)]
    return [answer.save(target.with_suffix(".npz"))] if question == "sample" and out is None else []


def _decisions(question: str, dataset: xr.Dataset) -> dict[str, Any]:
    """Return what the JSON of an answer has, too."""
    if question != "score":
        return {}
    from elbowroom.queries.score.conclusions import counts

    return {"decisions": counts(dataset)}


def _open(run: Path, allow_python: bool) -> Run:
    with stage("imports"):
        from elbowroom.run import Run

    return Run.load(run, allow_python=allow_python)
