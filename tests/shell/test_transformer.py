"""The VAE as a scikit-learn transformer: its conventions, a Pipeline, and closed forms."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import elbowroom as er

LINEAR = {"model": {"decoder": "linear"}, "fit": {"dtype": "float64"}}


def rows(n=200, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 2))
    return z @ rng.normal(size=(2, 5)) + 0.3 * rng.normal(size=(n, 5)) + 2.0, (z[:, 0] > 0).astype(int)


@pytest.fixture(scope="module")
def fitted():
    x, _ = rows()
    return er.VAETransformer(2, hidden=(16,), epochs=8, spec=LINEAR, random_state=3).fit(x), x


@pytest.mark.slow
def test_the_conventions_of_scikit_learn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_estimator(er.VAETransformer(epochs=1, hidden=(4,)), on_fail=None)
    assert len(found) > 40
    assert {one["check_name"]: str(one["exception"]) for one in found if one["status"] not in ("passed", "skipped")} == {}


def test_what_a_linear_model_says_is_its_closed_form(fitted):
    transformer, x = fitted
    oracle = transformer.run_.vae.linear_gaussian()
    t = torch.as_tensor(x[:20])
    mean, _ = oracle.posterior(t)
    corrected = clone(transformer).set_params(posterior="corrected")
    corrected.run_, corrected.n_features_in_ = transformer.run_, 5
    assert np.allclose(corrected.transform(x[:20]), mean, atol=1e-6)
    assert np.allclose(transformer.score_samples(x[:20]), oracle.log_evidence(t), atol=1e-6)
    assert transformer.score(x[:20]) == pytest.approx(float(oracle.log_evidence(t).mean()), abs=1e-6)
    z = np.array([[0.0, 0.0], [1.0, -2.0]])
    assert np.allclose(transformer.inverse_transform(z), z @ oracle.W.numpy().T + oracle.mu.numpy(), atol=1e-6)
    with torch.no_grad():
        said = transformer.run_.vae.encode(t).mean
    assert np.allclose(transformer.transform(x[:20]), said, atol=1e-9)


def test_in_a_pipeline_and_a_grid_search():
    x, y = rows(150)
    vae = er.VAETransformer(hidden=(8,), epochs=15, learning_rate=1e-2)
    pipeline = make_pipeline(StandardScaler(), vae, LogisticRegression())
    search = GridSearchCV(pipeline, {"vaetransformer__latent_dim": [1, 2]}, cv=2).fit(x, y)
    assert search.best_score_ > 0.6
    assert search.best_estimator_[1].transform(x[:3]).shape == (3, search.best_params_["vaetransformer__latent_dim"])


def test_frames_in_frames_out_with_holes_and_text():
    x, _ = rows(120)
    frame = pd.DataFrame(x, columns=list("abcde"))
    frame["f"] = np.where(x[:, 0] > 2, "high", "low")
    frame.loc[3, "a"] = np.nan
    transformer = er.VAETransformer(2, likelihood="mixed", hidden=(8,), epochs=2).set_output(transform="pandas")
    z = transformer.fit(frame).transform(frame.iloc[:5])
    assert list(z.columns) == ["z0", "z1"]
    assert np.allclose(transformer.inverse_transform(z), transformer.inverse_transform(z.values), equal_nan=True)
    assert np.isfinite(z.values).all()
    with pytest.raises(ValueError, match="feature names"):
        transformer.transform(frame.iloc[:5].rename(columns={"a": "A"}))


def test_a_copy_by_pickle_holds_files_and_says_the_same(fitted):
    transformer, x = fitted
    state = transformer.__getstate__()
    assert set(state["_files"]) == {"spec.yaml", "split.npz", "weights.pt"}
    assert "run_" not in state
    other = pickle.loads(pickle.dumps(transformer))
    assert np.array_equal(other.transform(x[:7]), transformer.transform(x[:7]))
    assert np.array_equal(other.score_samples(x[:7]), transformer.score_samples(x[:7]))


def test_the_run_is_kept_where_it_is_asked_for(tmp_path):
    x, _ = rows(60)
    er.VAETransformer(1, hidden=(4,), epochs=1, out=tmp_path / "kept").fit(x)
    assert er.Run.load(tmp_path / "kept").experiment.spec.model.latent_dim == 1


def test_a_bound_is_not_passed_off_as_log_p(fitted, monkeypatch):
    transformer, x = fitted
    found = transformer._corrected(x[:4])
    unknown = found.assign(log_evidence=found["log_evidence"].where(found["obs_id"] != 2))
    monkeypatch.setattr(transformer, "_corrected", lambda X: unknown)
    with pytest.warns(UserWarning, match="not known at 1 rows: their ELBO, a lower bound"):
        score = transformer.score_samples(x[:4])
    assert score[2] == found["elbo"].values[2]
    assert score[1] == found["log_evidence"].values[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"posterior": "true"}, "posterior: unknown 'true'; allowed: encoder, corrected"),
        ({"random_state": None}, "random_state: a whole number is needed"),
        ({"likelihood": "gausian"}, "did you mean 'gaussian'"),
        ({"latent_dim": 0}, "latent_dim"),
    ],
)
def test_bad_options_are_one_line(change, said):
    with pytest.raises(er.errors.UserError, match=said) as raised:
        er.VAETransformer(hidden=(4,), epochs=1).set_params(**change).fit(rows(30)[0])
    assert "\n" not in str(raised.value)


def test_latents_of_another_width(fitted):
    with pytest.raises(er.errors.UserError, match=r"Z: has shape \(3, 4\); expected \(n, 2\)"):
        fitted[0].inverse_transform(np.zeros((3, 4)))
