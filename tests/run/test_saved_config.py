import json

from combiner.run import saved_config


def test_a_run_from_before_remat_had_names_is_continued(tiny, tmp_path):
    for remat, name in ((True, 'full'), (False, 'none')):
        saved = tiny.config().to_dict()
        saved['model']['remat'] = remat
        (tmp_path / 'config.json').write_text(json.dumps(saved))
        assert saved_config.load(tmp_path).model.remat == name
        assert saved_config.differences(tmp_path, tiny.config(**{'model.remat': name})) == []


def test_a_run_may_name_its_origin_by_a_relative_path(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(tiny.config(init_from='runs/one').to_dict()))
    assert saved_config.differences(tmp_path, tiny.config(init_from=str(tmp_path / 'runs/one'))) == []
    for other in ('runs/two', None):
        assert len(saved_config.differences(tmp_path, tiny.config(init_from=other))) == 1
