"""The static schedule of Pallas kernels on a TPU: the instruction bundles that the compiler scheduled, times the grid.

The compiler writes the final schedule of every operation as text if it is asked to when it is loaded, so a new process
compiles the program once more. Bundles times the steps of the grid over the clock is a time without the waits for
memory: it can only be compared with other such times. The bundles of a loop inside a step count as often as it runs, if
the text has that number. A step that skips its work counts in full.
"""

import math
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax

_BUNDLES = re.compile(r'total scheduled bundles:\s+(\d+)')
_BUNDLE = re.compile(r'\s*0x[0-9a-f]+ *(LB)?[^:]*:\s*(>*) \{(.*)')  # whether a loop begins, and how deep it is in loops
_RUNS = re.compile(r'scmp\.ge\.s32\.totalorder [^,]*, (\d+) /\* loop exit test')
_KERNEL = re.compile(r'%?([\w.\-]+) = .*custom_call_target="tpu_custom_call"')


def base_name(name: str) -> str:
    """Returns the name of a kernel without the number that XLA appends."""
    return re.sub(r'[.\d]+$', '', name)


def traced_name(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name of a kernel that has a transformation around it, such as `jvp_NAME_`; None if unknown."""
    return max((each for each in known if each in name), key=len, default=None)


def grid_steps(jaxpr: Any) -> dict[str, int]:
    """Returns the number of grid steps of each kernel of a traced program; the largest of those of one name."""
    steps: dict[str, int] = {}
    for name, grid in _kernels(jaxpr):
        if all(isinstance(size, int) for size in grid):
            steps[name] = max(steps.get(name, 0), math.prod(grid))
    return steps


def _kernels(jaxpr: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'pallas_call':
            name = equation.params['name'] or ''
            yield base_name(name), tuple(equation.params['grid_mapping'].grid)
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, 'jaxpr', inner)
                if hasattr(inner, 'eqns'):
                    yield from _kernels(inner)


def read_bundles(folder: Path) -> dict[str, int]:
    """Returns the scheduled bundles of each kernel from the compiler's text; the most of those of one name."""
    found: dict[str, int] = {}
    for path in folder.glob('*schedule-analysis_final_bundles*'):
        text = path.read_text(encoding='utf-8', errors='replace')
        kernel, bundles = _KERNEL.search(text), _BUNDLES.search(text)
        if kernel and bundles:
            name, listing = base_name(kernel[1]), path.with_name(path.name.replace('00-schedule-analysis_', '01-'))
            again = _repeated(listing.read_text(encoding='utf-8', errors='replace')) if listing.exists() else 0
            found[name] = max(found.get(name, 0), int(bundles[1]) + again)
    return found


def _repeated(listing: str) -> int:
    """Returns how many bundles the loops inside a step of the grid, which is itself a loop, run again."""
    depths: list[int] = []
    runs: list[int] = []
    inside: list[int] = []  # the loops around a bundle
    of_bundles: list[list[int]] = []
    for line in listing.splitlines():
        bundle = _BUNDLE.match(line)
        depth = len(bundle[2]) if bundle else 0
        if not bundle or depth < 2:
            continue
        inside = [loop for loop in inside if depths[loop] <= depth - bool(bundle[1])]
        if bundle[1]:
            inside.append(len(runs))
            depths.append(depth)
            runs.append(1)
        number = _RUNS.search(bundle[3])
        if number and inside:
            runs[inside[-1]] = int(number[1])
        of_bundles.append(inside)
    return sum(math.prod(runs[loop] for loop in loops) - 1 for loops in of_bundles)


def bundles(compile_program: Callable[..., Any], *arguments: Any) -> dict[str, int]:
    """Returns the bundles of the kernels of a program.

    Args:
        compile_program: a function of a module, which a new process imports, that compiles the program for a TPU.
        *arguments: of it.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool,
    ):
        pool.submit(_compile_with_text, folder, compile_program, arguments).result()
        return read_bundles(Path(folder))


def _compile_with_text(folder: str, compile_program: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ['LIBTPU_INIT_ARGS'] = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
    os.environ['LIBTPU_INIT_ARGS'] += ' --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*'
    jax.config.update('jax_platforms', 'cpu')
    compile_program(*arguments)
