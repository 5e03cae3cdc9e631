"""The ratio where a network's answer depends on the rows beside it, as in half precision on a GPU; and what
an epoch that does not end leaves behind."""

import copy

import pytest, torch

from drl_toolkit.sampling.rollout import rollout
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.utils import devices
from drl_toolkit.utils.devices import best_device, check_device, deterministic_algorithms
from drl_toolkit.prompts.task import Task
from drl_toolkit.training.ratio import explain_ratio, ratio_noise
from drl_toolkit.rewards.reward import reward
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.policy_gradient import pick_steps
from drl_toolkit.training.config import TrainConfig


@reward
def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def noisy_trainer(precision='fp32', noise=1e-2, **more):
    "A policy whose predictions move with the mean of the rows beside them."
    policy = Policy(tiny_sd(), num_steps=3, precision=precision)
    exact, rows = policy.adapter.forward, []

    def call(x, *args):
        rows.append((len(x), torch.is_grad_enabled()))
        return exact(x, *args) + noise * x.mean(0)

    policy.adapter.forward = call
    config = TrainConfig(
        **dict(train_steps=0, num_minibatches=2, micro_batch=16, measure_every=0, epochs=1, warmup=0) | more
    )
    t = Trainer(policy, [Task('red', ['a cat', 'a dog'], redness, samples=16)], config, callbacks=[])
    return t, rows


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_the_anchor_comes_from_the_micro_batches_of_the_update(precision, capsys):
    """The first ratio is 1, and each later minibatch is compared with itself before the first step, for one
    forward more."""
    t, rows = noisy_trainer(precision)
    batch = t.collect(t.tasks[0])
    minibatches = t.updates.plan(batch)
    sampled, spent = minibatches[1]['old_log_prob'].clone(), len(rows)
    stats = t.updates.gradient(minibatches[0], batch)
    assert (
        stats['ratio_max'] == stats['ratio_min'] == 1 and stats['ratio_noise'] > 1e-4 * t.objective.clip_range
    )
    later = len(minibatches[1]['step'])
    assert stats['anchored_transitions'] == later and 'micro-batches of the update' in capsys.readouterr().out
    assert not torch.equal(minibatches[1]['old_log_prob'], sampled)
    assert sum(n for n, grad in rows[spent:] if grad) == len(
        minibatches[0]['step']
    )  # one forward with a graph
    for part in t.micro_batches.split(minibatches[1]):  # nothing was updated yet
        log_prob, _ = t.objective.likelihood.log_prob(t.policy, part)
        assert torch.equal(log_prob.detach(), part['old_log_prob'])
        wanted = torch.autograd.grad(
            -(part['weight'] * part['advantage'] * log_prob).sum(), t.params, allow_unused=True
        )
        found = torch.autograd.grad(
            t.objective.loss(t.context, part).loss, t.params, allow_unused=True
        )  # at a ratio of 1 PPO's gradient is A ∇ log p
        for a, b in zip(wanted, found):
            assert a is None and b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_an_exact_network_costs_and_says_nothing(capsys):
    t, rows = noisy_trainer(noise=0)
    row = t.fit()[0]['tasks']['red']
    assert (
        row['ratio_noise'] == row['ratio_error'] == 0
        and 'anchored_transitions' not in row
        and not capsys.readouterr().out
    )
    assert sum(n for n, grad in rows if not grad) == 3 * 16  # sampling alone is without a graph


@pytest.mark.parametrize('precision, train', [('bf16', 'lora'), ('fp16', 'full')])
def test_every_precision_is_explained(precision, train):
    "Weights that were cast cannot be tried in another precision, and what cannot be tried ends nothing."
    policy = Policy(tiny_sd(), num_steps=3, precision=precision, train=train)
    traj = rollout(policy, ['a cat'] * 4)
    assert ratio_noise(policy, traj).largest == 0
    traj.log_probs = traj.log_probs + 0.1
    sentence, left = explain_ratio(policy, traj)
    assert 'were the weights changed' in sentence and 'dtype' not in left
    rows, exact = [], policy.adapter.forward
    policy.adapter.forward = lambda x, *args: (rows.append(len(x)), exact(x, *args))[1]
    explain_ratio(policy, traj, 0.1, rows=100)
    assert 0 < sum(rows) <= 100


def test_the_cause_is_found_within_the_rows_of_an_update(capsys):
    "However few they are: the batches of sampling, the likeliest cause, have their rows kept."
    t, rows = noisy_trainer()
    assert 'because of batch shape: without it the error is 0' in t.fit()[0]['tasks']['red']['ratio_cause']
    traj = rollout(t.policy, ['a cat', 'a dog'] * 8)
    for budget in (16, 48, 200):
        rows.clear()
        sentence, _ = explain_ratio(t.policy, traj, 2e-4, budget)
        assert 'because of batch shape' in sentence and 0 < sum(n for n, _ in rows) <= budget
    sentence, left = explain_ratio(t.policy, traj, 2e-4, 8)
    assert 'the batches of sampling were not tried again' in sentence and not left
    many = rollout(t.policy, ['a cat'] * 40)
    rows.clear()
    sentence, left = explain_ratio(t.policy, many, 2e-4, 36)  # too few for a replay, enough for a suspect
    assert 'the batches of sampling were not tried again' in sentence and list(left) == ['dropout']
    assert 0 < sum(n for n, _ in rows) <= 36


def test_no_diagnosis_ends_a_run(monkeypatch, capsys):
    def fails(*args):
        raise RuntimeError('mat1 and mat2 must have the same dtype')

    monkeypatch.setattr('drl_toolkit.training.anchoring.explain_ratio', fails)
    t, _ = noisy_trainer()
    assert 'could not be found out (RuntimeError: mat1' in t.fit()[0]['tasks']['red']['ratio_cause']


def everything(t):
    "All that the next epoch depends on."
    moments = [v for p in t.params for v in t.optimizer.state.get(p, {}).values()]
    return [x.detach().clone() for x in (*t.params, *t.ema, *moments)], copy.deepcopy(t.state_dict())


@pytest.mark.parametrize('done', [0, 1])
def test_an_interrupt_amid_the_updates_leaves_the_last_whole_epoch(done):
    "Whatever was interrupted, and the run goes on as if it had not been."
    make = lambda: noisy_trainer(noise=0, epochs=2, ema_decay=0.9, advantage='per_prompt')[0]
    whole, t = make(), make()
    whole.fit()
    if done:
        t.fit(done)
    before, step = everything(t), t.updates.step

    def second(calls=[]):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step()

    t.updates.step = second
    with pytest.raises(KeyboardInterrupt):
        t.fit(2)
    after = everything(t)
    assert (
        len(before[0]) == len(after[0])
        and all(map(torch.equal, before[0], after[0]))
        and before[1] == after[1]
    )
    t.updates.step = step
    t.fit(2)
    assert all(map(torch.equal, everything(t)[0], everything(whole)[0])) and len(t.history) == 2


def test_clipped_shares_are_those_of_updates_that_can_clip():
    "In the first minibatch no ratio has moved: its zeros would hide what the diagnosis looks for."
    t, _ = noisy_trainer(noise=0)
    stats = [
        dict(
            clip_fraction_high=torch.tensor(x),
            clip_fraction_low=torch.tensor(x),
            approx_kl=torch.tensor(x),
            ratio_error=torch.tensor(0.0),
        )
        for x in (0.0, 0.3, 0.4)
    ]
    found = t.updates.summary(stats)
    assert found['clip_fraction_high'] == found['clip_fraction_low'] == pytest.approx(0.35) and found[
        'approx_kl'
    ] == pytest.approx(0.7 / 3)
    assert t.updates.summary(stats[:1])['clip_fraction_high'] == 0


def drawn_steps(samples, shared, seed=1):
    every = torch.ones(10, dtype=torch.bool)
    return pick_steps(every, samples, 3, torch.Generator().manual_seed(seed), shared)


def test_steps_can_be_shared_by_the_batch():
    "The same draw whatever the number of samples; kept graphs are then whole calls."
    five, seven = drawn_steps(5, shared=5), drawn_steps(7, shared=7)
    assert torch.equal(five, seven[:5]) and len(five.unique(dim=0)) == 1 and five.shape == (5, 3)
    assert len({tuple(drawn_steps(5, shared=5, seed=s)[0].tolist()) for s in range(20)}) > 5
    rows = {}
    for shared in (True, False):
        t, seen = noisy_trainer(
            noise=0, num_minibatches=1, reuse_graphs=True, train_steps=1, shared_timesteps=shared
        )
        t.fit()
        rows[shared] = len(seen)
    assert rows[True] == 3 and rows[False] > 3  # a call for each step


def test_steps_can_be_shared_by_groups():
    "Consecutive samples have the same; of an incomplete last group, too."
    steps = drawn_steps(10, shared=4)
    groups = steps.split(4)
    assert [len(g) for g in groups] == [4, 4, 2]
    assert all(len(g.unique(dim=0)) == 1 for g in groups) and len(steps.unique(dim=0)) == 3


def test_deterministic_settings_hold_for_the_epochs_alone(monkeypatch):
    seen = []
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', '')
    t, _ = noisy_trainer(noise=0, deterministic=True)
    sample = t.sample
    t.sample = lambda *a: (
        seen.append(torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic),
        sample(*a),
    )[1]
    t.fit()
    assert (
        seen == [True]
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.backends.cudnn.deterministic
    )
    with pytest.raises(ValueError, match='deterministic is True, but'), deterministic_algorithms():
        raise RuntimeError('x does not have a deterministic implementation')


def test_a_clip_range_below_float32_is_said(capsys):
    noisy_trainer(noise=0, clip_range=1e-9)
    assert 'rounding alone clips' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['mps', 'xpu', 'meta', 'cuda:7', 'mps:3', 'nonsense'])
def test_devices_that_are_not_there_are_refused_in_one_line(name):
    with pytest.raises(ValueError, match='device (is|must be)') as e:
        check_device(name)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'there, best', [('', 'cpu'), ('mps', 'mps'), ('xpu mps', 'xpu'), ('mps cuda', 'cuda')]
)
def test_the_device_is_the_accelerator_that_there_is(there, best, monkeypatch):
    monkeypatch.setattr(devices, '_device_count', lambda kind: int(kind in there.split()))
    assert best_device() == best
    check_device(best)
