import itertools

from hypothesis import given
from hypothesis import strategies as st

from infopt.core.bench.sse import EventParser

STREAM = (
    b": keep-alive\n\n"
    b'data: {"a": 1}\n\n'
    b"event: x\r\ndata: two\r\ndata: lines\r\n\r\n"
    b"data:no space\r\rdata\n\n"
    b": another\n"
    b"data: caf\xc3\xa9\n\nretry: 5\n\n"
    b"data: [DONE]\n\n"
)
EVENTS = [b'{"a": 1}', b"two\nlines", b"no space", b"", b"caf\xc3\xa9", b"[DONE]"]


def test_events_of_one_read() -> None:
    assert EventParser().feed(STREAM) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_any_cut_gives_the_same_events(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    parser = EventParser()
    pieces = [STREAM[a:b] for a, b in itertools.pairwise(edges)]
    assert [event for piece in pieces for event in parser.feed(piece)] == EVENTS


def test_byte_by_byte() -> None:
    parser = EventParser()
    assert [e for i in range(len(STREAM)) for e in parser.feed(STREAM[i : i + 1])] == EVENTS


def test_an_unfinished_event_is_no_event() -> None:
    assert EventParser().feed(b"data: half") == []
    assert EventParser().feed(b"data: half\n") == []
