import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from combiner import evaluate, sample, sharding, train


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    import tiny

    from combiner.data import tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, 'tiny', tiny.TASK)
        workdir = tmp_path_factory.mktemp('run')
        train.train(tiny.config(), workdir)
        yield workdir


@pytest.fixture(scope='module')
def trained(workdir):
    return evaluate.load(workdir, mesh=sharding.make_mesh(devices=jax.devices()[:1]))


PROMPTS = np.arange(40).reshape(2, 20) % 256


def test_the_most_likely_continuation_is_that_of_the_parallel_form(trained):
    completed = sample.complete(trained, PROMPTS, temperature=0.0)
    assert completed.shape == (2, 48)
    np.testing.assert_array_equal(completed[:, :20], PROMPTS)
    logits = jax.jit(trained.model.apply)(trained.variables, jnp.asarray(completed))
    chosen = jnp.take_along_axis(logits, jnp.asarray(completed)[..., None], axis=-1)[..., 0]
    assert (logits.max(-1) - chosen)[:, 20:].max() < 1e-4


def test_a_seed_is_a_sample(trained):
    one, same, other = (sample.complete(trained, PROMPTS, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one[:, 20:] != other[:, 20:]).any()


def test_an_empty_prompt(trained):
    assert sample.complete(trained, PROMPTS[:, :0]).shape == (2, 48)


def test_draws_follow_the_logits():
    logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    for temperature, expected in ((1.0, [0.1, 0.6, 0.3]), (0.5, np.array([0.01, 0.36, 0.09]) / 0.46)):
        tokens = jax.vmap(lambda key, t=temperature: sample.draw(key, logits, t)[0])(keys)
        assert abs(np.bincount(tokens, minlength=3) / 4000 - expected).max() < 0.03
    assert sample.draw(keys[0], logits, 0.0)[0] == 1


def test_the_picture(workdir):
    path = sample.sample(workdir, images=2, samples=2)
    assert path == workdir / 'samples.png'
    with Image.open(path) as picture:
        assert picture.width > 100


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'temperature': -1.0}, 'temperature -1.0 must be at least 0'),
        ({'temperature': float('nan')}, 'temperature nan must be at least 0'),
        ({'seed': 2**32}, 'seed 4294967296 does not lie in'),
        ({'images': 0}, 'images=0 and samples=3 must be at least 1'),
        ({'parameters': 'newest'}, "unknown parameters 'newest'; known: latest, best, ema"),
    ],
)
def test_wrong_arguments(workdir, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample.sample(workdir, **arguments)
