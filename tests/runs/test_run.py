"A run folder survives kills, refuses what is not its own, and resumes to the bit."

import json, multiprocessing, os, random, shutil, time

import pytest, torch
from safetensors.torch import load_file

from drl_toolkit.sampling.policy import Policy
from drl_toolkit.prompts.task import Task
from drl_toolkit.rewards.reward import reward
from drl_toolkit.runs import state
from drl_toolkit.runs.recordings import FrameRecorder
from drl_toolkit.runs.run import Run
from drl_toolkit.runs.control import ControlCallback
from drl_toolkit.runs.recorder import Recorder, named_state, resume
from drl_toolkit.runs.state import load_state, read_state, save_state
from drl_toolkit.runs.folder import RunError
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.callbacks import StopTraining, Callback
from drl_toolkit.training.config import TrainConfig
from tiers import some
from witnesses import EachEpoch, copied, same

PROMPTS = ['a cat', 'a dog']


@reward
def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def trainer(callbacks, train='lora', **options):
    torch.manual_seed(0)
    config = TrainConfig(**dict(epochs=3, lr=1e-2, train_steps=2) | options)
    return Trainer(
        Policy(tiny_sd(), num_steps=3, train=train),
        [Task('red', PROMPTS, redness, samples=16)],
        config,
        callbacks=callbacks,
    )


@pytest.mark.parametrize('train', some(['lora', 'full'], ['lora']))
def test_three_epochs_are_one_and_two(train, tmp_path):
    with Run.create(tmp_path / 'a', {}) as run:
        a = trainer([Recorder(run, PROMPTS, every=1)], train)
        a.fit()
    with Run.create(tmp_path / 'b', {}) as run:
        trainer([Recorder(run, PROMPTS, every=1)], train).fit(epochs=1)
    with Run.open(tmp_path / 'b', write=True) as run:
        b = trainer([Recorder(run, PROMPTS, every=1)], train)
        assert resume(b, run) == 1
        b.fit()
    rows = lambda name: [
        {k: v for k, v in r.items() if k not in ('seconds', 'cpu_seconds')}
        for r in Run.open(tmp_path / name).metrics()
    ]
    assert rows('a') == rows('b') and len(rows('a')) == 6
    assert all(torch.equal(t, named_state(b)[n]) for n, t in named_state(a).items())
    for name in ('epoch_0000.png', 'epoch_0003.png'):
        assert (tmp_path / 'a/samples' / name).read_bytes() == (tmp_path / 'b/samples' / name).read_bytes()
    assert (
        2 <= len(run.checkpoints()) <= 3
        and run.kept()[0] in run.checkpoints()
        and not [p for p in tmp_path.rglob('*.p*') if p.suffix in ('.pt', '.pkl', '.part')]
    )
    if train == 'full':
        Policy.from_pretrained(tmp_path / 'a/weights', num_steps=3)


def test_an_interrupted_epoch_leaves_the_last_checkpoint(tmp_path):
    class Kill(Callback):
        def after_sample(self, trainer, *rest):
            if trainer.epoch == 2:
                raise KeyboardInterrupt

    with Run.create(tmp_path / 'r', {}) as run:
        with pytest.raises(KeyboardInterrupt):
            trainer([Kill(), Recorder(run, PROMPTS, every=1)]).fit()
        assert not (tmp_path / 'r/weights').exists() and [p.name for p in run.checkpoints()] == [
            'epoch_0001',
            'epoch_0002',
        ]


def test_early_stop_keeps_weights(tmp_path):
    class Stop(Callback):
        def after_epoch(self, trainer, record):
            raise StopTraining('enough')

    with Run.create(tmp_path / 'r', {}) as run:
        trainer([Recorder(run, PROMPTS), Stop()]).fit()
    assert list((tmp_path / 'r/weights').glob('*.safetensors'))


def test_torn_lines(tmp_path):
    with Run.create(tmp_path / 'r', {}) as run:
        for e in range(3):
            run.log(dict(epoch=e, tasks=dict(t=dict(reward=float(e)))))
        whole = (run.folder / 'metrics.jsonl').read_bytes()
    for cut in range(len(whole)):
        (tmp_path / 'r/metrics.jsonl').write_bytes(whole[:cut])
        lines = whole[:cut].count(b'\n')
        assert len(Run.open(tmp_path / 'r').metrics()) == lines
        with Run.open(tmp_path / 'r', write=True) as run:
            run.log(dict(epoch=9, tasks=dict(t=dict(reward=0.0))))
        assert [r['epoch'] for r in run.metrics()] == [*range(lines), 9]


def test_a_bad_line_hides_no_other(tmp_path):
    with Run.create(tmp_path / 'r', {}) as run:
        for e in range(3):
            run.log(dict(epoch=e, tasks=dict(t=dict(reward=float(e)))))
    lines = (run.folder / 'metrics.jsonl').read_bytes().splitlines(True)
    for bad in (b'{"epoch": \n', b'\0\0\n', b'{"epoch": "2", "task": "t"}\n', b'\n'):
        (run.folder / 'metrics.jsonl').write_bytes(lines[0] + bad + lines[2])
        rows = run.metrics()
        assert (
            [r['epoch'] for r in rows] == [0, 2]
            and rows.damaged == [2]
            and rows.complaint == 'metrics.jsonl, line 2 is damaged and left out'
        )


def test_no_figure_takes_the_place_of_epoch_and_task(tmp_path):
    with Run.create(tmp_path / 'r', {}) as run:
        for e in range(2):
            run.log(
                dict(epoch=e, tasks=dict(t=dict(reward=float(e), epoch=9.0, task=7.0)), seconds=1.0, task=5.0)
            )
    rows = run.metrics()
    assert [(r['epoch'], r['task']) for r in rows] == [
        (0, 't'),
        (0, None),
        (1, 't'),
        (1, None),
    ] and not rows.damaged


def test_folders_that_are_refused(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/letter.txt').write_text('dear')
    (tmp_path / 'file').write_text('')
    for bad in ('mine', 'file', 'file/below'):
        with pytest.raises(RunError, match='output folder') as e:
            Run.create(tmp_path / bad, {})
        assert '\n' not in str(e.value)
    assert os.listdir(tmp_path / 'mine') == ['letter.txt']
    Run.create(tmp_path / 'r', {}).close()
    with pytest.raises(RunError, match='--resume'):
        Run.create(tmp_path / 'r', {})
    config = json.loads((tmp_path / 'r/config.json').read_text())
    (tmp_path / 'r/config.json').write_text(json.dumps(config | dict(schema=99)))
    with pytest.raises(RunError, match='schema 99'):
        Run.open(tmp_path / 'r')
    (tmp_path / 'r/config.json').write_text('{')
    with pytest.raises(RunError, match='damaged'):
        Run.open(tmp_path / 'r')
    (tmp_path / 'r/config.json').write_text('[]')
    with pytest.raises(RunError, match='no run'):
        Run.open(tmp_path / 'r')


def _hold(folder, ready):
    _run = Run.open(folder, write=True)  # holds the lock
    ready.set()
    time.sleep(60)


def test_one_writer_at_a_time_and_a_killed_one_lets_go(tmp_path):
    Run.create(tmp_path / 'r', {}).close()
    context = multiprocessing.get_context('fork')
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / 'r', ready))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(RunError, match='another process'):
        Run.open(tmp_path / 'r', write=True)
    Run.open(tmp_path / 'r').metrics()  # readers need no lock
    holder.kill()
    holder.join()
    Run.open(tmp_path / 'r', write=True).close()


def test_state_names_what_does_not_fit(tmp_path):
    net = torch.nn.Linear(2, 2)
    save_state(tmp_path / 's', dict(net.named_parameters()))
    with pytest.raises(ValueError, match='does not fit'):
        load_state(tmp_path / 's', dict(torch.nn.Linear(3, 2).named_parameters()))
    (tmp_path / 's/weights.safetensors').write_bytes(b'junk')
    with pytest.raises(ValueError, match='cannot be read'):
        load_state(tmp_path / 's', dict(net.named_parameters()))


# the best


class Figures(Callback):
    "Writes a number of its own in each epoch's record."

    def __init__(self, name, values):
        self.name, self.values = name, values

    def after_epoch(self, trainer, record):
        record['tasks']['red'][self.name] = self.values[record['epoch']]


@pytest.mark.parametrize(
    'figure, sign, average',
    some([('reward', 1.0, 0.0), ('-reward_std', -1.0, 0.5)], [('-reward_std', -1.0, 0.5)]),
)
def test_the_best_checkpoint_outlives_newer_ones_and_its_weights_are_written(figure, sign, average, tmp_path):
    "Stopped and resumed; the best is known an epoch later, changes, and is not the last."
    epochs, (folder, name) = EachEpoch(), (tmp_path / 'r', figure.removeprefix('-'))
    for until, best in ((3, 2), (5, 3)):
        with (
            Run.open(folder, write=True)
            if folder.exists()
            else Run.create(folder, dict(keep_best=figure)) as run
        ):
            values = [
                sign * v for v in (9.0, 1.0, 5.0, 7.0, 3.0)
            ]  # after so many epochs; of 0 nothing is kept
            t = trainer(
                [Figures(name, values), Recorder(run, PROMPTS, every=1, keep=1), epochs],
                ema_decay=average,
                epochs=until,
                train_steps=1,
                lr=3e-2,
            )
            resume(t, run)
            t.fit()
        assert run.best() == (folder / f'checkpoints/epoch_{best:04d}', values[best])
        assert [p.name for p in run.checkpoints()] == [f'epoch_{e:04d}' for e in (best, until)]
        then = epochs.seen[best][0]
        with t.policy.swapped([then['average/' * bool(average) + n] for n in t.policy.named_parameters()]):
            t.policy.save(tmp_path / f'best {best}')
        written, expected = (
            load_file(at / 'pytorch_lora_weights.safetensors')
            for at in (folder / 'best', tmp_path / f'best {best}')
        )
        assert same(written, expected)
        note = (folder / 'best/README.md').read_text()
        assert f'the weights after {best} of the epochs' in note and name in note
    t = trainer([], ema_decay=average)
    assert load_state(run.best()[0], named_state(t))['epoch'] == 3 and same(copied(named_state(t)), then)


def test_a_kill_while_old_ones_are_deleted_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    "Deleting stops at the first file; the next checkpoint sweeps up."
    weight = torch.nn.Parameter(torch.zeros(2))
    save = lambda run, epoch: run.checkpoint(epoch, dict(weight=weight), None, dict(epoch=epoch))
    with Run.create(tmp_path / 'r', {}) as run:
        for epoch in (1, 2):
            save(run, epoch)

        def killed(path):
            next(path.iterdir()).unlink()
            raise KeyboardInterrupt

        monkeypatch.setattr(shutil, 'rmtree', killed)
        with pytest.raises(KeyboardInterrupt):
            save(run, 3)
        monkeypatch.undo()
        assert [p.name for p in run.checkpoints()] == ['epoch_0002', 'epoch_0003'] and all(
            len(list(p.iterdir())) == 3 for p in run.checkpoints()
        )
        save(run, 4)
        assert sorted(p.name for p in (run.folder / 'checkpoints').iterdir()) == ['epoch_0003', 'epoch_0004']
        (run.folder / 'checkpoints/epoch_10000').mkdir()
        assert [p.name for p in run.checkpoints()][-1] == 'epoch_10000'  # by number, not by letters


def test_what_is_the_best_of_the_metrics():
    from drl_toolkit.runs.metrics import merits

    rows = [
        {'epoch': 0, 'task': 'a', 'reward': 1.0},
        {'epoch': 0, 'task': 'b', 'reward': 3.0},
        {'epoch': 1, 'task': 'a', 'reward': None, 'parity': 0.5},
        {'epoch': 1, 'task': None, 'watch/watched': 0.2, 'seconds': 1.0},
    ]
    assert (
        merits(rows, 'reward') == {0: 2.0}
        and merits(rows, '-parity') == {1: -0.5}
        and merits(rows, 'watch/watched') == {2: 0.2}
        and merits(rows, 'nothing') == {}
    )


# what killed processes leave, and what is vouched for


def test_a_kill_while_a_run_is_made_leaves_a_folder_that_opens_again(tmp_path):
    folder = tmp_path / 'r'
    folder.mkdir()
    for name in ('lock', '.config.json.part', '.probe17', '.control.12.345'):
        (folder / name).write_text('{"sch')
    Run.create(folder, {}).close()
    assert sorted(os.listdir(folder)) == ['config.json', 'lock']
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/.config.json.part').write_text('')
    (tmp_path / 'other/.profile').write_text('')
    with pytest.raises(RunError, match='not empty'):
        Run.create(tmp_path / 'other', {})


def test_leftovers_are_cleared_and_what_was_being_replaced_comes_back(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(2))
    with Run.create(tmp_path / 'r', {}) as run:
        run.checkpoint(3, dict(weight=weight), None, dict(epoch=3))
    here = run.folder
    for name in (
        'frames/.epoch_0002.part',
        'checkpoints/.epoch_0002.gone',
        'checkpoints/.epoch_0001.old',
        '.best.part',
    ):
        (here / name).mkdir(parents=True)
        (here / name / 'file').write_text('half')
    for name in ('samples/.epoch_0001.png.part', '.control.1.2', '.probe3', '.config.json.part', '.mine'):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text('half')
    (here / 'checkpoints/epoch_0003').rename(
        here / 'checkpoints/.epoch_0003.old'
    )  # killed between two renames
    (here / '.weights.old').mkdir()
    (here / '.weights.old/policy.json').write_text('{}')
    Run.open(here).metrics()
    assert (here / '.probe3').exists()  # readers clear nothing
    Run.open(here, write=True).close()
    assert sorted(p.relative_to(here).as_posix() for p in here.rglob('*') if p.is_file()) == [
        '.mine',
        'checkpoints/epoch_0003/manifest.json',
        'checkpoints/epoch_0003/state.json',
        'checkpoints/epoch_0003/weights.safetensors',
        'config.json',
        'lock',
        'weights/policy.json',
    ]


def test_every_flipped_bit_of_a_checkpoint_is_noticed_and_an_older_one_is_taken(tmp_path, capsys):
    with Run.create(tmp_path / 'r', {}) as run:
        trainer([Recorder(run, PROMPTS)]).fit()
    newest, before = run.checkpoints()[-1], run.checkpoints()[-2]
    rng = random.Random(0)
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        for _ in range(6):
            data, at = bytearray(whole), rng.randrange(len(whole))
            data[at] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
            if file.name == 'manifest.json' and json.loads(whole) == _json_or_none(data):
                continue  # a blank in the place of another
            t = trainer([])
            assert resume(t, run) == 2
            said = capsys.readouterr().out
            assert str(newest) in said and f'going on from {before.name}' in said and said.count('\n') == 1
        file.write_bytes(whole)
    t = trainer([])
    assert resume(t, run) == 3
    weights = before / 'weights.safetensors'
    (newest / 'weights.safetensors').write_bytes(weights.read_bytes())  # of another epoch
    assert resume(trainer([]), run) == 2
    weights.write_bytes(b'')
    for older in run.checkpoints()[:-2]:
        shutil.rmtree(older)
    with pytest.raises(RunError, match='begins again') as e:
        resume(trainer([]), run)
    assert str(newest) in str(e.value) and str(before) in str(e.value)


def _json_or_none(data):
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_weights_that_are_no_numbers_are_refused_though_vouched_for(tmp_path):
    from safetensors.torch import load_file, save_file
    from drl_toolkit.utils.files import Damaged, write_manifest

    net = torch.nn.Linear(2, 2)
    save_state(tmp_path / 's', dict(net.named_parameters()))
    save_file(
        {k: v * float('nan') for k, v in load_file(tmp_path / 's/weights.safetensors').items()},
        tmp_path / 's/weights.safetensors',
    )
    write_manifest(tmp_path / 's')
    with pytest.raises(Damaged, match='not finite'):
        load_state(tmp_path / 's', dict(net.named_parameters()))
    assert net.weight.isfinite().all()


def test_final_weights_are_vouched_for(tmp_path):
    from drl_toolkit.runs.models import open_policy

    with Run.create(tmp_path / 'r', {}) as run:
        trainer([Recorder(run, PROMPTS)], epochs=1).fit()
    file = next((run.folder / 'weights').rglob('*.safetensors'))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(RunError, match='SHA-256'):
        open_policy(run.folder)


def test_files_have_the_mode_that_a_new_file_has(tmp_path):
    before = os.umask(0o027)
    try:
        with Run.create(tmp_path / 'r', {}) as run:
            trainer([Recorder(run, PROMPTS)], epochs=1).fit()
        for train in ('lora', 'full'):
            Policy(tiny_sd(), num_steps=3, train=train).save(tmp_path / 'alone' / train)
    finally:
        os.umask(before)
    for folder in (run.folder, tmp_path / 'alone'):
        assert {p.stat().st_mode & 0o777 for p in folder.rglob('*') if p.is_file()} == {0o640}


def test_a_lost_record_comes_back_from_the_checkpoint(tmp_path):
    "A kill between the checkpoint and the line, or a damaged line."
    with Run.create(tmp_path / 'r', {}) as run:
        trainer([Recorder(run, PROMPTS)]).fit()
    rows, lines = [*run.metrics()], (run.folder / 'metrics.jsonl').read_bytes().splitlines(True)
    for kept in (lines[:-2], lines[:1] + [b'junk\n'] + lines[2:]):
        (run.folder / 'metrics.jsonl').write_bytes(b''.join(kept))
        with Run.open(run.folder, write=True) as again:
            resume(trainer([]), again)
        assert [*run.metrics()] == rows


def test_a_state_too_large_to_wait_for_is_written_from_a_copy(tmp_path, monkeypatch):
    "Each checkpoint has the weights and moments of its epoch, though they changed while it was written."
    monkeypatch.setattr('drl_toolkit.runs.run.DIRECT', 0)
    plain, changed, epochs = state.save_file, [], EachEpoch()

    def slow(tensors, file):
        end, before = time.monotonic() + 30, copied(named_state(t))
        while t.epoch < 4 and same(before, copied(named_state(t))) and time.monotonic() < end:
            time.sleep(0.01)  # until the training has gone on
        changed.append(not same(before, copied(named_state(t))))
        plain(tensors, file)

    monkeypatch.setattr(state, 'save_file', slow)
    with Run.create(tmp_path / 'r', {}) as run:
        t = trainer([Recorder(run, PROMPTS, keep=9), epochs], epochs=4, num_minibatches=2)
        t.fit()
    assert any(changed) and [p.name for p in run.checkpoints()] == [f'epoch_{e:04d}' for e in (1, 2, 3, 4)]
    for checkpoint, (weights, moments) in zip(run.checkpoints(), epochs.seen.values()):
        saved, saved_moments, _ = read_state(checkpoint)
        assert same(saved, weights) and same(saved_moments, moments) and moments


def test_an_error_beside_the_training_ends_it_in_one_line(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, 'No space left on device')

    with Run.create(tmp_path / 'r', {}) as run:
        t = trainer([Recorder(run, PROMPTS)])
        monkeypatch.setattr(os, 'fsync', full)
        with pytest.raises(OSError, match='No space left') as e:
            t.fit()
        assert str(tmp_path) in str(e.value)  # it names the path
        monkeypatch.undo()
    assert resume(trainer([]), run) >= 0


# the folder goes away, the lock is deleted, links


@pytest.mark.parametrize(
    'harm',
    [
        shutil.rmtree,
        lambda f: f.rename(f.with_name('moved')),
        lambda f: (f.rename(f.with_name('moved')), f.mkdir(), (f / 'config.json').write_text('{}')),
    ],
)
def test_a_run_that_vanishes_is_noticed_at_once(harm, tmp_path):
    class Vanish(Callback):
        def after_epoch(self, t, record):
            harm(tmp_path / 'r')

    with pytest.raises(RunError, match='is gone|another folder') as e, Run.create(tmp_path / 'r', {}) as run:
        t = trainer([Recorder(run, PROMPTS), Vanish()], epochs=9)
        t.fit()
    assert t.epoch == 1 and '\n' not in str(e.value)
    assert not (tmp_path / 'r').exists() or os.listdir(tmp_path / 'r') == ['config.json']


def test_a_deleted_lock_lets_nobody_in(tmp_path):
    with Run.create(tmp_path / 'r', {}):
        (tmp_path / 'r/lock').unlink()
        assert Run.open(tmp_path / 'r').alive
        with pytest.raises(RunError, match='another process'):
            Run.open(tmp_path / 'r', write=True)
    assert not Run.open(tmp_path / 'r').alive


@pytest.mark.parametrize(
    'name', ['metrics.jsonl', 'lock', 'control.json', 'samples', 'checkpoints', 'frames', 'config.json']
)
def test_nothing_is_read_or_written_through_a_link(name, tmp_path):
    outside = tmp_path / 'outside'
    outside.mkdir()
    (outside / 'file').write_text('no line')
    with Run.create(tmp_path / 'r', {}) as run:
        trainer([Recorder(run, PROMPTS)], epochs=1).fit()
    (tmp_path / 'r' / name).rename(tmp_path / 'old') if (tmp_path / 'r' / name).exists() else None
    folder = name in ('samples', 'checkpoints', 'frames')
    (tmp_path / 'r' / name).symlink_to(outside if folder else outside / 'file')
    try:
        with Run.open(tmp_path / 'r', write=True) as run:
            t = trainer([FrameRecorder(run), Recorder(run, PROMPTS), ControlCallback(run)], epochs=2)
            resume(t, run)
            t.fit()
    except (RunError, OSError) as e:
        assert 'is a link' in str(e) and '\n' not in str(e)
    else:
        assert (
            name == 'control.json' and not (tmp_path / 'r/control.json').is_symlink()
        )  # replaced, not followed
    assert os.listdir(outside) == ['file'] and (outside / 'file').read_text() == 'no line'


# the last good one


def test_the_last_good_checkpoint_outlives_a_ruin(tmp_path):
    "From the third epoch on nothing but noise is left; without any option the best by the reward stays."
    weight = torch.nn.Parameter(torch.zeros(2))
    with Run.create(tmp_path / 'r', {}) as run:
        for epoch, reward in enumerate(
            (0.1, 0.2, 0.5, -3.0, -3.0, -3.0, -3.0, -3.0)
        ):  # of the weights after so many epochs
            run.log(
                dict(
                    epoch=epoch,
                    tasks=dict(
                        a=dict(reward=reward, reward_std=0.1), b=dict(reward=100 * reward, reward_std=10.0)
                    ),
                )
            )
            run.checkpoint(epoch + 1, dict(weight=weight), None, dict(epoch=epoch + 1))
    assert [p.name for p in run.checkpoints()] == [
        'epoch_0002',
        'epoch_0007',
        'epoch_0008',
    ] and run.best() is None
    assert run.kept()[1] == pytest.approx(((0.5 - 0.1) / 0.1 + (50 - 10) / 10) / 2)


# a reward's own figures


def test_a_figure_never_takes_the_place_of_a_metric(tmp_path):
    """From here or from a remote server: 'epoch' made all metrics unreadable, 'task' too, and 'reward' was
    put in the reward's place."""
    names = ('epoch', 'task', 'reward', 'kl', 'seconds', 'watch/trained', 'share/red', 'plain')
    liar = reward(lambda images, prompts: (images.mean((1, 2, 3)), dict.fromkeys(names, 77.0)), name='liar')
    with Run.create(tmp_path / 'r', {}) as run:
        torch.manual_seed(0)
        t = Trainer(
            Policy(tiny_sd(), num_steps=3),
            [Task('two', PROMPTS, [redness, liar], samples=8), Task('one', PROMPTS, liar, samples=8)],
            TrainConfig(epochs=2, train_steps=1, num_minibatches=1),
            callbacks=[Recorder(run, PROMPTS)],
        )
        t.fit()
    rows = run.metrics()
    assert not rows.damaged and {(r['epoch'], r['task']) for r in rows} == {
        (e, task) for e in (0, 1) for task in ('two', 'one', None)
    }
    for row in rows:
        wrong = {k for k, v in row.items() if v == 77.0}
        assert (
            wrong
            == {
                None: set(),
                'one': {'plain', *(f'figure/{n}' for n in names[:-1])},
                'two': {'liar/plain', *(f'liar/figure/{n}' for n in names[:-1])},
            }[row['task']]
        )


def test_advice_is_not_given_again_after_a_resume(tmp_path):
    from drl_toolkit.training.diagnostics import Diagnostics

    flat = reward(lambda images, prompts: torch.zeros(len(images)), name='flat')

    def fit(folder, epochs, open_):
        with open_(folder) as run:
            torch.manual_seed(0)
            t = Trainer(
                Policy(tiny_sd(), num_steps=3),
                [Task('t', PROMPTS, flat, group_size=2, samples=4)],
                TrainConfig(epochs=3, train_steps=1, num_minibatches=1),
                callbacks=[Diagnostics(), Recorder(run, PROMPTS)],
            )
            resume(t, run)
            t.fit(epochs)

    new, again = lambda f: Run.create(f, {}), lambda f: Run.open(f, write=True)
    fit(tmp_path / 'whole', 3, new)
    fit(tmp_path / 'parts', 1, new)
    fit(tmp_path / 'parts', 3, again)
    said = lambda name: [r.get('diagnosis') for r in Run.open(tmp_path / name).metrics() if r['task']]
    assert said('whole') == said('parts') and said('whole')[0] and not any(said('whole')[1:])


def test_a_clock_that_is_set_back_or_forward_changes_nothing(monkeypatch):
    """Durations are read off a clock that only goes forward: `minutes` neither ends a run early nor counts
    negative seconds."""
    clock = iter([0, 1e5, -1e5] * 1000)
    monkeypatch.setattr(time, 'time', lambda: next(clock))
    t = trainer([], minutes=5.0)
    t.fit()
    assert t.epoch == 3 and all(0 < r['seconds'] < 60 for r in t.history)


def test_a_copy_for_others_follows_no_link(tmp_path):
    from drl_toolkit.runs.recordings import slim_copy

    (tmp_path / 'secret').write_text('mine')
    with Run.create(tmp_path / 'r', {}) as run:
        run.log(dict(epoch=0, tasks={}, seconds=1.0))
    (run.folder / 'samples').mkdir()
    for name in ('samples/a.png', 'notes.txt'):
        (run.folder / name).symlink_to(tmp_path / 'secret')
    slim_copy(run.folder, tmp_path / 'copy')
    assert sorted(p.relative_to(tmp_path / 'copy').as_posix() for p in (tmp_path / 'copy').rglob('*')) == [
        'config.json',
        'metrics.jsonl',
        'samples',
    ]


def test_a_rule_that_is_no_name_is_no_rule(tmp_path):
    with Run.create(tmp_path / 'r', dict(keep_best=5)) as run:
        run.log(dict(epoch=1, tasks=dict(t=dict(reward=1.0))))
        run.checkpoint(1, dict(weight=torch.nn.Parameter(torch.zeros(2))), None, dict(epoch=1))
    assert run.best() is None and run.kept()[0].name == 'epoch_0001'
