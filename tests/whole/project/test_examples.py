"""The programs of `examples/`, small, audited, and log p(x) against sums over lattices written out from the trained weights."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from elbowroom.analysis.audit.auditor import Audit, audit
from elbowroom.analysis.measures.evidence_kinds import ERRORS
from elbowroom.inference.program.densities.factorised import log_prob

ROOT = Path(__file__).parents[3]
F64 = torch.float64
N = 4  # data audited
JUDGED = 2  # of them, by a lattice of this file's own


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(result: Audit, log_p: Tensor, tolerance: float) -> None:
    table = result.table
    assert set(table["status"].sel(reference="grid").values) == {"exact"}, set(table["reason"].values.flatten())
    error = np.hypot(table["elbo_se"].values, table["log_evidence_se"].values)
    assert (table["gap_total"].values > -ERRORS * error).all(), table["gap_total"].values
    np.testing.assert_allclose(table["log_evidence"].values[:JUDGED], log_p.numpy(), atol=tolerance, rtol=0)


def normal(x: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    """log N(x; loc, scale^2), written out."""
    scale = torch.as_tensor(scale, dtype=F64)
    return -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def lattice(low: Tensor, high: Tensor, n: int) -> tuple[Tensor, float]:
    """Points of an n x n lattice, (n * n, 2), and the log area of a cell."""
    axes = [torch.linspace(a, b, n, dtype=F64) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    return torch.cartesian_prod(*axes), sum(math.log(axis[1] - axis[0]) for axis in axes)


def by_hand(network: nn.Module, x: Tensor) -> Tensor:
    return network.double()(x)


def semi_supervised_evidence(vae: nn.Module, x: Tensor, n: int = 161) -> Tensor:
    """log sum_y (1/10) int N(z; 0, I) prod_j Bernoulli(x_j; decoder(z, y)) dz."""
    z, area = lattice(torch.tensor([-7.0, -7.0]), torch.tensor([7.0, 7.0]), n)
    terms = []
    for label in torch.eye(10, dtype=F64):
        logits = by_hand(vae.decoder, torch.cat([z, label.expand(len(z), 10)], 1))
        on, off = nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)
        terms.append((on @ x.T + off @ (1 - x).T) + normal(z, 0.0, 1.0).sum(1)[:, None] - math.log(10) + area)
    return torch.logsumexp(torch.cat(terms), 0)


def hierarchy_evidence(levels: nn.Module, x: Tensor, n: int = 401) -> Tensor:
    """log int p(x|z) [int N(top; 0, 1) N(z; f(top), s^2) dtop] dz; the box holds 20,000 draws of z and a margin."""
    s, sigma = levels.log_s.double().exp(), levels.log_sigma.double().exp()
    top = torch.linspace(-7, 7, 281, dtype=F64)[:, None]
    draws = by_hand(levels.f, torch.randn(20_000, 1, dtype=F64)) + s * torch.randn(20_000, 2, dtype=F64)
    z, area = lattice(draws.amin(0) - s, draws.amax(0) + s, n)
    weight = normal(top, 0.0, 1.0)[:, 0] + math.log(top[1, 0] - top[0, 0])
    mean = by_hand(levels.f, top)
    prior = torch.cat([torch.logsumexp(weight + normal(part[:, None], mean, s).sum(-1), 1) for part in z.split(10_000)])
    decoded = by_hand(levels.g, z)
    return torch.stack([torch.logsumexp(prior + normal(row, decoded, sigma).sum(1), 0) + area for row in x])


def topics_evidence(lda: nn.Module, x: Tensor, n: int = 241) -> Tensor:
    """log int N(w; 0, I_3) Multinomial(x; ...) dw, over the plane across (1, 1, 1): softmax(w + c) = softmax(w)."""
    u, area = lattice(torch.tensor([-7.0, -7.0]), torch.tensor([7.0, 7.0]), n)
    plane = torch.tensor([[1 / 2**0.5, -1 / 2**0.5, 0.0], [1 / 6**0.5, 1 / 6**0.5, -2 / 6**0.5]], dtype=F64)
    theta = torch.softmax(u @ plane, 1)
    decoder = lda.decoder.double()
    words = theta @ decoder.beta.weight.T
    words = (words - decoder.norm.running_mean) / (decoder.norm.running_var + decoder.norm.eps).sqrt()
    orders = torch.lgamma(x.sum(1) + 1) - torch.lgamma(x + 1).sum(1)
    return torch.logsumexp(torch.log_softmax(words, 1) @ x.T + normal(u, 0.0, 1.0).sum(1)[:, None], 0) + orders + area


@torch.no_grad()
def judged(evidence, module: nn.Module, x: Tensor) -> Tensor:
    """The weights are those of training, in float32, widened."""
    return evidence(module, x[:JUDGED].double())


@pytest.mark.slow
def test_semi_supervised() -> None:
    program = example("semi_supervised")
    data = program.digits()
    vae = program.train(data | {"x": data["x"][:512]}, epochs=8, hidden=16)
    x = data["x_test"][:N]
    result = audit(vae.model, vae.guide, x)
    check(result, judged(semi_supervised_evidence, vae, x), 1e-3)
    grid = result.posteriors["grid"].posterior
    assert grid["z"].shape[2:] == (N, 2)
    assert set(np.unique(grid["y"].values)) <= {0, 1}  # drawn given z, one-hot
    assert (grid["y"].values.sum(-1) == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("top_down", [False, True])
def test_hierarchy(top_down: bool) -> None:
    program = example("hierarchy")
    rows, held_out = program.tumours()
    levels = program.train(rows[:256], epochs=20, hidden=8, top_down=top_down)
    x = held_out[:N]
    result = audit(levels.model, levels.guide, x)
    check(result, judged(hierarchy_evidence, levels, x), 1e-3)
    assert set(result.posteriors["grid"].posterior.data_vars) == {"top", "z"}


@pytest.mark.slow
def test_topics() -> None:
    program = example("topics")
    docs, words, origin = program.corpus(size=40)
    assert docs.shape == (len(origin), 40)
    assert len(words) == 40
    lda = program.train(docs, epochs=15, hidden=16)
    result = audit(lda.model, lda.guide, docs[:N])
    check(result, judged(topics_evidence, lda, docs[:N]), 1e-3)
    assert "vmap" not in result.table.attrs["notes"]  # the density of counts runs for many draws at once


def small_chain(program: ModuleType) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(2) < torch.tensor([2, 1, 2, 2, 1, 2])[:, None]
    x = (torch.rand(6, 2, 5, generator=generator) < 0.4).float() * mask[..., None]
    return program.train(x, mask, epochs=5, size=3, k=1, hidden=4, states=3), x, mask


def chain_evidence(dmm: nn.Module, x: Tensor, mask: Tensor, n: int = 801) -> Tensor:
    """log int int p(z_1) p(x_1 | z_1) p(z_2 | z_1) p(x_2 | z_2) dz_1 dz_2, for two steps or one of one latent each."""
    dmm = dmm.double()
    z = torch.linspace(-12, 12, n, dtype=F64)[:, None]
    log_dz, start, following = math.log(z[1, 0] - z[0, 0]), dmm.transition(dmm.z_0), dmm.transition(z)
    emission = dist.Bernoulli(logits=dmm.emitter(z)).log_prob(x.double()[:, :, None]).sum(-1)  # (N, T, points)
    first = normal(z[:, 0], start[0], start[1]) + emission[:, 0]
    second = normal(z.T, *following)[None] + emission[:, 1, None] + log_dz
    later = torch.where(mask[:, 1], torch.logsumexp(torch.logsumexp(second, 2) + first, 1), torch.logsumexp(first, 1))
    return later + log_dz


@pytest.mark.slow
def test_deep_markov() -> None:
    program = example("deep_markov")
    dmm, x, mask = small_chain(program)
    result = audit(dmm.model, dmm.guide, x, mask, diagnose=False)
    with torch.no_grad():
        log_p = chain_evidence(copy.deepcopy(dmm), x, mask)
    table = result.table
    assert set(table["status"].sel(reference="grid").values) == {"exact"}
    np.testing.assert_allclose(table["log_evidence"].values, log_p.numpy(), atol=1e-4, rtol=0)
    assert (table["gap_total"].values > -ERRORS * np.hypot(table["elbo_se"].values, 1e-4)).all()
    assert np.isnan(result.posteriors["grid"].posterior["z_2"].values[:, :, 1]).all()  # a sequence of one step


@torch.no_grad()
def test_the_deep_markov_guide_reads_each_chorale_backwards() -> None:
    """The state at step t is that of the GRU over x_L, ..., x_t, whatever padding and neighbours there are."""
    program = example("deep_markov")
    dmm = program.DeepMarkov(keys=5, k=1, hidden=4, states=3)
    x, mask = torch.randn(3, 6, 5), torch.arange(6) < torch.tensor([6, 2, 5])[:, None]
    found = dmm.backwards(x, mask)
    for n, length in enumerate(mask.sum(1).tolist()):
        alone = dmm.rnn(x[n, :length].flip(0)[None])[0][0].flip(0)
        torch.testing.assert_close(found[n, :length], alone)


def test_the_deep_markov_example_says_where_its_data_are(tmp_path: Path) -> None:
    program = example("deep_markov")
    for folder in (None, str(tmp_path)):
        with pytest.raises(SystemExit, match=r"download https://\S+json into a folder.*ELBOWROOM_DATA="):
            program.chorales(folder)
    (tmp_path / program.FILE).write_text(json.dumps({"test": [[[60, 64], []], [[21]]]}))
    x, mask = program.chorales(str(tmp_path))["test"]
    assert x.shape == (2, 2, 88)
    assert x.nonzero().tolist() == [[0, 0, 39], [0, 0, 43], [1, 0, 0]]
    assert mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("start", ["probs", "logits"])
def test_a_multinomial_is_computed_without_torchs_mask(start: str) -> None:
    """What the topic model's likelihood needs to run under vmap; torch's own density is the truth."""
    x = torch.tensor([[2.0, 0.0, 1.0], [0.0, 4.0, 0.0]], dtype=F64)
    free = torch.randn(5, 1, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    free[0, 0, 1] = -torch.inf  # a word that never comes: zero times log zero is zero, and one such word is impossible

    def density(u: Tensor, fn=log_prob) -> Tensor:
        words = dist.Multinomial(9, **{start: u.softmax(-1) if start == "probs" else u})
        return fn(words, x)

    plain = lambda p, value: p.log_prob(value)
    expected = density(free, plain)
    torch.testing.assert_close(density(free), expected)
    torch.testing.assert_close(torch.func.vmap(density)(free), expected)
    inside = free[1:].clone().requires_grad_()
    mine, theirs = (torch.autograd.grad(density(inside, fn).sum(), inside)[0] for fn in (log_prob, plain))
    torch.testing.assert_close(mine, theirs)
    groups = dist.Multinomial(9, logits=free.expand(5, 2, 3)).to_event(1)
    torch.testing.assert_close(log_prob(groups, x), groups.log_prob(x))
