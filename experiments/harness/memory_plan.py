"""Plans of training steps for TPUs that need not be present: the memory that a step takes on each chip."""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from combiner import atomic, build, cli, optim, paths, sharding, steps, train
from combiner.data.task import Task
from experiments.harness import runner, step_cost
from experiments.harness.row import Row
from experiments.harness.run import Run

VERSIONS = ('jax', 'jaxlib', 'libtpu')
LINE = '    {:<44}  {:<9}  {:>9}  {:>11}  {:>6}'
HEAD = LINE.format('GiB on each chip, planned', 'topology', 'arguments', 'temporaries', 'in all')
UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def config_of(row: Row) -> Any:
    """Returns the row's config at full size."""
    return Run(row, 'full', 0, Path()).config()


def batch_shapes(task: Task, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch, with every array that a batch of this task may have."""
    tokens = jax.ShapeDtypeStruct((size, *task.input_shape), jnp.int32)
    targets = (size,) if task.classes else tokens.shape
    batch = {'tokens': tokens, 'targets': jax.ShapeDtypeStruct(targets, jnp.int32)}
    batch['weights'] = jax.ShapeDtypeStruct(targets, jnp.float32)
    if task.classes:
        batch['valid'] = jax.ShapeDtypeStruct(tokens.shape, bool)
    if task.packed:
        batch['segments'] = tokens
    return batch


def mesh_of(config: Any, topology: str) -> Mesh:
    """Returns the config's mesh, of all chips of a topology.

    Raises:
        ValueError: there is no such topology, or the config's batch does not split over it.
    """
    try:
        devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f'topology {topology!r}: {why}; write one such as v5e:1x1, v5e:2x4 or v5p:1x1x1') from None
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    train.check_numbers(config, mesh)
    return mesh


def compiled(config: Any, mesh: Mesh) -> Any:
    """Compiles the training step, as `train.train` does, for the mesh.

    Raises:
        jax.errors.JaxRuntimeError: the compiler refuses it.
    """
    task = build.task(config)
    model, optimizer = build.model(config, task), optim.optimizer(config.optimizer, config.steps)
    with sharding.use(mesh):  # mechanisms are traced for its devices, not for this machine's
        tokens = jax.ShapeDtypeStruct((sharding.batch_parts(mesh), *task.input_shape), jnp.int32)
        initialize = functools.partial(steps.initial_state, model, optimizer, config)
        state = sharding.place(jax.eval_shape(initialize, tokens), mesh)
        step = train.compile_step(steps.make_train_step(config, task, model, optimizer), state, mesh)
        return step.lower(state, batch_shapes(task, config.data.batch_size)).compile()


def refusal(message: str) -> dict[str, int]:
    """Parses the size of the temporaries and of a chip from a refusal of the compiler; {} for other messages."""
    found = re.search(r'HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)', message)
    if found is None:
        return {}
    used, of_used, has, of_has = found.groups()
    return {'temporaries_bytes': int(float(used) * UNITS[of_used]), 'chip_bytes': int(float(has) * UNITS[of_has])}


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
        found |= step_cost.planned(compiled(config, mesh))
    except jax.errors.JaxRuntimeError as error:
        refused = refusal(str(error))
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
    os.environ.update(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')  # do not search for chips, nor lock them
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
