"""Discrete latents that are summed out by variable elimination, against sums written by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor

import elbowroom as er
from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.target.log_joint import LogJoint

N, M, K = 6, 7, 3
CENTRES = torch.tensor([-2.0, 0.5, 2.0])
LOADINGS = torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.8, -1.0]])
LENGTHS = torch.tensor([7, 1, 3, 5, 2, 7])
STAY = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.05, 0.15, 0.8]])


def data(seed: int = 0) -> Tensor:
    return 2.0 * torch.randn(N, M, generator=torch.Generator().manual_seed(seed))


def words(x: Tensor, keep: Tensor, drawn: bool = False, with_c: bool = False) -> None:
    """Mixtures of normals, one component per word, whose weights and centres the document's z moves."""
    with pyro.plate("documents", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("words", M, dim=-1), poutine.mask(mask=keep):
            c = pyro.sample("c", dist.Categorical(logits=z @ LOADINGS))
            centre = CENTRES[c] + z[..., 0]
            if drawn:
                centre = pyro.sample("u", dist.Normal(centre, 0.5))
            pyro.sample("x", dist.Normal(centre, 1.0), obs=x)


def guide_of_words(x: Tensor, keep: Tensor, drawn: bool = False, with_c: bool = False) -> None:
    with pyro.plate("documents", len(x), dim=-2):
        mean = torch.stack([x.mean(-1), x.std(-1)], -1)[:, None]
        pyro.sample("z", dist.Normal(0.3 * mean, 0.5).to_event(1))
        if drawn or with_c:
            with pyro.plate("words", M, dim=-1), poutine.mask(mask=keep):
                if with_c:
                    pyro.sample("c", dist.Categorical(logits=torch.zeros(len(x), M, K)))
                if drawn:
                    pyro.sample("u", dist.Normal(x, 1.0))


def of_words(z: Tensor, x: Tensor, keep: Tensor, u: Tensor | None = None) -> Tensor:
    """log p(x, z) with the components summed out, by hand: (S, N)."""
    z, x = z.double(), x.double()
    weights = torch.log_softmax(z @ LOADINGS.double(), -1).movedim(-1, 0)[..., None]  # (K, S, N, 1)
    centres = CENTRES.double()[:, None, None, None] + z[..., 0][..., None]
    if u is None:
        each = torch.logsumexp(weights + dist.Normal(centres, 1.0).log_prob(x), 0)
    else:
        each = torch.logsumexp(weights + dist.Normal(centres, 0.5).log_prob(u), 0) + dist.Normal(u, 1.0).log_prob(x)
    return dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + (each * keep).sum(-1)


def all_words() -> Tensor:
    return torch.ones(N, M, dtype=torch.bool)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_latent_in_an_inner_plate_is_summed_out(ragged: bool) -> None:
    keep = torch.arange(M) < LENGTHS[:, None] if ragged else all_words()
    joint = LogJoint(words, guide_of_words, data(), keep)
    z = torch.randn(5, N, 2, dtype=torch.float64)
    torch.testing.assert_close(joint(z), of_words(z, data(), keep))
    prior, likelihood = joint.terms(z)
    torch.testing.assert_close(prior, dist.Normal(0.0, 1.0).log_prob(z).sum(-1))
    torch.testing.assert_close(prior + likelihood, joint(z))
    assert joint.separable() or joint.subset(torch.tensor([1, 4])) is not None
    part = joint.subset(torch.tensor([4, 1]))
    torch.testing.assert_close(part(z[:, [4, 1]]), joint(z)[:, [4, 1]])


def test_the_gradient_is_that_of_the_sum() -> None:
    joint = LogJoint(words, guide_of_words, data(), all_words())
    z = torch.randn(2, N, 2, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(of_words(z, data(), all_words()).sum(), z)[0]
    torch.testing.assert_close(joint.grad(z.detach())[1], expected)


def test_a_continuous_latent_may_depend_on_it() -> None:
    joint = LogJoint(words, guide_of_words, data(), all_words(), drawn=True)
    z = torch.randn(3, N, 2 + M, dtype=torch.float64)
    expected = of_words(z[..., :2], data(), all_words(), u=z[..., 2:])
    torch.testing.assert_close(joint(z), expected)
    prior, likelihood = joint.terms(z)
    torch.testing.assert_close(likelihood, dist.Normal(z[..., 2:], 1.0).log_prob(data().double()).sum(-1))
    torch.testing.assert_close(prior + likelihood, expected)


def test_the_draws_of_a_guide_are_ignored_and_this_is_said() -> None:
    joint = LogJoint(words, guide_of_words, data(), all_words(), with_c=True)
    without = LogJoint(words, guide_of_words, data(), all_words())
    z = torch.randn(3, N, 2, dtype=torch.float64)
    torch.testing.assert_close(joint.log_guide(z), without.log_guide(z))
    assert any("the guide's draws of it are ignored" in note for note in joint.notes)


def test_an_audit_integrates_what_is_left() -> None:
    """The grid's log p(x), and certified chains, agree with a sum over a fine grid of the density written by hand."""
    x = data(1)
    step, edge = 0.04, 6.0
    line = torch.arange(-edge, edge, step, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)[:, None, :].expand(-1, N, -1)
    expected = torch.logsumexp(of_words(points, x, all_words()), 0) + 2 * math.log(step)
    audit = er.audit(words, guide_of_words, x, all_words(), references=["grid", "hmc"], seed=3, diagnose=False)
    table = audit.table
    torch.testing.assert_close(torch.tensor(table["log_evidence"].to_numpy()), expected, atol=1e-4, rtol=0.0)


def chain(x: Tensor) -> None:
    """A hidden Markov chain of M steps, whose observations a continuous latent moves: K^M = 2,187 paths, times 5 starts."""
    with pyro.plate("sequences", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        start = pyro.sample("start", dist.Categorical(torch.ones(5)))
        state = pyro.sample("s_0", dist.Categorical(Vindex(STAY)[start % K, :]))
        for t in pyro.markov(range(x.shape[1])):
            if t:
                state = pyro.sample(f"s_{t}", dist.Categorical(Vindex(STAY)[state, :]))
            pyro.sample(f"x_{t}", dist.Normal(CENTRES[state] + z, 1.0), obs=x[:, t])


def guide_of_chain(x: Tensor) -> None:
    with pyro.plate("sequences", len(x)):
        pyro.sample("z", dist.Normal(x.mean(1), 0.5))


def test_a_chain_of_too_many_paths_is_summed_out_step_by_step() -> None:
    """Against the forward algorithm."""
    x = data(2)
    joint = LogJoint(chain, guide_of_chain, x)
    z = torch.randn(4, N, 1, dtype=torch.float64)
    emissions = dist.Normal(CENTRES.double()[:, None, None, None] + z, 1.0).log_prob(x.double())  # (K, S, N, M)
    log_stay = STAY.double().log()
    first = torch.logsumexp(torch.stack([log_stay[start % K] for start in range(5)]), 0) - math.log(5)
    alpha = first[:, None, None] + emissions[..., 0]
    for t in range(1, M):
        alpha = torch.logsumexp(alpha[:, None] + log_stay[:, :, None, None], 0) + emissions[..., t]
    expected = torch.logsumexp(alpha, 0) + dist.Normal(0.0, 1.0).log_prob(z[..., 0])
    torch.testing.assert_close(joint(z), expected)
    assert sum("summed out" in note for note in joint.notes) == M + 1


def test_a_vector_of_entries_is_refused_with_the_cure() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Bernoulli(torch.full((20,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(z + c.sum(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(UnsupportedProgram, match=r"'c' .*2\^20 values, too many"):
        LogJoint(model, guide, torch.randn(4))


def test_a_model_that_does_not_run_with_all_values_at_once_is_refused_with_the_reason() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
            with pyro.plate("entries", 4, dim=-1):
                c = pyro.sample("c", dist.Categorical(torch.ones(3)))
                pyro.sample("x", dist.Normal(z + (1.0 if float(c.float().mean()) > 1.0 else 0.0), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 1.0))

    with pytest.raises(UnsupportedProgram, match="it branches on them, or counts dimensions from the left"):
        LogJoint(model, guide, torch.randn(4, 4))
