"""Two-sample test by a classifier: can samples of a model be told apart from data?

A classifier is trained on half of the pooled rows to tell data from samples, and scores the other half; then the halves are
swapped. If both come from one distribution, the scores of the other half are exchangeable for any classifier, so that a rank
test of them is exact given the training half:

    AUC   = P(score of a sample > score of a datum)          1/2: they cannot be told apart; 1: always
    p     = min(1, 2 min(p_1, p_2)),                         p_k: Mann-Whitney, one-sided, of half k (Bonferroni: the two
                                                             halves are not independent)

Friedman 2003, https://www.osti.gov/biblio/826696; Lopez-Paz and Oquab 2017, https://arxiv.org/abs/1610.06545, who use accuracy
instead of ranks; the AUC has more power: Chakravarti et al. 2023, https://arxiv.org/abs/2111.10497. A low p-value shows a
difference. A high one does not show equality: another classifier, or more rows, might find a difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import mannwhitneyu
from sklearn.decomposition import PCA
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.impute import SimpleImputer
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from elbowroom.system.stages import stage

COMPONENTS = 20  # principal components added to the columns: they show differences of correlation
TREES = 200
LEAF = 3  # rows
LEAST = 20  # rows of each sample


@dataclass(frozen=True)
class TwoSample:
    """How well a classifier tells samples from data.

    Attributes:
        auc: the mean area under the ROC curve over the two halves.
        p_value: of the hypothesis that both come from one distribution.
        placement: for each datum the share of samples of its half that score higher, (n,); their mean is `auc`.
        se: standard error of `auc` given the two classifiers (DeLong et al. 1988, https://doi.org/10.2307/2531595).
        variance_samples: the part of se^2 that is due to the samples.
    """

    auc: float
    p_value: float
    se: float
    placement: np.ndarray
    variance_samples: float


@stage("two-sample test")
def tell_apart(data: np.ndarray, samples: np.ndarray, *, seed: int = 0) -> TwoSample:
    """Test by a classifier whether samples and data come from one distribution.

    Both are (n, ...) with independent rows, NaN where missing; missing values must have the same distribution in both.

    Raises:
        ValueError: there are fewer than 20 rows, or shapes differ.
    """
    n = len(data)
    if data.shape != samples.shape or n < LEAST:
        raise ValueError(f"two samples of one shape and at least {LEAST} rows are needed, got {data.shape}, {samples.shape}")
    both = np.stack([data.reshape(n, -1), samples.reshape(n, -1)]).astype(np.float64)
    order = np.random.default_rng(seed).permutation(n)
    halves = order[: n // 2], order[n // 2 :]
    placement, ps, variance = np.empty(n), [], 0.0
    for number, (test, train) in enumerate((halves, halves[::-1])):
        classifier = _classifier(both[:, train], seed + number)
        x = np.concatenate([both[0, train], both[1, train]])
        classifier.fit(x, np.repeat([0, 1], len(train)))
        real, made = (classifier.predict_proba(part[test])[:, 1] for part in both)
        ps.append(float(mannwhitneyu(made, real, alternative="greater").pvalue))
        wins = (made > real[:, None]) + 0.5 * (made == real[:, None])  # (datum, sample)
        placement[test] = wins.mean(1)
        variance += (len(test) / n) ** 2 * float(wins.mean(0).var(ddof=1)) / len(test)
    se = math.sqrt(_within(placement, halves) + variance)
    return TwoSample(float(placement.mean()), min(1.0, 2 * min(ps)), se, placement, variance)


def difference(one: TwoSample, other: TwoSample) -> tuple[float, float]:
    """Return AUC(one) - AUC(other) and its standard error, for tests against the same data with the same halves."""
    off = one.placement - other.placement
    se = math.sqrt(float(off.var(ddof=1)) / len(off) + one.variance_samples + other.variance_samples)
    return one.auc - other.auc, se


def _within(placement: np.ndarray, halves: tuple[np.ndarray, np.ndarray]) -> float:
    n = len(placement)
    return sum((len(half) / n) ** 2 * float(placement[half].var(ddof=1)) / len(half) for half in halves)


def _classifier(train: np.ndarray, seed: int) -> Pipeline:
    """Return trees on the columns, on indicators of missing values, and on principal components."""
    width = train.shape[-1]
    components = min(COMPONENTS, width, train.shape[1])
    parts = [("columns", "passthrough"), ("components", PCA(components, random_state=seed))]
    filled = SimpleImputer(add_indicator=bool(np.isnan(train).any()), keep_empty_features=True)
    trees = ExtraTreesClassifier(TREES, min_samples_leaf=LEAF, random_state=seed)
    return make_pipeline(filled, StandardScaler(), FeatureUnion(parts), trees)
