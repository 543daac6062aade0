"""The config of a run in WORKDIR/config.json, and the check whether another config may continue the run.

A field that did not exist when the run was started has its default in `combiner.config.base`.
"""

import functools
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from combiner import atomic, paths
from combiner import config as common
from combiner.run import checkpoint

# Fields that may differ when a run is continued: how often it reports, and where devices and data are. A mesh changes
# only the order of sums (`mesh.context` also what dropout of attention weights draws). Data have fingerprints.
MAY_DIFFER = ('run', 'mesh', 'data.data_dir')


def load(workdir: str | os.PathLike[str]) -> Any:
    """Loads the config of a run from WORKDIR/config.json; missing fields get their defaults and are logged once.

    Raises:
        ValueError: the file does not exist or is not a JSON object.
    """
    path, saved = _read(workdir)
    complete = _with_defaults(saved)
    if absent := sorted(dict(_flatten(complete)).keys() - dict(_flatten(saved)).keys()):
        _log_defaults(path, ', '.join(absent))
    return ConfigDict(complete)


@functools.cache
def _log_defaults(path: paths.AnyPath, fields: str) -> None:
    logging.info('%s lacks fields that are newer than it; their defaults are used: %s', path, fields)


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config with the defaults of all missing fields, except the attention mechanism's.

    `model.remat` was a truth value before it was a name.
    """

    def merged(defaults: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
        return {**defaults, **config} | {
            key: merged(default, config[key])
            for key, default in defaults.items()
            if isinstance(default, dict) and isinstance(config.get(key), dict)
        }

    defaults = common.base().to_dict()
    del defaults['model']['attention']
    complete = merged(defaults, config)
    remat = complete['model']['remat']
    complete['model']['remat'] = {True: 'full', False: 'none'}.get(remat, remat)
    return complete


def _read(workdir: str | os.PathLike[str]) -> tuple[paths.AnyPath, dict[str, Any]]:
    """Returns the path of config.json and its content; raises as `load`."""
    path = paths.parse(workdir, 'workdir') / 'config.json'
    if not path.exists():
        raise ValueError(
            f'{workdir} is not the workdir of a run: it has no config.json; give the --workdir of a training'
        )
    try:
        saved = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(saved, dict):
            raise ValueError(f'{saved!r} is not an object')
        return path, saved
    except ValueError as error:
        raise ValueError(f'{path} is not valid JSON ({error}); restore it or train into a new workdir') from None


def differences(workdir: str | os.PathLike[str], config: Any) -> list[str]:
    """Lists the differences between a run's config and another one: each key with both values, as text.

    It ignores the fields in `MAY_DIFFER`, and whether `init_from` is a relative path. Missing fields have their
    defaults, as in `load`.

    Raises:
        ValueError: as `load`.
    """
    saved = dict(_flatten(load(workdir).to_dict()))
    given = dict(_flatten(_with_defaults(json.loads(json.dumps(config.to_dict())))))
    return [
        f'{key}: {saved.get(key, "absent")!r} there, {given.get(key, "absent")!r} here'
        for key in sorted(saved.keys() | given.keys())
        if saved.get(key, 'absent') != given.get(key, 'absent')
        and not (key == 'init_from' and _same_place(saved[key], given[key]))
        and not any(key == free or key.startswith(f'{free}.') for free in MAY_DIFFER)
    ]


def _same_place(one: str | None, other: str | None) -> bool:
    return bool(one and other) and paths.absolute(str(one)) == paths.absolute(str(other))


def claim(workdir: str | os.PathLike[str], config: Any, target: Any = None) -> None:
    """Writes the config into a new workdir, or checks that the workdir belongs to the same run.

    Args:
        workdir: the run's folder.
        config: the resolved config.
        target: the state as ShapeDtypeStructs: checkpoints must hold the same arrays, even if config.json is missing.

    Raises:
        ValueError: the workdir holds another config (the message lists all differences) or checkpoints of another
            state (it lists arrays that differ), or cannot be written.
    """
    path = paths.parse(workdir, 'workdir') / 'config.json'
    if differing := differences(workdir, config) if path.exists() else []:
        raise ValueError(
            f'{workdir} holds a run with another config ({"; ".join(differing)}); '
            'choose another --workdir, or continue that run with its own config'
        )
    if target is not None:
        _check_arrays(workdir, target)
    if jax.process_index() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(path, json.dumps(config.to_dict(), indent=2) + '\n')
        except OSError as error:
            raise ValueError(f'{workdir} cannot be written ({error}); choose another --workdir') from error


def _check_arrays(workdir: str | os.PathLike[str], target: Any) -> None:
    """Raises ValueError if the newest checkpoint with readable metadata has other arrays than `target`."""
    checkpoints = paths.absolute(workdir, 'workdir') / 'checkpoints'
    steps = [path for path in checkpoints.glob('*') if path.name.isdigit()]
    for path in sorted(steps, key=lambda path: -int(path.name)):
        try:
            saved = dict(_arrays(checkpoint.saved_arrays(workdir, int(path.name))))
        except Exception:  # damaged: `Checkpoints.restore` handles it
            continue
        wanted = dict(_arrays(target))
        differing = [
            f'{key}: {saved.get(key, "absent")} there, {wanted.get(key, "absent")} here'
            for key in sorted(saved.keys() | wanted.keys(), key=lambda key: (not key.startswith('params.'), key))
            if saved.get(key) != wanted.get(key)
        ]
        if differing:
            raise ValueError(
                f'{workdir} holds checkpoints of another model or optimizer ({"; ".join(differing[:3])}'
                f'{f"; and {len(differing) - 3} more" if len(differing) > 3 else ""}); '
                'choose another --workdir, or continue that run with its own config'
            )
        return


def _arrays(tree: Any) -> Iterator[tuple[str, str]]:
    """Yields the dotted name and the type of every array, such as ('params.trunk.begin', 'float32[64]')."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator='.'), f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'


def _flatten(tree: dict[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f'{prefix}{key}.')
        else:
            yield prefix + key, value
