"""Crops of the seven photographs in scikit-image and scikit-learn: real images without a download.

Neighbouring crops overlap, and each scene has several scales. So the data set is split by *photograph*: no pixel of a
test photograph is used in training.
"""

import bisect
import functools
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from combiner.data.indices import checked

# Photograph -> its package (name of the import, name of the distribution) and its file in the package.
_SKIMAGE = ('skimage', 'scikit-image')
_SKLEARN = ('sklearn', 'scikit-learn')
PHOTOGRAPHS = {
    'astronaut': (*_SKIMAGE, 'data/astronaut.png'),
    'chelsea': (*_SKIMAGE, 'data/chelsea.png'),
    'china': (*_SKLEARN, 'datasets/images/china.jpg'),
    'coffee': (*_SKIMAGE, 'data/coffee.png'),
    'flower': (*_SKLEARN, 'datasets/images/flower.jpg'),
    'motorcycle': (*_SKIMAGE, 'data/motorcycle_left.png'),
    'rocket': (*_SKIMAGE, 'data/rocket.jpg'),
}
SPLITS = {
    'train': ('astronaut', 'china', 'motorcycle', 'rocket'),
    'validation': ('flower',),
    'test': ('chelsea', 'coffee'),
}
SCALES = (1, 2, 4)  # divisors of both sides
STRIDE = 16  # pixels between neighbouring crops, at every scale


class _Plane(NamedTuple):
    """One photograph at one scale, and its grid of crops."""

    name: str
    scale: int
    pixels: UInt8[np.ndarray, 'height width 3']
    rows: int
    columns: int


class Photos:
    """A random-access source of square crops, ordered by photograph, scale, row and column.

    Memory holds only the scaled photographs; crops are cut when they are read.

    Args:
        photographs: names from `PHOTOGRAPHS`, for instance `SPLITS['test']`.
        size: side of a crop in pixels.

    Raises:
        ValueError: a name is unknown.
        FileNotFoundError: the package of a photograph, or its file, is missing.
    """

    def __init__(self, photographs: Sequence[str], size: int):
        self._size = size
        self._planes = [
            _Plane(name, scale, pixels, *((side - size) // STRIDE + 1 for side in pixels.shape[:2]))
            for name in photographs
            for scale, pixels in zip(SCALES, load(name), strict=True)
        ]
        self._ends = list(itertools.accumulate(plane.rows * plane.columns for plane in self._planes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: SupportsIndex) -> dict:
        """Returns a crop.

        Returns:
            `{'image': uint8 [size, size, 3], 'key': 'coffee/scale2/y16/x32'}`, y and x in scaled pixels.

        Raises:
            IndexError: there is no such crop.
        """
        index = checked(index, len(self), 'crop')
        plane_index = bisect.bisect_right(self._ends, index)
        plane = self._planes[plane_index]
        first = self._ends[plane_index] - plane.rows * plane.columns
        y, x = (STRIDE * steps for steps in divmod(index - first, plane.columns))
        return {
            'image': plane.pixels[y : y + self._size, x : x + self._size],
            'key': f'{plane.name}/scale{plane.scale}/y{y}/x{x}',
        }


@functools.cache
def load(name: str) -> tuple[UInt8[np.ndarray, 'height width 3'], ...]:
    """Reads a photograph and shrinks it to each of `SCALES` with a box filter; the arrays are read-only.

    Raises:
        ValueError: the name is unknown.
        FileNotFoundError: the package of the photograph, or its file, is missing.
    """
    with Image.open(locate(name)) as file:
        photograph = file.convert('RGB')
    width, height = photograph.size
    scaled = (photograph.resize((width // scale, height // scale), Image.Resampling.BOX) for scale in SCALES)
    # An array over Pillow's bytes is read-only, which protects the cached photographs.
    return tuple(np.asarray(image) for image in scaled)


def locate(name: str) -> Path:
    """Returns the path of a photograph in its installed package, without importing the package.

    Raises:
        ValueError: the name is unknown.
        FileNotFoundError: the package of the photograph, or its file, is missing.
    """
    if name not in PHOTOGRAPHS:
        raise ValueError(f'unknown photograph {name!r}; known: {", ".join(PHOTOGRAPHS)}')
    module, distribution, file = PHOTOGRAPHS[name]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f'photograph {name!r} is {file} of the package {distribution}, which is not installed; '
            f'pip install {distribution}'
        )
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise FileNotFoundError(
            f'photograph {name!r} is missing: the installed {distribution} has no {file} ({path}); '
            f'pip install --force-reinstall {distribution}'
        )
    return path
