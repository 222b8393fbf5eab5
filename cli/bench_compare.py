"""`infopt bench compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infopt.cli import options as opt

if TYPE_CHECKING:
    from infopt.cli.screen import Screen
    from infopt.core.reports.compare import CompareReport

ROUNDS = 5


def compare(
    sides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[A B] [-- BENCH OPTIONS]",
            help="Two benches: report.json, its folder, or a folder of several such folders. With "
            "--run two targets, each a URL or a model, and the options of their benches.",
            show_default=False,
        ),
    ] = None,
    a: Annotated[
        list[Path] | None,
        typer.Option("--a", metavar="PATH", help="A run of side A; once for each of several."),
    ] = None,
    b: Annotated[
        list[Path] | None,
        typer.Option("--b", metavar="PATH", help="A run of side B, in the same order."),
    ] = None,
    run: Annotated[
        bool,
        typer.Option("--run", help="Bench A and B in turn, A B A B, into --output; then compare."),
    ] = False,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", help="Benches of each with --run.", show_default="5", min=1),
    ] = None,
    threshold: Annotated[
        str, typer.Option("--threshold", help="Share by which a figure may differ.")
    ] = "5%",
    fail_on_regression: Annotated[
        bool, typer.Option("--fail-on-regression", help="Exit 1 if B is worse in any figure.")
    ] = False,
    level: Annotated[
        int | None,
        typer.Option("--level", help="Of a sweep.", show_default="the report's own", min=0),
    ] = None,
    resamples: Annotated[
        int | None,
        typer.Option(
            "--resamples",
            help="Of the block bootstrap.",
            show_default="2000",
            min=200,
            max=100_000,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Compare invalid runs, unlike loads and requests without partners too; the report "
            "says so.",
        ),
    ] = False,
    output: opt.ReportOutput = None,
    seed: opt.Seed = None,
    json: opt.Json = None,
    quiet: opt.Quiet = False,
    yes: opt.Yes = False,
) -> None:
    """Say whether B differs from A: ratios with 95% intervals.

    Needs the requests.jsonl of each bench. A figure is worse or better only if its whole interval
    lies beyond the threshold; the intervals of all figures hold jointly with 95%.
    Exit codes: 0 done, 1 B is worse (--fail-on-regression) or a bench failed, 2 unusable input.

    Example: infopt bench compare before after --fail-on-regression

    Example: infopt bench compare --run URL_A URL_B -o ab -- --requests 200 --concurrency 8
    """
    from infopt.cli.bench_rounds import bench_rounds, chosen_paths, chosen_targets
    from infopt.cli.screen import Screen
    from infopt.cli.verb import check_json_target, check_report_folder, keep, show
    from infopt.core.bench.check_keys import parse_share
    from infopt.core.errors import GateError, UsageError

    share = parse_share(threshold, "--threshold")
    check_json_target(json)
    check_report_folder(output, replace=yes)
    words, paths = sides or [], (a or [], b or [])
    if rounds is not None and not run:
        raise UsageError("--rounds is for --run", "leave it out, or let --run bench both")
    with Screen(quiet=quiet, json_on_stdout=json == "-") as screen:
        if run:
            targets, more = chosen_targets(words, paths)
            found = bench_rounds(
                targets, more, rounds or ROUNDS, output, replace=yes, progress=screen.progress
            )
        else:
            found = chosen_paths(words, paths)
        report = _compared(
            screen, *found, share, resamples=resamples, seed=seed, level=level, force=force
        )
        keep(report, output)
        show(screen, report, json)
    worse = [metric.key for metric in report.metrics if metric.verdict == "worse"]
    if fail_on_regression and worse:
        raise GateError(f"B is worse by more than {share:.3g} of A in {', '.join(worse)}")


def _compared(
    screen: "Screen",
    a: list[Path],
    b: list[Path],
    threshold: float,
    *,
    resamples: int | None,
    seed: int | None,
    level: int | None,
    force: bool,
) -> "CompareReport":
    import sys
    import time
    from datetime import UTC, datetime

    from infopt.core.bench.compare import RESAMPLES
    from infopt.core.bench.compare import compare as door
    from infopt.core.bench.compare_inputs import read_run
    from infopt.core.errors import UsageError
    from infopt.core.reports.environment import making

    if seed is not None and seed < 0:
        raise UsageError(f"--seed {seed} is below 0", "0 or more")
    began, started = datetime.now(UTC), time.perf_counter()
    report = door(
        [read_run(path, level) for path in a],
        [read_run(path, level) for path in b],
        threshold=threshold,
        resamples=resamples or RESAMPLES,
        seed=seed or 0,
        level=level,
        force=force,
        progress=screen.progress,
    )
    settings = {
        "a": [str(path) for path in a],
        "b": [str(path) for path in b],
        "threshold": threshold,
        "resamples": report.resamples,
        "level": level,
        "force": force,
        "seed": report.seed,
    }
    seconds = time.perf_counter() - started
    made = making(
        argv=tuple(sys.argv), settings=settings, created=began, seconds=seconds, device="cpu"
    )
    return report.model_copy(update={"made": made})
