"""The plan of an audit: which references, how long, what a budget does to them, and how much memory they may take."""

from __future__ import annotations

import math
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from support.cases.vaes import linear_vae
from torch import Tensor

from elbowroom.analysis.audit import auditor as audit_module
from elbowroom.analysis.audit import cost as pilot
from elbowroom.analysis.audit.auditor import Audit, audit, audit_log_joint
from elbowroom.analysis.audit.budget import Clock, Progress
from elbowroom.analysis.audit.cost import Cost
from elbowroom.analysis.audit.plan import Plan, choose
from elbowroom.analysis.audit.work import thinned
from elbowroom.errors import UserError
from elbowroom.inference.posterior import Posterior, Reference
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system import durations


def curved(y: Tensor, d: int = 2) -> LogJoint:
    """A model without a closed form: y = z^2 + noise."""

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(d), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z**2, 0.5).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y.abs().sqrt(), 0.5).to_event(1))

    return LogJoint(model, guide, y)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("1.5h", 5400), ("7", 7), (".5m", 30), (12, 12), (None, math.inf), ("none", math.inf)],
)
def test_a_time_in_words(text, seconds) -> None:
    assert durations.seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "-5", "0", "0s", "10 minutes", "1e3", "nan", "inf", math.nan, -1.0, 0, True, "9" * 400]
)
def test_what_is_no_time_is_refused(text) -> None:
    with pytest.raises(UserError, match=r"^--budget: must be a time above 0, such as 90s, 10m or 1h, or none, got "):
        durations.seconds(text, "--budget")


def test_auto_goes_by_kind_and_dimension() -> None:
    vae, x, _ = linear_vae(5, 8, n=6)
    assert choose("auto", LogJoint(vae.model, vae.guide, x)).names == ["closed_form"]
    assert choose("auto", curved(torch.ones(6, 2))).names == ["grid"]
    found = choose("auto", curved(torch.ones(6, 4), 4))
    assert found.names == ["hmc"]
    assert [method.name for method in found.spare] == ["importance", "ais"]

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("y", dist.Normal(c.float(), 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.5])))

    assert choose("auto", LogJoint(model, guide, torch.ones(5))).names == ["enumeration"]


def test_a_grid_that_cannot_be_afforded_is_left_to_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pilot.LATTICE, 2, 10**12)
    plan = choose("auto", curved(torch.ones(6, 2)))
    assert plan.names == ["hmc"]
    assert plan.reasons[0].startswith("a grid would take ")
    assert choose(["grid"], curved(torch.ones(6, 2))).names == ["grid"]  # who asks for it gets it


def test_the_plan_says_what_why_and_how_long() -> None:
    plan = choose(["grid", "hmc"], curved(torch.ones(40, 2)), n_obs=4000, budget=0.001)
    text = str(plan).splitlines()
    assert text[0].startswith("plan for 4000 data, about ")
    assert [line.split()[0] for line in text[1:4]] == ["guide", "grid", "hmc"]
    assert "a whitened grid for every datum" in text[2]
    assert text[4].startswith("  the budget of 0.0 s is less than the ")
    assert text[4].endswith("would take: the guide alone is looked at; --budget none audits all")
    few = choose(["grid"], curved(torch.ones(40, 2)), n_obs=40_000, budget=20.0)
    assert 0 < few.sample < 40_000
    assert f"a random sample of about {few.sample:,} is audited, and the means of all 40,000 are estimated" in str(few)
    tree = plan.tree()
    assert tree["sample"] == 0
    assert [r["name"] for r in tree["references"]] == ["grid", "hmc"]
    assert tree["seconds"] > 0
    assert tree["budget"] == 0.001


def test_a_method_of_its_own_joins_by_object_and_must_heed_the_clock() -> None:
    class Deaf(Grid):
        name = "deaf"

        def __call__(self, log_joint: LogJoint, *, keep: int, seed: int) -> Posterior:
            return super().__call__(log_joint, keep=keep, seed=seed)

    with pytest.raises(UserError, match=r"Deaf.__call__ needs a keyword `until`: the value of time.monotonic\(\)"):
        choose([Deaf()], curved(torch.ones(6, 2)))


class Time:
    """A clock that is moved by hand; a look at it takes a microsecond."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


class Sleeper(Reference):
    """Takes 20 ms per datum, on a clock or in truth, and knows no hurry."""

    name = "sleeper"

    def __init__(self, clock: Time | None = None) -> None:
        self.clock = clock

    def refusal(self, log_joint: LogJoint) -> str | None:
        return None

    def __call__(self, log_joint: LogJoint, *, keep: int, seed: int, until: float = math.inf) -> Posterior:
        seconds = 0.02 * log_joint.n_obs
        if self.clock is None:
            time.sleep(seconds)
        else:
            self.clock.now += seconds
        found = Grid()(log_joint, keep=keep, seed=seed)
        return Posterior(**{**vars(found), "method": self.name})


def test_a_budget_is_kept_and_gives_a_random_sample(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: on a busy machine the guide alone may take any budget."""
    log_joint, clock = curved(torch.linspace(0.2, 2.0, 240)[:, None].expand(-1, 2).contiguous()), Time()
    with monkeypatch.context() as patched:
        patched.setattr(time, "monotonic", clock)
        patched.setattr(time, "perf_counter", clock)
        patched.setattr(Clock.__init__, "__defaults__", (math.inf, clock))
        found = audit_log_joint(log_joint, references=[Sleeper(clock)], draws=200, keep=100, budget="3s")
    assert 2.3 < clock.now < 3.3
    table = found.table
    inside, done = table["in_sample"].values == 1, np.isfinite(table["mean_error"].values[:, 0])
    assert 70 < inside.sum() < 120  # of 240: 112 fit into three quarters of the budget, 12 are used for the plan
    assert done[inside].all()
    assert 5 < (done & ~inside).sum() < 30  # those with the largest proxy of the gap
    proxy = table["proxy_iwae"].values
    assert proxy[done & ~inside].min() >= proxy[~done].max()
    place = np.flatnonzero(inside)
    assert abs(place.mean() - 119.5) < 4.5 * 69 / np.sqrt(len(place)), "the sample is spread over the file"
    assert (table["status"].values[~done, 0] == "uncertified").all()
    why = table["reason"].values[~done, 0].astype(str)
    assert (np.char.find(why, "the budget of 3.0 s ended before this datum") >= 0).all()
    assert np.isfinite(table["elbo"].values).all()
    assert f"The budget let {inside.sum()} of 240 data be audited, drawn at random" in found.verdict
    assert found.population.attrs == {"rows": 240, "sample": inside.sum(), "without_value": 0}
    found.save(tmp_path)
    again = Audit.load(tmp_path)
    assert np.array_equal(again.table["elbo"], table["elbo"])
    assert again.population.equals(found.population)
    assert dict(again.lines())["data audited"] == str(inside.sum())


def test_a_budget_that_reaches_nothing_still_gives_the_guide() -> None:
    found = audit_log_joint(curved(torch.ones(30, 2)), references=[Sleeper(), "hmc"], draws=200, keep=100, budget=1e-3)
    assert (found.table["status"].values == "uncertified").all()
    assert np.isfinite(found.table["elbo"].values).all()
    assert found.posteriors["hmc"].posterior["z"].isnull().all()


@pytest.mark.slow
def test_a_budget_that_is_ample_changes_nothing() -> None:
    y = torch.linspace(0.2, 2.0, 12)[:, None].expand(-1, 2).contiguous()
    plain = audit_log_joint(curved(y), references=["grid"], draws=200, keep=100)
    ample = audit_log_joint(curved(y), references=["grid"], draws=200, keep=100, budget="1h")
    assert plain.table.equals(ample.table)


def test_the_pilot_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.linspace(0.2, 2.0, 12)[:, None].expand(-1, 2).contiguous()
    with_pilot = audit_log_joint(curved(y), references=["grid"], draws=200, keep=100)
    monkeypatch.setattr(pilot.Pilot, "_measured", lambda self, call, own: Cost(1e-3, 1e-6))
    without = audit_log_joint(curved(y), references=["grid"], draws=200, keep=100)
    assert with_pilot.table.equals(without.table)


def simulate(
    blocks: int, seconds: dict[str, float], budget: float, wrong: float, least: float
) -> tuple[float, dict[str, list[int]]]:
    """Let a clock hand out a budget; each method takes `wrong` times its estimate unless it is stopped."""
    methods = [type(name, (Sleeper,), {"name": name})() for name in seconds]
    costs = [Cost(0.0, each / 10, least) for each in seconds.values()]
    plan = Plan(methods, [""] * len(methods), Cost(0.0, 0.01), costs, 10 * blocks, 10, budget)
    watch, ran = Time(), {name: [] for name in seconds}
    pace = Clock(plan, [10] * blocks, budget, watch)
    for block in range(blocks):
        watch.now += 0.1
        pace.finished("", 0.1, whole=True)
        for name, each in seconds.items():
            until = pace.until(name)
            took = 0.0
            if until is not None:
                took = max(least * wrong * each, min(wrong * each, until - watch.now))
                watch.now += took
                ran[name].append(block)
            pace.finished(name, took, whole=until is not None and took >= wrong * each)
    return watch.now, ran


@pytest.mark.parametrize("wrong", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("least", [0.3, 1.0])
def test_one_block_after_the_other_is_done_whole(wrong: float, least: float) -> None:
    """Half of the time that all would take: half of the blocks, by all methods, and the end is kept within a block."""
    seconds = {"hmc": 8.0, "ais": 2.0}
    budget = 0.5 * wrong * 40 * 10 + 4
    took, ran = simulate(40, seconds, budget, wrong, least)
    assert took <= budget + wrong * 8
    assert took >= 0.8 * budget
    assert len(ran["hmc"]) >= 16
    assert ran["hmc"] == list(range(len(ran["hmc"])))
    assert ran["ais"][:16] == list(range(16))


def test_a_method_that_could_not_begin_leaves_its_part_to_others() -> None:
    took, ran = simulate(10, {"hmc": 2.0, "ais": 100.0}, 20.0, 1.0, 1.0)
    assert len(ran["hmc"]) >= 8
    assert ran["ais"] == []
    assert took <= 22


def test_a_block_is_sized_by_what_the_last_ones_took() -> None:
    method = type("hmc", (Sleeper,), {"name": "hmc"})()
    plan, watch = Plan([method], [""], Cost(0.0, 0.0), [Cost(1.0, 0.1)], 1000, 100, 60.0, first=100), Time()
    pace = Clock(plan, [], 60.0, watch)
    assert pace.fitting(11.01) == 100
    assert pace.fitting(0.5) == 0
    pace.begin(100)
    until = pace.until("hmc")
    assert until == pytest.approx(60.0, abs=1e-3), "one method may use all that is left"
    pace.finished("hmc", 22.0, whole=True)
    assert pace.fitting(22.02) == 100
    watch.now = 30.0
    assert pace.done == pytest.approx(0.5)
    assert pace.seconds_left == pytest.approx(30.0)


def test_without_a_budget_nothing_is_left_out_and_the_time_left_is_counted() -> None:
    took, ran = simulate(7, {"grid": 3.0}, math.inf, 2.0, 1.0)
    assert ran == {"grid": list(range(7))}
    assert took == pytest.approx(7 * 6.1)


@pytest.mark.slow
def test_progress_knows_the_plan_and_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "ARRAY", 200 * 4)
    steps: list[Progress] = []
    audit_log_joint(curved(torch.ones(12, 2)), references=["grid"], draws=200, keep=100, progress=steps.append)
    assert steps[:3] == ["plan", "guide for data 0..3 of 12", "grid for data 0..3 of 12"]
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert done[0] == 0
    assert 0.5 < done[-1] < 1
    assert steps[0].seconds_left == pytest.approx(steps[0].plan.total)
    assert steps[0].plan.names == ["grid"]


def test_from_python_a_budget_and_progress_are_words_of_audit() -> None:
    vae, x, _ = linear_vae(1, 4, n=5)
    said: list[str] = []
    found = audit(vae.model, vae.guide, x, budget="1h", progress=said.append)
    assert said == ["plan", "guide", "closed_form"]
    assert found.table.attrs["plan"].startswith("closed_form: ")
    with pytest.raises(UserError, match="budget: must be a time"):
        audit(vae.model, vae.guide, x, budget="soon")


@pytest.mark.parametrize(("n", "d", "references"), [(10_000, 50, 3), (60_000, 2, 1), (400, 5, 3), (10_000, 784, 2)])
def test_memory_is_bounded_by_bytes(n: int, d: int, references: int) -> None:
    """Draws of a block of the guide, and what all methods keep of all data."""
    log_joint = curved(torch.ones(2, d), d)
    log_joint.n_obs = n
    for draws in (100, 10_000, 1_000_000):
        assert audit_module.block_size(log_joint, draws) * draws * d * 8 <= max(2**27, 8 * draws * d)
    kept, moments = audit_module._kept(log_joint, 1000, references)
    each = 8 * n * (1 + references) * (2 * d + 3)
    assert kept * each <= 2**29 or kept == audit_module.LEAST
    assert kept == 1000 or each * 1000 > 2**29
    assert moments == (8 * n * (1 + references) * d * d <= 2**29)


def test_what_is_kept_is_thinned_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    log_joint = curved(torch.linspace(0.2, 2.0, 12)[:, None].expand(-1, 2).contiguous())
    whole = audit_log_joint(log_joint, references=["grid"], draws=400, keep=200)
    monkeypatch.setattr(audit_module, "KEPT", 8 * 12 * 2 * 7 * 50)
    thin = audit_log_joint(log_joint, references=["grid"], draws=400, keep=200)
    assert thin.posteriors["grid"].posterior["z"].shape[:2] == (4, 12)
    assert "48 of 200 draws per datum and method are kept" in thin.table.attrs["notes"]
    assert whole.table.equals(thin.table), "numbers come from all draws"


def test_thinning_keeps_the_ends_of_every_chain() -> None:
    draws = torch.arange(2 * 9 * 3.0).reshape(2, 9, 3, 1)
    found = thinned(Posterior("x", draws, {"z": draws}, ["exact"] * 3, [""] * 3), 6)
    assert torch.equal(found.draws, draws[:, [0, 4, 8]])
    assert torch.equal(found.sites["z"], found.draws)
    cut = thinned(Posterior("x", draws[:, :2], {"z": draws[:, :2]}, ["exact"] * 3, [""] * 3), 4)
    assert cut.draws.untyped_storage().nbytes() == 2 * 2 * 3 * 4, "what it was cut from is let go"


def straight(y: Tensor) -> LogJoint:
    """A model without a closed form whose posteriors have one mode: y = z + tanh(2 z) / 2 + noise."""

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z + (2 * z).tanh() / 2, 0.5).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y / 1.5, 0.4).to_event(1))

    return LogJoint(model, guide, y)


@pytest.mark.slow
def test_the_estimate_is_right_within_a_factor_of_three() -> None:
    """Where posteriors have one mode; here on a loaded machine, alone it is within two."""
    y = torch.randn(1200, 2, generator=torch.Generator().manual_seed(1))
    plans: list[Plan] = []
    began = time.monotonic()
    audit_log_joint(straight(y), references=["grid", "hmc"], progress=lambda step: plans.append(step.plan))
    took = time.monotonic() - began
    assert took / 3 < plans[0].total < 3 * took


@pytest.mark.slow
def test_what_the_plan_could_not_foresee_is_learnt_from_the_first_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four modes: chains go on, and are tempered. The plan is wrong by far; after one block the time left is not."""
    monkeypatch.setattr(audit_module, "ARRAY", 10_000 * 16)
    y = 0.5 + 1.5 * torch.rand(48, 2, generator=torch.Generator().manual_seed(1))
    said: list[tuple[str, float, float]] = []
    audit_log_joint(
        curved(y), references=["hmc"], progress=lambda step: said.append((str(step), time.monotonic(), step.seconds_left))
    )
    end = time.monotonic()
    started = [at for text, at, _ in said if "hmc" in text]
    later = [(end - at, left) for _, at, left in said if at > started[1]]
    assert len(started) >= 3
    assert all(took / 3 < left < 3 * took for took, left in later if took > 0.3 * (end - started[1]))
