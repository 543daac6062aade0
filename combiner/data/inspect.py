"""Shows the data that a config feeds to a model.

    python -m combiner.data.inspect --config configs/photos.py [--split train] [--examples 4] [--batches 16] [--out PNG]

Prints the task, the number of records per split, shape and type of every array in a batch, statistics over some
batches (lengths, padding, counted targets, classes, most frequent tokens), and the first examples as text or, for
images, as a picture. For the training split, these are the first batches of training, random masks included.
"""

import collections
import itertools
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Int, UInt8
from ml_collections import config_flags
from PIL import Image

from combiner import cli, config_flag, messages, paths
from combiner.data import ops, pipeline, tasks
from combiner.data.task import SPLITS, Task, open_split

_WHITE = 255
_LINE = 100  # characters that are shown of an example without text


def batches(task: Task, config: Any, split: str, count: int) -> list[dict[str, np.ndarray]]:
    """Returns the first batches of a split, as training ('train') or evaluation (other splits) reads them.

    Raises:
        ValueError: see `pipeline.train_batches`.
        FileNotFoundError: a file of the data set is missing.
    """
    data_dir = config.data.data_dir
    if split == 'train':
        read = pipeline.train_batches(task, batch_size=config.data.batch_size, seed=config.seed, data_dir=data_dir)
    else:
        read = pipeline.eval_batches(task, split, batch_size=config.run.eval_batch_size, data_dir=data_dir)
    return list(itertools.islice(read, count))


def statistics(read: list[dict[str, np.ndarray]], most: int | None) -> list[str]:
    """Returns lines of text about lengths, padding, weights, classes and tokens of batches.

    Args:
        read: the batches.
        most: number of examples, after which the last batch is filled up with blank rows; None if it is not.
    """
    joined = {name: np.concatenate([batch[name] for batch in read])[:most] for name in read[0]}
    lines = [f'  {name:<9} {value.dtype} {list(read[0][name].shape)}' for name, value in joined.items()]
    tokens, targets, weights = joined['tokens'], joined['targets'], joined['weights']
    examples = len(tokens)
    lines.append(f'{examples:,} examples, {tokens.size:,} tokens, {int((weights > 0).sum()):,} targets that count')
    counted = joined.get('valid', np.ones(tokens.shape, bool))
    if 'segments' in joined:
        documents = joined['segments'].max(axis=1)
        lines.append(f'documents in a row: {documents.min()} to {documents.max()}, {documents.mean():.1f} on average')
        counted = joined['segments'] > 0
    lengths = counted.sum(axis=-1).ravel()
    low, middle, high = np.percentile(lengths, [0, 50, 100]).astype(int)
    lines.append(f'lengths: {low:,} to {high:,}, median {middle:,}; {1 - counted.mean():.1%} padding')
    if targets.ndim == 1:
        counts = collections.Counter(targets[weights > 0].tolist())
        lines.append('classes: ' + ', '.join(f'{name}: {count}' for name, count in sorted(counts.items())))
    for name in ('words', 'bytes'):
        if name in joined:
            lines.append(f'{name}: {int(joined[name].sum()):,}')
    frequent = collections.Counter(tokens[counted].tolist()).most_common(8)
    listed = ', '.join(f'{token} ({count / counted.sum():.1%})' for token, count in frequent)
    lines.append(f'{len(np.unique(tokens[counted])):,} distinct tokens; most frequent: {listed}')
    return lines


def as_text(task: Task, example: dict[str, np.ndarray], data_dir: str | None) -> str:
    """Returns an example as readable text: its tokens (by `task.show`, or as numbers) and its class."""
    tokens = example['tokens']
    shown = task.text(tokens, data_dir)
    if not task.show and len(shown) > _LINE:
        shown = shown[:_LINE] + ' …'
    label = f'class {int(example["targets"])}: ' if example['targets'].ndim == 0 else ''
    return label + shown


def picture(task: Task, tokens: Int[np.ndarray, 'count length']) -> UInt8[np.ndarray, 'height width channels']:
    """Joins the images of a task with two or three axes into one row, with white lines between them."""
    rows, columns, *channels = task.shape
    values = np.where(tokens > _WHITE, _WHITE // 2, tokens)  # the mask of a masked model, in grey
    images = ops.tokens_to_image(values, (rows, columns, *(channels or [1])))
    framed = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=_WHITE)
    return np.concatenate(list(framed), axis=1)


def describe(config: Any, split: str, examples: int, count: int, out: str | None) -> str:
    """Returns the text that the command prints; for image tasks, writes the picture to `out`.

    Raises:
        ValueError: a token is not in the task's vocabulary; or see `batches`.
        FileNotFoundError: a file of the data set is missing.
    """
    config = paths.with_data_dir(config)
    task = tasks.make(config.task, **config.data.options)
    read = batches(task, config, split, count)
    low, high = min(batch['tokens'].min() for batch in read), max(batch['tokens'].max() for batch in read)
    if low < 0 or high >= task.vocab_size:
        raise ValueError(
            f'the tokens are {low} to {high}, but the task has vocab_size={task.vocab_size}: they must be 0 to '
            f'{task.vocab_size - 1}'
        )
    sizes = ', '.join(f'{name} {len(open_split(task, name, config.data.data_dir)):,}' for name in SPLITS)
    first = {name: value[:examples] for name, value in read[0].items()}
    lines = [
        f'task {task.name}: {task.dataset}',
        f'head {task.head}, vocabulary {task.vocab_size:,}, shape {"x".join(map(str, task.shape))}, '
        f'metrics {", ".join(task.metrics)}',
        f'records: {sizes}',
        f'{split}, the first {len(read)} batches:',
        *statistics(read, None if split == 'train' else len(open_split(task, split, config.data.data_dir))),
    ]
    if len(task.shape) > 1:
        if out is not None:
            path = paths.local(out, 'out')
            pixels = picture(task, first['tokens'])
            Image.fromarray(pixels.squeeze()).resize(
                (4 * pixels.shape[1], 4 * pixels.shape[0]), Image.Resampling.NEAREST
            ).save(path)
            lines.append(f'the first {len(first["tokens"])} images: {path}')
        return '\n'.join(lines)
    for index in range(len(first['tokens'])):
        example = {name: np.asarray(value[index]) for name, value in first.items()}
        lines.append(f'example {index}: {as_text(task, example, config.data.data_dir)}')
    return '\n'.join(lines)


def command() -> None:
    """Runs the command line."""
    config = config_flags.DEFINE_config_file('config', None, 'Config file, with its arguments after a colon.')
    split = flags.DEFINE_enum('split', 'train', SPLITS, 'Split to show.')
    examples = flags.DEFINE_integer('examples', 4, 'Examples to show.', lower_bound=1)
    count = flags.DEFINE_integer('batches', 16, 'Batches for the statistics.', lower_bound=1)
    out = flags.DEFINE_string('out', None, 'PNG to write the images of an image task to.')
    flags.mark_flag_as_required('config')

    def main() -> None:
        given = config_flag.arguments()
        messages.heading(config=' '.join(given[1:]))
        print(describe(config.value, split.value, examples.value, count.value, out.value))
        messages.next_steps(messages.training(*given[1:]))

    cli.run(main)


if __name__ == '__main__':
    command()
