"""The commands about what can be declared: spec init, show and schema; components."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from elbowroom.cli.terminal import AllowPython, Changes, Json, SpecArg, finish, named, say, screen

spec_app = typer.Typer(help="Copy, show or describe specs.", rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(spec_app, name="spec")
    app.command()(components)


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
        problems = catalogue.check(found, broken, catalogue.options_of(change, name), None if as_json else say)
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
    from elbowroom.system.files import claimed, write_text

    if name is None:
        finish({"specs": spec.shipped()}, as_json)
        if not as_json:
            say("\n".join(spec.shipped()))
        return
    text = spec.shipped_text(name.removesuffix(".yaml"))
    target = out or Path(f"{name.removesuffix('.yaml')}.yaml")
    with claimed(target):
        if target.exists() and not overwrite:
            raise SpecError(f"{target}: is there already; use --overwrite or another --out")
        write_text(target, text)
    if not as_json:
        say(f"wrote {named(target)}; next: elbowroom run {named(target)}")
    finish({"spec": str(target)}, as_json)


@spec_app.command("show")
def spec_show(spec: SpecArg, change: Changes = None, as_json: Json = False, allow_python: AllowPython = False) -> None:
    """Print a spec with every default filled in."""
    from elbowroom.spec import document
    from elbowroom.spec.spec import load

    loaded = load(spec, change or [], allow_python=allow_python)
    for note in loaded.notes:
        say(f"elbowroom: note: {note}", err=True)
    tree = loaded.spec.tree()
    typer.echo(json.dumps(tree, indent=2) if as_json else document.write(tree), nl=as_json)


@spec_app.command("schema")
def spec_schema() -> None:
    """Print the JSON schema of specs, for editors."""
    from elbowroom.spec.spec import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
