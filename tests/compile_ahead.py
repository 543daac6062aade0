"""Compiles the gradient of a mechanism for TPUs that are not there, and prints the program.

A process of its own: the compiler for TPUs ends a process that has the flags of XLA for CPUs.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import combiner
from combiner import sharding
from combiner.aot import cost, programs
from combiner.core import registry
from combiner.core.mechanism import Context
from combiner.ops.softmax import Dropout


def gradients(name, causal, block, implementation='mosaic'):
    """A function that runs all kernels, with padding, documents and dropout if they are given."""
    size = next(size for size in ('block', 'branch', 'chunk', 'columns') if size in registry.hyper_parameters(name))
    mechanism = registry.make_mechanism(name, {size: block, 'implementation': implementation}, causal=causal)

    def run(q, k, v, cotangent, valid=None, segments=None, key=None):
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


def compile_module(given, devices):
    """Compiles the module with its gradients, and prints its traffic in arrays of the size of its input."""
    heads = 1024 // given.width
    mechanism = registry.make_mechanism(given.name, {'implementation': 'mosaic'}, causal=given.causal)
    module = combiner.Attention(
        mechanism, width=1024, heads=heads, kv_heads=given.kv_heads, rotary=given.rotary, dtype=jnp.bfloat16
    )
    x = jax.ShapeDtypeStruct((65536 // given.length, given.length, 1024), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((1, given.length), jnp.int32)

    def run(variables, x, cotangent, positions):
        out, pull_back = jax.vjp(lambda *inputs: module.apply(*inputs, positions), variables, x)
        return out, *pull_back(cotangent)

    with sharding.use(sharding.make_mesh(data=1, devices=devices[:1])):
        boxed = jax.eval_shape(lambda *inputs: module.init(jax.random.key(0), *inputs), x, positions)
        variables = jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda box: isinstance(box, nn.Partitioned))
        program = programs.compiled(jax.jit(run).lower(variables, x, x, positions), 'tpu')
    print('arrays', round(cost.count(program.text).hbm_bytes / (x.size * 2), 1))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('name')
    for size in ('--block', '--length', '--width', '--kv_heads'):
        parser.add_argument(size, type=int)
    for switch in ('--causal', '--packed', '--sharded', '--widths', '--module', '--rotary'):
        parser.add_argument(switch, action='store_true')
    parser.add_argument('--topology')
    given = parser.parse_args()

    devices = topologies.get_topology_desc(platform='tpu', topology_name=given.topology).devices
    if given.widths or given.module:
        (compile_widths if given.widths else compile_module)(given, devices)
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
