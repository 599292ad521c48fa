"""The list of components for `elbowroom components` and docs/components.md."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from elbowroom.components import compatibility, plugins, registry
from elbowroom.components.registry import Component
from elbowroom.components.signatures import Option
from elbowroom.errors import SpecError
from elbowroom.spec import document

if TYPE_CHECKING:
    from rich.console import Console

HEADINGS = {
    "data": ("data", "the data set"),
    "prior": ("model.prior", "p(z), what is believed of the latents"),
    "likelihood": ("model.likelihood", "p(x|z), what is believed of the data given the latents"),
    "network": ("model.decoder, guide.encoder", "from z to the likelihood's parameters, from x to the guide's"),
    "guide": ("guide.family", "the family of q(z|x)"),
    "objective": ("fit.objective", "what the fit maximises"),
    "reference": ("audit.references", "what the guide is compared with; auto chooses"),
}
"""kind -> the place in a spec that names it, and its description."""

COLUMN = 20  # width of the names in the list

Broken = tuple[str, str, str]
"""Kind and name of a component that cannot be used, and the reason."""


def collect(kind: str | None, name: str | None, *, allow_python: bool = False) -> tuple[list[Component], list[Broken]]:
    """Return the components of a kind (None: all), or a single one, and those that cannot be used.

    The path in a name `python:file.py:Class` starts from the working folder.

    Raises:
        SpecError: the kind is unknown, or the named component cannot be used.
    """
    if kind is not None and kind.startswith(plugins.PREFIX):
        raise SpecError(f"{kind}: say its kind first, such as `elbowroom components prior {kind}`")
    if kind is not None and name is not None:
        if name.startswith(plugins.PREFIX):
            if not allow_python:
                raise SpecError(f"{name} {plugins.place(name, Path.cwd()).asks}")
            name = registry.python(kind, name, folder=Path.cwd())
        return [registry.component(kind, name)], []
    found: list[Component] = []
    broken: list[Broken] = []
    for each in registry.kinds() if kind is None else [kind]:
        for one in registry.names(each):
            try:
                found.append(registry.component(each, one))
            except SpecError as error:
                broken.append((each, one, str(error)))
    known = {(each, one) for each, one, _ in broken}
    for offer in registry.broken():
        if (offer.kind, offer.name) not in known and kind in (None, offer.kind):
            broken.append((offer.kind, offer.name, offer.problem))
    return found, broken


def options_of(given: Iterable[str] | None, name: str | None) -> dict[str, Any]:
    """Return the options that `--set OPTION=VALUE` gives to one component; a SpecError if none was named."""
    if given and name is None:
        raise SpecError("--set: name the component that it is for, such as `components --check prior student_t --set df=3`")
    return {".".join(path): value for path, value in document.assignments(given or []).items()}


def check(
    found: Iterable[Component], broken: Iterable[Broken], options: Mapping[str, Any], say: Callable[[str], Any] | None
) -> dict[str, list[str]]:
    """Test components, and return `kind name` -> the checks that failed; unusable components fail.

    `options` are those of a single component; `say` is called with each line, `ok` or a failed check.
    """
    from elbowroom.conformance.conformance import problems_of

    say = say or (lambda line: None)
    problems: dict[str, list[str]] = {}
    for c in found:
        said = f"{c.kind} {plugins.short(c.name)}"
        problems[said] = problems_of(c.kind, c.name, **options)
        for line in [f"FAILED  {said}: {problem}" for problem in problems[said]] or [f"ok      {said}"]:
            say(line)
    for kind, name, why in broken:
        problems[f"{kind} {name}"] = [why]
        say(f"FAILED  {why}")
    bad = sum(bool(p) for p in problems.values())
    say(f"checked {len(problems)}: {'all keep their promises' if not bad else f'{bad} do not keep their promises'}")
    return problems


def as_json(
    found: Iterable[Component], broken: Iterable[Broken], problems: Mapping[str, list[str]] | None
) -> list[dict[str, Any]]:
    """Return the list of components for JSON."""
    listed: list[dict[str, Any]] = []
    for c in found:
        entry: dict[str, Any] = {"kind": c.kind, "name": c.name, "summary": c.summary}
        entry["options"] = [
            {"name": o.name, "type": o.type_text, "required": o.required, "default": _plain(o), "doc": o.doc} for o in c.options
        ]
        entry |= dict(_together(c)) | ({"from": c.origin} if c.origin else {})
        listed.append(entry if problems is None else entry | {"problems": problems[f"{c.kind} {plugins.short(c.name)}"]})
    return listed + [{"kind": kind, "name": name, "broken": why} for kind, name, why in broken]


def show(found: Sequence[Component], broken: Iterable[Broken], console: Console, *, whole: bool) -> None:
    """Print the list: with all options, formulas and partners if `whole`, else two lines for each component."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    def put(indent: int, *parts: str | tuple[str, str]) -> None:
        console.print(Padding(Text.assemble(*parts), (0, 0, 0, indent)))

    kind = ""
    for c in found:
        name, origin = plugins.short(c.name), (f" (from {c.origin})" if c.origin else "", "dim")
        if c.kind != kind:
            where, what = HEADINGS[c.kind]
            put(0, "\n" if kind else "", (c.kind, "bold"), f": {what}")
            put(0, (f"in a spec: {where}" + (f", e.g. {_example(c.kind, found)}" if whole else ""), "dim"))
            kind = c.kind
        if not whole:
            row = Table.grid(padding=(0, 2, 0, 0))
            row.add_column(width=COLUMN, no_wrap=True)
            row.add_column(ratio=1)
            if len(name) > COLUMN:
                put(2, (name, "bold cyan"))
            row.add_row(Text("" if len(name) > COLUMN else name, "bold cyan"), Text.assemble(c.summary, origin))
            if c.options:
                row.add_row("", Text(", ".join(_short(o) for o in c.options), "dim"))
            console.print(Padding(row, (0, 0, 0, 2)))
            continue
        put(2, "\n", (name, "bold cyan"), origin)
        put(6, c.summary)
        for line in _formulas(c.cls):
            put(6, (line, "green"))
        for label, text in _together(c).items():
            put(6, f"{label.replace('_', ' ')}: {text if isinstance(text, str) else ', '.join(text)}")
        for o in c.options:
            put(6, ("* ", "dim"), (o.name, "cyan"), f": {o.type_text}; {_default(o)}. ", (o.doc, "dim"))
    for _, _, why in broken:
        put(0, ("\ncannot be used: ", "bold red"), why)
    if not whole:
        put(0, "\nWhat the options mean, and what goes with what: elbowroom components prior")
        put(0, "Does it keep its promises? elbowroom components prior student_t --check")
        put(0, "One of your own: prior: python:my_file.py:MyPrior, with --allow-python (CONTRIBUTING.md)")


def markdown() -> str:
    """Return the text of docs/components.md: all components of Elbowroom."""
    lines = [
        "# Components",
        "",
        "What a spec can name. This page is made by `make docs/components.md` from signatures and docstrings; do not edit it.",
        "A name alone is short for a block without options: `prior: normal` is `prior: {name: normal}`.",
        "How to write one of your own: [CONTRIBUTING.md](../CONTRIBUTING.md).",
        "",
    ]
    for kind in registry.kinds():
        lines.append(f"* [{kind}](#{kind}): " + ", ".join(f"`{name}`" for name in registry.own_names(kind)))
    for kind in registry.kinds():
        where, what = HEADINGS[kind]
        lines += ["", f"## {kind}", "", f"{_capital(what)}. In a spec: `{'`, `'.join(where.split(', '))}`."]
        if example := _example(kind):
            lines[-1] = lines[-1][:-1] + f", e.g. `{example}`."
        for name in registry.own_names(kind):
            lines += _section(registry.component(kind, name))
    return "\n".join(lines) + "\n"


def _section(c: Component) -> list[str]:
    lines = ["", f"### {c.kind}: {c.name}", "", _escaped(c.summary)]
    body = _body(c.cls)
    if body:
        lines += ["", *(line if line.startswith("    ") else _escaped(line) for line in body)]
    for label, text in _together(c).items():
        names = text if isinstance(text, str) else ", ".join(f"`{name}`" for name in text)
        lines += ["", f"{_capital(label.replace('_', ' '))}: {names}."]
    if c.options:
        lines += ["", "| option | type | default | |", "|---|---|---|---|"]
        for o in c.options:
            default = re.sub("^default (.*)$", lambda m: m[1] if m[1] == "nothing" else f"`{m[1]}`", _default(o))
            lines.append(f"| `{o.name}` | {_cell(o.type_text)} | {default} | {_cell(o.doc)} |")
    return lines


def _together(c: Component) -> dict[str, str | list[str]]:
    """Return which components can be combined with this one, by the rules that a spec is checked with."""
    if c.kind == "prior":
        return {
            "z_lives_on": compatibility.WORDS.get(compatibility.space_of(c.cls), compatibility.space_of(c.cls)),
            "guides": [name for name in registry.own_names("guide") if _suit(c.name, name)],
        }
    if c.kind == "guide":
        return {
            "z_lives_on": compatibility.WORDS.get(compatibility.space_of(c.cls), compatibility.space_of(c.cls)),
            "priors": [name for name in registry.own_names("prior") if _suit(name, c.name)],
        }
    if c.kind == "objective":
        cls: Any = c.cls
        held = [word for word, holds in (("continuous", cls.continuous), ("discrete", cls.discrete)) if holds]
        told: dict[str, str | list[str]] = {"latents": held}
        return told | ({"guide": "its draws must be differentiable in its parameters"} if cls.reparametrized else {})
    if c.kind == "likelihood" and getattr(c.cls, "takes_exposure", False):
        return {"takes": "an exposure (data.exposure), which multiplies the rate"}
    return {}


def _suit(prior: str, guide: str) -> bool:
    """Say whether a spec can name both; with the objective elbo, which accepts every valid pair."""
    return compatibility.clash(*(SimpleNamespace(name=name) for name in (prior, guide, "elbo"))) is None


def _body(cls: type) -> list[str]:
    """Return the lines of a docstring between its summary and its first section."""
    lines = (inspect.getdoc(cls) or "").splitlines()[1:]
    end = next((i for i, line in enumerate(lines) if re.fullmatch(r"[A-Z]\w+:", line)), len(lines))
    return "\n".join(lines[:end]).strip("\n").splitlines()


def _formulas(cls: type) -> list[str]:
    """Return the paragraphs of a docstring's body that contain a formula."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(_body(cls)))
    formula = re.compile(r"(?:^|\s)(?:=|~|<=|is proportional to)\s")
    return [" ".join(p.split()) for p in paragraphs if formula.search(p)]


def _example(kind: str, found: Sequence[Component] = ()) -> str:
    """Return a line of a spec as an example: of the single component that is shown, or of a common one."""
    if len(found) == 1:
        options = [o for o in found[0].options if o.default is not None]
        given = [f"{o.name}: {'...' if o.required else json.dumps(_plain(o), default=str)}" for o in options]
        name = plugins.short(found[0].name)
        name = f'"{name}"' if ":" in name else name
        key = HEADINGS[kind][0].split(", ")[0].rpartition(".")[2]
        return f"{key}: {{name: {', '.join([name, *given])}}}" if given else f"{key}: {name}"
    return {
        "data": "data: {name: file, path: measurements.csv}",
        "prior": "prior: {name: student_t, df: 3}",
        "likelihood": "likelihood: {name: gaussian, scale: per_dimension}",
        "network": "decoder: {name: mlp, hidden: [64, 64]}",
        "guide": "family: full_rank_normal",
        "objective": "objective: {name: iwae, particles: 10}",
        "reference": "references: [grid, hmc]",
    }.get(kind, "")


def _plain(option: Option) -> Any:
    if option.required:
        return None
    if isinstance(option.default, tuple):
        return list(option.default)
    return dict(option.default) if isinstance(option.default, Mapping) else option.default


def _default(option: Option) -> str:
    if option.required:
        return "required"
    return "default nothing" if option.default is None else f"default {json.dumps(_plain(option), default=str)}"


def _short(option: Option) -> str:
    if option.required:
        return f"{option.name} (required)"
    return option.name if option.default is None else f"{option.name}={json.dumps(_plain(option), default=str)}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] if text[1:2] != "(" else text


def _escaped(text: str) -> str:
    """Escape formulas so that Markdown does not read them as emphasis or tags; code in backticks is unchanged."""
    parts = text.split("`")
    return "`".join(part if i % 2 else re.sub(r"([*<])", r"\\\1", part) for i, part in enumerate(parts))


def _cell(text: str) -> str:
    return _escaped(text).replace("|", r"\|")
