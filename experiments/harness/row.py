"""A row of a table: a config, the metric that is reported, and the published value."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One number of a table.

    Attributes:
        model: what the paper calls the model, for instance 'Combiner-Fixed'.
        column: the table's column, for instance 'CIFAR-10'.
        config: a config file, 'configs/cifar10.py'.
        argument: the config's argument without its scale, 'attention=combiner_fixed,layers=6'.
        metric: a name of `combiner.metrics.FIGURES`.
        published: the paper's value, in the metric's unit (accuracy is a fraction); None if the paper has none.
        settings: fields of the config that differ from those of the scale, ('optimizer.learning_rate=0.002',).
        pretrain: a value of the config's argument `pretrain`: before it is trained, a model of that kind is trained as
            long on the same sequences, and gives its backbone; '' for none.
    """

    model: str
    column: str
    config: str
    argument: str
    metric: str
    published: float | None = None
    settings: tuple[str, ...] = ()
    pretrain: str = ''
