"""Starts a run from the backbone of a finished one, such as one that was trained on the same sequences without labels.

    python -m combiner.train --config CONFIG --config.init_from=OTHER_WORKDIR --workdir WORKDIR

The backbone must be the same: every array of it is taken over; one that is missing or has another shape is an error.
Heads are not taken over, nor is the vector before the first token where only one of the runs has it. An embedding may
have more tokens there (a mask): its first rows are taken. WORKDIR/data.json records the origin: step and fingerprint.
"""

import hashlib
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from combiner.run import checkpoint, corrupt, saved_config

_BACKBONE = 'trunk'
_BEGIN, _EMBEDDING = f'{_BACKBONE}.begin', f'{_BACKBONE}.embedding'


class Start(NamedTuple):
    """The first state of a run that starts from another.

    Attributes:
        state: with the parameters of the other run.
        lineage: entry of data.json.
        report: what was taken, what is new and what was left, as text.
    """

    state: Any
    lineage: dict[str, str]
    report: str


def check(source: str | os.PathLike[str] | None, workdir: str | os.PathLike[str], target: Any) -> None:
    """Checks that a run without a checkpoint can start from another, if it names one; reads no arrays.

    It comes before the config is written: a workdir would keep the name of a wrong source.

    Args:
        source: workdir of the finished run; None for a run that starts from none.
        workdir: of the run that starts.
        target: its first state, or the shapes of it.

    Raises:
        ValueError: as `load`.
    """
    if source and not checkpoint.steps_of(workdir):
        old = _by_name(_saved_arrays(source, _last_step(source)))
        _matching(source, old, _by_name({'params': target.params, 'collections': target.collections}))


def load(source: str | os.PathLike[str], state: Any) -> Start:
    """Replaces the backbone of a first state, and its moving average, by that of a finished run.

    Args:
        source: workdir of the finished run.
        state: the first state, placed on its devices.

    Raises:
        ValueError: the other run is not finished, or its backbone is another one; the message lists the arrays.
    """
    step = _last_step(source)
    new = _by_name({'params': state.params, 'collections': state.collections})
    old = _by_name(_saved_arrays(source, step))
    taken = _matching(source, old, new)
    checkpoints = checkpoint.Checkpoints(source, read_only=True)
    read, found = _read(checkpoints, taken, old, new)
    checkpoints.close()
    if read != step:
        raise _damaged(source, step, f'that of step {read} can')

    def replaced(path: Any, leaf: Any) -> Any:
        return found.get(_name(path), leaf)

    params, collections = (
        jax.tree_util.tree_map_with_path(lambda path, leaf, kind=kind: replaced((kind, *path), leaf), tree)
        for kind, tree in ((_key('params'), state.params), (_key('collections'), state.collections))
    )
    digest = hashlib.sha256()
    for name in taken:
        digest.update(name.encode() + _whole(found[name]).tobytes())
    # A copy: a training step takes both, and shares no buffer between them.
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    changed = state.replace(params=params, collections=collections, ema=ema)
    lineage = {'init_from': f'step {step}, {digest.hexdigest()[:16]}'}
    return Start(changed, lineage, _report(source, step, taken, old, new))


def _key(name: str) -> Any:
    return jax.tree_util.DictKey(name)


def _name(path: Any) -> str:
    """Returns the dotted name of an array, without the scopes around the backbone: 'trunk.embedding'."""
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    head, found, rest = name.partition(f'.{_BACKBONE}.')
    if not found:
        return name
    kind = head.split('.')[0]
    return f'{_BACKBONE}.{rest}' if kind == 'params' else f'{head.split(".")[1]}: {_BACKBONE}.{rest}'


def _by_name(tree: Any) -> dict[str, Any]:
    kept = {kind: tree.get(kind, {}) for kind in ('params', 'collections')}
    return {_name(path): (path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(kept)}


def _of_backbone(name: str) -> bool:
    return f'{_BACKBONE}.' in name


def _fits(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    return old == new or (name == _EMBEDDING and old[0] > new[0] and old[1:] == new[1:])


def _matching(source: str | os.PathLike[str], old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns the names of the arrays that are taken; raises ValueError if the backbones differ."""
    differing = []
    names = sorted(filter(_of_backbone, old.keys() | new.keys()))
    for name in names:
        there, here = (tuple(found[name][1].shape) if name in found else None for found in (old, new))
        agrees = name == _BEGIN if there is None or here is None else _fits(name, there, here)
        if not agrees:
            there, here = ('absent' if shape is None else shape for shape in (there, here))
            differing.append(f'{name}: {there} there, {here} here')
    if differing:
        raise ValueError(
            f'config.init_from={source} has another backbone ({"; ".join(differing[:5])}'
            f'{f"; and {len(differing) - 5} more" if len(differing) > 5 else ""}); '
            'train both with the same config.model, or start from another run'
        )
    return [name for name in names if name in old and name in new]


def _read(
    checkpoints: checkpoint.Checkpoints, taken: list[str], old: dict[str, Any], new: dict[str, Any]
) -> tuple[int, dict[str, jax.Array]]:
    """Reads arrays by name, each cut and placed as the new one; returns them and the step of their checkpoint."""
    target: dict[str, Any] = {'params': {}, 'collections': {}}
    for name in taken:
        keys = [entry.key for entry in old[name][0]]
        inner = target
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        leaf, shape = new[name][1], tuple(old[name][1].shape)
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        placement = leaf.sharding if shape == leaf.shape else everywhere  # until it is cut
        inner[keys[-1]] = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=placement)
    target = {kind: tree for kind, tree in target.items() if tree}
    step, restored = checkpoints.restore_parameters(target, 'latest')
    arrays = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(restored)}
    for name in taken:
        leaf = new[name][1]
        if arrays[name].shape != leaf.shape:
            arrays[name] = jax.device_put(arrays[name][: leaf.shape[0]], leaf.sharding)
    return step, arrays


def _whole(array: jax.Array) -> np.ndarray:
    """Returns all values of an array, also of one that several processes hold together; all of them must call it."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _saved_arrays(source: str | os.PathLike[str], step: int) -> Any:
    """Returns the arrays of a checkpoint, without their values."""
    try:
        return checkpoint.saved_arrays(source, step)
    except Exception as error:
        if not corrupt.is_damage(error):
            raise
        raise _damaged(source, step, corrupt.described(error)) from error


def _damaged(source: str | os.PathLike[str], step: int, why: str) -> ValueError:
    return ValueError(
        f'config.init_from={source}: its last checkpoint, of step {step}, cannot be read ({why}); restore it from a '
        'copy, continue that run, or start from another'
    )


def _last_step(source: str | os.PathLike[str]) -> int:
    """Returns the last step of a run; raises ValueError unless it is finished."""
    planned, step = saved_config.load(source).steps, max(checkpoint.steps_of(source), default=0)
    if step < planned:
        raise ValueError(f'config.init_from={source} has taken {step} of its {planned} steps; finish it first')
    return step


def _report(
    source: str | os.PathLike[str], step: int, taken: list[str], old: dict[str, Any], new: dict[str, Any]
) -> str:
    rows = [
        f' ({name}: the first {new[name][1].shape[0]} of {old[name][1].shape[0]} rows)'
        for name in taken
        if old[name][1].shape != new[name][1].shape
    ]
    parts = [f'started from step {step} of {source}: {len(taken)} arrays of its backbone{"".join(rows)}']
    for what, names in (('new here', new.keys() - set(taken)), ('not taken', old.keys() - set(taken))):
        if names:
            parts.append(f'{what}: {", ".join(sorted(names))}')
    return '; '.join(parts)
