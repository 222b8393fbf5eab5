"""Server-sent events out of bytes that come in any pieces (WHATWG HTML, 9.2.6)."""


class EventParser:
    """Feed what was read; get the data of the events that it completed."""

    def __init__(self) -> None:
        self._tail = bytearray()
        self._searched = 0
        self._after_return = False
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The payloads completed by this piece; comments and other fields are passed over."""
        if not piece:
            return []
        cut, self._after_return = self._after_return, piece.endswith(b"\r")
        self._tail += piece[1:] if cut and piece.startswith(b"\n") else piece  # a \r\n cut in two
        events: list[bytes] = []
        for line in self._lines():
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif line == b"data":
                self._data.append(b"")
        return events

    def _lines(self) -> list[bytes]:
        """Take the finished lines; a long line is searched once, however many reads bring it."""
        fresh = self._tail[self._searched :]
        self._searched = len(self._tail)
        if b"\n" not in fresh and b"\r" not in fresh:
            return []
        lines = bytes(self._tail).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._tail = bytearray(lines.pop())
        self._searched = len(self._tail)
        return lines
