"""The effective matrix of an attention layer of a trained model: computed, described and drawn.

Mechanisms need no code for this: the output is linear in the values, so the columns of the identity as values give the
columns of the matrix, `d` at a time. Everything is computed in float32. A numerical rank is the number of singular
values above 1e-5 of the largest.

Letters: `b` batch, `l` length, `h` heads, `d` head width, `e` model width, `s` span.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from jaxtyping import Array, Float, Int
from matplotlib import colormaps
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from combiner import atomic, cli, evaluate, messages, paths, sharding
from combiner.core.mechanism import Context
from combiner.core.module import Attention
from combiner.data.task import open_split
from combiner.patterns import Mixture, Pattern
from experiments.harness import pattern_figure

RANK_TOLERANCE = 1e-5  # float32 rounds to 6e-8, and a weight is a product of a few such numbers
LINEAR_TOLERANCE = 1e-3  # of the matrix times the values, against the output
FAINTEST = 1e-5  # weight that is drawn black
COLORS = 'magma'
PIXELS = 256  # of the picture of one head, at most; longer sequences have several positions in a pixel


class Layer(NamedTuple):
    """One attention layer of a model as a function of its values: the module, its variables and its inputs."""

    module: Attention
    variables: dict[str, Any]
    x: Float[Array, 'b l e']
    q: Float[Array, 'b l h d']
    k: Float[Array, 'b l h d']
    v: Float[Array, 'b l h d']

    def attend(self, values: Float[Array, 'b l h d']) -> Float[Array, 'b l h d']:
        """Returns the output of the mechanism for other values, with the same queries and keys."""
        return self.module.apply(self.variables, self.q, self.k, values, Context(self.x), method='attend')  # pyright: ignore[reportReturnType]


def capture(model: nn.Module, variables: dict[str, Any], tokens: Int[np.ndarray, 'b *l']) -> list[Layer]:
    """Runs a model and returns its attention layers, each with its inputs."""
    modules: dict[tuple[str, ...], Attention] = {}

    def keep(attend: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if not isinstance(module, Attention):
            return attend(*args, **kwargs)
        if context.method_name == '__call__':
            modules[module.path] = module.clone(parent=None, name=None, dtype=jnp.float32)
        if context.method_name == 'attend':
            *qkv, given = args
            for name, value in zip(Layer._fields[2:], (given.x, *qkv), strict=True):
                module.sow('captured', name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return attend(*args, **kwargs)

    @jax.jit
    def run(variables: dict[str, Any], tokens: Array) -> Any:
        with nn.intercept_methods(keep):
            return model.apply(variables, tokens, mutable=['captured'])[1]

    state = run(variables, jnp.asarray(tokens))

    def at(tree: Any, path: tuple[str, ...]) -> Any:
        for name in path:
            tree = tree.get(name, {})
        return tree

    # Scanned blocks are one module, whose variables and captured values have a leading axis of layers.
    scanned = len(modules) == 1 and at(state['captured'], next(iter(modules)))['q'].ndim == 5
    layers = []
    for path, module in modules.items():
        own = {name: at(collection, path) for name, collection in variables.items()}
        given = jax.tree.map(lambda a: a.astype(jnp.float32), at(state['captured'], path))
        of_layers = [(own, given)]
        if scanned:
            of_layers = [jax.tree.map(lambda a, n=n: a[n], (own, given)) for n in range(given['q'].shape[0])]
        layers += [Layer(module, own, **{name: given[name] for name in Layer._fields[2:]}) for own, given in of_layers]
    return layers


def effective(layer: Layer) -> Float[np.ndarray, 'b h l l']:
    """Returns the matrix that a layer multiplies its values with, for each head.

    Raises:
        ValueError: there is no such matrix, because the mechanism's weights depend on its values.
    """
    batch, length, heads, width = layer.v.shape

    def columns(first: Array) -> Float[Array, 'b l h d']:
        identity = jnp.arange(length)[:, None] == first + jnp.arange(width)
        values = jnp.broadcast_to(identity[None, :, None], layer.v.shape).astype(jnp.float32)
        return layer.attend(values)

    @jax.jit
    def run() -> tuple[Array, Array]:
        found = jax.lax.map(columns, jnp.arange(0, length, width))
        matrix = jnp.moveaxis(found, 0, 3).reshape(batch, length, heads, -1)[..., :length].transpose(0, 2, 1, 3)
        attended = layer.attend(layer.v)
        product = jnp.einsum('bhlm,bmhd->blhd', matrix, layer.v, precision='highest')
        return matrix, abs(product - attended).max() / abs(attended).max()

    matrix, error = run()
    if not error <= LINEAR_TOLERANCE:
        raise ValueError(
            f'{type(layer.module.mechanism).__name__} has no effective matrix: its weights depend on its values '
            f'(the matrix times the values is off by {error:.1g} of the largest output)'
        )
    return np.asarray(matrix)


def rank(matrix: Float[np.ndarray, 'r c']) -> int:
    """Returns the number of singular values above RANK_TOLERANCE of the largest."""
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    return int((values > RANK_TOLERANCE * values[0]).sum()) if values[0] else 0


def span_ranks(matrix: Float[np.ndarray, 'l l'], pattern: Pattern) -> list[int]:
    """Returns the rank within each span: the rows of all positions that use it, the columns of its members.

    Skips spans with a single row or member, and spans with cells that are covered a second time: their ranks prove
    nothing.
    """
    once = pattern.coverage() == 1
    ranks = []
    for span, users in zip(pattern.spans, pattern.uses.T, strict=True):
        cells = np.ix_(users, span)
        if min(users.sum(), span.sum()) > 1 and once[cells].all():
            ranks.append(rank(matrix[cells]))
    return ranks


def describe(matrix: Float[np.ndarray, 'l l'], pattern: Pattern | Mixture | None) -> dict[str, Any]:
    """Returns properties of one head's matrix: row sums and rank, and with a pattern the weight and rank of its parts.

    Of a mixture, direct cells are those that are direct in all parts, and no span is examined: another part covers its
    members too, and a mean of matrices of rank 1 has any rank.
    """
    found = {'largest_row_sum_error': float(abs(matrix.sum(axis=1) - 1).max()), 'rank': rank(matrix)}
    if pattern is None:
        return found
    parts = list(pattern_figure.parts_by_title('', pattern).values())
    ranks = span_ranks(matrix, parts[0]) if len(parts) == 1 else []
    direct = np.where(np.all([part.direct for part in parts], axis=0), matrix, 0)
    return found | {
        'largest_beyond_support': float(abs(matrix[pattern.coverage() == 0]).max(initial=0)),
        'direct_rank': rank(direct),
        'direct_weight': float(direct.sum() / matrix.sum()),
        'spans_examined': len(ranks),
        'largest_span_rank': max(ranks, default=0),
    }


def figure(
    matrices: Float[np.ndarray, 'h l l'], pattern: Pattern | Mixture | None, heads: list[dict], heading: str
) -> Figure:
    """Draws the pattern and every head's matrix, on one logarithmic scale."""
    patterns = {} if pattern is None else pattern_figure.parts_by_title('pattern', pattern)
    panels = len(patterns) + len(matrices)
    columns = min(3, panels)
    rows = math.ceil(panels / columns)
    fig = Figure(figsize=(3.3 * columns + 0.8, 3.4 * rows + 0.6), layout='constrained')
    axes = fig.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[panels:]:
        ax.axis('off')
    for ax, (title, part) in zip(axes.flat, patterns.items(), strict=False):
        pattern_figure.draw(ax, title, part)
    drawn = axes.flat[len(patterns) : panels]
    for head, (ax, matrix, found) in enumerate(zip(drawn, matrices, heads, strict=True)):
        norm = LogNorm(FAINTEST, 1, clip=True)
        image = ax.imshow(matrix.clip(FAINTEST), cmap=COLORS, norm=norm, interpolation='nearest')
        ax.set_title(f'head {head}', fontsize=11, fontweight='bold', loc='left', pad=18)
        parts = [f'rank {found["rank"]}']
        if pattern is not None:
            parts.append(f'{found["direct_weight"]:.0%} of the weight direct')
        ax.text(0, 1.03, ', '.join(parts), transform=ax.transAxes, fontsize=8.5, color='#555555')
        ax.tick_params(length=2, labelsize=8, colors='#555555')
    fig.colorbar(image, ax=list(drawn), label='weight q(j|i), 1e-5 or less black', shrink=0.6)
    fig.supxlabel('key position j (tokens)', fontsize=9)
    fig.supylabel('query position i (tokens)', fontsize=9)
    fig.suptitle(heading, fontsize=12, x=0.01, ha='left')
    return fig


def pooled(values: Int[np.ndarray, 'l l'] | Float[np.ndarray, 'l l'], size: int) -> np.ndarray:
    """Returns the largest value of each square of `size` by `size` cells; squares at the ends may be cut."""
    starts = np.arange(0, len(values), size)
    return np.maximum.reduceat(np.maximum.reduceat(values, starts, axis=0), starts, axis=1)


def save_picture(path: Path, shades: Int[np.ndarray, 'r c'], colors: Float[np.ndarray, 'n 3']) -> None:
    """Writes a PNG file of the colours with these numbers, one pixel for each."""
    picture = Image.fromarray(shades.astype(np.uint8)).convert('P')
    picture.putpalette(np.round(255 * colors).astype(np.uint8).tobytes())
    with atomic.replacing(path) as temporary:
        picture.save(temporary, format='PNG', optimize=True)


def save_pictures(
    path: Path, matrices: Float[np.ndarray, 'h l l'], pattern: Pattern | None, found: dict[str, Any]
) -> None:
    """Writes a small picture of each head, and of the pattern, and adds their names to the description.

    Args:
        path: of the files, without an ending.
        matrices: of the heads.
        pattern: of the mechanism, or None.
        found: the content of the JSON file, to which `tokens_per_pixel`, `pattern_picture` and, for each head,
            `picture` are added.
    """
    size = found['tokens_per_pixel'] = math.ceil(matrices.shape[-1] / PIXELS)
    palette = colormaps[COLORS](np.linspace(0, 1, 256))[:, :3]
    for number, (matrix, head) in enumerate(zip(matrices, found['heads'], strict=True)):
        head['picture'] = f'{path.name}_head{number}.png'
        scaled = 1 - np.log(pooled(matrix, size).clip(FAINTEST, 1)) / np.log(FAINTEST)
        save_picture(path.with_name(head['picture']), np.round(255 * scaled).astype(int), palette)
    if pattern is not None:
        found['pattern_picture'] = f'{path.name}_pattern.png'
        kinds = pattern_figure.classes(pattern)
        direct = kinds == pattern_figure.DIRECT
        shades = np.where(pooled(direct, size), pattern_figure.DIRECT, pooled(np.where(direct, 0, kinds), size))
        save_picture(
            path.with_name(found['pattern_picture']), shades, np.array([to_rgb(c) for c in pattern_figure.COLORS])
        )


def draw_layer(workdir: Path, layer: Layer, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes the pictures and the JSON file of one layer; returns the content of the JSON file.

    Args:
        workdir: folder of the run.
        layer: one example.
        settings: what the JSON file begins with, among them attention, layer, image and step.
    """
    matrices = effective(layer)[0]
    try:
        pattern = layer.module.mechanism.pattern(matrices.shape[-1])
    except NotImplementedError:
        pattern = None
    heads = [describe(matrix, pattern) for matrix in matrices]
    result = {**settings, 'length': matrices.shape[-1], 'rank_tolerance': RANK_TOLERANCE, 'heads': heads}
    path = workdir / f'attention_map_{settings["layer"]}_{settings["image"]}'
    heading = (
        f'{settings["attention"]["name"]}, layer {settings["layer"]}, step {settings["step"]:,}: '
        'attention of each position'
    )
    with atomic.replacing(path.with_suffix('.png')) as temporary:
        figure(matrices, pattern, heads, heading).savefig(temporary, dpi=150, format='png')
    one = pattern if isinstance(pattern, Pattern) else None  # a picture of several partitions would need several files
    save_pictures(path, matrices, one, result)
    atomic.write_text(path.with_suffix('.json'), json.dumps(result, indent=2) + '\n')
    return result


def attention_map(
    workdir: Path,
    *,
    layer: int | None = 0,
    image: int = 0,
    length: int | None = None,
    parameters: str = 'latest',
    data_dir: Path | None = None,
) -> list[dict[str, Any]]:
    """Draws and describes the matrices of all heads of a layer, or of all layers.

    Args:
        workdir: folder of the run.
        layer: number of the layer, from 0; None for all.
        image: number of the example in the test split.
        length: number of tokens from the start of the example; None for all.
        parameters: see `evaluate.load`.
        data_dir: see `evaluate.load`.

    Returns:
        The content of the JSON file of each layer.

    Raises:
        ValueError: see `evaluate.load`; or the layer or the example does not exist; or there is no effective matrix.
    """
    trained = evaluate.load(workdir, parameters, sharding.make_mesh(devices=jax.devices()[:1]), data_dir)
    source = open_split(trained.task, 'test', trained.config.data.data_dir)
    if not 0 <= image < len(source):
        raise ValueError(f'image {image} does not exist; the test split has 0..{len(source) - 1}')
    tokens = trained.task.transform(source[image])['tokens']
    if length is not None and not 1 <= length <= tokens.shape[-1]:
        raise ValueError(f'length {length} must be at least 1 and at most {tokens.shape[-1]}')
    settings = {'dataset': trained.task.dataset, 'step': trained.step, 'parameters': parameters}
    settings['attention'] = trained.config.model.attention.to_dict()
    with sharding.use(trained.mesh):
        layers = capture(trained.model, trained.variables, tokens[None, ..., :length])
        if layer is not None and not 0 <= layer < len(layers):
            raise ValueError(f'layer {layer} does not exist; the model has layers 0..{len(layers) - 1}')
        chosen = range(len(layers)) if layer is None else [layer]
        return [draw_layer(workdir, layers[n], {**settings, 'layer': n, 'image': image}) for n in chosen]


def _layer(text: str) -> int | None:
    """Converts the option --layer, for `type=` of argparse."""
    return None if text == 'all' else int(text)


@cli.guarded
def command(description: str | None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=paths.argument, required=True, help='folder of the run')
    parser.add_argument('--layer', type=_layer, default=0, metavar='N|all', help='from 0 (default: 0), or all')
    parser.add_argument('--image', type=int, default=0, help='number of the example in the test split (default: 0)')
    parser.add_argument('--length', type=int, help='number of tokens from the start (default: all)')
    parser.add_argument('--parameters', choices=evaluate.PARAMETERS, default='latest')
    parser.add_argument('--data_dir', type=paths.argument, help='folder of data sets (default: as in training)')
    options = parser.parse_args()
    logging.set_verbosity(logging.ERROR)  # Orbax warns that checkpoints are opened for reading only
    messages.heading(workdir=options.workdir, layer=options.layer, example=options.image, parameters=options.parameters)
    try:
        results = attention_map(**vars(options))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for result in results:
        path = options.workdir / f'attention_map_{result["layer"]}_{options.image}'
        print(json.dumps(result['heads'], indent=2))
        print(f'wrote {path}.png and .json, and {path.name}_headN.png')
    messages.next_steps(f'python -m experiments.report --workdir {options.workdir}  # one page, with the samples')
