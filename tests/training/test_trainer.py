"The loop against an independent few-line PPO, and what it refuses."

import math

import pytest, torch
from hypothesis import given, strategies as st

from drl_toolkit.algorithms import advantages
from drl_toolkit.algorithms.minibatches import LossOutput
from drl_toolkit.algorithms.reward_gradients import DRaFTLV
from drl_toolkit.algorithms.branching import BranchSampler
from drl_toolkit.algorithms.multi_task import PCGrad
from drl_toolkit.sampling.rollout import Graph, even_size, rollout, worth_threads
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.prompts.task import Task
from drl_toolkit.training.ratio import explain_ratio
from drl_toolkit.rewards.reward import reward
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.policy_gradient import pick_steps
from drl_toolkit.algorithms.async_rewards import AsyncRewardSampler
from drl_toolkit.training.data_loss import BaseSamples
from drl_toolkit.training.diagnostics import Diagnostics, diagnose
from drl_toolkit.training.callbacks import Callback
from drl_toolkit.training.config import TrainConfig
from tiers import some


@reward
def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def task(name='red', **more):
    return Task(name, ['a cat', 'a dog', 'a key'], redness, samples=18, **more)


def trainer(config=None, tasks=None, **more):
    return Trainer(
        Policy(tiny_sd(), num_steps=5),
        tasks or [task()],
        config or TrainConfig(train_steps=3),
        callbacks=[],
        **more,
    )


def noise_images(count, seed):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed)), ['a cat'] * count


def test_one_update_equals_a_reference_written_here():
    "All steps, one minibatch: Σ_t min(w A, clip(w) A) by hand, AdamW by torch. [P Eq 7]"
    ours = trainer(
        TrainConfig(warmup=0, train_steps=0, num_minibatches=1, lr=1e-3, grad_clip=0, micro_batch=20)
    )
    policy = Policy(tiny_sd(), num_steps=5)
    prompts, _ = ours.tasks[0].draw(ours.seed_of(ours.tasks[0]), 0)
    traj = rollout(policy, prompts, seed=ours.seed_of(ours.tasks[0]))
    r = redness(traj.images, prompts).double()
    advantage = ((r - r.mean()) / (r.var(correction=0) + 1e-8).sqrt()).float()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99))
    cond, total, alphas = (
        policy.encode(prompts).rows()['prompt_embeds'],
        0.0,
        policy.pipeline.scheduler.alphas_cumprod,
    )
    for t in range(4):  # the fifth step is deterministic
        alpha, prev = alphas[policy.timesteps[t]], alphas[policy.timesteps[t + 1]]
        std = ((1 - prev) / (1 - alpha) * (1 - alpha / prev)).sqrt()  # DDIM Eq 16
        x, v = traj.latents[t], policy.network(traj.latents[t], policy.timesteps[t].expand(18), cond).sample
        x0, noise = alpha.sqrt() * x - (1 - alpha).sqrt() * v, alpha.sqrt() * v + (1 - alpha).sqrt() * x
        mean = prev.sqrt() * x0 + (1 - prev - std**2).clamp(min=0).sqrt() * noise
        log_prob = torch.distributions.Normal(mean, std).log_prob(traj.latents[t + 1]).flatten(1).mean(1)
        w = (log_prob - traj.log_probs[t]).exp()
        total = total - torch.minimum(
            w * advantage, w.clamp(1 - ours.objective.clip_range, 1 + ours.objective.clip_range) * advantage
        ).sum() / (18 * 4)
    total.backward()
    theirs = torch.cat([p.grad.flatten() for p in policy.parameters()])
    captured = []
    ours.optimizer.register_step_pre_hook(
        lambda *_: captured.append(torch.cat([p.grad.flatten() for p in ours.params]))
    )
    ours.fit(1)
    assert torch.allclose(captured[0], theirs, rtol=1e-3, atol=1e-6 * theirs.abs().max().item() + 1e-9)
    optimizer.step()
    moved = torch.cat([(p - q).flatten() for p, q in zip(ours.params, policy.parameters())]).abs()
    assert (
        moved < 1e-5
    ).float().mean() > 0.99  # Adam's first step is a sign: rounding can flip tiny gradients


def test_ratio_is_one_at_the_start_of_every_epoch_and_memory_does_not_matter():
    small, large = (trainer(TrainConfig(micro_batch=m, num_minibatches=2, train_steps=3)) for m in (16, 128))
    for t in (small, large):
        t.fit(2)
    assert all(h['tasks']['red']['ratio_error'] == 0 for h in small.history + large.history)
    assert all(torch.allclose(p, q, atol=1e-3) for p, q in zip(small.params, large.params))


def test_several_tasks_data_loss_and_kl():
    "Each task has its own numbers; the data loss is a step of its own, or joined."
    for mode in ('step', 'joined'):
        t = trainer(
            TrainConfig(train_steps=3, data_weight=0.1, data_mode=mode, data_batch=4, kl_weight=1e-3),
            [task('one'), task('two', weight=2.0)],
            data=noise_images,
        )
        record = t.fit(1)[0]
        assert (
            set(record['tasks']) == {'one', 'two'}
            and record['tasks']['one']['kl'] >= 0
            and ('data_loss' in record) == (mode == 'step')
        )
        assert (
            record['tasks']['one']['reward'] != record['tasks']['two']['reward']
        )  # prompts and noise of its own


def test_steps_are_a_fair_subset_of_the_stochastic_ones():
    stochastic = torch.tensor([True] * 9 + [False])
    steps = pick_steps(stochastic, 5000, 3, torch.Generator().manual_seed(0))
    assert steps.max() == 8 and (steps.diff(dim=1) > 0).all()
    assert (torch.bincount(steps.flatten(), minlength=9) / 5000 - 3 / 9).abs().max() < 0.03


@pytest.mark.parametrize(
    'field, value, words',
    [
        ('lr', -1.0, 'lr must be 0 or more; got -1'),
        ('epochs', 1.5, 'whole number'),
        ('clip_range', math.nan, 'finite'),
        ('beta2', 1.0, r'\[0, 1\)'),
        ('data_mode', 'x', 'step'),
        ('likelihood', 'x', 'matching'),
        ('num_minibatches', 0, '1 or more'),
        ('lr_end', 0.0, r'\(0, 1\]'),
        ('data_start', 1.0, r'\[0, 1\)'),
        ('minutes', -1.0, '0 or more'),
    ],
)
def test_config_names_field_and_value(field, value, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**{field: value})


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match='tasks is empty'):
        Trainer(Policy(tiny_sd(), num_steps=2), [], callbacks=[])
    with pytest.raises(ValueError, match='a name twice'):
        trainer(tasks=[task(), task()])
    with pytest.raises(ValueError, match='data is None'):
        trainer(TrainConfig(data_weight=1.0, train_steps=3))
    with pytest.raises(ValueError, match='no denoising step is stochastic'):
        Trainer(Policy(tiny_sd(), num_steps=3, eta=0.0), [task()], callbacks=[])
    with pytest.raises(ValueError, match='only 4 of 5 steps can be trained'):
        trainer(TrainConfig(train_steps=5))
    nan = Task('nan', ['a cat'], lambda images, prompts: images.mean((1, 2, 3)) * math.nan, samples=2)
    with pytest.raises(ValueError, match='NaN'):
        trainer(tasks=[nan]).fit(1)


def captured_gradient(trainer) -> torch.Tensor:
    "The gradient of the first optimiser step of a run."
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in trainer.params]))
    )
    trainer.fit(1)
    return seen[0]


def test_matching_equals_advantage_weighted_pretraining_written_here():
    """AWM: Σ A ‖v_θ(z_t) - v‖² on the run's own images, at the steps and with the noise of this epoch;
    finite clip never reached at ratio 1."""
    told = dict(warmup=0, train_steps=2, num_minibatches=1, lr=1e-3, grad_clip=0, likelihood='matching')
    ours = trainer(TrainConfig(micro_batch=7, **told), [task(window=(0.2, 0.8))])
    policy = Policy(tiny_sd(), num_steps=5)
    prompts, _ = ours.tasks[0].draw(ours.seed_of(ours.tasks[0]), 0)
    traj = rollout(policy, prompts, seed=ours.seed_of(ours.tasks[0]))
    r = redness(traj.images, prompts).double()
    advantage = ((r - r.mean()) / (r.var(correction=0) + 1e-8).sqrt()).float()
    rows = []
    real = ours.objective.likelihood.transitions

    class Spy(type(ours.objective.likelihood)):
        def transitions(self, *args):
            rows.append(real(*args))
            return rows[0]

    ours.objective.likelihood = Spy()
    found = captured_gradient(ours)
    sample, step = rows[0]['sample'], rows[0]['step']
    assert set(step.tolist()) == {1, 2, 3} and len(sample) == 36
    alpha = policy.pipeline.scheduler.alphas_cumprod[policy.timesteps[step]].view(-1, 1, 1, 1)
    z = traj.latents[-1][sample]
    noise = (rows[0]['latents'] - alpha.sqrt() * z) / (1 - alpha).sqrt()
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.05  # fresh standard normal noise
    v = alpha.sqrt() * noise - (1 - alpha).sqrt() * z
    answer = policy.network(
        rows[0]['latents'], policy.timesteps[step], policy.encode(prompts)[sample].rows()['prompt_embeds']
    ).sample
    ((answer - v).square().mean((1, 2, 3)) * advantage[sample]).sum().div(36).backward()
    theirs = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert torch.allclose(found, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_matching_needs_no_noise_and_holds_its_ratio_and_its_anchor():
    """Deterministic sampling will do; the first ratio is 1, the later ones are not; the distance to the base
    starts at 0; memory does not matter."""

    def run(micro):
        policy = Policy(tiny_sd(), num_steps=5, eta=0.0, train='full')
        t = Trainer(
            policy,
            [task()],
            TrainConfig(
                likelihood='matching',
                train_steps=0,
                num_minibatches=3,
                kl_weight=0.5,
                warmup=0,
                lr=1e-3,
                micro_batch=micro,
            ),
            callbacks=[],
        )
        return t, [row['tasks']['red'] for row in t.fit(2)]

    (a, rows), (b, _) = run(16), run(128)
    assert (
        all(
            row['ratio_error'] == 0 and row['ratio_max'] > 1 > row['ratio_min'] and 'approx_kl' not in row
            for row in rows
        )
        and 0 < rows[0]['kl'] < rows[1]['kl']
    )
    assert all(torch.allclose(p, q, atol=3e-3) for p, q in zip(a.params, b.params))


def test_a_window_of_steps_is_kept_and_refused_where_it_is_empty():
    t = trainer(TrainConfig(train_steps=2), [task(window=(0, 0.4))])
    assert t.objective.able(t.context, t.tasks[0]).tolist() == [True, True, False, False, False] and t.fit(1)
    with pytest.raises(ValueError, match=r'only 2 of 5 steps can be trained in window \(0, 0.4\)'):
        trainer(TrainConfig(train_steps=3), [task(window=(0, 0.4))])
    for bad in ((0.5, 0.1), (0,), (-0.1, 0.5), 0.3, (0, 2), (True, 1)):
        with pytest.raises(ValueError, match='0 <= start < stop <= 1'):
            task(window=bad)


def test_micro_batches_of_different_sizes_count_by_their_rows():
    "18 samples of 3 steps in micro-batches of 16, 16, 16 and 6: the recorded share is that of all rows."
    kinds = [
        trainer(TrainConfig(train_steps=3, num_minibatches=1, micro_batch=m, lr=1e-2, kl_weight=1.0)).fit(3)[
            -1
        ]['tasks']['red']
        for m in (16, 64)
    ]
    assert abs(kinds[0]['kl'] - kinds[1]['kl']) < 0.05 * kinds[1]['kl'] and kinds[0][
        'ratio_max'
    ] == pytest.approx(kinds[1]['ratio_max'], abs=1e-3)


def test_the_data_loss_weight_scales_all_that_its_step_moves():
    """Adam moves a weight by a gradient over many steps: here one with the data loss, and thirty without. Its second
    moment is set to that of the tasks, and hardly changed."""

    def moved(weight):
        config = TrainConfig(train_steps=3, data_weight=weight, data_batch=4, warmup=0, lr=1.0, weight_decay=0.0)
        t = trainer(config, data=noise_images)
        for p in t.params:
            state = dict(step=torch.tensor(1e4), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.full_like(p, 1e4))
            t.optimizer.state[p] = state
        before = [p.detach().clone() for p in t.params]
        t.updates.data_step()
        for _ in range(30):
            for p in t.params:
                p.grad = torch.zeros_like(p)
            t.updates.step()
        return torch.cat([(p - b).detach().flatten() for p, b in zip(t.params, before)]).norm().item()

    assert moved(0.1) == pytest.approx(0.1 * moved(1.0), rel=0.02)


def test_the_learning_rate_warms_up_and_falls_in_a_line():
    t = trainer(TrainConfig(train_steps=3, epochs=5, lr=1.0, lr_end=0.2, warmup=1))
    rates = []
    for t.epoch in range(5):
        rates.append(t.learning_rate())
    assert rates == pytest.approx([0.5, 0.8, 0.6, 0.4, 0.2])
    t.config.minutes, t.epoch, t.history = (
        10.0,
        1,
        [dict(seconds=450.0)],
    )  # a slow machine: three quarters of the time are gone
    assert t.learning_rate() == pytest.approx(0.4)


def test_a_limit_of_minutes_ends_the_run_in_good_order(capsys):
    "Time spent before a resume counts; the first epoch always runs."
    t = trainer(TrainConfig(train_steps=3, epochs=50, minutes=1e-4))
    assert len(t.fit()) == 1 and 'no time for another' in capsys.readouterr().out
    t = trainer(TrainConfig(train_steps=3, epochs=9, minutes=10.0))
    t.history = [
        dict(seconds=540.0),
        dict(seconds=20.0),
    ]  # 40 s are left, and the longest of the last epochs took 540
    assert not t.has_time()
    t.history = [dict(seconds=500.0)] + 3 * [dict(seconds=20.0)]
    assert t.has_time() and t.time_used() == pytest.approx(560 / 600)


def test_the_data_loss_can_keep_to_the_clean_part_of_the_schedule():
    seen = []
    t = trainer(TrainConfig(train_steps=3, data_weight=1.0, data_batch=64, data_start=0.7), data=noise_images)
    t.policy.network.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    t.updates.data_step()
    assert 250 < seen[0].max() < 300 and seen[0].min() < 20


def test_a_ratio_that_is_not_one_is_explained(capsys):
    "A callback leaves dropout on: the run trains on, and says why its ratios are off."
    from torch import nn
    from drl_toolkit.training.callbacks import Callback

    class Careless(Callback):
        def after_sample(self, trainer, *_):
            trainer.policy.network.conv_norm_out = nn.Sequential(
                trainer.policy.network.conv_norm_out, nn.Dropout(0.2)
            ).train()

    t = trainer(TrainConfig(train_steps=3, epochs=1))
    t.callbacks = [Careless()]
    row = t.fit()[0]['tasks']['red']
    assert (
        row['ratio_error'] > 1e-4
        and 'because of dropout' in row['ratio_cause']
        and row['ratio_cause'] in capsys.readouterr().out
    )


@pytest.mark.parametrize('samples, large', [(3, 0), (40, 10**8), (100, 10**8)])
def test_batches_are_replayed_as_they_were_cut(samples, large, monkeypatch):
    """A network that rounds by the number of rows, and by how many threads one batch has, is not mistaken for
    other weights."""
    monkeypatch.setattr('drl_toolkit.sampling.policy.LARGE', large)
    torch.set_num_threads(2)
    try:
        policy = Policy(tiny_sd(), num_steps=3)
        exact = policy.adapter.forward
        policy.adapter.forward = lambda x, *args: (
            exact(x, *args) * (1 + 1e-3 * len(x) + 0.1 * torch.get_num_threads())
        )
        trajectory = rollout(policy, ['a cat'] * samples)
        assert 'because of batch shape: without it the error is 0.0' in explain_ratio(policy, trajectory)[0]
        with torch.no_grad():
            policy.parameters()[1].add_(1.0)
        assert 'were the weights changed' in explain_ratio(policy, trajectory)[0]
        assert 'so little is rounding' in explain_ratio(policy, trajectory, error=1e-6)[0]
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    'precision, train', some([(p, t) for p in ('bf16', 'fp16') for t in ('lora', 'full')], [('bf16', 'lora')])
)
def test_half_precision_learns_what_fp32_learns(precision, train):
    "Exact ratios in every epoch, and weights that go the same way."

    def moved(kind):
        policy = Policy(tiny_sd(), num_steps=5, precision=kind, latents_dtype=kind, train=train)
        before = [p.detach().clone() for p in policy.parameters()]
        rows = Trainer(
            policy,
            [task()],
            TrainConfig(train_steps=0, epochs=2, num_minibatches=1, warmup=0, lr=1e-3),
            callbacks=[],
        ).fit()
        assert all(row['tasks']['red']['ratio_error'] == 0 for row in rows)
        return torch.cat([(p - b).detach().flatten() for p, b in zip(policy.parameters(), before)])

    assert torch.cosine_similarity(moved('fp32'), moved(precision), dim=0) > 0.5


@given(
    count=st.integers(1, 300), most=st.integers(1, 130), threads=st.integers(1, 8), fewest=st.integers(1, 20)
)
def test_batches_are_even_and_none_is_filled_up(count, most, threads, fewest):
    size = even_size(count, most, threads, fewest)
    sizes, needed = [len(part) for part in torch.arange(count).split(size)], -(-count // most)
    assert sum(sizes) == count and max(sizes) <= most
    assert size >= min(fewest, count) or len(sizes) <= needed  # smaller only where `most` asks for it
    assert -(-len(sizes) // threads) == -(-needed // threads)  # no round more than without threads' shares
    assert (
        worth_threads(len(sizes), threads) or len(sizes) <= needed
    )  # cut further only for threads of their own


@pytest.mark.parametrize('guidance, count', [(1.0, 16), (2.0, 8), (1.0, 31)])
def test_few_samples_are_one_batch_for_all_threads(guidance, count):
    "Two batches would be filled up, and compute twice as much."
    policy, calls = Policy(tiny_sd(), num_steps=3, guidance_scale=guidance), []
    exact, alone = policy.adapter.forward, rollout(policy, ['a cat'] * count)
    policy.adapter.forward = lambda x, *args: (
        calls.append((len(x), torch.get_num_threads())) or exact(x, *args)
    )
    torch.set_num_threads(2)
    try:
        together = rollout(policy, ['a cat'] * count)
    finally:
        torch.set_num_threads(1)
    assert calls == [(count * (2 if guidance > 1 else 1), 2)] * 3
    assert torch.allclose(alone.latents, together.latents, atol=1e-5)


@pytest.mark.parametrize(
    'likelihood, train', some([('path', 'lora'), ('matching', 'full')], [('matching', 'full')])
)
def test_threads_change_nothing(likelihood, train):
    """Two batches at once: the same images to the bit, the same weights to rounding; the KL penalty does not see
    half-swapped weights."""

    def run(threads):
        torch.set_num_threads(threads)
        try:
            policy = Policy(tiny_sd(), num_steps=5, train=train, guidance_scale=2.0)
            t = Trainer(
                policy,
                [task()],
                TrainConfig(
                    likelihood=likelihood,
                    train_steps=3,
                    num_minibatches=2,
                    kl_weight=0.1,
                    epochs=2,
                    warmup=0,
                    lr=1e-3,
                    micro_batch=16,
                ),
                callbacks=[],
            )
            return (
                rollout(policy, ['a cat'] * 70, seed=1).latents,
                t.fit(),
                [p.detach().clone() for p in t.params],
            )
        finally:
            torch.set_num_threads(1)

    one, two = run(1), run(2)
    assert torch.equal(one[0], two[0]) and torch.get_num_threads() == 1
    assert all(r['tasks']['red']['ratio_error'] == 0 for r in two[1])
    assert one[1][1]['tasks']['red']['kl'] == pytest.approx(two[1][1]['tasks']['red']['kl'], rel=0.05)
    assert (torch.cat([(a - b).flatten() for a, b in zip(one[2], two[2])]).abs() < 1e-4).float().mean() > 0.99


def test_the_teacher_speaks_of_what_is_wrong_and_only_once(capsys):
    healthy = dict(
        effective_samples=40.0,
        frac_zero_std=0.1,
        signal_to_noise=0.5,
        clip_fraction_high=0.05,
        clip_fraction_low=0.05,
        advantage_share=0.5,
    )
    assert diagnose(healthy) == {} and diagnose({}) == {}
    assert (
        'matching' in diagnose(dict(signal_to_noise=0.0))['noise']
        and 'matching' not in diagnose(dict(signal_to_noise=0.0), path=False)['noise']
    )  # no advice to do what is done
    few = dict(effective_samples=1.0)
    assert (
        'rank' in diagnose(few)['few']
        and 'rank' not in diagnose(few, grouped=False)['few']
        and diagnose(few, credited=False) == {}
    )  # where it would be zero, or is not used
    assert (
        'group_size' in diagnose(dict(effective_group=2.0, no_credit=0.0))['group']
        and diagnose(dict(effective_group=1.0, no_credit=0.75)) == {}
    )  # a selection is small on purpose
    for name, value, word in (
        ('effective_samples', 2.0, 'outliers'),
        ('frac_zero_std', 0.9, '90% of the groups'),
        ('signal_to_noise', 0.001, 'mostly noise'),
        ('clip_fraction_high', 0.5, 'likely enough'),
        ('clip_fraction_low', 0.5, 'unlikely enough'),
        ('advantage_share', 0.95, 'hardly count'),
        ('cosine/preference', -0.8, "preference's"),
    ):
        (sentence,) = diagnose(healthy | {name: value}).values()
        assert word in sentence
    equal = Task(
        'flat',
        ['a cat'],
        lambda images, prompts: torch.arange(len(images)) // 9 * 1.0,
        group_size=9,
        samples=18,
        advantage=advantages.group,
    )
    t = trainer(tasks=[equal])
    t.callbacks = [Diagnostics()]
    first, second = t.fit(2)
    assert (
        'teach nothing' in first['tasks']['flat']['diagnosis'] and 'diagnosis' not in second['tasks']['flat']
    )
    assert capsys.readouterr().out.count('teach nothing') == 1


def test_signal_to_noise_is_that_of_halves_computed_here():
    t = trainer(TrainConfig(train_steps=2, num_minibatches=1, warmup=0, micro_batch=8, measure_every=1))
    batch = t.collect(t.tasks[0])
    (rows,) = t.updates.plan(batch)
    stats = t.updates.gradient(rows, batch)
    whole, halves = [p.grad.clone() for p in t.params], []
    for rest in (0, 1):
        t.updates.gradient({k: v[rows['sample'] % 2 == rest] for k, v in rows.items()})
        halves.append(torch.cat([p.grad.flatten() for p in t.params]) * 2)  # each half weighs one half
    assert torch.allclose(torch.cat([w.flatten() for w in whole]), (halves[0] + halves[1]) / 2, atol=1e-7)
    signal, noise = halves[0] @ halves[1], (halves[0] - halves[1]).square().sum() / 4
    assert stats['signal_to_noise'].item() == pytest.approx(
        max(0.0, (signal / noise).item()), rel=1e-3, abs=1e-5
    )
    assert stats['half_cosine'].item() == pytest.approx(
        torch.cosine_similarity(halves[0], halves[1], dim=0).item(), rel=1e-3, abs=1e-5
    )


def test_several_rewards_add_their_advantages():
    weighted = Task(
        'both',
        ['a cat', 'a dog'],
        [redness, reward(lambda images, prompts: 1000 * images.mean((1, 2, 3)), name='bright')],
        samples=18,
        weight=(1.0, 0.5),
    )
    t = trainer(tasks=[weighted])
    seen = []
    t.callbacks = [
        type(
            'Spy',
            (Callback,),
            dict(after_sample=lambda self, t, task, traj, values, advantage: seen.append((traj, advantage))),
        )()
    ]
    row = t.fit(1)[0]['tasks']['both']
    images, advantage = seen[0][0].images, seen[0][1]
    parts = [
        advantages.batch(redness(images, ['a cat'] * 18)),
        0.5 * advantages.batch(1000 * images.mean((1, 2, 3))),
    ]
    assert torch.allclose(advantage, parts[0] + parts[1], atol=1e-5)
    assert row['share/redness'] == pytest.approx(0.8, abs=1e-3) and row['bright/reward'] == pytest.approx(
        1000 * images.mean().item(), rel=1e-4
    )


def test_the_kl_weight_is_adapted_to_its_target():
    t = trainer(TrainConfig(train_steps=2, kl_weight=0.1, kl_target=1.0, warmup=0))
    for kl, weight in ((2.0, 0.2), (1.2, 0.2), (0.1, 0.1), (1.0, 0.1), (9.0, 0.2)):
        t.kl_penalty.adapt(kl)
        assert t.kl_penalty.weight == pytest.approx(weight)


def test_the_weights_can_decay_to_the_base():
    t = trainer(TrainConfig(train_steps=2, base_decay=10.0, warmup=0, lr=0.01, num_minibatches=1))
    with torch.no_grad():
        for p in t.params:
            p.add_(1.0)
    base = t.policy.base_weights()
    before = [p.detach() - b for p, b in zip(t.params, base)]
    for p in t.params:
        p.grad = torch.zeros_like(p)
    t.updates.step()
    assert all(torch.allclose(p.detach() - b, 0.9 * x, atol=1e-6) for p, b, x in zip(t.params, base, before))


@pytest.mark.parametrize(
    'told, words',
    [
        (dict(surrogate='reinforce', num_minibatches=2), 'num_minibatches must be 1 .*got 2'),
        (dict(surrogate='nft'), "likelihood must be 'matching'"),
        (dict(surrogate='guard', likelihood='matching'), "likelihood must be 'path'"),
        (dict(kl_target=1.0), 'kl_weight must be above 0'),
        (dict(clip_high=0.1), 'clip_range must be above 0'),
        (dict(advantage='fame'), 'advantage must be one of'),
        (dict(surrogate='x'), 'surrogate must be one of'),
    ],
)
def test_fields_that_do_not_fit_together(told, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**told)


def test_base_samples_are_the_untrained_models():
    policy = Policy(tiny_sd(), num_steps=3, train='full')
    expected = rollout(policy, ['a cat', 'a dog', 'a cat'], seed=0, epoch='base').latents[-1]
    data = BaseSamples(policy, ['a cat', 'a dog'], pool=3)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1)
    latents, captions = data(2, seed=5)
    rows = torch.randperm(3, generator=torch.Generator().manual_seed(5))[:2]
    assert torch.equal(latents, expected[rows]) and captions == [['a cat', 'a dog', 'a cat'][i] for i in rows]
    t = trainer(
        TrainConfig(train_steps=2, data_weight=1.0, data_batch=2, warmup=0),
        data=BaseSamples(Policy(tiny_sd(), num_steps=5), ['a cat'], pool=4),
    )
    assert t.fit(1)[0]['data_loss'] > 0


KEPT = {
    'lora, some steps': (dict(train_steps=3), dict()),
    'full, a KL penalty': (dict(train_steps=0, kl_weight=0.1, ema_decay=0.5), dict(train='full')),
    'guided': (dict(train_steps=2, surrogate='guard'), dict(guidance_scale=3.0, train_unconditional=False)),
    'reinforce, data': (
        dict(train_steps=0, surrogate='reinforce', data_weight=0.5, data_mode='joined', data_batch=4),
        dict(guidance_scale=3.0),
    ),
}


@pytest.mark.parametrize('case', KEPT)
def test_graphs_of_sampling_give_the_gradient_of_another_forward(case):
    "The same images and metrics, the same gradient to rounding, and none of the update's forwards."
    config, policy = KEPT[case]

    def run(keep):
        t, gradients = (
            Trainer(
                Policy(tiny_sd(), num_steps=5, **policy),
                [task()],
                TrainConfig(
                    num_minibatches=1, warmup=0, lr=1e-3, measure_every=0, reuse_graphs=keep, **config
                ),
                data=noise_images,
                callbacks=[],
            ),
            [],
        )
        t.optimizer.register_step_pre_hook(
            lambda *_: gradients.append(
                torch.cat(
                    [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in t.params]
                )
            )
        )
        return t.fit(2), gradients

    (made, expected), (kept, found) = run(False), run(True)
    assert (
        torch.allclose(found[0], expected[0], rtol=1e-3, atol=1e-6 * expected[0].norm().item())
        and expected[0].norm() > 0
    )
    assert torch.cosine_similarity(found[1], expected[1], dim=0) > 0.99
    a, b = made[0]['tasks']['red'], kept[0]['tasks']['red']
    assert a['reward'] == b['reward'] and b['ratio_error'] == 0 and set(a) == set(b)
    assert kept[0]['nfe'] < made[0]['nfe'] and all(
        a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-6) for k in a if isinstance(a[k], float)
    )


def test_kept_graphs_are_used_once_and_freed():
    import gc

    t = trainer(TrainConfig(train_steps=2, num_minibatches=1, reuse_graphs=True, measure_every=2))
    batches, collect = [], t.collect
    t.collect = lambda *args: batches.append(collect(*args)) or batches[-1]
    rows = t.fit(2)
    assert all(b.trajectory.graphs is None for b in batches)
    assert (
        rows[0]['tasks']['red'].keys() > rows[1]['tasks']['red'].keys() and rows[1]['nfe'] < rows[0]['nfe']
    )  # the first is measured: in halves, by forwards
    assert not any(type(x) is Graph for x in gc.get_objects())


def test_a_bad_gradient_of_kept_graphs_is_left_out_and_its_sample_named(capsys):
    t = trainer(TrainConfig(train_steps=2, num_minibatches=1, reuse_graphs=True, measure_every=0))
    loss = t.objective.loss

    def bad(run, rows):
        value, stats = loss(run, rows)
        return LossOutput(value * float('nan') if (rows['sample'] == 4).any() else value, stats)

    t.objective.loss = bad
    before = [p.detach().clone() for p in t.params]
    row = t.fit(1)[0]['tasks']['red']
    assert row['skipped_steps'] == 1 and all(torch.equal(p, q) for p, q in zip(t.params, before))
    told = capsys.readouterr().out
    assert "task 'red'" in told and 'was caused by' in told and 'more' not in told


@pytest.mark.parametrize('threads', some([1, 2], [2]))
def test_several_tasks_may_keep_their_graphs(threads):
    "Of an epoch that samples all tasks first, too; two threads make what one makes, and twice the same."

    def run(n):
        torch.set_num_threads(n)
        try:
            t = trainer(
                TrainConfig(
                    train_steps=2, num_minibatches=1, reuse_graphs=True, measure_every=0, warmup=0, lr=1e-3
                ),
                [task('one'), task('two')],
                strategy=PCGrad(),
            )
            return t.fit(2), [p.detach().clone() for p in t.params]
        finally:
            torch.set_num_threads(1)

    (rows, first), (_, again), (_, alone) = run(threads), run(threads), run(1)
    assert all(torch.equal(p, q) for p, q in zip(first, again)) and all(
        r['ratio_error'] == 0 for r in rows[1]['tasks'].values()
    )
    assert (torch.cat([(p - q).flatten() for p, q in zip(first, alone)]).abs() < 1e-4).float().mean() > 0.99


def test_what_cannot_keep_graphs_is_refused():
    keep = TrainConfig(train_steps=2, num_minibatches=1, reuse_graphs=True)
    for config in (dict(num_minibatches=2), dict(num_minibatches=1, likelihood='matching')):
        with pytest.raises(ValueError, match='reuse_graphs needs num_minibatches=1'):
            TrainConfig(reuse_graphs=True, **config)
    for words, policy, more in (
        ('BranchSampler', {}, dict(sampler=BranchSampler(first=0.5))),
        ('AsyncRewardSampler', {}, dict(sampler=AsyncRewardSampler())),
        ('DRaFTLV', {}, dict(objective=DRaFTLV(repeats=2))),
        ('train_text_encoder', dict(train_text_encoder=True), {}),
        ('checkpointing', dict(checkpointing=True), {}),
    ):
        with pytest.raises(ValueError, match=f'reuse_graphs is True with .*({words})'):
            Trainer(
                Policy(tiny_sd(), num_steps=5, **policy), [task(group_size=3)], keep, callbacks=[], **more
            )
