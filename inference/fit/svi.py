"""The fit of a VAE by stochastic variational inference: an objective, one fused Adam, best weights by validation.

Each step maximises an objective (`elbowroom.inference.objectives`) on a mini-batch. The plate of the mini-batch stands for all
N data, so every gradient is an estimate for the whole data set (Kingma and Welling 2014, https://arxiv.org/abs/1312.6114;
Hoffman et al. 2013, https://arxiv.org/abs/1206.7055). A step does what `pyro.infer.SVI` with `pyro.optim.Adam` does, with one
optimiser for all parameters instead of one for each.

Everything reported is in nats per datum: a `loss` is lower-better, an `elbo` is higher-better.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from elbowroom.errors import SpecError
from elbowroom.inference.compiled.policies import Compile
from elbowroom.inference.fit.loop import Loop
from elbowroom.inference.fit.mixed_precision import Precision, check
from elbowroom.inference.fit.plan import Decay, Session, plan, resolve_device
from elbowroom.inference.fit.record import History
from elbowroom.inference.fit.rows import Rows
from elbowroom.inference.fit.step import Step
from elbowroom.inference.objectives.elbo import ELBO, Objective
from elbowroom.inference.randomness import contained, mode
from elbowroom.models.vae import VAE


def fit(
    vae: VAE,
    train: Tensor | Rows,
    validation: Tensor | Rows,
    session: Session | None = None,
    *,
    objective: Objective | None = None,
    epochs: Annotated[int, Ge(1)] = 100,
    batch_size: Annotated[int, Ge(1)] = 128,
    learning_rate: Annotated[float, Gt(0)] = 1e-3,
    schedule: Decay = "cosine",
    kl_warmup: Annotated[int, Ge(0)] = 0,
    patience: Annotated[int, Ge(1)] | None = None,
    gradient_clip: Annotated[float, Gt(0)] | None = None,
    validation_draws: Annotated[int, Ge(1), Le(10_000)] = 8,
    dtype: Literal["float32", "float64"] = "float32",
    device: str = "auto",
    compile: Compile = "auto",
    precision: Precision = "highest",
) -> History:
    """Fit a VAE by stochastic variational inference and leave it with its best weights.

    The best weights are those of the epoch with the highest validation ELBO among the epochs that end at KL weight 1;
    without validation data, the last ones. The VAE is adapted to the training data (`vae.adapt`), moved to the device
    and dtype, and stays there. With a folder in the session, `weights.pt` (the best weights), `history.csv` and
    `checkpoint.pt` are written (and `precision.json`, the effect of rounding), each as a whole or not at all. On a CPU a
    resumed fit equals an uninterrupted one bit for bit. Pyro's parameter store and validation, torch's generators and its
    precision are left as they were.

    Args:
        vae: the model and guide, trained in place.
        train: training data, (N, *event), in memory or read as they are needed; the result is the same.
        validation: validation data, (M, *event); M = 0 is allowed.
        session: folder, seed, resumption and report (facts of the run).
        objective: what is maximised; the ELBO by default. The best weights are chosen by the plain ELBO whatever it is.
        epochs: passes over the training data.
        batch_size: data per step; the last batch of an epoch may be smaller.
        learning_rate: Adam's, at the first step.
        schedule: `constant`, or `cosine` down to 0 at the last step.
        kl_warmup: epochs over which the weight of the KL part rises from 0 to 1; 0 switches it off.
        patience: epochs without a better validation ELBO after which the fit stops; null never stops early.
        gradient_clip: largest norm of the gradient of the loss per datum; null clips nothing.
        validation_draws: draws of z per validation datum, with the same noise in every epoch.
        dtype: precision of weights and data.
        device: `auto` (the GPU where there is one), `cpu`, `cuda` or `cuda:1`.
        compile: make the training step one compiled graph: `auto` where the planned steps repay it, `always` wherever it can
            be done, `never`. The draws are the same, the numbers agree to rounding.
        precision: of matrix products in training steps: `highest`; `tf32` rounds their factors on a GPU; `bf16` computes
            encoder and decoder in bfloat16. Validation is in full precision, and the effect on the ELBO is stated.

    Returns:
        The history: one row per epoch, the best epoch, and why the fit stopped.

    Raises:
        NonFiniteLoss: a loss was not finite; names site, epoch, batch and the last good checkpoint.
        RunFolderError: the checkpoint to resume from is unreadable or belongs to another fit.
        SpecError: the device does not exist, or an option does not apply.
        DataError: there are no training data.
    """
    session, objective = session or Session(), objective or ELBO()
    options: dict[str, Any] = {
        "objective": repr(objective),
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "kl_warmup": kl_warmup,
        "patience": patience,
        "gradient_clip": gradient_clip,
        "validation_draws": validation_draws,
        "dtype": dtype,
        "device": resolve_device(device).type,
        "compile": compile,
        "precision": precision,
    }
    planned = plan(len(train), **options)
    if patience is not None and len(validation) == 0:
        raise SpecError("fit.patience: needs validation data to judge by; set it to null or make a validation split")
    place, kind = resolve_device(device), getattr(torch, dtype)
    check(precision, dtype, place)
    train, validation = Rows.of(train).to(place, kind), Rows.of(validation).to(place, kind)
    vae.to(place, kind)
    vae.adapt(**train.sample())
    start = session.start
    if start is not None:
        options["start"] = f"{start.sha256}, freeze {start.freeze}, simulated {start.simulated:g}"
        start.apply(vae)
    frozen: AbstractContextManager[None] = nullcontext() if start is None else start.frozen(vae)
    with contained(session.seed, place), mode(vae, training=True), frozen:
        step = Step(
            vae,
            size=len(train),
            learning_rate=learning_rate,
            gradient_clip=gradient_clip,
            objective=objective,
            compile=compile,
            steps=planned.steps,
            precision=precision,
        )
        run = Loop(vae, train, validation, session, planned, step, options)
        if session.resume:
            run.resume()
        run.train_epochs()
        return run.finish()
