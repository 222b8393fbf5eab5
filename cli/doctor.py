"""`infopt doctor`."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from infopt.cli import options as opt

if TYPE_CHECKING:
    from infopt.cli.screen import Screen
    from infopt.core.hardware.probe import Machine
    from infopt.core.reports.doctor import DefaultModel, DoctorReport, Finding
    from infopt.core.reports.schema import Making

# The package that tells whether an extra is installed, and what it is for.
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "serve": (("fastapi", "uvicorn", "zmq", "msgpack", "prometheus_client"), "infopt serve"),
    "otel": (("opentelemetry.sdk", "opentelemetry.exporter"), "infopt serve --otlp-endpoint"),
    "triton": (("triton",), "GPU kernels"),
    "compat": (
        ("gptqmodel", "optimum", "compressed_tensors", "bitsandbytes"),
        "checking that our files load elsewhere",
    ),
    "eval": (("lm_eval",), "lm-eval tasks"),
    "ray": (("ray",), "replicas on Ray Serve"),
    "bench": (("guidellm",), "the peers' load generators"),
}


def doctor(json: opt.Json = None, quiet: opt.Quiet = False) -> None:
    """Show what this machine offers, and what to install.

    Example: infopt doctor --json -
    """
    from infopt.cli.screen import Screen
    from infopt.cli.verb import check_json_target, show

    check_json_target(json)
    with Screen(quiet=quiet, json_on_stdout=json == "-") as screen:
        show(screen, examine(screen), json)


def examine(screen: "Screen") -> "DoctorReport":
    """Look at the machine, the packages and the default model."""
    from infopt.core.files import cache_directory
    from infopt.core.hardware.choose import choose_device, choose_dtype
    from infopt.core.hardware.probe import probe
    from infopt.core.reports.doctor import DoctorReport

    machine = probe()
    device = choose_device("auto")
    return DoctorReport(
        provenance={},
        default_model=_default_model(screen),
        cache=str(cache_directory()),
        device=device,
        dtype=choose_dtype("auto", device),
        findings=(*_machine(machine), _torch(), _native(), *_extras()),
        made=_making(),
    )


def _making() -> "Making":
    import sys
    from datetime import UTC, datetime

    from infopt.core.reports.environment import making

    return making(
        argv=tuple(sys.argv), settings={}, created=datetime.now(UTC), seconds=0.0, device="auto"
    )


def _default_model(screen: "Screen") -> "DefaultModel":
    from infopt.core.artifact.locate import locate
    from infopt.core.errors import InfoptError
    from infopt.core.reports.doctor import DefaultModel

    try:
        artifact = locate(None, progress=screen.progress)
    except InfoptError as error:
        return DefaultModel(path=None, name="default", error=str(error))
    return DefaultModel(path=str(artifact.path), name=artifact.name)


def _machine(machine: "Machine") -> list["Finding"]:
    from infopt.core.reports.doctor import Finding
    from infopt.core.reports.words import size

    isa = ", ".join(machine.isa) or "no vector instructions known"
    rows = [
        Finding(
            name="cpu", usable=True, detail=f"{machine.cpu}, {machine.physical_cores} cores: {isa}"
        ),
        Finding(
            name="memory",
            usable=True,
            detail=f"{size(machine.memory_available_bytes)} free "
            f"of {size(machine.memory_total_bytes)}",
        ),
    ]
    gpus = [f"{gpu.name}, {size(gpu.memory_bytes)}, driver {gpu.driver}" for gpu in machine.gpus]
    rows.append(
        Finding(
            name="gpu",
            usable=bool(gpus),
            detail="; ".join(gpus) or "no NVIDIA GPU: the CPU is used",
        )
    )
    return rows


def _torch() -> "Finding":
    from infopt.core.reports.doctor import Finding
    from infopt.core.reports.environment import installed

    versions = installed(("torch", "transformers", "safetensors", "tokenizers"))
    return Finding(
        name="packages",
        usable="torch" in versions and "transformers" in versions,
        detail=", ".join(f"{name} {number}" for name, number in versions.items()),
        advice=None if len(versions) == 4 else "pip install infopt",
    )


def _native() -> "Finding":
    from infopt.core.errors import InfoptError
    from infopt.core.hardware.native import native_state
    from infopt.core.reports.doctor import Finding

    try:
        state, usable = native_state()
    except InfoptError as error:
        return Finding(name="kernels", usable=False, detail=error.message, advice=error.hint)
    advice = None if usable else "install a C++ compiler, then infopt anew"
    return Finding(name="kernels", usable=usable, detail=state, advice=advice)


def _extras() -> list["Finding"]:
    from infopt.core.reports.doctor import Finding

    rows = []
    for extra, (modules, purpose) in EXTRAS.items():
        missing = [module for module in modules if not _is_there(module)]
        rows.append(
            Finding(
                name=f"extra {extra}",
                usable=not missing,
                detail=purpose if not missing else f"{purpose}: without {', '.join(missing)}",
                advice=f"pip install 'infopt[{extra}]'" if missing else None,
            )
        )
    return rows


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False
