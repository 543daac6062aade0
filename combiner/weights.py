"""Exported models: a folder with all that is needed to use a trained model, without its run and its data.

    FOLDER/model.safetensors   the variables, by dotted name, such as params.trunk.embedding
    FOLDER/config.json         the config of the model, and where it comes from; `FIELDS` are its keys
    FOLDER/tokenizer.model     of a model of text: the SentencePiece model
    FOLDER/README.md           the model card, for readers (see `combiner.model_card`)

This is the layout of the Hugging Face hub. Reading executes nothing of the folder; a mechanism that config.json names
by a dotted path is imported, and must be installed.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from combiner import models, paths, sharding
from combiner.core import registry
from combiner.data.text.tokenizer import Tokenizer

WEIGHTS, CONFIG, TOKENIZER, CARD = 'model.safetensors', 'config.json', 'tokenizer.model', 'README.md'

MODEL_TYPE = 'combiner'
FORMAT = 1  # of the folder; a newer one is refused

# The keys of config.json and the types of their values.
FIELDS: dict[str, tuple[type, ...]] = {
    'model_type': (str,),
    'format': (int,),
    'version': (str,),  # of this package
    'head': (str,),  # with the next four, of the task: see `combiner.data.task.Task`
    'vocab_size': (int,),
    'shape': (list,),
    'classes': (int,),
    'packed': (bool,),
    'input_shape': (list,),  # of the tokens of one example
    'model': (dict,),  # the settings of the model: `config.model` of the run
    'tokenizer': (str, type(None)),  # fingerprint of the tokenizer, if there is one
    'training': (dict,),  # checkpoint and config of the run, for readers
}


class Pretrained(NamedTuple):
    """A model with its weights.

    Attributes:
        model: the Linen module; `model.apply(variables, tokens)` returns its logits.
        variables: `params`, and the model's other collections, if it has any.
        config: the content of config.json.
        tokenizer: of a model of text with a SentencePiece model; None for others, which take ids.
    """

    model: nn.Module
    variables: dict[str, Any]
    config: dict[str, Any]
    tokenizer: Tokenizer | None = None


def load(folder: str | os.PathLike[str], mesh: Mesh | None = None) -> Pretrained:
    """Loads an exported model; its variables are bitwise those that were exported.

    Args:
        folder: a folder that `combiner-export` has written.
        mesh: devices over which the variables are split, as in training, from `combiner.sharding.make_mesh`; None puts
            them on JAX's default device.

    Raises:
        ValueError: the folder is not an exported model, is damaged, or was written by a newer version; the module of
            its mechanism cannot be imported; or the mesh has other axes.
    """
    if mesh is not None:
        _check_mesh(mesh)
    place = paths.local(folder, 'folder of the model')
    config = _read_config(place)
    model = _build(config, place / CONFIG)
    expected = _shapes(model, config, mesh, place / CONFIG)
    arrays = _read_arrays(place / WEIGHTS)
    _check(arrays, expected, place / WEIGHTS)

    def put(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        value = arrays[_name(path)]
        # A copy: on a CPU the other one may be a view of the file.
        return jnp.array(value) if mesh is None else jax.device_put(value, shape.sharding)

    variables = jax.tree_util.tree_map_with_path(put, expected)
    return Pretrained(model, variables, config, _read_tokenizer(place / TOKENIZER, config['tokenizer']))


def save(folder: Path, variables: dict[str, Any], config: dict[str, Any], tokenizer: Tokenizer | None = None) -> None:
    """Writes all files but the card into a folder that exists."""
    arrays = {_name(path): _contiguous(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    save_file(arrays, folder / WEIGHTS, metadata={'format': 'flax'})
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors lets only the owner read it
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)


def count(variables: dict[str, Any]) -> int:
    """Returns the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables['params']))


def _check_mesh(mesh: Mesh) -> None:
    """Refuses a mesh to which `sharding.RULES` do not apply."""
    needed = (*sharding.BATCH_AXES, sharding.CONTEXT_AXIS, *sharding.HEAD_AXES)
    automatic = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
    if set(needed) - set(automatic):
        given = ', '.join(f'{name} ({kind.name})' for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True))
        raise ValueError(
            'variables are split over a mesh of combiner.sharding.make_mesh, which has the automatic axes '
            f'{", ".join(needed)}; got the axes {given}'
        )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='.')


def _contiguous(leaf: Any) -> np.ndarray:
    """Returns an array whose memory is in row-major order: safetensors writes memory as it is, without its strides."""
    return np.asarray(leaf, order='C')


def _read_config(folder: Path) -> dict[str, Any]:
    """Returns the content of config.json, with all keys of `FIELDS` and no other."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise ValueError(f'{folder} is no exported model: {CONFIG} cannot be read ({error.strerror})') from None
    except ValueError as error:
        raise ValueError(f'{path} is not valid JSON ({error}); export or download the model again') from None
    if not isinstance(config, dict) or config.get('model_type') != MODEL_TYPE:
        if (folder / 'checkpoints').is_dir():
            raise ValueError(f'{folder} is the workdir of a run: export its model (combiner-export --workdir {folder})')
        kind = config.get('model_type') if isinstance(config, dict) else config
        raise ValueError(f'{path} describes no model of this package: its model_type is {kind!r}, not {MODEL_TYPE!r}')
    number, version = config.get('format'), config.get('version')
    if number != FORMAT:
        raise ValueError(
            f'{path} has format {number!r}, and this version reads format {FORMAT}: combiner {version} wrote it; '
            'install that version or a newer one'
        )
    for key in FIELDS.keys() ^ config.keys():
        problem = 'lacks the key' if key in FIELDS else 'has the unknown key'
        raise ValueError(f'{path} {problem} {key!r}; known: {", ".join(FIELDS)}; export or download the model again')
    for key, kinds in FIELDS.items():
        if type(config[key]) not in kinds:
            raise ValueError(f'{path}: {key}={config[key]!r} must be of type {kinds[0].__name__}')
    return config


def _build(config: dict[str, Any], path: Path) -> nn.Module:
    """Builds the model of a config; raises ValueError if it cannot be built."""
    settings = config['model']
    name = settings.get('attention', {}).get('name', '')
    if ':' in name:
        try:
            registry.resolve(name)
        except ValueError as error:
            module = name.partition(':')[0]
            raise ValueError(
                f'{path}: {error}. The attention of this model is code of its own: install the package that has the '
                f'module {module}, or add its folder to PYTHONPATH'
            ) from error
    try:
        return models.build(
            config['head'],
            config['vocab_size'],
            tuple(config['shape']),
            settings,
            config['classes'],
            packed=config['packed'],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} describes no model ({_said(error)}); export or download the model again') from error


def _shapes(model: nn.Module, config: dict[str, Any], mesh: Mesh | None, path: Path) -> Any:
    """Returns the variables of a model as ShapeDtypeStructs with shardings."""
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    try:
        tokens = jax.ShapeDtypeStruct((sharding.batch_parts(mesh), *config['input_shape']), jnp.int32)
        with sharding.use(mesh):
            return sharding.place(dict(jax.eval_shape(model.init, jax.random.key(0), tokens)), mesh)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{path} describes no model ({_said(error)}); export or download the model again') from error


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except OSError as error:
        raise ValueError(f'{path} cannot be read ({error}); export or download the model again') from None
    except SafetensorError as error:
        raise ValueError(f'{path} is damaged ({error}); export or download the model again') from None


def _check(arrays: dict[str, np.ndarray], expected: Any, path: Path) -> None:
    """Checks that there are exactly the variables of the model, each with its shape and type.

    Raises:
        ValueError: they differ; the message names the first three differences.
    """
    wanted = {_name(place): _kind(shape) for place, shape in jax.tree_util.tree_leaves_with_path(expected)}
    found = {name: _kind(array) for name, array in arrays.items()}
    differing = [
        f'{name}: {found.get(name, "absent")} there, {wanted.get(name, "absent")} in the model'
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        more = f'; and {len(differing) - 3} more' if len(differing) > 3 else ''
        raise ValueError(
            f'{path} does not hold the variables of the model of {CONFIG} ({"; ".join(differing[:3])}{more}); '
            'export or download the model again'
        )


def _kind(array: Any) -> str:
    return f'{np.dtype(array.dtype).name}{list(array.shape)}'


def _read_tokenizer(path: Path, fingerprint: str | None) -> Tokenizer | None:
    if fingerprint is None:
        return None
    try:
        tokenizer = Tokenizer.load(path)
    except OSError as error:
        raise ValueError(f'{path} cannot be read ({error.strerror}); export or download the model again') from None
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f'{path} is another tokenizer than that of the model (fingerprint {tokenizer.fingerprint}, not '
            f'{fingerprint}); export or download the model again'
        )
    return tokenizer


def _said(error: Exception) -> str:
    return f'no {error}' if isinstance(error, KeyError) else str(error)
