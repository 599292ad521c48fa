"""Programs as graphs: what they compute equals plain evaluation, for any draws of any data, weights and seeds."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.cases.priors import CASES, by_name, data_of, vae_of
from support.problems.catalogue import PROBLEMS
from torch import Tensor

from elbowroom.inference.compiled import graph as compiled
from elbowroom.inference.compiled.branches import Branches
from elbowroom.inference.compiled.graph import Graph, Untraceable
from elbowroom.inference.compiled.policies import at_most, expecting, policy
from elbowroom.inference.compiled.vmap_rules import VmapRules
from elbowroom.inference.mcmc.leapfrog import leap
from elbowroom.inference.program.frozen.promotion import mixed
from elbowroom.inference.references.hmc.hmc import HMC
from elbowroom.inference.target import graphs as traced
from elbowroom.inference.target import tracing
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.plain import PlainLogJoint
from elbowroom.inference.target.tracing import leapfrog_arguments
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.likelihoods.binary import Bernoulli
from elbowroom.models.networks.convolution import Conv
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE

KINDS = ("joint", "terms", "guide", "grad", "parts", "leap")
# problems that have no graph, and why
EAGER: dict[str, str] = {}


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def always_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use graphs for the smallest work, without compiling them."""
    monkeypatch.setattr(traced, "TRACE", -1.0)
    monkeypatch.setattr(traced, "COMPILE", float("inf"))


def evaluated(joint: LogJoint, z: Tensor, kinds: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
    n, d = z.shape[1:]
    momentum = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).reshape(z.shape)
    root = torch.eye(d, dtype=z.dtype).expand(n, d, d) * 0.5
    size, kick = torch.full((n, 1), 0.1, dtype=z.dtype), torch.ones((), dtype=z.dtype)
    functions = {
        "joint": lambda: (joint(z),),
        "terms": lambda: joint.terms(z),
        "guide": lambda: (joint.log_guide(z),),
        "grad": lambda: joint.grad(z),
        "parts": lambda: joint.parts(z),
        "leap": lambda: joint.leap(z, momentum, size, root, kick),
    }
    return {kind: functions[kind]() for kind in kinds}


def assert_same(joint: LogJoint, z: Tensor, kinds: Sequence[str] = KINDS, tolerance: float = 1e-9) -> None:
    """Compare what is evaluated here with plain evaluation."""
    with policy("never"):
        plain = evaluated(joint, z, kinds)
    for kind, found in evaluated(joint, z, kinds).items():
        for ours, theirs in zip(found, plain[kind], strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, k=kind: f"{k}: {m}"
            )


def runs(joint: LogJoint) -> bool:
    """Say whether a program runs in this precision: not where it closes over tensors of another."""
    try:
        with policy("never"):
            joint(joint.probe_points[:1])
    except RuntimeError as error:
        if not mixed(error):
            raise
        return False
    return True


def reasons(joint: LogJoint) -> dict[str, str]:
    return dict(joint.graphs.reasons)


# -- graphs of functions ----------------------------------------------------------------------------------------------------


def test_a_graph_reads_weights_anew_and_takes_other_sizes():
    weight = torch.nn.Parameter(tensor(4, 3))
    function = lambda x: (torch.tanh(x @ weight.T).sum(-1),)
    graph = Graph(function, [tensor(5, 3)], varying=[5])
    assert [t is weight for t in graph.constants] == [True]
    for rows in (1, 2, 17):
        x = tensor(rows, 3)
        torch.testing.assert_close(graph(x)[0], function(x)[0])
    with torch.no_grad():
        weight.mul_(-2.0)
    x = tensor(7, 3)
    torch.testing.assert_close(graph(x)[0], function(x)[0])


@pytest.mark.parametrize("kernels", [False, True])
def test_noise_is_fresh_and_that_of_the_seed(kernels):
    function = lambda x: (x + torch.randn_like(x),)
    x = tensor(6)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    graph = Graph(function, [x], varying=[6])
    assert torch.equal(torch.get_rng_state(), before)
    if kernels:
        graph.compile()
    torch.manual_seed(1)
    first, second = graph(x)[0], graph(x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(function(x)[0], first)


def test_what_is_not_a_number_is_found_by_kernels():
    """As `x != x`, which C++ may only take for false under settings that TorchInductor does not use."""
    x = torch.randn(50)
    x[[3, 20, 49]] = torch.tensor([math.nan, math.inf, -math.inf])
    graph = Graph(lambda x: (x.isnan(), x.isnan().any(), x.nan_to_num(0.5), x.isnan().sum()), [x])
    graph.compile()
    for value in (x, x[:40].repeat(2)[:50], torch.zeros(50)):
        for ours, theirs in zip(graph(value), graph.replay(value), strict=True):
            assert torch.equal(ours, theirs)


def test_what_cannot_be_a_graph_says_why():
    with pytest.raises(Untraceable, match="writes to its inputs"):
        Graph(lambda x: (x.add_(1.0),), [tensor(5, 3)], varying=[5])
    with pytest.raises(Untraceable, match="tracing failed"):
        Graph(lambda x: (x if x.sum() > 0 else -x,), [tensor(5, 3)], varying=[5])
    own = torch.Generator()
    with pytest.raises(Untraceable, match="reads a Generator"):
        Graph(lambda x: (x + torch.rand(3, generator=own, dtype=x.dtype),), [tensor(5, 3)], varying=[5])
    with pytest.raises(Untraceable, match="fixes a size"):
        Graph(lambda x: (x + torch.arange(int(x.shape[0])),), [tensor(5)], varying=[5])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_convolutions_of_rows_under_vmap(d, transposed):
    """Of any number of rows of any number of data, two images a row, and their gradient; equal to row by row."""
    convolution = getattr(torch.nn.functional, f"conv{'_transpose' if transposed else ''}{d}d")
    weight, bias = tensor(3, 3, *[3] * d), tensor(3)

    def row(z: Tensor) -> Tensor:
        return convolution(z, weight, bias, stride=2, padding=1).square().sum()

    def function(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        with VmapRules():
            value = torch.func.vmap(torch.func.vmap(row))(z)
        return value.detach(), *torch.autograd.grad(value.sum(), z)

    graph = Graph(function, [tensor(5, 7, 2, 3, *[4] * d)], varying=[5, 7])
    z = tensor(11, 2, 2, 3, *[4] * d).requires_grad_()
    value = torch.stack([torch.stack([row(one) for one in of_data]) for of_data in z])
    torch.testing.assert_close(graph(z), (value, *torch.autograd.grad(value.sum(), z)))


@pytest.mark.usefixtures("always_traced")
@pytest.mark.slow
def test_convolutional_networks_by_graph():
    family, image = DiagonalNormal(2), (5, 6)
    encoder = AmortizedGuide(Conv(image, family.param_dim, (family.param_dim,), channels=(3,)), family)
    vae = VAE(Normal(2), Bernoulli(image), Conv((2,), 30, (1, *image), channels=(3,)), encoder).double().eval()
    joint = LogJoint(vae.model, vae.guide, tensor(6, *image).sigmoid().round())
    assert_same(joint, tensor(4, 6, 2), ("guide", "grad"))
    assert not reasons(joint)
    assert None not in joint.graphs.used.values()


def test_a_loop_over_many_steps_is_too_long(monkeypatch):
    monkeypatch.setattr(compiled, "MAX_NODES", 50)

    def function(x: Tensor) -> tuple[Tensor]:
        for _ in range(100):
            x = torch.sin(x)
        return (x,)

    with pytest.raises(Untraceable, match="operations, more than 50"):
        Graph(function, [tensor(5)], varying=[5])


def test_without_a_compiler_graphs_are_replayed(monkeypatch):
    monkeypatch.setattr(compiled, "_has_compiler", lambda: False)
    graph = Graph(lambda x: (x.exp(),), [tensor(5)], varying=[5])
    with pytest.raises(Untraceable, match="no C\\+\\+ compiler"):
        graph.compile()
    x = tensor(9)
    assert torch.equal(graph(x)[0], x.exp())


def test_a_failed_check_leaves_the_graph_as_it_was():
    graph = Graph(lambda x: (x.exp(),), [tensor(5)], varying=[5])

    def check(graph: Graph) -> None:
        assert graph.compiled
        raise Untraceable("it differs")

    with pytest.raises(Untraceable, match="differs"):
        graph.compile(check)
    assert not graph.compiled


def test_outcomes_of_branches_are_replayed_in_order():
    with Branches() as branches:
        assert [bool(torch.tensor(value)) for value in (True, False, True)] == [True, False, True]
    with Branches(outcomes=branches.outcomes):
        assert [bool(torch.tensor(False)) for _ in range(3)] == [True, False, True]
        with pytest.raises(Untraceable, match="branches differently"):
            bool(torch.tensor(True))


def test_a_policy_has_three_words():
    with pytest.raises(ValueError, match="auto, always, never"), policy("perhaps"):
        pass


# -- graphs of programs -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("always_traced")
@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_by_graph(name):
    joint = PROBLEMS[name](7, 1).log_joint
    for draws in (1, 3):
        assert_same(joint, tensor(draws, joint.n_obs, joint.dim))
    assert_same(joint.subset(torch.tensor([4, 1])), tensor(3, 2, joint.dim))
    assert set(joint.graphs.used) == set(KINDS)
    said = reasons(joint)
    assert bool(said) == (name in EAGER)
    assert all(EAGER[name] in reason for reason in said.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_compiled(name):
    joint = PROBLEMS[name](7, 1).log_joint
    single = joint.converted(torch.float32)
    with policy("always"):
        z = tensor(3, 7, joint.dim)
        assert_same(joint, z)
        assert_same(joint.subset(torch.tensor([4, 1])), z[:, :2])
        if runs(single):
            assert_same(single, z.float(), ("leap",), 2e-4)
    assert bool(reasons(joint)) == (name in EAGER)
    assert all(isinstance(graph, Graph) for graph in (*joint.graphs.used.values(), *single.graphs.used.values()))


@pytest.mark.slow
@pytest.mark.usefixtures("always_traced")
@pytest.mark.parametrize("case", **by_name([case for case in CASES if case.line is not None or case.name == "realnvp"]))
def test_priors_by_graph(case):
    vae, data = vae_of(case), data_of(case, 6)
    vae.adapt(**data)
    joint = LogJoint(vae.model, vae.guide, **data)
    assert_same(joint, tensor(3, 6, joint.dim))


def pair():
    """A normal with a network between, its data plate not outermost and its data an argument by keyword."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()

    def model(x, weight):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z) * weight, 0.5).to_event(1), obs=x)

    def guide(x, weight):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2] * 0.3, 0.8).to_event(1))

    return net, model, guide


@pytest.mark.usefixtures("always_traced")
def test_data_and_weights_are_inputs_of_one_graph(caplog):
    net, model, guide = pair()
    first = LogJoint(model, guide, tensor(9, 3), weight=torch.tensor(1.0))
    z = tensor(4, 9, 2)
    assert_same(first, z, ("grad",))
    graph = first.graphs.used["grad"]
    with torch.no_grad():
        net[0].weight.mul_(3.0)
    assert_same(first, z, ("grad",))  # of the moment of its construction
    second = LogJoint(model, guide, tensor(5, 3), weight=torch.tensor(-2.0))
    assert_same(second, z[:, :5], ("grad",))
    assert second.graphs.used["grad"] == graph
    assert not torch.equal(first(z)[:, :5], second(z[:, :5]))
    net.load_state_dict({name: 2 * value for name, value in net.state_dict().items()}, assign=True)
    third = LogJoint(model, guide, tensor(5, 3), weight=torch.tensor(-2.0))
    assert_same(third, z[:, :5], ("grad",))
    assert third.graphs.used["grad"] != graph


@pytest.mark.usefixtures("always_traced")
def test_a_branch_on_data_is_followed_and_one_on_a_latent_is_not(caplog):
    def model(x, latent):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            tested = z if latent else x
            loc = 2 * z if bool((tested > -100).any()) else z
            missing = x.isnan()
            if bool(missing.any()):
                x, loc = x.nan_to_num(), loc * torch.where(missing, 0.0, 1.0)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x, latent):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x = tensor(6)
    whole, holes = (
        LogJoint(model, guide, x, latent=False),
        LogJoint(model, guide, x.clone().index_fill_(0, torch.tensor([2]), torch.nan), latent=False),
    )
    z = tensor(3, 6, 1)
    for joint in (whole, holes):
        assert_same(joint, z, ("joint",))
        assert not reasons(joint)
    assert whole.graphs.used["joint"] != holes.graphs.used["joint"]
    with caplog.at_level(logging.INFO, logger="elbowroom"):
        branching = LogJoint(model, guide, x, latent=True)
        assert_same(branching, z, ("joint",))
        assert_same(branching, z, ("joint",))
    assert "branches on a latent value" in reasons(branching)["joint"] or "one datum at a time" in reasons(branching)["joint"]
    said = [record.message for record in caplog.records if record.message.startswith("log p(x, z): evaluated")]
    assert len(said) == 1


@pytest.mark.usefixtures("always_traced")
@pytest.mark.parametrize(("kind", "change", "tolerance"), [(torch.float64, 1.5, 1e-12), (torch.float32, 1.00005, 1e-5)])
def test_what_a_program_reads_beside_tensors_is_a_constant_of_its_graph_alone(kind, change, tolerance):
    """A number in a variable changes by less than single precision tolerates; the graph of the data before is not taken."""
    constant = [1.0]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=kind), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(constant[0] * z, 0.1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.1).to_event(1))

    x, z = tensor(9, 2).to(kind), tensor(4, 9, 2).to(kind)
    graphs = []
    for value in (1.0, 1.0, change):
        constant[0] = value
        joint = LogJoint(model, guide, x, dtype=kind)
        assert_same(joint, z, ("joint", "grad"), tolerance=tolerance)
        graphs.append(joint.graphs.used["grad"])
    assert None not in graphs
    assert graphs[0] == graphs[1] != graphs[2]


@pytest.mark.usefixtures("always_traced")
def test_a_graph_that_differs_is_not_used(monkeypatch):
    _, model, guide = pair()
    joint = LogJoint(model, guide, tensor(9, 3), weight=torch.tensor(1.0))
    honest = Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda self, *inputs: tuple(1.001 * t for t in honest(self, *inputs)))
    z = tensor(4, 9, 2)
    with policy("never"):
        plain = joint(z)
    assert torch.equal(joint(z), plain)
    assert "differs by" in reasons(joint)["joint"]


@pytest.mark.usefixtures("always_traced")
@pytest.mark.parametrize("planted", ["drift", "root", "kick", "infinite"])
def test_the_comparison_of_a_leapfrog_sees_every_part_of_it(monkeypatch, planted):
    def wrong(target, z, momentum, size, root, kick):
        factor = 0.0 if planted == "drift" else 1.0
        root = root.mT if planted == "root" else root
        moved, momentum, value, gradient = leap(target, z, factor * momentum, size, root, kick * (1 + (planted == "kick")))
        return moved, momentum, value - (torch.inf if planted == "infinite" else 0.0), gradient

    joint = PROBLEMS["correlated"](3, 2).log_joint

    def plainly(joint, kind, z):
        momentum, size, root, kick = leapfrog_arguments(kind, z)
        return leap(partial(PlainLogJoint.grad, joint), z, momentum, size, root[0], kick)

    monkeypatch.setattr(traced, "_plainly", plainly)
    monkeypatch.setattr(tracing, "leap", wrong)  # which is what is traced
    assert joint.graphs.ready(joint, "leap") is None
    assert "graph" in joint.graphs.reasons["leap"]


@pytest.mark.usefixtures("always_traced")
@pytest.mark.slow
def test_what_other_data_did_before_changes_nothing(monkeypatch):
    """Kernels that large data had made are not used by small ones, whose own work would not repay them."""
    _, model, guide = pair()
    large, small = (LogJoint(model, guide, tensor(n, 3), weight=torch.tensor(1.0)) for n in (9, 5))
    with policy("always"):
        large.grad(tensor(2, 9, 2))
    kernel = large.graphs.used["grad"]
    assert isinstance(kernel, Graph)
    small.grad(tensor(2, 5, 2))
    assert small.graphs.used["grad"] == kernel.replay


def test_auto_decides_by_the_work_ahead_alone(monkeypatch):
    _, model, guide = pair()
    joint = LogJoint(model, guide, tensor(9, 3), weight=torch.tensor(1.0))
    z = tensor(4, 9, 2)
    joint(z)
    assert joint.graphs.used == {"joint": None}
    ahead = traced.work_ahead(joint, "joint", 10**7)
    evaluations = 10**7 * traced.EVALUATIONS["joint"]
    products = evaluations * (2 * 2 * 8 + 2 * 8 * 3) / traced.FLOPS  # two per row
    tens = evaluations * traced.ELEMENT * 10  # numbers of other operations: some tens per row
    assert products + tens < ahead < products + 20 * tens
    monkeypatch.setattr(traced, "COMPILE", float("inf"))
    with expecting(10**7):
        joint(z)
    assert joint.graphs.used["joint"] is not None
    with policy("never"), expecting(10**7):
        joint.grad(z)
    assert set(joint.graphs.used) == {"joint"}
    with at_most(200), at_most(1000):
        assert traced.work_ahead(joint, "joint", 10**7) == pytest.approx(200 / traced.EVALUATIONS["joint"] * ahead)
    with expecting(10**7), at_most(1):
        joint(z)
    assert joint.graphs.used["joint"] is None


@pytest.mark.slow
def test_chains_by_compiled_leapfrogs_sample_the_posterior():
    """Against the closed form, each mean in its own Monte Carlo errors; and the same seed gives the same draws."""
    problem = PROBLEMS["correlated"](3, 5)
    with policy("always"):
        found, again = (HMC(draws=200)(problem.log_joint, keep=400, seed=seed) for seed in (11, 11))
    assert problem.log_joint.graphs.used  # graphs were used
    assert torch.equal(found.draws, again.draws)
    mean, covariance = found.moments()
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    error = (mean - problem.mean).abs() / (sd / found.stats["ess_bulk_min"].sqrt()[:, None])
    assert float(error.max()) < 4.5
    assert all(status == "certified" for status in found.status)


def test_a_leapfrog_is_that_of_the_gradient():
    joint = PROBLEMS["mlp_bernoulli"](4, 2).log_joint
    z, momentum = tensor(3, 4, 2), tensor(3, 4, 2)
    root, size, kick = (
        torch.eye(2, dtype=z.dtype).expand(4, 2, 2) * 0.7,
        torch.full((3, 4, 1), 0.2, dtype=z.dtype),
        torch.tensor(0.5).double(),
    )
    moved = z + 0.2 * 0.7 * momentum
    value, gradient = joint.grad(moved)
    for found in (leap(joint.grad, z, momentum, size, root, kick), joint.leap(z, momentum, size, root, kick)):
        for ours, theirs in zip(found, (moved, momentum + 0.5 * 0.2 * 0.7 * gradient, value, gradient), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
def test_graphs_on_a_gpu():
    net, model, guide = pair()
    net.cuda()

    def on_gpu(program):
        def run(x, weight):
            with torch.device("cuda"):
                program(x, weight)

        return run

    joint = LogJoint(on_gpu(model), on_gpu(guide), tensor(9, 3).cuda(), weight=torch.tensor(1.0, device="cuda"))
    with policy("always"):
        z = tensor(4, 9, 2).cuda()
        with policy("never"):
            plain = joint.grad(z)
        for ours, theirs in zip(joint.grad(z), plain, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert isinstance(joint.graphs.used["grad"], Graph)
