"""Every fault that a user can meet, in one tree.

    InfoptError                 exit code 1 unless said
    ├── UsageError              the words of the request are wrong (exit code 2)
    │   └── RecipeError         ... in a recipe: the key, the file and the nearest right key
    ├── ArtifactError           a model on disk cannot be read, or is not a model
    │   └── UnsafeArtifactError ... it holds a pickle or wants to run its own code
    ├── UnsupportedError        a model, format or option that infopt does not know (yet)
    ├── MissingExtraError       a package of an optional extra is not installed
    ├── NumericsError           a weight or activation is not finite, a matrix cannot be solved
    ├── ResourceError           the disk, the memory or a port does not suffice
    ├── ResumeError             unfinished work that does not fit the request
    ├── GateError               a threshold that the user set was passed
    └── EngineError             the engine or a server failed or cannot be reached
        └── RequestFailedError  ... on one request alone; others go on

Each message is one line that says what is wrong and where; `hint` says what to do about it.
"""


class InfoptError(Exception):
    """A fault that the user can understand and act on."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(InfoptError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class ArtifactError(InfoptError):
    pass


class UnsafeArtifactError(ArtifactError):
    pass


class UnsupportedError(InfoptError):
    pass


class MissingExtraError(InfoptError):
    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package {package!r}, which is not installed",
            f"pip install 'infopt[{extra}]'",
        )


class NumericsError(InfoptError):
    pass


class ResourceError(InfoptError):
    pass


class ResumeError(InfoptError):
    pass


class GateError(InfoptError):
    pass


class EngineError(InfoptError):
    pass


class RequestFailedError(EngineError):
    pass
