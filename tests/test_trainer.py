"The loop against an independent few-line PPO, and what it refuses."
import math

import pytest, torch

from drl_toolkit.mdp import rollout
from drl_toolkit.policy import Policy
from drl_toolkit.prompts import Task
from drl_toolkit.rewards import reward
from drl_toolkit.tiny import tiny_sd
from drl_toolkit.trainer import TrainConfig, Trainer, pick_steps

@reward
def redness(images, prompts): return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

def task(name='red', **more): return Task(name, ['a cat', 'a dog', 'a key'], redness, samples=18, **more)

def trainer(config=None, tasks=None, **more):
    return Trainer(Policy(tiny_sd(), num_steps=5), tasks or [task()], config or TrainConfig(train_steps=3), callbacks=[], **more)

def test_one_update_equals_a_reference_written_here():
    "All steps, one minibatch: Σ_t min(w A, clip(w) A) by hand, AdamW by torch. [P Eq 7]"
    ours = trainer(TrainConfig(warmup=0, train_steps=0, updates=1, lr=1e-3, grad_clip=0, micro_batch=20))
    policy = Policy(tiny_sd(), num_steps=5)
    prompts, _ = ours.tasks[0].draw(ours.seed_of(ours.tasks[0]), 0)
    traj = rollout(policy, prompts, seed=ours.seed_of(ours.tasks[0]))
    r = redness(traj.images, prompts).double()
    advantage = ((r - r.mean()) / (r.var(correction=0) + 1e-8).sqrt()).float()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0., betas=(.9, .99))
    cond, total = policy.encode(prompts), 0.
    for t in range(4):                                                    # the fifth step is deterministic
        alpha, prev, std = (table[t] for table in (policy.tables.alpha, policy.tables.alpha_prev, policy.tables.std))
        x, v = traj.latents[t], policy.unet(traj.latents[t], policy.timesteps[t].expand(18), cond).sample
        x0, noise = alpha.sqrt() * x - (1 - alpha).sqrt() * v, alpha.sqrt() * v + (1 - alpha).sqrt() * x
        mean = prev.sqrt() * x0 + (1 - prev - std**2).clamp(min=0).sqrt() * noise
        log_prob = torch.distributions.Normal(mean, std).log_prob(traj.latents[t + 1]).flatten(1).mean(1)
        w = (log_prob - traj.log_probs[t]).exp()
        total = total - torch.minimum(w * advantage, w.clamp(1 - ours.clip_range, 1 + ours.clip_range) * advantage).sum() / (18 * 4)
    total.backward()
    theirs = torch.cat([p.grad.flatten() for p in policy.parameters()])
    captured = []
    ours.optimizer.register_step_pre_hook(lambda *_: captured.append(torch.cat([p.grad.flatten() for p in ours.params])))
    ours.fit(1)
    assert torch.allclose(captured[0], theirs, rtol=1e-3, atol=1e-6 * theirs.abs().max().item() + 1e-9)
    optimizer.step()
    moved = torch.cat([(p - q).flatten() for p, q in zip(ours.params, policy.parameters())]).abs()
    assert (moved < 1e-5).float().mean() > .99                            # Adam's first step is a sign: rounding can flip tiny gradients

def test_ratio_is_one_at_the_start_of_every_epoch_and_memory_does_not_matter():
    small, large = (trainer(TrainConfig(micro_batch=m, updates=2, train_steps=3)) for m in (16, 128))
    for t in (small, large): t.fit(2)
    assert all(h['tasks']['red']['ratio_error'] == 0 for h in small.history + large.history)
    assert all(torch.allclose(p, q, atol=1e-3) for p, q in zip(small.params, large.params))

def test_several_tasks_data_loss_and_kl():
    "Each task has its own numbers; the data loss is a step of its own, or joined."
    data = lambda count, seed: (torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed % 2**31)), ['a cat'] * count)
    for mode in ('step', 'joined'):
        t = trainer(TrainConfig(train_steps=3, data_weight=.1, data_mode=mode, data_batch=4, kl_weight=1e-3), [task('one'), task('two', weight=2.)], data=data)
        record = t.fit(1)[0]
        assert set(record['tasks']) == {'one', 'two'} and record['tasks']['one']['kl'] >= 0 and ('data_loss' in record) == (mode == 'step')
        assert record['tasks']['one']['reward'] != record['tasks']['two']['reward']       # prompts and noise of its own

def test_steps_are_a_fair_subset_of_the_stochastic_ones():
    stochastic = torch.tensor([True] * 9 + [False])
    steps = pick_steps(stochastic, 5000, 3, torch.Generator().manual_seed(0))
    assert steps.max() == 8 and (steps.diff(dim=1) > 0).all()
    assert (torch.bincount(steps.flatten(), minlength=9) / 5000 - 3 / 9).abs().max() < .03

@pytest.mark.parametrize('field, value, words', [('lr', -1., 'lr is -1'), ('epochs', 1.5, 'whole number'), ('clip_range', math.nan, 'finite'),
                                                 ('beta2', 1., r'\[0, 1\)'), ('data_mode', 'x', 'step'), ('updates', 0, '1 or more')])
def test_config_names_field_and_value(field, value, words):
    with pytest.raises(ValueError, match=words): TrainConfig(**{field: value})

def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match='tasks is empty'): Trainer(Policy(tiny_sd(), num_steps=2), [], callbacks=[])
    with pytest.raises(ValueError, match='a name twice'): trainer(tasks=[task(), task()])
    with pytest.raises(ValueError, match='data is None'): trainer(TrainConfig(data_weight=1., train_steps=3))
    with pytest.raises(ValueError, match='no denoising step is stochastic'): Trainer(Policy(tiny_sd(), num_steps=3, eta=0.), [task()], callbacks=[])
    with pytest.raises(ValueError, match='only 4 of 5 steps'): trainer(TrainConfig(train_steps=5))
    nan = Task('nan', ['a cat'], lambda images, prompts: images.mean((1, 2, 3)) * math.nan, samples=2)
    with pytest.raises(ValueError, match='NaN'): trainer(tasks=[nan]).fit(1)
