"""The command `infopt`; every fault becomes one line and an exit code."""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from infopt.cli import (
    bench,
    bench_check,
    bench_compare,
    bench_kernels,
    convert,
    distill,
    doctor,
    evaluate,
    profile,
    prune,
    quantize,
    run,
    serve,
)
from infopt.cli.group import CommandGroup, Verbs
from infopt.cli.screen import plain_error, plain_line
from infopt.core.errors import InfoptError

INTERRUPTED = 130


class _Loop(Verbs):
    order = (
        "quantize",
        "prune",
        "distill",
        "convert",
        "evaluate",
        "profile",
        "serve",
        "bench",
        "run",
        "doctor",
    )


app = typer.Typer(
    name="infopt",
    cls=_Loop,
    help="Make LLM inference cheaper and faster, and know that it is.\n\n"
    "profile, compress, evaluate, serve, bench: each step writes a report. "
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
    # Rich help is for people; plain help starts twice as fast, and scripts read it.
    rich_markup_mode="rich"
    if sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    else None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer()
bench_app.callback()(bench.bench)
bench_app.command("compare")(bench_compare.compare)
bench_app.command("check")(bench_check.check)
bench_app.command("kernels")(bench_kernels.kernels)
app.command("quantize")(quantize.quantize)
app.command("prune")(prune.prune)
app.command("distill")(distill.distill)
app.command("convert")(convert.convert)
app.command("evaluate")(evaluate.evaluate)
app.command("profile")(profile.profile)
app.command("serve")(serve.serve)
app.add_typer(
    bench_app,
    name="bench",
    cls=CommandGroup,
    invoke_without_command=True,
    subcommand_metavar="| COMMAND ...",
)
app.command("run")(run.run)
app.command("doctor")(doctor.doctor)


def _print_version(asked: bool) -> None:
    if asked:
        plain_line(f"infopt {version('infopt')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def run_app(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    try:
        result = app(args=list(arguments), prog_name="infopt", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == INTERRUPTED:  # typer turns Ctrl-C into this code, silently
            plain_error("interrupted")
        return code
    except InfoptError as error:
        plain_error(str(error))
        return error.exit_code
    except typer.TyperException as error:
        return _usage(error)
    except typer.Abort:
        plain_error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; say nothing more, not even at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _unforeseen(error)


def _usage(error: typer.TyperException) -> int:
    context = getattr(error, "ctx", None)
    message = error.format_message().strip()
    if not message or message.startswith("Usage:"):  # no command: the help was asked for
        plain_line(message or (context.get_help() if context else ""))
        return error.exit_code
    path = context.command_path if context else "infopt"
    plain_error(f"{message.rstrip('.')} (see '{path} --help')")
    return error.exit_code


def _unforeseen(error: Exception) -> int:
    if os.environ.get("INFOPT_DEBUG"):
        raise error
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        plain_error(f"out of memory: {error} (try --dry-run, a smaller batch or fewer --kv-blocks)")
        return 1
    if isinstance(error, OSError):
        plain_error(str(error))
        return 1
    detail = f"{type(error).__name__}: {error}"
    plain_error(f"unforeseen fault, a bug of infopt: {detail} (INFOPT_DEBUG=1 shows where)")
    return 1
