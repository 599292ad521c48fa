"""The step that nobody waits for: what it covers, and its capture, which on a CPU is played by a stand-in for torch.cuda."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from functools import partial

import pyro
import pytest
import torch
from test_training_step import B, D, N, equal, make, rows, walk, weights
from torch import Tensor

from elbowroom.errors import NonFiniteLoss
from elbowroom.inference import whole_step
from elbowroom.inference.compiled.graph import Untraceable
from elbowroom.inference.fit import step as training_step
from elbowroom.inference.fit.plan import Session
from elbowroom.inference.fit.rows import Rows
from elbowroom.inference.fit.step import Step
from elbowroom.inference.fit.step_graph import generators
from elbowroom.inference.fit.svi import fit
from elbowroom.inference.whole_step import WholeStep
from elbowroom.inference.window import Turn, Window


@pytest.fixture(autouse=True)
def _scope(monkeypatch):
    monkeypatch.setattr(training_step, "TRACE_AFTER", 0.0)
    monkeypatch.setattr(training_step, "COMPILE_AFTER", math.inf)
    monkeypatch.setitem(whole_step.WINDOW, "cpu", 16)
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        yield


@pytest.fixture
def step() -> Step:
    step = Step(make(), size=N, learning_rate=0.01, gradient_clip=0.3, steps=1000)
    walk(step, [{"x": rows()}])
    return step


def ahead(step: Step, count: int, x: Tensor | None = None) -> list[tuple[float, float]]:
    """Take steps by the whole step, then look."""
    for _ in range(count):
        step.whole({"x": rows() if x is None else x}, 0.5, 0.01)
    return step.whole.look()


def left(step: Step) -> list[Tensor]:
    """Return copies of all that a step may change: weights, moments, counters of steps, random state."""
    moments = [value.clone() for state in step.optimizer.state.values() for value in state.values()]
    return [*weights(step), *moments, torch.get_rng_state()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_steps_are_those_that_are_looked_at(step):
    plain = copy.deepcopy(step)
    state = torch.get_rng_state()
    expected = [plain(rows(), kl_weight=0.5, learning_rate=0.01) for _ in range(5)]
    torch.set_rng_state(state)
    assert [(objective / N, elbo / N) for objective, elbo in ahead(step, 5)] == expected
    assert equal(step, plain)
    assert not hasattr(step.optimizer, "found_inf")  # other steps do not look at the flag
    assert same(left(step), left(plain))


def test_after_a_bad_step_nothing_moves_but_the_random_numbers(step):
    broken = rows()
    broken[2, 1] = math.inf
    assert len(ahead(step, 2)) == 2
    before = left(step)
    step.whole({"x": broken}, 0.5, 0.01)
    assert not ahead(step, 3)  # the first is bad, and so are those after it
    assert same(left(step)[:-1], before[:-1])
    assert len(ahead(step, 3)) == 3  # forgotten
    assert not same(left(step)[:-1], before[:-1])


def test_it_covers_what_it_was_made_for(step):
    whole = step.whole
    assert whole.covers(B)
    assert not whole.covers(B - 1)
    step.vae.eval()
    assert not whole.covers(B)
    step.vae.train()
    assert whole.covers(B)
    step.optimizer.load_state_dict(step.optimizer.state_dict())  # other moments, which a captured graph would not know
    assert not whole.covers(B)


def test_replaced_weights_are_not_covered(step):
    step.vae.load_state_dict({name: value.clone() for name, value in step.vae.state_dict().items()}, assign=True)
    assert not step.whole.covers(B)


class Recorded:
    """A CUDA graph that takes the step anew."""

    whole: WholeStep

    def replay(self) -> None:
        self.whole._run()


@pytest.fixture
def cuda(monkeypatch):
    """Let torch.cuda be a stand-in, whose streams and captures do nothing; return what says which step was captured."""

    class Stream:
        def wait_stream(self, other):
            assert isinstance(other, Stream)

    fakes = {"device": nullcontext, "stream": nullcontext, "Stream": Stream, "current_stream": Stream, "CUDAGraph": Recorded}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, *, stream: nullcontext())
    return lambda step: monkeypatch.setattr(Recorded, "whole", step.whole, raising=False)


def test_a_capture_leaves_weights_moments_and_random_numbers_alone(step, cuda):
    plain = copy.deepcopy(step)
    cuda(step)
    before = left(step)
    step.whole.capture()
    assert isinstance(step.whole.captured, Recorded)
    assert same(left(step), before)
    expected = ahead(plain, 4)
    torch.set_rng_state(before[-1])
    assert ahead(step, 4) == expected  # from the first row of the buffer, the flag down
    assert same(left(step), left(plain))


def test_a_capture_before_the_first_step_leaves_adam_as_new(cuda):
    fresh, plain = (Step(make(), size=N, learning_rate=0.01, steps=1000) for _ in range(2))
    fresh.prepare({"x": rows()})
    cuda(fresh)
    fresh.whole.capture()
    assert same(*(list(walk(each, [{"x": rows()}])) for each in (fresh, plain)))
    assert same(left(fresh), left(plain))


@pytest.mark.parametrize("planted", ["error", "difference"])
def test_a_capture_that_fails_says_why_and_changes_nothing(step, cuda, monkeypatch, planted):
    cuda(step)
    before = left(step)

    def replay(self):
        if planted == "error":
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        self.whole._run()
        self.whole.rows.mul_(1.1)

    monkeypatch.setattr(Recorded, "replay", replay)
    reason = {"error": "capturing failed .operation not permitted.$", "difference": "the captured step has other values than"}
    with pytest.raises(Untraceable, match=reason[planted]):
        step.whole.capture()
    assert step.whole.captured is None
    assert same(left(step), before)
    assert len(ahead(step, 3)) == 3


# on a GPU: `make test-slow`


@pytest.fixture
def captures(monkeypatch):
    """The lines that were logged; the last says whether the step was captured."""
    lines: list[str] = []
    monkeypatch.setattr(training_step.log, "info", lines.append)
    return lines


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["auto", "always"])
def test_50_captured_steps_are_50_eager_ones_to_rounding(compile, captures):
    vaes, last = (make(), make()), []
    for vae, each in zip(vaes, ("never", compile), strict=True):
        options = {"epochs": 1, "batch_size": 10, "gradient_clip": 5.0, "dtype": "float64", "device": "cuda"}
        last.append(fit(vae, rows(500), rows(100), Session(seed=1), compile=each, **options).rows[-1])
    assert captures[-1] == "fit: step captured as one CUDA graph"
    assert last[1].train_loss == pytest.approx(last[0].train_loss, rel=1e-6)
    assert last[1].validation_elbo == pytest.approx(last[0].validation_elbo, rel=1e-6)
    for eager, captured in zip(*(vae.parameters() for vae in vaes), strict=True):
        torch.testing.assert_close(captured, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_gpu_within_a_window(captures):
    vae, place = make("bernoulli").cuda().train(), torch.device("cuda", torch.cuda.current_device())
    data = Rows.of(rows(N, binary=True).cuda(), torch.full((N, D), 128, dtype=torch.uint8, device=place))
    redraw = torch.Generator(place)
    step = Step(vae, size=N, learning_rate=0.01, gradient_clip=0.3, compile="always", steps=1000)
    step.prepare(data.example(B))
    assert captures[-1] == "fit: step captured as one CUDA graph"
    turns = [Turn(k, index, 0.01, 0.1 * k) for k, index in enumerate(torch.randperm(N, device=place).split(B)[:2] * 5)]
    window = Window(step, [*generators(place), redraw])
    window.length = 64
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(window.ahead(turns, lambda turn: data.batch(turn.index, redraw))) == 10
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(step.whole.look()) == 10


@pytest.mark.gpu
def test_a_loss_that_is_not_finite_says_the_same_from_a_captured_step():
    x, said = rows(500), []
    x[13, 0] = 1e38  # its square is no float32
    for compile in ("never", "always"):
        vae = make()
        vae.adapt = lambda **_: None
        with pytest.raises(NonFiniteLoss) as caught:
            fit(vae, x, x[:0], Session(seed=1), epochs=1, batch_size=10, compile=compile, device="cuda")
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "(training row 13, counted from 0)" in said[0]


@pytest.mark.gpu
def test_a_captured_fit_that_is_resumed(tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(_, row):
        if row.epoch == 2:
            raise Interrupted

    options = {"epochs": 4, "batch_size": 10, "kl_warmup": 2, "compile": "always", "device": "cuda", "dtype": "float64"}
    expected = fit(make(), rows(205), rows(50), Session(seed=6), **options)
    session = partial(Session, folder=tmp_path, seed=6, checkpoint_seconds=0)
    with pytest.raises(Interrupted):
        fit(make(), rows(205), rows(50), session(report=interrupt), **options)
    found = fit(make(seed=1), rows(205), rows(50), session(resume=True), **options)
    for one, other in zip(expected.rows, found.rows, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-9)
