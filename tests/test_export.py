"""Exported models: what comes back is what was trained, bitwise, without the run and its data; the card is right."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

import combiner
from combiner import build, evaluate, export, model_card, sharding, weights
from combiner.data import tasks
from combiner.data.text.tokenizer import Tokenizer
from combiner.run import provenance

WEIGHTS_PAGE = Path(__file__).parents[1] / 'docs' / 'weights.md'


def one_device_mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope='module')
def exported_once(workdir, tmp_path_factory):
    return export.export(workdir, tmp_path_factory.mktemp('exported') / 'model')


@pytest.fixture
def exported(exported_once, tmp_path):
    return shutil.copytree(exported_once, tmp_path / 'model')


def assert_bitwise(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@pytest.mark.parametrize('parameters', evaluate.PARAMETERS)
def test_a_run_comes_back_bitwise_without_its_data(workdir, tmp_path, parameters, monkeypatch):
    folder = export.export(workdir, tmp_path / 'models' / 'one', parameters)
    trained = evaluate.load(workdir, parameters)
    monkeypatch.setattr(tasks, 'TASKS', {})
    _, variables, config, tokenizer = combiner.load(folder)
    assert_bitwise(variables, trained.variables)
    assert config == json.loads((folder / 'config.json').read_text())
    training = config['training']
    assert (training['parameters'], training['step'], training['config']['steps']) == (parameters, trained.step, 6)
    assert tokenizer is None
    assert sorted(path.name for path in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert [path.name for path in folder.parent.iterdir()] == ['one']


def test_the_model_is_the_one_that_was_trained(workdir, exported):
    model, variables, *_ = combiner.load(exported)
    trained = evaluate.load(workdir, mesh=one_device_mesh())
    tokens = jnp.arange(96).reshape(2, 48)
    expected = jax.jit(trained.model.apply)(trained.variables, tokens)
    assert_bitwise(jax.jit(model.apply)(variables, tokens), expected)


KINDS = {
    'language model in bfloat16': ({}, {'dtype': 'bfloat16'}, 'combiner_fixed'),
    'masked': ({'head': 'masked_language_model'}, {'tied': True}, 'combiner_fixed'),
    'packed': ({'packed': True}, {'scan': False}, 'combiner_tree'),
    'classifier': ({'head': 'classifier', 'classes': 3}, {}, 'full'),
    'dual encoder': ({'head': 'dual_encoder', 'classes': 2}, {'positions': 'learned', 'pool': 'cls'}, 'full'),
    'with other collections': ({}, {}, 'combiner_routing'),
}


def made(tiny, fields, settings, attention):
    """A model with random variables, as it is loaded from a run."""
    task = tiny.task('tiny', **fields)
    config = tiny.config()
    config.model.update(settings)
    config.model.attention = {'name': attention}
    model = build.model(config, task)
    shapes = sharding.place(
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *task.input_shape), int)), one_device_mesh()
    )
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    return evaluate.Trained(config, task, model, one_device_mesh(), 7, variables)


def test_no_path_of_the_machine_that_trained_is_exported(tiny):
    trained = made(tiny, *KINDS['masked'])
    trained.config.data.data_dir, trained.config.init_from = '/home/me/data', '/home/me/runs/masked'
    assert '/home/me' not in json.dumps(export.describe(trained))


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_model_comes_back(tiny, tmp_path, kind):
    trained = made(tiny, *KINDS[kind])
    weights.save(tmp_path, trained.variables, export.describe(trained))
    model, variables, *_ = combiner.load(tmp_path)
    assert_bitwise(variables, trained.variables)
    assert (set(variables) > {'params'}) == (kind == 'with other collections')
    assert type(model) is type(trained.model)
    tokens = jax.ShapeDtypeStruct((2, *trained.task.input_shape), jnp.int32)
    results = {'classifier': (2, 3), 'dual encoder': (2, 2)}
    assert jax.eval_shape(model.apply, variables, tokens).shape == results.get(kind, (2, 48, 256))


def test_variables_are_split_over_a_mesh(tiny, exported):
    mesh = sharding.make_mesh(fsdp=2)
    one, split = combiner.load(exported).variables, combiner.load(exported, mesh).variables
    assert_bitwise(one, split)
    embedding = split['params']['trunk']['embedding']
    assert embedding.sharding.mesh == mesh
    assert embedding.addressable_shards[0].data.size == embedding.size // 2


@pytest.mark.parametrize(
    ('axes', 'kind'),
    [
        (('data',), AxisType.Auto),
        (('data', 'fsdp', 'context', 'model'), AxisType.Explicit),
    ],
    ids=['names', 'kind'],
)
def test_a_mesh_of_other_axes_is_refused(exported, axes, kind):
    mesh = jax.make_mesh((1,) * len(axes), axes, axis_types=(kind,) * len(axes))
    with pytest.raises(ValueError, match=r'combiner\.sharding\.make_mesh.* automatic axes data, fsdp, context, model'):
        combiner.load(exported, mesh)


def test_every_type_and_layout_of_memory_is_kept(tmp_path):
    square = np.arange(6, dtype=np.float32).reshape(2, 3)
    variables = {
        'params': {
            'transposed': square.T,
            'half': jnp.asarray(square, jnp.bfloat16),
            'nothing': np.zeros((0, 2), 'f4'),
        },
        'state': {'count': np.int32(3), 'nan': np.float32('nan'), 'seen': np.array([True, False])},
    }
    weights.save(tmp_path, variables, {})
    found = load_file(tmp_path / 'model.safetensors')
    expected = {f'{group}.{name}': value for group, values in variables.items() for name, value in values.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        value = np.asarray(value)
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == value.tobytes()


def test_a_model_of_text_brings_its_tokenizer(tiny, workdir, tmp_path, monkeypatch):
    tokenizer = Tokenizer.train(['the cat and the dog', 'the dog and the cat'], 270)
    text = dataclasses.replace(tiny.TASK, tokenizer=lambda data_dir: tmp_path / (data_dir or 'absent') / 'a.model')
    monkeypatch.setitem(tasks.TASKS, 'tiny', lambda: text)
    with pytest.raises(ValueError, match=r'the tokenizer .* is not at .*absent/a.model; give .*--data_dir'):
        export.export(workdir, tmp_path / 'model')
    (tmp_path / 'data').mkdir()
    tokenizer.save(tmp_path / 'data' / 'a.model')
    monkeypatch.setattr(provenance, 'load', lambda _: {'tokenizer': '0123456789abcdef'})
    with pytest.raises(ValueError, match=r'is not the tokenizer of the training .*not 0123456789abcdef\); give'):
        export.export(workdir, tmp_path / 'model', data_dir=tmp_path / 'data')
    assert not (tmp_path / 'model').exists()
    monkeypatch.setattr(provenance, 'load', lambda _: {'tokenizer': tokenizer.fingerprint})
    folder = export.export(workdir, tmp_path / 'model', data_dir=tmp_path / 'data')
    loaded = combiner.load(folder).tokenizer
    (ids,) = loaded.encode(['the dog\n'])
    np.testing.assert_array_equal(ids, tokenizer.encode(['the dog\n'])[0])
    assert loaded.decode(ids) == 'the dog\n'
    assert str(tmp_path) not in (folder / 'config.json').read_text()

    Tokenizer.train(['another text'], 269).save(folder / 'tokenizer.model')
    with pytest.raises(ValueError, match='is another tokenizer than that of the model'):
        combiner.load(folder)
    (folder / 'tokenizer.model').unlink()
    with pytest.raises(ValueError, match=r'tokenizer.model cannot be read \(No such file'):
        combiner.load(folder)


def test_the_example_of_text_continues_a_prompt(tiny, tmp_path, monkeypatch, capsys):
    """The block `py` of docs/weights.md; its model is a tiny one, as a tokenizer for all prose takes a minute."""
    tokenizer = Tokenizer.train(['The function returns a value', 'a value that the function returns'], 279)
    fields = {'shape': (24,), 'vocab_size': tokenizer.vocab_size}
    trained = made(tiny, fields, {'positions': 'learned'}, 'combiner_fixed')
    folder = tmp_path / 'models' / 'text'
    folder.mkdir(parents=True)
    weights.save(folder, trained.variables, export.describe(trained, tokenizer=tokenizer), tokenizer)
    (code,) = re.findall(r'^```py\n(.*?)^```', WEIGHTS_PAGE.read_text(encoding='utf-8'), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, WEIGHTS_PAGE, 'exec'), names := {})
    assert names['tokens'].shape == (24,)
    assert capsys.readouterr().out.startswith('The function returns')


OWN = """
from combiner.attention.combiner_fixed import CombinerFixed

class Own(CombinerFixed):
    pass
"""


def test_code_of_ones_own_must_be_importable(tiny, tmp_path, monkeypatch):
    (tmp_path / 'their_lab.py').write_text(OWN)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        trained = made(tiny, {}, {}, 'their_lab:Own')
        folder = tmp_path / 'model'
        folder.mkdir()
        config = export.describe(trained)
        weights.save(folder, trained.variables, config)
        assert_bitwise(combiner.load(folder).variables, trained.variables)
        del sys.modules['their_lab']
    with pytest.raises(
        ValueError, match=r'cannot import .*their_lab.*install the package that has the module their_lab'
    ):
        combiner.load(folder)
    assert 'module `their_lab` must be importable' in card(config)


def card(config, **changes):
    defaults = {'dataset': 'set', 'parameters': 1234, 'measured': [], 'fingerprints': {}, 'code': 'combiner 1'}
    return model_card.text('model', config, **(defaults | changes))


def front_matter(text):
    _, header, _ = text.split('---\n', 2)
    return yaml.safe_load(header)


def test_the_card_has_the_figures_of_these_parameters_alone(workdir, tmp_path, absl_log):
    trained = shutil.copytree(workdir, tmp_path / 'run')
    expected = evaluate.evaluate(trained, 'test', 'latest')
    few = evaluate.evaluate(trained, 'validation', 'latest', examples=3)
    evaluate.evaluate(trained, 'test', 'ema')
    stale = json.loads((trained / 'evaluation_test_latest.json').read_text()) | {'step': 3}
    (trained / 'evaluation_train_latest.json').write_text(json.dumps(stale))
    (trained / 'evaluation_damaged.json').write_text('{')
    text = (export.export(trained, tmp_path / 'model', licence='cc-by-4.0') / 'README.md').read_text()

    header = front_matter(text)
    assert header['license'] == 'cc-by-4.0'
    assert header['library_name'] == 'combiner-jax'
    assert header['pipeline_tag'] == 'unconditional-image-generation'
    assert 'combiner_axial_rowmajor' in header['tags']
    assert (header['datasets'], header['metrics']) == (['tiny'], ['bits_per_dim'])
    (model,) = header['model-index']
    assert model['name'] == 'model'
    commands = [
        'combiner-evaluate --workdir WORKDIR --split=test --parameters=latest',
        'combiner-evaluate --workdir WORKDIR --split=validation --parameters=latest --examples=3',
    ]
    for result, measured, split, command in zip(
        model['results'], (expected, few), ('test', 'validation'), commands, strict=True
    ):
        assert result['dataset'] == {'type': 'tiny', 'name': 'tiny gradients', 'split': split}
        assert result['metrics'] == [
            {'type': 'bits_per_dim', 'value': measured['bits_per_dim'], 'args': {'command': command}}
        ]
        assert f'{measured["bits_per_dim"]:.4f} bits/dim' in text
        assert f'`{command}`' in text
    assert '3 of 24' in text
    left_out = 'evaluation_damaged.json, evaluation_test_ema.json, evaluation_train_latest.json'
    assert f'not in the model card, as of other parameters than these: {left_out}' in absl_log.text

    (count,) = {weights.count(combiner.load(tmp_path / 'model').variables)}
    assert f'{count:,} parameters' in text
    assert '6 of 6 steps with 8 examples each: 2,304 tokens' in text
    for name, value in provenance.load(trained).items():
        assert f'fingerprint of {name}: `{value}`' in text
    assert f'exported by {export.code_version()}' in text
    assert "combiner.load('model')" in text


def test_a_card_says_what_is_not_known(exported):
    text = (exported / 'README.md').read_text()
    header = front_matter(text)
    assert header['license'] == 'unknown'
    assert 'model-index' not in header
    assert 'These parameters have not been evaluated' in text
    assert 'No licence was chosen' in text


def test_figures_of_several_evaluations_and_infinite_ones(tmp_path, exported):
    figures = {'examples': 2, 'of_examples': 2, 'context': 'all', 'perplexity': 5.0}
    result = {'split': 'test', 'parameters': 'latest', 'step': 6, 'metrics': ['perplexity'], **figures}
    result['evaluations'] = {'stream': figures, 'documents': figures | {'perplexity': float('inf')}}
    (tmp_path / 'evaluation_test_latest_other_data_01234567.json').write_text(json.dumps(result))
    measured, other = model_card.evaluations(tmp_path, 'latest', 6)
    assert other == []
    text = card(json.loads((exported / 'config.json').read_text()), measured=measured)
    (found,) = front_matter(text)['model-index'][0]['results']
    assert found['dataset']['name'] == 'set, evaluation of stream'
    assert found['metrics'][0]['value'] == 5.0
    assert '| test, documents | perplexity inf |' in text
    assert '--split=test --parameters=latest --other_data`' in text


def test_nothing_is_overwritten_and_no_half_folder_stays(workdir, tmp_path, monkeypatch):
    (tmp_path / 'empty').mkdir()
    assert export.export(workdir, tmp_path / 'empty') == tmp_path / 'empty'
    with pytest.raises(ValueError, match=r"out '.*empty' exists and is no empty folder; remove it, or give another"):
        export.export(workdir, tmp_path / 'empty')
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match='exists and is no empty folder'):
        export.export(workdir, tmp_path / 'file')
    with pytest.raises(OSError, match=r'file/model cannot be written \(.*\); give another --out'):
        export.export(workdir, tmp_path / 'file' / 'model')
    written = []

    def interrupted(arrays, path, **options):
        path.write_bytes(b'half')
        written.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, 'save_file', interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.export(workdir, tmp_path / 'model')
    assert written
    assert sorted(path.name for path in tmp_path.iterdir()) == ['empty', 'file']


def test_mistakes_of_an_export(workdir, tiny, tmp_path):
    with pytest.raises(ValueError, match=r'has no config.json; give the --workdir of a training'):
        export.export(tmp_path / 'absent', tmp_path / 'model')
    with pytest.raises(ValueError, match="unknown parameters 'last'; known: latest, best, ema"):
        export.export(workdir, tmp_path / 'model', 'last')
    with pytest.raises(ValueError, match=r"license 'CC BY 4.0': give an identifier"):
        export.export(workdir, tmp_path / 'model', licence='CC BY 4.0')
    with pytest.raises(ValueError, match=r"out 'gs://bucket/model' is not a folder of this machine"):
        export.export(workdir, 'gs://bucket/model')
    shutil.copytree(workdir, tmp_path / 'run', ignore=shutil.ignore_patterns('checkpoints'))
    with pytest.raises(ValueError, match='has no checkpoint yet; train first'):
        export.export(tmp_path / 'run', tmp_path / 'model')
    assert not (tmp_path / 'model').exists()


def config_with(**changes):
    def change(folder):
        config = json.loads((folder / 'config.json').read_text())
        config = {key: value for key, value in (config | changes).items() if value != 'absent'}
        (folder / 'config.json').write_text(json.dumps(config))

    return change


def model_with(**changes):
    def change(folder):
        config_with(model=json.loads((folder / 'config.json').read_text())['model'] | changes)(folder)

    return change


def arrays_with(**changes):
    def change(folder):
        arrays = load_file(folder / 'model.safetensors')
        arrays |= {name: make(arrays) for name, make in changes.items()}
        save_file({name: value for name, value in arrays.items() if value is not None}, folder / 'model.safetensors')

    return change


def content(name, change):
    def write(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return write


BEGIN = 'params.trunk.embedding'
BROKEN = [
    (lambda folder: shutil.rmtree(folder), r'is no exported model: config.json cannot be read \(No such file'),
    (content('config.json', lambda text: text[:-20]), 'is not valid JSON'),
    (content('config.json', lambda text: b'[]'), r'its model_type is \[\], not'),
    (content('config.json', lambda text: b'{"model_type": "gpt2"}'), "its model_type is 'gpt2', not 'combiner'"),
    (config_with(format=2, version='0.9'), r'has format 2, and this version reads format 1: combiner 0.9 wrote it'),
    (config_with(colour='red'), "has the unknown key 'colour'; known: model_type, format"),
    (config_with(head='absent'), "lacks the key 'head'"),
    (config_with(classes=True), 'classes=True must be of type int'),
    (config_with(head='poet'), r"describes no model \(unknown head 'poet'"),
    (config_with(shape=['a']), 'describes no model'),
    (model_with(colour='red'), r'describes no model \(unknown model settings colour'),
    (model_with(attention={}), r'describes no model \(model.attention has no name'),
    (model_with(attention={'name': 'fulll'}), "unknown mechanism 'fulll'; did you mean 'full'"),
    (model_with(layers=3), r'does not hold the variables .*float32\[2,.* there, float32\[3,'),
    (lambda folder: (folder / 'model.safetensors').unlink(), r'model.safetensors cannot be read'),
    (content('model.safetensors', lambda data: data[:-4]), 'model.safetensors is damaged'),
    (content('model.safetensors', lambda data: b'\xff' * 99), 'model.safetensors is damaged'),
    (content('model.safetensors', lambda data: b''), 'model.safetensors is damaged'),
    (arrays_with(**{BEGIN: lambda _: None}), rf'{BEGIN}: absent there, float32\[256, 16\] in the model'),
    (arrays_with(more=lambda _: np.zeros(3)), r'more: float64\[3\] there, absent in the model'),
    (arrays_with(**{BEGIN: lambda arrays: arrays[BEGIN].astype('f2')}), rf'{BEGIN}: float16\[256, 16\] there, float32'),
]


def test_a_workdir_is_no_exported_model(workdir):
    with pytest.raises(ValueError, match=r'is the workdir of a run: export its model \(combiner-export --workdir'):
        combiner.load(workdir)


@pytest.mark.parametrize(('change', 'message'), BROKEN, ids=[message for _, message in BROKEN])
def test_a_broken_folder_is_refused_in_words(exported, change, message):
    change(exported)
    with pytest.raises(ValueError, match=message):
        combiner.load(exported)


def test_import_combiner_imports_no_model():
    program = """
import sys
import combiner

assert not {'combiner.models', 'safetensors', 'sentencepiece'} & set(sys.modules)
assert combiner.load.__module__ == 'combiner.weights'
assert not hasattr(combiner, 'lod')
"""
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
