"""Sharded weights in 2 and 3 real processes (gloo): the weights of an unsharded run, from a share of its memory.

As in `test_processes.py`, this file is also what is run: `python tests/distributed/test_shards.py FOLDER`."""

import os, subprocess, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it is not found by pytest

import pytest, torch
from safetensors.torch import load_file, save_file

from drl_toolkit.cli import main as cli
from drl_toolkit.algorithms.reward_gradients import DRaFTLV
from drl_toolkit.algorithms.multi_task import PCGrad
from drl_toolkit.sampling.rollout import rollout
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.distributed.processes import Processes
from drl_toolkit.prompts.task import Task
from drl_toolkit.recipes.config import RunConfig
from drl_toolkit.runs.run import Run
from drl_toolkit.runs.recorder import Recorder, named_state, resume
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.config import TrainConfig
from tiers import LONG, long, some
from test_processes import (
    PROMPTS,
    TOLERANCE,
    all_crews,
    apart,
    crew,
    moved,
    only,
    pictures,
    read,
    red,
    redness,
    told,
    warmth,
)


def trainer(tasks=None, callbacks=(), options=None, **more):
    "Sharded where there are several processes."
    own = {k: more.pop(k) for k in ('strategy', 'objective') if k in more}
    fields = (
        dict(
            epochs=2,
            lr=1e-3,
            train_steps=2,
            num_minibatches=2,
            warmup=0,
            micro_batch=16,
            measure_every=1,
            shard=Processes.launched().count > 1,
        )
        | more
    )
    return Trainer(
        Policy(tiny_sd(), num_steps=3, train='full', **(options or {})),
        tasks or [red(7)],
        TrainConfig(**fields),
        data=pictures,
        callbacks=list(callbacks),
        **own,
    )


ALL = dict(kl_weight=0.1, kl_target=0.5, ema_decay=0.5, base_decay=0.1, data_weight=0.5, data_batch=3)
CASES = {'ppo': lambda: trainer(**ALL)}
if LONG:
    CASES |= {
        'joint': lambda: trainer(
            [red(), Task('warm', PROMPTS, [warmth, redness], group_size=3, samples=6)], strategy=PCGrad()
        ),  # two groups: the third process has none
        'matching': lambda: trainer(
            likelihood='matching',
            kl_weight=0.1,
            data_weight=0.5,
            data_mode='joined',
            data_batch=3,
            micro_batch=2,
        ),
        'guided': lambda: trainer(
            options=dict(guidance_scale=3.0, train_unconditional=False, checkpointing=True)
        ),
    }


def weights(t):
    "Whole; all processes take part, the main one has them."
    with t.processes.raise_together():
        return (
            {n: v.detach().clone(memory_format=torch.contiguous_format) for n, v in named_state(t).items()}
            if t.processes.main
            else {}
        )


def keep(folder, t, before=None):
    whole = weights(t)
    folder.mkdir(exist_ok=True)
    if t.processes.main:
        save_file(
            {k: (v - (before or {}).get(k, 0)).contiguous() for k, v in whole.items()},
            folder / 'moved.safetensors',
        )


def equal(folder, name):
    "Train one case; keep how far the weights went, and what of all tensors lies in this process."
    t = CASES[name]()
    before = weights(t)
    t.fit()
    keep(folder, t, before)
    keep(folder / 'after', t)
    held = [
        *t.params,
        *(t.ema or []),
        *(m for s in t.optimizer.state.values() for m in s.values() if m.dim()),
        *(t.policy.base_weights() if t.policy.knows_base else []),
    ]
    with t.processes.raise_together():
        seen = rollout(t.policy, PROMPTS, seed=9).images.flatten()[::997].tolist()
    return dict(
        history=t.history,
        seen=seen,
        bytes=sum(m.nbytes for m in held),
        network=sum(
            p.to_local().nbytes if hasattr(p, 'to_local') else p.nbytes for p in t.policy.network.parameters()
        ),
    )


def half(folder):
    "A run's first epoch, with a checkpoint, a sheet, and the weights in diffusers' format."
    main = Processes.launched().main
    run = Run.create(folder / 'run', {}) if main else None
    t = trainer(**ALL, callbacks=[Recorder(run, PROMPTS, every=1)] if main else [])
    t.fit(1)
    with t.processes.raise_together():
        sheet = rollout(t.policy, PROMPTS, seed=5).images.double().mean((1, 2, 3)).tolist() if main else None
    return dict(epoch=t.epoch, sheet=sheet)


def rest(folder, of):
    "Go on with it to the second epoch; only the main process reads."
    t = trainer(**ALL)
    with t.processes.raise_together():
        if t.processes.main:
            resume(t, Run.open(folder / '../..' / of / 'half' / 'run'))
    t.fit(2)
    keep(folder, t)
    return dict(epoch=t.epoch)


def refused():
    try:
        trainer(objective=DRaFTLV())
    except ValueError as e:
        return dict(error=str(e))


def refuse():
    raise ValueError('reward judge: it is broken')


def spoilt():
    "In the second epoch the last process has a sample whose loss is NaN."
    t = trainer(num_minibatches=1)
    loss, last = t.objective.loss, t.processes.rank == t.processes.count - 1

    def bad(run, rows):
        output = loss(run, rows)
        spoilt = last and t.epoch == 1 and (rows['sample'] == 0).any()
        return output._replace(loss=output.loss * (float('nan') if spoilt else 1))

    t.objective.loss = bad
    return told(t) | dict(skipped=[r['tasks']['red']['skipped_steps'] for r in t.history])


ENDS = {
    'bad sample': spoilt,
    'refused': refused,
    'broken reward': lambda: told(trainer(only(1, refuse))),
    'killed': lambda: told(trainer(only(1, lambda: os.kill(os.getpid(), 9)))),
}

RESUMED = some(
    ['one goes on', 'sharded goes on', 'sharded goes on with one'], ['one goes on', 'sharded goes on']
)


def main(folder):
    torch.set_num_threads(1)
    cases = {name: lambda here, name=name: equal(here, name) for name in CASES}
    goes_on = {
        name: lambda here, of=of: rest(here, of)
        for name, of in (('sharded goes on', '2 0'), ('sharded goes on with one', '1 0'))
        if name in RESUMED
    }
    ends = {name: lambda here, end=end: end() for name, end in ENDS.items()}
    crews = [
        (1, cases | dict(half=half)),
        (2, cases | dict(half=half) | goes_on | ends),
        (1, {'one goes on': lambda here: rest(here, '2 0')}),
    ]
    if LONG:
        crews.append((3, dict(joint=cases['joint'])))
    found = [crew(folder, jobs, count) for count, jobs in crews]
    assert found == [[0], [0, -9], [0], [0] * 3][: len(crews)], found  # the last end is a kill


if __name__ == '__main__':
    main(Path(sys.argv[1]))
    sys.exit()


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    return all_crews(__file__, tmp_path_factory, timeout=600)


@pytest.mark.parametrize('count, name', [*((2, n) for n in CASES)] + LONG * [(3, 'joint')])
def test_sharded_weights_are_those_of_one_process(found, count, name):
    one, many = moved(found, 1, 0, name), moved(found, count, 0, name)
    distance = apart(many, one)
    print(f'{name}, {count} processes: {distance:.1e} of the way apart')
    assert many.keys() == one.keys() and sum(v.norm() for v in one.values()) > 0 and distance < TOLERANCE
    assert all(
        read(found, count, rank, name)['seen'] == read(found, count, 0, name)['seen']
        for rank in range(1, count)
    )  # every process puts the same weights together
    first, other = (read(found, n, 0, name)['history'][0]['tasks'] for n in (1, count))
    for task in first:
        assert first[task].keys() == other[task].keys()
        for k, v in first[task].items():
            assert other[task][k] == pytest.approx(v, rel=2e-2, abs=1e-4), k


@pytest.mark.parametrize('name', CASES)
def test_each_process_holds_its_part(found, name):
    one, parts = read(found, 1, 0, name), [read(found, 2, rank, name) for rank in (0, 1)]
    print(name, one['bytes'], [p['bytes'] for p in parts])
    for key in ('bytes', 'network'):
        assert sum(p[key] for p in parts) == one[key] and all(
            abs(p[key] / one[key] - 0.5) < 0.01 for p in parts
        )


@pytest.mark.parametrize('name', RESUMED)
def test_a_run_is_resumed_sharded_or_not(found, name):
    count = 1 if name.startswith('one') else 2
    assert all(read(found, count, rank, name)['epoch'] == 2 for rank in range(count))
    assert apart(moved(found, count, 0, name), moved(found, 1, 0, 'ppo/after')) < 1e-4


def test_a_sharded_run_goes_on_bit_for_bit(found):
    a, b = moved(found, 2, 0, 'sharded goes on'), moved(found, 2, 0, 'ppo/after')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_is_written_is_whole(found):
    """Weights in diffusers' format, of the average; a checkpoint with the same names and shapes as an
    unsharded one; the sheet is of these weights."""
    one, many = (Run.open(found / folder / 'half' / 'run') for folder in ('1 0', '2 0'))
    assert [p.name for p in many.checkpoints()] == ['epoch_0001'] and (
        many.folder / 'samples' / 'epoch_0001.png'
    ).exists()
    for file in ('weights.safetensors', 'optimizer.safetensors'):
        a, b = (load_file(run.checkpoints()[0] / file) for run in (one, many))
        assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
        assert apart(a, b) < 1e-3
    policy = Policy.from_pretrained(many.folder / 'weights')
    saved = load_file(many.checkpoints()[0] / 'weights.safetensors')
    assert type(policy.network).__name__ == 'UNet2DConditionModel' and all(
        torch.equal(p, saved[f'average/{n}']) for n, p in policy.named_parameters().items()
    )


def test_the_main_process_alone_may_call_the_network(found):
    assert read(found, 2, 0, 'half')['sheet'] == pytest.approx(read(found, 1, 0, 'half')['sheet'], abs=1e-4)


def test_what_cannot_be_sharded_is_refused(found):
    assert (
        read(found, 2, 0, 'refused')['error']
        == 'shard is True, but DRaFTLV goes back through several calls of the network at once; the policy '
        'gradient does not'
    )
    with pytest.raises(ValueError, match='there is one process'):
        trainer(shard=True)
    with pytest.raises(ValueError, match='patience must be 0 with shard.*got 3'):
        RunConfig(shard=True, patience=3)


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(train='lora'), "train must be 'full'.*got 'lora'"),
        (dict(train='full', train_text_encoder=True), 'train_text_encoder is True'),
        (dict(train='full', precision='fp16'), "precision must be .*got 'fp16'"),
    ],
)
def test_policies_that_cannot_be_sharded(options, words):
    crew = Processes()
    crew.count = 2  # as if there were two: nothing is sent before it is refused
    with pytest.raises(ValueError, match=words):
        Trainer(
            Policy(tiny_sd(), num_steps=2, **options),
            [red()],
            TrainConfig(shard=True, train_steps=1),
            processes=crew,
        )


def test_all_leave_out_the_same_steps(found):
    assert (
        read(found, 2, 0, 'bad sample') == read(found, 2, 1, 'bad sample') == dict(epochs=2, skipped=[0, 1])
    )


def test_what_fails_in_one_ends_all(found):
    assert read(found, 2, 1, 'broken reward')['error'] == 'ValueError: reward judge: it is broken'
    assert (
        read(found, 2, 0, 'broken reward')['error']
        == 'ProcessError: process 1 of 2 failed with ValueError: reward judge: it is broken'
    )
    end = read(found, 2, 0, 'killed')
    assert (
        end['error'].startswith('ProcessError: process 0 of 2 cannot reach another one')
        and end['seconds'] < 60
    )


@long
def test_the_command_shards_under_a_launcher_and_goes_on_without(tmp_path):
    tiny_sd().save_pretrained(tmp_path / 'tiny')
    argv = [
        'train',
        'compressibility',
        '--model',
        str(tmp_path / 'tiny'),
        '--num-steps',
        '2',
        '--train-steps',
        '1',
        '--num-minibatches',
        '1',
        '--out',
        str(tmp_path / 'run'),
        '--train',
        'full',
        '--keep-best',
        'reward',
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
            '--shard',
            '--epochs',
            '2',
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1'),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / 'run' / 'weights' / 'unet').is_dir()
    assert cli.main([*argv, '--epochs', '3', '--resume', '--no-shard']) == 0
    assert [r['epoch'] for r in Run.open(tmp_path / 'run').metrics() if r['task']] == [0, 1, 2]
