"""The spec: the user's settings, checked as a whole before anything is built.

The blocks are derived from the signatures of the components and of `elbowroom.inference.fit.svi.fit`, so that each option is
defined once. An error is one line: the file, the dotted path, what is wrong, and the most similar allowed name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen
from pydantic import BeforeValidator, Field, Strict, ValidationError, create_model
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from elbowroom.components import compatibility, registry, schema, signatures
from elbowroom.components.schema import Block, dotted
from elbowroom.components.slots import slot as slots_slot
from elbowroom.errors import SpecError, nearest
from elbowroom.models.columns import Kind
from elbowroom.spec import document
from elbowroom.system import durations

VERSION = 1
Count = Annotated[int, Strict(), Ge(1)]
Draws = Annotated[int, Strict(), Ge(100), Le(1_000_000)]


def _budget(given: Any) -> Any:
    """Check a time budget; a plain number means seconds."""
    if given is None:
        return None
    try:
        seconds = durations.seconds(given if isinstance(given, str | int | float) else repr(given))
    except SpecError:
        raise PydanticCustomError("no_time", durations.WANTED) from None
    return given if isinstance(given, str) else f"{seconds:g}s"


Budget = Annotated[str | None, BeforeValidator(_budget)]


class ModelBlock(Block):
    """What is believed: p(z) p(x|z)."""

    latent_dim: Annotated[int, Strict(), Ge(1)] = Field(..., description="number of latent dimensions d")
    prior: Any
    likelihood: Any
    decoder: Any


class GuideBlock(Block):
    """The amortized guide q(z|x)."""

    family: Any
    encoder: Any


class AuditBlock(Block):
    """What the audit looks at."""

    observations: Literal["all"] | Count = Field("all", description="how many of the test data to audit, or all")
    references: Any
    draws: Draws = Field(10_000, description="draws of the guide per datum for ELBO and k-hat")
    keep: Draws = Field(1_000, description="draws per datum that are kept in the files")
    budget: Budget = Field(
        durations.DEFAULT, description="time that the audit may take, such as 10m, or none; where it is short, a random sample"
    )
    diagnose: Annotated[bool, Strict()] = Field(
        True, description="also calibration, information, checks of the model, and the gaps of other data"
    )
    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="whether log p(x, z) and its gradient are compiled: where that pays, always, or never"
    )


class StartBlock(Block):
    """The run whose weights a fit starts at."""

    run: Annotated[str, MinLen(1)] = Field(..., description="its folder; a relative path counts from the spec's")
    freeze: Annotated[bool, Strict()] = Field(
        True, description="keep its prior, decoder and likelihood as they are, and train the guide alone"
    )
    simulated: Annotated[float, Strict(), Ge(0), Le(1)] = Field(
        0.0, description="share of each mini-batch that is drawn from the frozen model: data without end for the encoder"
    )


def _start(given: Any) -> Any:
    """Expand a plain folder to a block."""
    return {"run": given} if isinstance(given, str) else given


Start = Annotated[StartBlock | None, BeforeValidator(_start, json_schema_input_type=StartBlock | str | None)]


class Roles(TypedDict, total=False):
    """A `Layout` as a record holds it."""

    x: list[str]
    covariates: list[str]
    exposure: str
    labels: str
    kinds: dict[str, Kind]
    levels: dict[str, list[str]]
    header: bool
    delimiter: str


class Record(Block):
    """What a run folder's spec says of the run; Elbowroom writes it."""

    elbowroom: str = Field(..., description="version of elbowroom")
    versions: dict[str, str] = Field(..., description="versions of what it stands on")
    data_sha256: str = Field(..., description="hash of the data")
    data_stamp: str | None = Field(None, description="size and time of change of a file too large to be read again")
    event_shape: list[Annotated[int, Ge(1)]] = Field(..., description="shape of one datum")
    levels: int | None = Field(None, description="1 + the largest value, of data that are whole numbers from 0")
    columns: list[tuple[str, Kind, Annotated[int, Ge(0)]]] | None = Field(
        None, description="name, kind and number of levels of each column"
    )
    covariates: list[str] = Field([], description="names of the covariates")
    exposure: bool = Field(False, description="whether counts have an exposure")
    missing: bool = Field(False, description="whether entries are missing")
    layout: Roles | None = Field(None, description="which columns of a table became what")
    start_sha256: str | None = Field(None, description="hash of the weights that the fit started at")
    experiment: str = Field(..., description="hash of all that the fit depends on")


class Spec(Block):
    """A whole spec, resolved: every default is filled in."""

    schema_: Literal[1] = Field(1, alias="schema", description="version of this format")
    data: Any
    model: ModelBlock
    guide: GuideBlock
    fit: Any
    audit: AuditBlock
    seed: Annotated[int, Strict(), Ge(0), Field(lt=2**31)] = Field(0, description="seed of everything random")
    record: Record | None = Field(None, description="written into run folders; not for you to set")

    def tree(self) -> dict[str, Any]:
        """Return the resolved spec as dictionaries, lists and scalars."""
        tree: dict[str, Any] = self.model_dump(by_alias=True, mode="json")
        if self.record is None:
            del tree["record"]
        else:
            tree["record"] = self.record.model_dump(mode="json", exclude_defaults=True)
        return tree


@functools.cache
def spec_model() -> type[Spec]:
    """Return the pydantic model of specs, for the components that are registered now."""
    from elbowroom.inference.fit import svi

    slot = slots_slot
    trained = [option for option in signatures.options(svi.fit) if option.name != "objective"]
    objective = (slot("objective"), Field("elbo", description="what is maximised"))
    start = (Start, Field(None, description="the run whose weights the fit starts at; null starts anew"))
    fit = schema.block("fit", trained, {"objective": objective, "start": start})
    model = create_model(
        "model",
        __base__=ModelBlock,
        prior=(slot("prior"), Field("normal", description="p(z)")),
        likelihood=(slot("likelihood"), Field(..., description="p(x|z)")),
        decoder=(slot("network"), Field("mlp", description="network from z to the likelihood's parameters")),
    )
    guide = create_model(
        "guide",
        __base__=GuideBlock,
        family=(slot("guide"), Field("diagonal_normal", description="the family of q(z|x)")),
        encoder=(slot("network"), Field("mlp", description="network from x to the family's parameters")),
    )
    auto, one = Literal["auto"], slot("reference")
    many: Any = Annotated[list.__class_getitem__(one), MinLen(1)]
    short: Any = auto | many | one
    references: Any = Annotated[auto | many, BeforeValidator(_listed, json_schema_input_type=short)]
    audit = create_model(
        "audit",
        __base__=AuditBlock,
        references=(
            references,
            Field("auto", description="what the guide is compared with; auto chooses by kind, dimension and cost"),
        ),
    )
    return create_model(
        "spec",
        __base__=Spec,
        data=(slot("data"), Field(..., description="the data set")),
        model=(model, Field(..., description="what is believed")),
        guide=(guide, Field({}, description="the amortized guide q(z|x)")),
        fit=(fit, Field({}, description="how it is trained")),
        audit=(audit, Field({}, description="how it is audited")),
    )


registry.on_change(spec_model.cache_clear)


def _listed(given: Any) -> Any:
    """Expand a single reference to a list."""
    return [given] if isinstance(given, Mapping) or (isinstance(given, str) and given != "auto") else given


@dataclass(frozen=True)
class Loaded:
    """A checked spec and its origin.

    Attributes:
        spec: the resolved spec.
        label: name of the file, for messages.
        folder: the folder that relative paths start from.
        notes: sentences for the user, e.g. that options were reset.
    """

    spec: Spec
    label: str
    folder: Path
    notes: tuple[str, ...] = ()


def load(path: str | Path, changes: Iterable[str] = (), *, in_memory: bool = False, allow_python: bool = False) -> Loaded:
    """Read a spec file, apply `--set` changes, and check everything that can be checked without the data.

    Args:
        path: the file.
        changes: strings `a.b=c`, in any order.
        in_memory: the data come from Python; of the spec's own data only the roles of columns and `split` are used.
        allow_python: execute the files and modules that the spec names as `python:...`; else they are refused.

    Raises:
        SpecError: one line.
    """
    tree = document.read(path)
    label = Path(path).name
    assigned = document.assignments(changes)
    tree, notes = document.assign(tree, assigned)
    if in_memory:
        tree = of_memory(tree)
    start = Path(path).resolve().parent
    loaded = validate(tree, label=label, folder=start, assigned=assigned, allow_python=allow_python)
    return replace(loaded, notes=(*notes, *loaded.notes))


def of_memory(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spec for data from Python; it keeps the roles of columns and the split."""
    own = tree.get("data")
    options = {option.name for option in registry.component("data", "memory").options}
    kept = {key: own[key] for key in own if key in options} if isinstance(own, Mapping) else {}
    return {**tree, "data": {"name": "memory", **kept}}


def validate(
    tree: Mapping[str, Any],
    *,
    label: str = "spec",
    folder: Path | None = None,
    assigned: Iterable[tuple[str, ...]] = (),
    allow_python: bool = False,
) -> Loaded:
    """Check a spec tree.

    Args:
        tree: dictionaries, lists and scalars.
        label: its name in messages.
        folder: the folder that relative paths start from; the working folder by default.
        assigned: paths set by `--set`; messages name `--set` instead of the file.
        allow_python: as in `load`.

    Raises:
        SpecError: one line.
    """
    version = tree.get("schema", VERSION)
    if type(version) is not int or version < 1:
        raise SpecError(f"{label}: schema: must be {VERSION}, got {schema.short(version)}")
    if version > VERSION:
        raise SpecError(f"{label}: schema: {version} is newer than this elbowroom, which reads {VERSION}; upgrade elbowroom")
    folder = Path.cwd() if folder is None else folder
    tree = registry.prepare(tree, folder=folder, allow_python=allow_python, label=label)
    try:
        spec = spec_model().model_validate(dict(tree))
    except ValidationError as error:
        path, problem = schema.one_problem(error, tree)
        words = tuple(map(str, path))
        ours = any(words[: len(a)] == a or (problem.startswith("unknown") and a[: len(words)] == words) for a in assigned)
        where = f"--set {dotted(path)}" if ours else f"{label}: {dotted(path)}" if path else label
        raise SpecError(f"{where}: {problem}") from None
    clash = contradiction(spec)
    if clash is not None:
        raise SpecError(f"{label}: {clash}")
    notes = compatibility.notes(spec.model.prior, spec.guide.family, spec.fit.objective)
    return Loaded(spec, label, folder, tuple(notes))


def contradiction(spec: Spec) -> str | None:
    """Say in one sentence which parts of a spec contradict each other; None if none do."""
    from elbowroom.inference.references.grid.grid import MAX_DIM

    model, audit = spec.model, spec.audit
    if (clash := compatibility.clash(model.prior, spec.guide.family, spec.fit.objective)) is not None:
        return clash
    if (start := spec.fit.start) is not None:
        if start.simulated and not start.freeze:
            return "fit.start.simulated: a model that is still trained must not learn from its own draws; set freeze: true"
        if start.freeze and "guide" in registry.component("prior", model.prior.name).facts:
            return (
                f"fit.start.freeze: prior {model.prior.name} is made of the guide, so that training the guide changes the "
                "model; set freeze: false"
            )
    chosen = [] if audit.references == "auto" else [reference.name for reference in audit.references]
    for name in chosen:
        if chosen.count(name) > 1:
            return f"audit.references: {name} is given twice"
    dims = compatibility.free_dim(model.prior, model.latent_dim)
    if "grid" in chosen and not 1 <= dims <= MAX_DIM:
        least = "" if dims else "continuous latents, "
        which = f"model.latent_dim is {model.latent_dim}" if dims == model.latent_dim else f"this prior has {dims}"
        return f"audit.references: grid needs {least}at most {MAX_DIM} latent dimensions, {which}; use auto"
    if "closed_form" in chosen:
        needed = {"model.prior": (model.prior.name, "normal"), "model.decoder": (model.decoder.name, "linear")}
        needed["model.likelihood"] = (model.likelihood.name, "gaussian")
        for path, (has, needs) in needed.items():
            if has != needs:
                return f"audit.references: closed_form needs {path} = {needs}, it is {has}; use auto"
        if model.likelihood.scale == "decoder":
            return (
                "audit.references: closed_form needs a noise scale that does not depend on z, "
                "model.likelihood.scale is decoder; use auto"
            )
    split = spec.data.split if hasattr(spec.data, "split") else None
    if split is not None:
        if not math.isclose(sum(split), 1.0, abs_tol=1e-6):
            return f"data.split: train, validation and test must sum to 1, got {sum(split):g}"
        if split[0] <= 0 or split[2] <= 0:
            return "data.split: train and test must be positive, such as [0.6, 0.2, 0.2]"
        if split[1] <= 0 and spec.fit.patience is not None:
            return "fit.patience: there are no validation data to judge by (data.split); leave it out"
    return None


def shipped() -> list[str]:
    """Return the names of the specs that come with Elbowroom."""
    folder = resources.files("elbowroom.experiments")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def shipped_text(name: str) -> str:
    """Return the text of a spec that comes with Elbowroom; a SpecError if there is none of this name."""
    if name not in shipped():
        raise SpecError(f"there is no spec {name!r} in elbowroom{nearest(name, shipped())}")
    return resources.files("elbowroom.experiments").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of specs, for editors."""
    registry.use_all()
    tree: dict[str, Any] = spec_model().model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}
