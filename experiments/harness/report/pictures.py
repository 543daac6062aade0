"""Samples and attention maps that commands left in the folders of runs."""

import html
import json
import os
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from experiments.harness.report.elements import element, figure, image

SKIPPED = {'checkpoints', 'corrupt', 'jobs', 'tensorboard'}
CHARACTERS = 6_000  # of a text of samples
Try = Callable[[Path, Callable[[], str]], str]  # returns what a function does, '' after an error, which it notes


def files(workdir: Path, pattern: str) -> Iterator[Path]:
    """Yields the files in the folder and below whose name matches, in the order of their paths."""
    for folder, below, names in os.walk(workdir):
        below[:] = sorted(set(below) - SKIPPED)
        yield from (Path(folder) / name for name in sorted(names) if fnmatch(name, pattern))


def _caption(path: Path, workdir: Path) -> str:
    return path.relative_to(workdir).with_suffix('').as_posix()


def text(path: Path, caption: str) -> str:
    """Returns the beginning of a text as a figure."""
    content = path.read_text(encoding='utf-8')
    if len(content) > CHARACTERS:
        caption += f' (the first {CHARACTERS:,} of {len(content):,} characters)'
    return figure(element('pre', html.escape(content[:CHARACTERS]), tabindex='0'), caption)


def samples(workdir: Path, attempt: Try) -> str:
    """Returns all samples, of images and of text; '' if there are none."""
    shown = [
        attempt(path, lambda path=path: figure(image(path, _caption(path, workdir)), _caption(path, workdir)))
        for path in files(workdir, 'samples*.png')
    ]
    texts = [
        attempt(path, lambda path=path: text(path, _caption(path, workdir))) for path in files(workdir, 'samples*.txt')
    ]
    pictures = element('div', *shown, class_='gallery') if any(shown) else ''
    return pictures + ''.join(texts)


def attention(workdir: Path, attempt: Try) -> str:
    """Returns the attention maps: one viewer for each run and example; '' if there are none."""
    by_example: dict[tuple[Path, int], list[tuple[Path, dict[str, Any]]]] = {}

    def read(path: Path) -> str:
        found = json.loads(path.read_text(encoding='utf-8'))
        by_example.setdefault((path.parent, int(found['image'])), []).append((path, found))
        return ''

    for path in files(workdir, 'attention_map_*.json'):
        attempt(path, lambda path=path: read(path))
    return ''.join(
        attempt(folder, lambda folder=folder, layers=layers: viewer(layers, folder.relative_to(workdir).as_posix()))
        for (folder, _), layers in by_example.items()
    )


def _facts(head: dict[str, Any]) -> str:
    facts = [f'rank {head["rank"]:,}']
    if 'direct_weight' in head:
        facts.append(f'{head["direct_weight"]:.0%} of the weight direct')
    return ', '.join(facts)


def viewer(layers: list[tuple[Path, dict[str, Any]]], run: str) -> str:
    """Returns the maps of all layers and heads of one example; the script of the page shows one of them at a time.

    Args:
        layers: the JSON files of the layers, with their content.
        run: folder of the run, for the caption.

    Raises:
        ValueError: a file has no pictures of its heads, because an earlier version wrote it.
    """
    layers = sorted(layers, key=lambda each: each[1]['layer'])
    path, first = layers[0]
    if any('picture' not in head for _, found in layers for head in found['heads']):
        raise ValueError('an attention map has no pictures of heads; make it again: experiments.figures.attention_map')
    maps = [
        figure(
            image(path.with_name(head['picture']), f'weights of layer {found["layer"]}, head {number}'),
            f'layer {found["layer"]}, head {number}: {_facts(head)}',
            class_='map',
            data_layer=str(found['layer']),
            data_head=str(number),
        )
        for path, found in layers
        for number, head in enumerate(found['heads'])
    ]
    sliders = [
        element(
            'label',
            f'{name} ',
            element('span', values[0]),
            f'<input type="range" min="0" max="{len(values) - 1}" value="0" data-values="{" ".join(values)}" '
            f'data-choice="{name}">',
        )
        for name, values in (
            ('layer', [str(found['layer']) for _, found in layers]),
            ('head', [str(number) for number in range(max(len(found['heads']) for _, found in layers))]),
        )
    ]
    pattern = ''
    if picture := first.get('pattern_picture'):
        pattern = figure(
            image(path.with_name(picture), 'the pattern'),
            'the pattern: direct blue, through a span yellow',
            class_='pattern',
        )
    per_pixel = first['tokens_per_pixel']
    pixel = '' if per_pixel == 1 else f' A pixel is the largest weight of {per_pixel} × {per_pixel} positions.'
    caption = (
        f'{run}: {first["attention"]["name"]}, step {first["step"]:,}, test example {first["image"]}, the first '
        f'{first["length"]:,} tokens. Rows are queries, columns are keys.{pixel}'
    )
    return element(
        'figure',
        element('figcaption', html.escape(caption)),
        element('div', *sliders, class_='sliders', hidden=''),
        element('div', *maps, pattern, class_='maps'),
        '<p class="ramp"><span>weight ≤ 0.00001</span><i></i><span>1</span></p>',
        class_='viewer',
    )
