"""Checks that a mechanism computes what its pattern says: for the tests of your own mechanism, in a line.

    from combiner import testing

    print(testing.check('mylab.past:WholePast', block=5))

The report has a line for each check. The checks are small functions, of which this project's own tests are made, for
every registered mechanism. They compare with the oracle (`combiner.reference`), gradients included, at lengths that
blocks do not divide.
"""

import functools
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from combiner import functional
from combiner.core import registry
from combiner.core.mechanism import Context, Mechanism
from combiner.core.module import Attention, make_attention
from combiner.oracle import LENGTH, oracle
from combiner.patterns import support

# Largest difference from the oracle, relative to the oracle's largest value; the oracle always computes in float32.
TOLERANCE = {jnp.float32: 5e-6, jnp.bfloat16: 2e-2}
LENGTHS = (1, 2, 4, 5, 6, 17)
SHAPE = (2, LENGTH, 2, 8)
SCATTERED = np.random.default_rng(0).random((2, LENGTH)) > 0.4  # positions that are no padding
PROJECTIONS = ('query', 'key', 'value', 'out')
DOCUMENT_NUMBERS = (7, 0, 3, -1, 4)
DOCUMENTS = np.stack([np.repeat(DOCUMENT_NUMBERS, sizes) for sizes in ([4, 1, 9, 3, 6], [1, 12, 2, 8, 0])])

Program = Callable[..., Any]


def check(name: str, *, oracle_options: Mapping[str, Any] | None = None, **hyper: Any) -> str:
    """Checks a mechanism in each of its forms, causal and bidirectional; returns a report of a line for each check.

    Give sizes that divide few lengths, such as `block=5`. Neither outputs nor gradients of a mechanism without a
    pattern are compared with the oracle; packed documents are checked if it `supports_segments`, decoding if it has a
    causal form. Of a mechanism that `requires` parameters or state, the pattern and the decoding are checked, in the
    Linen module with random ones.

    Args:
        name: a path like `mylab.past:WholePast`, or a registered name.
        oracle_options: for `reference.attend`, where the summaries are not those of its defaults: `key` or `pools`.
        **hyper: the mechanism's own hyper-parameters.

    Raises:
        AssertionError: a check failed; the message is the report. Its cause is the first error.
        ValueError: the name or a hyper-parameter is wrong, or nothing of the mechanism can be checked here.
    """
    forms = registry.resolve(name).supported_causal
    made = [registry.make_mechanism(name, hyper, causal=form) for form in forms]  # wrong values fail no check
    hyper = {key: getattr(made[0], key) for key in hyper}  # its lists as tuples
    lines, errors = [], []
    checks = [each for mechanism in made for each in _checks(name, hyper, mechanism, dict(oracle_options or {}))]
    if not checks:
        owned = made[0].requires or 'parameters or state'
        raise ValueError(
            f'{name} owns {owned}, is not causal and has no pattern: no check is for it; test it in the '
            'Linen module combiner.Attention'
        )
    for title, run in checks:
        try:
            run()
            lines.append(f'ok      {title}')
        except Exception as error:  # also those of the mechanism, such as a wrong shape
            errors.append(error)
            lines.append(f'FAILED  {title}\n{textwrap.indent(f"{type(error).__name__}: {error}".strip(), " " * 8)}')
    report = '\n'.join([f'{name} {hyper or ""}'.rstrip(), *lines])
    if errors:
        raise AssertionError(f'{len(errors)} of {len(lines)} checks failed\n{report}') from errors[0]
    return report


def _checks(
    name: str, hyper: dict[str, Any], mechanism: Mechanism, oracle_options: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields titles and checks of one form of a mechanism."""
    causal = mechanism.causal
    form, partitions = 'causal' if causal else 'bidirectional', type(mechanism).pattern is not Mechanism.pattern
    is_function = not mechanism.requires and not _owns_variables(name, hyper, causal=causal)
    run, alone = program(name, hyper, causal=causal), at_lengths(name, hyper, causal=causal)
    if partitions:
        yield f'{form}: the pattern is a partition of the support', lambda: check_coverage(name, hyper, causal=causal)
    if partitions and is_function:
        same = functools.partial(check_oracle, name, hyper, causal=causal, **oracle_options)
        lengths = functools.partial(check_lengths, name, hyper, causal=causal, **oracle_options)
        yield f'{form}: outputs and gradients are those of the oracle', same
        yield f'{form}: … with padding', functools.partial(same, valid=SCATTERED)
        yield f'{form}: … in bfloat16', functools.partial(same, valid=SCATTERED, dtype=jnp.bfloat16)
        yield f'{form}: outputs at lengths {", ".join(map(str, LENGTHS))}', lengths
    if causal and is_function:
        yield f'{form}: no position depends on later ones', lambda: check_causality(run)
    if is_function:
        yield f'{form}: the weights of a position sum to one', lambda: check_average(run)
        yield f'{form}: padding is never read', lambda: check_padding(name, hyper, causal=causal)
        yield f'{form}: padding at the end changes nothing', lambda: check_padding_at_end(run, alone)
        yield f'{form}: padding alone gives zeros, and finite gradients', lambda: check_padding_alone(run)
        yield f'{form}: dropout acts on the weights', lambda: check_dropout(name, hyper, causal=causal)
    if mechanism.supports_segments and is_function:
        yield f'{form}: packed documents do not see each other', lambda: check_documents(run)
    if causal:
        yield f'{form}: decoding equals the parallel form', lambda: check_decoding(name, hyper)


def _owns_variables(name: str, hyper: Mapping[str, Any], *, causal: bool) -> bool:
    """Returns whether a mechanism has parameters or state, so that only the module can use it."""
    module = make_attention(name, hyper, causal=causal, width=16, heads=2, max_length=LENGTH)
    x, positions = jnp.zeros((1, LENGTH, 16)), jnp.arange(LENGTH)[None]
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), x, positions))
    return set(made) != {'params'} or not set(made['params']) <= {f'{role}_kernel' for role in PROJECTIONS}


def draw(*shape: int, count: int = 3, seed: int = 0, dtype: Any = jnp.float32) -> list[jax.Array]:
    """Returns arrays of standard normal numbers."""
    return [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(seed), count)]


def inputs(seed: int = 0) -> list[np.ndarray]:
    """Returns queries, keys and values of `SHAPE`; in numpy, where changing them compiles nothing."""
    return [np.asarray(x) for x in draw(*SHAPE, seed=seed)]


def cotangent() -> np.ndarray:
    """Returns the random cotangent of the output for which gradients are computed."""
    return np.asarray(draw(*SHAPE, count=1, seed=7)[0])


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Compares elements of two arrays or nested lists, relative to the largest expected value."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def program(name: str, hyper: Mapping[str, Any], *, causal: bool) -> Program:
    """Returns the compiled `(q, k, v, valid=None, segments=None) -> (out, dq, dk, dv)` of a mechanism.

    The gradients are those for `cotangent()`. Equal arguments share one program.
    """
    compiled = _program(registry.resolve(name), name, tuple(hyper.items()), causal)
    return lambda q, k, v, valid=None, segments=None: compiled(q, k, v, valid, segments, cotangent())


@functools.cache
def _program(mechanism: type[Mechanism], name: str, hyper: tuple[tuple[str, Any], ...], causal: bool) -> Program:
    """Compiles a program; `mechanism` distinguishes a class that a notebook defines again under the same name."""
    del mechanism

    @jax.jit
    def run(q: Array, k: Array, v: Array, valid: Any, segments: Any, cotangent: Array) -> tuple[Array, ...]:
        def attend(q: Array, k: Array, v: Array) -> Array:
            return functional.attend(q, k, v, name, causal=causal, valid=valid, segments=segments, **dict(hyper))

        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(cotangent.astype(q.dtype))

    return run


def at_lengths(name: str, hyper: Mapping[str, Any], *, causal: bool) -> Program:
    """Returns the compiled `(q, k, v) -> ` outputs by length, for the first 1, 2, 4, … positions alone (`LENGTHS`)."""
    return _at_lengths(registry.resolve(name), name, tuple(hyper.items()), causal)


@functools.cache
def _at_lengths(mechanism: type[Mechanism], name: str, hyper: tuple[tuple[str, Any], ...], causal: bool) -> Program:
    del mechanism

    def attend(length: int, *qkv: Array) -> Array:
        q, k, v = (x[:, :length] for x in qkv)
        return functional.attend(q, k, v, name, causal=causal, **dict(hyper))

    return jax.jit(lambda *qkv: {length: attend(length, *qkv) for length in LENGTHS})


def check_coverage(name: str, hyper: Mapping[str, Any], *, causal: bool, lengths: Any = (*LENGTHS, LENGTH, 64)) -> None:
    """Checks that no position is covered twice or outside of the support, and none missed where that is claimed.

    Raises:
        AssertionError: a pattern is wrong; the message has the length and a position.
    """
    full_support = registry.make_mechanism(name, hyper, causal=causal).full_support
    for length in lengths:
        pattern = functional.pattern(name, length, causal=causal, **hyper)
        if pattern.length != length:
            raise AssertionError(f'length {length}: the pattern is of {pattern.length} positions')
        coverage = pattern.coverage()
        allowed = support(length, causal=causal)
        wrong = {
            'reaches what it may not, or twice': coverage > allowed,
            'does not reach itself': np.eye(length) > coverage,
            'misses part of its support, though full_support = True': full_support & (coverage < allowed),
        }
        for what, cells in wrong.items():
            if cells.any():
                i, j = np.argwhere(cells)[0]
                raise AssertionError(
                    f'length {length}: position {i} {what}: position {j} is reached {coverage[i, j]} times'
                )


def check_oracle(
    name: str,
    hyper: Mapping[str, Any],
    *,
    causal: bool,
    valid: Any = None,
    dtype: Any = jnp.float32,
    **oracle_options: Any,
) -> None:
    """Checks outputs and gradients, in the type of the input, against the oracle's."""
    q, k, v = draw(*SHAPE, dtype=dtype)
    pattern = functional.pattern(name, LENGTH, causal=causal, **hyper)
    actual = program(name, hyper, causal=causal)(q, k, v, valid)
    if actual[0].dtype != dtype:
        raise AssertionError(f'the output of {np.dtype(dtype)} is {actual[0].dtype}')
    expected = oracle(pattern, q, k, v, cotangent(), valid, **oracle_options)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, TOLERANCE[dtype])


def check_lengths(name: str, hyper: Mapping[str, Any], *, causal: bool, **oracle_options: Any) -> None:
    """Checks the outputs at `LENGTHS` against the oracle's."""
    q, k, v = inputs()
    for length, actual in at_lengths(name, hyper, causal=causal)(q, k, v).items():
        pattern = functional.pattern(name, length, causal=causal, **hyper)
        shorter = {role: x[:, :length] for role, x in {'q': q, 'k': k, 'v': v, 'cotangent': cotangent()}.items()}
        expected, *_ = oracle(pattern, **shorter, **oracle_options)
        assert_close(actual, expected, TOLERANCE[jnp.float32])


def check_causality(run: Program) -> None:
    """Checks that the output at each position does not change, in any bit, with later queries, keys and values."""
    before, after = inputs(), inputs(seed=1)
    expected, *_ = run(*before)
    for now in range(LENGTH - 1):
        past = np.arange(LENGTH)[:, None, None] <= now
        actual, *_ = run(*(np.where(past, old, 100 * new) for old, new in zip(before, after, strict=True)))
        np.testing.assert_array_equal(actual[:, : now + 1], expected[:, : now + 1], f'position {now}')


def check_average(run: Program) -> None:
    """Checks that values of one give outputs of one."""
    q, k, v = inputs()
    out, *_ = run(q, k, np.ones_like(v))
    assert_close(out, np.ones_like(v), TOLERANCE[jnp.float32])


def check_padding(name: str, hyper: Mapping[str, Any], *, causal: bool) -> None:
    """Checks that the mechanism gives the same to all other positions, whatever finite numbers padding holds.

    `functional.attend` and the module set padding to zero before: by them, no difference would be seen.
    """
    mechanism, context = registry.make_mechanism(name, hyper, causal=causal), Context(valid=jnp.asarray(SCATTERED))
    here, run = SCATTERED[..., None, None], jax.jit(lambda q, k, v: mechanism.attend(q, k, v, context))
    filled = [np.where(here, x, 3 * other) for x, other in zip(inputs(), inputs(seed=1), strict=True)]
    actual, expected = (np.where(here, run(*qkv), 0) for qkv in (filled, inputs()))
    assert_close(actual, expected, TOLERANCE[jnp.float32])


def check_padding_at_end(run: Program, alone: Program) -> None:
    """Checks that the first positions, with padding after them, give what they give `alone` (see `at_lengths`)."""
    length, qkv = max(LENGTHS), inputs()
    within = np.arange(LENGTH) < length
    padded = [np.where(within[:, None, None], x, np.float32(3)) for x in qkv]
    actual, *_ = run(*padded, np.stack([within, within]))
    assert_close(actual[:, :length], alone(*qkv)[length], TOLERANCE[jnp.float32])


def check_padding_alone(run: Program) -> None:
    """Checks that a sequence of padding gives zeros and zero gradients, and the other sequence finite gradients."""
    valid = np.arange(2)[:, None] == np.zeros((1, LENGTH))
    out, *gradients = run(*inputs(), valid)
    np.testing.assert_array_equal(out[1], 0)
    for role, gradient in zip('qkv', map(np.asarray, gradients), strict=True):
        np.testing.assert_array_equal(gradient[1], 0)
        if not np.isfinite(gradient).all() or not (gradient[0] != 0).any():
            raise AssertionError(f'the gradient of {role} is not finite, or zero where there is no padding')


def check_dropout(name: str, hyper: Mapping[str, Any], *, causal: bool) -> None:
    """Checks that a dropout that doubles all weights doubles the output, if the mechanism supports dropout."""
    mechanism = registry.make_mechanism(name, hyper, causal=causal)
    if not mechanism.supports_dropout:
        return
    q, k, v = map(jnp.asarray, inputs())
    run = jax.jit(lambda drop: mechanism.attend(q, k, v, Context(drop=drop)), static_argnums=0)
    doubled, once = (run(drop) for drop in (lambda weights: 2 * weights, None))
    assert_close(doubled, 2 * np.asarray(once), TOLERANCE[jnp.float32])


def check_documents(run: Program) -> None:
    """Checks that each document alone, the others as padding, gives the output and the gradients that concern it."""
    qkv = inputs()
    alone = [run(*qkv, SCATTERED & (document == DOCUMENTS)) for document in DOCUMENT_NUMBERS]
    for actual, *parts in zip(run(*qkv, SCATTERED, DOCUMENTS), *alone, strict=True):
        assert_close(actual, sum(np.asarray(part) for part in parts), TOLERANCE[jnp.float32])


def random_variables(module: nn.Module, *inputs: Any) -> Any:
    """Returns a module's variables, random, without compiling their initialisation; the same in every call."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    values = jax.tree.map(lambda leaf: random.normal(0, 1 / 4, leaf.shape).astype(leaf.dtype), shapes)
    return jax.tree.map(jnp.asarray, nn.unbox(values))


def check_decoding(name: str, hyper: Mapping[str, Any], dtype: Any = jnp.float32) -> None:
    """Checks that token after token, from prompts of several lengths, gives what the parallel form gives."""
    module: Attention = make_attention(name, hyper, width=16, heads=2, rotary=True, max_length=LENGTH, dtype=dtype)
    (x,) = draw(3, LENGTH, 16, count=1, dtype=dtype)
    counts = np.array([1, 7, 10])

    positions = jnp.arange(LENGTH)[None]
    params = random_variables(module, x, positions)

    @jax.jit
    def start(params: Any, x: Array, counts: Array) -> Any:
        prefill = functools.partial(module.apply, params, method='prefill', mutable=['cache'])
        return module.apply(params, x, positions), *prefill(x[:, :10], positions[:, :10], counts, LENGTH)

    @jax.jit
    def decode(variables: Any, x: Array, index: Array) -> Any:
        return module.apply(variables, x, index, method='decode', mutable=['cache'])

    expected, attended, cache = start(params, x, counts)
    if not expected.dtype == attended.dtype == dtype:
        raise AssertionError(
            f'{np.dtype(dtype)} becomes {expected.dtype} in parallel and {attended.dtype} in the prompt'
        )
    x, expected = np.asarray(x), np.asarray(expected)
    assert_close(attended, expected[:, :10], TOLERANCE[dtype])
    rows = np.arange(3)
    for index in [counts + step for step in range(LENGTH - 10)]:
        attended, cache = decode({**params, **cache}, x[rows, index][:, None], index)
        assert_close(attended[:, 0], expected[rows, index], TOLERANCE[dtype])
