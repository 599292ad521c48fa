"""Every posterior that is returned is what the installed ArviZ takes, in memory: 0.23 here, 1.x by `make test-arviz1`."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

import elbowroom as er
from elbowroom.analysis import idata
from elbowroom.analysis.measures.expectations import expectations
from elbowroom.errors import UserError

OLD = int(az.__version__.split(".")[0]) < 1
NATIVE = az.InferenceData if OLD else xr.DataTree
PAGE = (Path(__file__).parents[2] / "docs" / "arviz.md").read_text(encoding="utf-8")
SUMMARIES = ("summary", "ess", "rhat", "mcse", "hdi", "extract", *(() if OLD else ("eti", "mode")))
BOTH = ("plot_forest", "plot_trace", "plot_rank", "plot_autocorr", "plot_ess", "plot_mcse", "plot_pair")
PLOTS = (
    (*BOTH, "plot_posterior", "plot_density", "plot_violin") if OLD else (*BOTH, "plot_dist", "plot_ridge", "plot_rank_dist")
)
DRAWN = ("grid", "hmc", "enumeration")  # four chains, eight chains, integers: every plot; of the others one, which is faster
DATA = torch.tensor([0.0, 3.0, 11.0])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    plt.close("all")


def pairs() -> dict[str, tuple[Any, Any, list[str]]]:
    """Name -> latents of one datum of the model, of the guide, and references: each kind of site that the schema knows."""
    sample, eye = pyro.sample, torch.eye(2)

    def rate() -> torch.Tensor:
        return sample("rate", dist.Gamma(2.0, 0.5))

    def vector() -> torch.Tensor:
        return sample("z", dist.MultivariateNormal(torch.zeros(2), eye)).exp().sum(-1)

    def shares() -> torch.Tensor:
        return 9 * sample("share", dist.Dirichlet(torch.tensor([2.0, 2.0, 2.0])))[..., 0] + 0.1

    def kind() -> torch.Tensor:
        return 5.0 * sample("kind", dist.Categorical(torch.tensor([0.5, 0.3, 0.2]))) + 0.5

    def scoped() -> torch.Tensor:
        return sample("inner/scale", dist.LogNormal(0.0, 1.0))

    def two() -> torch.Tensor:
        return sample("a", dist.Gamma(2.0, 1.0)) + sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1)).square().sum(-1)

    def guide_of(name: str) -> Any:
        shape = {"z": (2,), "b": (2,)}.get(name, ())

        def draw(n: int) -> None:
            if name == "share":
                sample(name, dist.Dirichlet(torch.ones(n, 3) * 2))
            elif name == "kind":
                sample(name, dist.Categorical(torch.tensor([0.4, 0.3, 0.3]).expand(n, 3)))
            elif shape:
                sample(name, dist.Normal(torch.zeros(n, *shape), 0.9).to_event(1))
            else:
                sample(name, dist.LogNormal(torch.zeros(n), 0.8))

        return draw

    return {
        "positive": (rate, [guide_of("rate")], ["grid", "hmc", "importance", "ais"]),
        "vector": (vector, [guide_of("z")], ["grid"]),
        "simplex": (shares, [guide_of("share")], ["importance"]),
        "discrete": (kind, [guide_of("kind")], ["enumeration"]),
        "scoped": (scoped, [guide_of("inner/scale")], ["grid"]),
        "two sites": (two, [guide_of("a"), guide_of("b")], ["importance"]),
    }


@cache
def audited(name: str) -> er.Audit:
    latents, guides, references = pairs()[name]

    def model(y: torch.Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson(latents()), obs=y)

    def guide(y: torch.Tensor) -> None:
        with pyro.plate("data", len(y)):
            for draw in guides:
                draw(len(y))

    return er.audit(model, guide, DATA, references=references, diagnose=False)


def call(name: str, posterior: Any) -> Any:
    function = getattr(az, name)
    some = {"coords": {"obs_id": [0, 2]}} if "coords" in inspect.signature(function).parameters else {}
    return function(posterior, **some)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "positive" else ()) for n in pairs()])
def test_arviz_takes_every_posterior(name: str) -> None:
    audit = audited(name)
    assert set(audit.posteriors) == {"guide", *pairs()[name][2]}
    for method, posterior in audit.posteriors.items():
        assert isinstance(posterior, NATIVE), method
        for function in (*SUMMARIES, *(PLOTS if method in DRAWN else PLOTS[:1])):
            call(function, posterior)
            plt.close("all")
        table = az.summary(posterior, round_to="none")
        sites = audit.trees[method]["posterior"].to_dataset()
        means = np.concatenate([value.mean(("chain", "draw")).values.ravel() for value in sites.data_vars.values()])
        np.testing.assert_allclose(np.sort(table["mean"].astype(float)), np.sort(means.astype(float)), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def audit() -> er.Audit:
    return audited("positive")


def test_groups_and_attributes_are_kept(audit: er.Audit) -> None:
    for method, tree in audit.trees.items():
        posterior = audit.posteriors[method]
        assert isinstance(tree, xr.DataTree)
        assert posterior.attrs["method"] == method
        assert {"posterior", "sample_stats", "observed_data"} <= set(tree.children)
        for group, content in tree.children.items():
            there = posterior[group] if OLD else posterior[group].to_dataset()
            xr.testing.assert_identical(there, content.to_dataset())
            assert there.attrs == content.to_dataset().attrs
        assert posterior.posterior["rate"].dims == ("chain", "draw", "obs_id")


def test_it_is_the_same_after_a_file(audit: er.Audit, tmp_path: Path) -> None:
    audit.save(tmp_path)
    again = er.Audit.load(tmp_path)
    for method, posterior in again.posteriors.items():
        assert isinstance(posterior, NATIVE)
        pair = (az.summary(posterior), az.summary(audit.posteriors[method]))
        assert pair[0].equals(pair[1])
        assert az.summary(az.from_netcdf(tmp_path / "posteriors" / f"{method}.nc")).equals(pair[0])


def test_what_a_user_adds_is_saved(tmp_path: Path) -> None:
    audit = er.Audit(audited("scoped").table, audited("scoped").trees)
    posterior = audit.posteriors["grid"]
    double = 2 * posterior.posterior["inner.scale"]
    if OLD:
        posterior.posterior["double"] = double
    else:
        posterior["posterior"]["double"] = double
    assert audit.posteriors["grid"] is posterior
    audit.save(tmp_path)
    np.testing.assert_array_equal(er.Audit.load(tmp_path).posteriors["grid"].posterior["double"], double)


def test_memory_is_released_where_a_file_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else Python 3.13 complains on stderr once the memory is collected."""
    packed = memoryview(b"a file")
    monkeypatch.setattr(xr.Dataset, "to_netcdf", lambda *_, **__: packed)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        idata.write(xr.Dataset(), tmp_path / "file" / "a.nc")
    with pytest.raises(ValueError, match="released"):
        packed.tobytes()


def test_it_is_pickled_and_given_on(audit: er.Audit) -> None:
    pickled = pickle.loads(pickle.dumps(audit))
    for other in (pickled, er.Audit(audit.table, audit.posteriors), er.Audit(audit.table, audit.trees)):
        assert list(other.posteriors) == list(audit.posteriors)
        assert az.summary(other.posteriors["grid"]).equals(az.summary(audit.posteriors["grid"]))
    assert "grid" in audit.posteriors
    assert "banana" not in audit.posteriors
    with pytest.raises(KeyError):
        audit.posteriors["banana"]


def test_expectations_take_both_types(audit: er.Audit) -> None:
    def large(sites: xr.Dataset) -> xr.DataArray:
        return sites["rate"] > 2

    native = expectations(large, audit.posteriors["guide"], audit.posteriors["grid"])
    assert native.identical(expectations(large, audit.trees["guide"], audit.trees["grid"]))
    assert native.identical(audit.expectations(large, "grid"))


def test_a_posterior_that_was_not_reached_is_nan_and_no_error(audit: er.Audit) -> None:
    tree = audit.trees["hmc"].copy(deep=True)
    tree["posterior"]["rate"][..., 0] = np.nan
    posterior = idata.native(tree)
    table = az.summary(posterior, round_to="none")
    assert table["mean"].isna().tolist() == [True, False, False]
    for function in SUMMARIES:
        call(function, posterior)


@pytest.mark.parametrize("name", ["loo", "waic"])
def test_loo_refuses_with_the_reason_and_what_to_do_instead(audit: er.Audit, name: str) -> None:
    for posterior in audit.posteriors.values():
        for found in (posterior, copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))):
            if hasattr(az, name):  # ArviZ 1.x has no waic
                with pytest.raises(TypeError, match=r"no log_likelihood, on purpose: .* er.compare"):
                    getattr(az, name)(found)


def test_a_log_likelihood_of_ones_own_is_used(audit: er.Audit) -> None:
    own = xr.Dataset({"y": (("chain", "draw", "obs_id"), np.random.default_rng(0).normal(size=(4, 100, 3)))})
    tree = idata._Tree.from_dict({node.path: node.to_dataset(inherit=False) for node in audit.trees["grid"].subtree})
    tree["log_likelihood"] = own
    assert tree.log_likelihood["y"].shape == (4, 100, 3)
    posterior = copy.deepcopy(audit.posteriors["grid"])
    if isinstance(posterior, xr.DataTree):
        posterior["log_likelihood"] = own
    else:
        posterior.add_groups(log_likelihood=own)
    assert posterior.log_likelihood["y"].shape == (4, 100, 3)


def test_the_page_says_what_to_do_instead_of_loo() -> None:
    (section,) = re.findall(r"## What ArviZ does not compute here\n(.*)", PAGE, flags=re.S)
    assert "az.loo" in section
    assert "elbowroom compare" in section


# -- answers, predictions, the page --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> er.Run:
    settings = ["fit.epochs=2", "data.n=200", "fit.device=cpu", "audit.diagnose=false", "audit.draws=200", "audit.keep=100"]
    experiment = er.Experiment.load(Path(er.__file__).parent / "experiments" / "linear_gaussian.yaml", set=settings)
    return er.fit(experiment, out=tmp_path_factory.mktemp("arviz") / "run")


def test_answers_with_draws_are_posteriors(run: er.Run) -> None:
    rows = np.asarray(run.data.x[:6])
    answer = run.encode(rows, samples=60)
    assert isinstance(answer.posterior, NATIVE)
    assert answer.posterior.posterior["z"].dims == ("chain", "draw", "obs_id", "latent")
    np.testing.assert_array_equal(answer.posterior.posterior["z"][0], answer["draws"])
    holed = rows.copy()
    holed[:, 3] = np.nan
    for found in (answer, run.impute(holed, samples=60), run.sample(data=rows, samples=60)):
        for function in ("summary", "ess", "mcse", "hdi", "extract", "plot_forest"):
            call(function, found.posterior)
            plt.close("all")
    for nothing in (run.encode(rows), run.impute(holed), run.score(rows), run.sample(5)):
        with pytest.raises(UserError, match=r"^posterior: this answer holds no draws of rows"):
            _ = nothing.posterior


def test_the_audit_of_a_run_is_arvizs(run: er.Run) -> None:
    for audit in (run.audit(), er.Audit.load(run.path)):
        assert all(len(az.summary(posterior)) == 2 * audit.table.sizes["obs_id"] for posterior in audit.posteriors.values())


@pytest.mark.usefixtures("diagnosed")
def test_the_page_runs(run: er.Run) -> None:
    names: dict[str, Any] = {"run": run}
    for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
        exec(compile(code, "docs/arviz.md", "exec"), names)
        plt.close("all")
    rows = re.findall(r"^\| `(az\..*?)` \| `(az\..*?)` \|$", PAGE, flags=re.M)
    assert len(rows) == 3
    for old, new in rows:
        exec(compile(old if OLD else new, "docs/arviz.md", "exec"), names)
        plt.close("all")
    assert isinstance(names["audit"].predictive, NATIVE)
    with pytest.raises(UserError, match=r"^predictive: the audit has no draws of data"):
        _ = er.Audit(names["audit"].table, names["audit"].posteriors).predictive
