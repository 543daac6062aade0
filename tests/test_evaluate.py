import errno
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from combiner import evaluate, losses, train
from combiner.data import tasks

ROOT = Path(__file__).parents[1]


CHANGES = {'run.eval_every': 2, 'run.checkpoint_every': 2}


@pytest.fixture(scope='module')
def trained_once(tmp_path_factory):
    import tiny

    workdir = tmp_path_factory.mktemp('run')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, 'TASKS', tiny.TASKS)
        return workdir, train.train(tiny.config(**CHANGES), workdir, devices=jax.devices()[:1])


@pytest.fixture
def workdir(tiny, trained_once):
    return trained_once[0]


def expected_nats(tiny, trained):
    """Slowly, one example at a time."""
    source, apply = tiny.Images('test'), jax.jit(trained.model.apply)
    total = 0.0
    for index in range(len(source)):
        tokens = jnp.asarray(tiny.TASK.transform(source[index])['tokens'][None])
        total += float(losses.target_nats(apply(trained.variables, tokens), tokens).sum())
    return total


@pytest.mark.parametrize('parameters', ['latest', 'best', 'ema'])
def test_whole_split_each_example_once(tiny, workdir, parameters):
    result = evaluate.evaluate(workdir, 'test', parameters)
    assert (result['examples'], result['targets']) == (24, 24 * 48)
    trained = evaluate.load(workdir, parameters)
    nats = expected_nats(tiny, trained)
    assert result['nats'] == pytest.approx(nats, rel=1e-5)
    assert result['loss_nats'] == pytest.approx(nats / (24 * 48), rel=1e-5)
    assert result['bits_per_dim'] == pytest.approx(nats / (24 * 48) / math.log(2), rel=1e-5)
    assert set(result['codecs_bits_per_dim']) == {'png', 'webp_lossless', 'order0_entropy'}
    assert json.loads((workdir / f'evaluation_test_{parameters}.json').read_text()) == result
    text = evaluate.report(result)
    assert 'tiny gradients, test: 24 examples, 1,152 targets' in text
    assert f'{result["bits_per_dim"]:.4f} bits/dim' in text
    assert 'png' in text


def test_a_part_of_a_split_is_spread_over_it_and_the_codecs_see_the_same(tiny, workdir, monkeypatch):
    config = evaluate.saved_config.load(workdir)
    monkeypatch.setattr(evaluate.saved_config, 'load', lambda _: config)
    scored = []
    monkeypatch.setattr(evaluate.codecs, 'bits_per_dim', lambda images: scored.append(images) or {})
    monkeypatch.setattr(evaluate.atomic, 'write_text', lambda *_: None)
    for count in (None, 6):
        config.run.test_examples = count
        assert evaluate.evaluate(workdir)['examples'] == (count or 24)
    np.testing.assert_array_equal(scored[1], scored[0][[0, 5, 10, 15, 16, 21]])  # one of each four


def test_the_three_parameters_differ_and_are_those_of_the_training(workdir, trained_once):
    state = trained_once[1]
    latest, ema = (evaluate.load(workdir, name).variables['params'] for name in ('latest', 'ema'))
    jax.tree.map(np.testing.assert_array_equal, latest, state.params)
    jax.tree.map(np.testing.assert_array_equal, ema, state.ema)
    results = {name: evaluate.evaluate(workdir, 'validation', name) for name in evaluate.PARAMETERS}
    assert results['ema']['nats'] != results['latest']['nats']
    curve = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    validation = {line['step']: line['validation_loss_nats'] for line in curve if 'validation_loss_nats' in line}
    assert results['best']['step'] == min(validation, key=validation.get)


def test_any_number_of_devices_gives_the_same(workdir):
    eight = evaluate.evaluate(workdir)
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = evaluate.sharding.make_mesh
        patch.setattr(evaluate.sharding, 'make_mesh', lambda: make_mesh(devices=jax.devices()[:3]))
        three = evaluate.evaluate(workdir)
    assert three['examples'] == eight['examples'] == 24
    assert three['nats'] == pytest.approx(eight['nats'], rel=1e-6)


def test_mistakes_are_named(tiny, tmp_path):
    with pytest.raises(ValueError, match=r'has no config.json; give the --workdir of a training'):
        evaluate.evaluate(tmp_path)
    train.train(tiny.config(**{'optimizer.ema_decay': 0.0}), tmp_path, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=r'keeps no EMA .*choose latest or best'):
        evaluate.evaluate(tmp_path, parameters='ema')
    with pytest.raises(ValueError, match="unknown parameters 'last'; known: latest, best, ema"):
        evaluate.evaluate(tmp_path, parameters='last')
    with pytest.raises(ValueError, match="unknown split 'dev'; known: train, validation, test"):
        evaluate.evaluate(tmp_path, 'dev')
    for path in (tmp_path / 'checkpoints').iterdir():
        path.rename(tmp_path / f'{path.name}.away')
    with pytest.raises(ValueError, match='has no checkpoint yet'):
        evaluate.evaluate(tmp_path)


def test_command_answers_a_mistake_with_a_line_and_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'combiner.evaluate', f'--workdir={tmp_path}'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith('error: ')
    assert done.stderr.count('\n') == 1


def test_codecs_see_the_images_of_any_task(tiny):
    records = [{'pixels': np.full((4, 4, 3), 9 * index, np.uint8), 'key': index} for index in range(5)]
    given = {'source': lambda *_: records, 'transform': lambda record: {'tokens': np.int32(record['pixels']).ravel()}}
    config = tiny.config('tiny')
    found = evaluate._codecs(tiny.task('own', **given), 'test', config, None)
    assert found['codecs_images'] == 5
    assert found['codecs_bits_per_dim'] == evaluate.codecs.bits_per_dim(np.stack([each['pixels'] for each in records]))
    for other in ({'shape': (4, 12, 1)}, {'vocab_size': 16}, {'head': 'classify'}):  # grey, few colours, no such model
        assert not evaluate._codecs(tiny.task('other', **given | other), 'test', config, None)


def test_processes_that_would_evaluate_other_things_are_refused(workdir, monkeypatch):
    said = []

    def differ(text):
        said.append(text)
        return evaluate.agreement.Difference(1, text, 'step 3 on examples b/24', '')

    monkeypatch.setattr(evaluate.agreement, 'difference', differ)
    with pytest.raises(ValueError, match=r'0 has step \d+ on examples \w+/24, process 1 step 3 on examples b/24'):
        evaluate.evaluate(workdir)
    assert len(said) == 1


def test_a_number_of_examples_goes_to_a_file_of_its_own(workdir):
    evaluate.evaluate(workdir)
    whole = (workdir / 'evaluation_test_latest.json').read_bytes()
    result = evaluate.evaluate(workdir, examples=6)
    assert (result['examples'], result['of_examples']) == (6, 24)
    assert result['evaluated_on'] == json.loads(whole)['evaluated_on'].removesuffix('/24') + '/6 spread'
    assert 'test: 6 of 24 examples, spread over all, 288 targets' in evaluate.report(result)
    assert (workdir / 'evaluation_test_latest.json').read_bytes() == whole
    assert (workdir / 'evaluation_test_latest_6_examples.json').exists()
    with pytest.raises(ValueError, match='limit 0 leaves nothing to evaluate'):
        evaluate.evaluate(workdir, examples=0)


@pytest.fixture(scope='module')
def text_run(tmp_path_factory):
    """A tiny model of prose, of a small part of it, trained for two steps."""
    from combiner.data.text import corpora
    from configs import text

    texts = {'train': 40, 'validation': 4, 'test': 5}

    def documents(split, data_dir):
        return [
            {
                'text': f'{split} has document {i}. ' + 'one two three four five six. ' * (3 + 5 * i),
                'key': f'{split}{i}',
            }
            for i in range(texts[split])
        ]

    cache = tmp_path_factory.mktemp('data')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, 'CORPORA', {'prose': corpora.Corpus('prose', documents)})
        config = text.get_config('attention=full,length=32,layers=1,vocab_size=280,scale=quick')
        config.data.data_dir = str(cache)
        config.steps, config.model.width, config.data.batch_size = 2, 16, 8
        config.optimizer.warmup_steps = 1
        config.run.test_examples = None
        workdir = tmp_path_factory.mktemp('run')
        train.train(config, workdir)
        yield workdir


@pytest.mark.parametrize('split', evaluate.SPLITS)
def test_text_is_evaluated_on_the_stream_and_on_documents(text_run, split):
    result = evaluate.evaluate(text_run, split)
    documents, stream = (result['evaluations'][name] for name in ('documents', 'stream'))
    assert result['targets'] == documents['targets'] == stream['targets']
    assert result['nats'] == documents['nats'] != stream['nats']
    for each in (documents, stream):
        assert each['perplexity'] == pytest.approx(math.exp(each['nats'] / each['targets']))
    # Words and bytes are the same in both: their logarithms go as the nats.
    for figure in ('word_perplexity', 'bits_per_byte'):
        of = math.log if figure == 'word_perplexity' else float
        ratio = of(documents[figure]) / of(stream[figure])
        assert ratio == pytest.approx(documents['nats'] / stream['nats'], rel=1e-6)
    shown = evaluate.report(result)
    assert f'perplexity {documents["perplexity"]:.4f}, perplexity per word' in shown
    assert f'evaluation=stream: perplexity {stream["perplexity"]:.4f}, ' in shown
    assert 'of the stream of documents' in shown
    assert (
        json.loads((text_run / f'evaluation_{split}_latest.json').read_text())['evaluations'] == result['evaluations']
    )
    assert {'tokenizer', f'{split}_tokens', split} <= set(json.loads((text_run / 'data.json').read_text()))


def test_a_workdir_that_may_only_be_read(workdir, monkeypatch, tmp_path, absl_log):
    def read_only(path, text):
        raise OSError(errno.EROFS, 'Read-only file system')

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.atomic, 'write_text', read_only)
        assert evaluate.evaluate(workdir)['examples'] == 24
    assert r'evaluation_test_latest.json cannot be written (Read-only file system); ' in absl_log.text
    assert '--out names another file' in absl_log.text
    result = evaluate.evaluate(workdir, out=tmp_path / 'figures.json')
    assert json.loads((tmp_path / 'figures.json').read_text()) == result
