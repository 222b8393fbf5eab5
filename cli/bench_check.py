"""`infopt bench check`."""

from pathlib import Path
from typing import Annotated

import typer

from infopt.cli import options as opt


def check(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A report.json of infopt bench, or its folder."),
    ],
    most: Annotated[
        list[str] | None,
        typer.Option("--max", metavar="KEY=VALUE", help="No more than, such as ttft_s.p95=200ms."),
    ] = None,
    least: Annotated[
        list[str] | None,
        typer.Option("--min", metavar="KEY=VALUE", help="No less than, such as goodput=5."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", metavar="FILE", help="A stored report of the same load."),
    ] = None,
    max_regression: Annotated[
        list[str] | None,
        typer.Option(
            "--max-regression",
            metavar="[KEY=]SHARE",
            help="By which a figure may be worse than the baseline's, such as 5%; without KEY: "
            "TTFT, TPOT and end to end at p50 and p95, tokens/s, goodput.",
        ),
    ] = None,
    min_samples: Annotated[
        int | None,
        typer.Option(
            "--min-samples",
            help="Requests without which a figure is not judged.",
            show_default="p50 5, p90 29, p95 59, p99 299",
            min=1,
        ),
    ] = None,
    json: opt.Json = None,
    quiet: opt.Quiet = False,
) -> None:
    """Hold the figures of a bench against limits: a gate for CI.

    KEY is a dotted key of report.json; ttft.p95 is ttft_s.p95. Units: us, ms, s, min, k, M, %.
    Exit codes: 0 all hold, 1 a limit is missed, 2 the run or a limit cannot be used.

    Example: infopt bench check out --max ttft.p95=200ms --min output_tokens_per_s=100
    """
    from infopt.cli.screen import Screen
    from infopt.cli.verb import check_json_target, show
    from infopt.core.bench.check import check as door
    from infopt.core.bench.check import check_passed

    check_json_target(json)
    with Screen(quiet=quiet, json_on_stdout=json == "-") as screen:
        report = door(
            file,
            most=most or (),
            least=least or (),
            baseline=baseline,
            max_regression=max_regression or (),
            min_samples=min_samples,
        )
        show(screen, report, json)
        check_passed(report)
