"The command as a user calls it."

import json, os, subprocess, sys, time
from pathlib import Path

import pytest, torch
from PIL import Image

from drl_toolkit.cli.main import main
from drl_toolkit.rewards.reward import reward
from drl_toolkit.emoji.tiny import tiny_sd
from tiers import long

SHORT = ['--train', 'lora', '--num-steps', '3', '--train_steps', '2']


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model') / 'tiny'
    tiny_sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope='module')
def run(tiny, tmp_path_factory):
    "Fairness on another pipeline's folder, an epoch and a second."
    folder = tmp_path_factory.mktemp('runs') / 'run'
    call = lambda *more: main(['train', 'fairness', '--model', tiny, '--out', str(folder), *SHORT, *more])
    assert call('--epochs', '1') == 0
    assert call('--epochs', '1') == 2  # holds a run already
    assert call('--epochs', '2', '--resume') == 0
    return folder


def status(argv):
    try:
        return main(argv)
    except SystemExit as e:
        return e.code


def test_train_and_resume(run):
    rows = [json.loads(l) for l in (run / 'metrics.jsonl').read_text().splitlines()]
    assert {r['epoch'] for r in rows} == {0, 1} and 'parity' in rows[0]
    assert (run / 'weights/pytorch_lora_weights.safetensors').is_file() and len(
        list((run / 'samples').glob('*.png'))
    ) >= 2
    assert json.loads((run / 'config.json').read_text())['config']['num_steps'] == 3


def test_a_resumed_run_keeps_what_it_was_told(run, tiny, capsys):
    before = {p: p.read_bytes() for p in run.rglob('*') if p.is_file()}
    for more, words in ((['--lr', '.5'], 'got 0.5'), (['--model', 'demo'], "model must be '")):
        assert (
            status(['train', 'fairness', '--model', tiny, '--out', str(run), '--resume', *more]) == 2
            and words in capsys.readouterr().err
        )
    assert (
        status(['train', 'preference', '--model', tiny, '--out', str(run), '--resume']) == 2
        and 'recipe' in capsys.readouterr().err
    )
    assert {p: p.read_bytes() for p in run.rglob('*') if p.is_file()} == before


def test_sample(run, tmp_path):
    (tmp_path / 'prompts.txt').write_text('a cat\na portrait of a doctor\n')
    draw = lambda name, n: main(
        [
            'sample',
            str(run),
            '--prompts',
            str(tmp_path / 'prompts.txt'),
            '--n',
            str(n),
            '--seed',
            '3',
            '--out',
            str(tmp_path / name),
        ]
    )
    assert draw('two', 2) == 0 and draw('three', 3) == 0
    assert sorted(p.name for p in (tmp_path / 'two').iterdir()) == [
        '0000_00.png',
        '0000_01.png',
        '0001_00.png',
        '0001_01.png',
        'images.jsonl',
    ]
    rows = [json.loads(l) for l in (tmp_path / 'two/images.jsonl').read_text().splitlines()]
    assert [(r['file'], r['prompt']) for r in rows][2] == ('0001_00.png', 'a portrait of a doctor') and len(
        {r['seed'] for r in rows}
    ) == 4
    for r in rows:
        assert (tmp_path / 'two' / r['file']).read_bytes() == (
            tmp_path / 'three' / r['file']
        ).read_bytes()  # more images change none
    assert Image.open(tmp_path / 'two/0000_00.png').size == (64, 64)


def test_a_plain_stable_diffusion_folder_is_sampled_trained_and_evaluated(tmp_path, few_prompt_sets, capsys):
    "With PNDM, as it is published: all commands sample it with DDIM; --scheduler chooses another."
    from diffusers import PNDMScheduler

    own = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', skip_prk_steps=True, steps_offset=1
    )
    tiny_sd(prediction_type='epsilon', scheduler=own).save_pretrained(tmp_path / 'sd')
    (tmp_path / 'prompts.txt').write_text('a cat\n')
    model = str(tmp_path / 'sd')
    draw = lambda name, *more: main(
        [
            'sample',
            model,
            '--prompts',
            str(tmp_path / 'prompts.txt'),
            '--n',
            '1',
            '--num-steps',
            '3',
            '--out',
            str(tmp_path / name),
            *more,
        ]
    )
    assert (
        draw('a') == 0
        and draw('b', '--scheduler', 'DDIMScheduler') == 0
        and draw('c', '--scheduler', 'EulerAncestralDiscreteScheduler') == 0
    )
    a, b, c = ((tmp_path / name / '0000_00.png').read_bytes() for name in 'abc')
    assert a == b != c
    assert (
        main(
            [
                'train',
                'compressibility',
                '--model',
                model,
                '--out',
                str(tmp_path / 'run'),
                *SHORT,
                '--epochs',
                '1',
                '--frames',
                '0',
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / 'run/weights/policy.json').read_text())['scheduler'] == 'DDIMScheduler'
    assert main(['eval', str(tmp_path / 'run'), '--out', str(tmp_path / 'e'), '--size', '.1']) == 0
    capsys.readouterr()
    assert draw('d', '--scheduler', 'FlowMatchEulerDiscreteScheduler') == 2
    error = capsys.readouterr().err
    assert (
        'so DDIMScheduler is right' in error
        and error.strip().count('\n') == 0
        and not (tmp_path / 'd').exists()
    )


def test_a_line_of_images_jsonl_remakes_its_picture(run, tmp_path, capsys):
    """By the command to the bit, by `rollout`, and in words: model, sampler and noise stand there, and no
    path of this machine."""
    from drl_toolkit.sampling.rollout import rollout
    from drl_toolkit.runs.models import open_policy
    from drl_toolkit.utils.images import to_pil

    (tmp_path / 'prompts.txt').write_text('a cat\na portrait of a doctor\n')
    assert (
        main(
            [
                'sample',
                str(run),
                '--prompts',
                str(tmp_path / 'prompts.txt'),
                '--n',
                '3',
                '--seed',
                '3',
                '--num-steps',
                '4',
                '--eta',
                '.5',
                '--guidance-scale',
                '2',
                '--out',
                str(tmp_path / 'a'),
            ]
        )
        == 0
    )
    rows = [json.loads(l) for l in (tmp_path / 'a/images.jsonl').read_text().splitlines()]
    known = dict(
        num_steps=4,
        eta=0.5,
        guidance_scale=2.0,
        guidance_rescale=0.0,
        negative_prompt='',
        scheduler='DDIMScheduler',
        precision='fp32',
        image_size=64,
        sde='',
        noise_level=0.0,
    )
    assert (
        rows[4]['rollout'] == dict(seed=3, epoch=1, first=1)
        and known.items() <= rows[4].items()
        and {'model', 'base', 'latents_dtype', 'prev_timestep', 'batch'} <= rows[4].keys()
    )
    assert str(tmp_path) not in (tmp_path / 'a/images.jsonl').read_text() and not os.path.isabs(
        rows[4]['model']
    )
    for place, name in ((f"{tmp_path / 'a/images.jsonl'}:5", 'b'), (str(tmp_path / 'a/0001_01.png'), 'c')):
        assert main(['sample', '--again', place, '--out', str(tmp_path / name)]) == 0
        assert (tmp_path / name / '0001_01.png').read_bytes() == (tmp_path / 'a/0001_01.png').read_bytes()
        assert (
            len(list((tmp_path / name).iterdir())) == 2
            and json.loads((tmp_path / name / 'images.jsonl').read_text()).items() >= known.items()
        )
    assert (
        main(
            [
                'sample',
                '--again',
                str(tmp_path / 'b/0001_01.png'),
                '--num-steps',
                '5',
                '--out',
                str(tmp_path / 'd'),
            ]
        )
        == 0
    )  # the copy remakes it too, and another sampler may be asked for
    assert (tmp_path / 'd/0001_01.png').read_bytes() != (tmp_path / 'a/0001_01.png').read_bytes()
    policy = open_policy(str(run), **{k: rows[4][k] for k in known})
    traj = rollout(policy, [rows[4]['prompt']], **rows[4]['rollout'])
    assert traj.seeds == [rows[4]['seed']] and list(to_pil(traj.images)[0].getdata()) == list(
        Image.open(tmp_path / 'a/0001_01.png').getdata()
    )


def test_what_cannot_be_drawn_again_is_one_line(tmp_path, capsys):
    (tmp_path / 'images.jsonl').write_text(
        '{"file": "0000_00.png", "prompt": "a cat", "sample": 0, "seed": 1}\n'
    )
    again = lambda place, *more: status(
        ['sample', *more, '--again', f'{tmp_path}/{place}', '--out', str(tmp_path / 'out')]
    )
    for place, more, words in (
        ('images.jsonl:1', (), 'does not say what remakes it'),
        ('images.jsonl:2', (), 'one of its 1 lines is right'),
        ('images.jsonl', (), 'images.jsonl:LINE or'),
        ('none.jsonl:1', (), 'none.jsonl'),
        ('0000_07.png', (), 'no such image'),
        ('images.jsonl:1', ('demo',), "model is 'demo' beside --again"),
        ('images.jsonl:1', ('--seed', '3'), 'seed is 3 beside --again'),
    ):
        assert again(place, *more) == 2
        error = capsys.readouterr().err
        assert words in error and error.strip().count('\n') == 0 and not (tmp_path / 'out').exists(), error
    assert (
        status(['sample', '--out', str(tmp_path / 'out')]) == 2
        and 'model must be a run, a folder, demo or demo-sd3' in capsys.readouterr().err
    )


def test_eval(run, tiny, tmp_path, few_prompt_sets, capsys):
    assert main(['eval', str(run), '--out', str(tmp_path / 'e'), '--size', '.1']) == 0
    told, summary = capsys.readouterr().out, json.loads((tmp_path / 'e/summary.json').read_text())
    assert (
        summary.keys() == {'parity', 'composition', 'preference', 'guard', 'seconds'}
        and summary['seconds']['train'] > 0
    )
    assert {p.name for p in (tmp_path / 'e').iterdir()} == {
        'summary.json',
        'table.md',
        'rewards.csv',
        'drift.csv',
        'report.html',
        'ballot',
        'samples.png',
        'rewards.png',
        'tones.png',
        'curves.png',
    }
    assert 'parity' in told and 'held-out' in told and str(tmp_path / 'e/samples.png') in told
    assert (
        main(
            [
                'eval',
                tiny,
                '--against',
                str(run),
                '--out',
                str(tmp_path / 'f'),
                '--size',
                '.1',
                '--num-steps',
                '3',
            ]
        )
        == 0
    )
    assert 'seconds' not in json.loads((tmp_path / 'f/summary.json').read_text())


@pytest.mark.parametrize(
    'argv, words',
    [
        (['train', 'beauty'], "got 'beauty'"),
        (['train', 'joint', '--lrr', '1'], 'did you mean --lr?'),
        (['train', 'joint', '--lr', '-1'], 'lr must be 0 or more; got -1'),
        (['train', 'joint', '--lr', 'nan'], 'lr must be a finite number; got nan'),
        (['train', 'joint', '--epochs', '1.5'], 'epochs'),
        (['train', 'joint', '--lr'], '--lr'),
        (['train', 'joint', '--train', 'half'], "train must be one of 'lora', 'full'; got 'half'"),
        (['train', 'joint', '--train-steps', '40'], 'train_steps must be 9 or less'),
        (['train', 'compressibility', '--eta', '0'], 'eta'),
        (['train', 'joint', '--model', 'no-such-model'], 'no-such-model'),
        (['train'], 'RECIPE'),
        (['fly'], 'fly'),
        ([], 'required'),
        (['sample', 'demo', '--prompts', 'none.txt', '--out', 'x'], 'none.txt'),
        (['sample', 'demo', '--prompts', 'none.txt', '--out', 'x', '--n', '0'], 'n must be 1 or more; got 0'),
        (['eval', 'demo', '--out', 'x', '--size', '-1'], 'size must be in (0, 100), where 1 is 1,152 images of each model; got -1'),
        (['eval', 'no-such-model', '--out', '/proc/x'], '/proc/x'),
        (['doctor', '--fast'], '--fast'),
        (['doctor', '--batch', '0'], 'batch must be 1 or more; got 0'),
        (['doctor', '--model', 'nowhere'], "got 'nowhere', which is no folder"),
        (['doctor', '--precision', 'fp8'], "got 'fp8'"),
        (['train', 'compressibility', '--progressive', '2'], 'progressive must be in [0, 1]; got 2.0'),
        (['train', 'compressibility', '--scheduler', 'PNDMScheduler'], 'got PNDMScheduler'),
        (['train', 'compressibility', '--sde', 'cps'], "sde is 'cps', but DDIMScheduler"),
        (
            ['train', 'compressibility', '--sde-start', '8', '--sde-steps', '5'],
            'stochastic_steps must hold indices from 0 to 9; got 10',
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status(argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.strip().count('\n') == 0 and not list(tmp_path.iterdir())


def test_bad_folders(tiny, tmp_path, capsys):
    (tmp_path / 'corrupt').mkdir()
    (tmp_path / 'corrupt/model_index.json').write_text('{')
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/letter.txt').write_text('dear')
    (tmp_path / 'prompts.txt').write_text('a cat\na portrait of a wizard\n')
    for argv, words in (
        (['train', 'joint', '--model', str(tmp_path / 'corrupt'), '--out', str(tmp_path / 'r')], 'corrupt'),
        (['train', 'joint', '--model', tiny, *SHORT, '--out', str(tmp_path / 'mine')], 'not empty'),
        (['train', 'joint', '--model', tiny, *SHORT, '--out', '/proc/nowhere'], 'cannot be written'),
        (
            ['sample', tiny, '--prompts', str(tmp_path / 'prompts.txt'), '--out', str(tmp_path / 'r')],
            'line 2',
        ),
        (['eval', tiny, '--out', str(tmp_path / 'e')], '--against'),
    ):
        assert status(argv) == 2
        error = capsys.readouterr().err
        assert words in error and error.strip().count('\n') == 0, error
    assert not (tmp_path / 'r').exists() and os.listdir(tmp_path / 'mine') == ['letter.txt']


@pytest.mark.parametrize(
    'score, words',
    [
        (lambda x, p: x.mean((1, 2, 3)) * float('nan'), 'NaN'),
        (lambda x, p: torch.ones(len(x), dtype=torch.long), 'int64'),
        (lambda x, p: x.mean((2, 3)), 'shape'),
    ],
)
def test_a_reward_that_breaks_the_contract_leaves_no_run(score, words, tiny, tmp_path, monkeypatch, capsys):
    from drl_toolkit.recipes import custom, recipes
    from drl_toolkit.prompts.task import Task

    config = recipes.load_recipe('compressibility')[1]
    known = [Task('bad', ['a cat'], reward(score, name='mine'), samples=16)], config
    for module in (recipes, custom):
        monkeypatch.setattr(module, 'load_recipe', lambda name: known)
    assert status(['train', 'compressibility', '--model', tiny, *SHORT, '--out', str(tmp_path / 'r')]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / 'r').exists()


def test_the_installed_command_is_fast_and_says_one_line(tmp_path):
    drl, env = Path(sys.executable).parent / 'drl', os.environ | dict(OMP_NUM_THREADS='1')
    began = time.time()
    told = subprocess.run([drl, '--help'], check=True, capture_output=True, text=True).stdout
    assert 'train' in told and 'eval' in told and time.time() - began < 5  # 0.2 s on a free machine
    done = subprocess.run(
        [drl, 'train', 'joint', '--model', 'no-such-model'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
        stdin=subprocess.DEVNULL,
    )
    assert (
        done.returncode == 2
        and done.stderr.count('\n') == 1
        and 'Traceback' not in done.stderr
        and not list(tmp_path.iterdir())
    )


def test_help_lists_the_fields_with_their_comments(capsys):
    assert status(['train', '--help']) == 0
    told = capsys.readouterr().out
    assert '--kl-weight' in told and 'learning rate' in told and 'LoRA matrices' in told


def test_doctor(capsys):
    assert main(['doctor']) in (0, 1)  # 1 where a library, a core or the disk is amiss on this machine
    told = capsys.readouterr().out
    assert (
        'torch' in told
        and 'shipped emoji-sd: found' in told
        and 'it fits' in told
        and '--micro-batch 32 by' in told
    )


@long
def test_doctor_of_another_model_needs_no_weights(tmp_path, capsys):
    from drl_toolkit.emoji.tiny import tiny_sdxl

    tiny_sdxl().save_pretrained(tmp_path / 'xl')
    for file in (tmp_path / 'xl').rglob('*.safetensors'):
        file.unlink()
    assert (
        main(
            [
                'doctor',
                '--model',
                str(tmp_path / 'xl'),
                '--batch',
                '1000000',
                '--train',
                'full',
                '--checkpointing',
                '--no-train-unconditional',
            ]
        )
        == 1
    )
    told = capsys.readouterr().out
    assert (
        'it does not fit' in told
        and '--train lora' not in told.split('smaller')[0]
        and '--checkpointing' not in told
    )
