"""The registry: which priors, likelihoods, networks, guides, references and data sets can be named in a spec.

A component is an ordinary class. The POSITIONAL parameters of its constructor are facts (`FACTS`), the KEYWORD-ONLY
ones are the user's options; the schema, the checks and the list that `elbowroom components` prints are derived from
them, and the docs from the docstring's `Args`. Nothing here imports torch until a component is asked for. Where those that
do not come with Elbowroom are found: see `plugins`.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from elbowroom.components import plugins, schema
from elbowroom.components.schema import Block, Option
from elbowroom.errors import SpecError, nearest

FACTS: dict[str, frozenset[str]] = {
    "data": frozenset({"folder"}),
    "prior": frozenset({"latent_dim", "covariate_dim", "feature_shape", "guide"}),
    "likelihood": frozenset({"event_shape", "levels", "columns"}),
    "network": frozenset({"in_shape", "out_dim", "out_shape", "marks"}),
    "guide": frozenset({"latent_dim", "top_dim"}),
    "objective": frozenset(),
    "reference": frozenset(),
}
"""kind -> the positional arguments that a constructor of this kind may ask for."""

_table: dict[str, dict[str, str | type]] = {
    "data": {
        "adult": "elbowroom.data.repositories:Adult",
        "binarized_mnist": "elbowroom.data.published:BinarizedMNIST",
        "digits": "elbowroom.data.builtin:Digits",
        "file": "elbowroom.data.dataset:File",
        "jsb_chorales": "elbowroom.data.repositories:JSBChorales",
        "linear_gaussian": "elbowroom.data.builtin:LinearGaussianData",
        "memory": "elbowroom.data.frames:Memory",
        "mnist": "elbowroom.data.published:MNIST",
    },
    "prior": {
        "bernoulli": "elbowroom.models.priors.discrete:Bernoulli",
        "categorical": "elbowroom.models.priors.discrete:Categorical",
        "dirichlet": "elbowroom.models.priors.constrained:Dirichlet",
        "flow": "elbowroom.models.priors.flow:Flow",
        "gamma": "elbowroom.models.priors.constrained:Gamma",
        "gaussian_mixture": "elbowroom.models.priors.mixtures:GaussianMixture",
        "hierarchical": "elbowroom.models.priors.hierarchical:Hierarchical",
        "laplace": "elbowroom.models.priors.base:Laplace",
        "log_normal": "elbowroom.models.priors.constrained:LogNormal",
        "logistic_normal": "elbowroom.models.priors.constrained:LogisticNormal",
        "normal": "elbowroom.models.priors.base:Normal",
        "student_t": "elbowroom.models.priors.base:StudentT",
        "vamp": "elbowroom.models.priors.mixtures:Vamp",
    },
    "likelihood": {
        "bernoulli": "elbowroom.models.likelihoods.base:Bernoulli",
        "beta": "elbowroom.models.likelihoods.continuous:Beta",
        "binomial": "elbowroom.models.likelihoods.counts:Binomial",
        "categorical": "elbowroom.models.likelihoods.categorical:Categorical",
        "continuous_bernoulli": "elbowroom.models.likelihoods.base:ContinuousBernoulli",
        "discretized_logistic": "elbowroom.models.likelihoods.categorical:DiscretizedLogistic",
        "gamma": "elbowroom.models.likelihoods.continuous:Gamma",
        "gaussian": "elbowroom.models.likelihoods.base:Gaussian",
        "laplace": "elbowroom.models.likelihoods.continuous:Laplace",
        "log_normal": "elbowroom.models.likelihoods.continuous:LogNormal",
        "mixed": "elbowroom.models.likelihoods.mixed:Mixed",
        "multinomial": "elbowroom.models.likelihoods.multinomial:Multinomial",
        "negative_binomial": "elbowroom.models.likelihoods.counts:NegativeBinomial",
        "ordinal": "elbowroom.models.likelihoods.categorical:Ordinal",
        "poisson": "elbowroom.models.likelihoods.counts:Poisson",
        "student_t": "elbowroom.models.likelihoods.continuous:StudentT",
        "zero_inflated_negative_binomial": "elbowroom.models.likelihoods.counts:ZeroInflatedNegativeBinomial",
        "zero_inflated_poisson": "elbowroom.models.likelihoods.counts:ZeroInflatedPoisson",
    },
    "network": {
        "conv": "elbowroom.models.networks.convolution:Conv",
        "gru": "elbowroom.models.networks.recurrent:GRU",
        "linear": "elbowroom.models.networks.mlp:Linear",
        "mlp": "elbowroom.models.networks.mlp:MLP",
    },
    "guide": {
        "bernoulli": "elbowroom.models.priors.discrete:BernoulliFamily",
        "categorical": "elbowroom.models.priors.discrete:CategoricalFamily",
        "diagonal_normal": "elbowroom.models.guides.base:DiagonalNormal",
        "flow": "elbowroom.models.priors.flow:FlowFamily",
        "full_rank_normal": "elbowroom.models.guides.base:FullRankNormal",
        "hierarchical": "elbowroom.models.priors.hierarchical:HierarchicalFamily",
        "log_normal": "elbowroom.models.guides.families:LogNormal",
        "logistic_normal": "elbowroom.models.guides.families:LogisticNormal",
        "low_rank_normal": "elbowroom.models.guides.families:LowRankNormal",
        "mixture": "elbowroom.models.guides.families:Mixture",
        "semi_amortized": "elbowroom.models.guides.semi_amortized:SemiAmortized",
        "student_t": "elbowroom.models.guides.families:StudentT",
    },
    "objective": {
        "beta": "elbowroom.inference.objectives.bounds:Beta",
        "dreg": "elbowroom.inference.objectives.bounds:DReG",
        "elbo": "elbowroom.inference.objectives.elbo:ELBO",
        "iwae": "elbowroom.inference.objectives.bounds:IWAE",
        "mean_field_elbo": "elbowroom.inference.objectives.elbo:MeanFieldELBO",
        "renyi": "elbowroom.inference.objectives.bounds:Renyi",
        "sticking_the_landing": "elbowroom.inference.objectives.bounds:StickingTheLanding",
        "trace_enum": "elbowroom.inference.objectives.enumerated:TraceEnum",
        "wake_sleep": "elbowroom.inference.objectives.wake_sleep:WakeSleep",
    },
    "reference": {
        "ais": "elbowroom.inference.references.ais.ais:Annealed",
        "closed_form": "elbowroom.inference.references.closed_form:ClosedForm",
        "enumeration": "elbowroom.inference.references.enumeration:Enumeration",
        "grid": "elbowroom.inference.references.grid.grid:Grid",
        "hmc": "elbowroom.inference.references.hmc.hmc:HMC",
        "importance": "elbowroom.inference.references.importance.importance:ImportanceSampling",
    },
}

PLACES: dict[str, str] = {
    "data": "data",
    "model.prior": "prior",
    "model.likelihood": "likelihood",
    "model.decoder": "network",
    "guide.family": "guide",
    "guide.encoder": "network",
    "fit.objective": "objective",
    "audit.references": "reference",
}
"""Where a spec names a component -> its kind."""

_BASES = {
    "data": "elbowroom.data.dataset:Source",
    "prior": "elbowroom.models.priors.base:Prior",
    "likelihood": "elbowroom.models.likelihoods.base:Likelihood",
    "network": "torch.nn:Module",
    "guide": "elbowroom.models.guides.base:Family",
    "objective": "elbowroom.inference.objectives.elbo:Objective",
    "reference": "elbowroom.inference.posterior:Reference",
}

_own = {kind: frozenset(table) for kind, table in _table.items()}
_python: dict[str, dict[str, tuple[type, str]]] = {kind: {} for kind in _table}
_in_use: dict[str, set[str]] = {kind: set() for kind in _table}
_on_change: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Component:
    """One entry of the registry.

    Attributes:
        kind: `prior`, `likelihood`, ...
        name: the name that a spec uses.
        cls: the class.
        summary: the first line of its docstring.
        options: its keyword-only parameters.
        facts: its positional parameters.
        origin: the package that offers it; empty for Elbowroom's own and for what Python code registered.
        sha256: of the user's own file that it was read from, else empty.
    """

    kind: str
    name: str
    cls: type
    summary: str
    options: tuple[Option, ...]
    facts: tuple[str, ...]
    origin: str = ""
    sha256: str = ""


def kinds() -> list[str]:
    """Return the kinds of component."""
    return list(_table)


def names(kind: str) -> list[str]:
    """Return the names that a spec can use for a kind, sorted: our own, registered, or offered by installed packages."""
    return sorted({*_kind(kind), *_offered(kind)})


def own_names(kind: str) -> list[str]:
    """Return the names that come with Elbowroom, sorted."""
    _kind(kind)
    return sorted(_own[kind])


def broken() -> list[plugins.Offer]:
    """Return what installed packages offer and nobody can use, for reasons that their metadata tell."""
    return [offer for offer in plugins.offers(_own) if offer.problem]


@functools.cache
def component(kind: str, name: str) -> Component:
    """Return a component, imported, with its constructor checked.

    Raises:
        SpecError: for an unknown kind or name, with the nearest one.
    """
    entry, origin, digest = _kind(kind).get(name), "", ""
    if name in _python[kind]:
        entry, digest = _python[kind][name]
    elif entry is None and name in _offered(kind):
        offer = _offered(kind)[name]
        entry, origin = offer.load(), offer.package
        _foreign(kind, name, entry)
        _check_constructor(kind, name, entry)
    elif entry is None:
        raise SpecError(f"unknown {kind} {name!r}{nearest(name, names(kind))}")
    elif isinstance(entry, str):
        entry = _named(entry)
        _protocol(kind, name, entry)
        _check_constructor(kind, name, entry)
    options, facts = tuple(schema.options(entry)), tuple(schema.facts(entry))
    return Component(kind, name, entry, schema.summary(entry), options, facts, origin, digest)


def register(kind: str, name: str, cls: type) -> None:
    """Add a component, so that specs can name it.

    The constructor's positional parameters must be facts of its kind, its options keyword-only and annotated. The
    constructor is wrapped in place: what Python code passes by keyword is checked like a spec.

    Args:
        kind: `data`, `prior`, `likelihood`, `network`, `guide`, `objective` or `reference`.
        name: the name for specs.
        cls: the class.

    Raises:
        SpecError: if the kind is unknown, the name is taken, or the constructor does not follow the protocol.

    Example:
        >>> import elbowroom as er
        >>> from elbowroom.models.priors.base import Normal
        >>> class Wide(Normal):
        ...     "A normal prior under another name."
        >>> er.register("prior", "wide", Wide)
    """
    table = _kind(kind)
    if name in table and table[name] is not cls:
        raise SpecError(f"register: there is a {kind} {name!r} already; choose another name")
    if not name.isidentifier():
        raise SpecError(f"register: {name!r} is not a name; use letters, digits and underscores")
    _protocol(kind, name, cls)
    table[name] = cls
    _changed()
    _check_constructor(kind, name, cls)


def prepare(tree: Mapping[str, Any], *, folder: Path, allow_python: bool = False, label: str = "spec") -> dict[str, Any]:
    """Make the components that a spec names known: import those of installed packages, and execute the user's own files.

    Args:
        tree: the spec; it is left alone.
        folder: where the paths of files start.
        allow_python: execute the files and modules of `python:` names. Without it they are refused, unread.
        label: of the spec, for messages.

    Returns:
        The spec, its `python:` names with absolute paths.

    Raises:
        SpecError: a `python:` name is not allowed, or something cannot be imported.
    """
    result = dict(tree)
    for where, kind in PLACES.items():
        parent, _, key = where.rpartition(".")
        block = result.get(parent) if parent else result
        if not isinstance(block, Mapping) or key not in block:
            continue

        def known(given: Any, kind: str = kind, where: str = where) -> Any:
            try:
                return _known(kind, given, folder, allow_python)
            except SpecError as error:
                raise SpecError(f"{label}: {where}: {error}") from error

        given = block[key]
        value = [known(each) for each in given] if isinstance(given, list) else known(given)
        if parent:
            result[parent] = {**block, key: value}
        else:
            result[key] = value
    return result


def python(kind: str, name: str, *, folder: Path, sha256: Any = None) -> str:
    """Execute what a `python:` name stands for and make it known; return the name with the file's absolute path.

    Args:
        kind: its kind.
        name: `python:file.py:Class` or `python:module:Class`.
        folder: where the path of a file starts.
        sha256: the hash that the source must have; None for any.

    Raises:
        SpecError: there is no such class, it cannot be executed, or it is no component of this kind.
    """
    _kind(kind)
    where = plugins.place(name, folder)
    found = plugins.execute(where, sha256, folder)
    if _python[kind].get(where.name) != found:
        cls, said = found[0], plugins.short(name)
        _foreign(kind, said, cls)
        _python[kind][where.name] = found
        _changed()
        _check_constructor(kind, said, cls)
    return where.name


def portable(tree: Any) -> Any:
    """Return a spec whose `python:` names hold no folder, so that moving a file makes no other experiment."""
    if isinstance(tree, Mapping):
        return {k: plugins.short(v) if k == "name" and isinstance(v, str) else portable(v) for k, v in tree.items()}
    return [portable(value) for value in tree] if isinstance(tree, list) else tree


def unregister(kind: str, name: str) -> None:
    """Take a component out of the registry."""
    if _kind(kind).pop(name, None) is not None:
        _changed()


def forget_python() -> None:
    """Take the user's own files out of the registry; they are executed anew when they are asked for."""
    for known in _python.values():
        known.clear()
    plugins.forget()
    _changed()


def use_all() -> None:
    """Make every component that installed packages offer known to the schema, as far as it can be imported."""
    for kind in kinds():
        for name in _offered(kind):
            with suppress(SpecError):
                _known(kind, name, Path(), False)


@functools.cache
def options_model(kind: str, name: str) -> type[Block]:
    """Return the pydantic model of a component's options, with its `name`, and the hash of a user's own file."""
    found = component(kind, name)
    extra: dict[str, Any] = {"name": (Literal[name], ...)}
    if found.sha256:
        extra["sha256"] = (Literal[found.sha256], Field(found.sha256, description="hash of the file, as it was executed"))
    return schema.block(f"{kind}_{name}", found.options, extra)


def slot(kind: str) -> Any:
    """Return the annotation of a spec field that names a component; a bare string is short for `{name: ...}`."""
    known = sorted({*_kind(kind), *_in_use[kind], *_python[kind]})
    models = [options_model(kind, name) for name in known]
    union: Any = models[0] if len(models) == 1 else Annotated[Union[tuple(models)], Field(discriminator="name")]  # noqa: UP007
    bare = Literal[tuple(n for n in known if not any(o.required for o in component(kind, n).options))]  # type: ignore[valid-type]
    own: Any = Annotated[str, Field(pattern=f"^{plugins.PREFIX}")] | _Own

    def expand(given: Any) -> Any:
        if isinstance(given, str):
            given = {"name": given}
        if isinstance(given, Block):
            return given
        if not isinstance(given, Mapping):
            raise PydanticCustomError("no_component", "must be a name, or a block with a name")
        if "name" not in given:
            if any(":" in str(key) for key in given):  # YAML takes {name:gamma} for one key without a value
                spaced = ", ".join(
                    re.sub(r":\s*", ": ", str(k), count=1) + ("" if v is None else f": {v}") for k, v in given.items()
                )
                raise PydanticCustomError("no_name", f"needs a name; put a space after the colon: {{{spaced}}}")
            raise PydanticCustomError("no_name", f"needs a name, one of {', '.join(names(kind))}")
        if given["name"] not in known:
            context = {"kind": kind, "tag": str(given["name"]), "allowed": names(kind)}
            raise PydanticCustomError("unknown_component", "unknown", context)
        return given

    return Annotated[union, BeforeValidator(expand, json_schema_input_type=union | bare | own)]


class _Own(BaseModel):
    """A class of one's own, for editors: what options it has is known only when it is executed."""

    model_config = ConfigDict(extra="allow", title="python")

    name: Annotated[str, Field(pattern=f"^{plugins.PREFIX}", description="python:file.py:Class or python:module:Class")]


def build(kind: str, chosen: Block, *, where: str = "", **facts: Any) -> Any:
    """Construct a component from its validated options and the facts it asks for.

    Args:
        kind: the kind.
        chosen: an instance of `options_model(kind, name)`.
        where: the dotted path in the spec, for messages.
        facts: everything known of `FACTS[kind]`; only what the constructor asks for is passed.

    Raises:
        SpecError: if the constructor refuses a combination of options (ValueError).
    """
    found = component(kind, chosen.name)  # type: ignore[attr-defined]
    given = {option.name: getattr(chosen, option.name) for option in found.options}
    try:
        return found.cls(*(facts[name] for name in found.facts), **given)
    except ValueError as error:
        raise SpecError(f"{where or found.name}: {error}") from error


def on_change(clear: Callable[[], None]) -> None:
    """Have `clear` called whenever the registry changes (cached schemas)."""
    _on_change.append(clear)


def _changed() -> None:
    component.cache_clear()
    options_model.cache_clear()
    for clear in _on_change:
        clear()


def _kind(kind: str) -> dict[str, str | type]:
    if kind not in _table:
        raise SpecError(f"unknown kind of component {kind!r}{nearest(kind, _table)}")
    return _table[kind]


def _offered(kind: str) -> dict[str, plugins.Offer]:
    found = (offer for offer in plugins.offers(_own) if offer.kind == kind and offer.name not in _own[kind])
    return {offer.name: offer for offer in found if offer.name.isidentifier()}


def _known(kind: str, given: Any, folder: Path, allow_python: bool) -> Any:
    """Make one component of a spec known; return what stands there, a `python:` name with its absolute path."""
    name = given.get("name") if isinstance(given, Mapping) else given
    if not isinstance(name, str):
        return given
    if name.startswith(plugins.PREFIX):
        if not allow_python:
            raise SpecError(f"{name} {plugins.place(name, folder).asks}")
        name = python(kind, name, folder=folder, sha256=given.get("sha256") if isinstance(given, Mapping) else None)
        return {**given, "name": name} if isinstance(given, Mapping) else name
    if name not in _table[kind] and name not in _in_use[kind] and name in _offered(kind):
        component(kind, name)
        _in_use[kind].add(name)
        _changed()
    return given


def _named(target: str) -> type:
    module, _, attribute = target.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    assert isinstance(found, type)  # the tables above name classes
    return found


def _foreign(kind: str, name: str, cls: type) -> None:
    """Refuse a class of another kind, or one whose options no schema can be made of: it would spoil those of the others."""
    if not issubclass(cls, _named(_BASES[kind])):
        module, _, base = _BASES[kind].partition(":")
        raise SpecError(f"{kind} {name}: {cls.__name__} is no {kind}; derive it from {module}.{base}")
    _protocol(kind, name, cls)
    for option in schema.options(cls):
        try:
            model = schema.block(option.name, [option])
            model.model_json_schema()
            if not option.required:
                model.model_validate({option.name: option.default})
        except ValidationError as error:
            said = schema.one_problem(error, {option.name: option.default})[1]
            raise SpecError(f"{kind} {name}: option {option.name}: its default {said}") from error
        except Exception as error:  # pydantic says it in several ways
            raise SpecError(
                f"{kind} {name}: option {option.name}: {option.type_text} cannot be written in a spec; use numbers, text, "
                "true or false, Literal, lists or mappings of them"
            ) from error


def _protocol(kind: str, name: str, cls: type) -> None:
    """Refuse a class whose options cannot be listed, or which asks for facts that its kind does not have."""
    try:
        asked = schema.facts(cls)
        found = schema.options(cls)
    except (TypeError, NameError) as error:
        raise SpecError(f"{kind} {name}: {error}") from error
    for fact in asked:
        if fact not in FACTS[kind]:
            known = ", ".join(sorted(FACTS[kind])) or "none"
            raise SpecError(
                f"{kind} {name}: the positional parameter {fact!r} is no fact of a {kind} (these are: {known}); "
                "make it keyword-only if the user chooses it"
            )
    for option in found:
        if option.name in ("name", "sha256"):
            raise SpecError(f"{kind} {name}: an option cannot be called {option.name!r}")


def _check_constructor(kind: str, name: str, cls: type) -> None:
    """Wrap `cls.__init__` in place, so that its options are validated like a spec's. Done once per class."""
    original = cls.__init__  # type: ignore[misc]
    if getattr(cls.__dict__.get("__init__"), "checked_by_elbowroom", False) or not schema.options(cls):
        return
    model = schema.block(f"{kind}_{name}_options", schema.options(cls))

    @functools.wraps(original)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        known = {key: value for key, value in kwargs.items() if key in model.model_fields}
        if type(self) is cls and known:
            required = {k: f for k, f in model.model_fields.items() if f.is_required()}
            if all(key in known for key in required):
                try:
                    valid = model.model_validate(known)
                except ValidationError as error:
                    path, problem = schema.one_problem(error, known)
                    raise SpecError(f"{name}: {schema.dotted(path)}: {problem}") from None
                kwargs = {**kwargs, **{key: getattr(valid, key) for key in known}}
        original(self, *args, **kwargs)

    checked.checked_by_elbowroom = True  # type: ignore[attr-defined]
    cls.__init__ = checked  # type: ignore[misc]
