"""What `make bench` writes and who it compares: tables that add up, contestants that do the same work."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from benchmarks import measure, posteriors, scaling, smoothing, trainers, training
from benchmarks.images import images
from benchmarks.problem import Method
from benchmarks.results import replaced

from elbowroom.inference.compiled.graph import Operations

ARGS = argparse.Namespace(
    likelihood="bernoulli",
    threads=2,
    quick=False,
    ours=True,
    print=True,
    data=1000,
    hidden=64,
    warmup=300,
    draws=300,
    repeats=2,
    methods=["hmc"],
    dim=2,
    block=1,
)


def tables(section: str) -> list[list[list[str]]]:
    """Return the cells of the tables of a markdown section: tables, rows, cells; the first row is the header."""
    found, inside = [], False
    for line in section.splitlines():
        if line.startswith("|"):
            if not inside:
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        inside = line.startswith("|")
    for table in found:
        assert set(table[1]) == {"---"}
        assert len({len(row) for row in table}) == 1, table
        del table[1]
    assert max(map(len, (line for line in section.splitlines() if not line.startswith("|")))) <= 128
    return found


def test_spans_and_ratios_by_hand():
    assert measure.span([3.0, 1.0, 2.0]) == "2 (1 .. 3)"
    assert measure.span([0.25]) == "0.25"
    assert measure.ratio([2.0, 3.0, 8.0], [1.0, 2.0, 2.0]) == "2.00 (1.50 .. 4.00)"
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        measure.table(["a", "b"], [["x"]])


def test_contestants_are_called_in_turn():
    order = []
    found = measure.in_turn([lambda i: order.append(("a", i)) or i, lambda i: order.append(("b", i)) or -i], 3)
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert found == [[0, 1, 2], [0, -1, -2]]


def test_the_table_of_steps_divides_by_the_eager_step_of_the_same_batch():
    paces = [
        training.Pace("elbowroom", 128, [4e-3, 6e-3], math.nan, 91.0),
        training.Pace(trainers.EAGER, 128, [5e-3, 5e-3], math.nan, 91.0),
        training.Pace(trainers.COMPILED, 128, [2e-3, 3e-3], 7.04, 91.0),
        training.Pace(trainers.EAGER, 1024, [4e-2, 4e-2], math.nan, 92.0),
        training.Pace(trainers.SVI, 1024, [6e-2, 8e-2], math.nan, 92.0),
    ]
    section = training.step_section([(torch.device("cpu"), 20, training.step_table(paces))], "images", training.FULL, ARGS)
    ((_, *rows),) = tables(section)
    assert [row[4] for row in rows] == ["1.00 (0.80 .. 1.20)", "1", "0.50 (0.40 .. 0.60)", "1", "1.75 (1.50 .. 2.00)"]
    assert rows[0] == ["128", "elbowroom", "", "5 (4 .. 6)", "1.00 (0.80 .. 1.20)", "91.0000"]
    assert [row[2] for row in rows] == ["", "", "7.0", "", ""]
    assert training.NO_GPU in section
    assert "784-400-20" in section


def test_the_table_of_epochs_divides_by_the_faster_of_ours():
    found = [
        training.Epochs("elbowroom, eager", 128, [0.4, 0.4, 0.4], [0.5, 0.6], [-117.0, -116.0]),
        training.Epochs("elbowroom, compiled", 128, [0.2, 0.2, 0.2], [9.0, 8.0], [-117.0, -116.0]),
        training.Epochs(trainers.SVI, 128, [0.8, 0.6, 0.7], [0.9, 0.9], [-117.5, -116.5]),
    ]
    section = training.epoch_section([(torch.device("cpu"), 20, training.epoch_table(found))], "images", training.FULL, ARGS)
    ((_, *rows),) = tables(section)
    assert [row[4] for row in rows] == ["2.00 (2.00 .. 2.00)", "1", "3.50 (3.00 .. 4.00)"]
    assert [row[2] for row in rows] == ["0.60", "9.00", "0.90"]
    assert rows[2][5] == "-117.00 (-117.50 .. -116.50)"


def test_the_table_of_posteriors_counts_effective_draws_per_second():
    def row(
        name: str, n_obs: int, seconds: list[float], ess: float, squares: float, gradients: float = math.nan
    ) -> posteriors.Row:
        shape = (n_obs, 2)
        quality = posteriors.Quality(np.full(n_obs, ess), np.full(n_obs, squares), np.full(shape, 1.5), np.full(shape, 0.02))
        method = Method(name, "float32", n_obs, 4, lambda seed: None, 3.0 if "peer" in name else math.nan)
        return posteriors.Row(method, seconds, quality, 0, "", gradients)

    rows = [
        row("elbowroom HMC", 1000, [2.0, 4.0], 400.0, 300.0, 1000.0),
        row("peer NUTS", 10, [1.0, 1.0], 200.0, 100.0, 2000.0),
        row("peer 2", 10, [1.0, 2.0], 20.0, 60.0),
    ]
    section = posteriors.section(rows, posteriors.Truth(np.zeros(1), np.ones(1), np.ones(1), "a grid"), ARGS)
    ((header, *lines),) = tables(section)
    assert [line[header.index("ESS/s")] for line in lines] == ["150,000", "2,000", "150"]
    assert [line[header.index("compile [s]")] for line in lines] == ["", "3.0", "3.0"]
    joined = " ".join(section.split())
    first, second = "75.00 (50.00 .. 100.00) x peer NUTS", "1,000.00 (1,000.00 .. 1,000.00) x peer 2"
    of_squares = ("112.50 (75.00 .. 150.00)", "250.00 (250.00 .. 250.00)")
    assert f"ESS/s of elbowroom HMC: {first} (of squares {of_squares[0]}); {second} (of squares {of_squares[1]})." in joined
    assert "ESS per gradient: 4.00 x peer NUTS." in joined
    assert "of the posterior mean, against a grid." in joined
    assert [line[header.index("gradients per posterior")] for line in lines] == ["1,000", "2,000", ""]
    assert [line[header.index("of squares, mean")] for line in lines] == ["300", "100", "60"]


def test_the_effective_draws_of_squares_see_what_those_of_means_do_not():
    """A chain that mirrors its last state is worth many draws for the mean, few for the variance."""
    rng = np.random.default_rng(0)
    walk = np.abs(np.cumsum(rng.normal(size=(4, 300, 1, 1)), axis=1) * 0.05 + 3)
    draws = walk * (-1.0) ** np.arange(300)[:, None, None]
    found = posteriors.quality(draws, posteriors.Truth(*np.array([0.0, 1.0, np.inf]).reshape(3, 1, 1), ""))
    assert found.ess[0] > 600
    assert found.squares[0] < 100


def test_the_tables_of_growth():
    def line(value: int, n_obs: int, seconds: float, gradient: float | None = None) -> scaling.Found:
        return scaling.Found(value, n_obs, seconds, f"{n_obs} of {n_obs}", gradient, 2 * seconds, 3.0, 500.0, 100.0)

    of_data = {"data": [line(1000, 1000, 40.0), line(3000, 3000, 126.0)]}
    found = {
        "grid": [line(1, 200, 1.0)],
        "hmc": [line(2, 200, 8.0)],
        "pixels": [line(64, 200, 3.0, 0.512), line(256, 200, 3.0, 2.048)],
        "chains": [line(2, 200, 3.0, 0.256)],
    }
    (data,) = tables(scaling.data_section(of_data, ARGS))
    latents, pixels, chains = tables(scaling.section(found, ARGS))
    assert data[1:] == [
        ["1,000", "3.0", "40.0", "80.0", "40.0", "1.00", "500", "100", "1000 of 1000"],
        ["3,000", "3.0", "126.0", "252.0", "42.0", "1.05", "500", "100", "3000 of 3000"],
    ]
    assert [row[:5] for row in latents[1:]] == [["grid", "1", "200", "1.0", "5.0"], ["hmc", "2", "200", "8.0", "40.0"]]
    assert [row[1:3] for row in pixels[1:]] == [["0.51", "10.00"], ["2.05", "10.00"]]
    assert chains[1][1:3] == ["0.26", "10.00"]


def test_the_section_of_k_hat_and_its_measurement():
    times, error = smoothing.measured(3, 500, 2)
    assert error < 1e-10
    section = smoothing.section(times, error, "3 data x 500 draws", ARGS)
    ((_, row),) = tables(section)
    assert row[0] == "3 data x 500 draws"
    assert replaced(section, section) == section


def test_a_quick_look_says_so():
    quick = argparse.Namespace(**{**vars(ARGS), "quick": True})
    assert any("quick look" in line for line in measure.circumstances(quick, ("torch",), "python -m benchmarks"))
    assert not any("quick look" in line for line in measure.circumstances(ARGS, ("torch",), "python -m benchmarks"))


def test_a_quick_look_leaves_the_results_alone():
    args = measure.parser("grid", "").parse_args(["--quick"])
    assert args.print
    assert not measure.parser("grid", "").parse_args([]).print


def test_all_contestants_take_the_same_steps():
    x = torch.bernoulli(torch.full((32, 12), 0.3), generator=torch.Generator().manual_seed(3))
    x[:, 5] = 0  # a pixel that never changes
    vae = trainers.vae_of(x, 8, 2)
    assert float(vae.posterior.loc.mean()) > 0  # the encoders standardise
    losses = {}
    with torch.random.fork_rng(), pyro.get_param_store().scope(), pyro.validation_enabled(False):
        ours = trainers.Plain(vae).into(vae)
        for name, take in (
            ("by hand", trainers.by_hand(vae)),
            ("svi", trainers.by_svi(vae)),
            ("ours", trainers.ours(ours, len(x), trainers.compilations()[0])),
        ):
            torch.manual_seed(1)
            losses[name] = [take(x, count) for count in (1, 4)]
    assert losses["svi"] == pytest.approx(losses["by hand"], rel=1e-5)
    assert losses["ours"] == pytest.approx(losses["by hand"], rel=1e-5)
    assert losses["ours"][0] != pytest.approx(losses["ours"][1], rel=1e-4)  # they learn


def test_the_products_of_a_step_are_those_of_a_step_by_hand():
    x = torch.bernoulli(torch.full((32, 12), 0.3), generator=torch.Generator().manual_seed(3))
    vae = trainers.vae_of(x, 8, 2)
    with Operations() as alone:
        trainers.products(vae)(x, 1)
    with torch.random.fork_rng(), Operations() as by_hand:
        trainers.by_hand(vae)(x, 1)
    assert alone.flops == by_hand.flops


def test_fits_leave_the_start_alone_and_give_back_what_was_learned():
    x = torch.bernoulli(torch.full((40, 12), 0.3), generator=torch.Generator().manual_seed(4))
    vae = trainers.vae_of(x, 8, 2)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    fits = [
        trainers.fit_by_hand,
        trainers.fit_by_svi,
        training.fitters(peers=False)[trainers.our_name(trainers.compilations()[0])],
    ]
    with torch.random.fork_rng(), pyro.validation_enabled(False):
        for fit in fits:
            seconds: list[float] = []
            moved = fit(vae, x, 20, 3, 0, seconds.append).state_dict()
            assert len(seconds) == 3
            assert all(not torch.equal(moved[name], value) for name, value in before.items() if name.endswith("weight"))
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_images_without_mnist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("ELBOWROOM_DATA", str(tmp_path))
    x, held_out, what = images(50, 20)
    assert x.shape == (50, 784)
    assert held_out.shape == (20, 784)
    assert sorted(x.unique().tolist()) == [0.0, 1.0]
    assert "no MNIST at hand" in what
    assert 0.1 < float(x.mean()) < 0.5


@pytest.mark.slow
def test_a_quick_look_runs_without_the_peers():
    results = Path(training.__file__).with_name("RESULTS.md")
    before = results.read_bytes()
    command = [sys.executable, "-m", "benchmarks", "--quick", "--ours", "--threads", "1"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=measure.ROOT)
    assert out.returncode == 0, out.stderr[-2000:]
    for heading in (training.STEP, training.EPOCH, posteriors.HEADING, smoothing.HEADING, scaling.DATA, scaling.HEADING):
        assert heading in out.stdout.splitlines()
    assert "== grid:" in out.stdout
    assert results.read_bytes() == before
