"""Language models over the values of images, in bits per dimension."""

import functools

from combiner.data import ops, photos, tfds_sources, tiles
from combiner.data.task import Source, Task


def image_language_model(name: str, dataset: str, source: Source, shape: tuple[int, int, int]) -> Task:
    """Returns a task that predicts an image's values one by one: row by row, all channels of a pixel in sequence."""
    return Task(
        name=name,
        dataset=dataset,
        source=source,
        transform=functools.partial(ops.image_language_model, shape=shape),
        vocab_size=256,
        shape=shape,
        head='language_model',
        metrics=('bits_per_dim',),
        context='the values before it in the image',
    )


def _photos(size: int) -> Task:
    # The photographs are embedded and need no directory.
    def source(split: str, data_dir: str | None) -> photos.Photos:
        del data_dir
        return photos.Photos(photos.SPLITS[split], size)

    dataset = f'photos {size}x{size} (crops of the photographs in scikit-image and scikit-learn)'
    return image_language_model(f'photos{size}', dataset, source, (size, size, 3))


def _tfds(name: str, dataset: str, size: int, splits: dict[str, str], *, tile: int = 0) -> Task:
    """Returns a task on a TFDS data set; `tile` is its option.

    Args:
        name: of the task.
        dataset: name of the data set in TFDS.
        size: side of its images in pixels.
        splits: the TFDS split for each of our splits.
        tile: side of the tiles into which every image is cut, each a separate sequence; 0 for whole images. Results on
            tiles are not results on the data set: a tile gives less context.

    Raises:
        ValueError: `tile` does not divide `size`.
    """
    if tile < 0 or size % (tile or size):
        raise ValueError(f'tile={tile} must divide the side of the images, {size}, or be 0 for whole images')
    whole = tfds_sources.by_split(dataset, splits)
    if not tile:
        return image_language_model(name, f'{dataset} (TFDS)', whole, (size, size, 3))

    def source(split: str, data_dir: str | None) -> tiles.Tiles:
        return tiles.Tiles(whole(split, data_dir), size, tile)

    return image_language_model(name, f'{dataset} (TFDS), tiles of {tile}x{tile}', source, (tile, tile, 3))


# Child et al. (2019) hold out 2,000 of CIFAR-10's training images.
CIFAR10_SPLITS = {'train': 'train[:96%]', 'validation': 'train[96%:]', 'test': 'test'}
# Papers report results on TFDS's validation split of ImageNet; ours is held out from its training split.
IMAGENET_SPLITS = {'train': 'train[:99%]', 'validation': 'train[99%:]', 'test': 'validation'}

TASKS = {
    'photos16': lambda: _photos(16),
    'photos32': lambda: _photos(32),
    'cifar10': functools.partial(_tfds, 'cifar10', 'cifar10', 32, CIFAR10_SPLITS),
    'downsampled_imagenet64': functools.partial(
        _tfds, 'downsampled_imagenet64', 'downsampled_imagenet/64x64', 64, IMAGENET_SPLITS
    ),
    # A different set, resized in another way and easier to compress: results do not compare with the set above.
    'imagenet_resized64': functools.partial(_tfds, 'imagenet_resized64', 'imagenet_resized/64x64', 64, IMAGENET_SPLITS),
}
