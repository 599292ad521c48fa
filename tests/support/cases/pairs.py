"""A plain Pyro pair that several tests start from."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch


def normal_guide(y):
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))


def normal_model(y):
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)
