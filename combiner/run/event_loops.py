"""Event loops for Orbax, which abandons its pending tasks when one of its reads or writes fails."""

import asyncio
import contextlib
from collections.abc import Iterator


class WaitingLoop(asyncio.SelectorEventLoop):
    """An event loop that waits for its pending tasks before it closes.

    Orbax closes its loop at the first read or write that fails and abandons the others. They would print errors
    later, from a thread that finds the loop closed, or at garbage collection ("Exception ignored in …").
    """

    def close(self) -> None:
        """Waits for all pending tasks, ignores their errors, and closes the loop."""
        while not self.is_closed() and (pending := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        super().close()


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Makes every new event loop, in any thread, a `WaitingLoop`."""
    make_loop, asyncio.new_event_loop = asyncio.new_event_loop, WaitingLoop
    try:
        yield
    finally:
        asyncio.new_event_loop = make_loop
