"""Sends the requests of one level, and keeps what came of each."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from time import perf_counter

from infopt.core.bench.client import Client, Message, Request, Session
from infopt.core.bench.records import Trip, record
from infopt.core.errors import InfoptError
from infopt.core.reports.requests import RequestRecord

STOPPED = "stopped with its level"


class Runner:
    """The state of a level; all of it belongs to one event loop."""

    def __init__(
        self,
        client: Client,
        *,
        level: int,
        timeout: float,
        origin: float,
        ended: Callable[[RequestRecord], None],
    ) -> None:
        self.records: list[RequestRecord] = []
        self.flying: dict[int, Trip] = {}
        self._client, self._level, self._timeout = client, level, timeout
        self._origin, self._ended = origin, ended
        self._count = 0

    @property
    def in_flight(self) -> int:
        return len(self.flying)

    async def session(
        self, session: Session, due: float | None = None, released: float | None = None
    ) -> None:
        """One conversation, turn after turn; what failed has no next turn.

        `due` None: each turn is due when it is sent.
        """
        history: tuple[Message, ...] = ()
        for number, turn in enumerate(session):
            request = turn.after(history)
            trip = await self._send(request, due, released)
            if trip.error is not None or number + 1 == len(session):
                return
            answer = "".join(chunk.text for chunk in trip.chunks)
            history = (*request.messages, {"role": "assistant", "content": answer})
            if due is not None:  # the next turn is due when this one is answered
                due = released = trip.ended

    async def _send(self, request: Request, due: float | None, released: float | None) -> Trip:
        now = perf_counter()
        trip = Trip(
            index=self._count,
            level=self._level,
            scheduled=now if due is None else due,
            released=now if released is None else released,
            sent=now,
            asked_tokens=request.output_tokens,
        )
        self._count += 1
        self.flying[trip.index] = trip
        try:
            async with asyncio.timeout(self._timeout):
                stream = self._client.send(request)
                async with aclosing(stream):
                    async for chunk in stream:
                        trip.chunks.append(chunk)
        except TimeoutError:
            trip.error = f"no whole answer within {self._timeout:g} s"
        except InfoptError as error:
            trip.error = error.message
        except asyncio.CancelledError:
            trip.error = STOPPED
            raise
        finally:
            self._land(trip)
        return trip

    def _land(self, trip: Trip) -> None:
        trip.ended = perf_counter()
        del self.flying[trip.index]
        kept = record(trip, counted_by=self._client.count_source, origin=self._origin)
        self.records.append(kept)
        self._ended(kept)
