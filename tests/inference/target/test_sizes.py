"""Sizes of intermediate results: they are bounded, however many latents a datum has."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from elbowroom.inference.target import log_joint
from elbowroom.inference.target.checks import probe as checks
from elbowroom.inference.target.log_joint import LogJoint

N = 4


def pair(dim: int):
    """A model of `dim` latents of which one is observed with noise, and its exact guide's family."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal((x / 2)[:, None].expand(-1, dim), 1.0).to_event(1))

    return model, guide


@pytest.mark.parametrize("dim", [10, 1000, 100_000])
def test_no_forward_run_draws_more_than_it_may(monkeypatch, dim):
    drawn = []

    def forward(joint, which, count):
        drawn.append(count * joint.n_obs * joint.dim)
        return log_joint_forward(joint, which, count)

    log_joint_forward = log_joint.forward
    monkeypatch.setattr(log_joint, "forward", forward)
    joint = LogJoint(*pair(dim), torch.arange(float(N)), dtype=None)
    assert drawn
    assert max(drawn) <= max(checks.WORK, checks.DRAWS * N * dim)
    drawn.clear()
    z = joint.sample_prior(60, 0)
    assert z.shape == (60, N, dim)
    assert max(drawn) <= log_joint.LARGE_ARRAY
    assert sum(drawn) == z.numel()
