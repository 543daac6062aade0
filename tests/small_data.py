"""A small version of every data set that tasks read, as their preparation leaves it."""

import random
from pathlib import Path

import numpy as np
from kit import png, write_tfds

from combiner.data import records
from combiner.data.lra import generated

WORDS = tuple(
    'the a of one two small large red green house tree river sees has finds under over and then never'.split()  # noqa: SIM905
)


def article(number: int, words: int = 120) -> str:
    draw = random.Random(number)
    return ' '.join(draw.choice(WORDS) for _ in range(words)).capitalize() + f', {number}.'


def images(size: int, count: int) -> list[dict]:
    rng = np.random.default_rng(size)
    return [{'image': png(rng.integers(0, 256, (size, size, 3), np.uint8))} for _ in range(count)]


def write(path: Path) -> None:
    """Writes TFDS's sets, generated ones, and the files of the Long Range Arena's release."""
    cifar = [row | {'label': i % 10, 'id': f'train_{i}'} for i, row in enumerate(images(32, 20))]
    write_tfds(path, 'cifar10', {'train': cifar, 'test': cifar[:5]})
    write_tfds(path, 'downsampled_imagenet/64x64', {'train': images(64, 100), 'validation': images(64, 3)})
    resized = [row | {'label': i} for i, row in enumerate(images(64, 100))]
    write_tfds(path, 'imagenet_resized/64x64', {'train': resized, 'validation': resized[:3]})
    reviews = [{'text': article(i), 'label': i % 2} for i in range(20)]
    write_tfds(path, 'imdb_reviews', {'train': reviews, 'test': reviews[:6]})
    wiki = [
        {
            'text': f'\n_START_ARTICLE_\nTitle {i}\n_START_PARAGRAPH_\n{article(i)}_NEWLINE_{article(i + 1)}',
            'version_id': '0',
            'wikidata_id': f'Q{i}',
        }
        for i in range(30)
    ]
    write_tfds(path, 'wiki40b/en', {'train': wiki, 'validation': wiki[:3], 'test': wiki[:4]})
    book = {'book_title': 'A', 'publication_date': '1900', 'book_link': 'here'}
    books = [book | {'book_text': article(i, 900), 'book_id': i} for i in range(12)]
    write_tfds(path, 'pg19', {'train': books, 'validation': books[:2], 'test': books[:2]})
    pages = [
        {'text': article(i), 'url': '', 'content-length': '', 'content-type': '', 'timestamp': ''} for i in range(30)
    ]
    write_tfds(path, 'c4/en', {'train': pages, 'validation': pages[:4]})
    for name in ('lra_listops', 'lra_pathfinder32_intermediate'):
        records.write(generated.folder(name, path), generated.recipe(name, limit=4), 0, 1)
    for split in ('train', 'eval', 'test'):
        lines = [f'{i % 2}.0\t{i}\t{i + 1}\t{article(i).encode()!r}\t{article(i + 1)}\n' for i in range(4)]
        (path / f'new_aan_pairs.{split}.tsv').write_text(''.join(lines))
