"""With `jax_enable_x64`, float32 stays float32 everywhere, and float64 is exact to its own precision."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json
import jax
jax.config.update('jax_enable_x64', True)
import jax.numpy as jnp
import numpy as np
from cases import KNOWN_AHEAD, UNPARTITIONED, draw, sizes_of
import combiner
from combiner import reference
from combiner.attention import registry
from combiner.patterns import Mixture

found = {}
for name in KNOWN_AHEAD + UNPARTITIONED:
    causal, hyper = registry.resolve(name).forms[0], sizes_of(name)

    def attend(*qkv):
        out, pull_back = jax.vjp(lambda *qkv: combiner.attend(*qkv, name, causal=causal, **hyper), *qkv)
        return out, *pull_back(jnp.ones_like(out))

    qkv = draw(1, 23, 2, 4, dtype=jnp.float64)
    single = jax.eval_shape(attend, *(x.astype(jnp.float32) for x in qkv))
    error = None
    if name in KNOWN_AHEAD:
        pattern = combiner.pattern(name, 23, causal=causal, **hyper)
        parts = pattern.parts if isinstance(pattern, Mixture) else [pattern]
        keys = {'key': 'attended'} if 'key' in registry.hyper_parameters(name) else {}
        expected = sum(reference.attend(*qkv, part, **keys) for part in parts) / len(parts)
        error = float(abs(jax.jit(attend)(*qkv)[0] - expected).max())
    found[name] = sorted({str(x.dtype) for x in single}), error
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def found():
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM], cwd=root / 'tests', capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_float32_stays_float32(found):
    assert {name: types for name, (types, _) in found.items() if types != ['float32']} == {}


def test_float64_is_exact(found):
    assert {name: error for name, (_, error) in found.items() if error is not None and not error < 1e-12} == {}
