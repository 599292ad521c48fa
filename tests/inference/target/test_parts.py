"""Parts of the data: model and guide give each datum of a part what they give it among all data, or nothing is taken apart."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from elbowroom.analysis.audit.auditor import audit, audit_log_joint
from elbowroom.analysis.checks import calibration
from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.compiled.policies import policy
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.plain import PlainLogJoint
from elbowroom.inference.target.simulate import simulate, simulate_for_guide

F64 = torch.float64
N, D = 12, 3


def model(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(D, dtype=x.dtype), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class Encoder(nn.Module):
    """A guide with the mean `kind` of q(z|x)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.layer, self.cell = nn.Linear(D, D), nn.GRU(1, D, batch_first=True)
        self.norm, self.batch_norm = nn.LayerNorm(D), nn.BatchNorm1d(D)
        self.attention = nn.MultiheadAttention(D, 1, batch_first=True)

    def loc(self, x: Tensor) -> Tensor:
        return {
            # a row alone
            "layers": lambda: torch.tanh(self.layer(x)),
            "recurrent": lambda: self.cell(x[..., None])[1][0],
            "layer norm": lambda: self.norm(x),
            "batch norm, trained": lambda: self.batch_norm(x),
            "attention within a row": lambda: self.attention(*[x[:, None]] * 3)[0][:, 0],
            "constant": lambda: torch.zeros_like(x),
            # rows together
            "mean": lambda: (x - x.mean(0)) / 2,
            "standard deviation": lambda: x / x.std(0),
            "largest": lambda: x / x.abs().max(),
            "attention over rows": lambda: self.attention(*[x[None]] * 3)[0][0],
            "batch norm, of the batch": lambda: nn.functional.batch_norm(x, None, None, training=True),
            "rank": lambda: x.argsort(0).argsort(0).to(x.dtype) / len(x),
            "cumulative sum": lambda: x.cumsum(0) / 4,
            "first row": lambda: x - x[0],
            "row before": lambda: (x + x.roll(1, 0)) / 4,
            "recurrent over rows": lambda: self.cell(x[None, :, :1])[0][0],
            "number of rows": lambda: x / len(x),
            "position": lambda: x / 2 + torch.arange(len(x), dtype=x.dtype)[:, None] / 10,
        }[self.kind]()

    def forward(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(self.loc(x), 0.7).to_event(1))


ALONE = ("layers", "recurrent", "layer norm", "batch norm, trained", "attention within a row", "constant")
TOGETHER = (
    "mean",
    "standard deviation",
    "largest",
    "attention over rows",
    "batch norm, of the batch",
    "rank",
    "cumulative sum",
    "first row",
    "row before",
    "recurrent over rows",
    "number of rows",
    "position",
)


def data(n: int = N) -> Tensor:
    return torch.randn(n, D, dtype=F64, generator=torch.Generator().manual_seed(1)).cumsum(0) / 2


@pytest.mark.parametrize("kind", ALONE + TOGETHER)
def test_a_part_equals_the_whole_or_is_refused(kind: str) -> None:
    guide, x = Encoder(kind).double(), data()
    joint = LogJoint(model, guide, x)
    z = joint.probe_points
    by_hand = dist.Normal(guide.eval().loc(x), 0.7).log_prob(z).sum(-1).detach()
    torch.testing.assert_close(joint.log_guide(z), by_hand)  # of all data together, always
    assert joint.separable() == (kind in ALONE)
    assert any("depends on the data beside it" in note for note in joint.notes) == (kind in TOGETHER)
    for rows in (torch.tensor([7, 3]), torch.tensor([5]), torch.tensor([0, 0, 11, 4])):
        part, used, at = joint.some(rows)
        torch.testing.assert_close(part.log_guide(z[:, used])[:, at], by_hand[:, rows])
        own = part.draw("guide", 4000, 0)[:, at].mean(0)
        assert (own - guide.loc(x)[rows]).abs().max() < 5 * 0.7 / 4000**0.5
        if kind in TOGETHER:
            with pytest.raises(UnsupportedProgram, match="taken apart"):
                joint.subset(rows)
    assert len(joint.blocks(5)) == (3 if kind in ALONE else 1)


def test_the_gaps_of_a_guide_that_reads_its_batch_are_those_of_the_batch() -> None:
    """In order of time: blocks of rows have other means. Given all rows, q is the exact posterior."""
    x = torch.linspace(-4, 4, 900, dtype=F64)

    def pair(prior: bool):
        def program(x):
            loc, scale = (torch.zeros_like(x), 1.0) if prior else ((x - x.mean()) / 2, math.sqrt(0.5))
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(loc, scale))
                if prior:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return program

    found = audit(pair(True), pair(False), x, diagnose=False)
    assert abs(found.table["gap_total"]).max() < 1e-9
    assert "depends on the data beside it" in found.table.attrs["notes"]


@pytest.mark.parametrize("along", [0, 1])
def test_a_square_argument_is_taken_apart_along_its_data(along: int) -> None:
    """(channels, data) or (data, channels), as many channels as data: the first guess may take channels."""
    features = torch.randn(N, N, dtype=F64)

    def with_features(x, features):
        model(x)

    def guide(x, features):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + features.mean(1 - along)[:, None], 0.7).to_event(1))

    x = data()
    joint = LogJoint(with_features, guide, x, features)
    z, rows = joint.probe_points, torch.tensor([7, 3, 3])
    assert joint.separable()
    assert joint.data_dims == [0, along]
    by_hand = dist.Normal(x / 2 + features.mean(1 - along)[:, None], 0.7).log_prob(z).sum(-1)
    torch.testing.assert_close(joint.subset(rows).log_guide(z[:, rows]), by_hand[:, rows])


@pytest.mark.parametrize("reader", ["model", "guide"])
def test_an_argument_of_n_entries_that_are_not_the_datas(reader: str) -> None:
    """One scale for each of D columns, and as many data as columns."""
    x, scale = data()[:D], torch.linspace(0.5, 1.5, D, dtype=F64)

    def of_scale(x, scale):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(D, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale if reader == "model" else 1.0).to_event(1), obs=x)

    def guide(x, scale):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2, scale if reader == "guide" else 0.7).to_event(1))

    joint = LogJoint(of_scale, guide, x, scale)
    z, rows = joint.probe_points, torch.tensor([2, 0])
    assert joint.separable()
    assert joint.data_dims == [0, None]
    assert any("is kept whole" in note for note in joint.notes)
    part = joint.subset(rows)
    torch.testing.assert_close(part(z[:, rows]), joint(z)[:, rows])
    torch.testing.assert_close(part.log_guide(z[:, rows]), joint.log_guide(z)[:, rows])


def test_a_square_argument_repeated_by_rows() -> None:
    """A program that vmap does not take is repeated along the right dimension too."""
    features = torch.randn(N, N, dtype=F64)

    def of_features(x, features):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(D, dtype=x.dtype), 1.0).to_event(1))
            loc = z if z.sum().item() != 0.1 else -z  # a branch on z
            pyro.sample("x", dist.Normal(loc + features.mean(0)[:, None], 1.0).to_event(1), obs=x)

    def guide(x, features):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))

    joint = LogJoint(of_features, guide, data(), features)
    assert joint.mode == "repeat"
    assert joint.data_dims == [0, 1]
    assert joint.separable()


# -- sequences that are packed ---------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([4, 1, 3, 4, 2, 3, 1, 4])
CELL, START = nn.GRU(3, 4, batch_first=True), nn.Parameter(torch.zeros(1, 1, 4))


def of_sequences(x, packed):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., None, :3].expand(*z.shape[:-1], 4, 3), 1.0).to_event(2), obs=x)


def guide_of_packed(x, packed):
    hidden = CELL(packed, START.expand(1, len(x), 4).contiguous())[1][0]
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(hidden, 0.5).to_event(1))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("lengths", [torch.full((8,), 4), LENGTHS])
def test_a_packed_argument_of_the_guide_alone(lengths: Tensor, nested: bool) -> None:
    """As in Pyro's deep Markov model."""
    x = torch.randn(8, 4, 3)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    inside = (lambda program: lambda x, more: program(x, more["packed"])) if nested else (lambda program: program)
    joint = LogJoint(inside(of_sequences), inside(guide_of_packed), x, {"packed": packed} if nested else packed)
    assert joint.separable()
    z, rows = joint.probe_points, torch.tensor([7, 0, 1, 1])
    by_hand = [CELL(x[i : i + 1, : int(lengths[i])])[1][0, 0].double() for i in rows]  # each sequence alone
    want = torch.stack([dist.Normal(loc, 0.5).log_prob(z[:, i]).sum(-1) for loc, i in zip(by_hand, rows, strict=True)], 1)
    part = joint.subset(rows)
    torch.testing.assert_close(part.log_guide(z[:, rows]), want.detach(), atol=1e-5, rtol=1e-5)
    assert part.draw("guide", 3, 0).shape == (3, 4, 4)
    with policy("always"):  # the model does not read what is packed, and its graph takes any of the data
        graph = joint.graphs.ready(joint, "joint")
        assert graph is not None
        torch.testing.assert_close(part(z[:, rows]), PlainLogJoint.__call__(part, z[:, rows]))
        assert joint.graphs.ready(joint, "guide") is None
    assert "PackedSequence" in joint.graphs.reasons["guide"]


def test_a_packed_argument_of_the_model() -> None:
    """x is the packed argument itself: taken apart, and evaluated without a graph."""
    x = torch.randn(8, 4, 3, dtype=F64)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)

    def of_packed(packed):
        padded, lengths = pad_packed_sequence(packed, batch_first=True, total_length=4)
        there = torch.arange(4) < lengths[:, None]
        with pyro.plate("rows", len(padded)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
            each = dist.Normal(z[..., None, :].expand(*z.shape[:-1], 4, 3), 1.0).to_event(1)
            pyro.sample("x", each.mask(there).to_event(1), obs=padded)

    def guide(packed):
        padded, lengths = pad_packed_sequence(packed, batch_first=True)
        shrunk = 1 / (1 + lengths[:, None].to(F64))  # the exact posterior
        with pyro.plate("rows", len(padded)):
            pyro.sample("z", dist.Normal(padded.sum(1) * shrunk, shrunk.sqrt()).to_event(1))

    joint = LogJoint(of_packed, guide, packed)
    assert joint.separable()
    z = joint.probe_points
    log_p = joint(z) - joint.log_guide(z)
    torch.testing.assert_close(log_p, log_p[:1].expand_as(log_p))  # log p(x), at any z
    rows = torch.tensor([2, 6])
    torch.testing.assert_close(joint.subset(rows)(z[:, rows]), joint(z)[:, rows])
    with policy("always"):
        assert joint.graphs.ready(joint, "joint") is None
    assert "PackedSequence" in joint.graphs.reasons["joint"]
    found = audit(of_packed, guide, packed, budget="20s", references="importance", diagnose=False)
    np.testing.assert_allclose(found.table["elbo"], log_p[0], atol=1e-9)
    error = np.hypot(found.table["log_evidence_se"], found.table["elbo_se"]).values
    assert (abs(found.table["gap_total"].values) < 5 * error + 1e-9).all()
    with pytest.raises(UnsupportedProgram, match="not an argument"):
        simulate(joint, 0)


def test_a_copy_of_x_in_a_packed_argument_is_not_simulated() -> None:
    """log q of simulated x is not what the guide says of the old one."""
    x = torch.randn(8, 4, 3)
    joint = LogJoint(of_sequences, guide_of_packed, x, pack_padded_sequence(x, [4] * 8, batch_first=True))
    simulate(joint, 0)
    with pytest.raises(UnsupportedProgram, match="does not read the data that are simulated"):
        simulate_for_guide(joint, 0)


def test_a_guide_that_fails_on_a_part() -> None:
    locs = [row / 2 for row in data()]  # a list of rows, which no dimension is

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.stack(locs) + 0 * x, 0.7).to_event(1))

    joint = LogJoint(model, guide, data())
    part, _, at = joint.some(torch.tensor([7, 0]))
    assert part is joint
    assert part.draw("guide", 3, 0)[:, at].shape == (3, 2, D)
    assert any("does not run on a part of the data" in note for note in joint.notes)


@pytest.mark.usefixtures("diagnosed")
def test_one_row_of_parameters_for_each_datum() -> None:
    """Nothing says what q is for simulated data: their calibration and gaps are left out, and said to be."""
    x = data(8)
    pyro.clear_param_store()

    def guide(x):
        loc = pyro.param("loc", lambda: torch.zeros(8, D, dtype=F64))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.7).to_event(1))

    found = audit(model, guide, x, references=["grid"])
    missing = found.diagnosis.attrs["missing"]
    for part in ("prior_sbc", "simulated"):
        assert f"{part}: the guide does not read the data that are simulated" in missing
    assert "does not run on a part of the data" in found.table.attrs["notes"]
    exact = -0.5 * (D * math.log(4 * math.pi) + x.square().sum(-1) / 2)
    np.testing.assert_allclose(found.table["log_evidence"].values, exact.numpy(), atol=1e-6)


def test_x_once_more_in_another_argument_is_not_simulated() -> None:
    def with_copy(x, copy):
        model(x)

    def guide(x, copy):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(copy / 2, 0.7).to_event(1))

    joint = LogJoint(with_copy, guide, data(), data())
    assert joint.separable()
    with pytest.raises(UnsupportedProgram, match="does not read the data that are simulated"):
        calibration.simulated(joint, data=12, draws=15)
    collapsed = LogJoint(model, Encoder("constant").double(), data())  # does not read x either, and needs not
    calibration.simulated(collapsed, data=12, draws=15)


def test_a_guide_that_reads_its_batch_is_calibrated_on_whole_batches() -> None:
    """The means of 12 simulated data are those of the guide; q is the exact posterior of centred data, here nearly."""
    found = calibration.simulated(LogJoint(model, Encoder("mean").double(), data()), data=30, draws=15)
    assert found.attrs["simulations"] == 30


@pytest.mark.parametrize("where", ["noise", "latents"])
def test_a_density_of_the_guide_that_is_none_is_refused(where: str) -> None:
    def guide(x):
        with pyro.plate("rows", len(x)):
            loc = nn.functional.dropout(x) if where == "noise" else x / 2
            a = pyro.sample("a", dist.Normal(loc, 0.7).to_event(1))
            pyro.sample("b", dist.Normal(a.mean(-2, keepdim=True) if where == "latents" else a, 0.7).to_event(1))

    def two(x):
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(a, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(b, 1.0).to_event(1), obs=x)

    said = {
        "noise": "guide: its log density changes between two evaluations",
        "latents": "guide: moving the latents of some data",
    }
    with pytest.raises(UnsupportedProgram, match=said[where]):
        LogJoint(two, guide, data())


def test_a_guide_for_repeated_rows_is_compared_with_one_draw_at_a_time() -> None:
    """A recurrent decoder needs its rows repeated, draw by draw; a guide that counts rows would then be another guide."""
    cell = nn.GRU(1, D, batch_first=True).double()

    def recurrent(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(D, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(cell(z[..., None])[1][0], 1.0).to_event(1), obs=x)

    guide = Encoder("standard deviation").double()
    joint, x = LogJoint(recurrent, guide, data()), data()
    z = torch.randn(5, N, D, dtype=F64)
    torch.testing.assert_close(joint.log_guide(z), dist.Normal(x / x.std(0), 0.7).log_prob(z).sum(-1))


def test_the_comparison_of_parts_changes_no_stream_of_random_numbers() -> None:
    joint = LogJoint(model, Encoder("layers").double(), data())
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    joint.separable()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("threshold", [2.0, 2.5, 3.0])
@pytest.mark.parametrize("which", ["model", "guide"])
def test_coupling_in_rare_draws_is_refused(which: str, threshold: float) -> None:
    """The second latent moves where any datum's first one passes a threshold: in a few draws of a hundred."""
    x = torch.tensor([-1.0, 0.3, 2.0, 5.0, 0.7])

    def passed(z: Tensor) -> Tensor:
        return (z > threshold).any(-1, keepdim=True).to(z)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(z + passed(z) if which == "model" else z, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.3 * x, 0.8))
            pyro.sample("w", dist.Normal((x + z) / 2 + (passed(z) if which == "guide" else 0.0), 0.7))

    with pytest.raises(UnsupportedProgram, match=f"^{which}: moving the latents of some data changes log [pq] of others"):
        LogJoint(model, guide, x)


def test_a_part_is_audited_as_a_whole_of_its_own() -> None:
    x = torch.randn(N, D, dtype=F64, generator=torch.Generator().manual_seed(4))
    encoder = Encoder("layers").double()

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(encoder.loc(x), 0.7).to_event(1))

    rows = torch.tensor([7, 2, 3])
    part, alone = LogJoint(model, guide, x).subset(rows), LogJoint(model, guide, x[rows])
    assert torch.equal(part.program.observed["x"], x[rows])
    found, expected = (audit_log_joint(joint, references=["grid"], draws=200, keep=50) for joint in (part, alone))
    assert np.array_equal(found.posteriors["grid"].observed_data["x"], x[rows].numpy())
    np.testing.assert_allclose(found.table["log_evidence"], expected.table["log_evidence"], atol=1e-9)
