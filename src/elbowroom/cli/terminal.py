"""What the commands share: their options, the console, tables, and the JSON that `--json` prints."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elbowroom.components.signatures import argument_docs, first_sentence
from elbowroom.queries.questions import Questions

if TYPE_CHECKING:
    from rich.console import Console

SpecArg = Annotated[Path, typer.Argument(metavar="SPEC", help="the spec file (.yaml)", show_default=False)]
RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="the run folder", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="the run folder [default: runs/<spec's name>]")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="move what is there aside first")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the run that is there, its audit too")]
Budget = Annotated[
    str | None, typer.Option("--budget", metavar="TIME", help="time that the audit may take: 90s, 10m, 1h, none [default: 5m]")
]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="change the spec; may be repeated")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything, write nothing")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]
AllowPython = Annotated[
    bool, typer.Option("--allow-python", help="execute the user's own files and modules that are named as python:...")
]
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
PIPE = 10_000  # columns of a table that goes to no terminal: no name is broken
SHARED = argument_docs(Questions)
"""What the options that all questions share say."""
Device = Annotated[str | None, typer.Option("--device", metavar="DEVICE", help=first_sentence(SHARED["device"]))]

Profile = Annotated[
    bool, typer.Option("--profile", help="print where the time goes and write it to profile/ beside the output (stages.csv)")
]
ProfileFunctions = Annotated[
    bool, typer.Option("--profile-functions", help="the same, and to which functions and operators (slows the command)")
]


def profiled(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--profile` and `--profile-functions`."""

    @functools.wraps(command)
    def wrapped(*, profile: bool, profile_functions: bool, **options: Any) -> None:
        if not profile and not profile_functions:
            return command(**options)
        from elbowroom.system import profiling

        with profiling.profile(functions=profile_functions, command=command.__name__) as found:
            command(**options)
        say(f"\n{found}", err=True)
        if found.folder is not None:
            say(f"wrote {named(found.folder)}/ ({', '.join(found.files)})", err=True)

    own = inspect.signature(command, eval_str=True).parameters.values()
    keyword, options = inspect.Parameter.KEYWORD_ONLY, {"profile": Profile, "profile_functions": ProfileFunctions}
    more = [inspect.Parameter(name, keyword, default=False, annotation=kind) for name, kind in options.items()]
    wrapped.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {one.name: one.annotation for one in (*own, *more)}
    return wrapped


def budgeted(budget: str | None) -> list[str]:
    """Return the change of the spec that `--budget` stands for."""
    if budget is None:
        return []
    from elbowroom.system import durations

    durations.seconds(budget, "--budget")
    return [f"audit.budget={budget.strip()}"]


class Echo(logging.Handler):
    """Shows log messages on the terminal, beside the output of a command."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        say(record.getMessage(), err=True)


def say(text: str, *, err: bool = False) -> None:
    """Print text, with the characters in it that would move the cursor or turn the line written out."""
    typer.echo(visible(text), err=err)


def visible(text: str) -> str:
    """Return text with control characters (not the ends of lines), controls of direction and lone surrogates written out."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def named(name: object) -> str:
    """Return the name of a file or a folder as it stands in a sentence: in one line."""
    return visible(str(name)).replace("\n", "\\n")


def screen(*, stderr: bool = False) -> Console:
    """Return the console, which wraps lines on a terminal and leaves them alone in a pipe. Names are no markup to it."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def conclude(sentences: Sequence[str]) -> None:
    """Print sentences: on a terminal wrapped at words, in a pipe a line each."""
    console = screen()
    for sentence in sentences:
        console.print(visible(sentence), soft_wrap=not console.is_terminal)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], sentences: Sequence[str], title: str | None = None) -> None:
    """Print a table and the sentences that say what to conclude from it."""
    from rich.table import Table

    console, table = screen(), Table(*map(visible, head), title=title, title_justify="left", show_header=any(head))
    for row in rows:
        table.add_row(*map(visible, row))
    if not console.is_terminal:
        console.width = PIPE
    console.print()
    console.print(table)
    conclude(sentences)


def finish(result: dict[str, Any], as_json: bool) -> None:
    """Print what a command found as one JSON object, where that was asked for."""
    if as_json:
        typer.echo(json.dumps(result, indent=2))
