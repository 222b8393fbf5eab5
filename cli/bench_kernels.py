"""`infopt bench kernels`."""

from typing import Annotated, Any, Literal

import typer

from infopt.cli import options as opt


def kernels(
    device: Annotated[
        Literal["cpu", "cuda"],
        typer.Option("--device", help="Whose kernels: this CPU's or an NVIDIA GPU's."),
    ] = "cpu",
    rows: Annotated[
        str | None,
        typer.Option(
            "--rows", metavar="LIST", help="Of inputs.", show_default="as the device needs"
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            "--shapes",
            metavar="LIST",
            help="Of weights, outputs x inputs.",
            show_default="as the device needs",
        ),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            "--formats",
            metavar="LIST",
            help="Such as bfloat16; of a GPU also ops and attention, by how their names begin; "
            "with --tune, kernels.",
            show_default="all",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", help="Of native kernels and torch's.", show_default="torch's"),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Time the tiles of the GPU's kernels, and keep the fastest."),
    ] = False,
    output: opt.ReportOutput = None,
    json: opt.Json = None,
    quiet: opt.Quiet = False,
    yes: opt.Yes = False,
) -> None:
    """Time the kernels of this CPU, or of a GPU, beside torch's: time, bytes, share of the limits.

    INFOPT_ISA names the set of instructions.

    Exit codes: 0 done, 1 a product differs from its reference, 2 wrong usage.

    Example: infopt bench kernels --rows 1,64 --json -

    Example: infopt bench kernels --device cuda --output kernels

    Example: infopt bench kernels --tune --formats paged_attention
    """
    import sys
    import time
    from datetime import UTC, datetime

    from infopt.cli.screen import Screen
    from infopt.cli.verb import check_json_target, check_report_folder, keep, show
    from infopt.core.bench.card_kernels import bench_card_kernels
    from infopt.core.bench.kernels import ROWS, SHAPES, bench_kernels, kernels_right
    from infopt.core.reports.environment import making

    names = [word.strip() for word in formats.split(",")] if formats else None
    if tune:
        _tune(quiet, names)
        return
    check_json_target(json)
    check_report_folder(output, replace=yes)
    settings: dict[str, Any] = {
        "rows": [_count(word) for word in rows.split(",")] if rows else ROWS,
        "shapes": [_shape(word) for word in shapes.split(",")] if shapes else SHAPES,
        "formats": names,
        "threads": threads,
    }
    with Screen(quiet=quiet, json_on_stdout=json == "-") as screen:
        began, started = datetime.now(UTC), time.perf_counter()
        if device == "cuda":
            report = bench_card_kernels(
                rows=settings["rows"] if rows else None,
                shapes=settings["shapes"] if shapes else None,
                formats=settings["formats"],
                progress=screen.progress,
            )
        else:
            report = bench_kernels(**settings, progress=screen.progress)
        seconds = time.perf_counter() - started
        made = making(
            argv=tuple(sys.argv), settings=settings, created=began, seconds=seconds, device=device
        )
        report = report.model_copy(update={"made": made})
        keep(report, output)
        show(screen, report, json)
    kernels_right(report)


def _tune(quiet: bool, names: list[str] | None) -> None:
    from infopt.cli.screen import Screen
    from infopt.core.bench.tune_tiles import tune_tiles
    from infopt.core.hardware.card import store_tiles

    with Screen(quiet=quiet) as screen:
        found = tune_tiles(screen.progress, names)
        screen.note(f"the tiles of {found.device} lie in {store_tiles(found)}")


def _count(word: str) -> int:
    from infopt.core.errors import UsageError

    if not word.strip().isdigit() or int(word) < 1:
        raise UsageError(f"{word.strip()!r} is no number of rows", "such as --rows 1,8,64")
    return int(word)


def _shape(word: str) -> tuple[int, int]:
    from infopt.core.errors import UsageError

    sides = word.strip().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides):
        raise UsageError(f"{word.strip()!r} is no shape", "such as --shapes 4096x1024")
    if int(sides[1]) % 64:
        raise UsageError(f"{word.strip()!r}: inputs must be a multiple of 64", None)
    return int(sides[0]), int(sides[1])
