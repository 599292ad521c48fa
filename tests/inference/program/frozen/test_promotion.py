"""Programs that hold or make tensors of another precision than float64: they give the numbers of their float64 selves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from elbowroom.analysis.audit.auditor import audit
from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.program.frozen.promotion import Promoted, Promotion
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.simulate import predict, simulate

F32, F64 = torch.float32, torch.float64
GENERATOR = torch.Generator().manual_seed(0)
W = torch.randn(2, 3, generator=GENERATOR)
X = torch.randn(6, 3, generator=GENERATOR)
ZEROS, ONES = torch.zeros(2), torch.ones(2)
STANDARD = dist.Normal(ZEROS, ONES).to_event(1)


class Decoder(torch.nn.Module):
    """W is a plain attribute: neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.W = W.clone()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.W) * self.scale


def pair(prior: Callable[[Tensor], Any], mean: Callable[[Tensor], Tensor], scale: Any, guide_scale: Callable[[], Any]) -> tuple:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", prior(x))
            pyro.sample("x", dist.Normal(mean(z), scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.1 * x[..., :2], guide_scale()).to_event(1))

    return model, guide


def sound(W: Tensor = W) -> tuple:
    return pair(lambda x: dist.Normal(x.new_zeros(2), 1.0).to_event(1), lambda z: z @ W, 1.0, lambda: 0.5)


literal = lambda x: dist.Normal(x.new_zeros(2), 1.0).to_event(1)
FORMS = {
    "closed-over prior": pair(lambda x: dist.Normal(ZEROS, ONES).to_event(1), Decoder(), 1.0, lambda: 0.5),
    "closed-over distribution": pair(lambda x: STANDARD, Decoder(), 1.0, lambda: 0.5),
    "closed-over weight": sound(),
    "closed-over scale of the guide": pair(literal, lambda z: z @ W, 1.0, lambda: 0.5 * ONES),
    "attribute of a module": pair(literal, Decoder(), 1.0, lambda: 0.5),
    "named dtype": pair(
        lambda x: dist.Normal(torch.zeros(2, dtype=F32), torch.ones(2, dtype=F32)).to_event(1),
        lambda z: z @ W.to(F32),
        torch.ones(3, dtype=F32),
        lambda: torch.full((2,), 0.5, dtype=F32),
    ),
    "casts": pair(literal, lambda z: (z.float() @ W).type(F32), torch.ones(3).type_as(W), lambda: 0.5),
    "array": pair(literal, lambda z: z @ torch.from_numpy(W.numpy()), 1.0, lambda: 0.5),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_gives_the_numbers_of_the_float64_program(form: str) -> None:
    joint, expected = LogJoint(*FORMS[form], X), LogJoint(*sound(W.double()), X.double())
    assert isinstance(joint.model, Promoted)
    assert not isinstance(expected.model, Promoted)
    assert joint.dtype == F64
    z = expected.probe_points
    for mine, right in zip((*joint.grad(z), joint.log_guide(z)), (*expected.grad(z), expected.log_guide(z)), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)
    assert joint.draw("model", 5, 0).dtype == joint.draw("guide", 5, 0).dtype == F64
    assert W.dtype == ZEROS.dtype == F32


def test_it_is_audited() -> None:
    model, guide = FORMS["named dtype"]
    table = audit(model, guide, X).table
    assert (table["status"] == "exact").all()
    V = (W.T @ W + torch.eye(3)).double()
    right = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=F64), V).log_prob(X.double())
    torch.testing.assert_close(torch.tensor(table["log_evidence"].values), right, rtol=0, atol=1e-6)


def test_simulated_and_predicted_data_and_a_discrete_site() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.5], dtype=F32)))
            z = pyro.sample("z", dist.Normal(c.float() * 4 - 2, 1.0))
            pyro.sample(
                "x", dist.Normal(z[..., None] * torch.ones(3, dtype=F32) @ torch.eye(3, dtype=F32), 1.0).to_event(1), obs=x
            )

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), torch.tensor(0.5)))

    joint = LogJoint(model, guide, X)
    found = Grid()(joint, keep=40, seed=0)
    assert set(found.status) == {"exact"}
    other, z = simulate(joint, seed=1)
    assert other.data().dtype == z.dtype == F64
    drawn = predict(joint, {"z": z[None, :, 0], "c": torch.zeros(1, 6)}, seed=0)["x"]
    assert drawn.shape == (1, 6, 3)
    assert bool(drawn.isfinite().all())


@pytest.mark.parametrize("case", ["data in double precision", "prior in double precision"])
def test_a_pair_that_does_not_run_as_it_is_runs_in_float64_and_says_so(case: str) -> None:
    """Data from NumPy; a prior that SVI never draws from, so that the pair has been trained."""
    double = pair(lambda x: dist.Normal(ZEROS.double(), 1.0).to_event(1), lambda z: z @ W, 1.0, lambda: 0.5)
    joint = LogJoint(*sound(), X.double()) if case.startswith("data") else LogJoint(*double, X)
    assert "mixes precisions and does not run as it is; all is computed in torch.float64" in joint.notes[-1]
    assert len(joint.notes) == 1
    expected = LogJoint(*sound(W.double()), X.double())
    torch.testing.assert_close(joint(expected.probe_points), expected(expected.probe_points))


def test_single_precision_is_single_throughout() -> None:
    joint = LogJoint(*FORMS["named dtype"], X)
    single = joint.converted(F32)
    value, gradient = single.grad(joint.probe_points.float())
    assert value.dtype == gradient.dtype == F32
    torch.testing.assert_close(value.double(), joint(joint.probe_points), rtol=0, atol=1e-4)


def test_what_cannot_be_converted_is_refused_in_one_line() -> None:
    class Stubborn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            if z.dtype != F32:
                raise TypeError("single precision only")
            return z

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    with pytest.raises(UnsupportedProgram, match=r"cannot be evaluated in torch.float64: single precision only") as refused:
        LogJoint(*pair(literal, lambda z: Stubborn.apply(z) @ W, 1.0, lambda: 0.5), X)
    assert "\n" not in str(refused.value)


def test_in_place_functions_change_the_tensor_they_are_given() -> None:
    kept = torch.zeros(3)
    with Promotion(F64):
        kept[0] = torch.ones((), dtype=F64)
        kept.add_(torch.ones(3, dtype=F64))
        counts = torch.arange(3)
        assert counts.double().dtype == (kept + torch.ones(3, dtype=F64)).dtype == F64
        assert counts.dtype == torch.int64
    assert kept.tolist() == [2, 1, 1]
    assert kept.dtype == F32
