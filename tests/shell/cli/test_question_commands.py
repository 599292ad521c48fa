"""The commands of the questions: made of the methods of `Questions`, where each option is described once."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import typer

from elbowroom.cli.app import app
from elbowroom.cli.queries import QUESTIONS, command
from elbowroom.cli.terminal import profiled
from elbowroom.components.signatures import argument_docs, first_sentence, options, shared_docs
from elbowroom.queries.questions import Questions

MEAN_ANOTHER_THING = {("sample", "data"), ("explain", "data"), ("explain", "draws")}


def parameters(app: typer.Typer, question: str) -> dict[str, Any]:
    return {one.name: one for one in typer.main.get_command(app).commands[question].params}


def test_a_parameter_of_a_question_is_an_option_of_its_command():
    @shared_docs
    class More(Questions):
        __doc__ = Questions.__doc__

        def encode(self, data: Any = None, *, how_deep: int = 7, seed: int | None = None, report: Any = None) -> None:
            """Say more.

            Args:
                how_deep: levels of `z` that are
                    looked at. From Python more.
            """

    more = typer.Typer()
    more.callback()(lambda: None)
    more.command()(profiled(command("encode", More.encode)))
    found = parameters(more, "encode")
    assert found["how_deep"].opts == ["--how-deep"]
    assert (found["how_deep"].default, found["how_deep"].help) == (7, "levels of z that are looked at")
    assert found["seed"].help == "random seed; the run's by default"
    assert "report" not in found
    assert (
        "    how_deep: levels of `z` that are\n        looked at. From Python more.\n    data: the rows" in More.encode.__doc__
    )


def test_options_have_the_defaults_of_the_methods():
    for question in QUESTIONS:
        found = parameters(app, question)
        for option in options(getattr(Questions, question), positional=True):
            if option.name in found and option.name != "methods":
                assert found[option.name].default == option.default, (question, option.name)
    assert parameters(app, "integrate")["methods"].default == "prior,encoder,refit,ais"


def test_no_option_is_described_twice_with_different_words():
    shared = argument_docs(Questions)
    written = ast.parse(inspect.getsource(inspect.getmodule(Questions))).body[-1]
    again = set()
    for method in [one for one in written.body if isinstance(one, ast.FunctionDef) and one.name in QUESTIONS]:
        own = method.body[0].value.value.split("Args:")[1].split("Returns:")[0]
        again |= {(method.name, name) for name in shared if f"\n            {name}: " in own}
    assert again == MEAN_ANOTHER_THING
    for question in QUESTIONS:
        docs = argument_docs(getattr(Questions, question))
        found = parameters(app, question)
        assert all(found[name].help.startswith(first_sentence(docs[name])) for name in docs if name in found)
        for name in {*shared} & {*found}:
            assert (first_sentence(shared[name]) in found[name].help) == ((question, name) not in MEAN_ANOTHER_THING)
    devices = {parameters(app, one)["device"].help for one in (*QUESTIONS, "run", "fit", "audit")}
    assert devices == {first_sentence(shared["device"])}


def test_the_docstring_of_a_question_describes_every_parameter():
    for question in QUESTIONS:
        assert all(option.doc for option in options(getattr(Questions, question), positional=True)), question
