"""What a row of one of the paper's tables is: a config, the figure that it is judged by, and the published value."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One number of a table.

    Attributes:
        model: what the paper calls the model, for instance 'Combiner-Fixed'.
        column: which of the table's columns it is in, for instance 'CIFAR-10'.
        config: a config file, 'configs/cifar10.py'.
        argument: the config's argument without its scale, 'attention=combiner_fixed,layers=6'.
        metric: a name of `combiner.metrics.FIGURES`.
        published: the paper's value, in the metric's unit (accuracy is a fraction); None where it has none.
        settings: fields of the config that are not as the scale has them, ('optimizer.learning_rate=0.002',).
    """

    model: str
    column: str
    config: str
    argument: str
    metric: str
    published: float | None = None
    settings: tuple[str, ...] = ()
