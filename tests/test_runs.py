"A run folder survives kills, refuses what is not its own, and resumes to the bit."
import json, multiprocessing, os, signal, subprocess, sys, time

import pytest, torch
from PIL import Image

from drl_toolkit.policy import Policy
from drl_toolkit.prompts import Task
from drl_toolkit.rewards import reward
from drl_toolkit.runs import Recorder, Run, RunError, load_state, named_state, resume, save_state
from drl_toolkit.tiny import tiny_sd
from drl_toolkit.trainer import StopTraining, TrainConfig, Trainer, Callback
from forms import some

PROMPTS = ['a cat', 'a dog']

@reward
def redness(images, prompts): return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

def trainer(callbacks, train='lora', **options):
    torch.manual_seed(0)
    config = TrainConfig(**dict(epochs=3, lr=1e-2, train_steps=2) | options)
    return Trainer(Policy(tiny_sd(), num_steps=3, train=train), [Task('red', PROMPTS, redness, samples=16)], config, callbacks=callbacks)

@pytest.mark.parametrize('train', some(['lora', 'full'], ['lora']))
def test_three_epochs_are_one_and_two(train, tmp_path):
    with Run.create(tmp_path / 'a', {}) as run: a = trainer([Recorder(run, PROMPTS, every=1)], train); a.fit()
    with Run.create(tmp_path / 'b', {}) as run: trainer([Recorder(run, PROMPTS, every=1)], train).fit(epochs=1)
    with Run.open(tmp_path / 'b', write=True) as run:
        b = trainer([Recorder(run, PROMPTS, every=1)], train)
        assert resume(b, run) == 1
        b.fit()
    rows = lambda name: [{k: v for k, v in r.items() if k not in ('seconds', 'cpu_seconds')} for r in Run.open(tmp_path / name).metrics()]
    assert rows('a') == rows('b') and len(rows('a')) == 6
    assert all(torch.equal(t, named_state(b)[n]) for n, t in named_state(a).items())
    for name in ('epoch_0000.png', 'epoch_0003.png'): assert (tmp_path / 'a/samples' / name).read_bytes() == (tmp_path / 'b/samples' / name).read_bytes()
    assert len(run.checkpoints()) == 2 and not [p for p in tmp_path.rglob('*.p*') if p.suffix in ('.pt', '.pkl', '.part')]
    if train == 'full': Policy.from_pretrained(tmp_path / 'a/weights', num_steps=3)

def test_an_interrupted_epoch_leaves_the_last_checkpoint(tmp_path):
    class Kill(Callback):
        def after_sample(self, trainer, *rest):
            if trainer.epoch == 2: raise KeyboardInterrupt
    with Run.create(tmp_path / 'r', {}) as run:
        with pytest.raises(KeyboardInterrupt): trainer([Kill(), Recorder(run, PROMPTS, every=1)]).fit()
        assert not (tmp_path / 'r/weights').exists() and [p.name for p in run.checkpoints()] == ['epoch_0001', 'epoch_0002']

def test_early_stop_keeps_weights(tmp_path):
    class Stop(Callback):
        def after_epoch(self, trainer, record): raise StopTraining('enough')
    with Run.create(tmp_path / 'r', {}) as run: trainer([Recorder(run, PROMPTS), Stop()]).fit()
    assert list((tmp_path / 'r/weights').glob('*.safetensors'))

def test_torn_lines(tmp_path):
    with Run.create(tmp_path / 'r', {}) as run:
        for e in range(3): run.log(dict(epoch=e, tasks=dict(t=dict(reward=float(e)))))
        whole = (run.folder / 'metrics.jsonl').read_bytes()
    for cut in range(len(whole)):
        (tmp_path / 'r/metrics.jsonl').write_bytes(whole[:cut])
        lines = whole[:cut].count(b'\n')
        assert len(Run.open(tmp_path / 'r').metrics()) == lines
        with Run.open(tmp_path / 'r', write=True) as run: run.log(dict(epoch=9, tasks=dict(t=dict(reward=0.))))
        assert [r['epoch'] for r in run.metrics()] == [*range(lines), 9]
    (tmp_path / 'r/metrics.jsonl').write_bytes(b'{"epoch": \n' + whole)
    with pytest.raises(RunError, match='line 1 is damaged'): run.metrics()

def test_folders_that_are_refused(tmp_path):
    (tmp_path / 'mine').mkdir(); (tmp_path / 'mine/letter.txt').write_text('dear')
    (tmp_path / 'file').write_text('')
    for bad in ('mine', 'file', 'file/below'):
        with pytest.raises(RunError, match='output folder') as e: Run.create(tmp_path / bad, {})
        assert '\n' not in str(e.value)
    assert os.listdir(tmp_path / 'mine') == ['letter.txt']
    Run.create(tmp_path / 'r', {}).close()
    with pytest.raises(RunError, match='--resume'): Run.create(tmp_path / 'r', {})
    config = json.loads((tmp_path / 'r/config.json').read_text())
    (tmp_path / 'r/config.json').write_text(json.dumps(config | dict(schema=99)))
    with pytest.raises(RunError, match='schema 99'): Run.open(tmp_path / 'r')
    (tmp_path / 'r/config.json').write_text('{')
    with pytest.raises(RunError, match='damaged'): Run.open(tmp_path / 'r')
    (tmp_path / 'r/config.json').write_text('[]')
    with pytest.raises(RunError, match='no run'): Run.open(tmp_path / 'r')

def _hold(folder, ready):
    run = Run.open(folder, write=True)
    ready.set(); time.sleep(60)

def test_one_writer_at_a_time_and_a_killed_one_lets_go(tmp_path):
    Run.create(tmp_path / 'r', {}).close()
    context = multiprocessing.get_context('fork')
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / 'r', ready)); holder.start()
    assert ready.wait(30)
    with pytest.raises(RunError, match='another process'): Run.open(tmp_path / 'r', write=True)
    Run.open(tmp_path / 'r').metrics()                                    # readers need no lock
    holder.kill(); holder.join()
    Run.open(tmp_path / 'r', write=True).close()

def test_state_names_what_does_not_fit(tmp_path):
    net = torch.nn.Linear(2, 2)
    save_state(tmp_path / 's', dict(net.named_parameters()))
    with pytest.raises(ValueError, match='does not fit'): load_state(tmp_path / 's', dict(torch.nn.Linear(3, 2).named_parameters()))
    (tmp_path / 's/weights.safetensors').write_bytes(b'junk')
    with pytest.raises(ValueError, match='cannot be read'): load_state(tmp_path / 's', dict(net.named_parameters()))

# the best

@pytest.mark.parametrize('figure, least, average', some([('reward', False, 0.), ('-reward_std', True, .5)], [('-reward_std', True, .5)]))
def test_the_best_checkpoint_outlives_newer_ones_and_its_weights_are_written(figure, least, average, tmp_path):
    "Against every checkpoint kept: the same run with keep=99."
    def fit(name, epochs, keep):
        with (Run.open(tmp_path / name, write=True) if (tmp_path / name).exists() else Run.create(tmp_path / name, dict(keep_best=figure))) as run:
            t = trainer([Recorder(run, PROMPTS, every=1, keep=keep)], average=average, epochs=epochs, train_steps=1, lr=3e-2)
            resume(t, run)
            t.fit()
            return run
    every = fit('every', 5, 99)
    fit('few', 3, 1)
    few = fit('few', 5, 1)
    name = figure.removeprefix('-')
    seen = {r['epoch']: r[name] for r in every.metrics() if r['task'] and r['epoch']}                       # of what was there after so many epochs; nothing is kept of 0
    best = (min if least else max)(seen, key=lambda e: (seen[e], -e if least else e))
    assert every.best() == (every.folder / f'checkpoints/epoch_{best:04d}', seen[best])
    kept = {int(p.name[-4:]) for p in few.checkpoints()}
    assert 5 in kept and len(kept) <= 2 and few.best()[1] == (min if least else max)(seen[e] for e in kept - {5})
    if few.best()[0].name == f'epoch_{best:04d}': assert (tmp_path / 'few/best/pytorch_lora_weights.safetensors').read_bytes() == (tmp_path / 'every/best/pytorch_lora_weights.safetensors').read_bytes()
    t = trainer([], average=average)
    saved = load_state(every.best()[0], named_state(t))
    assert saved['epoch'] == best
    note = (tmp_path / 'every/best/README.md').read_text()
    assert f'the weights after {best} of the epochs' in note and name in note

def test_a_kill_while_old_ones_are_deleted_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    "Deleting stops at the first file; the next checkpoint sweeps up."
    import drl_toolkit.runs as runs
    weight = torch.nn.Parameter(torch.zeros(2))
    save = lambda run, epoch: run.checkpoint(epoch, dict(weight=weight), None, dict(epoch=epoch))
    with Run.create(tmp_path / 'r', {}) as run:
        for epoch in (1, 2): save(run, epoch)
        def killed(path): next(path.iterdir()).unlink(); raise KeyboardInterrupt
        monkeypatch.setattr(runs.shutil, 'rmtree', killed)
        with pytest.raises(KeyboardInterrupt): save(run, 3)
        monkeypatch.undo()
        assert [p.name for p in run.checkpoints()] == ['epoch_0002', 'epoch_0003'] and all(len(list(p.iterdir())) == 2 for p in run.checkpoints())
        save(run, 4)
        assert sorted(p.name for p in (run.folder / 'checkpoints').iterdir()) == ['epoch_0003', 'epoch_0004']
        (run.folder / 'checkpoints/epoch_10000').mkdir()
        assert [p.name for p in run.checkpoints()][-1] == 'epoch_10000'                                       # by number, not by letters

def test_what_is_the_best_of_the_metrics():
    from drl_toolkit.runs import merits
    rows = [{'epoch': 0, 'task': 'a', 'reward': 1.}, {'epoch': 0, 'task': 'b', 'reward': 3.}, {'epoch': 1, 'task': 'a', 'reward': None, 'parity': .5}, {'epoch': 1, 'task': None, 'watch/watched': .2, 'seconds': 1.}]
    assert merits(rows, 'reward') == {0: 2.} and merits(rows, '-parity') == {1: -.5} and merits(rows, 'watch/watched') == {2: .2} and merits(rows, 'nothing') == {}
