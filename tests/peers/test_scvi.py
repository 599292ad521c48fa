"""`er.adapt.scvi` against scvi-tools: its loss, its reconstruction, its marginal likelihood."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pyro
import pytest
import torch

import elbowroom as er
from elbowroom.errors import UserError
from peers.imported import estimates, peer

scvi = peer("scvi")
anndata = peer("anndata")
pytestmark = pytest.mark.filterwarnings("ignore")

CELLS, GENES, D = 300, 20, 2
ROWS = list(range(8))


def table(seed: int = 0) -> Any:
    """Counts of cells in two batches, with a covariate of each kind."""
    rng = np.random.default_rng(seed)
    batch = rng.integers(0, 2, CELLS)
    effect = np.exp(rng.normal(size=(CELLS, 2)) @ rng.normal(size=(2, GENES)) * 0.5 + rng.normal(size=(2, GENES))[batch] * 0.3)
    mean = np.exp(rng.normal(5, 0.3, CELLS))[:, None] * effect / effect.sum(1, keepdims=True)
    made = anndata.AnnData(rng.poisson(rng.gamma(3.0, mean / 3.0)).astype(np.float32))
    made.obs["batch"], made.obs["donor"] = batch.astype(str), rng.integers(0, 3, CELLS).astype(str)
    made.obs["age"], made.obs["size"] = rng.normal(size=CELLS), np.asarray(made.X).sum(1) / 100
    return made


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """Training speaks through the loggers of lightning, and sets torch's threads and gradients for the process."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning", "scvi")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def trained(cls: str = "SCVI", setup: dict[str, Any] | None = None, epochs: int = 5, **options: Any) -> Any:
    made, kind = table(), getattr(scvi.model, cls)
    kind.setup_anndata(made, **(setup if setup is not None else {"batch_key": "batch"}))
    torch.manual_seed(0)
    model = kind(made, n_latent=D, n_hidden=32, **options)
    quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
    if not model.module.use_observed_lib_size:  # its encoder has to find the library's scale first
        epochs, quiet["plan_kwargs"] = 12 * epochs, {"lr": 1e-2}
    model.train(max_epochs=epochs, accelerator="cpu", **quiet)
    return model


def own_elbo(model: Any, tensors: Any) -> float:
    """-(reconstruction_loss + kl_local) of scvi-tools, mean over cells."""
    _, _, loss = model.module(tensors)
    return -(loss.reconstruction_loss["reconstruction_loss"] + sum(loss.kl_local.values())).mean().item()


EVERYTHING = {"batch_key": "batch", "categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]}
CASES = {
    "nb": {"gene_likelihood": "nb"},
    "zinb": {"gene_likelihood": "zinb"},
    "poisson": {"gene_likelihood": "poisson"},
    "library": {"gene_likelihood": "nb", "use_observed_lib_size": False},
    "zinb library": {"gene_likelihood": "zinb", "use_observed_lib_size": False},
    "covariates": {"gene_likelihood": "nb", "setup": EVERYTHING, "encode_covariates": True},
    "gene-batch": {"gene_likelihood": "nb", "dispersion": "gene-batch"},
    "gene-cell": {"gene_likelihood": "zinb", "dispersion": "gene-cell"},
    "size factor": {"gene_likelihood": "nb", "setup": {"batch_key": "batch", "size_factor_key": "size"}},
    "logistic normal": {"gene_likelihood": "nb", "latent_distribution": "ln"},
    "embedding": {"gene_likelihood": "nb", "batch_representation": "embedding"},
    "linear": {"cls": "LinearSCVI", "gene_likelihood": "nb", "use_observed_lib_size": True},
    "linear library": {"cls": "LinearSCVI", "gene_likelihood": "zinb"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_elbo_is_that_of_scvi_tools(case: str) -> None:
    model = trained(**CASES[case])
    pair = er.adapt.scvi(model)
    args = pair.rows(ROWS)
    elbo = pyro.infer.Trace_ELBO()
    with torch.no_grad():
        own = torch.tensor([own_elbo(model, args[0]) for _ in range(300)])
        ours = torch.tensor([-elbo.loss(*pair, *args) / len(ROWS) for _ in range(300)])
    error = float((own.var() / 300 + ours.var() / 300).sqrt())
    assert ours.mean().item() == pytest.approx(own.mean().item(), abs=5 * error)
    assert error < 0.5


@pytest.mark.parametrize("case", ["nb", "zinb", "covariates", "linear"])
def test_the_evidence_is_scvi_tools_own_estimate(case: str) -> None:
    """Both by importance sampling from the same guide, at the cells where that can be trusted.

    With a latent library it can nowhere: two estimates of scvi-tools' own differ by nats; the densities are compared below.
    """
    pair = er.adapt.scvi(model := trained(**CASES[case]))
    args = pair.rows(range(40))
    elbo, _, first = estimates(pair, *args, draws=8000)
    with torch.no_grad():
        own = [model.module.marginal_ll(args[0], n_mc_samples=8000, n_mc_samples_per_pass=1000) for _ in range(2)]
    steady = (own[0] - own[1]).abs() < 0.05
    assert steady.sum() >= 5
    off = (first - own[0])[steady]
    assert off.abs().median() < 0.05
    assert off.abs().median() < 0.3 * (own[0] - elbo)[steady].median()  # it tells them apart


def test_the_audit_by_a_grid_lies_above_both_bounds() -> None:
    pair = er.adapt.scvi(trained(**CASES["nb"]))
    args = pair.rows(ROWS[:4])
    table = er.audit(*pair, *args, references="grid", diagnose=False).table
    _, _, sampled = estimates(pair, *args)
    assert (table["log_evidence"] > table["elbo"]).all()
    assert abs(torch.tensor(table["log_evidence"].values) - sampled).median() < 0.1


def test_rates_are_those_of_scvi_tools() -> None:
    model = trained(gene_likelihood="nb")
    pair = er.adapt.scvi(model)
    args = pair.rows(ROWS)
    with torch.no_grad():
        z = torch.tensor(model.get_latent_representation(indices=ROWS))
        q = pyro.poutine.trace(pair.guide).get_trace(*args).nodes["z"]["fn"]
        torch.testing.assert_close(q.mean, z)
        p = pyro.poutine.trace(pyro.poutine.condition(pair.model, {"z": z})).get_trace(*args).nodes["x"]["fn"]
        library = args[0]["X"].sum(1, keepdim=True)
        own = model.module.generative(z, library.log(), args[0]["batch"], y=args[0]["labels"])["px"]
        torch.testing.assert_close(p.mean, own.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(p.log_prob(args[0]["X"]), own.log_prob(args[0]["X"]).sum(-1), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("case", ["library", "zinb library", "linear library"])
def test_a_latent_library_has_the_densities_of_scvi_tools(case: str) -> None:
    model = trained(**CASES[case])
    pair = er.adapt.scvi(model)
    args = pair.rows(ROWS)
    x, batch = args[0]["X"], args[0]["batch"]
    sites = {"z": torch.randn(len(ROWS), D), "library": torch.randn(len(ROWS), 1) * 0.3 + 5}
    with torch.no_grad():
        made = model.module.generative(sites["z"], sites["library"], batch, y=args[0]["labels"])
        found = model.module.inference(**model.module._get_inference_input(args[0]))
        own = made["px"].log_prob(x).sum() + made["pz"].log_prob(sites["z"]).sum() + made["pl"].log_prob(sites["library"]).sum()
        own_q = found["qz"].log_prob(sites["z"]).sum() + found["ql"].log_prob(sites["library"]).sum()
        p, q = (pyro.poutine.trace(pyro.poutine.condition(f, sites)).get_trace(*args).log_prob_sum() for f in pair)
    torch.testing.assert_close(p, own, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(q, own_q)


def test_rows_stand_in_the_order_asked_for() -> None:
    model = trained(epochs=1)
    x = torch.tensor(np.asarray(model.adata.X))
    assert torch.equal(er.adapt.scvi(model).rows([7, 2, 299])[0]["X"], x[[7, 2, 299]])


def test_many_draws_are_evaluated_together() -> None:
    pair = er.adapt.scvi(trained(epochs=1))
    assert er.LogJoint(*pair, *pair.rows(ROWS)).mode == "vmap"


def test_others_are_refused() -> None:
    made = table()
    scvi.model.PEAKVI.setup_anndata(made)
    with pytest.raises(UserError, match=r"adapt\.scvi: PEAKVI is not supported; supported are scvi\.model\.SCVI"):
        er.adapt.scvi(scvi.model.PEAKVI(made))
