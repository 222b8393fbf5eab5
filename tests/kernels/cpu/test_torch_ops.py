"""The native ops as torch's: their schemas and shapes, by eager torch and under torch.compile."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from infopt.kernels.cpu import dense, groups, groups8, int8
from infopt.kernels.cpu.native import NativeError, load

try:
    load()
except NativeError as error:
    pytest.skip(str(error), allow_module_level=True)
from infopt.kernels.cpu import torch_ops  # noqa: F401

OPS: Any = torch.ops.infopt
N, K = 45, 96
DTYPES = [torch.float32, torch.bfloat16]


def arguments(name: str, dtype: torch.dtype, bias: bool) -> tuple[Any, ...]:
    torch.manual_seed(0)
    x, added = torch.randn(3, K).to(dtype), torch.randn(N) if bias else None
    match name:
        case "dense_linear":
            return x, dense.pack_dense(torch.randn(N, K).to(dtype)).panels, N, added
        case "groups_linear" | "groups8_linear":
            codes = torch.randint(16, (N, K)).to(torch.uint8)
            zeros = torch.randint(16, (N, 3)).to(torch.uint8) if bias else 8
            w = groups.pack_groups(codes, torch.rand(N, 3), zeros, 4)
            return x, w.codes, w.scales, w.zeros, w.zero, N, added
        case "int8_linear":
            packed = int8.pack_int8(torch.randint(-128, 128, (N, K)).to(torch.int8), torch.rand(N))
            return x, packed.codes, packed.scales, packed.ends, K, 127.0, 128, None, added
    return x.float(), torch.rand(K), 1e-5


NAMES = ["dense_linear", "groups_linear", "groups8_linear", "int8_linear", "rms_norm"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_torch_accepts_them(name: str, dtype: torch.dtype, bias: bool) -> None:
    torch.library.opcheck(getattr(OPS, name), arguments(name, dtype, bias))


def reference(name: str, given: tuple[Any, ...]) -> torch.Tensor:
    match name:
        case "dense_linear":
            return dense.reference(given[0], dense.DensePanels(given[1], N), given[3])
        case "groups_linear":
            return groups.reference(given[0], groups.GroupPanels(*given[1:6]), given[6])
        case "groups8_linear":
            return groups8.reference(given[0], groups.GroupPanels(*given[1:6]), given[6])
        case "int8_linear":
            steps = int8.reference_steps(given[0], int8.Grid(127.0, 128))
            weight = int8.Int8Panels(*given[1:5])
            return int8.reference(steps, weight, given[8], given[0].dtype)
    return F.rms_norm(given[0], (K,), given[1], given[2])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_they_compute_what_their_references_do(name: str, compiled: bool) -> None:
    given = arguments(name, torch.float32, True)
    op = getattr(OPS, name)

    def around(*given: Any) -> torch.Tensor:
        return op(*given) * 2

    run = torch.compile(around, backend="eager", fullgraph=True) if compiled else around
    wanted = reference(name, given).float() * 2
    assert (run(*given) - wanted).abs().max() < 1e-4 * wanted.abs().max()
