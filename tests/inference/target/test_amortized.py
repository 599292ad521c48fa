"""Guides that read no data are told as what they are: one row of parameters per datum, or one q(z) for all."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import elbowroom as er
from elbowroom.inference.target.checks.separation import ONE_FOR_ALL, ONE_FOR_EACH
from elbowroom.inference.target.log_joint import LogJoint

N = 30
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[:, None].expand(-1, 3), 2.0).to_event(1), obs=x)


def each(x: Tensor) -> None:
    loc = pyro.param("loc", torch.linspace(-1.0, 1.0, N))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.7))


def every(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.tensor(0.3), 0.7))


def encoder(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.4 * x.mean(-1), 0.7))


def by_place(x: Tensor) -> None:
    """Reads the data and has parameters of each datum too."""
    loc = pyro.param("loc", torch.linspace(-1.0, 1.0, N))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc + 0.4 * x.mean(-1), 0.7))


def auto() -> Callable[..., None]:
    guide = AutoNormal(model)
    guide(X)
    return guide


@pytest.mark.parametrize(
    ("guide", "amortized", "note"),
    [
        (each, False, ONE_FOR_EACH),
        (every, False, ONE_FOR_ALL),
        (encoder, True, None),
        (by_place, True, None),
        (auto, False, None),
    ],
)
def test_whether_a_guide_reads_the_data_is_found(guide: Callable[..., None], amortized: bool, note: str | None) -> None:
    joint = LogJoint(model, auto() if guide is auto else guide, X)
    joint.separable()
    assert joint.amortized == amortized
    found = [said for said in joint.notes if said in (ONE_FOR_EACH, ONE_FOR_ALL)]
    assert found == ([note] if note else []) if guide is not auto else len(found) == 1


def test_data_that_are_all_alike_say_nothing() -> None:
    joint = LogJoint(model, every, torch.ones(N, 3))
    joint.separable()
    assert joint.amortized


def test_the_verdict_blames_no_encoder() -> None:
    audit = er.audit(model, each, X, references=["grid"], diagnose=False)
    assert audit.table.attrs["amortization"] == "none"
    assert "none by construction" in audit.table.attrs["verdict"]
    assert "wider encoder" not in audit.table.attrs["verdict"]
    assert "wider encoder" in er.audit(model, by_place, X, references=["grid"], diagnose=False).table.attrs["verdict"]
