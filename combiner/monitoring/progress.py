"""The progress of a training on the terminal."""

import contextlib
import sys
import time
from collections.abc import Iterator

import jax
import tqdm


class Progress:
    """A progress bar with time left and tokens/s on a terminal, lines of text elsewhere; only in the first process."""

    def __init__(self, step: int, steps: int, tokens_per_step: int):
        self.step, self.steps, self.tokens_per_step = step, steps, tokens_per_step
        self.started = time.perf_counter()
        self.compiling = True
        self.silent = jax.process_index() != 0
        terminal = sys.stderr.isatty() and not self.silent
        self.bar = tqdm.tqdm(total=steps, initial=step, unit='step', dynamic_ncols=True) if terminal else None

    def advance(self) -> None:
        """Counts one more step; after the first step, which compiles, it restarts the clock."""
        if self.compiling:
            self.compiling = False
            self.step, self.started = self.step + 1, time.perf_counter()
        if self.bar:
            self.bar.update()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time within the block (validation, saving) from tokens/s."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def measure(self, step: int) -> tuple[int, float]:
        """Returns the number of steps since the last call, up to `step`, and their tokens per second."""
        count, seconds = step - self.step, time.perf_counter() - self.started
        self.step, self.started = step, time.perf_counter()
        return count, count * self.tokens_per_step / max(seconds, 1e-9)

    def report(self, figure: str, rate: float, more: str = '') -> None:
        """Shows the last measured step with a figure as text, tokens per second, and more text.

        Args:
            figure: of the step.
            rate: tokens per second; 0 if there is none yet, as of a first step, which compiles.
            more: text at the end.
        """
        speed = f'{figure}, {rate:,.0f} tokens/s{more}' if rate else f'{figure}{more}'
        if self.bar:
            self.bar.set_postfix_str(speed)
            return
        left = (self.steps - self.step) * self.tokens_per_step / rate if rate else None
        interval = '' if left is None else f', {tqdm.tqdm.format_interval(left)} left'
        self.say(f'step {self.step}/{self.steps}: {speed}{interval}')

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self.bar:
            self.bar.write(text)
        elif not self.silent:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the bar and leaves it on the terminal."""
        if self.bar:
            self.bar.close()
