"""Two initialisations of a transformer: standard deviations of its embeddings and initialisers of its dense layers.

Both scale the last matrix of each residual branch by `1/√(2·layers)`. Biases start at zero, LayerNorm at one. A
mechanism defines the initialisers of its parameters other than the projections.
"""

from collections.abc import Callable
from typing import NamedTuple

from flax.linen import initializers
from flax.typing import Initializer

SPARSE_TRANSFORMER_STD = 0.125  # times 1/√fan-in


class Initialization(NamedTuple):
    """Initialisers of dense layers, and standard deviations of embeddings.

    Attributes:
        heads_in: for the kernels `[e h d]` of queries, keys and values.
        heads_out: for the kernel `[h d e]` after attention.
        mlp_in: for the first matrix of the feed-forward network.
        mlp_out: for the second matrix of the feed-forward network.
        token_std: standard deviation of token embeddings.
        position_std: standard deviation of learned position embeddings.
    """

    heads_in: Initializer
    heads_out: Initializer
    mlp_in: Initializer
    mlp_out: Initializer
    token_std: float
    position_std: float


def default(layers: int, width: int, positions: str, axes: int) -> Initialization:
    """Returns variances of 1/fan-in for matrices; embeddings with 0.02, but tokens with 1/√width with sinusoids."""
    del axes
    scaled = 0.5 / layers
    return Initialization(
        initializers.lecun_normal(in_axis=0, out_axis=(1, 2)),
        initializers.variance_scaling(scaled, 'fan_in', 'normal', in_axis=(-3, -2)),
        initializers.lecun_normal(),
        initializers.variance_scaling(scaled, 'fan_in', 'normal', in_axis=-2),
        width**-0.5 if positions == 'sinusoid' else 0.02,
        0.02,
    )


def sparse_transformer(layers: int, width: int, positions: str, axes: int) -> Initialization:
    """Returns the initialisation of Child et al. (2019, section 6): standard deviations of 0.125/√fan-in.

    Tokens start at 0.125/√width, positions at 0.125/√(width · number of position embeddings).
    """
    variance = SPARSE_TRANSFORMER_STD**2
    embeddings = axes if positions == 'image' else 1
    return Initialization(
        initializers.variance_scaling(variance, 'fan_in', 'normal', in_axis=0, out_axis=(1, 2)),
        initializers.variance_scaling(variance * 0.5 / layers, 'fan_in', 'normal', in_axis=(-3, -2)),
        initializers.variance_scaling(variance, 'fan_in', 'normal'),
        initializers.variance_scaling(variance * 0.5 / layers, 'fan_in', 'normal'),
        SPARSE_TRANSFORMER_STD * width**-0.5,
        SPARSE_TRANSFORMER_STD * (width * embeddings) ** -0.5,
    )


INITIALIZATIONS: dict[str, Callable[[int, int, str, int], Initialization]] = {
    'default': default,
    'sparse_transformer': sparse_transformer,
}
