"""Completes examples with a trained language model: it samples the second half of each, token by token.

    python -m combiner.sample --workdir DIR [--split test] [--examples 6] [--samples 3] [--seed 0]
        [--temperature 1.0] [--top_k 40] [--top_p 0.95] [--parameters latest] [--data_dir DIR] [--out FILE]
        [--other_data]

Writes the given part, the samples and the original of each example to FILE. The default is DIR/samples.png for images
and DIR/samples.txt for text; for another split than test, DIR/samples_SPLIT.png or .txt. The given text comes
from one document. Data that differ from the training data are refused; with --other_data, the samples go to a
separate file.
"""

import functools
import io
import math
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags, logging
from jaxtyping import Array, Float, Int, UInt8

from combiner import atomic, cli, evaluate, messages, models, paths, sharding, startup
from combiner.data import ops
from combiner.data.task import SPLITS, Task, open_split
from combiner.models import LanguageModel
from combiner.run import provenance


def scaled(logits: Float[Array, 'b u'], temperature: float) -> Float[Array, 'b u']:
    """Returns `(logits - max logits) / temperature`, at least in float32; the maximum is 0, so nothing overflows to ∞.

    The temperature is clipped to the range of the type. At its limits this gives the greedy choice and equal
    probabilities.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    least = float(jnp.finfo(logits.dtype).tiny)  # neither it nor its reciprocal is rounded to zero
    temperature = min(max(temperature, least), 1 / least)
    return (logits - logits.max(axis=-1, keepdims=True)) / temperature


def filter_logits(
    logits: Float[Array, 'b u'], top_k: int | None, top_p: float, temperature: float = 1.0
) -> Float[Array, 'b u']:
    """Sets the logits of unlikely tokens to minus infinity.

    First it keeps the `top_k` most likely tokens. Of these it keeps the smallest set of most likely tokens whose total
    probability at this temperature is at least `top_p` (nucleus sampling, Holtzman et al. 2020). Of equally likely
    tokens, the one with the lower id counts as more likely. The most likely token always stays.
    """
    if top_k is None and top_p == 1:
        return logits
    order = jnp.argsort(-logits, axis=-1)  # not of scaled logits, which may be equal where logits differ
    sorted_logits = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    if top_k is not None:
        sorted_logits = jnp.where(rank < top_k, sorted_logits, -jnp.inf)
    if top_p < 1:
        probability = jax.nn.softmax(scaled(sorted_logits, temperature), axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        sorted_logits = jnp.where((rank == 0) | (before < top_p), sorted_logits, -jnp.inf)
    return jnp.take_along_axis(sorted_logits, jnp.argsort(order, axis=-1), axis=-1)


def sample_token(
    key: Array, logits: Float[Array, 'b u'], temperature: float, top_k: int | None = None, top_p: float = 1.0
) -> Int[Array, ' b']:
    """Samples one token per row from `softmax(logits / temperature)` after `filter_logits`; greedy at temperature 0."""
    if temperature == 0:
        return logits.argmax(axis=-1)
    return jax.random.categorical(key, scaled(filter_logits(logits, top_k, top_p, temperature), temperature))


def _check(temperature: float, top_k: int | None, top_p: float, seed: int) -> None:
    if not 0 <= temperature < math.inf:  # nan neither
        raise ValueError(f'temperature {temperature} must be at least 0 and finite (0: always the most likely token)')
    if top_k is not None and top_k < 1:
        raise ValueError(f'top_k {top_k} must be at least 1; leave it unset to sample from all tokens')
    if not 0 < top_p <= 1:
        raise ValueError(f'top_p {top_p} must be above 0 and at most 1 (1: sample from all tokens)')
    if not 0 <= seed < 2**32:
        raise ValueError(f'seed {seed} does not lie in 0..2**32 - 1')


def complete(
    model: nn.Module,
    variables: dict[str, Any],
    prompts: Int[np.ndarray, 'b p'],
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> Int[np.ndarray, 'b l']:
    """Continues prompts to `length` tokens with a language model, with a progress bar.

    The prompt is processed in parallel; then each step decodes one token of every row with the mechanism's cache. The
    random key of token `i` is `fold_in` of the seed's key and `i`, whatever the grouping of the steps.

    Args:
        model: a `models.LanguageModel`.
        variables: of the model.
        prompts: at least 0 and fewer than `length` tokens per row.
        length: of the results, at most that of the model's longest sequence.
        temperature: at least 0 and finite; see `sample_token`.
        top_k: number of most likely tokens to sample from, at least 1; None for all. See `filter_logits`.
        top_p: total probability of the most likely tokens to sample from, above 0 and at most 1.
        seed: of the random numbers, 0..2**32 - 1.

    Raises:
        ValueError: an argument is out of range, the prompts have the full length, or it is no language model.
    """
    _check(temperature, top_k, top_p, seed)
    if not isinstance(model, LanguageModel):
        raise ValueError(f'a {type(model).__name__} cannot continue sequences; give a LanguageModel')
    given = prompts.shape[1]
    key = jax.random.key(seed)
    hashable: Any = model  # Flax makes it so, which type checkers do not see
    start, advance = _programs(hashable, length, temperature, top_k, top_p)
    with tqdm.tqdm(total=length - given, unit='token', dynamic_ncols=True) as bar:
        variables, state = start(variables, jnp.asarray(prompts, jnp.int32), key)
        bar.update()
        stride = max(1, (length - given) // 20)
        for first in range(given + 1, length, stride):
            last = min(first + stride, length)
            state = jax.block_until_ready(advance(variables, state, key, first, last))
            bar.update(last - first)
    return np.asarray(state[1])


@functools.lru_cache(maxsize=8)
def _programs(
    model: LanguageModel, length: int, temperature: float, top_k: int | None, top_p: float
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns two functions that are compiled once for all calls: one begins rows, the other continues them.

    Blocks decode one after another, not in a scan, which would copy the caches of all layers for each token.
    """
    unrolled = models.unrolled(model)

    def sampled(key: Array, index: Any, logits: Array) -> Array:
        return sample_token(jax.random.fold_in(key, index), logits, temperature, top_k, top_p)

    @jax.jit
    def start(variables: Any, prompts: Array, key: Array) -> tuple[Any, tuple[Any, Array]]:
        batch, given = prompts.shape
        counts = jnp.full(batch, given)
        logits, cache = model.apply(variables, prompts, counts, length, method='prefill', mutable=['cache'])
        tokens = jnp.pad(prompts, ((0, 0), (0, length - given))).at[:, given].set(sampled(key, given, logits))
        return models.of_unrolled(model, variables), (models.of_unrolled(model, cache), tokens)

    @functools.partial(jax.jit, donate_argnums=1)
    def advance(variables: Any, state: tuple[Any, Array], key: Array, first: Any, last: Any) -> tuple[Any, Array]:
        def step(index: Array, state: tuple[Any, Array]) -> tuple[Any, Array]:
            cache, tokens = state
            given, at = {**variables, **cache}, jnp.full(tokens.shape[0], index)
            logits, cache = unrolled.apply(given, tokens[:, index - 1], at, method='decode', mutable=['cache'])
            return cache, tokens.at[:, index].set(sampled(key, index, logits))

        return jax.lax.fori_loop(first, last, step, state)

    return start, advance


def grid(
    given: UInt8[np.ndarray, 'n y x 3'],
    samples: UInt8[np.ndarray, 'n s y x 3'],
    originals: UInt8[np.ndarray, 'n y x 3'],
) -> Any:
    """Returns a figure with one row per image: the given part, the samples, the original; grey without a last axis."""
    count = samples.shape[1]
    from matplotlib.figure import Figure  # slow to import: only where it is used

    figure = Figure(figsize=(count + 2, len(given) + 0.3), dpi=120, layout='compressed')
    axes = figure.subplots(len(given), count + 2, squeeze=False)
    titles = ['given', *(f'sample {i + 1}' for i in range(count)), 'original']
    for row, pictures in zip(axes, zip(given, *samples.swapaxes(0, 1), originals, strict=True), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture, cmap='gray', vmin=0, vmax=255, interpolation='nearest')
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    return figure


def sample(
    workdir: str | os.PathLike[str],
    *,
    examples: int = 6,
    samples: int = 3,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    parameters: str = 'latest',
    split: str = 'test',
    other_data: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
) -> paths.AnyPath:
    """Completes the second half of evenly spaced examples of a split; returns the path of the written file.

    The path is `out`, or by default WORKDIR/samples.png for images (their upper half is given) and WORKDIR/samples.txt
    for text, with a suffix for another split than test and for other data.

    Raises:
        OSError: the file cannot be written (checked before sampling).
        ValueError: as `evaluate.load`, `complete` and `provenance.check`; a count is below 1; the split is unknown; the
            model is not a language model; or no example is half as long as a sequence.
    """
    if split not in SPLITS:
        raise ValueError(f'unknown split {split!r}; known: {", ".join(SPLITS)}')
    if examples < 1 or samples < 1:
        raise ValueError(f'examples={examples} and samples={samples} must be at least 1')
    _check(temperature, top_k, top_p, seed)
    trained = evaluate.load(workdir, parameters, sharding.make_mesh(devices=jax.devices()[:1]), data_dir)
    task = trained.task
    evaluate.show_start(trained, workdir, parameters)
    if task.head != 'language_model':
        raise ValueError(
            f'{task.name} has a {task.head}; only language models can be sampled from; combiner.evaluate measures it'
        )
    rows, *rest = task.shape
    half = rows // 2 * math.prod(rest)
    found_in, is_text = trained.config.data.data_dir, bool(task.show) or len(task.shape) == 1
    ending = '' if split == 'test' else f'_{split}'
    ending += provenance.check(workdir, task, split, found_in, other_data)
    path = paths.parse(workdir, 'workdir') / f'samples{ending}.{"txt" if is_text else "png"}'
    path = path if out is None else paths.parse(out, 'out')
    with startup.timing('data'):
        originals = tokens_to_complete(task, found_in, examples, half, split)
    _check_writable(path)
    prompts = np.repeat(originals[:, :half], samples, axis=0)
    chosen = {'temperature': temperature, 'top_k': top_k, 'top_p': top_p, 'seed': seed}
    with sharding.use(trained.mesh):
        completed = complete(trained.model, trained.variables, prompts, task.length, **chosen)
    completed = completed.reshape(len(originals), samples, -1)
    if line := startup.report('samples'):
        logging.info(line)
    if is_text:
        atomic.write_text(path, listing(lambda tokens: task.text(tokens, found_in), originals, completed, half))
    else:
        atomic.write_bytes(path, _picture(task, originals, completed, half))
    return path


def _picture(task: Task, originals: Int[np.ndarray, 'n l'], completed: Int[np.ndarray, 'n s l'], given: int) -> bytes:
    """Returns the PNG of `grid`, of images whose first `given` values are known."""
    known = np.where(np.arange(task.length) < given, originals, 128)
    images = (ops.tokens_to_image(tokens, task.shape) for tokens in (known, completed, originals))
    picture = io.BytesIO()
    grid(*images).savefig(picture, format='png')
    return picture.getvalue()


def _check_writable(path: paths.AnyPath) -> None:
    probe = path.with_name(f'{path.name}.probe')
    try:
        atomic.write_text(probe, '')
    except OSError as error:
        raise paths.unwritable(path, error, '--out names another file') from None
    probe.unlink(missing_ok=True)


def tokens_to_complete(
    task: Task, data_dir: str | None, count: int, least: int, split: str = 'test'
) -> Int[np.ndarray, 'n l']:
    """Returns evenly spaced examples of a split with at least `least` tokens; for text, each from one document."""
    source = open_split(task.evaluated('documents' if 'documents' in task.evaluations else None), split, data_dir)
    found = {}
    for start in (number * len(source) // count for number in range(min(count, len(source)))):
        for index in range(start, len(source)):
            example = task.transform(source[index])
            if index not in found and example.get('valid', np.ones(task.length, bool))[:least].all():
                found[index] = example['tokens']
                break
    if not found:
        raise ValueError(f'no {split} example of {task.name} has {least} tokens to continue; try another --split')
    return np.stack(list(found.values()))


def listing(
    show: Callable[[np.ndarray], str],
    originals: Int[np.ndarray, 'n l'],
    completed: Int[np.ndarray, 'n s l'],
    given: int,
) -> str:
    """Returns as text, for each example, the given part and its continuations: the samples and the original."""
    parts = []
    for number, (original, samples) in enumerate(zip(originals, completed, strict=True)):
        parts.append(f'=== example {number}, given\n{show(original[:given])}')
        parts += [f'--- sample {index}\n{show(tokens[given:])}' for index, tokens in enumerate(samples)]
        parts.append(f'--- original\n{show(original[given:])}')
    return '\n'.join(parts) + '\n'


def command() -> None:
    """Runs the command line."""
    workdir = flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
    examples = flags.DEFINE_integer('examples', 6, 'How many examples to complete.')
    samples = flags.DEFINE_integer('samples', 3, 'Samples of each example.')
    temperature = flags.DEFINE_float('temperature', 1.0, '0: always the most likely token.')
    top_k = flags.DEFINE_integer('top_k', None, 'Sample only from this number of most likely tokens.')
    top_p = flags.DEFINE_float('top_p', 1.0, 'Sample only from the most likely tokens with this total probability.')
    seed = flags.DEFINE_integer('seed', 0, 'Seed of the random numbers.')
    parameters = flags.DEFINE_enum('parameters', 'latest', evaluate.PARAMETERS, "Which of the run's parameters.")
    split = flags.DEFINE_enum('split', 'test', SPLITS, 'Split whose examples to complete.')
    other_data = flags.DEFINE_bool('other_data', False, 'Accept data that differ from the training data.')
    data_dir = flags.DEFINE_string('data_dir', None, 'Folder of the data sets; by default as in training.')
    out = flags.DEFINE_string('out', None, 'Where to write the samples; by default into the workdir.')

    def main() -> None:
        messages.heading(device=f'1 device ({jax.devices()[0].device_kind})')
        path = sample(
            workdir.value,
            examples=examples.value,
            samples=samples.value,
            temperature=temperature.value,
            top_k=top_k.value,
            top_p=top_p.value,
            seed=seed.value,
            parameters=parameters.value,
            split=split.value,
            other_data=other_data.value,
            data_dir=data_dir.value,
            out=out.value,
        )
        print(f'wrote {path}')
        messages.next_steps(f'{messages.same_command()} --seed={seed.value + 1}  # other samples, into the same file')

    cli.run(main)


if __name__ == '__main__':
    command()
