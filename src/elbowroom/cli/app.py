"""The command line. Exit codes: 0 done, 2 the user's input (one line on stderr), 1 our fault, 130 interrupted.

Only typer is imported at the top, so that `elbowroom --help` is quick; each command imports what it needs.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from elbowroom.cli import queries, runs, specs
from elbowroom.cli.interrupted import INTERRUPTED, kept
from elbowroom.cli.terminal import Echo, say
from elbowroom.errors import UserError, nearest, shortened
from elbowroom.system import files
from elbowroom.system.memory import asked_for, ran_out

_ClickException: Any = typer.BadParameter.__mro__[2]
"""Click's base class of usage errors; typer carries its own copy of click and does not export it."""

_USERS_DISK = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENXIO, errno.ENODEV, errno.EBUSY, errno.ETXTBSY),
    *(errno.EMFILE, errno.ENFILE, errno.ESPIPE, errno.ENOTSUP),
}

app = typer.Typer(
    name="elbowroom",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (queries, runs, specs):
    group.register(app)


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    os.environ["MPLBACKEND"] = "agg"  # files alone are drawn; a notebook's backend, inherited, may not be installed here
    given = sys.argv[1:] if arguments is None else list(arguments)
    if nul := [argument for argument in given if "\0" in argument]:
        _fail(f"{nul[0]!r}: holds a NUL character, which no name of a file can")
    began = time.time()
    files.claims.clear()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name need not be one that the terminal can show
    for name in ("elbowroom.compiled", "elbowroom.figures"):  # what is compiled, what is not, and why; what was not drawn
        told = logging.getLogger(name)
        if not told.handlers:
            told.addHandler(Echo())
            told.setLevel(logging.INFO)
    try:
        code = app(args=given, prog_name="elbowroom", standalone_mode=False)
        if code == INTERRUPTED:  # typer makes this code of a KeyboardInterrupt, no command returns it
            raise KeyboardInterrupt
    except UserError as error:
        _fail(str(error))
    except _ClickException as error:
        _fail(f"{_usage_problem(error)}; see `{_command(error)} --help`")
    except (typer.Abort, KeyboardInterrupt):
        say(f"elbowroom: interrupted; {kept(given, began)}", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        message = _not_ours(error)
        if message is None:
            raise
        _fail(message)
    sys.exit(code if isinstance(code, int) else 0)


def _not_ours(error: Exception) -> str | None:
    """Say in one line what the disk, the memory or another library did; None where the fault is ours."""
    from elbowroom.parts import trouble

    if (broken := trouble(error)) is not None:
        return broken
    if isinstance(error, OSError) and error.errno in _USERS_DISK:
        return f"{error.filename or 'standard output'}: {error.strerror}"
    if isinstance(error, MemoryError | RuntimeError | OverflowError | ValueError | TypeError) and ran_out(error):
        return f"not enough memory ({asked_for(error)}); choose fewer latents, data or draws, or smaller layers or batches"
    return None


def _fail(message: str) -> None:
    say(f"elbowroom: {shortened(' '.join(message.split(chr(10))))}", err=True)
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
