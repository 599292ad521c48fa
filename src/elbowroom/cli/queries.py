"""The commands that put a fitted model to use: encode, and so on. Each is a question, and its answer with its error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from elbowroom.cli.terminal import AllowPython, Device, Json, RunArg, finish, profiled, screen
from elbowroom.system.stages import into, stage

if TYPE_CHECKING:
    from elbowroom.queries.answer import Answer
    from elbowroom.run import Run

DataArg = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DATA]", help="the rows (.npz, .npy, .csv, .parquet) [default: the run's test split]", show_default=False
    ),
]
OutFile = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="FILE", help="where to (.nc, .csv, .parquet, .npz) [default: RUN/answers/<question>-<data>.nc, .csv]"
    ),
]
Again = Annotated[bool, typer.Option("--overwrite", help="replace the answer that is there")]
GoOn = Annotated[bool, typer.Option("--resume", help="go on from the rows that are done")]
References = Annotated[
    str | None,
    typer.Option(
        "--references",
        metavar="NAMES",
        help="auto; or such as grid,importance,hmc; or none: the encoder's own draws, reweighted (fast)",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, max=2**31 - 1, help="random seed [default: the run's]")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(profiled(encode))
    app.command()(profiled(score))
    app.command()(profiled(impute))
    app.command()(profiled(integrate))
    app.command()(profiled(sample))
    app.command()(profiled(explain))


def encode(
    run: RunArg,
    data: DataArg = None,
    out: OutFile = None,
    overwrite: Again = False,
    resume: GoOn = False,
    references: References = None,
    samples: Annotated[int, typer.Option("--samples", min=0, help="draws of the corrected posterior per row, too")] = 0,
    draws: Annotated[int, typer.Option("--draws", min=100, help="draws per row behind ELBO and k-hat")] = 1_000,
    keep: Annotated[int, typer.Option("--keep", min=100, help="draws per row behind the quantiles")] = 400,
    seed: Seed = None,
    as_json: Json = False,
    device: Device = None,
    allow_python: AllowPython = False,
) -> None:
    """Say what the encoder makes of each row (mu, sigma), and the corrected posterior beside it, with k-hat and status."""
    fitted = _open(run, allow_python)
    with answering(fitted, "encode", data, out, overwrite=overwrite, resume=resume, as_json=as_json) as (target, report):
        answer = fitted.encode(
            data, references=_references(references), samples=samples, draws=draws, keep=keep, seed=seed, device=device,
            report=report, out=target, resume=resume,
        )  # fmt: skip
        done(answer, target, out, as_json)


def score(
    run: RunArg,
    data: DataArg = None,
    out: OutFile = None,
    overwrite: Again = False,
    resume: GoOn = False,
    references: References = None,
    band: Annotated[str, typer.Option("--band", metavar="A-B", help="percentiles that rows are expected between")] = "2.5-97.5",
    fdr: Annotated[float, typer.Option("--fdr", help="share of valid rows allowed among the flagged")] = 0.1,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", metavar="FILE", help="valid rows that the fit has not seen [default: the validation split]"
        ),
    ] = None,
    most: Annotated[int, typer.Option("--most", help="calibration rows, at most")] = 2_000,
    simulated: Annotated[int, typer.Option("--simulated", help="rows drawn from the model to compare with; 0 for none")] = 500,
    holes: Annotated[
        str, typer.Option("--holes", metavar="KIND", help="compare rows with the same holes (pattern), or as many (count)")
    ] = "pattern",
    gaps: Annotated[bool, typer.Option("--gaps", help="the amortization gap of every row, too (slow)")] = False,
    draws: Annotated[int, typer.Option("--draws", min=100, help="draws per row behind ELBO and k-hat")] = 1_000,
    seed: Seed = None,
    as_json: Json = False,
    device: Device = None,
    allow_python: AllowPython = False,
) -> None:
    """Give log p(x) of each row with its error, and say which rows are unlike those that the model was fitted to."""
    fitted = _open(run, allow_python)
    with answering(fitted, "score", data, out, overwrite=overwrite, resume=resume, as_json=as_json) as (target, report):
        answer = fitted.score(
            data, references=_references(references), band=band, fdr=fdr, calibration=calibration, most=most,
            simulated=simulated, holes=cast(Any, holes), gaps=gaps, draws=draws, seed=seed, device=device, report=report,
            out=target, resume=resume,
        )  # fmt: skip
        from elbowroom.queries.score.conclusions import counts

        done(answer, target, out, as_json, decisions=counts(answer.dataset))


def impute(
    run: RunArg,
    data: DataArg = None,
    out: OutFile = None,
    overwrite: Again = False,
    resume: GoOn = False,
    hide: Annotated[
        str | None,
        typer.Option(
            "--hide", metavar="CELLS", help="hide known cells and score them: COLUMN,..., 20%, or left, right, top, bottom"
        ),
    ] = None,
    level: Annotated[float, typer.Option("--level", help="probability of the intervals")] = 0.9,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="completed rows, too: so many draws of all holes together")
    ] = 0,
    references: References = None,
    draws: Annotated[int, typer.Option("--draws", min=100, help="draws per row behind k-hat and importance weights")] = 1_000,
    keep: Annotated[int, typer.Option("--keep", min=100, help="draws per row behind means and intervals")] = 1_000,
    seed: Seed = None,
    as_json: Json = False,
    device: Device = None,
    allow_python: AllowPython = False,
) -> None:
    """Fill the holes of a table, an image, a sequence: mean, interval and probabilities of each missing cell."""
    fitted = _open(run, allow_python)
    with answering(fitted, "impute", data, out, overwrite=overwrite, resume=resume, as_json=as_json) as (target, report):
        answer = fitted.impute(
            data, hide=hide, level=level, samples=samples, references=_references(references), draws=draws, keep=keep,
            seed=seed, device=device, report=report, out=target, resume=resume,
        )  # fmt: skip
        done(answer, target, out, as_json, also=[answer.save_completed(target)])


def integrate(
    run: RunArg,
    data: DataArg = None,
    datum: Annotated[int | None, typer.Option("--datum", help="the row [default: the first]")] = None,
    out: OutFile = None,
    overwrite: Again = False,
    samples: Annotated[int, typer.Option("--samples", min=10, help="evaluations behind the largest estimate")] = 10_000,
    repeats: Annotated[int, typer.Option("--repeats", min=5, help="estimates of that size, for the bands")] = 20,
    temperatures: Annotated[int, typer.Option("--temperatures", min=2, help="of annealed importance sampling")] = 30,
    methods: Annotated[
        str, typer.Option("--methods", metavar="NAMES", help="some of prior,encoder,refit,ais")
    ] = "prior,encoder,refit,ais",
    references: References = None,
    seed: Seed = None,
    as_json: Json = False,
    device: Device = None,
    allow_python: AllowPython = False,
) -> None:
    """Show how p(x) of one row can be integrated: naive Monte Carlo, the encoder, a refitted normal, annealing, exactly."""
    fitted = _open(run, allow_python)
    name = "integrate" if datum is None else f"integrate-{datum}"
    with answering(fitted, name, data, out, overwrite=overwrite, resume=False, as_json=True) as (target, _):
        answer = fitted.integrate(
            data, datum, samples=samples, repeats=repeats, temperatures=temperatures, methods=_names(methods),
            references=_references(references), seed=seed, device=device,
        )  # fmt: skip
        done(answer, target, out, as_json)


def sample(
    run: RunArg,
    n: Annotated[int | None, typer.Option("--n", help="draws [default: 100, or one per row of --covariates]")] = None,
    source: Annotated[str, typer.Option("--from", metavar="SOURCE", help="where z comes from: prior or aggregate")] = "prior",
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="reconstruct these rows; or train, validation, test", show_default=False),
    ] = None,
    interpolate: Annotated[
        tuple[int, int] | None, typer.Option("--interpolate", metavar="I J", help="from row I to row J", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="points of an interpolation")] = 9,
    covariates: Annotated[
        str | None, typer.Option("--covariates", metavar="FILE", help="of a conditional model: a table, or training")
    ] = None,
    given: Annotated[
        list[str] | None, typer.Option("--given", metavar="NAME=VALUE", help="one covariate or the exposure, for all draws")
    ] = None,
    test: Annotated[bool, typer.Option("--test/--no-test", help="test draws against held-out data")] = True,
    level: Annotated[float, typer.Option("--level", help="probability of the intervals of reconstructions")] = 0.9,
    samples: Annotated[int, typer.Option("--samples", min=0, help="draws per reconstructed row")] = 2,
    out: OutFile = None,
    overwrite: Again = False,
    resume: GoOn = False,
    references: References = None,
    draws: Annotated[int, typer.Option("--draws", min=100, help="draws per row behind k-hat")] = 1_000,
    keep: Annotated[int, typer.Option("--keep", min=100, help="draws per row behind means and intervals")] = 1_000,
    seed: Seed = None,
    as_json: Json = False,
    device: Device = None,
    allow_python: AllowPython = False,
) -> None:
    """Generate: draws from the model, between two rows, or reconstructions of rows; and test whether they pass for data."""
    fitted = _open(run, allow_python)
    name = "sample" if source == "prior" else f"sample-{source}"
    name += "" if interpolate is None else f"-{interpolate[0]}-{interpolate[1]}"
    quiet = as_json or data is None or interpolate is not None  # a bar counts rows
    with answering(fitted, name, data, out, overwrite=overwrite, resume=resume, as_json=quiet) as (target, report):
        answer = fitted.sample(
            n, source=cast(Any, source), covariates=covariates, given=_values(given or []), test=test, interpolate=interpolate,
            steps=steps, data=None if data is None else str(data), level=level, samples=samples,
            references=_references(references), draws=draws, keep=keep, seed=seed, device=device, report=report, out=target,
            resume=resume,
        )  # fmt: skip
        done(answer, target, out, as_json, also=[answer.save(target.with_suffix(".npz"))] if out is None else [])


def explain(
    run: RunArg,
    data: DataArg = None,
    datum: Annotated[
        int | None, typer.Option("--datum", help="the row that traversals start at [default: the prior's median]")
    ] = None,
    latents: Annotated[
        tuple[int, int] | None,
        typer.Option("--latents", metavar="I J", help="of the plane [default: those of the highest rate]"),
    ] = None,
    others: Annotated[
        str, typer.Option("--others", metavar="SOURCE", help="other latents of effect curves: prior or aggregate")
    ] = "prior",
    given: Annotated[
        list[str] | None,
        typer.Option("--given", metavar="NAME=VALUE", help="covariates and exposure, all of them [default: their means]"),
    ] = None,
    points: Annotated[int, typer.Option("--points", help="per side of the plane")] = 13,
    steps: Annotated[int, typer.Option("--steps", help="values of a latent in traversals and effect curves")] = 11,
    draws: Annotated[int, typer.Option("--draws", help="of the other latents, behind an effect curve")] = 400,
    out: OutFile = None,
    overwrite: Again = False,
    references: References = None,
    seed: Seed = None,
    as_json: Json = False,
    device: Device = None,
    allow_python: AllowPython = False,
) -> None:
    """Say what each latent does: E[x|z] over a plane, along each latent, in each state; and which latents matter."""
    fitted = _open(run, allow_python)
    name = "explain" if datum is None else f"explain-{datum}"
    with answering(fitted, name, data, out, overwrite=overwrite, resume=False, as_json=True) as (target, _):
        answer = fitted.explain(
            None if data is None else str(data), datum, latents=latents, others=cast(Any, others), given=_values(given or []),
            points=points, steps=steps, draws=draws, references=_references(references), seed=seed, device=device,
        )  # fmt: skip
        done(answer, target, out, as_json)


def _values(given: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE, a number where it looks like one."""
    from elbowroom.errors import SpecError

    found: dict[str, Any] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise SpecError(f"--given {text}: write NAME=VALUE, such as --given age=40")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            found[name.strip()] = value.strip()
    return found


def _names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",") if name.strip()]


def _open(run: Path, allow_python: bool) -> Run:
    with stage("imports"):
        from elbowroom.run import Run

    return Run.load(run, allow_python=allow_python)


def _references(given: str | None) -> Any:
    if given is None or given == "auto":
        return "auto"
    return [] if given == "none" else _names(given)


def target_of(run: Run, question: str, data: Path | None, out: Path | None, suffix: str = ".nc") -> Path:
    """Return the file that an answer goes to: `RUN/answers/<question>-<data>.nc`, or what the user named."""
    from elbowroom.queries.answer import check_suffix
    from elbowroom.spec import run_folder

    name = question if data is None else f"{question}-{run_folder.name_for(data)}"
    return check_suffix(out) if out is not None else run.path / run_folder.ANSWERS / f"{name}{suffix}"


@contextmanager
def answering(
    run: Run, question: str, data: Path | None, out: Path | None, *, overwrite: bool, resume: bool, as_json: bool
) -> Iterator[tuple[Path, Callable[[int, int], None] | None]]:
    """Check where the answer goes before anything is computed; yield the file and what shows the progress."""
    from elbowroom.errors import SpecError

    target = target_of(run, question, data, out)
    if target.exists() and not overwrite:
        raise SpecError(f"{target}: is there already; use --overwrite, or another --out")
    if overwrite and resume:
        raise SpecError("--overwrite and --resume contradict each other: one starts anew, the other goes on")
    into(run.path if out is None else target.parent)
    if as_json:
        yield target, None
        return
    from elbowroom.cli.progress import rows_bar

    with rows_bar(screen(stderr=True), question) as report:
        yield target, report


def done(answer: Answer, target: Path, out: Path | None, as_json: bool, *, also: Sequence[Path] = (), **more: Any) -> None:
    """Write an answer, and say where (`also` is written already) and what to conclude; `more` goes into the JSON."""
    from elbowroom.queries import stream

    written = [answer.save(target)]
    if out is None:
        written.append(answer.save(target.with_suffix(".csv")))
    written += [*answer.save_figures(target), *also]
    stream.finish(target)
    if not as_json:
        for sentence in answer.said:
            screen().print(sentence, highlight=False, markup=False)
        typer.echo(f"wrote {', '.join(map(str, written))}")
    finish({"files": [str(path) for path in written], "said": list(answer.said), **more}, as_json)
