"""Kernels without guards: right for one draw and one datum too, where a compiler would like to fix the size."""

from __future__ import annotations

import pytest
import torch
from support.problems.catalogue import PROBLEMS

from elbowroom.inference.compiled.graph import Graph
from elbowroom.inference.compiled.policies import policy
from elbowroom.inference.target.plain import PlainLogJoint

EVALUATIONS = ("__call__", "log_guide", "terms", "parts", "grad")


@pytest.mark.parametrize("evaluation", [pytest.param(e, marks=() if e == "grad" else pytest.mark.slow) for e in EVALUATIONS])
def test_kernels_take_every_number_of_draws_and_data(evaluation: str) -> None:
    whole = PROBLEMS["linear_gaussian_d2"](7, 1).log_joint
    generator = torch.Generator().manual_seed(0)
    for rows in (7, 1, 2):
        joint = whole if rows == 7 else whole.subset(torch.arange(rows))
        for draws in (3, 1, 40):
            z = torch.randn(draws, rows, joint.dim, generator=generator, dtype=torch.float64)
            with policy("always"):
                found = getattr(joint, evaluation)(z)
            used = next(iter(joint.graphs.used.values()))
            assert isinstance(used, Graph)
            assert used.compiled
            torch.testing.assert_close(found, getattr(PlainLogJoint, evaluation)(joint, z), rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_kernels_of_another_precision_than_that_of_the_weights() -> None:
    for other in ((joint := PROBLEMS["linear_gaussian_d1"](7, 1).log_joint).converted(torch.float32), joint):
        with policy("always"):
            found = other.grad(other.probe_points)
        assert isinstance(other.graphs.used["grad"], Graph)
        torch.testing.assert_close(found, PlainLogJoint.grad(other, other.probe_points), rtol=1e-4, atol=1e-4)
