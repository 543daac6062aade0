"""The tables of the page on choosing an attention, from results/bench.json and results/compile.json."""

import json
from collections.abc import Iterable
from typing import Any

from experiments.harness import marked
from experiments.harness.compile_report import seconds_of
from experiments.harness.run import ROOT

PASSES = {'forward': 'forward', 'forward_backward': 'forward + backward'}
SOFTMAX = ('dense', 'full')  # all terms of the softmax: of JAX, and of this project
COMBINERS = 'combiner_'
MISSING = '–'


def read(name: str) -> dict[str, Any]:
    """Reads a file of results."""
    return json.loads((ROOT / 'results' / f'{name}.json').read_text(encoding='utf-8'))


def milliseconds(value: float | None) -> str:
    """Returns a time; `MISSING` for None."""
    if value is None:
        return MISSING
    return f'{value:,.0f} ms' if value >= 10 else f'{value:.1f} ms'


def by_length(rows: Iterable[dict[str, Any]]) -> dict[int, dict[str, dict[str, Any]]]:
    """Returns the measurements of attentions alone, by length and name."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row['what'] == 'core':
            found.setdefault(row['length'], {})[row['name']] = row
    return dict(sorted(found.items()))


def softmax_time(measured: dict[str, dict[str, Any]], which: str) -> float | None:
    """Returns the milliseconds of the faster softmax attention; None if neither was measured."""
    return min((measured[name][f'{which}_ms'] for name in SOFTMAX if name in measured), default=None)


def combiners(measured: dict[int, dict[str, dict[str, Any]]]) -> list[str]:
    """Returns the Combiners that were measured at every length."""
    names = set.intersection(*(set(row) for row in measured.values()))
    return sorted(name for name in names if name.startswith(COMBINERS))


def cpu_table(measured: dict[int, dict[str, dict[str, Any]]]) -> str:
    """Returns the time forward and backward over the length, and how many times less that is than softmax attention."""
    dense = {length: softmax_time(row, 'forward_backward') for length, row in measured.items()}
    lines = [['the faster of `dense` and `full`', *(milliseconds(each) for each in dense.values())]]
    for name in combiners(measured):
        cells = []
        for length, row in measured.items():
            own, of_dense = row[name]['forward_backward_ms'], dense[length]
            cells.append(milliseconds(own) + (f' ({of_dense / own:.1f}×)' if of_dense else ''))
        lines.append([f'`{name}`', *cells])
    return marked.table(['forward + backward', *(f'{length:,}' for length in measured)], lines)


def cpu_ahead_table(measured: dict[int, dict[str, dict[str, Any]]]) -> str:
    """Returns the lengths from which on each Combiner is faster than both softmax attentions, at all measured ones."""
    lines = []
    for name in combiners(measured):
        cells = []
        for which in PASSES:
            first = None
            for length, row in reversed(measured.items()):
                dense = softmax_time(row, which)
                if dense is not None and row[name][f'{which}_ms'] >= dense:
                    break
                first = length if dense is not None else first
            cells.append(MISSING if first is None else f'{first:,}')
        lines.append([f'`{name}`', *cells])
    return marked.table(['attention', *PASSES.values()], lines)


def memory_table(measured: dict[int, dict[str, dict[str, Any]]], length: int) -> str:
    """Returns the memory that XLA plans in addition to inputs and outputs, forward and backward, at a length."""
    row = measured[length]
    lines = [
        [f'`{name}`', f'{row[name]["forward_backward_temporaries_mb"]:,.0f} MB']
        for name in (*SOFTMAX, *combiners(measured))
    ]
    return marked.table([f'at {length:,} tokens', 'temporaries'], lines)


def tpu_table(found: list[dict[str, Any]]) -> str:
    """Returns how many times less time than `full` the Combiners need on a TPU, by roofline and by static schedule."""
    both = {(each['name'], each['length']): each for each in found if each['backward']}
    dense = {length: each for (name, length), each in both.items() if name.startswith('full+')}
    lines = []
    for name in sorted({name for name, _ in both if not name.startswith('full+')}):
        cells = [
            ', '.join(times_less(full, both.get((name, length)), by) for by in ('roofline', 'schedule'))
            for length, full in sorted(dense.items())
        ]
        lines.append([f'`{name}`', *cells])
    return marked.table(['forward + backward', *(f'{length:,}' for length in sorted(dense))], lines)


def times_less(full: dict[str, Any], own: dict[str, Any] | None, by: str) -> str:
    """Returns how many times less time than `full` an attention needs; `MISSING` if a time is not known."""
    slow, fast = (None if each is None else seconds_of(each, by) for each in (full, own))
    return f'{slow / fast:.1f}×' if slow and fast else MISSING


def parts() -> dict[str, str]:
    """Returns the parts of the page, by name."""
    measured = by_length(read('bench')['rows'])
    return {
        'cpu': cpu_table(measured),
        'cpu ahead': cpu_ahead_table(measured),
        'cpu memory': memory_table(measured, 4096),
        'tpu': tpu_table(read('compile')['attention']),
    }
