"""Bits per dimension of image codecs, for comparison with models."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8
from PIL import Image

# Arguments of Image.save for each codec's strongest compression.
CODECS = {
    'png': {'format': 'PNG', 'optimize': True},
    'webp_lossless': {'format': 'WEBP', 'lossless': True, 'method': 6, 'quality': 100},
}


def bits_per_dim(images: UInt8[np.ndarray, 'batch rows columns 3']) -> dict[str, float]:
    """Compresses a set of RGB images and returns bits per dimension (a value of one channel of one pixel).

    `png` and `webp_lossless` count whole files, one per image. On small images the headers matter: the 57 bytes of a
    PNG are 0.6 bits/dim at 16x16. `order0_entropy` is -Σ p·log2 p over the frequencies p of the 256 values in these
    images: the minimum of a code that knows the frequencies in advance and uses no context.

    Returns:
        One figure each for `png`, `webp_lossless` and `order0_entropy`.

    Raises:
        ValueError: the images are not a non-empty uint8 array of shape [batch, rows, columns, 3].
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise ValueError(f'images must be uint8 [batch, rows, columns, 3], got {images.dtype} {list(images.shape)}')
    # Pillow releases the interpreter's lock while it compresses, so threads use every core.
    with ThreadPoolExecutor() as pool:
        figures = {
            name: 8 * sum(pool.map(lambda image, options=options: _file_bytes(image, options), images)) / images.size
            for name, options in CODECS.items()
        }
    frequencies = np.bincount(images.ravel(), minlength=256) / images.size
    present = frequencies[frequencies > 0]
    # + 0.0 replaces the -0.0 of a constant image by 0.0.
    return figures | {'order0_entropy': float(-(present * np.log2(present)).sum()) + 0.0}


def _file_bytes(image: UInt8[np.ndarray, 'rows columns 3'], options: dict) -> int:
    file = io.BytesIO()
    Image.fromarray(image).save(file, **options)
    return file.tell()
