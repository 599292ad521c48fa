"""Fixtures for every test: a fixed seed, a clean parameter store, and a guard against changed global state."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per pytest-xdist worker
os.environ["MPLBACKEND"] = "Agg"

from collections.abc import Iterator

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from torch import Tensor

from elbowroom.analysis.audit import auditor as auditing
from elbowroom.analysis.audit.diagnosis import diagnose
from elbowroom.analysis.verdict import judgement, rules
from elbowroom.models.guides.base import AmortizedGuide, Family
from elbowroom.models.guides.normal import DiagonalNormal, FullRankNormal
from elbowroom.models.likelihoods.binary import Bernoulli
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.linear_gaussian import LinearGaussian
from elbowroom.models.networks.mlp import MLP, Linear
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE

torch.set_num_threads(1)


def _globals() -> dict[str, object]:
    return {
        "torch default dtype": torch.get_default_dtype(),
        "torch threads": torch.get_num_threads(),
        "torch grad mode": torch.is_grad_enabled(),
        "torch deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "pyro validation": pyro.infer.util.is_validation_enabled(),
        "distribution validation": torch.distributions.Distribution._validate_args,
        "pyro handler stack": len(pyro.poutine.runtime._PYRO_STACK),
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    """Seed, clear the parameter store, and fail a test that leaves a torch or Pyro global changed."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries may still use the global generator
    pyro.clear_param_store()
    before = _globals()
    yield
    after = _globals()
    pyro.clear_param_store()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"the test left global state changed: {changed}"


@pytest.fixture(scope="session", autouse=True)
def _undiagnosed() -> Iterator[None]:
    """Let audits judge by their gaps alone: the rest takes seconds each. Tests of it ask for `diagnosed`."""

    def judged(log_joint: object, table: xr.Dataset, *_: object, **__: object) -> xr.DataTree:
        verdicts = judgement.as_dataset(rules.judge(table))
        return xr.DataTree.from_dict({"/verdicts": verdicts, "/": xr.Dataset(attrs={"missing": ""})})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auditing, "find_out", judged)
        yield


@pytest.fixture
def diagnosed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let audits find out all that verdicts rest on."""
    monkeypatch.setattr(auditing, "find_out", diagnose)


def linear_vae(
    dim: int, width: int, *, family: type[Family] = DiagonalNormal, noise: float = 0.5, n: int = 40, seed: int = 0
) -> tuple[VAE, Tensor, LinearGaussian]:
    """A linear-Gaussian VAE in float64 with strongly correlated loadings, data drawn from it, and its closed form."""
    generator = torch.Generator().manual_seed(seed)
    likelihood = Gaussian((width,), scale=noise)
    q = family(dim)
    vae = VAE(Normal(dim), likelihood, Linear((dim,), width), AmortizedGuide(Linear((width,), q.param_dim), q)).double()
    with torch.no_grad():
        loadings = torch.randn(width, dim, generator=generator, dtype=torch.float64) / width**0.5
        vae.decoder.body.weight.copy_(loadings @ (torch.eye(dim) + 0.8 * torch.ones(dim, dim)).double())
        vae.decoder.body.bias.copy_(torch.randn(width, generator=generator, dtype=torch.float64))
    oracle = vae.linear_gaussian()
    assert oracle is not None
    return vae, oracle.sample(n, generator)[1], oracle


def set_guide(vae: VAE, oracle: LinearGaussian) -> None:
    """Give a linear encoder the best member of its family for every x."""
    M, k = oracle.precision, oracle.W.shape[1]
    gain = torch.linalg.inv(M) @ (oracle.W / oracle.psi[:, None]).T  # m(x) = gain (x - mu)
    body, family = vae.posterior.encoder.body, vae.posterior.family
    inverse = lambda s: (s - 1e-5).expm1().log() - torch.tensor(1.0, dtype=torch.float64).expm1().log()
    with torch.no_grad():
        body.weight.zero_()
        body.weight[:k] = gain
        body.bias[:k] = -gain @ oracle.mu
        if isinstance(family, FullRankNormal):
            root = torch.linalg.cholesky(torch.linalg.inv(M))
            body.bias[k : 2 * k] = inverse(root.diagonal())
            body.bias[2 * k :] = root[family.rows, family.columns]
        else:
            body.bias[k:] = inverse(M.diagonal().rsqrt())


def mlp_vae(dim: int = 2, width: int = 12, *, family: type[Family] = DiagonalNormal, seed: int = 0) -> VAE:
    """A small Bernoulli VAE with tanh networks and weights large enough for non-Gaussian posteriors."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        q = family(dim)
        options = {"hidden": (16,), "activation": "tanh"}
        vae = VAE(
            Normal(dim),
            Bernoulli((width,)),
            MLP((dim,), width, **options),
            AmortizedGuide(MLP((width,), q.param_dim, **options), q),
        )
        with torch.no_grad():
            for parameter in vae.decoder.parameters():
                parameter.mul_(3)
    return vae
