"""Whatever ends a run, it goes on as if nothing had happened: every method resumes to the bit, and so does a run that
was killed at any moment.

Three hundred kills: LONG=1 python -m pytest tests/runs/test_recovery.py -k killed (KILLS=40 for another number)"""

import json, os, random, signal, subprocess, sys, time

import pytest, torch
from safetensors import safe_open

from drl_toolkit.recipes import recipes

from pathlib import Path

from drl_toolkit.runs import run as runs
from drl_toolkit.cli.main import main
from drl_toolkit.runs.recordings import FrameRecorder, read_frames, recorded_epochs
from drl_toolkit.prompts.task import Task
from drl_toolkit.rewards.reward import reward
from drl_toolkit.runs.run import Run
from drl_toolkit.runs.recorder import Recorder, named_state, resume
from drl_toolkit.runs.state import load_state
from drl_toolkit.runs.folder import RunError
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.callbacks import Callback
from drl_toolkit.recipes.config import RunConfig
from drl_toolkit.recipes.methods import METHODS, method_fields
from tiers import LONG, some


@reward
def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def trainer_of(epochs, method='ppo', **fields):
    config = RunConfig(
        **dict(epochs=epochs, num_steps=3, train='full', train_steps=1, lr=1e-3, warmup=0, measure_every=2)
        | method_fields(method)
        | dict(back_steps=1)
        | fields
    )
    return recipes.make_trainer(
        config, [Task('red', ['a cat', 'a dog'], redness, group_size=4, samples=8)], tiny_sd(), callbacks=[]
    )


class Note(Callback):
    "Writes down, outside the run, which epoch has begun: all before it are finished."

    def __init__(self, file):
        self.file = file

    def after_sample(self, trainer, *rest):
        self.file.write_text(str(trainer.epoch))


def fit(folder, epochs, **options):
    "Train a run, or go on with it; returns the trainer."
    trainer = trainer_of(epochs, **options)
    with (
        Run.open(folder, write=True)
        if (folder / 'config.json').exists()
        else Run.create(folder, trainer.config)
    ) as run:
        trainer.callbacks += [
            Note(folder.with_name(f'{folder.name} has begun')),
            FrameRecorder(run, paths=1, pictures=2, share=1.0),
            Recorder(run, ['a cat']),
        ]
        resume(trainer, run)
        trainer.fit()
    return trainer


def without_clocks(run):
    return [
        {k: v for k, v in row.items() if k not in ('seconds', 'cpu_seconds', 'nfe')} for row in run.metrics()
    ]  # a resumed run draws the base's images once more


def same(a, b, folder_a, folder_b):
    assert all(torch.equal(t, named_state(b)[n]) for n, t in named_state(a).items())
    assert without_clocks(Run.open(folder_a)) == without_clocks(Run.open(folder_b))


SOME = (
    'b2',
    'branch_grpo',
    'dpok',
    'nft',
    'ppo_prompt',
    'refl_data',
)  # one of each kind of sampler and memory


@pytest.mark.parametrize('method', some(sorted(METHODS), SOME))
def test_every_method_resumes_to_the_bit(method, tmp_path):
    whole = fit(tmp_path / 'whole', 3, method=method)
    fit(tmp_path / 'parts', 1, method=method)
    same(whole, fit(tmp_path / 'parts', 3, method=method), tmp_path / 'whole', tmp_path / 'parts')


REGULARISED = (
    dict(ema_decay=0.9, data='base', data_weight=0.1),
    dict(kl_weight=0.01, kl_target=1.0),
    dict(train='lora', base_decay=0.1),
    dict(num_minibatches=1, reuse_graphs=True),
)


@pytest.mark.parametrize('fields', some(REGULARISED, REGULARISED[:2]), ids=str)
def test_so_do_the_regularisers(fields, tmp_path):
    whole = fit(tmp_path / 'whole', 3, **fields)
    fit(tmp_path / 'parts', 2, **fields)
    same(whole, fit(tmp_path / 'parts', 3, **fields), tmp_path / 'whole', tmp_path / 'parts')


EPOCHS = 6


def killed_after(seconds, folder):
    "A forked process trains; it is killed, or ends."
    child = os.fork()
    if not child:
        try:
            fit(folder, EPOCHS, keep_best='reward')
            os._exit(0)
        except BaseException:
            os._exit(1)
    time.sleep(seconds)
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return os.waitpid(child, 0)[1]


def check_folder(folder, beside=0):
    """What a killed run left can be read, all of it, and nothing is half-written; the epochs that were
    recorded and those that were finished are there, but for those still written `beside` the training."""
    if not (folder / 'config.json').exists():
        return 0
    run = Run.open(folder)
    rows, whole = run.metrics(), [p.name for p in run.checkpoints()]
    for path in run.checkpoints():
        json.loads((path / 'state.json').read_text())
        for file in path.glob('*.safetensors'):
            with safe_open(file, 'pt') as f:
                assert all(f.get_tensor(k).isfinite().all() for k in f.keys())
    for epoch in recorded_epochs(run):
        assert read_frames(run, epoch).tasks
    if (folder / 'weights').exists():
        assert (folder / 'weights/policy.json').exists()
    done = int(whole[-1][-4:]) if whole else 0
    assert not rows.damaged and len({r['epoch'] for r in rows}) <= done + beside
    begun = folder.with_name(f'{folder.name} has begun')
    assert done >= (int(begun.read_text() or 0) if begun.exists() else 0) - beside
    return done


@pytest.mark.parametrize('beside', [0, 1])
def test_a_run_that_is_killed_at_any_moment_loses_at_most_the_epoch_in_progress(
    beside, tmp_path, monkeypatch
):
    "Of a large state, which is written beside the training, also the epoch before it."
    torch.set_num_threads(1)
    if beside:
        monkeypatch.setattr(runs, 'DIRECT', 0)
    began = time.time()
    whole = fit(tmp_path / 'whole', EPOCHS, keep_best='reward')
    length = time.time() - began
    rng, kills, left, run_number = (
        random.Random(beside),
        0,
        int(os.environ.get('KILLS', 300 if LONG else 6)) // (1 + 3 * beside),
        0,
    )
    while kills < left:
        folder, run_number, done = tmp_path / f'run{run_number}', run_number + 1, 0
        for _ in range(4):
            status = killed_after(rng.uniform(0, length * 0.6), folder)
            kills += status != 0
            assert status in (0, signal.SIGKILL)
            now = check_folder(folder, beside)
            assert now >= done
            done = now
        same(whole, fit(folder, EPOCHS, keep_best='reward'), tmp_path / 'whole', folder)
        print(f'{kills} kills, all runs ended in the same bits')
        assert Run.open(folder).best()[1] == Run.open(tmp_path / 'whole').best()[1] and not list(
            (folder / 'checkpoints').glob('.*')
        )


# leaving


def start(folder, *more):
    return subprocess.Popen(
        [
            sys.executable,
            '-m',
            'drl_toolkit.cli.main',
            'train',
            'compressibility',
            '--out',
            str(folder),
            '--epochs',
            '500',
            '--frames',
            '0',
            '--num-steps',
            '2',
            '--train-steps',
            '1',
            '--num-minibatches',
            '1',
            *more,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
    )


@pytest.mark.parametrize('number', some((signal.SIGTERM, signal.SIGINT), [signal.SIGTERM]))
def test_a_signal_saves_and_leaves(number, tmp_path, capsys):
    process = start(tmp_path / 'r')
    end = time.time() + 240
    while not (tmp_path / 'r/metrics.jsonl').exists() and time.time() < end and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(number)
    told, _ = process.communicate(timeout=120)
    assert (
        process.returncode == 0 and f'{number.name}: stopping after this epoch' in told and 'as asked' in told
    )
    done = check_folder(tmp_path / 'r')
    assert (
        done >= 1
        and done == max(r['epoch'] for r in Run.open(tmp_path / 'r').metrics()) + 1
        and (tmp_path / 'r/weights').is_dir()
    )


# damage


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs') / 'r'
    fit(folder, 2)
    return folder


def test_damaged_checkpoints_are_named_and_left_alone(run, tmp_path):
    newest = Run.open(run).checkpoints()[-1]
    for file, damage in (
        ('weights.safetensors', lambda b: b[:-100]),
        ('weights.safetensors', lambda b: b'\xff' * 8 + b[8:]),
        ('optimizer.safetensors', lambda b: b''),
        ('state.json', lambda b: b'{'),
    ):
        copy = tmp_path / f'c{len(list(tmp_path.iterdir()))}'
        copy.mkdir()
        for p in newest.iterdir():
            (copy / p.name).write_bytes(damage(p.read_bytes()) if p.name == file else p.read_bytes())
        before = {p.name: p.read_bytes() for p in copy.iterdir()}
        trainer = trainer_of(2)
        weights = [p.detach().clone() for p in trainer.params]
        with pytest.raises(ValueError, match='cannot be read|does not fit'):
            load_state(copy, named_state(trainer), trainer.optimizer)
        assert {p.name: p.read_bytes() for p in copy.iterdir()} == before and all(
            torch.equal(a, b) for a, b in zip(weights, trainer.params)
        )


def test_a_full_disk_is_one_line_and_destroys_nothing(run, tmp_path, monkeypatch):
    trainer = trainer_of(3)
    with Run.open(run, write=True) as r:
        resume(trainer, r)
        before = sorted((p.relative_to(run), p.stat().st_size) for p in run.rglob('*') if p.is_file())

        def full(*args, **options):
            raise OSError(28, 'No space left on device')

        monkeypatch.setattr('drl_toolkit.runs.state.save_file', full)
        with pytest.raises(OSError, match='No space left'):
            r.checkpoint(3, named_state(trainer), trainer.optimizer, trainer.state_dict())
        monkeypatch.undo()
        assert (
            sorted(
                (p.relative_to(run), p.stat().st_size)
                for p in run.rglob('*')
                if p.is_file() and '.part' not in str(p)
            )
            == before
        )
        assert resume(trainer, r) == 2


def child_with(folder, limit):
    "A forked process goes on with a run where no file may get larger: the exit status, and what it said."
    child = os.fork()
    if not child:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            fit(folder, 4)
            os._exit(0)
        except OSError as e:
            os._exit(3 if '\n' not in str(e) and str(e) else 4)
        except BaseException:
            os._exit(5)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize('limit', some((0, 500, 20_000), [500]))
def test_a_disk_that_is_really_full(limit, tmp_path):
    """At the first byte, in the metrics, in the weights: the kernel refuses.

    One line, the folder is as readable as before, and the run ends as if nothing had been."""
    torch.set_num_threads(1)
    fit(tmp_path / 'r', 2)
    assert child_with(tmp_path / 'r', limit) == 3
    assert check_folder(tmp_path / 'r') == 2 and not list((tmp_path / 'r/checkpoints').glob('.*'))
    same(fit(tmp_path / 'whole', 3), fit(tmp_path / 'r', 3), tmp_path / 'whole', tmp_path / 'r')


def test_a_folder_that_may_only_be_read(run, tmp_path, monkeypatch):
    """A resume needs to write, and says so; looking does not.

    (The kernel refuses root nothing, so the refusal is played.)"""

    def refused(self, *args, **options):
        raise PermissionError(13, 'Permission denied', str(self))

    before = sorted((p, p.stat().st_size) for p in run.rglob('*'))
    monkeypatch.setattr(Path, 'touch', refused)
    with pytest.raises(RunError, match='cannot be written .Permission denied.'):
        Run.open(run, write=True)
    with pytest.raises(RunError, match='cannot be written'):
        Run.create(tmp_path / 'new', {})
    assert Run.open(run).metrics() and sorted((p, p.stat().st_size) for p in run.rglob('*')) == before


@pytest.mark.parametrize(
    'field, value, words',
    [
        ('lr', 'fast', 'lr must be'),
        ('lr', -1, 'lr must be 0 or more; got -1'),
        ('watch', 7, 'watch must be a word or several; got 7'),
        ('branching', 'yes', "branching must be true or false; got 'yes'"),
        ('num_steps', None, 'num_steps'),
        ('speed', 3, 'speed'),
    ],
)
def test_a_field_edited_by_hand(field, value, words, tmp_path, capsys):
    Run.create(tmp_path / 'r', RunConfig(), 'compressibility').close()
    about = json.loads((tmp_path / 'r/config.json').read_text())
    about['config'][field] = value
    (tmp_path / 'r/config.json').write_text(json.dumps(about))
    assert main(['train', 'compressibility', '--out', str(tmp_path / 'r'), '--resume']) == 2
    told = capsys.readouterr().err
    assert words in told and told.count('\n') == 1 and (tmp_path / 'r/config.json').exists()


def test_a_config_edited_by_hand(run, tmp_path, capsys):
    import shutil

    for text, words in (
        ('{', 'damaged'),
        ('[]', "no 'schema'"),
        ('{"schema": 99, "config": {}}', 'schema 99'),
        ('{"schema": "1"}', "no 'schema'"),
    ):
        shutil.copytree(run, tmp_path / 'edited', dirs_exist_ok=True)
        (tmp_path / 'edited/config.json').write_text(text)
        with pytest.raises(RunError, match=words):
            Run.open(tmp_path / 'edited')
