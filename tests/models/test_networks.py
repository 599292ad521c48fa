"""Networks: shapes under any leading dimensions, what joins the input of an encoder, and whole VAEs over them."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import nn

from elbowroom.inference.fit.svi import Step
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.likelihoods.binary import Bernoulli
from elbowroom.models.networks.base import Network
from elbowroom.models.networks.convolution import Conv
from elbowroom.models.networks.mlp import MLP, BatchNorm, Linear, Residual
from elbowroom.models.networks.recurrent import GRU, Cell
from elbowroom.models.networks.stepwise import Stepwise
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE


def conv_encoder(shape, **options):
    return lambda: Conv(shape, 4, (4,), **{"channels": (3, 5), **options})


def conv_decoder(out_shape, **options):
    return lambda: Conv((3,), math.prod(out_shape), out_shape, **{"channels": (3, 5), **options})


def gru_encoder(shape, marks=False, **options):
    return lambda: GRU(shape, 4, (4,), marks, **{"hidden": 6, **options})


def gru_decoder(out_shape, **options):
    return lambda: GRU((3,), math.prod(out_shape), out_shape, False, **{"hidden": 6, **options})


BUILDS = {
    "linear": lambda: Linear((3, 2), 4),
    "mlp": lambda: MLP((3, 2), 4, hidden=(5, 5)),
    "mlp no hidden": lambda: MLP((3, 2), 4, hidden=()),
    "mlp residual": lambda: MLP((3, 2), 4, hidden=(5, 5, 5), residual=True),
    "mlp layer": lambda: MLP((3, 2), 4, hidden=(5, 5), norm="layer"),
    "mlp batch": lambda: MLP((3, 2), 4, hidden=(5, 5), norm="batch"),
    "mlp all": lambda: MLP((3, 2), 4, hidden=(5, 5), residual=True, norm="batch", dropout=0.5),
    "conv 8x8": conv_encoder((8, 8)),
    "conv 3x7x5": conv_encoder((3, 7, 5), kernel=5),
    "conv 1x1": conv_encoder((1, 1)),
    "conv to 2x8x8": conv_decoder((2, 8, 8)),
    "conv to 2x3x7x5": conv_decoder((2, 3, 7, 5), kernel=5),
    "conv to 1x1x1": conv_decoder((1, 1, 1)),
    "gru": gru_encoder((7, 2)),
    "gru marks": gru_encoder((7, 5), marks=True),
    "gru deep both ways": gru_encoder((7, 5), marks=True, layers=2, bidirectional=True),
    "gru every step": lambda: GRU((7, 5), 14, (7, 2), True, hidden=6),
    "gru every step both ways": lambda: GRU((7, 2), 14, (7, 2), False, hidden=6, layers=2, bidirectional=True),
    "stepwise to 2x7x3": lambda: Stepwise((16,), 42, (2, 7, 3), 14, hidden=(5,)),
    "stepwise affine": lambda: Stepwise((4,), 8, (1, 4, 2), 4, hidden=()),
    "gru to 2x7x2": gru_decoder((2, 7, 2)),
    "gru deep to 1x7x3": gru_decoder((1, 7, 3), layers=2),
}


@pytest.fixture(params=BUILDS.values(), ids=BUILDS)
def network(request):
    return request.param()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lead", [(), (6,), (1,), (2, 3), (4, 1), (0,), (2, 1, 3)])
def test_any_leading_dimensions(network, lead, dtype):
    network = network.to(dtype).eval()
    x = torch.randn(*lead, *network.in_shape, dtype=dtype)
    y = network(x)
    assert y.shape == (*lead, network.out_dim)
    assert y.dtype == dtype
    one_by_one = [network(datum) for datum in x.reshape(-1, *network.in_shape)] if x.numel() else []
    for row, alone in zip(y.reshape(-1, network.out_dim), one_by_one, strict=True):
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
    assert network.train()(x).shape == y.shape or not x.numel()


def test_under_vmap_as_without(network):
    network = network.double().eval()
    x = torch.randn(3, 5, *network.in_shape, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(network)(x), network(x))


def test_a_gradient_reaches_every_parameter(network):
    network(torch.rand(6, *network.in_shape)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        if parameter.grad.abs().max() <= 1e-6:  # batch norm takes away the bias before it
            assert name.endswith("bias"), name
            assert any(isinstance(module, BatchNorm) for module in network.modules()), name


def test_copies_and_saved_weights_give_the_same(network):
    x = torch.rand(6, *network.in_shape)
    network(x)  # in train mode: running averages are part of what is kept
    network.eval()
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        nn.init.ones_(parameter)
    assert not torch.equal(other(x), network(x))
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), network(x))


# mlp


def test_the_plain_mlp_keeps_its_layers_and_initial_weights():
    torch.manual_seed(3)
    network = MLP((3, 2), 4, hidden=(5, 5), activation="tanh")
    torch.manual_seed(3)
    by_hand = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4))
    assert list(network.body.state_dict()) == list(by_hand.state_dict())
    x = torch.randn(7, 3, 2)
    assert torch.equal(network(x), by_hand(x.flatten(1)))


def test_residual_adds_where_neighbours_are_as_wide():
    network = MLP((5,), 2, hidden=(5, 5, 4), residual=True)
    blocks = [type(module) for module in network.body]
    assert blocks == [nn.Linear, nn.SiLU, Residual, nn.Linear, nn.SiLU, nn.Linear]
    x = torch.randn(3, 5)
    h = nn.functional.silu(network.body[0](x))
    torch.testing.assert_close(network.body[2](h), h + nn.functional.silu(network.body[2][0](h)))


def test_layer_norm_standardises_each_datum():
    network = MLP((2,), 3, hidden=(50,), norm="layer")
    h = network.body[:2](torch.randn(4, 2))
    torch.testing.assert_close(h.mean(-1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(h.std(-1, correction=0), torch.ones(4), atol=1e-2, rtol=0)


def test_batch_norm_standardises_over_all_leading_dimensions_in_training():
    network = MLP((2,), 3, hidden=(6,), norm="batch")
    h = network.body[:2](torch.randn(4, 50, 2))
    torch.testing.assert_close(h.mean((0, 1)), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(h.flatten(0, 1).std(0, correction=0), torch.ones(6), atol=1e-2, rtol=0)
    assert int(network.body[1].num_batches_tracked) == 1
    before = network.body[1].running_mean.clone()
    alone = network(torch.randn(2))  # a batch of one, in train mode
    assert torch.equal(network.body[1].running_mean, before)
    assert bool(alone.isfinite().all())


def test_dropout_is_random_in_training_and_off_in_evaluation():
    network = MLP((2,), 3, hidden=(64,), dropout=0.5)
    x = torch.randn(4, 2)
    assert not torch.equal(network(x), network(x))
    dropped = (network.body[:3](torch.randn(200, 2)) == 0).float().mean()
    assert abs(float(dropped) - 0.5) < 0.05
    network.eval()
    assert torch.equal(network(x), network(x))


# what a network refuses

REFUSALS = [
    (
        lambda: MLP((3,), 2, hidden=(4, 5), residual=True),
        "residual: no hidden layer of [4, 5] is as wide as the one before it; give neighbours the same width, or leave it out",
    ),
    (lambda: MLP((3,), 2, hidden=(), norm="layer"), "norm: there is no hidden layer for it; give widths in hidden"),
    (lambda: MLP((3,), 2, hidden=(), dropout=0.1), "dropout: there is no hidden layer for it; give widths in hidden"),
    (
        lambda: Conv((3,), 2, (2,)),
        "conv is for images, (H, W) or (C, H, W), and this network reads (3,): reshape the data to images, or use mlp",
    ),
    (lambda: Conv((2,), 6, (2, 3)), "and this network makes (3,): reshape the data to images, or use mlp"),
    (lambda: Conv((2, 3, 4, 5), 6, (6,)), "and this network reads (2, 3, 4, 5): reshape the data to images"),
    (lambda: Conv((8, 8), 6, (6,), kernel=4), "kernel: must be odd and at least 3, so that it has a centre, got 4; use 3 or 5"),
    (lambda: Conv((8, 8), 6, (6,), channels=()), "channels: at least one number of channels"),
    (
        lambda: GRU((3,), 2, (2,), False),
        "gru is for sequences, (T, F), and this network reads (3,): reshape the data to sequences (one number per step is "
        "(T, 1)), or use mlp",
    ),
    (lambda: GRU((3, 4, 5), 6, (6,), False), "gru is for sequences, (T, F), and this network reads (3, 4, 5)"),
    (lambda: GRU((2,), 6, (2, 1, 1, 3), False), "gru is for sequences, (T, F), and this network makes (1, 1, 3)"),
    (lambda: GRU((2,), 6, (2, 3), False), "gru is for sequences, (T, F), and this network makes (3,)"),
    (lambda: GRU((2,), 6, (1, 3, 2), False, bidirectional=True), "bidirectional: is for encoders"),
]


@pytest.mark.parametrize(("build", "message"), REFUSALS)
def test_what_cannot_work_is_refused_with_the_remedy(build, message):
    with pytest.raises(ValueError) as caught:
        build()
    assert message in str(caught.value)


# what joins the input

JOINED = [
    (Linear, (3, 2), (14,)),
    (Conv, (5, 4), (4, 5, 4)),
    (Conv, (3, 5, 4), (8, 5, 4)),
    (GRU, (6, 3), (6, 9)),
]


@pytest.mark.parametrize(("cls", "shape", "joined"), JOINED)
@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("width", [0, 2])
def test_marks_and_covariates_join_as_the_shape_says(cls, shape, joined, marks, width):
    in_shape = cls.joined_shape(shape, marks=marks, covariates=width)
    if marks and width:
        assert in_shape == joined
    facts = (in_shape, 4) if cls is Linear else (in_shape, 4, (4,), marks)[: 4 if cls is GRU else 3]
    network = cls(*facts)
    guide = AmortizedGuide(network, DiagonalNormal(2), marks=marks)
    x = torch.randn(5, *shape)
    x[0, -1] = torch.nan
    x[1] = torch.nan
    covariates = torch.randn(5, width) if width else None
    params = guide.params(x, covariates)
    assert params.shape == (5, 4)
    assert bool(params.isfinite().all())
    zeros = torch.where(x.isnan(), 0.0, x)
    assert torch.equal(guide.params(zeros, covariates), params) is not marks  # marks are what tells a hole from a zero
    if width:
        moved = (guide.params(x, covariates + 1) - params).abs().amax(-1)
        assert bool((moved > 1e-6).all())


@pytest.mark.parametrize(("cls", "shape"), [(Conv, (5,)), (GRU, (5,)), (GRU, (3, 5, 4))])
def test_a_refusal_names_the_shape_of_the_data(cls, shape):
    in_shape = cls.joined_shape(shape, marks=True, covariates=2)
    with pytest.raises(ValueError, match=re.escape(f"this network reads {shape}")):
        cls(*(in_shape, 4, (4,), True)[: 4 if cls is GRU else 3])


def test_an_image_gets_its_marks_and_covariates_as_channels():
    network = Conv((8, 2, 3), 4, (4,))
    x, seen, covariates = torch.randn(5, 3, 2, 3), torch.ones(5, 3, 2, 3), torch.randn(5, 2)
    joined = network.join(x, seen, covariates)
    assert joined.shape == (5, 8, 2, 3)
    assert torch.equal(joined[:, :3], x)
    assert torch.equal(joined[:, 3:6], seen)
    assert torch.equal(joined[:, 6:], covariates[:, :, None, None].expand(-1, -1, 2, 3))


def test_a_step_gets_its_marks_the_covariates_and_whether_it_counts():
    network = GRU((4, 7), 4, (4,), True)
    x, covariates = torch.randn(3, 4, 2), torch.randn(3, 2)
    seen = torch.ones(3, 4, 2)
    seen[0, 2:] = 0  # two steps
    seen[1, 1] = 0  # a hole in the middle is no end
    seen[1, 3, 0] = 0
    seen[2] = 0  # nothing at all
    joined = network.join(x, seen, covariates)
    assert torch.equal(joined[..., :2], x)
    assert torch.equal(joined[..., 2:4], seen)
    assert torch.equal(joined[..., 4:6], covariates[:, None].expand(-1, 4, -1))
    assert joined[..., 6].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


class Own(nn.Module):
    """A user's network: nothing but a constructor of (in_shape, out_dim) and forward."""

    def __init__(self, in_shape, out_dim):
        super().__init__()
        self.layer = nn.Linear(math.prod(in_shape), out_dim)
        self.n = len(in_shape)

    def forward(self, x):
        return self.layer(x.flatten(-self.n)).tanh()


def test_a_plain_module_is_an_encoder_and_a_decoder():
    shape = Network.joined_shape((3, 2), marks=True, covariates=2)
    q = DiagonalNormal(2)
    vae = VAE(
        Normal(2), Bernoulli((3, 2)), Own((4,), 6), AmortizedGuide(Own(shape, 4), q, marks=True), covariate_dim=2
    ).double()
    x, covariates = holes(torch.bernoulli(torch.full((5, 3, 2), 0.5, dtype=torch.float64)), 0.3), torch.randn(5, 2).double()
    zeros = torch.where(x.isnan(), 0.0, x)
    joined = torch.cat([zeros.flatten(1), (~x.isnan()).double().flatten(1), covariates], 1)
    torch.testing.assert_close(vae.posterior.params(x, covariates), vae.posterior.encoder(joined))
    agree(vae, x, covariates=covariates)


# gru


def test_a_cell_is_that_of_torch():
    theirs = nn.GRU(3, 5).double()
    mine = Cell(3, 5).double()
    mine.given.weight, mine.given.bias = theirs.weight_ih_l0, theirs.bias_ih_l0
    mine.recurrent.weight, mine.recurrent.bias = theirs.weight_hh_l0, theirs.bias_hh_l0
    x, h = torch.randn(7, 4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    states = torch.stack(mine.unrolled(mine.given(x).unbind(0), h))
    torch.testing.assert_close(states, theirs(x, h[None])[0])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_an_encoder_of_sequences_does_not_see_their_padding(layers, bidirectional):
    def encoder(steps):
        shape = GRU.joined_shape((steps, 2), marks=True, covariates=1)
        network = GRU(shape, 4, (4,), True, hidden=6, layers=layers, bidirectional=bidirectional)
        return AmortizedGuide(network, DiagonalNormal(2), marks=True).double()

    short, long = encoder(5), encoder(9)
    long.load_state_dict(short.state_dict())
    x = torch.randn(4, 5, 2, dtype=torch.float64)
    x[1, 3:] = torch.nan
    x[2, 1] = torch.nan  # a hole within
    x[3] = torch.nan
    covariates = torch.randn(4, 1, dtype=torch.float64)
    padded = torch.cat([x, torch.full((4, 4, 2), torch.nan, dtype=torch.float64)], 1)
    params = short.params(x, covariates)
    torch.testing.assert_close(long.params(padded, covariates), params, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(short.params(x, covariates + 1)[3], params[3])  # nothing seen but the covariates
    padded[0, 7] = 1.0  # a step after the end moves the end
    assert not torch.allclose(long.params(padded, covariates)[0], params[0])
    alone = long.params(padded[1:2], covariates[1:2])[0]
    torch.testing.assert_close(long.params(padded, covariates)[1], alone)


def test_both_ways_read_from_the_true_end():
    network = GRU((6, 5), 4, (4,), True, hidden=6, bidirectional=True).double().eval()
    x = torch.randn(1, 6, 2, dtype=torch.float64)
    seen = torch.ones_like(x)
    seen[:, 4:] = 0
    theirs = nn.GRU(4, 6, bidirectional=True).double()
    ways = ((network.body.forwards[0], "l0"), (network.body.backwards[0], "l0_reverse"))
    with torch.no_grad():
        for cell, name in ways:
            for mine, part in ((cell.given, "ih"), (cell.recurrent, "hh")):
                getattr(theirs, f"weight_{part}_{name}").copy_(mine.weight)
                getattr(theirs, f"bias_{part}_{name}").copy_(mine.bias)
        last = theirs(torch.cat([x, seen], -1)[0, :4])[1].flatten()
        torch.testing.assert_close(network(network.join(x, seen, None))[0], network.body.head(last))


# whole models


def holes(x, share):
    """Return x with a share of its entries missing."""
    return torch.where(torch.rand_like(x) < share, torch.nan, x)


def by_hand(vae, x, z, c=None):
    """Return log p(x_n, z_n) of a Bernoulli VAE, with the missing entries left out."""
    logits = vae.decoder(z if c is None else torch.cat([z, c], -1)).reshape(x.shape)
    entries = torch.where(x.isnan(), 0.0, x.nan_to_num() * logits - nn.functional.softplus(logits))
    return entries.flatten(1).sum(-1) - 0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)


def agree(vae, x, **beside):
    """Check log p(x, z) against the formula by hand; it finds the VAE in train mode and leaves it so."""
    vae.train()
    state = copy.deepcopy(vae.state_dict())
    log_joint = LogJoint(vae.model, vae.guide, x, **beside)
    z = torch.randn(3, len(x), log_joint.dim, dtype=torch.float64)
    values, shared = log_joint(z), log_joint.shared(z[:, 0])
    _, log_q = log_joint.sample_guide(2, seed=0)
    assert bool(log_q.isfinite().all())
    assert all(module.training for module in vae.modules())
    assert all(torch.equal(value, state[name]) for name, value in vae.state_dict().items())
    vae.eval()
    with torch.no_grad():
        for s in range(3):
            torch.testing.assert_close(values[s], by_hand(vae, x, z[s], beside.get("covariates")))
            same = z[s, :1].expand(len(x), -1)
            torch.testing.assert_close(shared[s], by_hand(vae, x, same, beside.get("covariates")))
    vae.train()
    return log_joint


def improves(vae, x, **beside):
    """Take 30 steps and check that the loss falls and that every parameter moved."""
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    step = Step(vae, size=len(x), learning_rate=1e-2)
    losses = [step(x, **beside)[0] for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
    assert not [name for name, p in vae.named_parameters() if torch.equal(p, before[name])]


def stripes(n, shape):
    """Binary data that one latent explains: bands whose place differs from datum to datum."""
    phase = torch.rand(n, *[1] * len(shape), dtype=torch.float64)
    along = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape) / math.prod(shape)
    return torch.bernoulli(torch.sigmoid(6 * torch.sin(2 * math.pi * (2 * along + phase))))


@pytest.mark.parametrize("width", [0, 2])
def test_a_vae_of_convolutions(width):
    x = holes(stripes(12, (8, 8)), 0.1)
    q = DiagonalNormal(2)
    shape = Conv.joined_shape((8, 8), marks=True, covariates=width)
    encoder = Conv(shape, 4, (4,), channels=(4, 6))
    decoder = Conv((2 + width,), 64, (1, 8, 8), channels=(4, 6))
    vae = VAE(Normal(2), Bernoulli((8, 8)), decoder, AmortizedGuide(encoder, q, marks=True), covariate_dim=width).double()
    beside = {"covariates": torch.randn(12, width, dtype=torch.float64)} if width else {}
    log_joint = agree(vae, x, **beside)
    assert log_joint.mode == "vmap", log_joint.notes
    improves(vae, x, **beside)


@pytest.mark.parametrize("width", [0, 2])
def test_a_vae_of_sequences_of_varied_length(width):
    x = stripes(12, (12, 5))
    for n, length in enumerate([12, 1, 3, 7, 12, 5, 9, 2, 11, 4, 8, 6]):
        x[n, length:] = torch.nan
    q = DiagonalNormal(2)
    shape = GRU.joined_shape((12, 5), marks=True, covariates=width)
    encoder = GRU(shape, 4, (4,), True, hidden=8)
    decoder = GRU((2 + width,), 60, (1, 12, 5), False, hidden=8)
    vae = VAE(Normal(2), Bernoulli((12, 5)), decoder, AmortizedGuide(encoder, q, marks=True), covariate_dim=width).double()
    beside = {"covariates": torch.randn(12, width, dtype=torch.float64)} if width else {}
    log_joint = agree(vae, x, **beside)
    assert log_joint.mode == "vmap", log_joint.notes
    improves(vae, x, **beside)


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"dropout": 0.5}, {"norm": "layer", "residual": True}])
def test_the_seam_sees_networks_in_eval_mode_and_puts_the_mode_back(options):
    x = stripes(12, (6,))
    q = DiagonalNormal(2)
    encoder, decoder = MLP((6,), 4, hidden=(8, 8), **options), MLP((2,), 6, hidden=(8, 8), **options)
    vae = VAE(Normal(2), Bernoulli((6,)), decoder, AmortizedGuide(encoder, q)).double()
    step = Step(vae, size=len(x), learning_rate=1e-2)
    for _ in range(3):  # running averages that are not the initial ones
        step(x)
    log_joint = agree(vae, x)
    assert log_joint.mode == "vmap", log_joint.notes
    z = torch.randn(2, 12, 2, dtype=torch.float64)
    assert torch.equal(log_joint(z), log_joint(z))
