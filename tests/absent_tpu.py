"""What the tests of kernels ask of a TPU that need not be there: what would be refused, and which tiles chosen."""

import functools

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

DEVICES = {name: AbstractDevice(device_kind=name, num_cores=1, platform='tpu') for name in ('TPU v5 lite', 'TPU v5')}


def on(device: str):
    """A context in which functions are traced for this kind of TPU."""
    return use_abstract_mesh(AbstractMesh((1,), ('data',), abstract_device=DEVICES[device]))


def traced(function, q):
    """What a function returns for a shape."""
    found = []
    jax.eval_shape(lambda q: found.append(function(q)), q)
    return found[0]


def check_longest(refuse, mechanism, device: str, dtype, longest: int, **options):
    """Asserts that a kernel takes sequences up to this power of two, and that vector memory is what ends it."""
    for length in (longest, 2 * longest):
        ask = functools.partial(refuse, columns=mechanism._columns(length), causal=mechanism.causal, **options)
        with on(device):
            reason = traced(ask, jax.ShapeDtypeStruct((1, length, 8, 128), dtype))
        assert ('MiB of vector memory' in reason) == (length > longest)
