"""The peers of the posterior benchmark: blackjax and NumPyro under vmap, Pyro one posterior at a time.

Imported only when they run: they live in `.venv-bench` (benchmarks/requirements.txt).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pyro.distributions as dist
import torch
from jax import Array
from numpyro.infer.hmc import hmc
from pyro.infer.mcmc.util import initialize_model

from benchmarks.problem import Method, Problem, Run, Settings
from elbowroom.models.likelihoods.scales import EDGE

Kernel = Callable[[Array, Array, Array], tuple[Array, Array, Array]]
"""key, z0 (d,), x (pixels,) -> draws (S, d), number of divergences, number of gradients"""

THIN = 10  # steps of MCLMC per draw that is kept


def log_joint(problem: Problem, dtype: Any) -> Callable[[Array, Array], Array]:
    """Return log p(x, z) for one z (d,) and one x (pixels,), nats: N(0, I) prior, tanh network, the problem's likelihood."""
    weights = [(jnp.asarray(w, dtype), jnp.asarray(b, dtype)) for w, b in problem.weights]
    known = {name: jnp.asarray(value, dtype) for name, value in problem.constants.items()}

    def log_likelihood(x: Array, output: Array) -> Array:
        if problem.likelihood == "gaussian":
            scaled = (x - known["loc"] - known["unit"] * output) / known["noise"]
            return jnp.sum(-0.5 * scaled**2 - jnp.log(known["noise"]) - 0.5 * jnp.log(2 * jnp.pi))
        if problem.likelihood == "poisson":
            log_rate = known["log_mean"] + jnp.clip(output, -EDGE, EDGE)  # beyond, ours grows like a logarithm
            return jnp.sum(x * log_rate - jnp.exp(log_rate) - jax.scipy.special.gammaln(x + 1))
        return jnp.sum(x * output - jax.nn.softplus(output))

    def log_density(z: Array, x: Array) -> Array:
        h = z
        for w, b in weights[:-1]:
            h = jnp.tanh(h @ w.T + b)
        w, b = weights[-1]
        prior = -0.5 * jnp.sum(z**2) - 0.5 * z.size * jnp.log(2 * jnp.pi)
        return prior + log_likelihood(x, h @ w.T + b)

    return log_density


def evaluate(problem: Problem, z: np.ndarray, *, double: bool) -> np.ndarray:
    """Return log p(x_n, z_sn), (S, N), as jax computes it, in float32 or float64."""
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        function = jax.vmap(jax.vmap(log_joint(problem, dtype)), in_axes=(0, None))
        return np.asarray(jax.jit(function)(jnp.asarray(z, dtype), jnp.asarray(problem.x.numpy(), dtype)))


def blackjax_nuts(problem: Problem, settings: Settings) -> Method:
    """Blackjax's NUTS with window adaptation (diagonal metric, target 0.8) per chain, under vmap over chains x data."""

    def kernel(density: Callable[[Array, Array], Array]) -> Kernel:
        def one(key: Array, z: Array, x: Array) -> tuple[Array, Array, Array]:
            target = lambda u: density(u, x)
            warm_key, run_key = jax.random.split(key)
            steps = lambda state, info, adaptation: info.num_integration_steps
            adaptation = blackjax.window_adaptation(blackjax.nuts, target, adaptation_info_fn=steps)
            (state, parameters), warm_steps = adaptation.run(warm_key, z, num_steps=settings.warmup)
            step = blackjax.nuts(target, **parameters).step

            def body(state: Any, key: Array) -> tuple[Any, tuple[Array, Array, Array]]:
                state, info = step(key, state)
                return state, (state.position, info.is_divergent, info.num_integration_steps)

            _, (draws, divergent, steps_) = jax.lax.scan(body, state, jax.random.split(run_key, settings.draws))
            return draws, divergent.sum(), warm_steps.sum() + steps_.sum()

        return one

    return _compiled(f"blackjax {blackjax.__version__} NUTS, vmap", problem, settings, kernel)


def numpyro_nuts(problem: Problem, settings: Settings) -> Method:
    """NumPyro's NUTS kernel with its warm-up (diagonal metric, target 0.8) per chain, under vmap over chains x data."""

    def kernel(density: Callable[[Array, Array], Array]) -> Kernel:
        def one(key: Array, z: Array, x: Array) -> tuple[Array, Array, Array]:
            start, step = hmc(lambda u: -density(u, x), algo="NUTS")
            state = start(z, settings.warmup, rng_key=key)

            def body(state: Any, _: None) -> tuple[Any, tuple[Array, Array, Array]]:
                state = step(state)
                return state, (state.z, state.diverging, state.num_steps)

            state, (_, _, warm_steps) = jax.lax.scan(body, state, length=settings.warmup)
            _, (draws, divergent, steps) = jax.lax.scan(body, state, length=settings.draws)
            return draws, divergent.sum(), warm_steps.sum() + steps.sum()

        return one

    return _compiled(f"NumPyro {numpyro.__version__} NUTS, vmap", problem, settings, kernel)


def blackjax_mclmc(problem: Problem, settings: Settings) -> Method:
    """Blackjax's unadjusted MCLMC, tuned per chain as its documentation says, under vmap over chains x data.

    A step (McLachlan's integrator) takes two gradients; one state of `THIN` steps is kept as a draw. Without an accept step its
    draws have a bias, which its tuning keeps small.
    """

    def kernel(density: Callable[[Array, Array], Array]) -> Kernel:
        def one(key: Array, z: Array, x: Array) -> tuple[Array, Array, Array]:
            target = lambda u: density(u, x)
            start_key, tune_key, run_key = jax.random.split(key, 3)
            state = blackjax.mcmc.mclmc.init(position=z, logdensity_fn=target, rng_key=start_key)
            tune = blackjax.mclmc_find_L_and_step_size
            steps = settings.draws * THIN
            state, found, tuning = tune(
                blackjax.mcmc.mclmc.build_kernel(), num_steps=steps, state=state, rng_key=tune_key, logdensity_fn=target
            )
            sampler = blackjax.mclmc(
                target, L=found.L, step_size=found.step_size, inverse_mass_matrix=found.inverse_mass_matrix
            )

            def body(state: Any, key: Array) -> tuple[Any, Array]:
                state, _ = jax.lax.scan(lambda s, k: (sampler.step(k, s)[0], None), state, jax.random.split(key, THIN))
                return state, state.position

            _, draws = jax.lax.scan(body, state, jax.random.split(run_key, settings.draws))
            return draws, jnp.zeros((), int), jnp.asarray(2 * (tuning + steps))

        return one

    return _compiled(f"blackjax {blackjax.__version__} MCLMC, vmap", problem, settings, kernel)


def _compiled(name: str, problem: Problem, settings: Settings, kernel: Callable[..., Kernel]) -> Method:
    """Compile a kernel for all chains and data at once in float32, jax's default."""
    x = jnp.asarray(problem.x.numpy(), jnp.float32)
    many = jax.vmap(jax.vmap(kernel(log_joint(problem, jnp.float32)), in_axes=(0, 0, 0)), in_axes=(0, 0, None))

    def arguments(seed: int) -> tuple[Array, Array, Array]:
        keys = jax.random.split(jax.random.key(seed), (settings.chains, problem.n_obs))
        return keys, jnp.asarray(problem.starts(settings.chains, seed).numpy(), jnp.float32), x

    start = time.perf_counter()
    executable = jax.jit(many).lower(*arguments(0)).compile()
    compile_seconds = time.perf_counter() - start

    def run(seed: int) -> Run:
        given = jax.block_until_ready(arguments(seed))
        start = time.perf_counter()
        draws, divergences, gradients = jax.block_until_ready(executable(*given))
        seconds = time.perf_counter() - start
        per_datum = float(gradients.sum()) / problem.n_obs
        # (chain, N, draw, d) -> (chain, draw, N, d)
        return Run(np.asarray(draws, np.float64).swapaxes(1, 2), seconds, int(divergences.sum()), gradients=per_datum)

    return Method(name, "float32", problem.n_obs, settings.chains, run, compile_seconds)


def pyro_nuts(problem: Problem, settings: Settings) -> Method:
    """Pyro's NUTS, one datum and one chain after the other, each with its own model (float32, Pyro's default)."""
    n = min(settings.pyro, problem.n_obs)
    layers = [(torch.as_tensor(w, dtype=torch.float32), torch.as_tensor(b, dtype=torch.float32)) for w, b in problem.weights]
    data = problem.x[:n].float()

    def model(x: torch.Tensor) -> None:
        h = pyro.sample("z", dist.Normal(torch.zeros(problem.dim), 1.0).to_event(1))
        for w, b in layers[:-1]:
            h = torch.tanh(h @ w.T + b)
        w, b = layers[-1]
        pyro.sample("x", dist.Bernoulli(logits=h @ w.T + b).to_event(1), obs=x)

    where = problem.starts(1, 0)[0, :n].float()
    theirs = torch.stack([-initialize_model(model, (x,))[1]({"z": z}) for x, z in zip(data, where, strict=True)])
    ours = problem.log_joint(problem.starts(1, 0))[0, :n]
    problem.same("Pyro, float32", theirs.double().numpy(), ours.numpy(), 1e-4)

    def run(seed: int) -> Run:
        pyro.set_rng_seed(seed)
        starts = problem.starts(1, seed)[0, :n].float()
        draws, divergences = [], 0
        start = time.perf_counter()
        for x, z in zip(data, starts, strict=True):
            mcmc = pyro.infer.MCMC(
                pyro.infer.NUTS(model),
                num_samples=settings.draws,
                warmup_steps=settings.warmup,
                initial_params={"z": z},
                disable_progbar=True,
            )
            mcmc.run(x)
            draws.append(mcmc.get_samples()["z"])
            divergences += sum(len(found) for found in mcmc.diagnostics()["divergences"].values())
        seconds = time.perf_counter() - start
        return Run(torch.stack(draws, 1)[None].double().numpy(), seconds, divergences)

    return Method(f"Pyro {pyro.__version__} NUTS, one by one", "float32", n, 1, run)
