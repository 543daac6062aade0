"""Rows of the tables of the Long Range Arena: a column for each task, of the benchmark's models and two Combiners."""

from collections.abc import Mapping

from experiments.harness.row import Row

ATTENTION = {
    'Transformer': 'full',
    'Local': 'local+block=50',
    'Sparse': 'fixed+block=50+summary=10',
    'Longformer': 'longformer',
    'Linformer': 'linformer+rank=16',
    'Reformer': 'reformer',
    'Sinkhorn': 'sinkhorn+block=50',
    'Synthesizer': 'synthesizer+variant=factorised_random+rank=32',
    'BigBird': 'bigbird+block=64',
    'Linear': 'linear',
    'Performer': 'performer+kernel=relu+features=256',
    'Combiner-Fixed': 'combiner_fixed',
    'Combiner-Axial': 'combiner_axial_rowmajor',
}
_BLOCKS_ON_IMAGES = {'Local': 'local+block=64', 'Sinkhorn': 'sinkhorn+block=64'}
_ON_IMAGES = {**_BLOCKS_ON_IMAGES, 'Synthesizer': 'synthesizer+variant=random'}
_SETTINGS = {
    'listops': {'Performer': 'performer+kernel=softmax+features=256'},
    'image': _ON_IMAGES,
    'pathfinder': _ON_IMAGES,
    'pathx': _BLOCKS_ON_IMAGES,
}
TASKS = {
    'listops': 'ListOps',
    'text': 'Text',
    'retrieval': 'Retrieval',
    'image': 'Image',
    'pathfinder': 'Pathfinder',
    'pathx': 'Path-X',
}


def lra_rows(published: Mapping[str, tuple[float, ...]] | None = None, pretrain: str = '') -> tuple[Row, ...]:
    """Returns a row for each model and task.

    Args:
        published: the paper's values in % on the tasks but Path-X, by model; None for a table that the paper lacks.
        pretrain: see `Row`.
    """
    rows = []
    for model, attention in ATTENTION.items():
        percents = (*published[model], None) if published else (None,) * len(TASKS)
        for (task, column), percent in zip(TASKS.items(), percents, strict=True):
            argument = f'task={task},attention={_SETTINGS.get(task, {}).get(model, attention)}'
            value = None if percent is None else round(percent / 100, 4)
            rows.append(Row(model, column, 'configs/lra.py', argument, 'accuracy', value, pretrain=pretrain))
    return tuple(rows)
