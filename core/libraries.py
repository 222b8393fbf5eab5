"""Keeping other packages from talking over ours."""

import logging

# torchao, where it is installed, warns of CUDA libraries and of torch's own enums when imported.
_TALKATIVE = ("torchao", "torch.utils._pytree")


def hush() -> None:
    """Show only the errors of packages that warn of what no user can act on."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
