import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from combiner import build, evaluate, models, sample, sharding, train
from combiner.data import pretraining, recall, tasks


@pytest.fixture(scope='module')
def trained(workdir):
    return evaluate.load(workdir, mesh=sharding.make_mesh(devices=jax.devices()[:1]))


def complete(trained, prompts, **options):
    return sample.complete(trained.model, trained.variables, prompts, trained.task.length, **options)


def test_the_usage_has_every_option():
    source = Path(sample.__file__).read_text(encoding='utf-8')
    options = re.findall(r"flags\.DEFINE_\w+\('(\w+)'", source)
    assert len(options) > 10
    assert [option for option in options if f'--{option}' not in sample.__doc__] == []


PROMPTS = np.arange(40).reshape(2, 20) % 256


def test_the_most_likely_continuation_is_that_of_the_parallel_form(trained):
    completed = complete(trained, PROMPTS, temperature=0.0)
    assert completed.shape == (2, 48)
    np.testing.assert_array_equal(completed[:, :20], PROMPTS)
    logits = jax.jit(trained.model.apply)(trained.variables, jnp.asarray(completed))
    chosen = jnp.take_along_axis(logits, jnp.asarray(completed)[..., None], axis=-1)[..., 0]
    assert (logits.max(-1) - chosen)[:, 20:].max() < 1e-4


def test_a_seed_is_a_sample(trained):
    one, same, other = (complete(trained, PROMPTS, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one[:, 20:] != other[:, 20:]).any()


def test_an_empty_prompt(trained):
    assert complete(trained, PROMPTS[:, :0]).shape == (2, 48)


def test_equal_calls_are_compiled_once(trained):
    sample._programs.cache_clear()
    for seed in (3, 4):
        complete(trained, PROMPTS, seed=seed)
    programs = sample._programs(trained.model, trained.task.length, 1.0, None, 1.0)
    assert sample._programs.cache_info().misses == 1
    assert [program._cache_size() for program in programs] == [1, 1]


@pytest.mark.parametrize('name', ['combiner_axial_rowmajor', 'combiner_logsparse'])
def test_a_token_copies_no_cache_of_a_scanned_stack(name):
    temporary = []
    for length in (128, 512):
        backbone = {'attention': {'name': name}, 'layers': 2, 'width': 16, 'heads': 2}
        model = models.build('language_model', 32, (length,), backbone)
        variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
        start, advance = sample._programs(model, length, 0.0, None, 1.0)
        given = (jax.random.key(0), 5, 9)
        unrolled, state = jax.eval_shape(start, variables, jnp.zeros((2, 4), jnp.int32), given[0])
        compiled = advance.lower(unrolled, state, *given).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[1] < 2.2 * temporary[0]  # O(√l)


def test_draws_follow_the_logits():
    logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    for temperature, expected in ((1.0, [0.1, 0.6, 0.3]), (0.5, np.array([0.01, 0.36, 0.09]) / 0.46)):
        tokens = jax.vmap(lambda key, t=temperature: sample.sample_token(key, logits, t)[0])(keys)
        assert abs(np.bincount(tokens, minlength=3) / 4000 - expected).max() < 0.03
    assert sample.sample_token(keys[0], logits, 0.0)[0] == 1


def stay(logits, top_k, top_p):
    """Which tokens can be drawn, said plainly: token by token, from the most likely on."""
    kept = np.zeros(len(logits), bool)
    candidates = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:top_k]
    weights = np.exp(logits[candidates].astype(np.float64))
    total = 0.0
    for token, weight in zip(candidates, weights / weights.sum(), strict=True):
        kept[token] = True
        total += weight
        if total >= top_p:
            break
    return kept


@pytest.mark.parametrize('top_p', [1.0, 0.9, 0.5, 1e-6])
@pytest.mark.parametrize('top_k', [None, 1, 2, 5, 17, 100])
def test_unlikely_tokens_go(top_k, top_p):
    logits = np.random.default_rng(0).normal(scale=2, size=(40, 17)).astype(np.float32)
    logits[:5, 3] = logits[:5, 8]  # a tie
    narrowed = np.asarray(sample.filter_logits(jnp.asarray(logits), top_k, top_p))
    expected = np.stack([stay(row, top_k, top_p) for row in logits])
    np.testing.assert_array_equal(narrowed, np.where(expected, logits, -np.inf))


def test_equally_likely_tokens_do_not_all_stay():
    narrowed = sample.filter_logits(jnp.zeros((1, 8)), 3, 1.0)
    np.testing.assert_array_equal(np.isfinite(narrowed[0]), np.arange(8) < 3)


def test_the_nucleus_is_that_of_the_temperature():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    keys = jax.random.split(jax.random.key(0), 500)
    for temperature, expected in ((1.0, {0, 1}), (0.1, {0}), (10.0, {0, 1, 2})):
        tokens = jax.vmap(lambda key, t=temperature: sample.sample_token(key, logits, t, top_p=0.7)[0])(keys)
        assert set(tokens.tolist()) == expected


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('narrowed', [{}, {'top_k': 3}, {'top_p': 0.9}, {'top_k': 3, 'top_p': 0.9}])
def test_near_temperature_zero_is_the_most_likely_token(narrowed, dtype):
    """Also where the logits overflow when divided, and where the temperature is no normal number."""
    logits = jnp.asarray(np.random.default_rng(0).normal(scale=100, size=(64, 17)), dtype)
    logits = logits.at[0].set(0).at[0, 5].set(0.125)  # close together
    for temperature in (0.0, 5e-324, 1e-320, 1e-46, 1e-40, 1e-38, 1e-37, 1e-30, 1e-8):
        drawn = sample.sample_token(jax.random.key(1), logits, temperature, **narrowed)
        np.testing.assert_array_equal(drawn, logits.argmax(axis=-1), f'temperature {temperature}')


def test_at_a_great_temperature_all_candidates_are_equally_likely():
    logits = jnp.array([[-50.0, 3.0, 80.0, 2.0, 100.0]])
    keys = jax.random.split(jax.random.key(0), 1000)
    for temperature in (1e30, 1e38, 1e39, 1e300):
        for narrowed, expected in (({}, {0, 1, 2, 3, 4}), ({'top_k': 2}, {2, 4}), ({'top_p': 0.59}, {1, 2, 4})):
            tokens = jax.vmap(lambda key, n=narrowed, t=temperature: sample.sample_token(key, logits, t, **n)[0])(keys)
            counts = np.bincount(tokens, minlength=5)
            assert set(np.flatnonzero(counts).tolist()) == expected
            assert abs(counts[sorted(expected)] / 1000 - 1 / len(expected)).max() < 0.06


def test_one_candidate_is_the_most_likely_token(trained):
    expected = complete(trained, PROMPTS, temperature=0.0)
    for chosen in ({'top_k': 1}, {'top_p': 1e-6}, {'top_k': 3, 'top_p': 1e-6}):
        np.testing.assert_array_equal(complete(trained, PROMPTS, seed=5, **chosen), expected)


def test_no_limit_changes_nothing(trained):
    expected = complete(trained, PROMPTS, seed=5)
    np.testing.assert_array_equal(complete(trained, PROMPTS, seed=5, top_k=256), expected)


def test_the_picture(workdir):
    path = sample.sample(workdir, examples=2, samples=2)
    assert path == workdir / 'samples.png'
    with Image.open(path) as picture:
        assert picture.width > 100


def test_text_is_written_as_text(workdir, tiny, monkeypatch):
    text = dataclasses.replace(tiny.TASK, show=lambda tokens, data_dir: ' '.join(map(str, tokens)))
    monkeypatch.setitem(tasks.TASKS, 'tiny', lambda: text)
    path = sample.sample(workdir, examples=2, samples=2)
    assert path == workdir / 'samples.txt'
    blocks = re.split('\n?(?:===|---) (.*)\n', path.read_text())[1:]
    assert blocks[::2] == [
        title for number in (0, 1) for title in (f'example {number}, given', 'sample 0', 'sample 1', 'original')
    ]
    first = tiny.TASK.transform(tiny.Images('test')[0])['tokens']
    assert blocks[1].split() == [str(token) for token in first[:24]]
    assert blocks[7].split() == [str(token) for token in first[24:]]
    assert len(blocks[3].split()) == len(blocks[5].split()) == 24
    assert blocks[3] != blocks[5]


@pytest.mark.parametrize('name', ['recall', 'causal'])
def test_sequences_that_are_neither_text_nor_images_are_written_as_numbers(name, tiny, tmp_path, monkeypatch):
    sequences = dataclasses.replace(
        tiny.TASKS['tiny_classes'](),
        shape=(64,),
        transform=lambda record: {'tokens': np.arange(64, dtype=np.int32), 'valid': np.ones(64, bool)},
    )
    causal = pretraining.pretraining(sequences, 'causal', padding=False)
    monkeypatch.setattr(tasks, 'TASKS', {'recall': lambda: recall.recall(length=64, pairs=4), 'causal': lambda: causal})
    config = tiny.config(name, **{'model.layers': 1})
    config.model.attention = tiny.common.attention('combiner_fixed')
    task, mesh = build.task(config), sharding.make_mesh(devices=jax.devices()[:1])
    model = build.model(config, task)
    variables = model.init(jax.random.key(0), build.blank_tokens(task, mesh))
    untrained = evaluate.Trained(config, task, model, mesh, 0, nn.meta.unbox(variables))
    monkeypatch.setattr(evaluate, 'load', lambda *_: untrained)
    path = sample.sample(tmp_path, examples=2, other_data=True)
    numbers = re.findall('=== example 0, given\n(.*)\n', path.read_text())[0].split()
    assert path.suffix == '.txt'
    assert [0 <= int(number) < task.vocab_size for number in numbers] == 32 * [True]


def test_only_examples_that_are_long_enough_are_completed(tiny):
    def transform(record):
        example = tiny.TASK.transform(record)
        return example | {'valid': np.arange(48) < (48 if record['key'] in ('test/5', 'test/20') else 10)}

    def short(record):
        return tiny.TASK.transform(record) | {'valid': np.zeros(49, bool)}

    task = dataclasses.replace(tiny.TASK, transform=transform)
    tokens = sample.tokens_to_complete(task, None, 4, 24)
    expected = [tiny.TASK.transform(tiny.Images('test')[index])['tokens'] for index in (5, 20)]
    np.testing.assert_array_equal(tokens, expected)
    with pytest.raises(ValueError, match='no test example of tiny has 49 tokens to continue'):
        sample.tokens_to_complete(dataclasses.replace(task, transform=short), None, 4, 49)


def test_only_language_models_are_sampled_from(tiny, tmp_path):
    config = tiny.config('tiny_classes', steps=2, **{'optimizer.warmup_steps': 0})
    train.train(config, tmp_path, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match='tiny_classes has a classifier; only language models can be sampled from'):
        sample.sample(tmp_path)
    with pytest.raises(ValueError, match='a Classifier cannot continue sequences; give a LanguageModel'):
        complete(evaluate.load(tmp_path), PROMPTS)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'temperature': -1.0}, 'temperature -1.0 must be at least 0'),
        ({'temperature': float('nan')}, 'temperature nan must be at least 0'),
        ({'temperature': float('inf')}, 'temperature inf must be at least 0 and finite'),
        ({'temperature': float('-inf')}, 'temperature -inf must be at least 0 and finite'),
        ({'seed': 2**32}, 'seed 4294967296 does not lie in'),
        ({'top_k': 0}, 'top_k 0 must be at least 1; leave it unset to sample from all tokens'),
        ({'top_p': 0.0}, r'top_p 0.0 must be above 0 and at most 1 \(1: sample from all tokens\)'),
        ({'top_p': 1.5}, 'top_p 1.5 must be above 0'),
        ({'top_p': float('nan')}, 'top_p nan must be above 0'),
        ({'seed': -1}, 'seed -1 does not lie in'),
        ({'examples': 0}, 'examples=0 and samples=3 must be at least 1'),
        ({'parameters': 'newest'}, "unknown parameters 'newest'; known: latest, best, ema"),
    ],
)
def test_wrong_arguments(workdir, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample.sample(workdir, **arguments)
