"""A VAE as a scikit-learn transformer, for use in a Pipeline."""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from elbowroom.analysis.measures.evidence_kinds import has_value
from elbowroom.errors import DataError, SpecError
from elbowroom.spec.run_folder import SPEC, SPLIT, WEIGHTS

if TYPE_CHECKING:
    import pandas as pd

    from elbowroom.queries.answer import Answer
    from elbowroom.run import Run

BLOCK = 10_000  # rows decoded at once
FEWEST = 3  # rows: one for each part of the split
POSTERIORS = ("encoder", "corrected")


class VAETransformer(TransformerMixin, BaseEstimator):
    """Fit a VAE to rows; transform rows to posterior means of their latents, and latents to E[x|z].

    X is (n, columns), an array or a frame; NaN means missing. By default a seventh of the rows validates: it chooses the best
    epoch (`split`). The networks take the same options as in a spec; `spec` sets everything that has no parameter here.

    Args:
        latent_dim: number of latents.
        likelihood: its name, or a dictionary with its options, such as gaussian, bernoulli, poisson, mixed.
        prior: likewise.
        family: family of the guide, likewise.
        hidden: widths of the hidden layers of encoder and decoder.
        epochs: passes over the training rows.
        batch_size: rows in a mini-batch.
        learning_rate: learning rate of Adam.
        posterior: the posterior whose mean `transform` returns. `encoder`: q(z|x), fast. `corrected`: the best posterior
            available, see `Run.encode` (exact for up to three latents; slower).
        split: fractions of the rows for training, validation and test; test rows are not used.
        spec: blocks of a spec (`model`, `guide`, `fit`, ...), which override the parameters above.
        random_state: random seed, a whole number.
        out: the run folder, which `Run.load` can open later. By default a temporary folder, removed together with the object.
        device: auto, cpu or cuda.

    Attributes:
        run_: the fitted run: `.audit()`, `.encode()`, `.score()`, `.impute()`, ...
        n_features_in_: number of columns.

    Example:
        >>> from sklearn.linear_model import LogisticRegression
        >>> from sklearn.pipeline import make_pipeline
        >>> model = make_pipeline(VAETransformer(latent_dim=2, epochs=20), LogisticRegression())
        >>> model.fit(X, y).score(X_new, y_new)  # doctest: +SKIP
    """

    def __init__(
        self,
        latent_dim: int = 2,
        *,
        likelihood: str | Mapping[str, Any] = "gaussian",
        prior: str | Mapping[str, Any] = "normal",
        family: str | Mapping[str, Any] = "diagonal_normal",
        hidden: Sequence[int] = (128, 128),
        epochs: int = 100,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        posterior: Literal["encoder", "corrected"] = "encoder",
        split: Sequence[float] = (0.85, 0.14, 0.01),
        spec: Mapping[str, Any] | None = None,
        random_state: int = 0,
        out: str | Path | None = None,
        device: str = "auto",
    ) -> None:
        self.latent_dim = latent_dim
        self.likelihood = likelihood
        self.prior = prior
        self.family = family
        self.hidden = hidden
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.posterior = posterior
        self.split = split
        self.spec = spec
        self.random_state = random_state
        self.out = out
        self.device = device

    def fit(self, X: np.ndarray | pd.DataFrame, y: Any = None) -> VAETransformer:
        """Fit the VAE.

        Args:
            X: rows, (n, columns).
            y: not used.

        Raises:
            UserError: options, rows or the folder cannot be used.
        """
        from elbowroom.run import fit
        from elbowroom.spec.experiment import Experiment

        self._check()
        experiment = Experiment.from_dict(self._tree(), data=self._rows(X, fitting=True))
        folder = self._folder() if self.out is None else Path(self.out)
        self.run_ = fit(experiment, folder, overwrite=self.out is not None and folder.exists())
        return self

    def transform(self, X: np.ndarray | pd.DataFrame) -> np.ndarray:
        """Return the posterior means of the latents, (n, latent_dim)."""
        if self.posterior == "corrected":
            return self._corrected(X)["mean"].values.astype(float)
        from elbowroom.analysis.latents.decoding import moments
        from elbowroom.inference.randomness import seeded
        from elbowroom.runs.rows import given_rows

        run = self._fitted()
        rows = given_rows(run, self._rows(X), label="X")
        vae, found = copy.deepcopy(run.vae).double(), []  # in double precision latents do not depend on the other rows
        with torch.no_grad(), seeded(run.experiment.spec.seed):
            for index in np.array_split(rows.index, max(1, -(-len(rows) // BLOCK))):
                batch = {name: value.double() for name, value in rows.experiment.batch(index).items()}
                found.append(moments(vae, batch)[0])
        return torch.cat(found).numpy()

    def inverse_transform(self, Z: np.ndarray) -> np.ndarray:
        """Return E[x|z], (n, columns); where x has no mean, the value that `Likelihood.centre` defines.

        Raises:
            DataError: Z has another number of columns than there are latents, or the model needs covariates.
        """
        run = self._fitted()
        z = torch.as_tensor(np.array(Z), dtype=run.experiment.dtype)  # a copy: arrays of frames may be read-only
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise DataError(f"Z: has shape {tuple(z.shape)}; expected (n, {self.latent_dim})")
        with torch.no_grad():
            parts = [run.vae.centre(part).flatten(1) for part in z.split(BLOCK)]
        return torch.cat(parts).double().numpy()

    def score_samples(self, X: np.ndarray | pd.DataFrame) -> np.ndarray:
        """Return log p(x) of each row, (n,), in nats: exact or an estimate.

        Where neither is available, the value is the ELBO, a lower bound, and a warning gives the number of these rows.
        `Run.score` reports estimates and bounds separately.
        """
        found = self._corrected(X)
        known = has_value(found)
        if count := int((~known).sum()):
            warnings.warn(f"log p(x) is not known at {count} rows: their ELBO, a lower bound, stands there", stacklevel=2)
        return np.where(known, found["log_evidence"].values, found["elbo"].values)

    def score(self, X: np.ndarray | pd.DataFrame, y: Any = None) -> float:
        """Return the mean of `score_samples`, in nats per row; higher is better."""
        return float(self.score_samples(X).mean())

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names of the latents, for `set_output`."""
        check_is_fitted(self, "run_")
        return np.asarray([f"z{j}" for j in range(self.latent_dim)], dtype=object)

    def _check(self) -> None:
        if self.posterior not in POSTERIORS:
            raise SpecError(f"posterior: unknown {self.posterior!r}; allowed: {', '.join(POSTERIORS)}")
        if not isinstance(self.random_state, int | np.integer):
            raise SpecError(f"random_state: a whole number is needed, got {self.random_state!r}")

    def _tree(self) -> dict[str, Any]:
        """Return the spec that follows from the parameters."""
        hidden = [int(width) for width in self.hidden]
        tree: dict[str, Any] = {
            "schema": 1,
            "data": {"name": "memory", "split": [float(part) for part in self.split]},
            "model": {
                "latent_dim": self.latent_dim,
                "prior": self.prior,
                "likelihood": self.likelihood,
                "decoder": {"name": "mlp", "hidden": hidden},
            },
            "guide": {"family": self.family, "encoder": {"name": "mlp", "hidden": hidden}},
            "fit": {
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "learning_rate": self.learning_rate,
                "device": self.device,
            },
            "seed": int(self.random_state),
        }
        for name, block in (self.spec or {}).items():
            laid = isinstance(block, Mapping) and isinstance(tree.get(name), Mapping)
            tree[name] = {**tree[name], **block} if laid else block
        return tree

    def _rows(self, X: Any, *, fitting: bool = False) -> Any:
        """Check X as scikit-learn does; frames with text are checked as data of a spec are."""
        if hasattr(X, "dtypes") and not all(getattr(dtype, "kind", "O") in "biuf" for dtype in X.dtypes):
            validate_data(self, X, reset=fitting, skip_check_array=True)
            return X
        options = {"dtype": "numeric", "ensure_all_finite": "allow-nan", "ensure_min_samples": FEWEST if fitting else 1}
        checked = validate_data(self, X, reset=fitting, **options)
        return X if hasattr(X, "iloc") else checked

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """Store the run as the bytes of its files: a pickle of these holds no code."""
        state = {key: value for key, value in super().__getstate__().items() if key != "run_"}
        if hasattr(self, "run_"):
            state["_files"] = {name: (self.run_.path / name).read_bytes() for name in (SPEC, SPLIT, WEIGHTS)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Write the files of the run into a temporary folder and open it."""
        from elbowroom.run import Run

        files = state.pop("_files", None)
        super().__setstate__(state)
        if files is not None:
            folder = self._folder()
            for name, content in files.items():
                (folder / name).write_bytes(content)
            self.run_ = Run.load(folder)

    def _folder(self) -> Path:
        """Return a temporary folder that is removed together with this object."""
        folder = tempfile.mkdtemp(prefix="elbowroom-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    def _fitted(self) -> Run:
        check_is_fitted(self, "run_")
        run: Run = self.run_
        return run

    def _corrected(self, X: np.ndarray | pd.DataFrame) -> Any:
        answer: Answer = self._fitted().encode(self._rows(X))
        return answer.dataset
