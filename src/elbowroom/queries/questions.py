"""Questions to a fitted model, as methods of `Run`: numpy, torch or pandas in, the same out.

Each returns an `Answer`, and writes nothing; `Answer.save` does. `elbowroom encode`, ... are the same from the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from elbowroom.components.signatures import shared_docs
from elbowroom.runs.as_specified import as_specified
from elbowroom.system.stages import stage

if TYPE_CHECKING:
    from elbowroom.inference.posterior import Reference
    from elbowroom.queries.answer import Answer
    from elbowroom.queries.impute.answer import Imputed
    from elbowroom.queries.stream import Report
    from elbowroom.runs.fitted import FittedModel
else:  # the command line reads these signatures, and their modules would import torch; a `Run` is a `FittedModel`
    FittedModel = Reference = Report = object


@shared_docs
class Questions(FittedModel):
    """The questions: methods of every `Run`, and commands. What their options say here, they say of every question.

    Args:
        data: the rows (.npz, .npy, .csv, .tsv, .parquet); the run's test split by default. From Python also an array
            (n, *event), a tensor or a frame.
        references: auto, or names such as grid,importance,hmc, or none: the encoder's own draws, reweighted (fast). `auto` is
            exact where there are closed forms, finitely many states or at most three latents; else importance sampling from
            the Laplace approximation, and from the refitted normal where that does not suffice. From Python also a list of
            names, or of references.
        draws: draws per row behind ELBO, k-hat and importance weights.
        keep: draws per row behind means, quantiles and intervals.
        level: probability of the intervals.
        seed: random seed; the run's by default.
        device: where to compute: auto, cpu, cuda or cuda:1; by default where the spec says.
        report: called as report(rows done, rows in all).
        out: the file that the answer goes to (.nc, .csv, .parquet, .npz). It is written by `Answer.save`; finished chunks are
            kept beside it until then.
        resume: go on from the rows that are done. They lie beside `out`.
        budget: time that the answer may take: 90s, 10m, 1h; no limit by default. Rows that are not reached in time have the
            encoder's own numbers, and their reason says so.
        dry_run: check everything, say how long it will take, write nothing. The answer has no rows then.
    """

    @as_specified
    def encode(
        self,
        data: Any = None,
        *,
        references: str | Reference | Sequence[str | Reference] = "auto",
        samples: int = 0,
        draws: int = 1_000,
        keep: int = 400,
        seed: int | None = None,
        device: str | None = None,
        report: Report | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        budget: float | str | None = None,
        dry_run: bool = False,
    ) -> Answer:
        """Say what the encoder makes of each row (mu, sigma), and the corrected posterior beside it, with k-hat and status.

        Args:
            samples: draws of the corrected posterior per row, too. The answer calls them `draws`.

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
            out=None if out is None else Path(out), resume=resume, budget=budget,
            dry_run=dry_run,
        )  # fmt: skip

    @as_specified
    def score(
        self,
        data: Any = None,
        *,
        references: str | Reference | Sequence[str | Reference] = "auto",
        band: str | Sequence[float] = "2.5-97.5",
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
        budget: float | str | None = None,
        dry_run: bool = False,
    ) -> Answer:
        """Give log p(x) of each row with its error, and say which rows are unlike those that the model was fitted to.

        The scores of the calibration rows are kept in `answers/` of the run folder, so that a second question is quicker.

        Args:
            band: percentiles of the calibration rows that rows are expected between. Their level is that of p-values too.
            fdr: share of valid rows allowed among the flagged. They are flagged over all rows, by adjusted p-values.
            calibration: valid rows that the fit has not seen; the validation split by default. (It has chosen the epoch of the
                weights: a slight breach of the rule.) A file, an array or a frame.
            most: calibration rows, at most.
            simulated: rows drawn from the model to compare with; 0 for none. At most as many as calibration rows; they give
                `p_model`.
            holes: compare rows with the same holes (pattern), or as many (count).
            gaps: the amortization gap of every row, too (slow). The guide's family is refitted to each.

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
            out=None if out is None else Path(out), resume=resume, budget=budget,
            dry_run=dry_run,
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
        references: str | Reference | Sequence[str | Reference] = "auto",
        draws: int = 1_000,
        keep: int = 1_000,
        seed: int | None = None,
        device: str | None = None,
        report: Report | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        budget: float | str | None = None,
        dry_run: bool = False,
    ) -> Imputed:
        """Fill the holes of a table, an image, a sequence: mean, interval and probabilities of each missing cell.

        They are those of p(x_missing | x_observed), with the encoder's own answer beside it. Missing are NaN, None, empty cells
        and masked entries, in any pattern. A row of which nothing is observed gets the model's marginal. Steps after the end of
        a sequence are padding, and are not imputed.

        Args:
            hide: hide known cells and score them: columns (A,B,...), a share (20%), or left, right, top, bottom. The last four
                are halves of images; from Python also truth values, (*event) or (n, *event).
            of: the columns to impute; all by default.
            samples: completed rows, too: so many draws of all holes together. The answer calls them `samples`.

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
            budget=budget, dry_run=dry_run,
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
        references: str | Reference | Sequence[str | Reference] = "auto",
        draws: int = 1_000,
        keep: int = 1_000,
        seed: int | None = None,
        device: str | None = None,
        report: Report | None = None,
        out: str | Path | None = None,
        resume: bool = False,
    ) -> Answer:
        """Generate: draws from the model, between two rows, or reconstructions of rows; and test whether they pass for data.

        Args:
            n: draws; 100 by default, or one per row of the covariates. With `data` the first so many rows.
            source: where z comes from: prior or aggregate. The latter is q(z|x) at random training rows.
            covariates: of a conditional model: a table, or training. From Python also a frame or an array (m, C); `training`
                are those of training rows. The aggregate's are those of its rows by default.
            given: one covariate or the exposure, for all draws.
            test: test draws against held-out data. Draws of both sources (`auc`, `p_value`); or how many rows to use, at most.
            interpolate: points between the posterior means of two rows, of `data` or of the test split; on a sphere on a great
                circle.
            steps: points of an interpolation.
            data: rows to reconstruct or to interpolate between; or train, validation, test.
            samples: draws per reconstructed row.

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
        references: str | Reference | Sequence[str | Reference] = "auto",
        seed: int | None = None,
        device: str | None = None,
    ) -> Answer:
        """Say what each latent does: E[x|z] over a plane, along each latent, in each state; and which latents matter.

        Args:
            data: rows behind rates and the aggregate posterior; or train, validation, test; the run's test split by default.
            datum: the row that traversals start at; the prior's median by default. They start at its posterior mean.
            latents: of the plane; by default those of the highest rate. From Python one or two.
            others: where effect curves draw the other latents from: prior or aggregate.
            given: covariates and exposure, all of them; by default their means over the rows, or the datum's.
            points: per side of the plane.
            steps: values of a latent in traversals and effect curves. They stand at prior quantiles.
            draws: of the other latents, behind an effect curve.

        Returns:
            `plane` (row, column, *event) at z_row, z_column (on a sphere: by the angle in degrees); `traversal` (latent, step,
            *event) at traversal_z; rate and reach (latent), sensitivity (coordinate); of tables `effect` with its error,
            `effect_low` and `effect_high` (latent, step, cell) at effect_z; of discrete latents `state_x` (state, *event) with
            state_prior, state_use and state_guide.

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
        references: str | Reference | Sequence[str | Reference] = "auto",
        seed: int | None = None,
        device: str | None = None,
    ) -> Answer:
        """Show how p(x) of one row can be integrated: naive Monte Carlo, the encoder, a refitted normal, annealing, exactly.

        Each method takes more and more samples; what they are compared with, the exact value, comes from `references`.

        Args:
            datum: the row; the first by default.
            samples: evaluations of p(x, z) behind the largest estimate.
            repeats: estimates of that size, for the bands.
            temperatures: of annealed importance sampling.
            methods: some of prior,encoder,refit,ais. `prior` is naive Monte Carlo.

        Returns:
            Over (estimator, size): evaluations, estimate, low, high, off, ...; see
            `analysis.queries.integration.integrate`. Its figure is `answer.figures["integration"]`.

        Raises:
            UserError: there is no such row, no continuous latent, or a method is unknown.
        """
        with stage("imports"):
            from elbowroom.queries.integrate import integrate

        options: dict[str, Any] = {"samples": samples, "repeats": repeats, "temperatures": temperatures}
        options |= {"methods": tuple(methods), "references": references}
        return integrate(self, data, datum, seed=seed, device=device, **options)
