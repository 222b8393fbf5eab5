"""Weights kept packed: the same to the last bit, and never used where they do not fit."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.hardware.kernel_choices import KernelChoices
from infopt.core.layers import kept
from infopt.core.layers.choice import NativeChoice
from infopt.core.layers.native import NativeEmbedding, NativeGroups, NativeInt8, NativeLinear
from infopt.core.models import kept_weights as module
from infopt.core.models.decoder import Decoder
from infopt.core.models.kept_weights import FOLDER, KeptWeights, places
from infopt.core.models.load import load_decoder
from infopt.kernels.cpu.groups import pack_groups
from infopt.kernels.cpu.int8 import Grid, pack_int8
from infopt.kernels.cpu.native import Native, NativeError, load

CPU = torch.device("cpu")
Tiny = Callable[[str], tuple[Artifact, Any]]
Loaded = tuple[Decoder, KeptWeights]


@pytest.fixture(scope="module")
def native() -> Native:
    try:
        return load()
    except NativeError as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


def loaded(
    artifact: Artifact, native: Native, measured: KernelChoices | None = None, least: int = 0
) -> Loaded:
    choice = NativeChoice(native, torch.float32, measured)
    found = KeptWeights(artifact, choice, least_bytes=least)
    return load_decoder(artifact, torch.float32, CPU, native=choice, kept=found), found


def made_anew(found: KeptWeights) -> int:
    return len(found._new)


def projections(decoder: Decoder) -> Sequence[Any]:
    per_layer = [
        part
        for layer in decoder.layers
        for part in (layer.attention.qkv, layer.attention.output, *_mlp(layer.mlp))
    ]
    return [*per_layer, decoder.head]


def _mlp(mlp: Any) -> tuple[Any, ...]:
    if hasattr(mlp, "gate_up"):
        return mlp.gate_up, mlp.down
    if hasattr(mlp, "experts"):
        return (mlp.router, *(part for e in mlp.experts for part in (e.gate_up, e.down)))
    return mlp.up, mlp.down


def alike(one: Decoder, other: Decoder) -> None:
    for ours, theirs in zip(projections(one), projections(other), strict=True):
        assert type(ours) is type(theirs)
        both = [kept.parts_of(part) for part in (ours, theirs)]
        if both[0] is None or both[1] is None:
            assert both[0] is both[1]
            continue
        assert both[0][0] == both[1][0]
        for key, tensor in both[0][1].items():
            other_tensor = both[1][1][key]
            assert (tensor is None) is (other_tensor is None)
            if tensor is not None and other_tensor is not None:
                assert tensor.dtype == other_tensor.dtype and torch.equal(tensor, other_tensor)


def test_a_second_load_packs_nothing(kind: str, tiny: Tiny, native: Native, cache: Path) -> None:
    artifact = tiny(kind)[0]
    first, made = loaded(artifact, native)
    assert made_anew(made) > 0
    second, found = loaded(artifact, native)
    assert made_anew(found) == 0
    alike(first, second)
    assert not cache.exists()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_groups_are_taken_up_as_they_were(bits: int, zeros: bool, native: Native) -> None:
    shape = (40, 96)
    codes = torch.randint(1 << bits, shape).to(torch.uint8)
    offsets = torch.randint(1 << bits, (40, 3)).to(torch.uint8) if zeros else 1 << (bits - 1)
    packed = pack_groups(codes, torch.rand(40, 3).half(), offsets, bits)
    columns = torch.randperm(96).to(torch.int32) if zeros else None
    taken_up_alike(NativeGroups(native, packed, torch.randn(40), columns), shape)


@pytest.mark.parametrize("fixed", [None, torch.tensor([0.5])])
def test_int8_is_taken_up_as_it_was(fixed: Tensor | None, native: Native) -> None:
    codes = torch.randint(-128, 128, (40, 90)).to(torch.int8)
    packed = pack_int8(codes, torch.rand(40))
    taken_up_alike(NativeInt8(native, packed, Grid(127.0, 128, fixed)), (40, 90))


def taken_up_alike(projection: Any, shape: tuple[int, int]) -> None:
    found = kept.parts_of(projection)
    assert found is not None
    numbers, tensors = found
    given = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    again = kept.taken_up(projection.native, numbers, given, shape)
    assert type(again) is type(projection) and kept.parts_of(again)[0] == numbers
    x = torch.randn(3, shape[1])
    assert torch.equal(again(x), projection(x))


def test_a_tied_table_is_in_memory_once(tiny: Tiny, native: Native, cache: Path) -> None:
    artifact = tiny("llama")[0]
    config = {**artifact.config, "tie_word_embeddings": True}
    artifact = Artifact(artifact.name, artifact.path, config, artifact.files, artifact.headers)
    for _ in range(2):
        decoder, _ = loaded(artifact, native)
        assert isinstance(decoder.head, NativeLinear)
        assert isinstance(decoder.embedding, NativeEmbedding)
        assert decoder.embedding.held_by(decoder.head)


def test_another_model_is_packed_anew_without_a_word(
    tiny: Tiny, native: Native, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = tiny("llama")[0]
    loaded(artifact, native)
    os.utime(artifact.path / "model.safetensors", (1, 1))
    for expected in (True, False):
        assert (made_anew(loaded(read_artifact(artifact.path), native)[1]) > 0) is expected
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("damage", [b"", b"GGUF" * 4096, None])
def test_a_damaged_file_is_told_of_once_and_replaced(
    damage: bytes | None,
    tiny: Tiny,
    native: Native,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    artifact = tiny("qwen3")[0]
    first, _ = loaded(artifact, native)
    (file,) = (artifact.path / FOLDER).iterdir()
    if damage is None:
        raw = bytearray(file.read_bytes())
        raw[-100] ^= 64
        damage = bytes(raw)
    file.write_bytes(damage)
    second, made = loaded(artifact, native)
    assert made_anew(made) > 0
    (told,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(file) in told.getMessage() and "\n" not in told.getMessage()
    assert made_anew(loaded(artifact, native)[1]) == 0
    alike(first, second)


def test_a_table_that_fits_no_layer_is_not_used(tiny: Tiny, native: Native, cache: Path) -> None:
    artifact = tiny("llama")[0]
    loaded(artifact, native)
    found = KeptWeights(artifact, NativeChoice(native, torch.float32, None))
    names = list(found._entries)
    # The entries of layers of other shapes in each other's places.
    for name, entry in zip(names, [found._entries[n] for n in reversed(names)], strict=True):
        shape = (1024, 31)
        found._entries[name] = entry
        assert found.find(name, shape) is None
    found._entries[names[0]] = {"numbers": {"kind": "?"}, "tensors": {}}
    assert found.find(names[0], (32, 32)) is None


def test_where_torch_won_nothing_is_taken(tiny: Tiny, native: Native, cache: Path) -> None:
    artifact = tiny("llama")[0]
    loaded(artifact, native)
    empty = KernelChoices(device="d", dtype="float32", threads=1, versions="1")
    choice = NativeChoice(native, torch.float32, empty, compare=lambda *_: False)
    found = KeptWeights(artifact, choice, least_bytes=0)
    decoder = load_decoder(artifact, torch.float32, CPU, native=choice, kept=found)
    assert not [part for part in projections(decoder) if isinstance(part, NativeLinear)]
    assert made_anew(loaded(artifact, native)[1]) == 0, "what there was is still there"


def test_where_nobody_may_write_the_users_cache_is_used(
    tiny: Tiny, native: Native, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = tiny("llama")[0]
    written = module.write_image

    def beside(file: Path, *given: Any) -> int:
        if file.is_relative_to(artifact.path):
            raise PermissionError(13, "no")
        return written(file, *given)

    monkeypatch.setattr(module, "write_image", beside)
    loaded(artifact, native)
    assert list(cache.rglob("*.packed")) and not (artifact.path / FOLDER).exists()
    assert made_anew(loaded(artifact, native)[1]) == 0


def test_into_the_hubs_cache_nothing_is_written(
    tiny: Tiny, native: Native, tmp_path: Path, cache: Path
) -> None:
    source, folder = tiny("llama")[0].path, tmp_path / "snapshot"
    folder.mkdir()
    for file in source.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    artifact = read_artifact(folder)
    (place,) = places(artifact, NativeChoice(native, torch.float32, None))
    assert place.is_relative_to(cache)


def test_little_is_not_kept(tiny: Tiny, native: Native, cache: Path) -> None:
    artifact = tiny("llama")[0]
    loaded(artifact, native, least=1 << 30)
    assert not (artifact.path / FOLDER).exists() and not cache.exists()


def test_tensors_of_other_shapes_are_refused(native: Native) -> None:
    x: Tensor = torch.zeros(1, 32, 32, 1)
    assert kept.taken_up(native, {"kind": "dense"}, {"panels": x}, (32, 32)) is not None
    assert kept.taken_up(native, {"kind": "dense"}, {"panels": x}, (33, 32)) is None
    assert kept.taken_up(native, {"kind": "dense"}, {"panels": x.int()}, (32, 32)) is None
    assert kept.taken_up(native, {"kind": "dense"}, {}, (32, 32)) is None
    bias = {"panels": x, "bias": torch.zeros(31)}
    assert kept.taken_up(native, {"kind": "dense"}, bias, (32, 32)) is None
    groups = {
        "codes": torch.zeros(1, 1, 2, 4, 16, 2, dtype=torch.int16),
        "scales": torch.zeros(1, 1, 32),
        "columns": torch.arange(32, dtype=torch.int32),
    }
    numbers = {"kind": "groups", "zero": 8}
    assert kept.taken_up(native, numbers, groups, (32, 32)) is not None
    beyond = {**groups, "columns": groups["columns"] + 1}
    assert kept.taken_up(native, numbers, beyond, (32, 32)) is None
    assert kept.taken_up(native, {**numbers, "zero": 16}, groups, (32, 32)) is None
