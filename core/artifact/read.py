"""Read a model directory in the Hugging Face layout: config, tokenizer, safetensors."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from infopt.core.artifact.count import count_parameters, describe_quantization
from infopt.core.artifact.headers import TensorHeader, read_header
from infopt.core.errors import ArtifactError, UnsafeArtifactError, UsageError
from infopt.core.files import sha256
from infopt.core.reports.schema import ModelSummary

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
T = TypeVar("T")

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Artifact:
    """A model on disk; nothing but headers is in memory."""

    name: str
    """For people, such as 'SmolLM2-135M-Instruct'."""
    path: Path
    config: dict[str, Any]
    files: dict[str, Path]
    """Tensor name to the safetensors file that holds it."""
    headers: dict[str, TensorHeader] = field(repr=False)
    trust_remote_code: bool = False

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config` of config.json, else quantize_config.json, else None."""
        found = self.config.get("quantization_config")
        if isinstance(found, dict):
            return found
        file = self.path / "quantize_config.json"
        return read_json(file) if file.exists() else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(header.nbytes for header in self.headers.values())

    def names(self) -> list[str]:
        """The stored tensors, sorted."""
        return sorted(self.files)

    def has(self, name: str) -> bool:
        return name in self.files

    def tensor(self, name: str) -> "Tensor":
        """A tensor as stored; raises ArtifactError naming file and tensor."""
        from safetensors import SafetensorError, safe_open

        file = self._header(name).file
        try:
            with safe_open(file, framework="pt", device="cpu") as stream:
                found: Tensor = stream.get_tensor(name)
                return found
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"cannot read tensor {name!r} of {file}: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """From the file's header."""
        return self._header(name).shape

    def dtype(self, name: str) -> str:
        """torch's name of the stored dtype, such as 'bfloat16'; from the file's header."""
        return self._header(name).dtype

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The transformers tokenizer; raises ArtifactError where it cannot be built."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:  # transformers raises many kinds for one broken file
            reason = str(error).strip().split("\n")[0]
            raise ArtifactError(
                f"the tokenizer of {self.path} cannot be read: {reason}",
                "the directory needs tokenizer.json (or its older kin) and tokenizer_config.json",
            ) from error

    def text_tokenizer(self) -> Any:
        """As `tokenizer`, of what generating and serving need; read without transformers where the
        directory's files say it all."""
        # Here, so that what reads headers alone need not have jinja2.
        from infopt.core.artifact.plain_tokenizer import plain_tokenizer

        found = plain_tokenizer(self.path, self.config.get("model_type"), self.tokenizer)
        return self.tokenizer() if found is None else found

    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of the config and weight files, in hex."""
        digest = hashlib.sha256()
        configs = [self.path / CONFIG, self.path / "quantize_config.json"]
        for file in [c for c in configs if c.exists()] + sorted(set(self.files.values())):
            digest.update(f"{file.name} {_readable(file, sha256)}\n".encode())
        return digest.hexdigest()

    def summary(self) -> ModelSummary:
        """What a report says of this model; a quantized layer counts outputs x inputs."""
        architectures = self.config.get("architectures")
        if not isinstance(architectures, list) or not architectures:
            architectures = [self.config.get("model_type", "unknown")]
        return ModelSummary(
            name=self.name,
            path=str(self.path),
            architecture=str(architectures[0]),
            parameters=count_parameters(self.headers, self.config, self.quantization),
            bytes=self.weight_bytes,
            quantization=describe_quantization(self.quantization),
        )

    def _header(self, name: str) -> TensorHeader:
        header = self.headers.get(name)
        if header is None:
            raise ArtifactError(f"{self.path} has no tensor {name!r}")
        return header


def read_artifact(
    path: Path, *, name: str | None = None, trust_remote_code: bool = False
) -> Artifact:
    """Open a model directory, every header checked, no weight loaded.

    Raises UsageError if it does not exist, UnsafeArtifactError for pickles and remote code,
    ArtifactError for anything missing, unreadable or corrupt.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UsageError(f"no such model directory: {path}")
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a directory", "give a model directory or a .gguf file")
    config = _read_config(path)
    if not trust_remote_code:
        _refuse_remote_code(path, config)
    headers = _read_weights(path)
    files = {tensor: header.file for tensor, header in headers.items()}
    return Artifact(name or path.resolve().name, path, config, files, headers, trust_remote_code)


def read_config(file: Path) -> Artifact:
    """What a config.json alone tells: an artifact without tensors."""
    folder = file.resolve().parent
    return Artifact(folder.name, folder, read_json(file), {}, {})


def read_json(file: Path) -> dict[str, Any]:
    """A JSON table; raises ArtifactError naming the file."""
    try:
        found = json.loads(read_file(file))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{file} holds no JSON table")
    return found


def read_file(file: Path) -> bytes:
    """The bytes of a file; raises ArtifactError naming it."""
    return _readable(file, Path.read_bytes)


def _read_config(path: Path) -> dict[str, Any]:
    if not _readable(path, lambda p: (p / CONFIG).exists()):
        kin = sorted(p.name for p in _readable(path, lambda p: list(p.glob("*.gguf"))))
        hint = (
            f"give the file itself: {path / kin[0]}" if kin else "give the directory that has one"
        )
        raise ArtifactError(f"{path} is not a model directory: it has no {CONFIG}", hint)
    return read_json(path / CONFIG)


def _refuse_remote_code(path: Path, config: dict[str, Any]) -> None:
    tokenizer = path / "tokenizer_config.json"
    settings = read_json(tokenizer) if tokenizer.exists() else {}
    for file, table in ((path / CONFIG, config), (tokenizer, settings)):
        if table.get("auto_map"):
            raise UnsafeArtifactError(
                f"{file} asks to run the model's own code (auto_map)",
                "if transformers knows the architecture itself, delete auto_map from a copy",
            )


def _read_weights(path: Path) -> dict[str, TensorHeader]:
    if (path / INDEX).exists():
        return _read_shards(path)
    if (path / WEIGHTS).exists():
        return read_header(path / WEIGHTS)
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return read_header(found[0])
    if found:
        raise ArtifactError(f"{path} has {len(found)} safetensors files but no {INDEX}")
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise UnsafeArtifactError(
            f"{path} holds only pickled weights ({pickles[0]}), which can run code when loaded",
            "where you trust them, load them with transformers and save_pretrained as safetensors",
        )
    raise ArtifactError(f"{path} has no weights: no {WEIGHTS} and no {INDEX}")


def _read_shards(path: Path) -> dict[str, TensorHeader]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{path / INDEX} has no weight_map")
    headers: dict[str, TensorHeader] = {}
    shards: dict[str, dict[str, TensorHeader]] = {}
    for tensor, shard in weight_map.items():
        # A name with a folder in it could reach outside of the model's directory.
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise ArtifactError(f"{path / INDEX} names the shard {shard!r}, which is no file name")
        if shard not in shards:
            if not shard.endswith(".safetensors"):
                raise UnsafeArtifactError(f"{path / INDEX} names {shard}, which is not safetensors")
            if not (path / shard).exists():
                raise ArtifactError(
                    f"{path / INDEX} names {shard}, which is missing", "download the model again"
                )
            shards[shard] = read_header(path / shard)
        if tensor not in shards[shard]:
            raise ArtifactError(f"{path / shard} has no tensor {tensor!r}, though {INDEX} says so")
        headers[tensor] = shards[shard][tensor]
    return headers


def _readable(file: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(file)
    except OSError as error:
        raise ArtifactError(f"cannot read {file}: {error.strerror}") from error
