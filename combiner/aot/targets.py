"""Slices of accelerators that need not be present: `v5e:4x4`, `v5p:2x2x1`, `h100:8`, or a chip's name for one chip."""

import difflib
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from combiner.aot.chips import CHIPS, Chip

SMALLEST = {'v5e': (1, 1), 'v6e': (1, 1), 'v5p': (1, 1, 1), 'h100': (1,), 'a100': (1,)}
GPUS_OF_A_HOST = 8

# The facts that the CUDA compiler needs, as XLA's GpuTargetConfigProto; all other fields are those of the function.
_SM_90 = {
    'cores': 132,
    'fpus': 128,
    'shared': 233472,
    'shared_block': 232448,
    'bandwidth': 3352320000000,
    'cache': 52428800,
    'clock': 1.98,
    'capability': 'major: 9 feature_extension: ACCELERATED_FEATURES',
    'name': 'NVIDIA H100 80GB HBM3',
}
_SM_80 = {
    'cores': 108,
    'fpus': 64,
    'shared': 167936,
    'shared_block': 166912,
    'bandwidth': 2039040000000,
    'cache': 41943040,
    'clock': 1.41,
    'capability': 'major: 8 feature_extension: NONE',
    'name': 'NVIDIA A100-SXM4-80GB',
}
GPU_FACTS = {'h100': _SM_90, 'a100': _SM_80}


class MissingCompilerError(ValueError):
    """The compiler for a platform is not installed."""


class Target(NamedTuple):
    """A slice: the kind of its chips and their arrangement."""

    chip: Chip
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f'{self.chip.name}:{"x".join(map(str, self.shape))}'

    @property
    def chips(self) -> int:
        """The number of chips."""
        return math.prod(self.shape)

    def devices(self) -> list[Any]:
        """Returns the devices of the slice, for a mesh; programs can be compiled for them, but not run.

        Raises:
            MissingCompilerError: the compiler of the platform is not installed.
            ValueError: there is no such slice.
        """
        return _tpus(str(self)) if self.chip.platform == 'tpu' else _gpus(self)


def parse(text: str) -> Target:
    """Returns the target of a text such as `v5e:4x4`, `h100:8` or `v5e`.

    Raises:
        ValueError: the chip is unknown, or the shape has another form.
    """
    name, colon, shape = text.strip().lower().partition(':')
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, 1)
        hint = f'did you mean {near[0]!r}? ' if near else ''
        raise ValueError(f'unknown chip {name!r} in target {text!r}; {hint}known: {", ".join(CHIPS)}')
    smallest = SMALLEST[name]
    if not colon:
        return Target(CHIPS[name], smallest)
    axes = len(smallest)
    sizes: tuple[int, ...] = tuple(map(int, shape.split('x'))) if re.fullmatch(r'\d+(x\d+)*', shape) else ()
    if len(sizes) != axes or 0 in sizes:
        example = {1: f'{name}:8', 2: f'{name}:2x4', 3: f'{name}:2x2x1'}[axes]
        raise ValueError(f'target {text!r}: a slice of {name} has {axes} size{"s" * (axes > 1)}, such as {example}')
    if CHIPS[name].platform == 'cuda' and math.prod(sizes) > GPUS_OF_A_HOST:
        raise ValueError(f'target {text!r}: write 1 to {GPUS_OF_A_HOST} GPUs, those of one host')
    return Target(CHIPS[name], sizes)


def _tpus(name: str) -> list[Any]:
    if importlib.util.find_spec('libtpu') is None:
        raise MissingCompilerError('compiling for TPUs needs libtpu, which is not installed: pip install libtpu')
    os.environ.update(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')  # do not search for chips, nor lock them
    try:
        return list(topologies.get_topology_desc(platform='tpu', topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f'topology {name!r}: {why}; write one such as v5e:1x1, v5e:2x4 or v5p:1x1x1') from None


def _gpus(target: Target) -> list[Any]:
    tools = importlib.util.find_spec('nvidia')
    assemblers = [Path(folder) / 'cu13/bin/ptxas' for folder in (tools and tools.submodule_search_locations) or ()]
    if importlib.util.find_spec('jax_cuda13_plugin') is None or not any(path.exists() for path in assemblers):
        raise MissingCompilerError(
            'compiling for GPUs needs the CUDA compiler of JAX, which is not installed: '
            f'pip install jax-cuda13-plugin=={jax.__version__} nvidia-cuda-nvcc'
        )
    config = _gpu_config(memory=target.chip.hbm_bytes, **GPU_FACTS[target.chip.name])
    topology = f'1x1x{target.chips}'  # slices × hosts × GPUs of a host
    found = topologies.get_topology_desc(platform='cuda', topology_name='', target_config=config, topology=topology)
    return list(found.devices)


def _gpu_config(
    *,
    cores: int,
    fpus: int,
    shared: int,
    shared_block: int,
    bandwidth: int,
    cache: int,
    clock: float,
    capability: str,
    name: str,
    memory: int,
) -> str:
    """Returns a target config in the text form of protocol buffers."""
    return f'''
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_block}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} device_memory_size: {memory}
  cuda_compute_capability {{ {capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
'''
