import io

import numpy as np
import pytest
from PIL import Image

from combiner import build
from combiner.data import records
from combiner.data.lra import generated, listops, pathfinder
from experiments.harness import run


def picture(seed: int = 0) -> pathfinder.Picture:
    return pathfinder.generate(np.random.default_rng(seed), pathfinder.parameters(32, 'easy'))


def test_names_and_counts():
    assert len(generated.NAMES) == 16
    assert {'lra_listops', 'lra_pathfinder32_intermediate', 'lra_pathfinder128_hard'} <= set(generated.NAMES)
    for name in generated.NAMES:
        expected = (96_000, 2_000, 2_000) if name in generated.LISTOPS else (160_000, 20_000, 20_000)
        assert tuple(generated.recipe(name).counts.values()) == expected
        assert generated.recipe(name).name == name
    assert generated.recipe('lra_listops', 3000).counts == {'train': 3000, 'validation': 2000, 'test': 2000}
    assert generated.recipe('lra_pathfinder256_hard').parameters['size'] == 256
    assert generated.recipe('lra_pathfinder256_hard').parameters['contour_length'] == 14


@pytest.mark.parametrize('name', generated.NAMES)
def test_the_next_command_trains_on_the_set(name, monkeypatch):
    opened = []
    monkeypatch.setattr(generated, 'open_split', lambda name, split, data_dir: opened.append(name) or [])
    task = build.task(run.parse_config(['--config', generated.config(name)]))
    task.source('train', 'data')
    assert opened == [name]


@pytest.mark.parametrize('name', generated.LISTOPS)
def test_listops_is_written_and_read(tmp_path, name):
    records.write(generated.folder(name, tmp_path), generated.recipe(name, 20), seed=3)
    sources = set()
    for split in ('train', 'validation', 'test'):
        source = generated.open_split(name, split, tmp_path)
        assert len(source) == 20
        for index, record in enumerate(source):
            assert record.keys() == {'source', 'label', 'key'}
            assert record['key'] == f'{name}/{split}/{index}'
            tokens = listops.tokenize(record['source'], record['key']).tolist()
            assert listops.evaluate(tokens) == record['label']
            assert len(tokens) in generated.LISTOPS[name]
            sources.add(record['source'])
    assert len(sources) == 60


def test_pathfinder_is_written_and_read(tmp_path):
    name = 'lra_pathfinder32_easy'
    settings = pathfinder.parameters(32, 'easy')
    records.write(generated.folder(name, tmp_path), generated.recipe(name, 12), seed=3)
    for split, start in (('train', 0), ('validation', 160_000), ('test', 180_000)):
        source = generated.open_split(name, split, tmp_path)
        assert len(source) == 12
        for index, record in enumerate(source):
            drawn = pathfinder.generate(np.random.default_rng([3, 32, 6, start + index]), settings)
            np.testing.assert_array_equal(record['image'], drawn.image)
            assert (record['label'], record['key']) == (drawn.label, f'{name}/{split}/{index}')


def test_with_a_limit_images_are_the_first_ones():
    few, more = (generated.recipe('lra_pathfinder64_hard', limit) for limit in (2, 5))
    for split, numbers in few.arrange(0, few.counts, map).items():
        np.testing.assert_array_equal(numbers, more.arrange(0, more.counts, map)[split][:2])


def test_sets_share_no_random_numbers():
    easy, hard = (generated.recipe(f'lra_pathfinder32_{name}') for name in ('easy', 'hard'))
    labels = [[recipe.decode(recipe.encode(0, number))['label'] for number in range(40)] for recipe in (easy, hard)]
    assert labels[0] != labels[1]


def test_a_record_of_pathfinder_is_a_png_that_anyone_can_read():
    drawn = picture()
    with Image.open(io.BytesIO(generated.write_png(drawn))) as file:
        assert (file.format, file.mode, file.size) == ('PNG', 'L', (32, 32))
        assert file.info['label'] == str(drawn.label)
        np.testing.assert_array_equal(np.asarray(file), drawn.image)


def test_what_is_no_such_png():
    whole = generated.write_png(picture())
    file = io.BytesIO()
    Image.fromarray(picture().image).save(file, 'PNG')
    for record in (b'', b'no image', whole[:100], file.getvalue()):
        with pytest.raises(ValueError, match='PNG'):
            generated.read_png(record)


@pytest.mark.parametrize('name', ['lra_text', 'lra_pathfinder16_hard', 'lra_pathfinder32_medium'])
def test_unknown_names(name):
    with pytest.raises(
        ValueError,
        match=f"unknown generated set '{name}'; known: lra_listops, lra_listops_short, lra_pathfinder12_easy",
    ):
        generated.recipe(name)


def test_a_limit_that_leaves_nothing():
    with pytest.raises(ValueError, match='limit 0 gives no records'):
        generated.recipe('lra_listops', 0)


def test_a_set_that_was_not_generated(tmp_path):
    command = f'python -m combiner.data.generate lra_pathfinder32_hard --data_dir {tmp_path}'
    with pytest.raises(FileNotFoundError, match=command):
        generated.open_split('lra_pathfinder32_hard', 'train', tmp_path)
