"""The checks of `combiner.testing` find mistakes; `tests/core/test_every_mechanism.py` runs them on what is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import combiner
from combiner import Mechanism, reference, testing
from combiner.layers import parameters
from combiner.patterns import Pattern, sparse, support

HERE = __name__  # mechanisms of this file are named by it


class Near(Mechanism):
    """The position itself and the one before."""

    supported_causal = (True,)

    def pattern(self, length):
        return sparse(support(length, causal=True) & (np.tri(length, k=-2) == 0))


class ClaimsAll(Near):
    full_support = True


class Twice(Near):
    """Reaches the first position directly and in a span."""

    def pattern(self, length):
        first = np.arange(length) == 0
        return Pattern(support(length, causal=True), first[None], np.ones((length, 1), bool))


class SeesTheNext(Near):
    def attend(self, q, k, v, context):
        return super().attend(q, k, jnp.roll(v, -1, axis=1), context)


class ReadsPadding(Near):
    def attend(self, q, k, v, context):
        return super().attend(q, k, v, context._replace(valid=None))


class Unscaled(Near):
    def attend(self, q, k, v, context):
        return super().attend(2 * q, k, v, context)


class NoAverage(Near):
    def attend(self, q, k, v, context):
        return 2 * super().attend(q, k, v, context)


class NotANumber(Near):
    """Divides by the length of the shortest sequence of the batch."""

    def attend(self, q, k, v, context):
        attended = super().attend(q, k, v, context)
        if context.valid is None:
            return attended
        shortest = context.valid.sum(axis=1).min()
        return attended * shortest / shortest


class SeparatesDocuments(Near):
    supports_segments = True

    def attend(self, q, k, v, context):
        if context.segments is None:
            return super().attend(q, k, v, context)
        before = np.arange(q.shape[1]) - 1
        same = (context.segments == context.segments[:, before])[..., None, None]
        valid = jnp.ones(q.shape[:2], bool) if context.valid is None else context.valid
        alone = reference.attend(q, k, v, sparse(np.eye(q.shape[1], dtype=bool)), valid=valid)
        return jnp.where(same, super().attend(q, k, v, context._replace(segments=None)), alone)


class MixesDocuments(Near):
    supports_segments = True

    def attend(self, q, k, v, context):
        return super().attend(q, k, v, context._replace(segments=None))


class DecodesAnother(Near):
    def decode_step(self, cache, index, q, k, v, context):
        cache, attended = super().decode_step(cache, index, q, k, v, context)
        return cache, attended + 0.1


class DecodesTheOneBefore(Near):
    def decode_step(self, cache, index, q, k, v, context):
        return super().decode_step(cache, index - 1, q, k, v, context)


class WrongGradient(Near):
    """Its output is right, and that of `Near`."""

    def attend(self, q, k, v, context):
        return super().attend(jax.lax.stop_gradient(q), k, v, context)


class ForgetsDropout(Near):
    def attend(self, q, k, v, context):
        return super().attend(q, k, v, context._replace(drop=None))


class WithoutDropout(ForgetsDropout):
    supports_dropout = False


class ManySpans(Near):
    """Each earlier position is a span, many times over of no member."""

    def pattern(self, length):
        spans = np.concatenate([np.eye(length, dtype=bool), np.zeros((8 * length, length), bool)])
        uses = np.pad(np.tri(length, k=-1, dtype=bool), ((0, 0), (0, 8 * length)))
        return Pattern(np.eye(length, dtype=bool), spans, uses)


class Parameters(Near):
    """`Near`, with a temperature for each head."""

    requires = 'temperatures'

    def variables(self, module):
        return parameters(module, {'temperature': (nn.initializers.ones, (('heads', module.heads),))})

    def attend(self, q, k, v, context):
        return super().attend(q * self.own_variables(context)['temperature'][:, None], k, v, context)


class ParametersUnlikeInDecoding(Parameters):
    def decode_step(self, cache, index, q, k, v, context):
        return super().decode_step(cache, index, 2 * q, k, v, context)


class Undeclared(Parameters):
    requires = ''


class NothingToCheck(Mechanism):
    requires = 'something'
    supported_causal = (False,)


def program(name):
    return testing.program(f'{HERE}:{name}', {}, causal=True)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('ClaimsAll', r'length 4: position 2 misses part .* full_support = True: position 0 is reached 0 times'),
        ('Twice', 'length 1: position 0 reaches what it may not, or twice: position 0 is reached 2 times'),
    ],
)
def test_a_wrong_pattern_is_named(name, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_coverage(f'{HERE}:{name}', {}, causal=True)


@pytest.mark.parametrize(
    ('check', 'name'),
    [
        (testing.check_causality, 'SeesTheNext'),
        (testing.check_average, 'NoAverage'),
        (testing.check_padding_alone, 'NotANumber'),
        (testing.check_documents, 'MixesDocuments'),
    ],
)
def test_a_wrong_attend_is_found(check, name):
    check(program('Near' if name != 'MixesDocuments' else 'SeparatesDocuments'))
    with pytest.raises(AssertionError):
        check(program(name))


def test_a_leak_of_padding_is_found_by_the_oracle_and_without_it():
    testing.check_padding(f'{HERE}:Near', {}, causal=True)
    name = f'{HERE}:ReadsPadding'
    with pytest.raises(AssertionError):
        testing.check_padding(name, {}, causal=True)
    with pytest.raises(AssertionError):
        testing.check_oracle(name, {}, causal=True, valid=testing.SCATTERED)


def test_a_dropout_that_is_forgotten_is_found():
    testing.check_dropout(f'{HERE}:Near', {}, causal=True)
    testing.check_dropout(f'{HERE}:WithoutDropout', {}, causal=True)
    with pytest.raises(AssertionError, match='Mismatched'):
        testing.check_dropout(f'{HERE}:ForgetsDropout', {}, causal=True)


def test_a_wrong_gradient_is_found():
    name = f'{HERE}:WrongGradient'
    testing.check_lengths(name, {}, causal=True)
    with pytest.raises(AssertionError):
        testing.check_oracle(name, {}, causal=True)


@pytest.mark.parametrize('name', ['DecodesAnother', 'DecodesTheOneBefore'])
def test_another_decoding_is_found(name):
    with pytest.raises(AssertionError):
        testing.check_decoding(f'{HERE}:{name}', {})


def test_the_report_has_a_line_for_each_check_and_says_what_failed():
    report = testing.check(f'{HERE}:Near')
    assert report.splitlines()[0] == f'{HERE}:Near'
    passed = [line.partition(': ')[2] for line in report.splitlines()[1:]]
    assert all(line.startswith('ok      causal: ') for line in report.splitlines()[1:])
    with pytest.raises(AssertionError, match=r'^4 of 12 checks failed') as error:
        testing.check(f'{HERE}:Unscaled')
    lines = str(error.value).splitlines()
    failed = [line.partition(': ')[2] for line in lines if line.startswith('FAILED')]
    assert failed == passed[1:5]
    assert 'Mismatched elements' in str(error.value)
    assert isinstance(error.value.__cause__, AssertionError)


def test_a_mechanism_with_parameters_is_checked_in_the_module():
    titles = ['the pattern is a partition of the support', 'decoding equals the parallel form']
    report = testing.check(f'{HERE}:Parameters')
    assert report.splitlines()[1:] == [f'ok      causal: {title}' for title in titles]
    with pytest.raises(AssertionError, match=r'^1 of 2 checks failed') as error:
        testing.check(f'{HERE}:ParametersUnlikeInDecoding')
    assert f'FAILED  causal: {titles[1]}' in str(error.value)
    with pytest.raises(ValueError, match=r'owns something, .* test it in the Linen module combiner\.Attention'):
        testing.check(f'{HERE}:NothingToCheck')
    with pytest.raises(ValueError, match='Undeclared owns parameters or state: use the Linen module'):
        combiner.attend(*testing.inputs(), f'{HERE}:Undeclared', causal=True)


@pytest.mark.parametrize(
    ('name', 'hyper'),
    [
        ('combiner_fixed', {'pool': 'deepsets', 'block': 5}),
        ('combiner_axial_rowmajor', {'key': 'projected', 'columns': 5}),
    ],
)
def test_parameters_that_a_hyper_parameter_brings_are_found(name, hyper):
    report = testing.check(name, **hyper)
    assert 'decoding equals the parallel form' in report
    assert 'oracle' not in report


def test_what_an_instance_says_of_its_support_counts():
    """Of parts that all miss some positions, the mixture does too, though its class has full support."""
    testing.check_coverage('combiner_mixture', {'parts': ('fixed', 'local')}, causal=True)


def test_a_wrong_hyper_parameter_is_no_failed_check():
    with pytest.raises(ValueError, match=f"{HERE}:Near has no hyper-parameter 'block'; it has: none"):
        testing.check(f'{HERE}:Near', block=5)


def test_more_spans_than_can_be_checked_are_said():
    with pytest.raises(ValueError, match='207 spans at length 23: at most 184 can be checked'):
        testing.check_oracle(f'{HERE}:ManySpans', {}, causal=True)
