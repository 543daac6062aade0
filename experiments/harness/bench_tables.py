"""Tables of the measurements of scripts/bench.py in Markdown: times at a length, and growth of time with length."""

from collections.abc import Iterator
from typing import Any

import numpy as np

DENSE = 'dense'
CUDNN = f'{DENSE}+implementation=cudnn'  # a GPU's own dense attention, of 16-bit numbers
PASSES = ('forward', 'forward_backward')


def summarise(rows: list[dict[str, Any]], fit_from: int, peak_gflops: float) -> Iterator[dict[str, Any]]:
    """Yields the growth of time with length of each mechanism.

    Exponents are the slopes of least-squares lines through log time over log length, from length `fit_from` on; None
    with fewer than two lengths. Crossovers are the smallest powers of two at which the mechanism is at least as fast as
    dense; None if it never is. Shares of the peak are those at the longest length.
    """
    for what, name in dict.fromkeys((row['what'], row['name']) for row in rows):
        own = {row['length']: row for row in rows if (row['what'], row['name']) == (what, name)}
        dense = {row['length']: row for row in rows if (row['what'], row['name']) == (what, DENSE)}
        fitted = [length for length in own if length >= fit_from]
        found: dict[str, Any] = {'what': what, 'name': name, 'fitted_lengths': fitted}
        for each in PASSES:
            milliseconds = [own[length][f'{each}_ms'] for length in fitted]
            slope = np.polyfit(np.log(fitted), np.log(milliseconds), 1)[0] if len(fitted) > 1 else None
            found[f'{each}_exponent'] = None if slope is None else round(float(slope), 2)
            faster = [
                length
                for length in own.keys() & dense.keys()
                if length.bit_count() == 1 and own[length][f'{each}_ms'] <= dense[length][f'{each}_ms']
            ]
            found[f'{each}_crossover'] = min(faster, default=None)
            needed = own[max(own)][f'{each}_needed_gflops']
            found[f'{each}_share_of_peak'] = needed and round(needed / peak_gflops, 3)
        yield found


HEAD = (
    '| attention | length | forward | forward + backward | temporaries | compile |',
    '|---|---|---|---|---|---|',
)
SUMMARY_HEAD = (
    '| attention | forward: growth | as fast as dense at | of peak | forward + backward: growth | as fast | of peak |',
    '|---|---|---|---|---|---|---|',
)


def line(row: dict[str, Any]) -> str:
    """Returns a row in Markdown; temporaries and seconds to compile are those of forward and backward together."""
    cells = []
    for each in PASSES:
        milliseconds, faster = row[f'{each}_ms'], row[f'{each}_times_faster']
        cells.append(f'{milliseconds:.{0 if milliseconds >= 10 else 2}f} ms' + (f' ({faster:.1f}×)' if faster else ''))
    temporaries, seconds = row['forward_backward_temporaries_mb'], row['forward_backward_compile_s']
    return f'| `{row["name"]}` | {row["length"]:,} | {" | ".join(cells)} | {temporaries:,.0f} MB | {seconds:.1f} s |'


def summary_line(found: dict[str, Any]) -> str:
    """Returns the summary of one mechanism in Markdown."""
    cells = []
    for each in PASSES:
        exponent, crossover, share = (found[f'{each}_{key}'] for key in ('exponent', 'crossover', 'share_of_peak'))
        cells.append('–' if exponent is None else f'l^{exponent:.2f}')
        cells.append('–' if crossover is None else f'{crossover:,}')
        cells.append('–' if share is None else f'{share:.1%}')
    return f'| `{found["name"]}` | {" | ".join(cells)} |'


def table(rows: list[dict[str, Any]], what: str, length: int) -> str:
    """Returns the rows of one length in Markdown."""
    return '\n'.join([*HEAD, *(line(row) for row in rows if (row['what'], row['length']) == (what, length))])


def summary_table(summary: list[dict[str, Any]], what: str) -> str:
    """Returns the growth of time with length in Markdown."""
    return '\n'.join([*SUMMARY_HEAD, *(summary_line(found) for found in summary if found['what'] == what)])
