from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopt.core.errors import EngineError, InfoptError, ResourceError, UsageError
from infopt.core.runtime.grammar import Grammar
from infopt.core.runtime.request import SamplingParams, StepOutput, TokenLogprob
from infopt.core.server import messages

ids = st.lists(st.integers(0, 2**31)).map(tuple)
logprob = st.floats(allow_nan=False, max_value=0)
entries = st.builds(
    TokenLogprob,
    st.integers(0, 2**31),
    logprob,
    st.lists(st.tuples(st.integers(0, 2**31), logprob)).map(tuple),
)


# A grammar says itself where the answer ends.
grammars = st.builds(
    Grammar, st.sampled_from(["json_schema", "regex", "choice"]), st.text("ab", min_size=1)
)
ENDS: list[dict[str, Any]] = [
    {"ignore_eos": st.booleans(), "min_tokens": st.just(1)},
    {"grammar": st.none() | grammars},
]


@given(st.sampled_from(["mean", "last"]), st.text(), st.integers(-(2**31), 2**31 - 1))
def test_requests_for_embeddings_travel_unchanged(pooling: Any, salt: str, priority: int) -> None:
    params = SamplingParams(pooling=pooling, cache_salt=salt, priority=priority)
    message = messages.unpack(messages.pack("add", params=messages.params_to_map(params)))
    assert messages.params_from_map(message["params"]) == params


@pytest.mark.parametrize("ends", ENDS, ids=["tokens", "grammar"])
@given(data=st.data())
def test_params_travel_unchanged(ends: dict[str, Any], data: st.DataObject) -> None:
    params = data.draw(
        st.builds(
            SamplingParams,
            max_tokens=st.none() | st.integers(1, 10**6),
            temperature=st.floats(0, 2),
            top_p=st.floats(0.01, 1),
            seed=st.none() | st.integers(0, 2**63 - 1),
            stop=st.lists(st.text(min_size=1)).map(tuple),
            stop_token_ids=ids,
            logprobs=st.none() | st.integers(0, 20),
            n=st.integers(1, 128),
            priority=st.integers(-(2**31), 2**31 - 1),
            cache_salt=st.text(),
            min_p=st.floats(0, 1),
            repetition_penalty=st.floats(0.1, 3),
            presence_penalty=st.floats(-2, 2),
            frequency_penalty=st.floats(-2, 2),
            logit_bias=st.lists(st.tuples(st.integers(0, 2**31), st.floats(-100, 100))).map(tuple),
            prompt_logprobs=st.none() | st.integers(0, 20),
            **ends,
        )
    )
    message = messages.unpack(messages.pack("add", params=messages.params_to_map(params)))
    assert messages.params_from_map(message["params"]) == params


@given(
    st.builds(
        StepOutput,
        request_id=st.text(),
        token_ids=ids,
        finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
        error=st.none() | st.text(),
        logprobs=st.none() | st.lists(entries).map(tuple),
        index=st.integers(0, 127),
        prompt_logprobs=st.none() | st.lists(entries).map(tuple),
        embedding=st.none() | st.lists(st.floats(allow_nan=False)).map(tuple),
    )
)
def test_outputs_travel_unchanged(output: StepOutput) -> None:
    message = messages.unpack(messages.pack("outputs", outputs=[messages.output_to_map(output)]))
    assert messages.output_from_map(message["outputs"][0]) == output


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (UsageError("too long", "shorten it"), UsageError, "too long (shorten it)"),
        (ResourceError("no memory"), ResourceError, "no memory"),
        (ValueError("bad"), EngineError, "ValueError: bad"),
    ],
)
def test_errors_keep_their_kind(error: Exception, kind: type[InfoptError], text: str) -> None:
    told = messages.error_from_map(messages.unpack(messages.failed(error)))
    assert type(told) is kind and str(told) == text
