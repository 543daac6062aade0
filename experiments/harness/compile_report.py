"""The report of scripts/compile.py: results/compile.json, the tables of docs/accelerators.md, and its picture.

Every result is written when it is there, and is not computed again by the same versions of the compilers.
"""

import importlib.metadata
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
from matplotlib.figure import Figure

import combiner
from combiner import atomic
from combiner.aot import targets
from combiner.core import registry
from experiments.harness import compiling, declarations, marked, runner
from experiments.harness.length_figure import LABEL_INCHES, draw
from experiments.harness.row import Row
from experiments.harness.run import ROOT, full_size

RESULTS = ROOT / 'results' / 'compile.json'
PAGE = ROOT / 'docs' / 'accelerators.md'
PICTURE = ROOT / 'docs' / 'images' / 'accelerators.png'
VERSIONS = ('jax', 'jaxlib', 'libtpu')
CHIP = 'v5e:1x1'  # of attention alone
SLICES = ('v5e:1x1', 'v5e:2x2', 'v5e:2x4', 'v5e:4x4')  # of rows, the smallest first
TABLES = ('table1', 'table2', 'table3', 'table5', 'pg19')
LONGEST = 'path-x/*'  # the column of Table 4 with the longest sequences
DENSE = 'full'
TOKENS = 65_536  # of all sequences of a batch, more than fit into the memory on the chip
FALLBACKS = ('dense', 'blockwise')  # of `full`, where it has no kernel
PASSES = {False: 'Forward', True: 'Forward and backward'}
MISSING = '–'
IDENTITY = {  # of a result
    'attention': ('name', *compiling.Attention._fields[1:]),
    'steps': ('row', 'target', *compiling.Settings._fields),
}


def read() -> dict[str, Any]:
    """Reads the results; those of other versions of the compilers are not continued.

    Raises:
        ValueError: they were made by other versions.
    """
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    if not RESULTS.exists():
        return {**versions, 'attention': [], 'steps': []}
    known = json.loads(RESULTS.read_text(encoding='utf-8'))
    if (made_by := {name: known[name] for name in VERSIONS}) != versions:
        raise ValueError(f'{RESULTS} was made by {made_by}, this is {versions}; remove it to make it again')
    return known


def attentions(lengths: Sequence[int]) -> list[compiling.Attention]:
    """Returns what is compiled alone: `full` and every Combiner without parameters, in each implementation."""
    names = [name for name in combiner.names(full_support=True) if not registry.resolve(name).requires]
    names.sort(key=lambda name: name != DENSE)
    texts = [text for name in names for text in compiling.implementations(name, 'tpu')]
    texts = [text for text in texts if text.rpartition('=')[2] not in FALLBACKS]
    return [
        compiling.Attention(text, length, backward, CHIP, batch=max(TOKENS // length, 1))
        for length in sorted(lengths)
        for text in texts
        for backward in PASSES
    ]


def rows(patterns: str) -> list[Row]:
    """Returns the rows whose steps are compiled: Tables 1 to 3 and 5, PG-19, and Path-X; '' for all, 'none' for none.

    Raises:
        ValueError: a pattern matches no row.
    """
    by_table = declarations.table_rows()
    found = [row for table in TABLES for row in by_table[table]] + runner.select(by_table['table4'], LONGEST)
    return [] if patterns == 'none' else runner.select(found, patterns)


def make(lengths: Sequence[int], patterns: str, *, compiles: bool) -> None:
    """Compiles what is missing, then writes the tables and the picture.

    Args:
        lengths: of attention alone.
        patterns: of rows.
        compiles: False to use the results that there are.
    """
    read()  # refuses results of other versions before anything is compiled
    if compiles:
        for asked in attentions(lengths):
            add_attention(asked)
        for row in rows(patterns):
            add_row(row)
    results = read()
    write_page(results)
    if results['attention']:
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        picture(results['attention']).savefig(PICTURE, dpi=110)


def find(results: dict[str, Any], kind: str, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the result of what is asked, by the fields of `IDENTITY`; None if there is none.

    A field that a result lacks was added after it was made, which was with the default of this field.
    """
    defaults = compiling.Attention._field_defaults
    for known in results[kind]:
        if all({**defaults, **known}[field] == asked[field] for field in IDENTITY[kind]):
            return known
    return None


def add(kind: str, found: dict[str, Any]) -> None:
    """Adds a result to those of the file, unless another process, which may have changed it, added the same.

    A step replaces that of the same row on the same slice with other settings.
    """
    results = read()
    if find(results, kind, found) is None:
        if kind == 'steps':
            same = {name: found[name] for name in ('row', 'target')}
            results[kind] = [known for known in results[kind] if not same.items() <= known.items()]
        results[kind].append(found)
        atomic.write_text(RESULTS, json.dumps(results, indent=1) + '\n')
    jax.clear_caches()  # no two programs share a trace


def compile_apart(asked: compiling.Attention) -> dict[str, Any]:
    """Compiles an attention in a process of its own: a failed check of the compiler ends the process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), _leave_accelerators_alone) as pool:
        try:
            return pool.submit(compiling.attention, asked).result()
        except BrokenProcessPool:
            refused = {'fits': False, 'refused': 'a failed check of the compiler ends it'}
            shape = {key: value for key, value in asked._asdict().items() if key != 'text'}
            return {'name': asked.text, **shape, **refused}


def _leave_accelerators_alone() -> None:
    jax.config.update('jax_platforms', 'cpu')


def add_attention(asked: compiling.Attention) -> None:
    """Compiles an attention, unless it is known."""
    if find(read(), 'attention', {'name': asked.text, **asked._asdict()}) is not None:
        return
    found = compile_apart(asked)
    print(compiling.describe_attention(found), flush=True)
    add('attention', found)


def add_row(row: Row) -> None:
    """Compiles the training step of a row, on the smallest slice that holds it, unless it is known.

    After a refusal, slices that have less memory than the step then needed are left out.
    """
    name, config = runner.names_of(row)[0], full_size(row)
    settings = compiling.settings(config)._asdict()
    needed = 0
    for text in SLICES:
        target = targets.parse(text)
        found = find(read(), 'steps', {'row': name, 'target': text, **settings})
        if found is None and target.chips * target.chip.hbm_bytes < needed:
            continue
        if found is None:
            found = {'row': name, **compiling.training_step(config, target)}
            print(compiling.describe_step(name, found), flush=True)
            add('steps', found)
        if found['fits']:
            return
        needed = max(needed, found['temporaries_bytes'] * target.chips)


def write_page(results: dict[str, Any]) -> None:
    """Replaces the tables of the page, each between two comments with its name."""
    marked.fill(PAGE, tables(results))


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Returns the tables of the page in Markdown, by name."""
    found = results['attention']
    return {
        'forward': attention_table(found, backward=False),
        'forward and backward': attention_table(found, backward=True),
        'ahead': ahead_table(found),
        'steps': step_table(results['steps']),
    }


def names_of(found: list[dict[str, Any]]) -> list[str]:
    """Returns the names of attentions in the order of tables: `full` first, implementations of one together."""
    return sorted({each['name'] for each in found}, key=lambda name: (name.partition('+')[0] != DENSE, name))


def attention_table(found: list[dict[str, Any]], *, backward: bool) -> str:
    """Returns a table of attentions over lengths; a cell has traffic, roofline time and static schedule."""
    lengths = sorted({each['length'] for each in found})
    lines = []
    for name in names_of(found):
        own = {each['length']: each for each in found if (each['name'], each['backward']) == (name, backward)}
        lines.append([f'`{name}`', *(_cell(own.get(length)) for length in lengths)])
    return marked.table(['attention', *(f'{length:,}' for length in lengths)], lines)


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return MISSING
    if not found['fits']:
        return 'refused' if 'refused' in found else compiling.why_not(found)
    schedule = found['schedule_seconds']
    return f'{found["times_least"]:.1f}×, {_us(found["roofline"]["seconds"])}, {_us(schedule)}'


def _us(seconds: float | None) -> str:
    return MISSING if seconds is None else f'{1e6 * seconds:,.0f} µs'


def ahead(found: list[dict[str, Any]], name: str, *, backward: bool, by: str) -> int | None:
    """Returns the shortest compiled length from which on an attention needs less time than `full` at its best.

    Args:
        found: attentions alone.
        name: of the attention.
        backward: whether with the gradients.
        by: 'roofline' or 'schedule'.

    Returns:
        The length; None if it is behind at the longest length that both have.
    """
    own: dict[int, float] = {}
    dense: dict[int, float] = {}
    for each in found:
        seconds = seconds_of(each, by) if each['backward'] == backward else None
        if seconds is None:
            continue
        if each['name'] == name:
            own[each['length']] = seconds
        elif each['name'].partition('+')[0] == DENSE:
            dense[each['length']] = min(seconds, dense.get(each['length'], seconds))
    first = None
    for length in sorted(own.keys() & dense.keys(), reverse=True):
        if own[length] >= dense[length]:
            break
        first = length
    return first


def seconds_of(found: dict[str, Any], by: str) -> float | None:
    """Returns the time of an attention by its 'roofline' or its 'schedule'; None if it is not known."""
    if not found['fits']:
        return None
    return found['roofline']['seconds'] if by == 'roofline' else found['schedule_seconds']


def ahead_table(found: list[dict[str, Any]]) -> str:
    """Returns the lengths from which on each attention is ahead of `full`."""
    names = [name for name in names_of(found) if name.partition('+')[0] != DENSE]
    lines = []
    for name in names:
        lengths = (
            ahead(found, name, backward=backward, by=by) for backward in PASSES for by in ('roofline', 'schedule')
        )
        lines.append([f'`{name}`', *(MISSING if length is None else f'{length:,}' for length in lengths)])
    head = ['attention', 'forward: roofline', 'schedule', 'forward and backward: roofline', 'schedule']
    return marked.table(head, lines)


def smallest_slices(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the training step of each row on the smallest slice that holds it or else the largest that was tried.

    The rows stand in the order of the tables.
    """
    by_row: dict[str, dict[str, Any]] = {}
    for each in sorted(found, key=lambda each: each['chips']):
        if not by_row.get(each['row'], {}).get('fits'):
            by_row[each['row']] = each
    return {name: by_row[name] for row in rows('') if (name := runner.names_of(row)[0]) in by_row}


def step_table(found: list[dict[str, Any]]) -> str:
    """Returns the training steps of `smallest_slices` as a table."""
    lines = []
    for name, best in smallest_slices(found).items():
        if not best['fits']:
            needs = compiling.memory_text(best['temporaries_bytes'])
            lines.append([name, f'none up to {best["target"]}', f'temporaries of {needs}', *[MISSING] * 5])
            continue
        times = best['roofline']
        sent = sum(traffic['sent_bytes'] for traffic in best['collectives'].values())
        lines.append(
            [
                name,
                best['target'],
                compiling.memory_text(best['total_bytes']),
                compiling.flops_text(best['flops']),
                compiling.bytes_text(best['hbm_bytes']),
                compiling.bytes_text(sent),
                f'{1e3 * times["seconds"]:,.1f} ms',
                times['bound'],
            ]
        )
    head = ['row', 'slice', 'memory', 'arithmetic', 'HBM traffic', 'sent', 'roofline of a step', 'binds']
    return marked.table(head, lines)


def picture(found: list[dict[str, Any]]) -> Figure:
    """Draws the times over length: roofline above, static schedule below; forward left, with backward right."""
    names = names_of(found)
    panel = max(3.2, LABEL_INCHES * len(names))  # inches
    fig = Figure(figsize=(14, 2 * panel + 1.6), layout='constrained')
    for axes, by in zip(fig.subplots(2, 2), ('roofline', 'schedule'), strict=True):
        for ax, backward in zip(axes, PASSES, strict=True):
            shown = [
                {**each, 'µs': 1e6 * seconds}
                for each in found
                if each['backward'] == backward and (seconds := seconds_of(each, by))
            ]
            if shown:
                draw(ax, shown, 'µs', LABEL_INCHES / panel, names)
            ax.set_title(f'{PASSES[backward]}: {by}', loc='left', fontsize=11)
            ax.set_ylabel('microseconds')
    size = f'{found[0]["heads"]} heads of {found[0]["head_width"]}, bfloat16, causal, {TOKENS:,} tokens'
    fig.suptitle(f'Attention alone, compiled for {CHIP}, not run: {size}', x=0.01, ha='left', fontsize=11)
    return fig
