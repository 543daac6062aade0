"""Rows of the tables of language models: their models have the same names, attention and lengths."""

from collections.abc import Mapping

from experiments.harness.row import Row

# The model's name in a table, without its length.
ATTENTION = {
    'Transformer': 'full',
    'BigBird': 'bigbird',
    'Performer': 'performer',
    'Routing': 'routing',
    'Combiner-Routing': 'combiner_routing',
    'Fixed': 'fixed',
    'Fixed-8-columns': 'fixed+summary=8',
    'Combiner-Fixed': 'combiner_fixed',
    'Axial': 'axial',
    'Combiner-Axial': 'combiner_axial_rowmajor+key=projected',
}
LENGTHS = {'2k': 2048, '8k': 8192}


def text_rows(column: str, config: str, metric: str, published: Mapping[str, float | None]) -> tuple[Row, ...]:
    """Returns a row for each model.

    Args:
        column: of the table.
        config: a config file whose argument has the attention and the length.
        metric: see `Row`.
        published: the paper's value by model, such as 'Combiner-Fixed-8k'; None where it has none.
    """
    rows = []
    for model, value in published.items():
        name, _, length = model.rpartition('-')
        argument = f'attention={ATTENTION[name]},length={LENGTHS[length]}'
        rows.append(Row(model, column, config, argument, metric, value))
    return tuple(rows)
