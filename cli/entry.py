"""The console script: what must be right before anything else is imported."""

import os
import sys


def main() -> None:
    """Run the command line; an interrupt while it is still being imported is one line too."""
    # A closed stream is None here, and nobody below expects that.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123
    try:
        from infopt.cli.main import run_app
        from infopt.core.libraries import hush, share_cores

        hush()
        share_cores()
        code = run_app(sys.argv[1:])
    except KeyboardInterrupt:
        sys.stderr.write("infopt: error: interrupted\n")
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
