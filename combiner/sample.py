"""Completes test images with a trained model: the lower half of each is drawn anew, token by token.

    python -m combiner.sample --workdir DIR [--images 6] [--samples 3] [--temperature 1.0] [--seed 0]

Writes DIR/samples.png: what was given, the samples, and the photograph they were cut from.
"""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags
from jaxtyping import Array, Float, Int, UInt8
from matplotlib.figure import Figure

from combiner import cli, evaluate, sharding
from combiner.data import ops, tasks


def draw(key: Array, logits: Float[Array, 'b u'], temperature: float) -> Int[Array, ' b']:
    """One token of each row from `softmax(logits / temperature)`; temperature 0 takes the most likely one."""
    if temperature == 0:
        return logits.argmax(axis=-1)
    return jax.random.categorical(key, logits / temperature)


def complete(
    trained: evaluate.Trained,
    prompts: Int[np.ndarray, 'b p'],
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> Int[np.ndarray, 'b l']:
    """Continues prompts to the task's full length, with a progress bar.

    The prompt is read in parallel, then each step decodes one token of every row from the mechanism's cache. Token
    `i` is drawn with the seed's key folded with `i`, so that a seed gives the same however the steps are grouped.

    Args:
        trained: see `evaluate.load`.
        prompts: at least 0 and fewer than `l` tokens of each row.
        temperature: at least 0; see `draw`.
        seed: of the random numbers, 0..2**32 - 1.

    Raises:
        ValueError: the temperature is negative, the seed is out of its range, or the prompt leaves nothing to draw.
    """
    if not temperature >= 0:  # nan neither
        raise ValueError(f'temperature {temperature} must be at least 0 (0: always the most likely token)')
    if not 0 <= seed < 2**32:
        raise ValueError(f'seed {seed} does not lie in 0..2**32 - 1')
    batch, given = prompts.shape
    length = trained.task.length
    model: Any = trained.model
    key = jax.random.key(seed)

    def start(variables: Any, prompts: Array) -> tuple[Any, Array]:
        counts = jnp.full(batch, given)
        logits, cache = model.apply(variables, prompts, counts, length, method='prefill', mutable=['cache'])
        tokens = jnp.pad(prompts, ((0, 0), (0, length - given)))
        return cache, tokens.at[:, given].set(draw(jax.random.fold_in(key, given), logits, temperature))

    def step(index: Array, state: tuple[Any, Array], variables: Any) -> tuple[Any, Array]:
        cache, tokens = state
        logits, cache = model.apply(
            {**variables, **cache}, tokens[:, index - 1], jnp.full(batch, index), method='decode', mutable=['cache']
        )
        return cache, tokens.at[:, index].set(draw(jax.random.fold_in(key, index), logits, temperature))

    @functools.partial(jax.jit, donate_argnums=1)
    def advance(variables: Any, state: tuple[Any, Array], first: Any, last: Any) -> tuple[Any, Array]:
        return jax.lax.fori_loop(first, last, functools.partial(step, variables=variables), state)

    with sharding.use(trained.mesh), tqdm.tqdm(total=length - given, unit='token', dynamic_ncols=True) as bar:
        state = jax.jit(start)(trained.variables, jnp.asarray(prompts, jnp.int32))
        bar.update()
        stride = max(1, (length - given) // 20)
        for first in range(given + 1, length, stride):
            last = min(first + stride, length)
            state = jax.block_until_ready(advance(trained.variables, state, first, last))
            bar.update(last - first)
    return np.asarray(state[1])


def grid(
    given: UInt8[np.ndarray, 'n y x 3'],
    samples: UInt8[np.ndarray, 'n s y x 3'],
    originals: UInt8[np.ndarray, 'n y x 3'],
) -> Figure:
    """One row for each image: the given part, the samples, the original."""
    count = samples.shape[1]
    figure = Figure(figsize=(count + 2, len(given) + 0.3), dpi=120, layout='compressed')
    axes = figure.subplots(len(given), count + 2, squeeze=False)
    titles = ['given', *(f'sample {i + 1}' for i in range(count)), 'original']
    for row, pictures in zip(axes, zip(given, *samples.swapaxes(0, 1), originals, strict=True), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture, interpolation='nearest')
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    return figure


def sample(
    workdir: str | os.PathLike[str],
    *,
    images: int = 6,
    samples: int = 3,
    temperature: float = 1.0,
    seed: int = 0,
    parameters: str = 'latest',
) -> Path:
    """Completes the lower half of evenly spaced test images and writes WORKDIR/samples.png; returns its path.

    Raises:
        ValueError: as `evaluate.load` and `complete`; a count below 1; or the task's sequences are no images.
    """
    if images < 1 or samples < 1:
        raise ValueError(f'images={images} and samples={samples} must be at least 1')
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    trained = evaluate.load(workdir, parameters, mesh)
    task = trained.task
    if len(task.shape) != 3:
        raise ValueError(f'{task.name} has sequences of shape {task.shape}; only images can be completed')
    source = tasks.open_split(task, 'test', trained.config.data.data_dir)
    images = min(images, len(source))
    originals = np.stack([source[i * len(source) // images]['image'] for i in range(images)])
    tokens = ops.image_to_tokens(originals)
    half = task.length // task.shape[0] * (task.shape[0] // 2)
    prompts = np.repeat(tokens[:, :half], samples, axis=0)
    completed = complete(trained, prompts, temperature=temperature, seed=seed)
    drawn = ops.tokens_to_image(completed, task.shape).reshape(images, samples, *task.shape)
    given = originals.copy()
    given[:, task.shape[0] // 2 :] = 128
    path = Path(workdir) / 'samples.png'
    grid(given, drawn, originals).savefig(path)
    return path


def command() -> None:
    """The command line."""
    workdir = flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
    images = flags.DEFINE_integer('images', 6, 'How many test images to complete.')
    samples = flags.DEFINE_integer('samples', 3, 'How many times each.')
    temperature = flags.DEFINE_float('temperature', 1.0, '0: always the most likely token.')
    seed = flags.DEFINE_integer('seed', 0, 'Of the random numbers.')
    parameters = flags.DEFINE_enum('parameters', 'latest', evaluate.PARAMETERS, "Which of the run's parameters.")

    def main() -> None:
        path = sample(
            workdir.value,
            images=images.value,
            samples=samples.value,
            temperature=temperature.value,
            seed=seed.value,
            parameters=parameters.value,
        )
        print(f'wrote {path}')

    cli.run(main)


if __name__ == '__main__':
    command()
