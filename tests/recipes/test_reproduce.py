"`drl reproduce`: what has a record is not made again, and what is made again is the same."

import gzip, json

import pytest

from drl_toolkit.recipes import experiments as E, reproduce as R
from drl_toolkit.recipes.experiments import Arm, Experiment
from drl_toolkit.recipes.recipes import load_recipe

SMALL = ('--epochs', '1', '--samples', '8', '--train-steps', '1')


@pytest.fixture
def small(monkeypatch):
    arms = Arm('ppo', 'clip', SMALL), Arm('broken', 'clip', ('--lr', '-1'))
    experiment = Experiment('small', 'Does it run?', arms, seeds=1, judged_by='task')
    monkeypatch.setitem(E.EXPERIMENTS, 'small', experiment)
    monkeypatch.setattr(R, 'EACH', 2)


def test_records_are_made_once_and_again_the_same(small, tmp_path):
    records, runs = tmp_path / 'records', tmp_path / 'runs'
    failed = R.reproduce('small', records=records, runs=runs)
    assert len(failed) == 1 and failed[0].startswith('broken, seed 0: ') and 'lr must be' in failed[0]
    file = R.record_file(records, 'small', 'ppo', 0)
    first, base = (json.loads(gzip.decompress(f.read_bytes())) for f in (file, records / 'small/base.json.gz'))
    assert first['command'] == 'drl train clip ' + ' '.join(SMALL) + ' --seed 0 --frames 0'
    assert first['epochs'] == 1 and len(first['curves']['clip: reward']) == 1
    read = first['judged']['task/train'], base['judged']['task/train']
    assert all(len(values['reward']) == 32 for values in read)  # sixteen prompts, two images of each
    assert read[0] != read[1]
    stamp = file.stat().st_mtime_ns
    assert R.reproduce('small', arms=['ppo'], records=records, runs=runs) == []
    assert file.stat().st_mtime_ns == stamp
    file.unlink()  # judged anew, from the same run
    assert R.reproduce('small', arms=['ppo'], records=records, runs=runs) == []
    assert R.read_record(file)['judged'] == first['judged']
    assert {arm: len(found) for arm, found in R.read_records('small', records).items()} == dict(base=1, ppo=1)


def test_a_record_is_whole_and_the_same_bytes_again(tmp_path):
    file, record = R.record_file(tmp_path, 'small', 'ppo', 3), dict(arm='ppo', judged=dict(é=[0.5, 1]))
    R.write_record(file, record)
    packed = file.read_bytes()
    assert file.name == 'ppo-3.json.gz' and json.loads(gzip.decompress(packed)) == R.read_record(file) == record
    R.write_record(file, record)
    assert file.read_bytes() == packed


@pytest.mark.parametrize(
    'damage, message',
    (
        (lambda packed: packed[:-9], 'is no record: it is cut off'),
        (lambda packed: b'{"arm": "ppo"}', 'is no record: .*header'),
        (lambda packed: gzip.compress(b'{"arm": '), 'is no JSON'),
        (lambda packed: gzip.compress(bytes(R.LARGEST + 1)), 'longer than 16777216 bytes'),
    ),
)
def test_what_is_no_record_is_told(damage, message, tmp_path):
    file = R.record_file(tmp_path, 'small', 'ppo', 0)
    R.write_record(file, dict(arm='ppo'))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        R.read_record(file)


def test_every_experiment_is_of_recipes_and_options_that_there_are():
    from drl_toolkit.cli.main import parse

    for experiment in E.EXPERIMENTS.values():
        assert experiment.name and len({arm.name for arm in experiment.arms}) == len(experiment.arms)
        for arm in experiment.arms:
            asked = parse(R.train_words(arm, 0))
            assert asked.recipe == arm.recipe
            # the base that an arm is judged against is drawn as the arm is
            scale = vars(asked).get('guidance_scale', load_recipe(arm.recipe).config.guidance_scale)
            assert (asked.model or 'demo', scale) == (experiment.model, experiment.guidance_scale)


def test_names_that_there_are_not_are_told():
    with pytest.raises(ValueError, match='experiment must be one of headline, .*; got .beauty.'):
        R.find_experiment('beauty')
    with pytest.raises(ValueError, match="arms must be of ppo, .*b2, .*; got 'x'"):
        R.chosen_arms(E.EXPERIMENTS['b2'], ['x'])
