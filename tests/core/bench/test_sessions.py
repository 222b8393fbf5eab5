import itertools
import json
from pathlib import Path
from typing import Any

from infopt.core.bench.client import Request, Session
from infopt.core.bench.sessions import DOCUMENT_TOKENS, longest, sessions, traced
from infopt.core.bench.trace import TraceRow
from infopt.core.bench.workload import synthetic
from infopt.core.recipe.bench import BenchSettings


def taken(count: int, vocab_size: int | None = 1000, **settings: Any) -> list[Session]:
    return list(itertools.islice(sessions(BenchSettings(**settings), vocab_size), count))


def alone(found: list[Session]) -> list[Request]:
    assert all(len(session) == 1 for session in found)
    return [session[0] for session in found]


def test_synthetic_prompts_are_those_of_the_seed() -> None:
    found = alone(taken(5, prompt_tokens=8, output_tokens=3, seed=4))
    assert found == synthetic(5, 8, 3, seed=4, vocab_size=1000)


def test_ranges_are_uniform_and_seeded() -> None:
    found = alone(taken(400, prompt_tokens="10-19", output_tokens="1-4"))
    lengths = [len(request.prompt) for request in found]
    assert set(lengths) == set(range(10, 20)) and 14 < sum(lengths) / 400 < 15
    assert {request.output_tokens for request in found} == {1, 2, 3, 4}
    assert found == alone(taken(400, prompt_tokens="10-19", output_tokens="1-4"))


def test_shared_prefixes_are_shared_and_the_rest_is_not() -> None:
    found = alone(
        taken(40, workload="shared-prefix", prefix_tokens=16, prefixes=3, prompt_tokens=8)
    )
    assert len({request.prompt[:16] for request in found}) == 3
    assert len({request.prompt[16:] for request in found}) == 40
    assert all(len(request.prompt) == 24 for request in found)
    (words,) = alone(taken(1, None, workload="shared-prefix", prefix_tokens=16, prompt_tokens=8))
    assert len(str(words.prompt).split()) == 24


def test_retrieval_has_the_length_and_documents_in_common() -> None:
    found = alone(taken(64, workload="rag", prompt_tokens=2000, output_tokens=5))
    assert all(len(request.prompt) == 2000 for request in found)
    firsts = {request.prompt[:DOCUMENT_TOKENS] for request in found}
    assert 20 < len(firsts) < 64, "documents are found more than once"
    assert len({request.prompt[-1:] + request.prompt[-200:] for request in found}) == 64
    short = alone(taken(3, workload="rag", prompt_tokens=9))
    assert [len(request.prompt) for request in short] == [9, 9, 9]


def test_conversations_have_their_turns() -> None:
    found = taken(3, None, workload="multi-turn", turns=4, prompt_tokens="2-5", output_tokens=6)
    assert [len(session) for session in found] == [4, 4, 4]
    said = [turn.messages[0]["content"] for session in found for turn in session]
    assert len(set(said)) == 12 and all(2 <= len(text.split()) <= 5 for text in said)


def test_a_later_turn_holds_what_came_before() -> None:
    turn = Request("", 3, ({"role": "user", "content": "b"},))
    before = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "x"})
    assert [m["content"] for m in turn.after(before).messages] == ["a", "x", "b"]


def test_json_and_tools_ask_for_them() -> None:
    (shaped,) = alone(taken(1, None, workload="json"))
    assert shaped.extra["response_format"]["type"] == "json_schema" and shaped.messages
    found = alone(taken(4, None, workload="tools"))
    assert [request.extra["tool_choice"] for request in found] == ["auto", "required"] * 2
    assert {t["function"]["name"] for t in found[0].extra["tools"]} == {"get_weather", "get_time"}


def test_a_file_goes_round(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"prompt": "a", "output_tokens": 2}, {"prompt": "b"}]))
    found = alone(taken(3, None, workload="file", dataset=str(path), output_tokens=7))
    assert [request.prompt for request in found] == ["a", "b", "a"]
    assert [request.output_tokens for request in found] == [2, 7, 2]


def test_a_trace_has_its_own_lengths() -> None:
    found = alone(list(traced([TraceRow(0.0, 5, 2), TraceRow(1.0, 9, 4)], 0, 100)))
    assert [(len(r.prompt), r.output_tokens) for r in found] == [(5, 2), (9, 4)]


def test_the_longest_that_can_be_asked() -> None:
    def of(**settings: Any) -> Any:
        return longest(BenchSettings(**settings))

    lengths = {"prompt_tokens": "5-10", "output_tokens": "1-3"}
    assert of(**lengths) == (10, 3)
    assert of(workload="shared-prefix", prefix_tokens=7, **lengths) == (17, 3)
    assert of(workload="multi-turn", turns=3, **lengths) == (36, 3), "two answered turns before"
    assert of(workload="file", dataset="x") is None and of(trace="x") is None
