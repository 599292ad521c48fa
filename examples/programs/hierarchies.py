"""Programs with effects of groups: nested, shared, crossed."""

from __future__ import annotations

from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from examples.programs.catalogue import Pair, draws, over_line, program, trained

SUCCESSES = torch.tensor([3.0, 0.0, 7.0, 10.0, 5.0, 2.0])
TRIALS = torch.tensor([10.0, 4.0, 12.0, 11.0, 20.0, 9.0])


@program("rates of batters: beta and binomial", "Pyro, examples/baseball")
def baseball() -> Pair:
    def model(y: Tensor, n: Tensor) -> None:
        with pyro.plate("batters", len(y)):
            rate = pyro.sample("rate", dist.Beta(2.0, 5.0))
            pyro.sample("y", dist.Binomial(n, rate), obs=y)

    def guide(y: Tensor, n: Tensor) -> None:
        with pyro.plate("batters", len(y)):
            pyro.sample("rate", dist.Beta(2.0 + y, 5.0 + n - y))

    def evidence() -> Tensor:
        return dist.BetaBinomial(2.0, 5.0, TRIALS.double()).log_prob(SUCCESSES.double())

    return Pair(model, guide, (SUCCESSES, TRIALS), evidence=evidence)


@program("log-normal frailties of Poisson counts", "Poisson log-normal, Aitchison and Ho 1989")
def frailty() -> Pair:
    y = torch.tensor([[0.0, 3], [2, 2], [9, 14], [1, 0], [4, 6]])

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
            with pyro.plate("columns", 2, dim=-1):
                u = pyro.sample("u", dist.Normal(z, 0.5))
                pyro.sample("y", dist.Poisson(u.exp()), obs=y)

    guide = AutoNormal(model)
    trained(model, guide, (y,))
    return Pair(model, guide, (y,), {"plate": "rows"})


@program("shared centre and spread, held at the guide's median", "Pyro, tutorial Bayesian hierarchical models")
def shared() -> Pair:
    x = draws(8, 3, seed=7) + 1.0

    def model(x: Tensor) -> None:
        centre = pyro.sample("centre", dist.Normal(0.0, 5.0))
        spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", len(x)):
            mean = pyro.sample("mean", dist.Normal(centre, spread))
            pyro.sample("x", dist.Normal(mean[:, None].expand(-1, 3), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("centre", dist.Normal(torch.tensor(1.0), 0.3))
        pyro.sample("spread", dist.LogNormal(torch.tensor(-0.5), 0.4))
        with pyro.plate("groups", len(x)):
            pyro.sample("mean", dist.Normal(0.5 + 0.5 * x.mean(1), 0.4))

    def evidence() -> Tensor:
        spread = torch.tensor(-0.5).double().exp()
        cov = spread.square() * torch.ones(3, 3).double() + torch.eye(3).double()
        return dist.MultivariateNormal(torch.ones(3).double(), cov).log_prob(x.double())

    return Pair(model, guide, (x,), evidence=evidence)


ANSWERS = (draws(12, 5, seed=8) + torch.linspace(-1, 1, 5) > 0).float()


def items(y: Tensor) -> None:
    """Abilities of persons and difficulties of items."""
    of_item, of_person = pyro.plate("items", y.shape[1], dim=-1), pyro.plate("persons", len(y), dim=-2)
    with of_item:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
    with of_person:
        ability = pyro.sample("ability", dist.Normal(torch.zeros(1), 1.0))
        with of_item:
            pyro.sample("y", dist.Bernoulli(logits=ability - difficulty), obs=y)


def of_items(y: Tensor) -> None:
    """Normals around sums of answers."""
    with pyro.plate("items", y.shape[1], dim=-1):
        pyro.sample("difficulty", dist.Normal(-1.5 * (y.mean(0) - 0.5), 0.5))
    with pyro.plate("persons", len(y), dim=-2):
        pyro.sample("ability", dist.Normal(1.5 * (y.mean(1, keepdim=True) - 0.5), 0.7))


def of_persons() -> Tensor:
    """log p of each person's answers at the difficulties that are held."""
    difficulty = (-1.5 * (ANSWERS.mean(0) - 0.5)).double()

    def log_p(z: Tensor) -> Tensor:
        each = dist.Bernoulli(logits=z[:, None, None] - difficulty).log_prob(ANSWERS.double()).sum(-1)
        return dist.Normal(0.0, 1.0).log_prob(z)[:, None] + each

    return over_line(log_p)


@program("item response: persons, given the items", "Pyro, examples on item response (1PL)")
def persons() -> Pair:
    return Pair(items, of_items, (ANSWERS,), {"hold": ["items"]}, of_persons)


@program("item response: items, given the persons", "Pyro, examples on item response (1PL)")
def by_item() -> Pair:
    return Pair(items, of_items, (ANSWERS,), {"hold": ["persons"]})


@program("item response, crossed, with nothing held", "Pyro, examples on item response (1PL)", r"hold=\[", persons)
def crossed() -> Pair:
    return Pair(items, of_items, (ANSWERS,))


@program("probabilistic matrix factorisation: users, given the films", "Salakhutdinov and Mnih 2008")
def films() -> Pair:
    ratings = draws(7, 5, seed=9)

    def model(r: Tensor) -> None:
        of_film = pyro.plate("films", r.shape[1], dim=-1)
        with of_film:
            v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("users", len(r), dim=-2):
            u = pyro.sample("u", dist.Normal(torch.zeros(1, 2), 1.0).to_event(1))
            with of_film:
                pyro.sample("r", dist.Normal((u * v).sum(-1), 0.5), obs=r)

    def guide(r: Tensor) -> None:
        with pyro.plate("films", r.shape[1], dim=-1):
            loc = pyro.param("v_loc", 0.5 * draws(r.shape[1], 2, seed=1))
            pyro.sample("v", dist.Normal(loc, 0.3).to_event(1))
        with pyro.plate("users", len(r), dim=-2):
            loc = pyro.param("u_loc", 0.5 * draws(len(r), 1, 2, seed=2))
            pyro.sample("u", dist.Normal(loc, 0.4).to_event(1))

    trained(model, guide, (ratings,))

    def evidence() -> Tensor:
        v = pyro.param("v_loc").detach().double()
        cov = v @ v.T + 0.25 * torch.eye(len(v)).double()
        return dist.MultivariateNormal(torch.zeros(len(v)).double(), cov).log_prob(ratings.double())

    return Pair(model, guide, (ratings,), {"hold": ["films"]}, evidence)


@program("pupils in schools: the inner plate's effects are the school's coordinates", "Pyro, tutorial Tensor shapes")
def pupils() -> Pair:
    y = draws(4, 3, 5, seed=10)

    def model(y: Tensor) -> None:
        with pyro.plate("schools", len(y), dim=-3):
            school = pyro.sample("school", dist.Normal(torch.zeros(1, 1), 1.0))
            with pyro.plate("classes", y.shape[1], dim=-2):
                effect = pyro.sample("effect", dist.Normal(school, 0.5))
                with pyro.plate("pupils", y.shape[2], dim=-1):
                    pyro.sample("y", dist.Normal(effect, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        of_class = y.mean(2, keepdim=True)
        with pyro.plate("schools", len(y), dim=-3):
            school = pyro.sample("school", dist.Normal(0.7 * of_class.mean(1, keepdim=True), 0.4))
            with pyro.plate("classes", y.shape[1], dim=-2):
                pyro.sample("effect", dist.Normal(0.5 * (of_class + school), 0.3))

    def evidence() -> Tensor:
        same = torch.ones(5, 5).double()
        cov = torch.ones(15, 15).double() + torch.block_diag(*[0.25 * same] * 3) + torch.eye(15).double()
        return dist.MultivariateNormal(torch.zeros(15).double(), cov).log_prob(y.reshape(4, 15).double())

    return Pair(model, guide, (y,), {"plate": "schools"}, evidence)


def first_rows() -> Pair:
    """The cure of the next one."""
    return replace(two_plates(), options={"plate": "rows_a"})


@program("two plates that each hold observed sites and latents", "two data sets in one program", "plate=", first_rows)
def two_plates() -> Pair:
    a, b = draws(5), draws(4, seed=1)

    def model(a: Tensor, b: Tensor) -> None:
        for name, x in (("a", a), ("b", b)):
            with pyro.plate(f"rows_{name}", len(x)):
                z = pyro.sample(f"z_{name}", dist.Normal(torch.zeros(len(x)), 1.0))
                pyro.sample(f"x_{name}", dist.Normal(z, 1.0), obs=x)

    def guide(a: Tensor, b: Tensor) -> None:
        for name, x in (("a", a), ("b", b)):
            with pyro.plate(f"rows_{name}", len(x)):
                pyro.sample(f"z_{name}", dist.Normal(x / 2, 0.8))

    return Pair(model, guide, (a, b))
