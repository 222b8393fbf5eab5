from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from infopt.core.models.load import load_decoder
from infopt.core.runtime.batch import Span, step_inputs
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.request import SamplingParams
from infopt.core.runtime.sampler import Draw, sample
from infopt.core.runtime.step_memory import computed_step_bytes, measured_step_bytes


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made within."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[Any, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                known = self.alive.get(storage.data_ptr())
                if known is None or known[0]() is None:
                    self.alive[storage.data_ptr()] = (weakref.ref(storage), storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if v[0]() is not None}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return made


@pytest.mark.parametrize(("tokens", "rows"), [(64, 1), (64, 16), (16, 16)])
def test_the_estimate_is_no_less_than_a_step_takes_and_not_far_more(
    make_engine: Callable[..., Engine], tokens: int, rows: int
) -> None:
    runner = make_engine()._runner
    length = tokens // rows
    spans = [Span([0] * length, 0, [2 * r, 2 * r + 1] if length <= 8 else range(16))
             for r in range(rows)]  # fmt: skip
    last = torch.arange(1, rows + 1) * length - 1
    with Peak() as peak:
        inputs = step_inputs(spans, block_size=4, dtype=torch.float32, device=torch.device("cpu"))
        logits = runner.run(inputs, last)
        params = SamplingParams(top_p=0.9, min_p=0.01, repetition_penalty=1.2, frequency_penalty=1)
        draw = Draw(params, torch.Generator(), prompt=[1, 2], answer=[3], barred=[4])
        sample(logits, [draw] * rows)
    computed = computed_step_bytes(
        runner.decoder.config, tokens=tokens, rows=rows, dtype=torch.float32
    )
    gathered = tokens * 2 * 2 * 8 * 4  # is counted with the blocks
    assert 0 < peak.most <= computed + gathered, (peak.most, computed)
    assert computed < 4 * peak.most


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_the_peak_is_measured(tiny_reference: Any) -> None:
    decoder = load_decoder(tiny_reference[0], torch.bfloat16, torch.device("cuda"))
    small = measured_step_bytes(decoder, tokens=64, rows=4, block_size=4, cached=decoder.dtype)
    large = measured_step_bytes(decoder, tokens=512, rows=32, block_size=4, cached=decoder.dtype)
    assert 0 < small < large
