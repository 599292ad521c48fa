"""Programs whose evidence, posterior and gradients are closed forms, and every objective."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from elbowroom.inference.objectives.bounds import IWAE, Beta, DReG, Renyi, StickingTheLanding
from elbowroom.inference.objectives.elbo import ELBO, MeanFieldELBO
from elbowroom.inference.objectives.wake_sleep import WakeSleep
from elbowroom.models.linear_gaussian import LinearGaussian

DOUBLE = {"dtype": torch.float64}
COPIES = 10  # of the data, drawn for at once: a call costs the same
X = torch.tensor([-1.5, 0.2, 0.9, 2.5], **DOUBLE)
BOUNDS = [ELBO(), IWAE(particles=5), Renyi(alpha=0.4, particles=5), StickingTheLanding(), DReG(particles=5), Beta(beta=1.0)]
ALL = [*BOUNDS, MeanFieldELBO(), Beta(beta=3.0, free_bits=0.1), WakeSleep(), WakeSleep(particles=4)]


class Line:
    """z ~ N(0, 1), x|z ~ N(a z, s2): guide N(b x + c, exp(r)^2); the leaves are a, b, c, r."""

    s2 = 0.5

    def __init__(self, a: float = 0.8, b: float = 0.3, c: float = 0.1, r: float = -0.3) -> None:
        self.leaves = [torch.tensor(value, requires_grad=True, **DOUBLE) for value in (a, b, c, r)]

    @classmethod
    def exact(cls, a: float = 0.8) -> Line:
        variance = 1 / (1 + a * a / cls.s2)
        return cls(a, variance * a / cls.s2, 0.0, 0.5 * math.log(variance))

    def model(self, x: Tensor, size: int | None = None) -> None:
        with self.plate(x, size):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(self.leaves[0] * z, self.s2**0.5), obs=x)

    def guide(self, x: Tensor, size: int | None = None) -> None:
        _, b, c, r = self.leaves
        with self.plate(x, size):
            pyro.sample("z", dist.Normal(b * x + c, r.exp().expand(len(x))))

    @staticmethod
    def plate(x: Tensor, size: int | None) -> pyro.plate:
        return pyro.plate("data", len(x) if size is None else size, subsample=torch.arange(len(x)))

    def log_evidence(self, x: Tensor) -> Tensor:
        return LinearGaussian(self.leaves[0].reshape(1, 1), torch.zeros(1, **DOUBLE), X.new_tensor([self.s2])).log_evidence(
            x[:, None]
        )

    def elbo(self, x: Tensor, weight: float = 1.0) -> Tensor:
        """E_q log p(x|z) - w KL(q || p), summed over the data."""
        a, b, c, r = self.leaves
        m, v = b * x + c, (2 * r).exp()
        log_lik = -0.5 * math.log(2 * math.pi * self.s2) - ((x - a * m) ** 2 + a * a * v) / (2 * self.s2)
        return (log_lik - weight * 0.5 * (m**2 + v - 1 - 2 * r)).sum()

    def log_w(self, x: Tensor, noise: Tensor, weight: float = 1.0) -> Tensor:
        """Log weights at the draws of this noise, (K, N)."""
        a, b, c, r = self.leaves
        z = b * x + c + r.exp() * noise
        log_q = dist.Normal(b * x + c, r.exp()).log_prob(z)
        return dist.Normal(a * z, self.s2**0.5).log_prob(x) + weight * (dist.Normal(0.0, 1.0).log_prob(z) - log_q)

    def gradient(self, value: Tensor) -> Tensor:
        found = torch.autograd.grad(value, self.leaves, retain_graph=True, allow_unused=True)
        return torch.stack([torch.zeros((), **DOUBLE) if g is None else g for g in found])

    def gradients(self, objective, x: Tensor, times: int, **options) -> Tensor:
        """Gradients of the loss by so many means over COPIES draws."""
        many = x.repeat(COPIES)
        found = [self.gradient(objective(self.model, self.guide, many, **options).loss) for _ in range(times)]
        return torch.stack(found) / COPIES


class Chain:
    """y ~ N(0, 1), z|y ~ N(y, 1), x|z ~ N(z, 1), with its exact posterior y|x, z|y,x as the guide, in order y, z."""

    def __init__(self) -> None:
        values = (1 / 3, 0.5 * math.log(2 / 3), 0.5, 0.5, 0.5 * math.log(0.5))
        self.leaves = [torch.tensor(value, requires_grad=True, **DOUBLE) for value in values]

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(torch.zeros_like(x), 1.0))
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        a, r, b, c, s = self.leaves
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(a * x, r.exp().expand(len(x))))
            pyro.sample("z", dist.Normal(b * x + c * y, s.exp()))


class Mixture:
    """k ~ Categorical(p), x|k ~ N(m_k, 1), q(k|x) = softmax(u x + v): the leaves are m, p's logits, u, v."""

    def __init__(self) -> None:
        start = ([-1.0, 1.5], [0.2, -0.3], [0.1, 0.5], [0.3, 0.0])
        self.leaves = [torch.tensor(value, requires_grad=True, **DOUBLE) for value in start]

    def logits(self, x: Tensor) -> Tensor:
        return x[:, None] * self.leaves[2] + self.leaves[3]

    def model(self, x: Tensor, size: int | None = None) -> None:
        with Line.plate(x, size):
            k = pyro.sample("k", dist.Categorical(logits=self.leaves[1]))
            pyro.sample("x", dist.Normal(self.leaves[0][k], 1.0), obs=x)

    def guide(self, x: Tensor, size: int | None = None) -> None:
        with Line.plate(x, size):
            pyro.sample("k", dist.Categorical(logits=self.logits(x)))

    def table(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p(x|k), log p(k), log q(k|x), each (N, 2)."""
        log_lik = dist.Normal(self.leaves[0], 1.0).log_prob(x[:, None])
        return log_lik, self.leaves[1].log_softmax(-1).expand(len(x), 2), self.logits(x).log_softmax(-1)

    def elbo(self, x: Tensor, weight: float = 1.0) -> Tensor:
        log_lik, log_p, log_q = self.table(x)
        return (log_q.exp() * (log_lik + weight * (log_p - log_q))).sum()

    def exact(self) -> Mixture:
        """Give the guide the posterior: m_k x - m_k^2 / 2 + log p_k."""
        m, p = self.leaves[0].detach(), self.leaves[1].detach()
        self.leaves[2:] = [m.clone().requires_grad_(), (p - m**2 / 2).requires_grad_()]
        return self


def within(draws: Tensor, truth: Tensor, errors: float = 4.5) -> bool:
    """Whether means (over the first dimension) are within so many standard errors of the truth."""
    error = draws.std(0) / len(draws) ** 0.5
    return bool(((draws.mean(0) - truth).abs() < errors * error + 1e-9).all())
