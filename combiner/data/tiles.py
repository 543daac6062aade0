"""Images cut into square tiles: the same photographs as shorter sequences."""

from typing import Any, SupportsIndex

from grain.sources import RandomAccessDataSource

from combiner.data.indices import checked


class Tiles:
    """A random-access source of the tiles of another source's images: image by image, row by row.

    Args:
        source: of records whose `image` is [size, size, channels].
        size: side of an image in pixels.
        side: that of a tile; it divides `size`.
    """

    def __init__(self, source: RandomAccessDataSource, size: int, side: int):
        self._source = source
        self._side = side
        self._along = size // side

    def __len__(self) -> int:
        return len(self._source) * self._along**2

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Cuts a tile.

        Returns:
            The record of the whole image, with its tile as `image` and, at the end of `key`, where that lies:
            '…/y16/x32', in pixels.

        Raises:
            IndexError: there is no such tile.
        """
        image, tile = divmod(checked(index, len(self), 'tile'), self._along**2)
        y, x = (self._side * place for place in divmod(tile, self._along))
        record = self._source[image]
        cut = record['image'][y : y + self._side, x : x + self._side]
        return record | {'image': cut, 'key': f'{record["key"]}/y{y}/x{x}'}
