"""Questions to a fitted model, as methods of `Run`: numpy, torch or pandas in, the same out.

Each returns an `Answer`, and writes nothing; `Answer.save` does. `elbowroom encode`, ... are the same from the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from elbowroom.runs.fitted import FittedModel, as_specified
from elbowroom.system.stages import stage

if TYPE_CHECKING:
    from elbowroom.inference.posterior import Reference
    from elbowroom.queries.answer import Answer
    from elbowroom.queries.impute.answer import Imputed
    from elbowroom.queries.stream import Report


class Questions(FittedModel):
    """The questions: methods of every `Run`."""

    @as_specified
    def encode(
        self,
        data: Any = None,
        *,
        references: Literal["auto"] | Sequence[str | Reference] = "auto",
        samples: int = 0,
        draws: int = 1_000,
        keep: int = 400,
        seed: int | None = None,
        device: str | None = None,
        report: Report | None = None,
        out: str | Path | None = None,
        resume: bool = False,
    ) -> Answer:
        """Say what the encoder makes of each row (mu, sigma), and what is true: the corrected posterior p(z|x) beside it.

        Args:
            data: a file, an array (n, *event), a tensor or a frame; by default the test split of the run.
            references: `auto`: exact where there are closed forms, finitely many states or at most three latents, else
                importance sampling from the refitted normal; or names of references; an empty list for the encoder's own
                draws, reweighted (fast).
            samples: draws of the corrected posterior per row that the answer holds (`draws`), at most `keep`.
            draws: draws per row behind ELBO, k-hat and importance weights.
            keep: draws per row of the corrected posterior, behind its quantiles.
            seed: random seed; the run's by default.
            device: where to compute: auto, cpu, cuda; by default where the spec says.
            report: called as report(rows done, rows in all).
            out: the file that the answer will be saved to: finished chunks are kept beside it until it is.
            resume: go on from these chunks.

        Returns:
            Over `obs_id` and `latent`: mu, sigma, mean, sd, quantile (5 %, 50 %, 95 %), covariance; probabilities for
            discrete latents; pareto_k, elbo, log_evidence, source, status and reason per row.

        Raises:
            UserError: the data do not fit the model, or a reference cannot be used on it.

        Example:
            >>> answer = run.encode(x)  # doctest: +SKIP
            >>> answer["mean"], answer["sd"], answer["status"]  # doctest: +SKIP
        """
        with stage("imports"):
            from elbowroom.queries import encode

        return encode.ask(
            self, data, references=references, samples=samples, draws=draws, keep=keep, seed=seed, device=device, report=report,
            out=None if out is None else Path(out), resume=resume,
        )  # fmt: skip

    @as_specified
    def score(
        self,
        data: Any = None,
        *,
        references: Literal["auto"] | Sequence[str | Reference] = "auto",
        band: str | Sequence[float] = (2.5, 97.5),
        fdr: float = 0.1,
        calibration: Any = None,
        most: int = 2_000,
        simulated: int = 500,
        holes: Literal["pattern", "count"] = "pattern",
        gaps: bool = False,
        draws: int = 1_000,
        seed: int | None = None,
        device: str | None = None,
        report: Report | None = None,
        out: str | Path | None = None,
        resume: bool = False,
    ) -> Answer:
        """Give log p(x) of each row with its kind and error, and say whether the row is like those of the fit.

        The scores of the calibration rows are kept in `answers/` of the run folder, so that a second question is quicker.

        Args:
            data: as in `encode`.
            references: as in `encode`: what log p(x) is computed by.
            band: the percentiles of the calibration rows that rows are expected between; their level is that of p-values too.
            fdr: the share of valid rows that is allowed among those flagged over all rows.
            calibration: rows known to be valid that the fit has not seen: a file, an array or a frame; by default the
                validation split. (It has chosen the epoch of the weights: a slight breach of the rule.)
            most: calibration rows that are used, at most.
            simulated: rows drawn from the model for `p_model`, at most as many as calibration rows; 0 for none.
            holes: rows with missing cells are compared with calibration rows that have the same (`pattern`), or as many
                (`count`).
            gaps: refit the guide's family to every row, for `gap_amortization` (slow).
            draws: draws per row behind ELBO and k-hat.
            seed: random seed; the run's by default.
            device: where to compute.
            report: called as report(rows done, rows in all).
            out: the file that the answer will be saved to; see `resume`.
            resume: go on from the rows that lie beside `out`.

        Returns:
            Over `obs_id`: log_evidence with error, bounds and kind, bits per dimension, elbo, rate, distortion, pareto_k,
            gap_total, typicality; p_conformal, p_adjusted, p_model over `tail`; p_score over `score`; decision over `rule`.

        Raises:
            UserError: the data do not fit the model, or there are too few calibration rows for the band.

        Example:
            >>> answer = run.score(x)  # doctest: +SKIP
            >>> answer["log_evidence"], answer["p_conformal"], answer["decision"]  # doctest: +SKIP
        """
        with stage("imports"):
            from elbowroom.queries.score import score

        return score.ask(
            self, data, references=references, band=band, fdr=fdr, calibration=calibration, most=most, simulated=simulated,
            holes=holes, gaps=gaps, draws=draws, seed=seed, device=device, report=report,
            out=None if out is None else Path(out), resume=resume,
        )  # fmt: skip

    @as_specified
    def impute(
        self,
        data: Any = None,
        *,
        hide: Any = None,
        of: Sequence[str] | None = None,
        level: float = 0.9,
        samples: int = 0,
        references: Literal["auto"] | Sequence[str | Reference] = "auto",
        draws: int = 1_000,
        keep: int = 1_000,
        seed: int | None = None,
        device: str | None = None,
        report: Report | None = None,
        out: str | Path | None = None,
        resume: bool = False,
    ) -> Imputed:
        """Say what may stand in missing cells: p(x_missing | x_observed), with the encoder's own answer beside it.

        Missing are NaN, None, empty cells and masked entries, in any pattern. A row of which nothing is observed gets the
        model's marginal. Steps after the end of a sequence are padding, and are not imputed.

        Args:
            data: as in `encode`.
            hide: observed cells to hide and to score: names of columns, a share such as "20%", of images "left", "right",
                "top" or "bottom"; or truth values, (*event) or (n, *event).
            of: the columns to impute; all by default.
            level: of the intervals.
            samples: completed rows that the answer holds (`samples`): draws of all missing cells together.
            references: as in `encode`: where draws of p(z | x_observed) come from.
            draws: draws per row behind k-hat and importance weights.
            keep: draws per row behind means, probabilities and intervals.
            seed: random seed; the run's by default.
            device: where to compute.
            report: called as report(rows done, rows in all).
            out: the file that the answer will be saved to; see `resume`.
            resume: go on from the rows that lie beside `out`.

        Returns:
            Over `obs_id` (rows with missing cells) and columns, NaN where nothing is missing: point, mean with mean_error, sd,
            median, low, high, likeliest; over `level` the probability of each level; all again as `..._guide` by the
            encoder's draws; source and status per row. `answer.completed()` is the data with their holes filled,
            `answer.frame()` one line per cell, `answer.scores()` the errors and coverage of hidden cells.

        Raises:
            UserError: the data do not fit the model, no cell is missing, or a column does not exist.

        Example:
            >>> answer = run.impute(frame)  # doctest: +SKIP
            >>> answer.completed(), answer["low"], answer["high"]  # doctest: +SKIP
        """
        with stage("imports"):
            from elbowroom.queries.impute import impute

        return impute.ask(
            self, data, hidden=hide, of=of, references=references, level=level, samples=samples, draws=draws,
            keep=keep, seed=seed, device=device, report=report, out=None if out is None else Path(out), resume=resume,
        )  # fmt: skip

    def condition(self, known: Mapping[str, Any], *, of: Sequence[str] | None = None, **options: Any) -> Imputed:
        """Say what the columns of a table are like given some of them: p(x_others | x_known), for one row.

        Args:
            known: column -> value; covariates and exposure of a conditional model must be among them.
            of: the columns asked about; all others by default.
            options: as in `impute`.

        Raises:
            UserError: a column does not exist, or has no such level.

        Example:
            >>> run.condition({"age": 40, "education": "Bachelors"}, of=["income"]).frame()  # doctest: +SKIP
        """
        with stage("imports"):
            from elbowroom.queries.impute import impute

        return impute.condition(self, known, of, **options)

    @as_specified
    def sample(
        self,
        n: int | None = None,
        *,
        source: Literal["prior", "aggregate"] = "prior",
        covariates: Any = None,
        given: Mapping[str, Any] | None = None,
        test: bool | int = True,
        interpolate: Sequence[int] | None = None,
        steps: int = 9,
        data: Any = None,
        level: float = 0.9,
        samples: int = 2,
        references: Literal["auto"] | Sequence[str | Reference] = "auto",
        draws: int = 1_000,
        keep: int = 1_000,
        seed: int | None = None,
        device: str | None = None,
        report: Report | None = None,
        out: str | Path | None = None,
        resume: bool = False,
    ) -> Answer:
        """Generate: draws of (z, x) from the joint; between two rows; or posterior predictive reconstructions of rows.

        Args:
            n: draws, 100 by default; with `data` the first so many rows.
            source: where z comes from: `prior`, or `aggregate`: q(z|x) at random training rows.
            covariates: of a conditional model: a file, a frame, an array (m, C), or `training`, those of training rows. The
                aggregate's are those of its rows by default.
            given: covariate or exposure -> one value for all draws.
            test: test draws of both sources against held-out data (`auc`, `p_value`); or how many rows to use, at most.
            interpolate: two rows (of `data`, or of the test split): points between their posterior means.
            steps: points of an interpolation.
            data: rows to reconstruct, or to interpolate between: as in `encode`, or `train`, `validation`, `test`.
            level: of the intervals of reconstructions.
            samples: draws per row that reconstructions hold.
            references: as in `encode`: what posteriors of rows come from.
            draws: draws per row behind k-hat and importance weights.
            keep: draws per row behind means and intervals.
            seed: random seed; the run's by default.
            device: where to compute.
            report: called as report(rows done, rows in all).
            out: the file that the answer will be saved to; see `resume`.
            resume: go on from the rows that lie beside `out`.

        Returns:
            Over `sample`: z, x and mean = E[x|z]; over `source` (prior, aggregate): auc, auc_se, p_value of the tests. Its
            `frame()` looks like the data, text as text. Reconstructions: as `impute` gives missing cells, here of all cells.

        Raises:
            UserError: an unknown source, no such row, covariates that are missing or that the model has not.

        Example:
            >>> run.sample(1_000).frame(), run.sample(5, given={"age": 40})["x"]  # doctest: +SKIP
        """
        with stage("imports"):
            from elbowroom.queries.sample import sample

        return sample.ask(
            self, n, source=source, interpolate=interpolate, steps=steps, data=data, covariates=covariates,
            given=given, test=test, level=level, samples=samples, references=references, draws=draws, keep=keep, seed=seed,
            device=device, report=report, out=None if out is None else Path(out), resume=resume,
        )  # fmt: skip

    @as_specified
    def explain(
        self,
        data: Any = None,
        datum: int | None = None,
        *,
        latents: Sequence[int] | None = None,
        others: Literal["prior", "aggregate"] = "prior",
        given: Mapping[str, Any] | None = None,
        points: int = 13,
        steps: int = 11,
        draws: int = 400,
        references: Literal["auto"] | Sequence[str | Reference] = "auto",
        seed: int | None = None,
        device: str | None = None,
    ) -> Answer:
        """Say what each latent does: E[x|z] as z moves, by how much, and which latents matter.

        Args:
            data: rows behind rates and the aggregate posterior, as in `encode`; by default the test split, or `train`, ...
            datum: a row of them that traversals start at: the posterior mean of its z; by default the prior's median.
            latents: one or two latents for the plane; by default those with the highest rate.
            others: where effect curves draw the other latents from: `prior` or `aggregate`.
            given: covariates and exposure that E[x|z] is given at; by default their mean over the rows, or the datum's.
            points: per side of the plane.
            steps: values of a latent in traversals and effect curves, at prior quantiles.
            draws: of the other latents, behind an effect curve.
            references: as in `encode`: what the posterior of the datum comes from.
            seed: random seed; the run's by default.
            device: where to compute.

        Returns:
            `plane` (row, column, *event) at z_row, z_column; `traversal` (latent, step, *event) at traversal_z; rate and reach
            (latent), sensitivity (coordinate); of tables `effect` with its error, `effect_low` and `effect_high` (latent, step,
            cell) at effect_z; of discrete latents `state_x` (state, *event) with state_prior, state_use and state_guide.

        Raises:
            UserError: there is no such row or latent, or an unknown source.

        Example:
            >>> run.explain(datum=14).figures["traversals"]  # doctest: +SKIP
        """
        with stage("imports"):
            from elbowroom.queries.explain import explain

        return explain(
            self, data, datum=datum, latents=latents, others=others, given=given, points=points, steps=steps,
            draws=draws, references=references, seed=seed, device=device,
        )  # fmt: skip

    @as_specified
    def integrate(
        self,
        data: Any = None,
        datum: int | None = None,
        *,
        samples: int = 10_000,
        repeats: int = 20,
        temperatures: int = 30,
        methods: Sequence[str] = ("prior", "encoder", "refit", "ais"),
        references: Literal["auto"] | Sequence[str | Reference] = "auto",
        seed: int | None = None,
        device: str | None = None,
    ) -> Answer:
        """Integrate p(x) of one row by several methods with more and more samples, beside the exact value.

        Args:
            data: a file, an array, a tensor or a frame; by default the run's own test split.
            datum: the number of the row; by default the first.
            samples: evaluations of p(x, z) behind the largest estimate.
            repeats: how often that is made, for the bands.
            temperatures: of annealed importance sampling.
            methods: some of prior (naive Monte Carlo), encoder, refit, ais.
            references: what log p(x) is compared with, as in `encode`.
            seed: random seed; the run's by default.
            device: where to compute.

        Returns:
            Over (estimator, size): evaluations, estimate, low, high, off, ...; see `analysis.integration.integrate`. Its figure
            is `answer.figures["integration"]`.

        Raises:
            UserError: there is no such row, no continuous latent, or a method is unknown.
        """
        with stage("imports"):
            from elbowroom.queries.integrate import integrate

        options: dict[str, Any] = {"samples": samples, "repeats": repeats, "temperatures": temperatures}
        options |= {"methods": tuple(methods), "references": references}
        return integrate(self, data, datum, seed=seed, device=device, **options)
