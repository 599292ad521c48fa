"""The registry: every component keeps its protocol, options come from signatures, and Python users are checked too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Gt
from support.registry import unregister
from torch import Tensor

from elbowroom.components import registry
from elbowroom.components.slots import build as slots_build
from elbowroom.conformance.conformance import problems_of
from elbowroom.errors import SpecError
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.networks.mlp import MLP
from elbowroom.models.priors.standard import Normal
from elbowroom.spec import spec

ALL = [(kind, name) for kind in registry.kinds() for name in registry.names(kind)]


@pytest.fixture
def plug_in():
    added: list[tuple[str, str]] = []

    def register(kind: str, name: str, cls: type) -> None:
        registry.register(kind, name, cls)
        added.append((kind, name))

    yield register
    for kind, name in added:
        unregister(kind, name)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_component_keeps_the_protocol(kind, name):
    assert problems_of(kind, name) == []


@pytest.mark.parametrize("scale", [0.5, "shared", "per_dimension", "decoder"])
def test_every_noise_scale_keeps_the_protocol(scale):
    assert problems_of("likelihood", "gaussian", scale=scale) == []


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_component_and_option_is_documented(kind, name):
    found = registry.component(kind, name)
    assert found.summary.endswith((".", ")")), found.summary
    assert [o.name for o in found.options if not o.doc] == []


def test_options_are_the_keyword_only_parameters():
    mlp = registry.component("network", "mlp")
    assert mlp.facts == ("in_shape", "out_dim")
    assert [(o.name, o.type_text, o.default) for o in mlp.options] == [
        ("hidden", "list of whole numbers >= 1", (128, 128)),
        ("activation", "one of silu, tanh, softplus, relu", "silu"),
        ("residual", "true or false", False),
        ("norm", "one of none, layer, batch", "none"),
        ("dropout", "number >= 0 and < 1", 0.0),
    ]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Gaussian((3,), scale=-1.0),
            "gaussian: scale: must be greater than 0 or 'shared', 'per_dimension' or 'decoder', got -1.0",
        ),
        (
            lambda: Gaussian((3,), scale="shraed"),
            "gaussian: scale: must be a number or 'shared', 'per_dimension' or 'decoder', got 'shraed'; did you mean 'shared'?",
        ),
        (lambda: MLP((2,), 3, hidden=[1.5]), "mlp: hidden.0: must be a whole number, got 1.5"),
        (
            lambda: MLP((2,), 3, activation="gelu"),
            "mlp: activation: must be 'silu', 'tanh', 'softplus' or 'relu', got 'gelu'; did you mean 'relu'?",
        ),
    ],
)
def test_python_users_are_checked_too(build, message):
    for kind, name in ALL:
        registry.component(kind, name)
    with pytest.raises(SpecError) as error:
        build()
    assert str(error.value) == message


class Shifted(Normal):
    """A standard normal, moved.

    Args:
        shift: by how much.
    """

    def __init__(self, latent_dim: int, *, shift: Annotated[float, Gt(0)] = 1.0) -> None:
        super().__init__(latent_dim)
        self.shift = shift

    def forward(self) -> Tensor:
        return super().forward() + self.shift


class AnyOption(Normal):
    """Takes anything."""

    def __init__(self, latent_dim: int, **options: Any) -> None:
        super().__init__(latent_dim)


class WrongFact(Normal):
    """Wants what a prior does not know."""

    def __init__(self, latent_dim: int, event_shape: tuple[int, ...]) -> None:
        super().__init__(latent_dim)


class Untyped(Normal):
    """Has an option without a type."""

    def __init__(self, latent_dim: int, *, shift=1.0) -> None:
        super().__init__(latent_dim)


class Wide(Normal):
    """Returns too many latents."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim + 1)


DIGITS = {"data": "digits", "model": {"latent_dim": 2, "likelihood": "bernoulli"}}


def test_a_plug_in_is_known_to_specs_at_once(plug_in):
    with pytest.raises(SpecError, match="unknown prior 'shifted'"):
        spec.validate({**DIGITS, "model": {**DIGITS["model"], "prior": "shifted"}})
    plug_in("prior", "shifted", Shifted)
    loaded = spec.validate({**DIGITS, "model": {**DIGITS["model"], "prior": {"name": "shifted", "shift": 2}}})
    prior = slots_build("prior", loaded.spec.model.prior, latent_dim=3, event_shape=(4,))
    assert isinstance(prior, Shifted)
    assert (prior.latent_dim, prior.shift) == (3, 2.0)
    assert problems_of("prior", "shifted") == []
    with pytest.raises(SpecError, match=r"^shifted: shift: must be greater than 0, got -1$"):
        Shifted(2, shift=-1)


@pytest.mark.parametrize(
    ("kind", "name", "cls", "message"),
    [
        ("prior", "any", AnyOption, "prior any: AnyOption takes **options: name every option, so that it can be checked"),
        (
            "prior",
            "wrong",
            WrongFact,
            "prior wrong: the positional parameter 'event_shape' is no fact of a prior (these are: covariate_dim, "
            "feature_shape, guide, latent_dim); "
            "make it keyword-only if the user chooses it",
        ),
        ("prior", "untyped", Untyped, "prior untyped: Untyped: option shift has no type annotation"),
        ("prior", "normal", Shifted, "register: there is a prior 'normal' already; choose another name"),
        ("prior", "a b", Shifted, "register: 'a b' is not a name; use letters, digits and underscores"),
        ("priors", "x", Shifted, "unknown kind of component 'priors'; did you mean 'prior'?"),
    ],
)
def test_register_refuses(kind, name, cls, message):
    with pytest.raises(SpecError) as error:
        registry.register(kind, name, cls)
    assert str(error.value) == message


def test_check_names_the_broken_promise(plug_in):
    plug_in("prior", "wide", Wide)
    problems = problems_of("prior", "wide")
    assert "returns z of shape (N, latent_dim), got (6, 3)" in problems


def test_types_in_words():
    from elbowroom.components.signatures import options, type_text

    def function(
        *,
        a: Literal["x"] | None = None,
        b: Sequence[int] = (),
        c: Annotated[float, Gt(0)] | Literal["p", "q"] = 1.0,
        d: Mapping[str, str] | None = None,
        e: Mapping[str, Sequence[int]] | None = None,
        f: Callable[..., Normal] = Normal,
    ) -> None: ...

    words = [type_text(option.annotation) for option in options(function)]
    assert words[:3] == ["x, or nothing", "list of whole numbers", "number > 0, or one of p, q"]
    assert words[3:5] == ["mapping of text to text, or nothing", "mapping of text to list of whole numbers, or nothing"]
