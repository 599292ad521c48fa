"""Columns whose values the precision does not keep apart are refused; all others give the same ELBO in any units."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

import elbowroom as er
from elbowroom.errors import DataError
from elbowroom.system.rounding import STEPS, coarse

PER_COLUMN = {"name": "gaussian", "scale": "per_dimension"}  # one noise for all columns depends on their units
TREE: dict[str, Any] = {
    "schema": 1,
    "model": {"latent_dim": 1, "likelihood": PER_COLUMN, "decoder": {"name": "mlp", "hidden": [8]}},
    "guide": {"encoder": {"name": "mlp", "hidden": [8]}},
    "fit": {"epochs": 8, "device": "cpu"},
}
N, WIDTH = 120, 10
COLUMN = re.compile(r": column (\d+): (?:it varies by|half of its different values lie within) ")


def plain(rng: np.random.Generator, width: int = WIDTH) -> np.ndarray:
    return rng.normal(size=(N, 1)) @ rng.normal(size=(1, width)) + 0.5 * rng.normal(size=(N, width))


def experiment(x: Any, **fit: Any) -> er.Experiment:
    return er.Experiment.from_dict(TREE | {"fit": TREE["fit"] | fit}, data=x)


def elbo(x: np.ndarray, tmp_path: Any) -> float:
    run = er.fit(experiment(x), out=tmp_path / "run", overwrite=True)
    return float(np.mean(run.encode(x[:40], references="none")["elbo"]))


def refused(x: np.ndarray) -> int | None:
    """The column that is refused, after its message was looked at."""
    try:
        experiment(x).check()
    except DataError as error:
        message = str(error)
    else:
        return None
    found = COLUMN.search(message)
    assert found is not None, message
    assert "; use fit.dtype = float64, or subtract " in message
    return int(found[1])


@pytest.mark.parametrize("seed", [pytest.param(s, marks=pytest.mark.slow if s >= 8 else ()) for s in range(30)])
def test_ten_columns_in_other_units_have_the_same_elbo_or_are_refused(seed: int, tmp_path: Any) -> None:
    """300 columns in all: offsets 1e-9 to 1e12 of either sign, spreads from 1e-10 of the offset to 1e4 of it."""
    rng = np.random.default_rng(seed)
    x = plain(rng)
    offset = 10 ** rng.uniform(-9, 12, WIDTH) * rng.choice([-1, 1], WIDTH)
    scale = np.abs(offset) * 10 ** rng.uniform(-10, 4, WIDTH)
    units, kept = offset + scale * x, list(range(WIDTH))
    while kept and (bad := refused(units[:, kept])) is not None:
        column = units[:, kept.pop(bad)]
        assert column.std() / np.spacing(np.float32(abs(column.mean()))) < 2.1 * STEPS, "refused without need"
    assert all(abs(units[:, i].mean()) / units[:, i].std() < 2**24 / STEPS for i in kept)
    if kept:
        found = elbo(units[:, kept], tmp_path) + float(np.log(scale[kept]).sum())
        assert abs(found - elbo(x[:, kept], tmp_path)) < 2e-3 * len(kept)


@pytest.mark.parametrize("offset", [1e5, 1.7e9, -3e10])
def test_float64_takes_what_float32_does_not(offset: float, tmp_path: Any) -> None:
    x = plain(np.random.default_rng(0), 2)
    with pytest.raises(DataError, match=r"numbers of float32 are .* apart; use fit.dtype = float64, or subtract"):
        experiment(offset + 1e-2 * x).check()
    experiment(offset + 1e-2 * x, dtype="float64").check()
    with pytest.raises(DataError, match=r"numbers of float64 are .* apart; subtract .* before it is stored$"):
        experiment(offset + 1e-16 * abs(offset) * x, dtype="float64").check()


def test_unix_seconds_by_name_in_a_frame() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"y": rng.normal(size=200), "time": 1_700_000_000 + rng.integers(0, 100, size=200)})
    with pytest.raises(
        DataError, match=r"column 'time': it varies by [\d.]+ at 1.7e\+09, where numbers of float32 are 128 apart"
    ):
        experiment(frame).check()


def test_covariates_are_columns_too() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"y": rng.normal(size=200), "w": rng.normal(size=200), "t": 1.7e9 + rng.integers(0, 100, size=200)})
    tree = TREE | {"data": {"x": ["y", "w"], "covariates": ["t"]}}
    with pytest.raises(DataError, match=r"covariate 't': it varies by "):
        er.Experiment.from_dict(tree, data=frame).check()


def test_zeros_beside_them_hide_nothing() -> None:
    rng = np.random.default_rng(0)
    x = np.stack([1.7e9 + rng.integers(0, 100, size=300), rng.normal(size=300)], 1).astype(float)
    x[:90, 0] = 0
    with pytest.raises(DataError, match=r"column 0: half of its different values lie within [\d.]+ at 1.7e\+09"):
        experiment(x).check()


CORNER = np.eye(3)[:1].T * np.eye(3)[:1]
CLEAN = {
    "levels": lambda rng: rng.integers(0, 3, (200, 2)),
    "rare": lambda rng: (np.arange(40_000) == 7)[:, None] * np.ones((1, 2)),
    "constant": lambda rng: np.stack([np.full(200, 0.1 + 0.2), rng.normal(size=200)], 1),
    "heavy tails": lambda rng: rng.standard_cauchy((200, 2)) * np.array([1e-6, 1e6]),
    "log-normal": lambda rng: np.exp(8 * rng.normal(size=(200, 2))),
    "years": lambda rng: rng.integers(1990, 2021, (200, 2)),
    "kelvin": lambda rng: 300 + 0.1 * rng.normal(size=(200, 2)),
    "pascal": lambda rng: 101_325 + 500 * rng.normal(size=(200, 2)),
    "seconds of years": lambda rng: 1.7e9 + 3e6 * rng.normal(size=(200, 2)),
    "holes": lambda rng: np.where(rng.random((200, 2)) < 0.5, np.nan, rng.normal(size=(200, 2))),
    "two levels that differ by rounding": lambda rng: rng.choice([0.3, 0.1 + 0.2, 0.7, 0.1 * 7], (200, 2)),
    "an almost constant position": lambda rng: rng.random((60, 3, 3)) ** (1e-6 * CORNER + 1 - CORNER),
    "image": lambda rng: rng.integers(0, 256, (50, 6, 6)) / 255.0,
}


@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.parametrize("pieces", [1, 7])
def test_what_float32_holds_well_is_let_through(name: str, pieces: int) -> None:
    x = CLEAN[name](np.random.default_rng(0))
    assert coarse(np.array_split(x, pieces), "float32") is None


def test_pieces_give_the_same_as_the_whole() -> None:
    rng = np.random.default_rng(0)
    x = np.sort(1e7 + rng.normal(size=(500, 3)) * np.array([1e6, 1e4, 1e2]), 0)
    whole, parts = coarse([x], "float32"), coarse(np.array_split(x, 9), "float32")
    assert whole.index == parts.index == (2,)
    assert whole.spread == pytest.approx(parts.spread, rel=1e-9)
    assert whole.spread == pytest.approx(x[:, 2].std(), rel=1e-9)


@pytest.mark.slow
def test_an_audit_of_rounded_tensors_says_so() -> None:
    def model(y: torch.Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(y.mean(), 40.0).expand([len(y)])), 10.0), obs=y)

    def guide(y: torch.Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y, 10.0))

    seconds = 1_700_000_000 + torch.arange(100.0, dtype=torch.float64)
    notes = {}
    for name, y in {"rounded": seconds.float(), "wide": seconds, "centred": (seconds - 1.7e9).float()}.items():
        found = er.audit(model, guide, y, references=["grid"], diagnose=False)
        notes[name] = "numbers of float32" in found.table.attrs.get("notes", "")
    assert notes == {"rounded": True, "wide": False, "centred": False}
    said = er.audit(model, guide, seconds.float(), references="none", diagnose=False).table.attrs["notes"]
    assert "site 'y': it varies by " in said
    assert "log p(x) is that of rounded values; pass float64 tensors, or subtract 1.7e+09" in said
