"""Frames: whole or not at all, read while they are written, right to the digit, and without any effect on the
training."""

import json, math, multiprocessing, os, random, signal, time
from threading import Thread
from types import SimpleNamespace

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from drl_toolkit.runs import recordings as F
from drl_toolkit.algorithms.branching import BranchSampler
from drl_toolkit.runs.recordings import FrameRecorder, read_frames, recorded_epochs, save_frames
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.prompts.task import Task
from drl_toolkit.rewards.reward import Reward, Observations
from drl_toolkit.runs.run import Run, find_runs
from drl_toolkit.runs.trackers import Trackers, check_trackers
from drl_toolkit.runs.control import Control, ControlCallback, ask
from drl_toolkit.runs.recorder import Recorder, named_state, resume
from drl_toolkit.runs.folder import RunError
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.callbacks import Callback
from drl_toolkit.training.config import TrainConfig
from tiers import some
from witnesses import onlooker

PROMPTS, NASTY = ['a cat', 'a dog'], 'two "colours", a/b & 50 $ \\ ../x'


def redness(images, prompts):
    red = images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
    return red, {
        'side': Observations((red > red.median()).long(), ('low', 'high')),
        'boxes': Observations([[('blob', 0.5, (0.1, 0.2, 0.6, 0.7))]] * len(images)),
    }


def trainer(callbacks, train='lora', tasks=1, **options):
    torch.manual_seed(0)
    config = TrainConfig(**dict(epochs=3, lr=1e-2, train_steps=2, warmup=0) | options)
    made = [
        Task(NASTY if i else 'red', PROMPTS, Reward(redness), samples=8, group_size=4) for i in range(tasks)
    ]
    return Trainer(
        Policy(tiny_sd(), num_steps=4, train=train),
        made,
        config,
        callbacks=callbacks,
        sampler=BranchSampler(first=0.75, grow=False) if options.get('clip_range') else None,
    )


def note(samples=4, shown=(0, 1), **more):
    return (
        dict(
            prompts=['p'] * samples,
            seeds=list(range(samples)),
            groups=[0] * samples,
            rewards=dict(r=[0.5] * samples),
            advantages=[0.0] * samples,
            categories={},
            split=None,
            shown=list(shown),
            boxes={},
            paths=[],
        )
        | more
    )


def path(steps=3, sample=0):
    return dict(sample=sample, advantage=1.0, **{k: [0] * steps for k in F._STEPS})


def pictures(count, side=16, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture
def run(tmp_path):
    with Run.create(tmp_path / 'run', {}) as run:
        yield run


def write(run, epoch=0, **more):
    return save_frames(
        run, epoch, {'t': note(paths=[path()], **more)}, {'t': (pictures(2), [(pictures(4), pictures(3))])}
    )


RECORDED = [dict(), dict(train='full', kl_weight=0.1), dict(tasks=2, clip_range=1e-3)]


@pytest.mark.parametrize('options', some(RECORDED, RECORDED[2:]))
def test_recording_changes_nothing(options, tmp_path):
    with Run.create(tmp_path / 'r', {}) as run:
        recorder = onlooker(FrameRecorder(run, share=1.0))
        trainer([recorder, Recorder(run, PROMPTS)], **options).fit()
    assert recorded_epochs(run) == [0, 1, 2] and recorder.looked == 2 + 3 * (
        2 * options.get('tasks', 1) + 1
    )  # before and after all, each task twice, each epoch


def test_a_resumed_run_keeps_the_same_frames(tmp_path):
    with Run.create(tmp_path / 'a', {}) as run:
        trainer([FrameRecorder(run, share=99.0), Recorder(run, PROMPTS, every=1)]).fit()
    with Run.create(tmp_path / 'b', {}) as run:
        trainer([FrameRecorder(run, share=99.0), Recorder(run, PROMPTS, every=1)]).fit(epochs=1)
    with Run.open(tmp_path / 'b', write=True) as run:
        t = trainer([FrameRecorder(run, share=99.0), Recorder(run, PROMPTS, every=1)])
        resume(t, run)
        t.fit()
    for epoch in range(3):
        for file in sorted((tmp_path / f'a/frames/epoch_{epoch:04d}').iterdir()):
            assert file.read_bytes() == (tmp_path / f'b/frames/epoch_{epoch:04d}' / file.name).read_bytes(), (
                file
            )


class Witness(Callback):
    "Asks the policy itself, without the recorder's way of asking."

    def __init__(self):
        self.seen = []

    def after_plan(self, trainer, batch, minibatches):
        policy, traj = trainer.policy, batch.trajectory
        cond, count = policy.encode(traj.prompts), policy.num_steps
        with torch.no_grad():
            then = [policy.transition(traj.latents[s], s, cond) for s in range(count)]
        with torch.no_grad(), policy.reference():
            kl = torch.stack([g.kl(policy.transition(traj.latents[s], s, cond)) for s, g in enumerate(then)])
        learnt = torch.zeros(count, len(traj.prompts), dtype=torch.bool)
        for rows in minibatches:
            learnt[rows['step'], rows['sample']] = True
        self.seen.append(dict(batch=batch, kl=kl, learnt=learnt))

    def after_epoch(self, trainer, record):
        policy, traj = trainer.policy, self.seen[-1]['batch'].trajectory
        cond = policy.encode(traj.prompts)
        with torch.no_grad():
            now = torch.stack(
                [
                    policy.transition(traj.latents[s], s, cond).log_prob(traj.latents[s + 1])
                    for s in range(policy.num_steps)
                ]
            )
        self.seen[-1]['ratio'] = (now - traj.log_probs).exp()


@pytest.mark.parametrize('options', [dict(clip_range=1e-4), dict(likelihood='matching')])
def test_numbers_are_those_of_the_policy(run, options):
    witness = Witness()
    t = trainer([FrameRecorder(run, share=1.0, paths=3), witness], epochs=2, **options)
    t.fit()
    for epoch, seen in enumerate(witness.seen):
        task, batch = read_frames(run, epoch).tasks['red'], seen['batch']
        assert len(task.paths) == 3 and task.split == (1 if 'clip_range' in options else None)
        assert (
            task.samples['prompt'].tolist() == batch.trajectory.prompts
            and task.samples['seed'].tolist() == batch.trajectory.seeds
        )
        assert np.allclose(task.samples['redness'], batch.values[0], rtol=1e-4) and np.allclose(
            task.samples['advantage'], batch.advantage, rtol=1e-4
        )
        assert task.samples['side'].tolist() == [
            ('low', 'high')[i] for i in batch.observations['side'].values
        ] and task.categories == {'side': ('low', 'high')}
        ranked = [p.advantage for p in task.paths]
        assert (
            ranked == sorted(ranked, reverse=True)
            and len({task.samples['group'][p.sample] for p in task.paths}) == 1
        )
        for p in task.paths:
            i = p.sample
            assert np.allclose(p.log_prob, batch.trajectory.log_probs[:, i], rtol=1e-4) and np.allclose(
                p.kl, seen['kl'][:, i], rtol=1e-3, atol=1e-6
            )
            assert (
                np.allclose(p.ratio, seen['ratio'][:, i], atol=2e-6)
                and p.trained.tolist() == seen['learnt'][:, i].tolist()
            )
            assert (
                np.allclose(p.noise_std, t.policy.coefficients.std)
                and p.timesteps.tolist() == t.policy.timesteps.tolist()
            )
            clip, far = options.get('clip_range'), p.ratio - 1
            assert (
                p.clipped.tolist()
                == (
                    p.trained & ((far > clip) & (p.advantage > 0) | (far < -clip) & (p.advantage < 0))
                    if clip
                    else np.zeros(4, bool)
                ).tolist()
            )
            assert len(p.noisy) == 5 and len(p.predicted) == 4
            all_of_them = batch.trajectory.images.permute(0, 2, 3, 1).numpy() * 255
            whose = lambda image: np.abs(all_of_them - np.asarray(image)).mean((1, 2, 3)).argmin()
            assert (
                whose(p.noisy[-1]) == whose(task.pictures[i]) == whose(p.predicted[-1]) == i
            )  # the last step has no noise: its image is what was predicted
    assert not options.get('clip_range') or any(
        p.clipped.any() for p in task.paths
    )  # else the test of clips would be of nothing


def test_names_that_are_no_file_names(tmp_path):
    with Run.create(tmp_path / 'r', {}) as run:
        trainer([FrameRecorder(run)], tasks=2, epochs=1).fit()
    task = read_frames(run, 0).tasks[NASTY]
    assert task.pictures and task.paths[0].noisy and sorted(p.name for p in tmp_path.iterdir()) == ['r']


def test_long_paths_keep_some_steps(run):
    torch.manual_seed(0)
    t = Trainer(
        Policy(tiny_sd(), num_steps=9),
        [Task('red', PROMPTS, Reward(redness), samples=4)],
        TrainConfig(epochs=1, train_steps=2),
        callbacks=[FrameRecorder(run, steps=4)],
    )
    t.fit()
    found = read_frames(run, 0).tasks['red'].paths[0]
    assert (
        found.steps.tolist() == [0, 3, 5, 8]
        and len(found.noisy) == 5
        and found.timesteps.tolist() == t.policy.timesteps[found.steps].tolist()
    )


@pytest.mark.parametrize(
    'options', [dict(), dict(surrogate='nft', likelihood='matching'), dict(surrogate='guard')]
)
def test_a_run_without_a_base_says_so(run, options):
    trainer([FrameRecorder(run)], train='full', epochs=1, **options).fit()
    found = read_frames(run, 0).tasks['red'].paths[0]
    assert (
        np.isnan(found.kl).all()
        and np.isfinite(found.ratio).all()
        and (not options or not found.clipped.any())
    )  # guard clips another ratio, nft none


def test_rewards_hand_over_what_they_saw():
    groups, images = torch.tensor([1, 0, 1, 0]), torch.rand(4, 3, 4, 4)
    even = Reward(
        lambda images, prompts: (
            images.mean((1, 2, 3)),
            {'size': 2.0, 'kind': Observations(torch.arange(len(images)), ('a', 'b'))},
        ),
        'even',
        level='group',
    )
    values, metrics, seen = even.evaluate(images, ['p'] * 4, groups)
    assert (
        metrics == {'size': 2.0}
        and seen['kind'].values.tolist() == [0, 0, 1, 1]
        and even.report(images, ['p'] * 4, groups)[1] == metrics
    )
    assert torch.equal(values, images.mean((1, 2, 3))) and (2 * even).evaluate(images, ['p'] * 4, groups)[2][
        'kind'
    ].values.tolist() == [0, 0, 1, 1]


# writing and reading at the same time


def _write_on(folder, first=0):
    run = Run(folder, dict(config={}))
    for epoch in range(first, 10_000):
        write(run, epoch)


def forked(function, *args):
    process = multiprocessing.get_context('fork').Process(target=function, args=args, daemon=True)
    process.start()
    return process


def whole(run, epoch):
    task = read_frames(run, epoch).tasks['t']
    return len(task.pictures) == 2 and len(task.paths[0].noisy) == 4 and len(task.paths[0].predicted) == 3


def test_a_kill_leaves_whole_epochs_only(run):
    for kill in range(8):
        done = len(recorded_epochs(run))
        process = forked(_write_on, run.folder, done)
        until = time.monotonic() + 20
        while len(recorded_epochs(run)) < done + 2 and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(random.Random(kill).random() * 0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert (
            recorded_epochs(run) == [*range(len(recorded_epochs(run)))]
            and len(recorded_epochs(run)) >= done + 2
        )
    assert all(whole(run, e) for e in recorded_epochs(run))


def test_another_process_reads_while_it_is_written(run):
    process, read = forked(_write_on, run.folder), set()
    until = time.monotonic() + 20
    while len(read) < 25 and time.monotonic() < until:
        for epoch in set(recorded_epochs(run)) - read:
            assert whole(run, epoch)
            read.add(epoch)
    process.kill()
    process.join()
    assert len(read) >= 25


def test_an_epoch_that_is_written_again_is_the_new_one(run):
    write(run)
    write(run, shown=[1, 2])
    assert read_frames(run, 0).tasks['t'].shown == [1, 2] and [
        p.name for p in (run.folder / 'frames').iterdir()
    ] == ['epoch_0000']


# junk


def test_junk_beside_the_epochs(run):
    write(run, 3)
    frames = run.folder / 'frames'
    (frames / '.epoch_0004.part').mkdir()
    (frames / 'epoch_four').mkdir()
    (frames / 'notes.txt').write_text('dear')
    (frames / 'epoch_٣٣٣٣').mkdir()
    (frames / 'epoch_0005').write_text('a file')
    (frames / 'epoch_0006').mkdir()
    assert recorded_epochs(run)[0] == 3 and not {4, 3333} & set(recorded_epochs(run)) and whole(run, 3)
    for epoch in (4, 5, 6):
        with pytest.raises(RunError, match=r'epoch'):
            read_frames(run, epoch)
    Run.create(run.folder.parent / 'other', {}).close()
    other = Run.open(run.folder.parent / 'other')
    assert recorded_epochs(other) == []
    (other.folder / 'frames').write_text('a file in place of a folder')
    assert recorded_epochs(other) == []
    with pytest.raises(RunError):
        read_frames(other, 0)


@pytest.mark.parametrize('name', ['0.pictures.webp', '0.path_0.webp'])
@pytest.mark.parametrize(
    'damage',
    [
        lambda f: f.unlink(),
        lambda f: f.write_bytes(b''),
        lambda f: f.write_bytes(f.read_bytes()[:60]),
        lambda f: Image.new('RGB', (31, 17)).save(f, 'WEBP'),
        lambda f: Image.new('RGB', (32, 16)).save(f, 'PNG'),
    ],
)
def test_a_picture_that_is_not_one_is_named(run, name, damage):
    damage(write(run) / name)
    task = read_frames(run, 0).tasks['t']  # the numbers are still there
    with pytest.raises(RunError, match=name):
        task.pictures, task.paths[0].noisy


def test_no_link_leads_out(run, tmp_path):
    secret = tmp_path / 'secret.webp'
    pictures(1)[0].save(secret)
    folder = write(run)
    for name in ('0.pictures.webp', 'frames.json'):
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
        with pytest.raises(RunError, match='leads out'):
            read_frames(run, 0)
    (tmp_path / 'elsewhere').mkdir()
    (run.folder / 'frames').rename(tmp_path / 'elsewhere/frames')
    (run.folder / 'frames').symlink_to(tmp_path / 'elsewhere/frames')
    for look in (lambda: recorded_epochs(run), lambda: read_frames(run, 0)):
        with pytest.raises(RunError, match='leads out'):
            look()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), value=json_values)
def test_whatever_stands_in_the_file_it_is_read_or_refused(data, value, tmp_path_factory):
    run = Run(tmp_path_factory.getbasetemp() / 'fuzz', dict(config={}))
    if not recorded_epochs(run):
        write(
            run,
            boxes={0: [['cat', 0.5, 0, 0, 1, 1]]},
            categories={'tone': dict(names=['a', 'b'], values=[0, 1, -1, 0])},
        )
    told = json.loads((run.folder / 'frames/epoch_0000/frames.json').read_text())
    place = told
    while isinstance(place, (dict, list)) and place:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            place[key] = value
            break
        place = place[key]
    folder = run.folder / 'frames/epoch_0001'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'frames.json').write_text(json.dumps(told))
    try:
        for task in read_frames(run, 1).tasks.values():
            task.samples, task.boxes, task.pictures, [p.noisy for p in task.paths]
    except RunError as e:
        assert 'epoch_0001' in str(e) and '\n' not in str(e)


# size and time


@pytest.mark.parametrize('side', [64, 512])
def test_an_epoch_stays_below_a_megabyte(run, side):
    kept = (
        pictures(16, side),
        [(pictures(13, side), pictures(12, side))] * 2,
    )  # noise: nothing compresses worse
    folder = save_frames(
        run,
        0,
        {f't{i}': note(200, range(16), paths=[path(12)] * 2) for i in range(3)},
        {f't{i}': kept for i in range(3)},
    )
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 1_000_000
    task = read_frames(run, 0).tasks['t2']
    assert len(task.pictures) == 16 and len(task.paths[1].noisy) == 13


class Clock:
    "Time that passes only when it is told to."

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize(
    'epoch, paths, light', [(20.0, 1.1, 0.1), (2.0, 1.1, 0.01), (20.0, 0.05, 0.01), (1.0, 0.1, 1.0)]
)
def test_the_time_it_takes_is_bounded(run, monkeypatch, epoch, paths, light):
    "300 epochs of three tasks whose costs are known."
    clock, t = (
        Clock(),
        SimpleNamespace(
            tasks=[SimpleNamespace(name=n) for n in 'abc'],
            epoch=0,
            history=[],
            config=SimpleNamespace(epochs=300),
            time_used=lambda more: 0,
        ),
    )
    monkeypatch.setattr(F, 'time', clock)
    monkeypatch.setattr(F, 'note_of', lambda *a: {})
    monkeypatch.setattr(F, 'to_pil', lambda images: [])
    kept = []

    def save(run, epoch, *rest):
        clock.now += light
        kept.append(epoch)

    monkeypatch.setattr(F, 'save_frames', save)

    class Costly:
        def __init__(self, *a):
            clock.now += paths / 3

        def notes(self, trainer):
            clock.now += paths / 3
            return []

        def pictures(self, trainer):
            clock.now += paths / 3
            return []

    monkeypatch.setattr(F, 'Followed', Costly)
    recorder, followed = FrameRecorder(run), dict.fromkeys('abc', 0)
    for t.epoch in range(300):
        start = clock.now
        for task in t.tasks:
            clock.now += epoch / 3
            recorder.after_plan(
                t,
                SimpleNamespace(
                    task=task,
                    groups=torch.zeros(4),
                    advantage=torch.arange(4.0),
                    trajectory=SimpleNamespace(images=torch.zeros(4)),
                ),
                [],
            )
        for name in recorder.followed:
            followed[name] += 1
        record = dict(epoch=t.epoch, seconds=clock.now - start)
        recorder.after_epoch(t, record)
        t.history.append(record)
    assert (
        recorder.overhead <= 0.03 + light / (300 * epoch) and kept[0] == 0 and kept[-1] == 299
    )  # the first and the last epoch are in it
    assert (
        math.isclose(recorder.trained, 300 * epoch, rel_tol=1e-6)
        and max(followed.values()) - min(followed.values()) <= 1
    )
    if 3 * paths + light < 0.01 * epoch:
        assert len(kept) == 300 and min(followed.values()) == 300
    if light < 0.01 * epoch:
        assert len(kept) == 300 and min(followed.values()) > 2


def test_wrong_settings_are_named(run):
    for wrong, name in (
        (dict(paths=-1), 'paths'),
        (dict(pictures=0), 'pictures'),
        (dict(share=0), 'share'),
        (dict(steps=1), 'steps'),
        (dict(paths=1.5), 'paths'),
    ):
        with pytest.raises(ValueError, match=f'{name} must be'):
            FrameRecorder(run, **wrong)
    trainer([FrameRecorder(run, paths=0)], epochs=1).fit()
    assert read_frames(run, 0).tasks['red'].paths == []


# runs: found, asked, listened to, tracked


def test_runs_are_found_and_the_broken_ones_named(tmp_path):
    for name in ('good', 'more/b "quoted"', 'torn', 'linked', 'late', 'deep/er/still'):
        Run.create(tmp_path / name, {}).close()
    (tmp_path / 'torn/config.json').write_text('{"sch')
    (tmp_path / 'late/config.json').write_text('{"schema": 99}')
    (tmp_path / 'linked/config.json').unlink()
    (tmp_path / 'linked/config.json').symlink_to(tmp_path / 'good/config.json')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'afile').write_text('')
    (tmp_path / 'tax.json').write_text('{}')
    (tmp_path / '.hidden').mkdir()
    (tmp_path / 'away').symlink_to('/')
    (tmp_path / 'eval').mkdir()
    (tmp_path / 'eval/summary.json').write_text('{}')
    (tmp_path / 'list').mkdir()
    (tmp_path / 'list/config.json').write_text('[' * 100_000)
    found, broken = find_runs(tmp_path)
    assert [r.folder.name for r in found] == ['good', 'b "quoted"']
    assert {os.path.basename(p) for p in broken} == {
        'torn',
        'late',
        'linked',
        'empty',
        'afile',
        'away',
        'list',
    }
    assert [r.folder for r in find_runs(tmp_path / 'good')[0]] == [tmp_path / 'good']
    with pytest.raises(RunError, match='does not exist'):
        find_runs(tmp_path / 'nowhere')


def test_asking_whether_it_is_alive_never_keeps_a_writer_out(tmp_path):
    Run.create(tmp_path / 'r', {}).close()
    reader, stop = Run.open(tmp_path / 'r'), []

    def look():
        while not stop:
            reader.alive

    threads = [Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            Run.open(tmp_path / 'r', write=True).close()
    finally:
        stop.append(1)
        [t.join() for t in threads]
    assert not reader.alive
    with Run.open(tmp_path / 'r', write=True):
        assert reader.alive
    (tmp_path / 'r/lock').unlink()
    assert not reader.alive


class Script(Callback):
    "A person who wants something after some epochs."

    def __init__(self, run, wishes):
        self.run, self.wishes, self.epochs = run, wishes, []

    def after_epoch(self, trainer, record):
        self.epochs.append(trainer.epoch)
        if trainer.epoch in self.wishes:
            ask(self.run.folder, self.wishes[trainer.epoch])


def test_it_stops_where_it_can_go_on(run):
    t = trainer([Recorder(run, PROMPTS, every=99), Script(run, {2: 'stop'}), ControlCallback(run)], epochs=9)
    t.fit()
    assert (
        t.epoch == 2
        and run.checkpoints()[-1].name == 'epoch_0002'
        and list((run.folder / 'weights').glob('*.safetensors'))
    )
    again = trainer([], epochs=9)
    assert resume(again, run) == 2 and all(
        torch.equal(a, named_state(again)[n]) for n, a in named_state(t).items()
    )
    again.callbacks = [ControlCallback(run)]
    again.fit(epochs=3)
    assert again.epoch == 3  # the old wish is forgotten


def test_it_waits_saves_while_it_waits_and_goes_on(run):
    script = Script(run, {1: 'pause'})
    t = trainer([script, ControlCallback(run, every=0.01)], epochs=2)
    thread = Thread(target=t.fit)
    thread.start()
    try:
        until = time.monotonic() + 20
        while not script.epochs and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        ask(run.folder, 'save')
        while Control(run.folder).want != 'pause' and time.monotonic() < until:
            time.sleep(0.01)
        assert script.epochs == [1] and Control(run.folder).want == 'pause' and run.checkpoints()
    finally:
        ask(run.folder, 'run')
        thread.join(30)
    assert script.epochs == [1, 2]


def test_a_wish_that_comes_while_another_is_met_is_not_forgotten(run, monkeypatch):
    "Somebody asks for a stop after the save was done, and before it is crossed out."
    control, replace, others = Control(run.folder), os.replace, []
    control.want = 'save'

    def slowly(*args):
        if not others:
            others.append(Thread(target=ask, args=(run.folder, 'stop')))
            others[0].start()
            others[0].join(0.3)
        replace(*args)

    monkeypatch.setattr('os.replace', slowly)
    control.met('run')
    others[0].join(10)
    assert control.want == 'stop'


@pytest.mark.parametrize(
    'text', ['', '{', '[]', '{"want": 5}', '{"want": "dance"}', '{"want": ["stop"]}', '\udcff']
)
def test_a_wish_that_cannot_be_read_is_none(run, text):
    (run.folder / 'control.json').write_bytes(text.encode('utf-8', 'surrogateescape'))
    assert Control(run.folder).want == 'run'


def test_wishes_are_checked(run, tmp_path):
    with pytest.raises(RunError, match="want must be one of .*; got 'dance'"):
        ask(run.folder, 'dance')
    run.close()
    with pytest.raises(RunError, match='not being trained'):
        ask(run.folder, 'stop')
    with pytest.raises(RunError, match='holds no run'):
        ask(tmp_path, 'stop')


@pytest.mark.parametrize('name', ['tensorboard', 'wandb', 'trackio'])
def test_trackers_get_numbers_and_sheets(run, monkeypatch, name):
    import sys
    from accelerate import tracking

    told = []

    class Fake(tracking.GeneralTracker):
        requires_logging_directory, main_process_only = name == 'tensorboard', False

        def __init__(self, project, logging_dir=None, **options):
            super().__init__()
            told.append(('open', project, options))

        tracker = property(lambda self: self)

        def store_init_configuration(self, values):
            told.append(('config', values))

        def log(self, values, step=None, **k):
            told.append(('log', step, values))

        def log_images(self, values, step=None, **k):
            told.append(('images', step, values))

        def finish(self):
            told.append(('close',))

    Fake.name = name
    monkeypatch.setattr(tracking, '_available_trackers', [tracking.LoggerType(name)])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Fake)
    monkeypatch.setitem(sys.modules, 'trackio', SimpleNamespace(Image=lambda image: image))
    assert check_trackers(f' {name},') == [name]
    trainer([Recorder(run, PROMPTS, every=2), Trackers(run, [name])], epochs=2).fit()
    sheets = [
        (step, values['samples'])
        for kind, step, values in (t for t in told if len(t) == 3 and t[0] != 'open')
        if 'samples' in values
    ]
    numbers = [(t[1], t[2]) for t in told if t[0] == 'log' and 'samples' not in t[2]]
    assert (
        [s for s, _ in sheets] == [0, 2]
        and [s for s, _ in numbers] == [1, 2]
        and told[-1] == ('close',)
        and told[0][:2] == ('open', 'drl_toolkit')
    )
    assert numbers[0][1]['red/reward'] == pytest.approx(run.metrics()[0]['reward']) and all(
        isinstance(v, (int, float)) for v in numbers[0][1].values()
    )


def test_trackers_that_are_not_there_are_refused(monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, '_available_trackers', [])
    with pytest.raises(ValueError, match='pip install wandb'):
        check_trackers('wandb')
    with pytest.raises(ValueError, match="got 'neptune'"):
        check_trackers('neptune')
