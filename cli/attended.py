"""`python -m infopt.cli.attended VERB ...`: an infopt command that ends when its parent does.

The parent holds the other end of standard input; when that closes, by whatever death, this process
is asked to end as by SIGTERM.
"""

import os
import signal
import sys
import threading

from infopt.cli.main import run_app
from infopt.core.libraries import hush


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    hush()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(run_app(sys.argv[1:]))
