"""What a config builds, and what is refused with the way out."""

import jax
import pytest

from combiner import build, sharding


@pytest.mark.parametrize('accumulation', [1, 2])
def test_a_batch_for_fewer_devices_is_refused_with_ways_that_work(tiny, accumulation):
    config, mesh = tiny.config(), sharding.make_mesh()
    config.data.batch_size, config.optimizer.accumulation = 2, accumulation
    larger = 8 * accumulation
    with pytest.raises(ValueError, match=rf'=2 must be a multiple of 8 \(.*: give .*batch_size={larger},') as refused:
        build.check_numbers(config, mesh)
    for way in ('--config.mesh.model=N', '--config.mesh.context=N', 'CUDA_VISIBLE_DEVICES=0', 'JAX_PLATFORMS=cpu'):
        assert way in str(refused.value)
    for fewer in ({'model': 8}, {'context': 8}, {'devices': jax.devices()[:1]}):
        build.check_numbers(config, sharding.make_mesh(**fewer))
    config.data.batch_size = larger
    build.check_numbers(config, mesh)


def test_a_batch_of_too_many_parts_on_one_device_is_told_nothing_of_devices(tiny):
    config = tiny.config()
    config.data.batch_size, config.optimizer.accumulation = 6, 4
    with pytest.raises(ValueError, match=r'must be a multiple of 1 .*--config.data.batch_size=8$'):
        build.check_numbers(config, sharding.make_mesh(devices=jax.devices()[:1]))
