"""Models of the Hugging Face hub, through its own client and cache."""

from pathlib import Path
from typing import Any

from infopt.core.errors import ArtifactError, ResourceError, UsageError
from infopt.core.files import disk_faults
from infopt.core.progress import Progress, ProgressCallback

# Never a pickle; nothing from subfolders (other runtimes' copies lie there).
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "LICENSE*", "README.md"]
_UNWANTED = ["*/*", "consolidated*"]
_TIMEOUT_S = 5.0


def download(repository: str, progress: ProgressCallback) -> Path:
    """A directory with the repository's weights, config and tokenizer.

    Raises UsageError where the hub has no such model, ResourceError where it cannot be reached
    (HF_HUB_OFFLINE forbids to try) and nothing is cached.
    """
    import httpx
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    progress(Progress("download", note=repository))
    try:
        # snapshot_download waits without end for a hub that is silent, so it is asked first here.
        reached = _reached(HfApi(), repository)
        with disk_faults(Path(constants.HF_HUB_CACHE)):
            folder = snapshot_download(
                repository,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
                etag_timeout=_TIMEOUT_S,
                local_files_only=not reached,
            )
        return Path(folder)
    except GatedRepoError as error:
        raise ArtifactError(
            f"{repository} is gated on the hub", "accept its terms there, then run: hf auth login"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(f"no directory and no hub model is named {repository}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise ResourceError(
            f"there is no directory {repository}, and the hub cannot be reached to look there",
            "give a directory or a .gguf file, or try again with a network",
        ) from error


def _reached(hub: Any, repository: str) -> bool:
    """Whether the hub answers for the repository; a refusal by name passes through."""
    import httpx
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        hub.model_info(repository, timeout=_TIMEOUT_S)
    except (RepositoryNotFoundError, HFValidationError):
        raise
    except (httpx.HTTPError, OSError):
        return False
    return True


def cached_snapshot(repository: str) -> Path | None:
    """The repository's snapshot in the hub's cache, without asking the hub."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json")
    return Path(found).parent if isinstance(found, str) else None
