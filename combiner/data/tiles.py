"""Images cut into square tiles, which are shorter sequences."""

from typing import Any, SupportsIndex

from grain.sources import RandomAccessDataSource

from combiner.data.indices import checked


class Tiles:
    """A random-access source of the tiles of another source's images: image by image, row by row.

    Args:
        source: of records whose `image` is [size, size, channels].
        size: side of an image in pixels.
        side: side of a tile in pixels; it divides `size`.
    """

    def __init__(self, source: RandomAccessDataSource, size: int, side: int):
        self._source = source
        self._side = side
        self._along = size // side

    def __len__(self) -> int:
        return len(self._source) * self._along**2

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Returns a tile.

        Returns:
            The record of the whole image, with the tile as `image` and its position in pixels at the end of `key`:
            '…/y16/x32'.

        Raises:
            IndexError: there is no such tile.
        """
        image, tile = divmod(checked(index, len(self), 'tile'), self._along**2)
        y, x = (self._side * steps for steps in divmod(tile, self._along))
        record = self._source[image]
        cut = record['image'][y : y + self._side, x : x + self._side]
        return record | {'image': cut, 'key': f'{record["key"]}/y{y}/x{x}'}
