"""Every test sees eight CPU devices; what a single device should do, a test asks of one of them."""

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)


@pytest.fixture
def tiny(monkeypatch):
    """The module tests/tiny.py, its task registered."""
    import tiny

    from combiner.data import tasks

    monkeypatch.setitem(tasks.TASKS, 'tiny', tiny.TASK)
    return tiny
