"`drl compare` on hand-made runs and on two real, very short ones."

import json, re
from pathlib import Path

import pandas as pd, pytest

from drl_toolkit.recipes import compare as C

from drl_toolkit.ui import plots
from drl_toolkit.cli.main import main, parse
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.prompts.task import Task
from drl_toolkit.recipes.recipes import fairness_task, load_recipe, make_trainer
from drl_toolkit.recipes.methods import METHODS
from drl_toolkit.recipes.config import RunConfig
from drl_toolkit.rewards.reward import reward
from drl_toolkit.runs.run import Run
from drl_toolkit.runs.folder import RunError
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.scoring import METRICS
from drl_toolkit.training.diagnostics import Diagnostics
from drl_toolkit.recipes.custom import watch_of


def made(folder, rewards, epochs=None):
    "A run of the recipe clip with these mean rewards, and no weights."
    with Run.create(folder, RunConfig(epochs=epochs or len(rewards)), 'clip') as run:
        for i, r in enumerate(rewards):
            run.log(dict(epoch=i, tasks=dict(clip=dict(reward=r)), seconds=2.0, cpu_seconds=1.0, nfe=100))
    return run


def test_curves_say_what_was_spent_before_each_epoch(tmp_path):
    made(tmp_path / 'ppo-0', [0.1, 0.2, 0.3])
    made(tmp_path / 'raft-1', [0.5])
    rows = C.read_runs(tmp_path, ['ppo', 'raft', 'draft'], 2)
    mine = rows[rows['method'] == 'ppo']
    assert (
        mine['reward'].tolist() == [0.1, 0.2, 0.3]
        and mine['nfe'].tolist() == [0, 100, 200]
        and mine['seconds'].tolist() == [0, 2, 4]
    )
    assert (
        mine['images'].tolist() == [0, 64, 128] == [load_recipe('clip')[0][0].samples * i for i in range(3)]
    )
    assert set(zip(rows['method'], rows['seed'])) == {('ppo', 0), ('raft', 1)}


def test_a_run_without_weights_or_with_fewer_epochs_is_not_whole(tmp_path):
    made(tmp_path / 'a', [0.1, 0.2])
    assert not C.is_whole(tmp_path / 'a') and not C.is_whole(tmp_path / 'none')
    (tmp_path / 'a' / 'weights').mkdir()
    assert C.is_whole(tmp_path / 'a')
    made(tmp_path / 'b', [0.1], epochs=2)
    (tmp_path / 'b' / 'weights').mkdir()
    assert not C.is_whole(tmp_path / 'b')


def test_judge_groups_by_prompt():
    seen = []

    @reward
    def spy(images, prompts):
        seen.append(prompts)
        return images.mean((1, 2, 3))

    found = C.judge(Policy(tiny_sd(), num_steps=2), spy, ['a cat', 'a dog'], each=3)
    assert (
        seen == [['a cat'] * 3 + ['a dog'] * 3] and 1 <= found['vendi'] <= 3 and 0 <= found['distance'] <= 2
    )


def test_the_figure_shows_mean_and_extremes():
    rows = pd.DataFrame(
        [
            dict(method=m, seed=s, epoch=e, reward=s + e, images=e, nfe=e, cpu_seconds=e)
            for m in 'ab'
            for s in range(3)
            for e in range(4)
        ]
    )
    figure = plots.method_curves(rows)
    line, band = figure.axes[0].lines[0], figure.axes[0].collections[0].get_paths()[0].vertices
    assert (
        line.get_ydata().tolist() == [1, 2, 3, 4]
        and band[:, 1].min() == 0
        and band[:, 1].max() == 5
        and len(figure.axes) == 3
    )


def test_two_short_runs_and_what_goes_wrong(tmp_path, capsys):
    tiny_sd().save_pretrained(tmp_path / 'tiny')
    options = [
        '--model',
        str(tmp_path / 'tiny'),
        '--epochs',
        '1',
        '--num-steps',
        '2',
        '--train-steps',
        '1',
        '--num-minibatches',
        '1',
    ]
    assert C.train_all('clip', ['ppo', 'draft'], 1, tmp_path, options, jobs=1) == []
    assert all(C.is_whole(C.run_folder(tmp_path, m, 0)) for m in ('ppo', 'draft'))
    before = (tmp_path / 'ppo-0' / 'metrics.jsonl').read_bytes()
    assert (
        C.train_all('clip', ['ppo'], 1, tmp_path, options) == []
        and (tmp_path / 'ppo-0' / 'metrics.jsonl').read_bytes() == before
    )
    ((method, seed, told),) = C.train_all('compressibility', ['draft'], 1, tmp_path / 'other', options)
    assert (method, seed) == ('draft', 0) and 'has no gradient' in told
    for other, words in (
        (['--lr', '.5'], 'lr must be'),
        (['--epochs', '0'], 'epochs must be'),
        (['--eta', '.5'], 'eta must be'),
        (['--model', 'demo'], 'model must be'),
    ):
        with pytest.raises(RunError, match=words) as e:
            C.train_all('clip', ['ppo'], 1, tmp_path, options + other)
        assert str(tmp_path / 'ppo-0') in str(e.value) and '\n' not in str(e.value)
    assert (
        C.train_all('clip', ['ppo'], 1, tmp_path, options + ['--lr', str(load_recipe('clip')[1].lr)]) == []
    )  # said, but not changed
    assert (
        C.train_all('clip', ['ppo'], 1, tmp_path, options + ['--epochs', '2']) == []
        and len(C.epochs_of(Run.open(tmp_path / 'ppo-0'))) == 2
    )
    judged = C.judge_run(tmp_path / 'draft-0', load_recipe('clip')[0][0])
    note = tmp_path / 'draft-0/judged.json'
    note.write_text(json.dumps(json.loads(note.read_text()) | dict(reward=-9.0)))
    assert C.judge_run(tmp_path / 'draft-0', load_recipe('clip')[0][0])['reward'] == -9.0  # remembered …
    note.write_text(json.dumps(json.loads(note.read_text()) | dict(weights='others')))
    assert C.judge_run(tmp_path / 'draft-0', load_recipe('clip')[0][0]) == judged  # … of these weights
    table = C.verdicts(tmp_path, ['ppo', 'draft'], 1, load_recipe('clip')[0][0])
    assert set(table.index) == {'ppo', 'draft'} and json.loads(
        (tmp_path / 'ppo-0' / 'judged.json').read_text()
    )['reward'] == pytest.approx(table.loc['ppo', 'reward'])
    assert parse(['compare', 'clip', '--methods', 'ppo', '--out', 'x', '--', '--epochs', '3']).options == [
        '--epochs',
        '3',
    ]
    for argv, word in (
        (['clip', '--methods', 'fame'], "got 'fame'"),
        (['beauty', '--methods', 'ppo'], "got 'beauty'"),
        (['clip', '--methods', 'ppo', '--seeds', '0'], 'seeds must be 1 or more; got 0'),
        (['clip', '--methods', ','], "got ','"),
    ):
        assert main(['compare', *argv, '--out', str(tmp_path / 'x')]) == 2
        assert word in capsys.readouterr().err


ROOT = Path(__file__).parents[2]


def test_every_method_has_a_recorded_run_that_raised_its_reward():
    "On the emoji world, with the CLIP score; fresh samples after training against the base's."
    records = [
        json.loads((ROOT / 'assets/experiments' / f'compare_{name}.json').read_text())
        for name in ('clip', 'clip_more', 'clip_later')
    ]
    found = {row['method']: row['reward'] for record in records for row in record['verdicts']}
    assert set(METHODS) <= set(found) and all(found[m] > found['base'] for m in METHODS)


def chapter():
    return ''.join(
        ''.join(c['source']) + '\n'
        for c in json.loads((ROOT / 'nbs/recipes/03_compare.ipynb').read_text())['cells']
        if c['cell_type'] == 'markdown'
    )


def test_every_method_has_its_line_in_the_chapter():
    assert re.findall(
        r'^\| `(\w+)` \|', chapter().split('## Method by method')[1].split('What is not a method')[0], re.M
    ) == list(METHODS)


def test_every_figure_of_a_run_is_explained():
    """What several tasks, two rewards, a KL penalty, the data loss, a watch and half precision leave in the record
    stands in the chapter's list."""
    bright, warm = (
        reward(lambda images, prompts: images.mean((1, 2, 3)), name='bright'),
        reward(lambda images, prompts: images[:, 0].mean((1, 2)), name='warm'),
    )
    config = RunConfig(
        epochs=1,
        num_steps=4,
        train_steps=1,
        num_minibatches=1,
        measure_every=1,
        kl_weight=0.1,
        data_weight=0.1,
        data_batch=4,
        precision='bf16',
        watch='clip_score',
        watch_every=1,
    )
    trainer = make_trainer(
        config,
        [
            fairness_task(16),
            Task('both', ['a cat'], [bright, warm], group_size=4, samples=8),
            Task('one', ['a dog'], bright, samples=8),
        ],
        tiny_sd(),
        callbacks=[Diagnostics()],
    )
    trainer.callbacks += watch_of(config, trainer)
    (record,) = trainer.fit()
    keys = {
        re.sub(r'^(cosine|watch|drift|share)/.*', r'\1/NAME', k.removeprefix('warm/'))
        for row in (record, *record['tasks'].values())
        for k in row
    } - {'epoch', 'tasks'}
    explained = set(re.findall(r'`([\w/]+)`', chapter().split('## What the figures of a run mean')[1]))
    assert keys - {
        'parity',
        'parity_square',
        'parity_floor',
        'readable',
        'warm/reward',
        'NAME',
    } <= METRICS | {k for k in keys if '/' in k}  # no reward's figure may have such a name
    assert (
        keys <= explained
        and {
            'parity',
            'kl',
            'approx_kl',
            'data_loss',
            'cosine/NAME',
            'watch/NAME',
            'share/NAME',
            'effective_group',
            'ratio_error',
        }
        <= keys
    )
