"""Small data sets in the format that TensorFlow Datasets (TFDS) prepares, written without TensorFlow."""

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

# TFDS registers these builders only when they are imported.
MODULES = {'c4': 'tensorflow_datasets.text.c4', 'wiki40b': 'tensorflow_datasets.text.wiki40b'}


def write_tfds(directory: Path, name: str, splits: dict[str, list[dict[str, Any]]]) -> Path:
    """Writes records as the registered builder `name` would, with its features and version; returns their folder.

    They come back in TFDS's own order, the same every time. Images are given as the bytes of a file (`png`): TFDS
    encodes arrays only with TensorFlow.
    """
    made = builder(name, directory)
    made._split_generators = lambda dl_manager: {split: enumerate(rows) for split, rows in splits.items()}
    tfds.disable_progress_bar()
    made.download_and_prepare()
    return Path(made.data_path)


def builder(name: str, directory: Path) -> Any:
    """The builder that TFDS has registered under a name, such as 'wiki40b/en'."""
    if module := MODULES.get(name.partition('/')[0]):
        importlib.import_module(module)
    return tfds.builder(name, data_dir=directory, file_format='array_record')


def png(image: np.ndarray) -> bytes:
    """An image as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'PNG')
    return file.getvalue()
