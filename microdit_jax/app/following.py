"""A request's events for the pages that follow it, which may reload or lose their network.

All of this runs in the server's event loop; the studio's thread only hands events over.
"""

import asyncio
import collections
import secrets
from collections.abc import AsyncGenerator, Callable

from microdit_jax.app.limits import Limits
from microdit_jax.app.studio import Event, Job

LAST = ("done", "error")  # events after which there are no more


class Followed:
    """A job and its events, of which the newest of each kind is told to a page that comes back.

    Without a page for a while the job is cancelled, unless it was asked to finish anyway.

    Args:
      keep: True if the job goes on without a page.
    """

    def __init__(self, limits: Limits, *, keep: bool):
        self.id = secrets.token_urlsafe(16)
        self.job: Job | None = None
        self._limits, self._keep = limits, keep
        self._loop = asyncio.get_running_loop()
        self._newest: dict[str, Event] = {"job": {"event": "job", "id": self.id}}
        self._pages: set[asyncio.Queue[Event]] = set()
        self._alone = self._leave_in_time()

    def listener(self, event: Event) -> None:
        """Takes an event; called in the studio's thread."""
        if not self._loop.is_closed():  # the server may be gone before the job
            self._loop.call_soon_threadsafe(self._tell, event)

    @property
    def ended(self) -> bool:
        """True after the last event."""
        return any(kind in self._newest for kind in LAST)

    def cancel(self) -> None:
        """Ends the job, and tells all pages."""
        if self.job is not None and not self.ended:
            self.job.cancel()
            self._tell({"event": "error", "message": "stopped"})

    def _tell(self, event: Event) -> None:
        if self.ended:
            return
        if event["event"] in LAST:
            self.job = None  # its request may hold an image
            self._newest.pop("step", None)  # whose previews nobody needs any more
        self._newest[event["event"]] = event
        short = {key: value for key, value in event.items() if key != "previews"}
        for page in self._pages:
            page.put_nowait(short if page.qsize() >= self._limits.unread_events else event)

    def _leave_in_time(self) -> asyncio.TimerHandle | None:
        return (
            None if self._keep else self._loop.call_later(self._limits.alone_seconds, self.cancel)
        )

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yields the newest event of each kind so far, and then each as it comes, to the last."""
        page = asyncio.Queue[Event]()
        for event in self._newest.values():
            page.put_nowait(event)
        self._pages.add(page)
        if self._alone is not None:
            self._alone.cancel()
        try:
            while True:
                event = await page.get()
                yield event
                if event["event"] in LAST:
                    return
        finally:  # also when the page is gone
            self._pages.discard(page)
            if not self._pages and not self.ended:
                self._alone = self._leave_in_time()


class Jobs:
    """The newest jobs, by names that nobody guesses."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._jobs: collections.OrderedDict[str, Followed] = collections.OrderedDict()

    def begin(self, submit: Callable[[Callable[[Event], None]], Job], *, keep: bool) -> Followed:
        """Submits a job; raises what `submit` raises."""
        followed = Followed(self._limits, keep=keep)
        followed.job = submit(followed.listener)
        self._jobs[followed.id] = followed
        while len(self._jobs) > self._limits.kept_jobs:
            self._jobs.popitem(last=False)
        return followed

    def get(self, name: str) -> Followed | None:
        """Returns a job that is still known."""
        return self._jobs.get(name)
