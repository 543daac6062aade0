"""Every test has eight CPU devices; a test of a single device uses one of them."""

import gc
import logging
import os

import absl.logging
import jax
import jaxlib.version
import pytest

jax.config.update('jax_num_cpu_devices', 8)
# Each collection walks all that was traced and compiled, and finds little to free: together a tenth of the time.
gc.set_threshold(100_000, 50, 100)
# Nearly all the time of the tests is XLA's, most of it in its optimisations and in emitters that take three times as
# long as those they replaced; 0 in the environment keeps both. The commands that tests start inherit it.
quick = os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1') != '0'
jax.config.update('jax_disable_most_optimizations', quick)
# A process dies of a flag that its XLA does not know; from jaxlib 0.11 on there are only the new emitters. Cutting each
# program into parts that are compiled at once costs more than it gains where every core has a worker.
if quick:
    flags = ['--xla_cpu_parallel_codegen_split_count=1']
    flags += ['--xla_cpu_use_fusion_emitters=false'] if jaxlib.version.__version_info__ < (0, 11) else []
    os.environ.setdefault('XLA_FLAGS', ' '.join(flags))


@pytest.fixture(scope='session', autouse=True)
def _compile_each_program_once(tmp_path_factory):
    """Tests that train the same tiny model share its compiled step; gone with the session.

    So do the commands that tests start, in a folder of their own: one that is killed may leave half a program there, of
    which the next one warns before it compiles it, and warnings are errors here.
    """
    settings = {'persistent_cache_min_compile_time_secs': 0.3, 'persistent_cache_min_entry_size_bytes': -1}
    jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('compiled')))
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(tmp_path_factory.mktemp('compiled_by_commands'))
    for name, value in settings.items():
        jax.config.update(f'jax_{name}', value)
        os.environ[f'JAX_{name.upper()}'] = str(value)


@pytest.fixture
def absl_log(caplog):
    """What is logged through absl, which does not pass its records on to the root logger.

    Also after a command, in the same process, told absl to say less.
    """
    logger, verbosity = logging.getLogger('absl'), absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.INFO)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    absl.logging.set_verbosity(verbosity)


@pytest.fixture
def one_device():
    """A mesh of one device, though tests fake several: mechanisms are computed as on a machine that has one."""
    with jax.set_mesh(jax.make_mesh((1,), ('data',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])):
        yield


@pytest.fixture
def tiny(monkeypatch):
    """The module tests/tiny.py, its tasks in place of all others."""
    import tiny

    from combiner.data import tasks

    monkeypatch.setattr(tasks, 'TASKS', tiny.TASKS)
    return tiny


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """A run of the tiny config, trained to its end; its tasks stand in place of all others."""
    import tiny

    from combiner import train
    from combiner.data import tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, 'TASKS', tiny.TASKS)
        workdir = tmp_path_factory.mktemp('run')
        train.train(tiny.config(), workdir)
        yield workdir


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests of a file run in the same worker, where they share fixtures and compiled programs."""
    for item in items:
        if item.get_closest_marker('xdist_group') is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
