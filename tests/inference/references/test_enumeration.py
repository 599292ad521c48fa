"""Discrete latents: enumeration against sums written out by hand, alone and beside a continuous latent on a grid."""

from __future__ import annotations

import math
from functools import partial

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import binom, norm
from torch import Tensor

from elbowroom.analysis.audit import auditor as audit_module
from elbowroom.analysis.audit.auditor import Audit, audit, audit_log_joint
from elbowroom.errors import UnsupportedProgram, UserError
from elbowroom.inference.references.enumeration import Enumeration
from elbowroom.inference.target import discrete
from elbowroom.inference.target.log_joint import LogJoint

F64 = torch.float64
Y = torch.tensor([-2.0, -0.3, 0.1, 0.9, 3.0], dtype=F64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
LOC, SCALE = torch.tensor([-1.0, 0.0, 2.0], dtype=F64), torch.tensor([0.5, 1.0, 0.7], dtype=F64)
BAND = 4.5  # standard errors


def assignment_probabilities(log_joint: LogJoint, z: Tensor) -> Tensor:
    """Return p(discrete assignment | x_n, z_sn), (A, S, N), over `program.assignments`."""
    joint = log_joint._joint
    return torch.softmax(
        torch.stack([log_joint._map(partial(joint, assignment=a), z) for a in log_joint.program.assignments]), 0
    )


def mixture(y):
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        pyro.sample("y", dist.Normal(LOC[k], SCALE[k]), obs=y)


def logits_guide(y):
    with pyro.plate("data", len(y)):
        pyro.sample("k", dist.Categorical(logits=torch.stack([-y, 0 * y, y], -1)))


def by_hand(y: torch.Tensor) -> torch.Tensor:
    """log p(y, k), (N, 3)."""
    return WEIGHTS.log() + dist.Normal(LOC, SCALE).log_prob(y[:, None])


def probabilities(result: Audit, method: str) -> np.ndarray:
    return result.posteriors[method]["assignments"]["probability"].transpose("obs_id", "assignment").values


def close_to_share(draws: np.ndarray, p: np.ndarray) -> None:
    """Independent 0/1 draws, (S, N), against their probability: the binomial's tails, as rare as 4.5 standard errors."""
    count = draws.sum(0)
    tail = np.minimum(binom.cdf(count, len(draws), p), binom.sf(count - 1, len(draws), p))
    assert (tail > norm.sf(BAND)).all()


def flat(result: Audit, method: str, site: str) -> np.ndarray:
    values = result.posteriors[method]["posterior"][site].transpose("chain", "draw", "obs_id", ...).values
    return values.reshape(-1, *values.shape[2:])


@pytest.fixture(scope="module")
def mixed_up() -> Audit:
    return audit(mixture, logits_guide, Y)


def test_a_mixture_has_the_evidence_and_the_responsibilities_of_its_closed_form(mixed_up: Audit) -> None:
    exact = torch.logsumexp(by_hand(Y), -1)
    table = mixed_up.table
    assert table["reference"].values.tolist() == ["enumeration"]
    assert set(table["evidence_method"].values) == {"enumeration"}
    assert (table["status"] == "exact").all()
    np.testing.assert_allclose(table["log_evidence"], exact, rtol=0, atol=1e-10)
    assert (np.abs(table["log_evidence"].values - exact.numpy()) <= table["log_evidence_se"].values).all()
    responsibility = torch.softmax(by_hand(Y), -1).numpy()
    np.testing.assert_allclose(probabilities(mixed_up, "enumeration"), responsibility, atol=1e-12)
    draws = flat(mixed_up, "enumeration", "k")
    for k in range(3):
        close_to_share(draws == k, responsibility[:, k])
    lp = mixed_up.posteriors["enumeration"]["sample_stats"]["lp"].values.reshape(-1, len(Y))
    np.testing.assert_allclose(lp, np.take_along_axis(by_hand(Y).numpy().T, draws, 0), atol=1e-12)


def test_everything_said_of_the_guide_is_a_sum_over_its_values(mixed_up: Audit) -> None:
    log_q = torch.log_softmax(torch.stack([-Y, 0 * Y, Y], -1), -1)
    q, p, log_p = log_q.exp(), torch.softmax(by_hand(Y), -1), by_hand(Y)
    table = mixed_up.table.sel(reference="enumeration")
    expected = {
        "elbo": (q * (log_p - log_q)).sum(-1),
        "elbo_se": torch.zeros(len(Y)),
        "gap_total": (q * (log_q - torch.log_softmax(by_hand(Y), -1))).sum(-1),
        "rate": (q * (log_q - WEIGHTS.log())).sum(-1),
        "distortion": -(q * (log_p - WEIGHTS.log())).sum(-1),
        "ess_fraction": 1 / (p.square() / q).sum(-1),
        "total_variation": (q - p).abs().sum(-1) / 2,
        "kl_forward": (p * (torch.log_softmax(by_hand(Y), -1) - log_q)).sum(-1),
        "kl_forward_se": torch.zeros(len(Y)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(table[name], value, rtol=0, atol=1e-10, err_msg=name)
    assert (table["gap_total"] > 0.01).all()
    np.testing.assert_allclose(table["gap_total_upper"] - table["gap_total_lower"], 0, atol=1e-12)
    for name in ("mean_error", "sd_ratio", "sliced_wasserstein", "noise_floor"):
        assert table[name].isnull().all()
    draws = flat(mixed_up, "guide", "k")
    for k in range(3):
        close_to_share(draws == k, q[:, k].numpy())
    # guide and reference do not share random numbers: they agree as often as independent draws do
    agree = (draws == flat(mixed_up, "enumeration", "k")).mean(0)
    chance = (q * p).sum(-1).numpy()
    assert (np.abs(agree - chance) < BAND * np.sqrt(chance * (1 - chance) / len(draws))).all()


def test_the_verdict_reads_well_without_a_continuous_latent(mixed_up: Audit) -> None:
    text = repr(mixed_up)
    assert "nan" not in text
    assert "importance" not in text
    assert "sd ratio" not in text
    assert "enumeration: total variation" in text
    assert "log p(x) is exact" in text
    assert "of its probability on other values" in mixed_up.verdict


def test_a_file_is_read_by_arviz_with_whole_numbers(tmp_path, mixed_up: Audit) -> None:
    mixed_up.save(tmp_path)
    for method in ("guide", "enumeration"):
        read = az.from_netcdf(tmp_path / "posteriors" / f"{method}.nc")
        k = read.posterior["k"]
        assert np.issubdtype(k.dtype, np.integer)
        assert k.dims == ("chain", "draw", "obs_id")
        assert set(np.unique(k)) <= {0, 1, 2}
        assert read.assignments["k"].values.tolist() == [0, 1, 2]
        np.testing.assert_allclose(read.assignments["probability"].sum("assignment"), 1)
    again = Audit.load(tmp_path)
    assert again.table.equals(mixed_up.table)
    assert "total_variation[enumeration]" in (tmp_path / "audit.csv").read_text().splitlines()[0]


def test_two_sites_are_enumerated_jointly() -> None:
    """a -> b | a -> y: three bits and a colour that depends on them, in a plate that is not the last dimension."""
    n, on = 4, torch.tensor([0.2, 0.5, 0.7], dtype=F64)
    x = torch.tensor([[0.3, -0.2], [1.5, 2.0], [-1.0, 0.4], [2.2, 2.9]], dtype=F64)

    def model(x):
        with pyro.plate("rows", len(x), dim=-2):
            bits = pyro.sample("bits", dist.Bernoulli(on).to_event(1))
            colour = pyro.sample("colour", dist.Categorical(logits=torch.stack([bits.sum(-1), 1 - bits[..., 0]], -1)))
            with pyro.plate("columns", 2, dim=-1):
                pyro.sample("x", dist.Normal(bits[..., 1] + 2.0 * bits[..., 2] * colour, 0.8), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x), dim=-2):
            bits = pyro.sample("bits", dist.Bernoulli(torch.sigmoid(x[:, :1, None] - 0.5).expand(-1, 1, 3)).to_event(1))
            pyro.sample("colour", dist.Categorical(logits=torch.stack([bits[..., 2], x[:, :1]], -1)))

    log_p, log_q, values = [], [], []
    for a in range(2**3):
        bits = torch.tensor([a >> 2 & 1, a >> 1 & 1, a & 1], dtype=F64)
        for c in range(2):
            choice = torch.log_softmax(torch.stack([bits.sum(), 1 - bits[0]]), 0)[c]
            prior = dist.Bernoulli(on).log_prob(bits).sum() + choice
            log_p.append(prior + dist.Normal(bits[1] + 2 * bits[2] * c, 0.8).log_prob(x).sum(-1))
            theirs = torch.log_softmax(torch.stack([bits[2].expand(n), x[:, 0]], -1), -1)[:, c]
            log_q.append(dist.Bernoulli(torch.sigmoid(x[:, :1] - 0.5)).log_prob(bits).sum(-1) + theirs)
            values.append((bits.tolist(), c))
    joint, q = torch.stack(log_p, -1), torch.stack(log_q, -1)
    result = audit(model, guide, x)
    np.testing.assert_allclose(result.table["log_evidence"], torch.logsumexp(joint, -1), rtol=0, atol=1e-10)
    np.testing.assert_allclose(result.table["elbo"], (q.exp() * (joint - q)).sum(-1), rtol=0, atol=1e-10)
    group = result.posteriors["enumeration"]["assignments"]
    order = [
        values.index((b.ravel().tolist(), c.item())) for b, c in zip(group["bits"].values, group["colour"].values, strict=True)
    ]
    p = torch.softmax(joint, -1).numpy()
    np.testing.assert_allclose(probabilities(result, "enumeration"), p[:, order], atol=1e-12)
    bits, colour = flat(result, "enumeration", "bits"), flat(result, "enumeration", "colour")
    assert bits.dtype == colour.dtype == np.int32
    both = (bits.reshape(-1, n, 3)[..., 2] == 1) & (colour.reshape(-1, n) == 1)
    close_to_share(both, p[:, [i for i, (b, c) in enumerate(values) if b[2] == 1 and c == 1]].sum(-1))


def coin(y):
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
        pyro.sample("y", dist.Normal(3.0 * k - 1.0, 1.5), obs=y)


def coin_logit(y: torch.Tensor) -> torch.Tensor:
    return math.log(0.3 / 0.7) + dist.Normal(2.0, 1.5).log_prob(y) - dist.Normal(-1.0, 1.5).log_prob(y)


@pytest.mark.parametrize("shift", [0.0, 0.4, -2.0])
def test_the_gap_of_a_coin_is_its_kl(shift: float) -> None:
    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("k", dist.Bernoulli(logits=coin_logit(y) + shift))

    q, p = torch.sigmoid(coin_logit(Y) + shift), torch.sigmoid(coin_logit(Y))
    kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    result = audit(coin, guide, Y)
    np.testing.assert_allclose(result.table["gap_total"], kl, rtol=0, atol=1e-10)
    assert result.posteriors["enumeration"].posterior["k"].dtype == np.int32
    if shift == 0:
        np.testing.assert_allclose(result.table["ess_fraction"], 1, atol=1e-10)


def test_a_guide_that_leaves_the_sites_to_be_summed_out_has_no_gap() -> None:
    result = audit(mixture, lambda y: None, Y)
    np.testing.assert_allclose(result.table["elbo"], torch.logsumexp(by_hand(Y), -1), rtol=0, atol=1e-10)
    np.testing.assert_allclose(result.table["gap_total"], 0, atol=1e-10)


def test_a_value_that_one_of_both_excludes() -> None:
    """q = 0 where p > 0 is a finite KL and no way to p by importance sampling; p = 0 where q > 0 an infinite KL."""

    def narrow(y):
        with pyro.plate("data", len(y)):
            pyro.sample("k", dist.Categorical(logits=torch.tensor([-math.inf, 0.0, 0.0], dtype=F64).expand(len(y), 3)))

    log_p = by_hand(Y)
    result = audit(mixture, narrow, Y)
    np.testing.assert_allclose(result.table["elbo"], (0.5 * (log_p[:, 1:] + math.log(2))).sum(-1), rtol=0, atol=1e-10)
    assert (result.table["ess_fraction"] == 0).all()
    assert result.table["pareto_k"].isnull().all()
    assert not (flat(result, "guide", "k") == 0).any()

    def impossible(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(logits=torch.tensor([0.0, 0.0, -math.inf], dtype=F64)))
            pyro.sample("y", dist.Normal(LOC[k], SCALE[k]), obs=y)

    result = audit(impossible, logits_guide, Y)
    assert (result.table["elbo"] == -np.inf).all()
    np.testing.assert_allclose(
        result.table["log_evidence"], torch.logsumexp(log_p[:, :2] - WEIGHTS[:2].log() + math.log(0.5), -1)
    )
    assert "minus infinity" in result.verdict


def test_without_a_reference_the_guide_gives_an_estimate() -> None:
    result = audit(mixture, logits_guide, Y, references=[])
    good = (result.table["evidence_method"] == "importance sampling estimate").values
    assert good.sum() >= 4
    score = (result.table["log_evidence"] - torch.logsumexp(by_hand(Y), -1).numpy()) / result.table["log_evidence_se"]
    assert (np.abs(score.values[good]) < BAND).all()
    assert (np.abs(score.values[good]) > 0).all()


def test_blocks_of_data_do_not_change_what_is_exact(monkeypatch, mixed_up: Audit) -> None:
    log_joint = LogJoint(mixture, logits_guide, Y)
    monkeypatch.setattr(audit_module, "ARRAY", 2 * 1000)
    said: list[str] = []
    blocks = audit_log_joint(log_joint, draws=1000, keep=400, progress=said.append)
    assert "enumeration for data 2..3 of 5" in said
    for name in ("elbo", "log_evidence", "total_variation", "ess_fraction"):
        np.testing.assert_allclose(blocks.table[name], mixed_up.table[name], atol=1e-12)
    np.testing.assert_allclose(probabilities(blocks, "guide"), probabilities(mixed_up, "guide"), atol=1e-12)


# -- beside a continuous latent ------------------------------------------------------------------------------------------


def shifted(y):
    with pyro.plate("rows", len(y)):
        kind = pyro.sample("kind", dist.Categorical(WEIGHTS))
        z = pyro.sample("z", dist.Normal(LOC[kind], SCALE[kind]))
        pyro.sample("y", dist.Normal(z.tanh() + 0.3 * z, 0.5), obs=y)


def shifted_guide(y):
    with pyro.plate("rows", len(y)):
        kind = pyro.sample("kind", dist.Categorical(logits=torch.stack([-y, 0 * y, y], -1)))
        pyro.sample("z", dist.Normal(0.6 * y + 0.3 * LOC[kind], 0.6))


def shares_by_quadrature() -> np.ndarray:
    """p(kind | y), (N, 3)."""
    z = torch.linspace(-12, 12, 20001, dtype=F64)
    likelihood = dist.Normal(z.tanh() + 0.3 * z, 0.5).log_prob(Y[:, None])
    parts = [WEIGHTS[k].log() + torch.logsumexp(dist.Normal(LOC[k], SCALE[k]).log_prob(z) + likelihood, -1) for k in range(3)]
    return torch.softmax(torch.stack(parts, -1), -1).numpy()


def test_beside_a_grid_the_discrete_site_is_drawn_from_its_posterior(tmp_path) -> None:
    log_joint = LogJoint(shifted, shifted_guide, Y)
    result = audit_log_joint(log_joint, draws=2000, keep=1000, seed=1)
    assert result.table["reference"].values.tolist() == ["grid"]
    assert (result.table["status"] == "exact").all()
    assert result.table["total_variation"].isnull().all()
    expected = shares_by_quadrature()
    kind, z = flat(result, "grid", "kind"), flat(result, "grid", "z")
    own = torch.softmax(torch.stack([-Y, 0 * Y, Y], -1), -1).numpy()
    theirs = flat(result, "guide", "kind")
    for k in range(3):
        close_to_share(kind == k, expected[:, k])
        close_to_share(theirs == k, own[:, k])  # the guide's own probabilities, not the model's given its z
    # jointly with z: E[z 1(kind = 2)] = E[z p(kind = 2 | z)]
    conditional = assignment_probabilities(log_joint, torch.as_tensor(z, dtype=F64)[..., None])[2].numpy()
    assert (
        np.abs((z * ((kind == 2) - conditional)).sum(0)) < BAND * np.sqrt((z**2 * conditional * (1 - conditional)).sum(0))
    ).all()
    result.save(tmp_path)
    for method in ("guide", "grid"):
        read = az.from_netcdf(tmp_path / "posteriors" / f"{method}.nc").posterior
        assert np.issubdtype(read["kind"].dtype, np.integer)
        assert np.issubdtype(read["z"].dtype, np.floating)


def test_a_guide_without_the_discrete_site_gets_the_model_s() -> None:
    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(0.6 * y, 0.7))

    log_joint = LogJoint(shifted, guide, Y)
    z = log_joint.sample_guide(4000, seed=3)[0]
    p = assignment_probabilities(log_joint, z)
    drawn = discrete.discrete_draws(log_joint, z, seed=4, which="guide")["kind"]
    assert drawn.dtype == torch.int64
    for k in range(3):
        error = (p[k] * (1 - p[k])).sum(0).sqrt()
        assert (((drawn == k).double() - p[k]).sum(0).abs() < BAND * error).all()


def test_few_draws_at_once_give_the_same_draws(monkeypatch) -> None:
    log_joint = LogJoint(shifted, shifted_guide, Y)
    z = log_joint.sample_guide(50, seed=3)[0]
    whole = discrete.discrete_draws(log_joint, z, seed=4)["kind"]
    monkeypatch.setattr(discrete, "ARRAY", 7 * 3 * len(Y))
    assert torch.equal(discrete.discrete_draws(log_joint, z, seed=4)["kind"], whole)


def test_a_draw_without_a_density_is_missing_and_touches_no_other() -> None:
    log_joint = LogJoint(shifted, shifted_guide, Y)
    z = log_joint.sample_guide(50, seed=3)[0]
    whole = discrete.discrete_draws(log_joint, z, seed=4)["kind"]
    z[7, 2] = torch.nan
    broken = discrete.discrete_draws(log_joint, z, seed=4)["kind"]
    missing = torch.zeros_like(whole, dtype=torch.bool)
    missing[7, 2] = True
    assert torch.equal(broken.isnan(), missing)
    assert torch.equal(broken[~missing].long(), whole[~missing])


def test_an_impossible_value_is_never_drawn() -> None:
    log_p = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf], dtype=F64)[:, None]
    uniform = torch.tensor([0.0, 0.25, 0.5, 0.75, math.nextafter(1.0, 0.0)], dtype=F64)[:, None]
    assert discrete.sample(log_p, uniform)[:, 0].tolist() == [1, 1, 3, 3, 3]


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_too_many_joint_values_are_refused_by_name_and_number() -> None:
    def model(y):
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Categorical(torch.ones(70)))
            b = pyro.sample("b", dist.Categorical(torch.ones(70)))
            pyro.sample("y", dist.Normal((a + b).to(y.dtype), 1.0), obs=y)

    with pytest.raises(UnsupportedProgram, match="'a', 'b': 4900 joint values are too many to enumerate") as refused:
        audit(model, lambda y: None, Y)
    assert "\n" not in str(refused.value)


def test_enumeration_refuses_a_continuous_latent_and_a_grid_a_discrete_model() -> None:
    with pytest.raises(UserError, match="enumeration needs a model whose latents are all discrete"):
        audit(shifted, shifted_guide, Y, references=["enumeration"])
    with pytest.raises(UserError, match="grid needs a continuous latent"):
        audit(mixture, logits_guide, Y, references=["grid"])
    assert audit(mixture, logits_guide, Y, references=[Enumeration()]).table["status"].values.tolist() == [["exact"]] * len(Y)


def coupled(y):
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        pyro.sample("y", dist.Normal(LOC[k] - 0.1 * LOC[k].mean(), SCALE[k]), obs=y)


def observed_outside(y):
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        pyro.sample("y", dist.Normal(LOC[k], SCALE[k]), obs=y)
    pyro.sample("total", dist.Normal(LOC[k].sum(), 1.0), obs=y.sum())


def masked(y):
    with pyro.plate("data", len(y)):
        with pyro.poutine.mask(mask=y > 0):
            k = pyro.sample("k", dist.Categorical(WEIGHTS))
        pyro.sample("y", dist.Normal(LOC[k], SCALE[k]), obs=y)


def other_values(y):
    with pyro.plate("data", len(y)):
        pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.3, 0.3, 1e-4]).expand(len(y), 4)))


def fewer_values(y):
    with pyro.plate("data", len(y)):
        pyro.sample("k", dist.Categorical(torch.ones(len(y), 2)))


def outside_the_plate(y):
    pyro.sample("k", dist.Categorical(WEIGHTS))


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (coupled, logits_guide, "the data are coupled"),
        (observed_outside, logits_guide, "outside the plate"),
        (masked, logits_guide, "discrete site 'k' is masked out of some data"),
        (mixture, other_values, "guide: its probabilities of 'k' for datum 0 sum to 0.9999 over"),
        (mixture, fewer_values, "guide: it gives no probability of k=2"),
        (mixture, outside_the_plate, "guide: it gives no probability of k=0"),
    ],
)
def test_what_enumeration_would_get_wrong_is_refused(model, guide, message: str) -> None:
    with pytest.raises(UnsupportedProgram, match=message):
        audit(model, guide, Y)
