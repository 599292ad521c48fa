"""Steps taken ahead and looked at in windows: the same fit bit for bit, however long they are and whatever happens in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_step import D, K, make, rows
from torch import Tensor, nn

from elbowroom.errors import NonFiniteLoss
from elbowroom.inference import whole_step
from elbowroom.inference.fit import step as training_step
from elbowroom.inference.fit.plan import Session
from elbowroom.inference.fit.rows import Rows
from elbowroom.inference.fit.svi import fit
from elbowroom.inference.fit.warm_start import Start
from elbowroom.inference.whole_step import WholeStep
from elbowroom.models.networks.mlp import MLP
from elbowroom.models.vae import VAE

N, B = 93, 4  # 23 batches and one of a single datum
LENGTHS = [7, 64]
OPTIONS = {"epochs": 2, "batch_size": B, "learning_rate": 0.02, "validation_draws": 1}


class Interrupted(Exception):
    """A fit is stopped between two epochs."""


@dataclass
class Taken:
    """What a fit left, and how it was taken."""

    weights: dict[str, Tensor]
    rows: list[dict[str, Any]]
    error: str
    checkpoint: dict[str, Any]
    taken: list[int] = field(default_factory=list)  # ahead, of each window
    good: list[int] = field(default_factory=list)

    @property
    def in_vain(self) -> int:
        """Steps that were taken ahead and had to be taken again."""
        return sum(self.taken) - sum(self.good)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Taken]:
    """Fit with windows of some length, of replayed graphs; with 1 as ever."""
    monkeypatch.setattr(training_step, "FEW", 0)
    monkeypatch.setattr(training_step, "TRACE_AFTER", 0.0)
    monkeypatch.setattr(training_step, "COMPILE_AFTER", math.inf)
    look = WholeStep.look
    now: list[Taken] = []

    def counted(self: WholeStep) -> list[tuple[float, float]]:
        now[-1].taken.append(self.taken)
        found = look(self)
        now[-1].good.append(len(found))
        return found

    monkeypatch.setattr(WholeStep, "look", counted)

    def run(
        length: int,
        x: Tensor | Rows,
        vae: VAE | None = None,
        *,
        folder: str = "",
        start: Start | None = None,
        stop: int | None = None,
        **options: Any,
    ) -> Taken:
        monkeypatch.setitem(whole_step.WINDOW, "cpu", length)
        vae = make() if vae is None else vae
        place = tmp_path / (folder or f"{len(now)}")
        taken = Taken({}, [], "", {})
        now.append(taken)

        def report(_: object, row: Any) -> None:
            if row.epoch == stop:
                raise Interrupted

        session = Session(place, resume=True, seed=5, report=report, checkpoint_seconds=0, start=start)
        try:
            history = fit(vae, x, rows(9), session, **{**OPTIONS, **options})
            taken.rows = [{**asdict(row), "seconds": 0} for row in history.rows]
        except (NonFiniteLoss, Interrupted) as error:
            taken.error = str(error).replace(str(place), "folder")
        taken.weights = {name: value.detach().clone() for name, value in vae.state_dict().items()}
        if (place / "checkpoint.pt").exists():
            taken.checkpoint = torch.load(place / "checkpoint.pt", weights_only=True)
            for row in taken.checkpoint["rows"]:
                row["seconds"] = 0
        return taken

    return run


def same(one: Any, other: Any) -> bool:
    """Compare nested containers, tensors bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or one != one)


def equal(one: Taken, other: Taken) -> bool:
    """Say whether two fits left the same: weights, history, error, and in the checkpoint moments and random states."""
    parts = ("weights", "rows", "error", "checkpoint")
    return all(same(getattr(one, part), getattr(other, part)) for part in parts)


CASES: dict[str, dict[str, Any]] = {
    "clip, schedule and warm-up": {"gradient_clip": 0.3, "schedule": "cosine", "kl_warmup": 1},
    "plain": {"schedule": "constant"},
    "float64": {"dtype": "float64", "kl_warmup": 1},
    "bf16": {"precision": "bf16"},
}
SLOW = [pytest.param(options, id=name, marks=pytest.mark.slow) for name, options in list(CASES.items())[1:]]


@pytest.mark.parametrize("options", [pytest.param(next(iter(CASES.values())), id=next(iter(CASES))), *SLOW])
def test_a_fit_is_the_same_however_long_its_windows_are(run, options):
    expected = run(1, rows(N), **options)
    assert not expected.taken
    assert len(expected.rows) == len({row["train_loss"] for row in expected.rows}) == 2
    for length, looks in ((7, [1, 2, 4, 7, 7, 2, *[7] * 3, 2]), (64, [1, 2, 4, 8, 8, 16, 7])):
        found = run(length, rows(N), **options)
        assert equal(expected, found)
        assert found.taken == found.good == looks  # 23 of each epoch; the last, smaller one is looked at by itself


class Noisy(nn.Module):
    """An encoder that draws numbers where it is given data with holes, or with many ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = MLP((D,), width, hidden=(5,))

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.isnan().any()) or bool(x.sum() > B * D / 2):
            x = torch.where(x.isnan(), 0.0, x) + 0.1 * torch.randn_like(x)
        return self.body(x)


def noisy(likelihood: str = "gaussian") -> VAE:
    vae = make(likelihood)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        vae.posterior.encoder = Noisy(2 * K)
    return vae


def holed(many: int) -> Tensor:
    return rows(N).index_put(
        (torch.randperm(N, generator=torch.Generator().manual_seed(2))[:many], torch.tensor(1)), torch.tensor(math.nan)
    )


@pytest.mark.parametrize("holes", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_a_branch_that_goes_the_other_way(run, holes):
    """The graph is made of a batch with a hole: with 40 holes batches without are rare, with one hole nearly all are."""
    expected = run(1, holed(holes), noisy(), gradient_clip=5.0)
    assert len(expected.rows) == 2
    for length in LENGTHS if holes > 1 else [64]:
        found = run(length, holed(holes), noisy(), gradient_clip=5.0)
        assert equal(expected, found)
        assert 0 < found.in_vain < (23 if holes > 1 else 47)  # few, even where nearly all are bad
        if holes > 1:  # a bad one amid good ones, which are updated, and after which nothing is
            assert any(0 < good < taken - 1 for good, taken in zip(found.good, found.taken, strict=True))


def test_a_loss_that_is_not_finite(run):
    x = rows(N)
    x[13, 0] = 1e38  # its square is no float32

    def broken() -> VAE:
        vae = make()
        vae.adapt = lambda **_: None
        return vae

    expected = run(1, x, broken(), gradient_clip=0.5, kl_warmup=1)
    assert expected.error.startswith("fit: the loss is not finite in epoch 1, batch 21 of 24: log_prob of site ")
    assert "(training row 13, counted from 0); no checkpoint was written yet" in expected.error
    for length, good in ((7, [1, 2, 4, 7, 6]), (64, [1, 2, 4, 8, 5])):
        found = run(length, x, broken(), gradient_clip=0.5, kl_warmup=1)
        assert equal(expected, found)
        assert found.good == good
        assert sum(found.taken) == (21 if length == 7 else 23)


class Cliff(nn.Module):
    """A decoder that learns to add 3, and breaks before it can."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.shift = MLP((K,), width, hidden=(5,)), nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        return (self.body(z) - 3 + self.shift) * torch.where(self.shift > 0.5, math.inf, 1.0)


def test_a_loss_that_is_not_finite_after_a_checkpoint(run):
    """It is the fault of the weights: these, and the checkpoint of the epoch before, are those of single looks."""

    def broken() -> VAE:
        vae = make()
        with torch.random.fork_rng():
            torch.manual_seed(9)
            vae.decoder = Cliff(D)
        return vae

    expected = run(1, rows(N), broken(), schedule="constant")
    assert expected.error.startswith("fit: the loss is not finite in epoch 2, batch ")
    assert "last good checkpoint: folder/checkpoint.pt (epoch 1)" in expected.error
    found = run(64, rows(N), broken(), schedule="constant")
    assert equal(expected, found)
    assert found.in_vain > 1
    assert sum(found.good) > 23


def test_a_fit_that_is_resumed(run):
    options = {"epochs": 3, "kl_warmup": 2, "gradient_clip": 0.5}
    expected = run(1, rows(N), **options)
    assert run(64, rows(N), folder="one", stop=1, **options).checkpoint
    assert run(
        7, rows(N), make(seed=1), folder="one", stop=2, **options
    ).checkpoint  # the length is no matter of a checkpoint's
    found = run(64, rows(N), make(seed=2), folder="one", **options)
    assert equal(expected, found)
    assert sum(found.good) == 23


def test_a_fit_on_data_that_are_partly_simulated(run):
    """Each batch draws from the model before the step does: all of it is drawn again where a step was bad."""
    start = Start(make(seed=3).state_dict(), "of another fit", simulated=0.5)
    expected = run(1, holed(40), start=start)
    found = run(7, holed(40), start=start)
    assert equal(expected, found)
    assert sum(found.good) > found.in_vain > 0


def test_a_fit_on_pixels_that_are_drawn_anew(run):
    """So are they where a step was bad; and a fit without a smaller batch at the end leaves the same checkpoint too."""
    grey = torch.randint(0, 256, (92, D), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    data = Rows.of(rows(92, binary=True), grey)
    expected = run(1, data, noisy("bernoulli"))
    found = run(7, data, noisy("bernoulli"))
    assert equal(expected, found)
    assert sum(found.good) > 0 < found.in_vain
    assert found.taken[-1] == found.good[-1]  # the last step of all is not the one that was looked at by itself
