"""A reward and prompts of one's own from the command line: trained, gone on with, evaluated; what a file
names is never imported."""

import json, shutil
from pathlib import Path

import pytest

from drl_toolkit.cli.main import main
from drl_toolkit.recipes.custom import join_names, split_names, split_weights
from drl_toolkit.emoji.tiny import tiny_sd

SHORT = [
    '--num-steps',
    '3',
    '--train-steps',
    '2',
    '--frames',
    '0',
    '--samples',
    '8',
    '--num-minibatches',
    '1',
]
REWARD = '''
from pathlib import Path
Path(__file__).with_name('imported').touch()
def red(images, prompts): return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
'''


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A model, a reward's file, prompts, and a run of them; all given by relative paths."
    folder = tmp_path_factory.mktemp('world')
    tiny_sd().save_pretrained(folder / 'tiny')
    (folder / 'mine.py').write_text(REWARD)
    (folder / 'p.csv').write_text('prompt\na cat\na dog\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert (
            main(
                [
                    'train',
                    '--reward',
                    'mine.py:red=2',
                    '--reward',
                    'sharpness',
                    '--prompts',
                    'p.csv',
                    '--model',
                    'tiny',
                    '--epochs',
                    '1',
                    *SHORT,
                ]
            )
            == 0
        )
    return folder


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    "A copy of the run, far from where it was made."
    shutil.copytree(world / 'runs/red_sharpness', tmp_path / 'run')
    (world / 'imported').unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'run'


def error_of(argv, capsys):
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err.rpartition('epoch/s]')[2]
    assert error.strip().count('\n') == 0, error
    return error


def test_several_rewards_are_one_task_of_weighted_advantages(run, world):
    about, rows = (
        json.loads((run / 'config.json').read_text()),
        [json.loads(l) for l in (run / 'metrics.jsonl').read_text().splitlines()],
    )
    assert (
        about['recipe'] is None
        and about['model'] == str((world / 'tiny').resolve())
        and about['config']['reward'] == 'mine.py:red=2 sharpness'
    )
    assert {'reward', 'sharpness/reward', 'share/red', 'share/sharpness'} <= rows[0].keys()
    share = rows[0]['share/red'] / rows[0]['share/sharpness']
    assert share == pytest.approx(4, rel=1e-3)  # each of variance 1 in the batch, times its weight squared
    assert (run / 'prompts.csv').read_text() == 'prompt\na cat\na dog\n'


def test_a_resume_needs_the_reward_said_and_nothing_else(run, world, capsys):
    before = (run / 'metrics.jsonl').read_text()
    resume = ['train', '--out', str(run), '--resume', '--epochs', '2']
    error = error_of(resume, capsys)
    assert "'mine.py:red'" in error and '--reward mine.py:red' in error and not (world / 'imported').exists()
    assert 'reward must be' in error_of(
        [*resume, '--reward', f'{world}/mine.py:red', '--reward', 'clip_score'], capsys
    )
    assert (run / 'metrics.jsonl').read_text() == before
    assert (
        main(
            [
                *resume,
                '--reward',
                f'{world}/mine.py:red=2',
                '--reward',
                'sharpness',
                '--minutes',
                '9',
                '--micro-batch',
                '4',
                '--keep-best',
                'reward',
                '--watch',
                'colourfulness',
            ]
        )
        == 0
    )
    assert {json.loads(l)['epoch'] for l in (run / 'metrics.jsonl').read_text().splitlines()} == {0, 1} and (
        world / 'imported'
    ).exists()


@pytest.mark.parametrize('field', ['watch', 'reward'])
@pytest.mark.parametrize('name', ['{world}/mine.py:red', 'os:getcwd', 'antigravity:x'])
def test_no_file_names_code_that_is_run(field, name, run, world, capsys):
    "Out of a config.json that anybody may have written; on resume and on evaluation."
    about, name = json.loads((run / 'config.json').read_text()), name.format(world=world)
    about['config'] |= {'reward': 'sharpness', field: name}
    (run / 'config.json').write_text(json.dumps(about))
    commands = [['train', '--out', str(run), '--resume', '--epochs', '2']] + [
        ['eval', str(run), '--out', 'e']
    ] * (field == 'reward')
    for argv in commands:
        assert 'because a file says so' in error_of(argv, capsys)
    assert not (world / 'imported').exists() and not Path('e').exists()


def test_the_command_lines_own_file_is_taken(run, world, tmp_path, few_prompt_sets, capsys):
    "Not the one at the path in config.json, which has the same name."
    evil = tmp_path / 'evil'
    evil.mkdir()
    (evil / 'mine.py').write_text(REWARD)
    about = json.loads((run / 'config.json').read_text())
    about['config']['reward'] = f'{evil}/mine.py:red=2 sharpness'
    (run / 'config.json').write_text(json.dumps(about))
    assert (
        main(
            [
                'eval',
                str(run),
                '--out',
                str(tmp_path / 'e'),
                '--size',
                '.1',
                '--rewards',
                f'{world}/mine.py:red',
            ]
        )
        == 0
    )
    assert (world / 'imported').exists() and not (evil / 'imported').exists()


@pytest.mark.parametrize('emoji', [True, False])
def test_eval_by_the_runs_rewards_on_its_prompts(
    emoji, run, world, tmp_path, few_prompt_sets, monkeypatch, capsys
):
    if not emoji:
        monkeypatch.setattr('drl_toolkit.emoji.evaluation.speaks_emoji', lambda policy: False)
    assert (
        main(
            [
                'eval',
                str(run),
                '--out',
                str(tmp_path / 'e'),
                '--size',
                '.1',
                '--rewards',
                f'{world}/mine.py:red,colourfulness',
            ]
        )
        == 0
    )
    summary, table = (
        json.loads((tmp_path / 'e/summary.json').read_text()),
        (tmp_path / 'e/rewards.csv').read_text(),
    )
    assert {'red', 'sharpness'} <= (summary['rewards'] if emoji else summary).keys() and (
        'parity' in summary
    ) == emoji
    assert 'red,True' in table and 'sharpness,True' in table and 'colourfulness,False' in table


@pytest.mark.parametrize(
    'line, words',
    [
        ('1 / 0', 'raised ZeroDivisionError (two.py, line 2): division by zero'),
        ("{}['x']", "raised KeyError (two.py, line 2): 'x'"),
        ("int('a')", 'raised ValueError (two.py, line 2): invalid'),
    ],
)
def test_a_reward_that_raises_is_named(line, words, world, tmp_path, monkeypatch, capsys):
    "It is one of two; the line is that of its file, and nothing is left behind."
    (tmp_path / 'two.py').write_text(f'def wrong(images, prompts):\n    return {line}\n')
    monkeypatch.chdir(tmp_path)
    error = error_of(
        [
            'train',
            '--reward',
            'sharpness',
            '--reward',
            'two.py:wrong',
            '--prompts',
            f'{world}/p.csv',
            '--model',
            f'{world}/tiny',
            '--epochs',
            '1',
            '--out',
            'r',
            *SHORT,
        ],
        capsys,
    )
    assert (
        f"drl train: reward 'wrong' {words}" in error and 'Traceback' not in error and not Path('r').exists()
    )


def test_the_tax_of_runs_with_own_rewards(run, world, tmp_path, few_prompt_sets, capsys):
    "Several rewards are no specialist; of one, the command line says the file once more."
    about = json.loads((run / 'config.json').read_text())
    about['config']['reward'] = f'{world}/mine.py:red'
    (run / 'config.json').write_text(json.dumps(about))
    assert (
        'by --rewards' in error_of(['tax', str(run), '--out', 't'], capsys)
        and not (world / 'imported').exists()
        and not Path('t').exists()
    )
    assert (
        main(
            [
                'tax',
                str(run),
                '--out',
                str(tmp_path / 't'),
                '--size',
                '.1',
                '--rewards',
                f'{world}/mine.py:red',
            ]
        )
        == 0
    )
    told = json.loads((tmp_path / 't/tax.json').read_text())
    assert (
        (world / 'imported').exists()
        and [*told['scores']['base']] == [*told['specialists']]
        and told['specialists'] == {[*told['specialists']][0]: run.name}
    )


def test_patience_is_not_turned_on_in_a_run_without_the_best_weights():
    "It may be another number, but a checkpoint holds the best weights or it does not."
    from drl_toolkit.cli import main as cli
    from drl_toolkit.recipes.config import RunConfig

    class run:
        folder, about, config = (
            'runs/x',
            dict(recipe='clip', model=None),
            vars(RunConfig(watch='preference')).copy(),
        )

    resumed = lambda *more: cli._resumed_config(
        args := cli.parse(['train', 'clip', '--resume', *more]), run, cli._given(args)
    )
    assert resumed('--watch', 'preference')[0].patience == 0
    with pytest.raises(ValueError, match="patience must be 0, as in the run in 'runs/x'; got 3"):
        resumed('--patience', '3')


def test_a_damaged_config_says_so(run, capsys):
    (run / 'config.json').write_text('{"schema": 1, "conf')
    for argv in (
        ['train', '--out', str(run), '--resume'],
        ['train', 'clip', '--out', str(run)],
        ['eval', str(run), '--out', 'e'],
    ):
        error = error_of(argv, capsys)
        assert 'damaged' in error and 'go on with it' not in error


@pytest.mark.parametrize(
    'words, said',
    [
        (['--prompts', 'p.csv'], 'reward must be given'),
        (['--reward', 'sharpness'], 'prompts must be given'),
        (['--reward', 'beauty', '--prompts', 'p.csv'], "'beauty'"),
        (['--reward', 'none.py:x', '--prompts', 'p.csv'], 'none.py'),
        (['--reward', 'mine.py:blue', '--prompts', 'p.csv'], "'blue'"),
        (['--reward', 'sharpness=-1', '--prompts', 'p.csv'], 'weight'),
        (['--reward', 'sharpness=much', '--prompts', 'p.csv'], 'weight'),
        (['--reward', 'sharpness', '--reward', 'sharpness', '--prompts', 'p.csv'], 'twice'),
        (['--reward', 'sharpness', '--prompts', 'none.txt'], 'none.txt'),
        (['--reward', 'sharpness', '--prompts', 'p.csv', '--group-size', '-1'], 'group_size'),
        (['--reward', 'sharpness', '--prompts', 'p.csv', '--clip-range', '-1'], 'clip_range'),
        (
            ['--reward', 'sharpness', '--prompts', 'p.csv', '--clip-range', '.1', '--clip-high', 'inf'],
            'clip_high',
        ),
        (['--reward', 'sharpness', '--prompts', 'p.csv', '--watch', 'sharpness'], 'is trained'),
        (['--reward', 'sharpness', '--prompts', 'p.csv', '--trackers', 'paper'], 'paper'),
        (['--reward', 'sharpness', '--prompts', 'p.csv', '--model', 'nowhere/at-all/x'], 'nowhere'),
        (['clip', '--reward', 'sharpness'], 'recipe'),
        (['joint', '--group-size', '8'], 'tasks'),
        (['--reward', 'sharpness', '--prompts', 'p.csv', '--keep-best', 'watch/watched'], 'watch is empty'),
        (['--reward', 'sharpness', '--prompts', 'p.csv', '--device', 'abacus'], 'device'),
        (['--reward', 'sharpness', '--prompts', 'p.csv', '--method', 'magic'], 'magic'),
        (['--reward', 'shared_fairness', '--prompts', 'p.csv', '--group-size', '1'], 'group_size'),
        (['--reward', 'mine.py:broken', '--prompts', 'p.csv', *SHORT], 'broke'),
    ],
)
def test_what_is_refused_leaves_nothing_behind(words, said, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mine.py').write_text(
        'def red(images, prompts): return images.mean((1, 2, 3))\ndef broken(images, prompts): raise '
        'ValueError("it broke")\n'
    )
    shutil.copy(world / 'p.csv', tmp_path)
    model = [] if '--model' in words or words[0] in ('clip', 'joint') else ['--model', str(world / 'tiny')]
    assert said in error_of(['train', *words, *model, '--out', 'new/deep/run'], capsys)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != '__pycache__') == ['mine.py', 'p.csv']


def test_names_may_hold_blanks_commas_and_quotes():
    names = ['my rewards/a,b.py:red', 'clip_score', "it's.py:x"]
    assert split_names(join_names(names)) == names and split_names('a, b  c') == ['a', 'b', 'c']
    assert split_weights('a=.5 b') == {'a': 0.5, 'b': 1.0}
