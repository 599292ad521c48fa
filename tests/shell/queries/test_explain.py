"""What latents do: closed forms of E[x|z] on linear-Gaussian data, simplex and discrete latents, figures, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from support.cases.vaes import linear_vae, set_guide
from torch import Tensor

import elbowroom as er
from elbowroom.analysis.latents.effects import Cells, explain, moved
from elbowroom.analysis.plots.style import Plot
from elbowroom.cli.app import main
from elbowroom.conformance.properties import simulated, vae_with
from elbowroom.errors import UserError

SMALL = {"name": "mlp", "hidden": [8]}


def fit(model, rows, folder: Path, guide=None, epochs=3) -> er.Run:
    options = {"epochs": epochs, "batch_size": 32, "learning_rate": 1e-2, "dtype": "float64", "device": "cpu"}
    spec = {"model": model, "guide": guide or {"encoder": SMALL}, "fit": options}
    return er.fit(er.Experiment.from_dict(spec, data=rows), out=folder / "run")


@pytest.fixture(scope="module")
def linear(tmp_path_factory) -> er.Run:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 5)) + 0.5 * rng.normal(size=(200, 5)) + 3
    model = {"latent_dim": 3, "likelihood": {"name": "gaussian", "scale": "per_dimension"}, "decoder": "linear"}
    return fit(model, pd.DataFrame(x, columns=list("abcde")), tmp_path_factory.mktemp("linear"), {"encoder": "linear"}, 8)


@pytest.fixture(scope="module")
def people() -> pd.DataFrame:
    rng = np.random.default_rng(5)
    age = rng.normal(40, 10, 150)
    job = np.where(age + rng.normal(0, 3, 150) > 40, "clerk", "pupil")
    return pd.DataFrame({"age": age, "job": job, "visits": rng.poisson(np.exp((age - 40) / 10))})


def test_plane_and_traversals_equal_the_closed_form(linear):
    law = linear.vae.linear_gaussian()
    W, mu = law.W.numpy(), law.mu.numpy()
    answer = linear.explain(latents=(2, 0), points=7, steps=5)
    q = norm.ppf((np.arange(7) + 0.5) / 7)
    assert np.allclose(answer["z_column"], q)
    expected = mu + q[None, :, None] * W[:, 2] + q[:, None, None] * W[:, 0]  # columns: latent 2, rows: latent 0
    assert np.allclose(answer["plane"], expected, atol=1e-9)
    steps = norm.ppf((np.arange(5) + 0.5) / 5)
    assert np.allclose(answer["traversal"], mu + steps[None, :, None] * W.T[:, None, :], atol=1e-9)
    sd = answer["cell_sd"]
    assert np.allclose(answer["reach"], np.sqrt(np.square(W / sd[:, None]).mean(0) * steps.var()))


def test_traversals_start_at_the_posterior_mean_of_a_datum(linear):
    law = linear.vae.linear_gaussian()
    row = 4
    rows = linear.data.x[:20]
    answer = linear.explain(pd.DataFrame(rows, columns=list("abcde")), datum=row)
    m = law.posterior(torch.as_tensor(rows[row : row + 1]))[0][0]
    assert np.allclose(answer["base"], m, atol=1e-8)
    for k in range(3):
        z = m.repeat(len(answer["traversal_z"][k]), 1)
        z[:, k] = torch.as_tensor(answer["traversal_z"][k])
        assert np.allclose(answer["traversal"][k], z @ law.W.T + law.mu, atol=1e-8)


@pytest.mark.parametrize("others", ["prior", "aggregate"])
def test_effect_curves_equal_the_closed_form(others, linear):
    law = linear.vae.linear_gaussian()
    W, mu, n = law.W.numpy(), law.mu.numpy(), 3_000
    answer = linear.explain(others=others, draws=n, seed=2)
    if others == "prior":
        mean, covariance = np.zeros(3), np.eye(3)
    else:
        x = torch.as_tensor(linear.data.x[answer_rows(linear)])
        with torch.no_grad():
            q = linear.vae.encode(x)
        mean = q.mean.mean(0).numpy()
        covariance = np.cov(q.mean.numpy().T, bias=True) + np.diag(q.variance.mean(0))
    for k in range(3):
        rest = [j for j in range(3) if j != k]
        centre = mu + answer["effect_z"][k][:, None] * W[:, k] + W[:, rest] @ mean[rest]
        assert np.abs((answer["effect"][k] - centre) / answer["effect_error"][k]).max() < 5
        sd = np.sqrt(np.einsum("ij,jk,ik->i", W[:, rest], covariance[np.ix_(rest, rest)], W[:, rest]))
        if others == "prior":
            assert np.abs((answer["effect_high"][k] - centre) / sd - norm.ppf(0.95)).max() < 0.15
        assert np.allclose(answer["effect_error"][k], sd / np.sqrt(n), rtol=0.1)
        alone = W[:, k] ** 2 * answer["effect_z"][k].var()
        assert np.allclose(answer["share"][k], alone / (alone + sd**2), rtol=0.1, atol=0.01)


def answer_rows(run):
    with np.load(run.path / "split.npz") as split:
        return np.sort(split["test"])


def test_which_latents_matter():
    vae, x, law = linear_vae(2, 6, n=60)
    with torch.no_grad():
        vae.decoder.body.weight[:, 1] = 0.0
    law = vae.linear_gaussian()
    set_guide(vae, law)
    found = explain(vae, {"x": x})
    assert found.attrs["order"] == [0, 1]
    assert float(found["reach"][1]) < 1e-12
    assert float(found["rate"][1]) < 1e-6
    m, v = law.posterior(x)[0][:, 0], 1 / law.precision[0, 0]
    assert float(found["rate"][0]) == pytest.approx(float((0.5 * (v + m**2 - 1 - v.log())).mean()), rel=1e-5)


def test_on_a_sphere_traversals_and_the_plane_stay_there():
    vae = vae_with("prior", "von_mises_fisher", {}, latent_dim=3)
    batch = simulated(vae, n=20)
    vae.adapt(**batch)
    seen = []
    decode = vae.decode
    vae.decode = lambda z, *args, **kwargs: (seen.append(z), decode(z, *args, **kwargs))[1]  # type: ignore[method-assign]
    found = explain(vae.eval(), batch, base=torch.tensor([0.1, 0.2, -0.2], dtype=torch.float64))
    z = torch.cat([part.flatten(0, -2) for part in seen])
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(len(z), dtype=z.dtype))
    assert found.attrs["start"] == "the direction of the datum's posterior mean"
    assert found["plane"].dims[:2] == ("row", "column")
    assert np.allclose(found["base"], np.array([1, 2, -2]) / 3)
    for k in range(3):  # the moving latent has its value, the others keep their proportions
        out = moved(
            torch.tensor([[0.6, 0.0, 0.8]], dtype=torch.float64), k, torch.tensor([-0.5], dtype=torch.float64), "sphere"
        )
        assert float(out[0, 0, k]) == -0.5
        assert abs(float(out.norm()) - 1) < 1e-12


def test_a_simplex_makes_room():
    z = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    out = moved(z, 0, torch.tensor([0.6], dtype=torch.float64), "simplex")
    assert torch.allclose(out, torch.tensor([[0.6, 0.15, 0.25]], dtype=torch.float64))
    assert moved(z, 1, torch.tensor([2.0, 3.0]), "real").tolist() == [[0.2, 2.0, 0.5], [0.2, 3.0, 0.5]]


@pytest.mark.parametrize("space", ["one_hot", "binary"])
def test_states_are_all_values_of_discrete_latents(space, people, tmp_path):
    name, d = {"one_hot": ("categorical", 3), "binary": ("bernoulli", 2)}[space]
    model = {"latent_dim": d, "prior": name, "likelihood": "mixed", "decoder": SMALL}
    run = fit(model, people, tmp_path, {"family": name, "encoder": SMALL})
    answer = run.explain()
    z = torch.as_tensor(answer["state_z"])
    assert len(z) == (3 if space == "one_hot" else 4)
    assert len({tuple(row) for row in z.tolist()}) == len(z)
    with torch.no_grad():
        assert np.allclose(answer["state_x"], run.vae.centre(z))
        prior = run.vae.prior.distribution().log_prob(z).exp()
        x = torch.as_tensor(run.data.x[answer_rows(run)], dtype=torch.float64)
        log_p = torch.stack([run.vae.decode(row.expand(len(x), -1)).log_prob(x) for row in z]) + prior.log()[:, None]
        guide = torch.stack([run.vae.encode(x).log_prob(row) for row in z]).exp()
    assert np.allclose(answer["state_prior"], prior)
    assert np.allclose(answer["state_use"], log_p.softmax(0).mean(1))
    assert np.allclose(answer["state_guide"], guide.mean(1))
    labels = answer.dataset["cell"].values.tolist()
    assert labels == ["age", "job=clerk", "job=pupil", "visits"]
    assert np.allclose(answer["state_cell"][:, 1:3].sum(1), 1)
    assert {"states", "information"} <= set(answer.figures)
    assert all(isinstance(plot, Plot) for plot in answer.figures.values())


def test_cells_name_levels_and_measure_their_spread(people, tmp_path):
    run = fit({"latent_dim": 2, "likelihood": "mixed", "decoder": SMALL}, people, tmp_path)
    answer = run.explain(steps=4, draws=50)
    x = run.data.x
    with torch.no_grad():
        p = run.vae.decode(torch.zeros(1, 2, dtype=torch.float64))
    cells = Cells.of(p, ["age", "job", "visits"], ["number", "categorical", "count"], {"job": ["clerk", "pupil"]})
    is_clerk = (x[:, 1] == 0).std()
    wanted = [x[:, 0].std(), is_clerk, is_clerk, x[:, 2].std()]
    spread: Tensor = cells.spread(torch.as_tensor(x, dtype=torch.float64))
    assert np.allclose(spread, wanted)
    frame = answer.frame()
    assert len(frame) == 2 * 4 * 4
    assert frame.columns.tolist()[:4] == ["latent", "step", "cell", "effect_z"]
    assert frame["cell"].iloc[1] == "job=clerk"
    clerk, pupil = (frame[frame["cell"] == f"job={job}"]["effect"].to_numpy() for job in ("clerk", "pupil"))
    assert np.allclose(clerk + pupil, 1)
    assert [name for name, plot in answer.figures.items() if isinstance(plot, Plot)] == [
        "effects",
        "traversals",
        "plane",
        "information",
    ]


def test_refusals_are_one_line(linear):
    for options, said in (
        ({"latents": (0, 3)}, "latents: there is no latent 3; the model has latents 0 to 2, the nearest is 2"),
        ({"latents": (1, 1, 2, 0)}, "latents: one or two different latents are needed"),
        ({"datum": 99_999}, "datum: there is no row 99999; the test split has rows"),
        ({"datum": 2**64}, f"datum: there is no row {2**64}; the test split has rows"),
        ({"others": "posterior"}, "others: unknown source 'posterior'"),
        ({"steps": 1}, "steps: at least 2 are needed, got 1"),
        ({"given": {"age": 3}}, "given: there is no covariate 'age'; this model is not conditional"),
        ({"data": "tset.csv"}, "tset.csv: no such file"),
    ):
        with pytest.raises(UserError) as failed:
            linear.explain(**options)
        assert said in str(failed.value)
        assert "\n" not in str(failed.value)


def test_the_command_end_to_end(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "rows.npy", rng.random((60, 8, 8)).round())
    model = {"latent_dim": 2, "likelihood": "bernoulli", "decoder": SMALL}
    run = fit(model, np.load(tmp_path / "rows.npy"), tmp_path, epochs=1)
    command = ["explain", str(run.path), str(tmp_path / "rows.npy"), "--datum", "7", "--points", "3", "--steps", "3"]

    def call(*arguments):
        with pytest.raises(SystemExit) as done:
            main([*command, *arguments])
        return done.value.code, capsys.readouterr()

    code, told = call("--json")
    assert code == 0, told.err
    names = [Path(file).name for file in json.loads(told.out)["files"]]
    assert names == [f"explain-7-rows{end}" for end in (".nc", ".csv", ".png", "-plane.png", "-information.png")]
    for arguments, said in (
        ([], "is there already; use --overwrite"),
        (
            ["--overwrite", "--latents", "0", "5"],
            "latents: there is no latent 5; the model has latents 0 to 1, the nearest is 1",
        ),
    ):
        code, told = call(*arguments)
        assert code == 2
        assert said in told.err
        assert told.err.strip().count("\n") == 0
