import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KNOWN_AHEAD
from PIL import Image

import combiner
from combiner import models
from combiner.core import registry
from experiments.harness import attention_map

LENGTH = 23
TOKENS = np.random.default_rng(0).integers(256, size=(1, LENGTH))


def model_of(name, **settings):
    sizes = {size: 5 for size in ('block', 'columns') if size in registry.hyper_parameters(name)}
    attention = {'name': name, **sizes, **settings.pop('hyper', {})}
    settings = {'layers': 2, 'width': 16, 'heads': 2, 'attention': attention, **settings}
    return models.build('language_model', 256, (LENGTH,), settings)


def captured(name, layer=1, **settings):
    model = model_of(name, **settings)

    @jax.jit
    def init(key):
        return jax.tree.map(lambda a: a + 0.5 * jax.random.normal(key, a.shape), model.init(key, jnp.asarray(TOKENS)))

    return attention_map.capture(model, init(jax.random.key(0)), TOKENS)[layer]


@pytest.mark.parametrize('name', KNOWN_AHEAD)
def test_the_matrix_of_every_mechanism(name):
    layer = captured(name)
    (matrix,) = attention_map.effective(layer)
    pattern = layer.module.mechanism.pattern(LENGTH)
    np.testing.assert_allclose(matrix.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(np.broadcast_to(pattern.coverage() > 0, matrix.shape) | (matrix == 0), True)
    assert (matrix >= 0).all()
    attended = jax.jit(layer.attend)(layer.v)[0]
    np.testing.assert_allclose(np.einsum('hlm,mhd->lhd', matrix, layer.v[0]), attended, atol=5e-6 * abs(attended).max())
    for head in matrix:
        found = attention_map.describe(head, pattern)
        assert found['largest_span_rank'] == min(1, found['spans_examined'])
        assert 0 < found['direct_weight'] <= 1 + 1e-6


@pytest.mark.parametrize('joint', [False, True])
def test_nothing_is_said_of_spans_that_a_mixture_reaches_twice(joint):
    layer = captured('combiner_mixture', hyper={'joint': joint})
    (matrix,) = attention_map.effective(layer)
    pattern = layer.module.mechanism.pattern(LENGTH)
    found = [attention_map.describe(head, pattern) for head in matrix]
    assert [head['largest_row_sum_error'] < 1e-5 for head in found] == [True] * 2
    assert [head['spans_examined'] for head in found] == [0, 0]
    attention_map.figure(matrix, pattern, found, 'heading')


def test_a_mixture_is_described_and_drawn_by_its_parts(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(attention_map.pattern_figure, 'draw', lambda ax, title, part: drawn.append(title))
    settings = {'attention': {'name': 'combiner_mixture'}, 'layer': 1, 'image': 0, 'step': 7}
    found = attention_map.draw_layer(tmp_path, captured('combiner_mixture'), settings)
    assert drawn == ['pattern, 1 of 2', 'pattern, 2 of 2']
    assert 'pattern_picture' not in found
    for head in found['heads']:
        assert head['largest_beyond_support'] == 0
        assert 0 < head['direct_weight'] < 1


def test_dense_attention_is_its_softmax():
    layer = captured('full')
    logits = np.einsum('lhd,mhd->hlm', layer.q[0], layer.k[0]) / np.sqrt(8)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True)) * np.tri(LENGTH)
    expected = weights / weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(attention_map.effective(layer)[0], expected, atol=1e-5)


def test_spans_of_rank_one_are_examined():
    (matrix,) = attention_map.effective(captured('combiner_fixed'))
    pattern = combiner.pattern('combiner_fixed', LENGTH, causal=True, block=5)
    assert attention_map.span_ranks(matrix[0], pattern) == [1] * 4
    spoilt = matrix[0].copy()
    spoilt[20, 0] += 0.01
    assert attention_map.span_ranks(spoilt, pattern) == [2, 1, 1, 1]
    assert attention_map.rank(np.zeros((3, 3))) == 0
    assert attention_map.rank(np.diag([1, 1e-4, 1e-6])) == 2


def test_a_layer_of_scanned_blocks_is_that_of_separate_ones():
    tokens = jnp.asarray(TOKENS)
    scanned, separate = model_of('combiner_fixed'), model_of('combiner_fixed', scan=False)
    variables = jax.jit(scanned.init)(jax.random.key(0), tokens)
    params = variables['params']
    stack = dict(params['trunk']['stack'])
    blocks = stack.pop('blocks_0')
    for layer in range(2):
        stack[f'blocks_{layer}'] = jax.tree.map(lambda a, layer=layer: a[layer], blocks)
    unrolled = {'params': {**params, 'trunk': {**params['trunk'], 'stack': stack}}}
    for layer in range(2):
        expected = attention_map.effective(attention_map.capture(separate, unrolled, TOKENS)[layer])
        for model in (scanned, model_of('combiner_fixed', remat='full')):
            actual = attention_map.effective(attention_map.capture(model, variables, TOKENS)[layer])
            np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_weights_that_depend_on_the_values_are_refused():
    layer = captured('combiner_axial_rowmajor', hyper={'key': 'projected'})
    with pytest.raises(ValueError, match='CombinerAxialRowmajor has no effective matrix: its weights depend'):
        attention_map.effective(layer)


def run_command(workdir, layer, monkeypatch):
    arguments = ['--workdir', workdir, '--layer', layer, '--image', 3, '--length', 30]
    monkeypatch.setattr('sys.argv', ['attention_map', *map(str, arguments)])
    attention_map.command(None)


def test_the_command(workdir, monkeypatch, capsys):
    run_command(workdir, 1, monkeypatch)
    assert 'attention_map_1_3.png and .json' in capsys.readouterr().out
    with Image.open(workdir / 'attention_map_1_3.png') as picture:
        assert picture.width > 100
    written = json.loads((workdir / 'attention_map_1_3.json').read_text())
    assert (written['step'], written['length'], len(written['heads'])) == (6, 30, 2)
    for head in written['heads']:
        assert head['largest_row_sum_error'] < 1e-5
        assert head['largest_beyond_support'] == 0
        assert head['direct_rank'] == head['rank'] == 30
        assert (head['spans_examined'], head['largest_span_rank']) == (6, 1)


def test_a_picture_of_every_head_of_every_layer_has_its_weights(workdir, monkeypatch):
    drawn = []
    save = attention_map.save_pictures
    monkeypatch.setattr(attention_map, 'save_pictures', lambda path, m, *rest: (drawn.append(m), save(path, m, *rest)))
    run_command(workdir, 'all', monkeypatch)
    assert len(drawn) == 2
    for layer, matrices in enumerate(drawn):
        found = json.loads((workdir / f'attention_map_{layer}_3.json').read_text())
        assert (found['layer'], found['tokens_per_pixel'], len(found['heads'])) == (layer, 1, 2)
        for head, matrix in zip(found['heads'], matrices, strict=True):
            with Image.open(workdir / head['picture']) as picture:
                shades = np.asarray(picture)
            assert shades.shape == matrix.shape
            exact = 255 * (1 - np.log(matrix.clip(attention_map.FAINTEST)) / np.log(attention_map.FAINTEST))
            np.testing.assert_allclose(shades, exact, atol=0.501)
        with Image.open(workdir / found['pattern_picture']) as picture:
            assert picture.size == (30, 30)


def test_a_pixel_is_the_largest_weight_of_its_positions(tmp_path):
    matrix = np.arange(49.0).reshape(7, 7)
    np.testing.assert_array_equal(attention_map.pooled(matrix, 3), [[16, 19, 20], [37, 40, 41], [44, 47, 48]])
    np.testing.assert_array_equal(attention_map.pooled(matrix, 1), matrix)
    length = 2 * attention_map.PIXELS + 1
    pattern = combiner.pattern('combiner_fixed', length, causal=True, block=64)
    found = {'heads': [{}]}
    attention_map.save_pictures(tmp_path / 'map', np.eye(length)[None], pattern, found)
    assert found['tokens_per_pixel'] == 3
    with Image.open(tmp_path / found['heads'][0]['picture']) as picture:
        np.testing.assert_array_equal(np.asarray(picture), 255 * np.eye(171))
    with Image.open(tmp_path / found['pattern_picture']) as picture:
        kinds = np.asarray(picture)
    assert kinds.shape == (171, 171)
    assert (kinds.diagonal() == 1).all()  # direct
    assert kinds[170, 0] in (2, 3)  # through a span
    assert kinds[0, 170] == 0


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'layer': 2}, r'layer 2 does not exist; the model has layers 0\.\.1'),
        ({'image': 24}, r'image 24 does not exist; the test split has 0\.\.23'),
        ({'length': 49}, 'length 49 must be at least 1 and at most 48'),
    ],
)
def test_what_is_not_there(workdir, arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_map.attention_map(workdir, **arguments)
