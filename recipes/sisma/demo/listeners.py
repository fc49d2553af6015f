"""Jobs whose browser has gone: they leave gradio's queue, and the running one stops at its next step."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from recipes.sisma.demo.jobs import DEVICE

#: Seconds that a browser has to open the event stream of a job it asked for.
LISTEN_WITHIN = 5.0


class Listeners:
    """Counts the open event streams of each session, and ends the jobs of a session that has none.

    gradio itself ends a job only at the next value it yields after its stream was closed, and never ends a job whose
    stream was not opened. All methods run in the server's event loop.

    Args:
        queue: the page's queue, a `gradio.queueing.Queue`.
        stop: stops the running job at its next step.
    """

    def __init__(self, queue: Any, stop: Callable[[], None]) -> None:
        self._queue, self._stop = queue, stop
        self._streams: Counter[str] = Counter()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._drops: set[asyncio.Task[None]] = set()

    def knows(self, session: str) -> bool:
        """Whether a session has asked for a job that it has not been told the end of."""
        return session in self._queue.pending_messages_per_session

    def owns(self, session: str, event: str) -> bool:
        """Whether a session's job of this id waits or runs."""
        found = self._queue.event_ids_to_events.get(event)
        return found is not None and found.session_hash == session

    def joined(self, session: str) -> None:
        """A session's job was queued: drop it unless its stream is opened within `LISTEN_WITHIN` seconds."""
        self._cancel_timer(session)
        self._timers[session] = asyncio.get_running_loop().call_later(LISTEN_WITHIN, self._drop, session)

    @asynccontextmanager
    async def listening(self, session: str) -> AsyncIterator[Callable[[], None]]:
        """Around an open event stream; yields what to call once the stream was sent to its end."""
        self._cancel_timer(session)
        self._streams[session] += 1
        complete = False

        def finish() -> None:
            nonlocal complete
            complete = True

        try:
            yield finish
        finally:
            self._streams -= Counter([session])
            if complete:  # another job may have been queued while this stream was closing
                self.joined(session)
            else:
                self._drop(session)

    def stop_running(self, session: str, event: str = "") -> None:
        """Stop the running job at its next step if it is this session's, and has this id if one is given."""
        active = [each for job in self._queue.active_jobs if job for each in job if each.concurrency_id == DEVICE]
        if any(each.session_hash == session and event in ("", each._id) for each in active):
            self._stop()

    def _drop(self, session: str) -> None:
        """End the jobs of a session and forget it, unless it has an open stream."""
        self._cancel_timer(session)
        if self._streams[session]:
            return
        self.stop_running(session)
        self._queue.pending_messages_per_session.pop(session, None)
        self._queue.pending_event_ids_session.pop(session, None)
        task = asyncio.get_running_loop().create_task(self._queue.clean_events(session_hash=session))
        self._drops.add(task)
        task.add_done_callback(self._drops.discard)

    def _cancel_timer(self, session: str) -> None:
        timer = self._timers.pop(session, None)
        if timer is not None:
            timer.cancel()
