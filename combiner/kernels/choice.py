"""Implementations of attention, and the choice among them by platform.

A mechanism states the implementations that it has, the best first. `choose` takes the first that can be used.

| name        | technology                                                        | where    |
|-------------|-------------------------------------------------------------------|----------|
| `cudnn`     | cuDNN's flash attention (`libraries`)                             | GPU      |
| `splash`    | JAX's splash attention (`libraries`)                              | TPU      |
| `mosaic`    | a fused kernel of this project (`kernels.tpu`)                    | TPU      |
| `triton`    | a fused kernel of this project (`kernels.gpu`)                    | GPU      |
| `blockwise` | loops over blocks (`flash`)                                       | anywhere |
| `dense`     | the matrix of all weights (`softmax.attend_full`), O(l²) memory   | anywhere |
| `ring`      | keys that go round the devices of a sequence (`ring`)             | anywhere |
| `xla`       | the plain operations of the mechanism, which XLA compiles         | anywhere |

A mechanism may name others. They count as running anywhere: their `refuse` gives the reason where they do not.

The kernels of this project run on a CPU too, in Pallas' slow interpreter: only if an implementation is named.
"""

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float

from combiner.kernels.shards import refuse_to_shard
from combiner.ops import parts
from combiner.ops.chunking import target

PLATFORMS = {  # where each implementation runs; None for anywhere, as for one that is not named here
    'cudnn': 'gpu',
    'splash': 'tpu',
    'mosaic': 'tpu',
    'triton': 'gpu',
    'blockwise': None,
    'dense': None,
    'ring': None,
    'xla': None,
}
# Names of GPUs older than compute capability 8.0, or of other makers: neither Triton nor cuDNN's flash attention serves
# them. Brands first, which ended with the generation before.
TOO_OLD = re.compile(
    r'Tesla|Quadro|TITAN|GTX|GRID RTX|RTX 20[5-8]0|\bMX\d|\b[KMP]\d+\b|\bG?V100|\bT4|\bT\d{3,4}\b|Xavier|'
    r'AMD|Radeon|Instinct|gfx\d'
)
INTERPRETED = ('mosaic', 'triton')  # on a CPU, if named
PARTITIONED = ('cudnn',)  # kernels that XLA can split by itself
ACROSS = ('ring', 'xla')  # which attend over sequences that are cut over devices (`ops.parts`)
ONLY_ACROSS = ('ring',)  # of these, the ones that refuse whole sequences


def _never(q: Array, **options: Any) -> str:
    del q, options
    return ''


class Implementation(NamedTuple):
    """One way to compute a mechanism.

    Attributes:
        attend: function `(q, k, v, **options)` that attends; the options are the same for all ways of a mechanism.
        refuse: function `(q, **options)` that returns the reason why `attend` cannot be used; empty if it can.
        groups: whether `attend` takes fewer key heads than query heads.
    """

    attend: Callable[..., Array]
    refuse: Callable[..., str] = _never
    groups: bool = False


def choose(
    mechanism: str,
    implementations: Mapping[str, Implementation],
    implementation: str | None,
    q: Float[Array, 'b l h d'],
    **options: Any,
) -> str:
    """Returns the implementation to use: `implementation`, or the best on the platform. Logs it once, with the reason.

    Args:
        mechanism: its name, for the log.
        implementations: of the mechanism, the best first.
        implementation: one of their names; None for the best.
        q: queries, whose shape and type matter.
        **options: of `Implementation.attend`.

    Raises:
        ValueError: the implementation is unknown, or does not support this input on this platform; or none does.
    """
    platform = target().platform
    if implementation is None:
        cannot = {name: _refuse(name, one, q, options) for name, one in implementations.items()}
        better = list(itertools.takewhile(cannot.get, implementations))
        implementation = next((name for name in implementations if not cannot[name]), None)
        if implementation is None:
            raise ValueError(f'{mechanism}: {"; ".join(f"{name} {why}" for name, why in cannot.items())}')
        why = '; '.join(f'{name} {cannot[name]}' for name in better) or 'the best there is'
    else:
        check_known(mechanism, implementations, implementation)
        why = f'implementation={implementation!r}'
        interpreted = implementation in INTERPRETED and interpreting()
        reason = _refuse(implementation, implementations[implementation], q, options, anywhere=interpreted)
        if reason:
            raise ValueError(f'{mechanism}: {why} {reason}; choose another, or None')
        why += ', in the interpreter of Pallas, which is slow' * interpreted
    _announce(mechanism, implementation, platform, why)
    return implementation


def check_known(mechanism: str, implementations: Mapping[str, Implementation], implementation: str | None) -> None:
    """Raises ValueError if a mechanism has no implementation of this name; None is the best."""
    if implementation is not None and implementation not in implementations:
        known = ', '.join(implementations)
        raise ValueError(f'{mechanism}: unknown implementation {implementation!r}; choose {known}, or None')


def interpreting() -> bool:
    """Returns whether kernels of this project run in the interpreter of Pallas: on a CPU."""
    return target().platform == 'cpu'


def refuse_old_gpu() -> str:
    """Returns the reason why no fused kernel serves the GPU; empty if one does, or if there is none."""
    device = target()
    old = device.platform == 'gpu' and TOO_OLD.search(device.kind)
    return f'needs an NVIDIA GPU of compute capability 8.0 or newer, not {device.kind}' if old else ''


def refuse_for_tpu(q: Float[Array, 'b l h d']) -> str:
    """Returns the reason why Pallas cannot compile a kernel for a TPU in the types in use; empty if it can."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f'takes float32 or bfloat16, not {q.dtype}'
    device = target()
    if device.platform != 'tpu':
        return ''
    if q.dtype == jnp.bfloat16 and device.kind.startswith(('TPU v2', 'TPU v3')):
        return f'multiplies bfloat16 from TPU v4 on, not on {device.kind}'
    wide = jax.dtypes.canonicalize_dtype(float) == jnp.float64
    return 'needs jax_enable_x64 to be off on a TPU' if wide else ''


def _refuse(name: str, one: Implementation, q: Array, options: dict[str, Any], *, anywhere: bool = False) -> str:
    """Returns the reason why an implementation cannot be used, on this platform unless `anywhere`; empty if it can."""
    if parts.count() > 1 and name not in ACROSS:
        return 'does not attend across the devices of the mesh axis context'
    platform, needed = target().platform, PLATFORMS.get(name)
    if needed and not anywhere:
        if platform != needed:
            return f'needs a {needed.upper()}, this is {platform}'
        reason = '' if name in PARTITIONED else refuse_to_shard()
        if reason:
            return reason
    return one.refuse(q, **options)


@functools.cache
def _announce(mechanism: str, name: str, platform: str, why: str) -> None:
    logging.info('%s: %s, on %s (%s)', mechanism, name, platform, why)
