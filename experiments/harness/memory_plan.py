"""Plans of training steps for TPUs that need not be present: the memory that a step takes on each chip."""

import argparse
import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from combiner import atomic, cli, messages, paths
from combiner.aot import programs, targets
from experiments.harness import runner
from experiments.harness.row import Row
from experiments.harness.run import Run

VERSIONS = ('jax', 'jaxlib', 'libtpu')
LINE = '    {:<44}  {:<9}  {:>9}  {:>11}  {:>6}'
HEAD = LINE.format('GiB on each chip, planned', 'topology', 'arguments', 'temporaries', 'in all')


def config_of(row: Row) -> Any:
    """Returns the row's config at full size."""
    return Run(row, 'full', 0, Path()).config()


def mesh_of(config: Any, topology: str) -> Mesh:
    """Returns the config's mesh, of all chips of a topology; raises as `targets.parse` and `programs.mesh`."""
    return programs.mesh(config, targets.parse(topology))


def settings(config: Any) -> dict[str, Any]:
    """Returns the settings of a config that determine the memory of a step, besides the model."""
    accumulation, remat = config.optimizer.accumulation, config.model.remat
    return {'batch_size': config.data.batch_size, 'accumulation': accumulation, 'remat': remat}


def plan(config: Any, mesh: Mesh) -> dict[str, Any]:
    """Returns the plan of a config's step on each chip of a mesh, with the settings that determine it.

    Raises:
        jax.errors.JaxRuntimeError: the compiler refuses the step for another reason than its temporaries.
    """
    found: dict[str, Any] = {'chips': mesh.size, **settings(config), 'fits': True}
    try:
        found |= programs.memory(programs.training_step(config, mesh).compile())
    except jax.errors.JaxRuntimeError as error:
        refused = programs.refusal(str(error))
        if not refused:
            raise
        found |= {'fits': False, **refused}
    return found


def line(found: dict[str, Any]) -> str:
    """Returns a plan as a row of the table that is printed, and copied to the cards of configs."""
    sizes = (found.get(f'{name}_bytes') for name in ('arguments', 'temporaries', 'total'))
    cells = ['–' if size is None else f'{size / 2**30:.1f}' for size in sizes]
    more = '' if found['fits'] else f' > {found["chip_bytes"] / 2**30:.1f}'
    return LINE.format(found['row'], found['topology'], *cells) + more


def read(path: Path, versions: dict[str, str]) -> list[dict[str, Any]]:
    """Reads the plans of a file, if it exists.

    Raises:
        ValueError: they were made with other versions.
    """
    if not path.exists():
        return []
    known = json.loads(path.read_text(encoding='utf-8'))
    if (made_by := {name: known[name] for name in VERSIONS}) != versions:
        raise ValueError(f'{path} was made by {made_by}, this is {versions}; give another --out')
    return known['plans']


@cli.guarded
def command(rows: Sequence[Row], out: str, description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog='python -m experiments.tables.memory',
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--rows', default='', help='patterns, separated by commas (default: all rows)')
    parser.add_argument('--topology', default='v5e:1x1', help='chips to compile for (default: %(default)s)')
    parser.add_argument('--out', type=paths.argument, default=Path(out), help='JSON (default: %(default)s)')
    options = parser.parse_args(arguments)
    if importlib.util.find_spec('libtpu') is None:
        parser.error('compiling for TPUs needs libtpu, which is not installed: bash scripts/setup.sh tpu-aot')
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    try:
        selected = runner.select(rows, options.rows)
        plans = read(options.out, versions)
    except ValueError as error:
        parser.error(str(error))
    messages.heading(device=f'{options.topology}, which need not be present', rows=len(selected))
    print(HEAD)
    for row in selected:
        at = {'row': runner.names_of(row)[0], 'topology': options.topology}
        found = next((known for known in plans if at.items() <= known.items()), None)
        if found is None:
            config = config_of(row)
            try:
                mesh = mesh_of(config, options.topology)
            except ValueError as error:
                parser.error(str(error))
            found = at | plan(config, mesh)
            plans.append(found)
            atomic.write_text(options.out, json.dumps({**versions, 'plans': plans}, indent=2) + '\n')
            jax.clear_caches()  # no two rows share a program
        print(line(found), flush=True)
    messages.next_steps(f'read {options.out}; the same command with other --rows or --topology adds to it')
