"The doctor against faked machines and damaged runs."

import importlib, json, shutil, time
from email.message import Message
from types import SimpleNamespace

import pytest, torch

from drl_toolkit.cli import main as cli, doctor as D
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.training.ratio import RatioNoise
from drl_toolkit.recipes.recipes import make_policy
from drl_toolkit.recipes.config import RunConfig
from drl_toolkit.runs.run import Run
from drl_toolkit.emoji.tiny import tiny_sd


@pytest.mark.parametrize(
    'mine, theirs, wants, words',
    [
        ('2.9.0', '0.24.0', ['numpy', 'torch==2.9.0'], ''),
        ('2.15.0', '0.29.2', ['torch (>=2.14.0)'], ''),
        ('2.9.0+cu126', '0.24.0+cu126', ['torch==2.9.0'], ''),
        ('2.9.0', '0.24.0', None, ''),
        ('2.8.0', '0.24.0', ['torch==2.9.0'], 'which needs torch==2.9.0'),
        ('2.9.0', '0.20.0', ['numpy', 'torch (==2.5.0)'], 'which needs torch==2.5.0'),
        ('2.9.0+cpu', '0.24.0+cu126', ['torch==2.9.0'], 'one build for cpu, one for cu126'),
    ],
)
def test_torch_and_torchvision(mine, theirs, wants, words, monkeypatch):
    monkeypatch.setattr(D, 'version', dict(torch=mine, torchvision=theirs).get)
    monkeypatch.setattr(D, 'requires', lambda name: wants)
    found = D.matching_libraries()
    assert found.well != bool(words) and words in found.what and (found.well or 'install' in found.do)


def test_no_torchvision(monkeypatch):
    def none(name):
        if name == 'torchvision':
            raise D.PackageNotFoundError(name)
        return '2.9.0'

    monkeypatch.setattr(D, 'version', none)
    assert D.matching_libraries().do == 'pip install torchvision'


@pytest.mark.parametrize(
    'there, sees, build, hidden, words',
    [
        (False, False, None, None, ''),
        (True, True, '12.8', None, ''),
        (True, False, None, None, 'build for CPUs'),
        (True, False, '12.8', None, 'does not see it'),
        (True, False, '12.8', '', 'hides it'),
        (True, False, '12.8', '-1', 'hides it'),
    ],
)
def test_a_gpu_that_is_not_used(there, sees, build, hidden, words, monkeypatch):
    monkeypatch.setattr(D.shutil, 'which', lambda name: '/usr/bin/nvidia-smi' if there else None)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: sees)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'A GPU')
    monkeypatch.setattr(torch.version, 'cuda', build)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if hidden is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', hidden)
    found = D.gpu_in_use()
    assert found.well != bool(words) and words in found.what


def test_memory_disk_and_cores(monkeypatch, tmp_path):
    assert D.enough_memory(1e9, 2e9, {}).well and 'it fits' in D.enough_memory(1e9, 2e9, {}).what
    assert (
        '--offload saves 0.5 GB' in D.enough_memory(3e9, 2e9, {'--offload': 5e8}).do
        and 'smaller model' in D.enough_memory(3e9, 2e9, {}).do
    )
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(D.shutil, 'disk_usage', lambda p: usage._replace(free=10**9))
    assert (
        D.enough_disk(5e8, tmp_path / 'a/b').well
        and '--out' in D.enough_disk(2e9, tmp_path).do
        and '1.0 GB free' in D.enough_disk(2e9, tmp_path).what
    )
    monkeypatch.setattr(D.os, 'access', lambda p, mode: False)
    assert 'cannot be written' in D.enough_disk(1.0, tmp_path).what
    monkeypatch.setattr(D.os, 'sched_getaffinity', lambda p: range(16))
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    assert 'OMP_NUM_THREADS=16' in D.all_cores().do


@pytest.fixture
def run(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    with Run.create(tmp_path / 'run', dict(keep_best='reward'), 'joint') as run:
        for epoch in (0, 1, 2):
            run.log(dict(epoch=epoch, tasks=dict(red=dict(reward=float(epoch)))))
        for epoch in (1, 2):
            run.checkpoint(epoch, dict(weight=weight), optimizer, dict(epoch=epoch))
    return run


def first(run, file, change):
    path = run.folder / file
    path.write_bytes(change(path.read_bytes()))


def poisoned(run):
    "As an older version without the check may have written."
    from safetensors.torch import load_file, save_file

    file = run.folder / 'checkpoints/epoch_0002/optimizer.safetensors'
    save_file({k: v * float('nan') for k, v in load_file(file).items()}, file)
    (file.parent / 'manifest.json').unlink()


@pytest.mark.parametrize(
    'harm, words, do',
    [
        (
            lambda r: first(r, 'checkpoints/epoch_0002/weights.safetensors', lambda b: b[:-1]),
            'epoch_0002: it cannot be read',
            'goes on from epoch_0001',
        ),
        (
            lambda r: first(r, 'checkpoints/epoch_0002/state.json', lambda b: b'{'),
            'epoch_0002: it cannot be read',
            'goes on from epoch_0001',
        ),
        (
            lambda r: (r.folder / 'checkpoints/epoch_0002/optimizer.safetensors').unlink(),
            'epoch_0002: it cannot be read',
            'epoch_0001',
        ),
        (poisoned, 'is not finite', 'epoch_0001'),
        (
            lambda r: (r.folder / 'checkpoints/epoch_0002').rename(r.folder / 'checkpoints/epoch_0009'),
            'of another epoch',
            'epoch_0001',
        ),
        (lambda r: first(r, 'metrics.jsonl', lambda b: b'x\n' + b), 'line 1 is damaged', 'delete it'),
        (
            lambda r: first(r, 'config.json', lambda b: b.replace(b'"schema": 2', b'"schema": 9')),
            'schema 9',
            'later version',
        ),
        (
            lambda r: first(r, 'config.json', lambda b: b.replace(b'"torch": "', b'"torch": "0.')),
            'torch 0.',
            'not to the bit',
        ),
        (lambda r: shutil.rmtree(r.folder), 'holds no run', 'a folder that drl train wrote'),
    ],
)
def test_runs_that_ail(run, harm, words, do, capsys):
    assert cli.main(['doctor', str(run.folder)]) == 0
    assert 'a resume goes on after 2 epochs; the best is epoch_0002' in capsys.readouterr().out
    harm(run)
    assert cli.main(['doctor', str(run.folder)]) == 1
    told = capsys.readouterr().out
    assert words in told and do in told and '1 thing to mend' in told and told.count('MEND') == 1


def test_the_device_field(monkeypatch):
    for bad, words in (
        ('gpu', "device must be .*got 'gpu'"),
        ('cuda:99', 'sees'),
        (3, 'device must be a word'),
    ):
        with pytest.raises(ValueError, match=words):
            make_policy(RunConfig(device=bad), tiny_sd())
    asked = []
    with monkeypatch.context() as gpus:
        gpus.setattr(torch.cuda, 'is_available', lambda: True)
        gpus.setattr(torch.cuda, 'device_count', lambda: 2)
        gpus.setattr(
            'drl_toolkit.recipes.recipes.Policy.from_pretrained',
            lambda model, device, **options: asked.append(device),
        )
        make_policy(RunConfig())
        make_policy(RunConfig(device='cpu'))
        make_policy(RunConfig(), device='cuda:1')
    assert (
        asked == ['cuda', 'cpu', 'cuda:1']
        and make_policy(RunConfig(num_steps=2), tiny_sd()).device.type == 'cpu'
    )


def test_libraries_that_do_not_fit_are_told_by_every_command(monkeypatch, capsys):
    def broken(name):
        if name == 'drl_toolkit.recipes.recipes':
            raise RuntimeError('operator torchvision::nms does not exist')
        return importlib.import_module(name)

    monkeypatch.setattr(cli, 'import_module', broken)
    monkeypatch.setattr(D, 'version', dict(torch='2.8.0', torchvision='0.24.0').get)
    monkeypatch.setattr(D, 'requires', lambda name: ['torch==2.9.0'])
    assert cli.main(['train', 'joint']) == 2
    told = capsys.readouterr().err
    assert 'nms does not exist' in told and 'needs torch==2.9.0' in told and told.count('\n') == 1


# ---- which versions are installed


class Shelf:
    "Distributions as `importlib.metadata` gives them: name -> (version, what it needs)."

    def __init__(self, **known):
        self.known = known

    def __call__(self, name):
        if name not in self.known:
            raise D.PackageNotFoundError(name)
        found, needs = self.known[name]
        message = Message()
        message['Version'] = found
        for need in needs:
            message['Requires-Dist'] = need
        return SimpleNamespace(metadata=message)


NEEDS = ['torch>=2.9', 'diffusers>=0.38', 'peft>=0.18', 'pytest; extra == "dev"']


@pytest.mark.parametrize(
    'have, words, do',
    [
        (
            dict(torch=('2.14.1+cu130', []), diffusers=('0.42.1', []), peft=('0.21.2', [])),
            '3 of 3 are those that were tested',
            '',
        ),
        (
            dict(torch=('2.14.1', []), diffusers=('0.99.0', []), peft=('0.18.1', [])),
            '1 of 3 are those that were tested; newer than tested: diffusers 0.99.0 (0.42.1); older than '
            'tested: peft 0.18.1 (0.21.2)',
            '',
        ),
        (
            dict(torch=('2.14.1', []), diffusers=('0.35.0', []), peft=('0.21.2', [])),
            'drl_toolkit 0.1 needs diffusers>=0.38, but 0.35.0 is installed',
            'constraints.txt',
        ),
        (
            dict(
                torch=('2.14.1', []),
                diffusers=('0.42.1', ['peft>=0.22', 'torch; extra == "x"', 'nothing']),
                peft=('0.21.2', []),
            ),
            'diffusers 0.42.1 needs peft>=0.22, but 0.21.2 is installed',
            'constraints.txt',
        ),
        (dict(torch=('2.14.1', []), peft=('0.21.2', [])), 'diffusers is not installed', 'constraints.txt'),
    ],
)
def test_libraries_against_those_that_were_tested(have, words, do, monkeypatch):
    monkeypatch.setattr(D, 'distribution', Shelf(drl_toolkit=('0.1', NEEDS), **have))
    monkeypatch.setattr(
        D,
        'tested_versions',
        lambda: {'torch': '2.14.1', 'diffusers': '0.42.1', 'peft': '0.21.2', 'numpy': '2.4'},
    )
    found = D.tested_libraries()
    assert (
        found.what == f'libraries: {words}'
        and found.well != bool(do)
        and do in found.do
        and '\n' not in found.what + found.do
    )


def test_the_libraries_that_are_here():
    "In a moment, and without importing any."
    began = time.perf_counter()
    found = min((D.tested_libraries() for _ in range(3)), key=str)
    assert (
        found.well and ' are those that were tested' in found.what and (time.perf_counter() - began) / 3 < 0.2
    )  # .03 on a free core
    assert {'torch', 'peft', 'gradio'} <= set(D.tested_versions())


def test_without_metadata(monkeypatch):
    monkeypatch.setattr(D, 'distribution', Shelf())
    assert D.tested_libraries().well and 'not installed by pip' in D.tested_libraries().what


# ---- a small epoch first


def short(model, *more):
    return [
        'doctor',
        '--model',
        str(model),
        '--num-steps',
        '2',
        '--train-steps',
        '1',
        '--batch',
        '8',
        '--device',
        'cpu',
        *more,
    ]


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    tiny_sd().save_pretrained(folder)
    return folder


@pytest.fixture
def machine_is_well(monkeypatch):
    "Looking at the machine takes longer than the epoch; other tests do it."
    monkeypatch.setattr(cli, '_machine', lambda args: [])


@pytest.mark.parametrize(
    'options',
    [
        ('--train', 'lora'),
        ('--train', 'full', '--precision', 'bf16'),
        ('--likelihood', 'matching', '--advantage', 'group'),
    ],
    ids=' '.join,
)
def test_one_small_epoch(options, model, capsys, tmp_path, monkeypatch, machine_is_well):
    monkeypatch.chdir(tmp_path)
    assert cli.main(short(model, '--try', *options)) == 0
    told = capsys.readouterr().out
    assert (
        'one epoch of 8 images: ' in told
        and 'so 8 images take about' in told
        and 'were estimated for 8 images' in told
    )
    assert ('of the clip range' in told) == ('matching' not in options) and not list(tmp_path.iterdir())


def test_the_figures_of_a_trial(model):
    """Seconds and bytes are those of the epoch; the noise is that of the ratio before any update, which a CPU
    has none of in fp32."""
    trial = D.try_epoch(RunConfig(num_steps=2, train_steps=1, device='cpu'), tiny_sd(), 4)
    assert (
        trial.record['epoch'] == 0
        and trial.samples == 4
        and 0 < trial.seconds < 60
        and trial.noise.largest == 0
    )
    noisy = D.replace(trial, seconds=8.0, peak=2e9, noise=RatioNoise(1e-6, 2e-6, 1e-4))
    first, second, third = D.trial_findings(noisy, 1e9, 64)
    assert (
        '8.0 s, so 64 images take about 128 s' in first.what
        and '2.0 GB, and 1.0 GB' in second.what
        and '2.00% of the clip range' in third.what
        and 'more than a hundredth' in third.what
    )


def test_memory_at_the_peak():
    """Of a piece so large that the allocator asks the kernel for it: a smaller one may lie in memory that an
    earlier test gave back."""
    with D.PeakMemory(False) as memory:
        held = torch.ones(2**30 + 2**27, dtype=torch.uint8)
        time.sleep(0.1)
        del held
    assert 1.05 * 2**30 < memory.peak < 1.4 * 2**30


@pytest.mark.parametrize(
    'micro, steps, most, want',
    [(128, 5, 64, 16), (8, 4, 64, 4), (1, 1, 64, 4), (16, 2, 6, 8), (128, 5, 1, 4), (20, 2, 64, 12)],
)
def test_as_few_samples_as_fill_a_micro_batch(micro, steps, most, want):
    assert D.samples_to_try(RunConfig(micro_batch=micro, train_steps=steps), most) == want


@pytest.mark.parametrize(
    'options, words',
    [
        (('--model', 'no/where/at-all'), 'no/where/at-all'),
        (('--image-size', '60'), 'image_size must be'),
        (('RUN',), 'with --try'),
    ],
)
def test_a_trial_that_cannot_be_made_is_one_line(options, words, model, capsys, machine_is_well):
    assert cli.main([*short(model, '--try'), *options]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count('\n') == 1 and 'Traceback' not in told


def test_a_trial_that_breaks_is_one_line(model, capsys, monkeypatch, machine_is_well):
    def broken(*args):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB.\nmore')

    monkeypatch.setattr('drl_toolkit.training.trainer.Trainer.fit', broken)
    assert cli.main(short(model, '--try')) == 2
    told = capsys.readouterr().err
    assert (
        'one small epoch could not be trained (OutOfMemoryError: CUDA out of memory' in told
        and told.count('\n') == 1
    )


def test_weights_of_a_run_can_be_tried(model, tmp_path, capsys):
    folder = Policy.from_pretrained(model, num_steps=2).save(tmp_path / 'weights', base=str(model))
    assert cli.main(short(folder, '--try')) in (0, 1) and 'one epoch of 8 images' in capsys.readouterr().out


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(keep_best=5), 'keep_best must be a word or several; got 5'),
        (dict(fields=1), "'fields' is no field"),
        (dict(lr='fast'), 'lr must be a finite number'),
    ],
)
def test_a_configuration_that_a_hand_has_changed(run, change, words, capsys):
    file = run.folder / 'config.json'
    about = json.loads(file.read_text())
    about['config'] |= change
    file.write_text(json.dumps(about))
    assert cli.main(['doctor', str(run.folder)]) == 1
    told = capsys.readouterr()
    assert words in told.out and told.out.count('MEND') == 1 and 'Traceback' not in told.err
