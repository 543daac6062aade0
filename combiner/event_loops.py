"""Event loops for Orbax, which abandons what is pending when a read or a write of it fails."""

import asyncio
import contextlib
from collections.abc import Iterator


class FinishingLoop(asyncio.SelectorEventLoop):
    """An event loop that finishes what is pending before it closes.

    Orbax closes its loop at the first read or write that fails and abandons the others. They would complain at any
    later time, from a thread that finds the loop closed or when they are collected ("Exception ignored in …").
    """

    def close(self) -> None:
        """Closes it when nothing is pending any more; errors of what was pending are dropped."""
        while not self.is_closed() and (pending := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        super().close()


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """Makes every new event loop, in any thread, a `FinishingLoop`."""
    make_loop, asyncio.new_event_loop = asyncio.new_event_loop, FinishingLoop
    try:
        yield
    finally:
        asyncio.new_event_loop = make_loop
