"""One run in 1, 2 and 3 real processes (gloo): the same weights, the same figures, and nobody waits for the dead.

This file is also what is run in them: `python tests/distributed/test_processes.py FOLDER` imports everything once,
forks all crews one after the other, and leaves what they found in FOLDER."""

import fcntl, hashlib, json, os, signal, socket, subprocess, sys, time
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it is not found by pytest

import pytest, torch
from safetensors.torch import load_file, save_file

from drl_toolkit.algorithms import advantages

from drl_toolkit.cli import main as cli
from drl_toolkit.algorithms.reward_gradients import DRaFTLV
from drl_toolkit.algorithms.branching import BranchSampler
from drl_toolkit.emoji.rewards import fairness
from drl_toolkit.algorithms.multi_task import PCGrad
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.distributed.processes import Processes, ProcessError, rank_slice
from drl_toolkit.prompts.task import Task
from drl_toolkit.rewards.reward import reward
from drl_toolkit.runs.run import Run
from drl_toolkit.runs.recorder import Recorder, resume
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.callbacks import Callback, StopTraining
from drl_toolkit.training.config import TrainConfig
from drl_toolkit.emoji.world import load_demo
from tiers import some

PROMPTS, EPOCHS = ['a cat', 'a dog', 'a key'], 2


@reward
def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@reward
def warmth(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2)), dict(brightness=images.mean().item())


def pictures(count, seed):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed)), ['a cat'] * count


def red(samples=11, **more):
    return Task('red', PROMPTS, redness, samples=samples, **more)  # 11: no number of processes divides them


@cache
def policy_of(job, train):
    """Each job trains one of its own; `main` makes them all before it forks, which spares the crews most of
    their time."""
    return (
        Policy(load_demo(), num_steps=3) if job == 'fairness' else Policy(tiny_sd(), num_steps=4, train=train)
    )


def trainer(job, tasks=None, train='lora', callbacks=(), **more):
    own = {k: more.pop(k) for k in ('sampler', 'strategy', 'objective') if k in more}
    told = (
        dict(
            epochs=EPOCHS,
            lr=1e-3,
            train_steps=2,
            num_minibatches=2,
            warmup=0,
            micro_batch=16,
            measure_every=1,
        )
        | more
    )
    return Trainer(
        policy_of(job, train),
        tasks or [red()],
        TrainConfig(**told),
        data=pictures,
        callbacks=list(callbacks),
        **own,
    )


CASES = {
    'ppo, lora': lambda job: trainer(job),
    'ppo, full': lambda job: trainer(
        job, train='full', kl_weight=0.1, kl_target=0.5, ema_decay=0.5, data_weight=0.5, data_batch=5
    ),
    'matching, full': lambda job: trainer(
        job,
        train='full',
        likelihood='matching',
        kl_weight=0.1,
        data_weight=0.5,
        data_mode='joined',
        data_batch=5,
    ),
    'b2': lambda job: trainer(
        job,
        [
            Task(
                'warm',
                PROMPTS,
                warmth,
                group_size=4,
                samples=12,
                advantage=advantages.Contrastive(high=0.2, low=-0.2),
            )
        ],
        train_steps=0,
        sampler=BranchSampler(first=0.5),
    ),
    'joint': lambda job: trainer(
        job,
        [
            red(),
            Task(
                'warm',
                PROMPTS,
                [warmth, redness],
                group_size=4,
                samples=8,
                advantage=advantages.leave_one_out,
            ),
        ],
        strategy=PCGrad(),
    ),  # two groups: the third process has none
    'fairness': lambda job: trainer(
        job,
        [
            Task(
                'tones',
                ['a portrait of a doctor'],
                fairness,
                group_size=4,
                samples=12,
                advantage=advantages.centred,
            )
        ],
        train_steps=1,
        num_minibatches=1,
    ),
    'draft_lv': lambda job: trainer(job, objective=DRaFTLV(repeats=2)),
    'kept graphs': lambda job: trainer(job, num_minibatches=1, measure_every=0, reuse_graphs=True),
}
CREWS = some(
    [(n, name) for n in (2, 3) for name in CASES],  # in the short form only joint training runs in both
    [
        *((2, name) for name in ('ppo, full', 'b2', 'joint', 'draft_lv', 'kept graphs')),
        *((3, name) for name in ('ppo, lora', 'matching, full', 'joint', 'fairness')),
    ],
)


def weights(t):
    return {
        n: p.detach().clone(memory_format=torch.contiguous_format)
        for n, p in t.policy.named_parameters().items()
    } | {f'average/{i}': a.contiguous() for i, a in enumerate(t.ema or [])}


def equal(folder, name):
    "Train one case; keep the weights, and what they were after every epoch."
    t, digests = CASES[name](name), []
    before, whole = weights(t), t.train_epoch

    def train_epoch():
        record = whole()
        digests.append(hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in t.params)).hexdigest())
        return record

    t.train_epoch = train_epoch
    t.fit()
    save_file(
        {k: (v - before.get(k, 0)).contiguous() for k, v in weights(t).items()}, folder / 'moved.safetensors'
    )
    return dict(digests=digests, history=t.history, count=t.processes.count)


def half(folder):
    "A run's first epoch, with a checkpoint."
    main = Processes.launched().main
    run = Run.create(folder / '../../half', {}) if main else None
    t = trainer(
        'half', train='full', ema_decay=0.5, callbacks=[Recorder(run, PROMPTS[:1], every=1)] if main else []
    )
    t.fit(1)
    return dict(epoch=t.epoch)


def rest(folder):
    "Go on with it; only the main process reads."
    t = trainer('rest', train='full', ema_decay=0.5)
    if t.processes.main:
        resume(t, Run.open(folder / '../../half'))
    t.fit(2)
    save_file(weights(t), folder / 'moved.safetensors')
    return dict(epoch=t.epoch)


def whole(folder):
    t = trainer('whole', train='full', ema_decay=0.5)
    t.fit(2)
    save_file(weights(t), folder / 'moved.safetensors')
    return dict(epoch=t.epoch)


class Stop(Callback):
    def after_epoch(self, trainer, record):
        raise StopTraining('enough')


class Full(Callback):
    def after_epoch(self, trainer, record):
        raise OSError('no space left on device')


def only(rank, act):
    "A reward at which one process does something else."

    def judge(images, prompts):
        if int(os.environ.get('RANK', 0)) == rank:
            act()
        return images.mean((1, 2, 3))

    return [Task('judged', PROMPTS, judge, samples=6)]


def refuse():
    raise ValueError('reward judge: it is broken')


def told(t):
    "How a run ended, in words."
    began = time.time()
    try:
        t.fit()
    except Exception as e:
        return dict(error=f'{type(e).__name__}: {e}', seconds=time.time() - began)
    return dict(epochs=t.epoch)


def spoilt(rank):
    "In the second epoch, and again from the fourth on, one process has a sample whose loss is NaN."
    t = trainer('bad sample', [red(5)], epochs=9, num_minibatches=1)
    loss = t.objective.loss

    def bad(run, rows):
        output = loss(run, rows)
        spoilt = t.processes.rank == rank and (t.epoch == 1 or t.epoch > 2) and (rows['sample'] == 0).any()
        return output._replace(loss=output.loss * float('nan')) if spoilt else output

    t.objective.loss = bad
    return told(t) | dict(
        epochs=t.epoch,
        skipped=[r['tasks']['red']['skipped_steps'] for r in t.history],
        weights=hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in t.params)).hexdigest(),
    )


ENDS = {
    'bad sample': lambda: spoilt(1),
    'stop': lambda: told(trainer('stop', callbacks=[Stop()])),
    'clock': lambda: told(trainer('clock', minutes=1e-4)),
    'broken reward': lambda: told(trainer('broken reward', only(1, refuse))),
    'disk full': lambda: told(trainer('disk full', callbacks=[Full()])),
    'killed': lambda: told(trainer('killed', only(1, lambda: os.kill(os.getpid(), 9)))),
}


def unheard(stopped):
    """The second process does not come to a call: it is stopped, or busy.

    What the first one says after six seconds."""
    p = Processes.launched(minutes=0.1)
    pids = p.all_gather_object(os.getpid())
    if p.main:
        try:
            p.all_gather_object('here')
        except ProcessError as e:
            error = str(e)
        if stopped:
            os.kill(pids[1], signal.SIGCONT)
        os._exit(0 if (Path(sys.argv[1]) / f'unheard {stopped}').write_text(error) else 1)
    os.kill(os.getpid(), signal.SIGSTOP) if stopped else time.sleep(15)
    os._exit(0)


def work(folder, jobs, rank, count, port):
    "One process of a crew."
    os.environ |= dict(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    for name, job in jobs.items():
        here = folder / f'{count} {rank}' / name
        here.mkdir(parents=True)
        (here / 'told.json').write_text(json.dumps(job(here)))
    Processes.launched().close()


def crew(folder, jobs, count):
    "Fork them, and wait for all."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(count):
        if not (child := os.fork()):
            status = 1
            try:
                work(folder, jobs, rank, count, port)
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(folder):
    torch.set_num_threads(1)
    for job in (*CASES, *ENDS):
        policy_of(job, 'full' if job.endswith('full') and job in CASES else 'lora')
    for job in ('half', 'rest', 'whole'):
        policy_of(job, 'full')
    ends = {name: lambda here, end=end: end() for name, end in ENDS.items()}
    for count in (1, 2, 3):
        jobs = {
            name: lambda here, name=name: equal(here, name)
            for name in CASES
            if count == 1 or (count, name) in CREWS
        }
        jobs |= {1: dict(whole=whole), 2: dict(half=half) | ends, 3: dict(rest=rest)}[count]
        found = crew(folder, jobs, count)
        assert found == ([0, -9] if count == 2 else [0] * count), (count, found)  # the last end is a kill
    for stopped in some((True, False), [True]):
        assert crew(folder, {f'unheard {stopped}': lambda here, stopped=stopped: unheard(stopped)}, 2) == [
            0,
            0,
        ]


if __name__ == '__main__':
    main(Path(sys.argv[1]))
    sys.exit()


def all_crews(file, factory, timeout):
    """Run a test file's `main` in a process of its own, which forks its crews; the folder, with what they
    left. Of several pytest workers the first one does it, the others wait."""
    top = factory.getbasetemp()
    folder = (top.parent if 'PYTEST_XDIST_WORKER' in os.environ else top) / Path(file).stem
    folder.mkdir(exist_ok=True)
    with open(folder / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / 'done').exists():
            done = subprocess.run(
                [sys.executable, file, folder],
                capture_output=True,
                text=True,
                timeout=timeout,
                env=os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1'),
            )
            assert done.returncode == 0, done.stderr[-3000:]
            (folder / 'done').touch()
    return folder


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    return all_crews(__file__, tmp_path_factory, timeout=900)


def read(folder, count, rank, name):
    return json.loads((folder / f'{count} {rank}' / name / 'told.json').read_text())


def moved(folder, count, rank, name):
    return load_file(folder / f'{count} {rank}' / name / 'moved.safetensors')


def apart(a, b):  # relative distance
    flat = lambda d: torch.cat([d[k].flatten().double() for k in sorted(d)])
    return ((flat(a) - flat(b)).norm() / flat(b).norm()).item()


@pytest.mark.parametrize('count, name', CREWS)
def test_many_processes_make_the_weights_of_one(found, count, name):
    one = moved(found, 1, 0, name)
    distance = apart(moved(found, count, 0, name), one)
    print(f'{name}, {count} processes: {distance:.1e} of the way apart')
    assert (
        read(found, count, 0, name)['count'] == count
        and sum(v.norm() for v in one.values()) > 0
        and distance < TOLERANCE
    )
    for rank in range(1, count):
        assert (
            read(found, count, rank, name)['digests'] == read(found, count, 0, name)['digests']
            and len(read(found, count, 0, name)['digests']) == EPOCHS
        )


# of the way; 6e-4 at most were seen. Adam divides a gradient by its own size, so that rounding shows where it
# is tiny
TOLERANCE = 5e-3

TIMES = ('seconds', 'cpu_seconds')


@pytest.mark.parametrize('count, name', CREWS)
def test_the_figures_are_of_all_samples(found, count, name):
    """Before the first update to rounding: means over samples, over groups, over rows, extremes, and what the
    two halves of the gradient say."""
    one, many = (read(found, n, 0, name)['history'][0] for n in (1, count))
    assert (
        one.keys() == many.keys()
        and one['tasks'].keys() == many['tasks'].keys()
        and one['nfe'] == many['nfe']
    )
    for task in one['tasks']:
        a, b = one['tasks'][task], many['tasks'][task]
        assert a.keys() == b.keys()
        for k in a:
            assert a[k] == (b[k] if isinstance(a[k], str) else pytest.approx(b[k], rel=2e-2, abs=1e-4)), k


@pytest.mark.parametrize('rank', range(3))
def test_a_run_is_resumed_with_another_number_of_processes(found, rank):
    assert read(found, 3, rank, 'rest')['epoch'] == 2
    assert apart(moved(found, 3, rank, 'rest'), moved(found, 1, 0, 'whole')) < 1e-4


@pytest.mark.parametrize('rank', [0, 1])
def test_the_main_process_decides_when_to_stop(found, rank):
    assert read(found, 2, rank, 'stop') == read(found, 2, rank, 'clock') == dict(epochs=1)


def test_what_fails_in_one_ends_all_with_its_message(found):
    assert read(found, 2, 1, 'broken reward')['error'] == 'ValueError: reward judge: it is broken'
    assert (
        read(found, 2, 0, 'broken reward')['error']
        == 'ProcessError: process 1 of 2 failed with ValueError: reward judge: it is broken'
    )
    assert (
        read(found, 2, 1, 'disk full')['error']
        == 'ProcessError: process 0 of 2 failed with OSError: no space left on device'
    )


def test_all_leave_out_the_same_steps(found):
    one, other = (read(found, 2, rank, 'bad sample') for rank in (0, 1))
    assert (
        one['weights'] == other['weights']
        and one['error'] == other['error']
        and "task 'red', 'a " in one['error']
        and 'in a row' in one['error']
    )
    assert one['epochs'] == other['epochs'] == 6 and one['skipped'] == other['skipped'] == [0, 1, 0, 1, 1, 1]


def test_nobody_waits_for_the_dead(found):
    end = read(found, 2, 0, 'killed')
    assert (
        end['error'].startswith('ProcessError: process 0 of 2 cannot reach another one')
        and end['seconds'] < 60
    )


@pytest.mark.parametrize(
    'stopped, words',
    some(
        [(True, 'process 1 does not run'), (False, 'process 1 is busy with something else')],
        [(True, 'process 1 does not run')],
    ),
)
def test_who_keeps_the_others_waiting_is_named(found, stopped, words):
    told = (found / f'unheard {stopped}').read_text()
    assert told.startswith(words) and told.endswith('process 0 of 2 has waited for 0.1 minutes')


@pytest.mark.parametrize('count', range(1, 9))
def test_shares_are_whole_groups_in_order(count):
    groups = torch.arange(5).repeat_interleave(3)
    shares = [rank_slice(groups, r, count) for r in range(count)]
    assert [i for s in shares for i in s.numbers().tolist()] == list(range(15)) and all(
        s.size % 3 == 0 for s in shares
    )
    assert max(s.size for s in shares) - min(s.size for s in shares) <= 3 and shares[0].size


def test_a_world_that_is_no_number(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', 'two')
    with pytest.raises(ValueError, match="WORLD_SIZE must be a whole number.*got 'two'"):
        Processes.launched()


def test_the_command_under_a_launcher_writes_one_run_that_one_process_goes_on_with(tmp_path):
    tiny_sd().save_pretrained(tmp_path / 'tiny')
    argv = [
        'train',
        'compressibility',
        '--model',
        str(tmp_path / 'tiny'),
        '--num-steps',
        '3',
        '--train-steps',
        '2',
        '--out',
        str(tmp_path / 'run'),
    ]
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc-per-node',
            '2',
            '-m',
            'drl_toolkit.cli.main',
            *argv,
            '--epochs',
            '1',
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1'),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('Each epoch samples 64 images') == done.stdout.count('weights: ') == 1
    assert cli.main([*argv, '--epochs', '2', '--resume']) == 0
    rows = [r for r in Run.open(tmp_path / 'run').metrics() if r['task']]
    assert [r['epoch'] for r in rows] == [0, 1] and rows[0]['ratio_error'] == rows[1]['ratio_error'] == 0


def test_other_commands_are_for_one_process(monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert cli.main(['sample', 'demo', '--prompts', 'p.txt', '--out', 'x']) == 2
    assert 'WORLD_SIZE is 2' in capsys.readouterr().err
