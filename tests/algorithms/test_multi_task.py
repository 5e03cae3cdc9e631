"Strategies for several tasks, against gradients and mixtures made here."

import random

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize

from drl_toolkit.rewards.fairness import fairness_reward, statistical_parity
from drl_toolkit.algorithms.multi_task import (
    MGDA,
    Balanced,
    Constrained,
    PCGrad,
    Together,
    shortest_mixture,
    spread,
    standing,
    without_conflicts,
)
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.prompts.task import Task
from drl_toolkit.recipes.recipes import load_recipe, make_trainer
from drl_toolkit.recipes.config import RunConfig
from drl_toolkit.rewards.reward import reward
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.algorithms.interfaces import Strategy
from drl_toolkit.training.config import TrainConfig
from tiers import some


@reward
def warmth(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


@reward
def coolness(images, prompts):
    return images[:, 2].mean((1, 2)) - 0.5 * images[:, 0].mean((1, 2))


def trainer(strategy, epochs=2, **told):
    tasks = [Task('warm', ['a cat'], warmth, samples=16), Task('cool', ['a dog'], coolness, samples=16)]
    return Trainer(
        Policy(tiny_sd(), num_steps=4, train='full'),
        tasks,
        TrainConfig(epochs=epochs, lr=1e-3, train_steps=2, warmup=0, grad_clip=0, num_minibatches=1, **told),
        callbacks=[],
        strategy=strategy,
    )


def vectors(seed, count, size=6):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@given(st.integers(0, 10**6), st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_the_shortest_mixture_is_the_one_that_scipy_finds(seed, count):
    g = vectors(seed, count)
    weights = shortest_mixture(g @ g.T)
    best = minimize(
        lambda w: w @ g.numpy() @ g.numpy().T @ w,
        np.full(count, 1 / count),
        bounds=[(0, 1)] * count,
        constraints=dict(type='eq', fun=lambda w: w.sum() - 1),
        tol=1e-12,
    )
    assert (weights >= 0).all() and weights.sum().item() == pytest.approx(1)
    assert (weights @ g).norm().item() ** 2 == pytest.approx(best.fun, rel=1e-3, abs=1e-6)
    assert (g @ (weights @ g)).min() >= -1e-4  # no task gets worse


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_pcgrad_is_its_algorithm_1_on_the_vectors_themselves(seed):
    g, total, rng = vectors(seed, 3), torch.zeros(6, dtype=torch.double), random.Random(seed)
    for i in range(3):
        mine = g[i].clone()
        for j in rng.sample([j for j in range(3) if j != i], 2):
            if (along := mine @ g[j]) < 0:
                mine -= along / (g[j] @ g[j]) * g[j]
        total += mine / 3
    assert torch.allclose(without_conflicts(g @ g.T, random.Random(seed)) @ g, total)


def test_gradients_that_agree_are_left_alone():
    g = vectors(0, 3).abs()
    assert torch.allclose(
        without_conflicts(g @ g.T, random.Random(0)), torch.full((3,), 1 / 3, dtype=torch.double)
    )


@pytest.mark.parametrize('normalised', [True, False])
def test_a_zero_gradient_is_left_out_of_the_shortest_mixture(normalised):
    g, zero = vectors(3, 3), torch.zeros(1, 6, dtype=torch.double)
    four = torch.cat([g[:1], zero, g[1:]])
    way = MGDA(normalised)
    weights = way.weigh(None, four @ four.T)
    assert (
        weights[1] == 0
        and torch.allclose(weights[[0, 2, 3]], way.weigh(None, g @ g.T))
        and weights.sum() == pytest.approx(1)
    )
    assert MGDA(normalised).weigh(None, torch.zeros(2, 2, dtype=torch.double)).tolist() == [0, 0]
    mixture = without_conflicts(four @ four.T, random.Random(0))
    assert mixture.isfinite().all() and mixture[1] == pytest.approx(
        1 / 4
    )  # nothing to project, and nothing to project on


def test_a_zero_gradient_has_no_cosine():
    t = trainer(Together(), 1, measure_every=1)
    ones = [torch.ones_like(p) for p in t.params]
    t.updates.measurement.task_gradients = dict(warm=ones, cool=[torch.zeros_like(p) for p in t.params])
    batches = [t.collect(task) for task in t.tasks]
    assert not any(
        k.startswith('cosine/')
        for row in t.updates.measurement.compare({'warm': {}, 'cool': {}}, batches).values()
        for k in row
    )


def test_progress_and_its_unit_are_the_same_quantity():
    "Of fairness both are of the groups' parity, however the credit is scaled."
    tones = torch.randint(0, 5, (64,), generator=torch.Generator().manual_seed(0))
    parities = torch.tensor([statistical_parity(t) for t in tones.split(16)])
    for credit in ('own', 'rare', 'shared'):
        r = fairness_reward(
            lambda images: (images[:, 0, 0, 0] * 8).round().long(), credit, name=f'parity {credit}'
        )
        _, metrics = r.report(
            tones.float()[:, None, None, None].expand(-1, 3, 4, 4) / 8, ['p'] * 64, torch.arange(64) // 16
        )
        assert standing(metrics) == pytest.approx(-parities.mean().item(), abs=1e-6) and spread(
            metrics
        ) == pytest.approx(parities.std(correction=0).item(), rel=1e-3)
    assert spread(dict(reward_std=0.25)) == 0.25 and spread(dict(reward_std=0.0)) == 1.0
    way = Balanced()
    batch = lambda value: type(
        'B',
        (),
        dict(
            task=type('T', (), dict(name='fair')),
            metrics=dict(reward=0.0, reward_std=0.028, parity=value, parity_square=value**2 + 0.095**2),
        ),
    )
    way.see(None, [batch(0.49)])
    way.see(None, [batch(0.30)])
    assert way.now['fair'] == pytest.approx(2)  # two spreads, not 6.8 of another figure's


def test_together_takes_the_mean_of_both_tasks_gradients():
    seen, alone = [], []
    both = trainer(Together(), 1)
    both.optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in both.params]))
    both.fit()
    one = trainer(Strategy(), 1)
    for task in one.tasks:
        one.updates.gradient(one.updates.plan(one.collect(task))[0])
        alone.append([p.grad.clone() for p in one.params])
    assert len(seen) == 1 and all(
        torch.allclose(s, (a + b) / 2, atol=1e-7) for s, a, b in zip(seen[0], *alone)
    )


WAYS = dict(
    one=Strategy,
    together=Together,
    pcgrad=PCGrad,
    mgda=MGDA,
    balanced=Balanced,
    constrained=lambda: Constrained(keep=('cool',)),
)


@pytest.mark.parametrize('way', some(WAYS, ['one', 'mgda']))
def test_figures_of_all_strategies(way):
    strategy = WAYS[way]()
    rows = trainer(strategy, measure_every=1).fit()[-1]['tasks']
    assert rows['warm']['advantage_share'] + rows['cool']['advantage_share'] == pytest.approx(1)
    assert (
        rows['warm']['cosine/cool'] == rows['cool']['cosine/warm'] and abs(rows['warm']['cosine/cool']) <= 1
    )
    assert ('gradient_weight' in rows['warm']) == isinstance(strategy, Together)


def test_a_kept_task_counts_only_while_it_is_below_its_start():
    way = Constrained(keep=('cool',), rate=2.0)
    t = trainer(way, 1)
    for now, multiplier in ((0.0, 0.0), (-0.5, 1.0), (-0.25, 1.5), (1.0, 0.0)):
        way.start, way.now = {'warm': (0.0, 1.0), 'cool': (0.0, 1.0)}, {}
        batch = lambda name, value: type(
            'B', (), dict(task=type('T', (), dict(name=name)), metrics=dict(reward=value, reward_std=1.0))
        )
        way.see(t.context, [batch('warm', 0.0), batch('cool', now)])
        assert way.multipliers['cool'] == pytest.approx(multiplier)
        assert way.weigh(t.context, torch.eye(2)).tolist() == pytest.approx(
            [1 / (1 + multiplier), multiplier / (1 + multiplier)]
        )


@pytest.mark.parametrize('way', some(['pcgrad', 'balanced', 'constrained'], ['constrained']))
def test_a_strategy_is_resumed_exactly(way):
    make = WAYS[way]
    whole = trainer(make(), 3)
    whole.fit()
    first = trainer(make(), 3)
    first.fit(1)
    then = trainer(make(), 3)
    then.load_state_dict(first.state_dict())
    with torch.no_grad():
        torch._foreach_copy_(then.params, first.params)
    then.optimizer.load_state_dict(first.optimizer.state_dict())
    then.fit(3)
    assert all(torch.equal(a, b) for a, b in zip(whole.params, then.params))


def test_refusals():
    with pytest.raises(ValueError, match="got nothing"):
        trainer(Constrained())
    with pytest.raises(ValueError, match="got cold"):
        trainer(Constrained(keep=('cold',)))
    with pytest.raises(ValueError, match="got 'joined'"):
        Trainer(
            Policy(tiny_sd(), num_steps=3),
            [Task('warm', ['a cat'], warmth)],
            TrainConfig(train_steps=2, data_weight=1.0, data_mode='joined'),
            data=lambda n, s: None,
            callbacks=[],
            strategy=PCGrad(),
        )
    with pytest.raises(ValueError, match="strategy must be one of .*got 'vote'"):
        RunConfig(strategy='vote')


def test_six_objectives_need_nothing_special():
    tasks, config = load_recipe('six')
    assert len(tasks) == 6 and config.strategy == 'pcgrad'
    for t in tasks:
        t.samples, t.group_size = (16, 16) if t.reward.level == 'group' else (4, 4)
    config.epochs, config.num_steps, config.train_steps, config.train = 1, 5, 2, 'lora'
    record = make_trainer(config, tasks, tiny_sd(), callbacks=[]).fit()[0]
    tasks = record['tasks']
    moved = {
        name for name, row in tasks.items() if row['no_credit'] < 1
    }  # of the noise of a random model some rewards say nothing
    assert len(tasks) == 6 and {'preference', 'small files'} <= moved
    for name, row in tasks.items():
        assert {k.removeprefix('cosine/') for k in row if k.startswith('cosine/')} == (
            moved - {name} if name in moved else set()
        )
