"""Compiles the gradient of a mechanism for TPUs that are not there, and prints the program.

A process of its own: the compiler for TPUs ends a process that has the flags of XLA for CPUs.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from combiner import sharding
from combiner.aot import cost, programs
from combiner.core import registry
from combiner.core.mechanism import Context
from combiner.ops.softmax import Dropout


def gradients(name, causal, block, implementation='mosaic'):
    """A function that runs all kernels, with padding, documents (if supported) and dropout if they are given."""
    size = next(size for size in ('block', 'branch', 'chunk', 'columns') if size in registry.hyper_parameters(name))
    mechanism = registry.make_mechanism(name, {size: block, 'implementation': implementation}, causal=causal)

    def run(q, k, v, cotangent, valid=None, segments=None, key=None):
        segments = segments if mechanism.supports_segments else None
        context = Context(valid=valid, segments=segments, drop=None if key is None else Dropout(key, 0.1))
        out, pull_back = jax.vjp(lambda *qkv: mechanism.attend(*qkv, context), q, k, v)
        return out, *pull_back(cotangent)

    return run


def shapes(length, heads, width, dtype):
    return (jax.ShapeDtypeStruct((1, length, heads, width), dtype),) * 4


def masks(length):
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct((1, length), bool), jax.ShapeDtypeStruct((1, length), jnp.int32), key


def compile_widths(given, devices):
    """Compiles every head width in every type, and prints the kernels of each program."""
    for dtype, width in itertools.product((jnp.float32, jnp.bfloat16), (32, 64, 128, 256)):
        with sharding.use(sharding.make_mesh(data=1, devices=devices[:1])):
            lowered = jax.jit(gradients(given.name, given.causal, given.block)).lower(
                *shapes(given.length, 512 // width, width, dtype)
            )
        kernels = cost.count(programs.compiled(lowered, 'tpu').text).kernels
        print(jnp.dtype(dtype).name, width, *(kernel.name for kernel in kernels))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('name')
    for size in ('--block', '--length', '--width'):
        parser.add_argument(size, type=int)
    for switch in ('--causal', '--packed', '--sharded', '--widths'):
        parser.add_argument(switch, action='store_true')
    parser.add_argument('--topology')
    given = parser.parse_args()

    devices = topologies.get_topology_desc(platform='tpu', topology_name=given.topology).devices
    if given.widths:
        compile_widths(given, devices)
        return
    arrays = shapes(given.length, 8, given.width, jnp.bfloat16)
    arrays += masks(given.length) if given.packed else ()
    mesh = sharding.make_mesh(data=1, devices=devices[:1])
    if given.sharded:
        mesh = sharding.make_mesh(data=2, model=2, devices=devices)
        placement = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES, None, sharding.HEAD_AXES))
        arrays = [jax.ShapeDtypeStruct((4, *x.shape[1:]), x.dtype, sharding=placement) for x in arrays]
    with sharding.use(mesh):
        print(jax.jit(gradients(given.name, given.causal, given.block)).lower(*arrays).compile().as_text())


if __name__ == '__main__':
    main()
