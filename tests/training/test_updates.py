"How a batch is cut into optimiser steps: against gradients written here, from the rows that each step should have."

import math
from functools import partial

import pytest, torch

from drl_toolkit.algorithms.advantages import Contrastive
from drl_toolkit.algorithms.multi_task import SampleFirst
from drl_toolkit.algorithms.objectives import LIKELIHOODS, clip_pair, ppo_clip
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.prompts.task import Task
from drl_toolkit.rewards.reward import reward
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.sampling.rollout import rollout
from drl_toolkit.training.callbacks import Callback
from drl_toolkit.training.config import TrainConfig
from drl_toolkit.training.policy_gradient import PolicyGradient
from drl_toolkit.training.trainer import Trainer

STEPS, STOCHASTIC, SAMPLES = 5, 4, 12


@reward
def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@reward
def warmth(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


class Seen(Callback):
    "What each batch is made of, and what each optimiser step starts from."

    def __init__(self):
        self.batches, self.steps = [], []

    def after_plan(self, trainer, batch, minibatches):
        self.batches.append(
            (batch, [{name: column for name, column in part.items()} for part in minibatches])
        )

    def watch(self, trainer):
        flat = lambda tensors: torch.cat([t.detach().flatten().clone() for t in tensors])
        trainer.optimizer.register_step_pre_hook(
            lambda *_: self.steps.append((flat(trainer.params), flat(p.grad for p in trainer.params)))
        )
        return self


def run(epochs=1, tasks=None, strategy=None, **config):
    "A trained run and what was seen."
    seen = Seen()
    tasks = tasks or [Task('red', ['a cat', 'a dog', 'a key'], redness, samples=SAMPLES)]
    told = dict(warmup=0, train_steps=0, lr=1e-3, grad_clip=0, measure_every=0, micro_batch=64) | config
    policy = Policy(tiny_sd(), num_steps=STEPS)
    trainer = Trainer(policy, tasks, TrainConfig(**told), callbacks=[seen], strategy=strategy)
    seen.watch(trainer)
    trainer.fit(epochs)
    return trainer, seen


def gradient(policy, weights, batch, sample, step, scale, clip):
    "Of Σ max(-A w, -A clip(w)) · scale over rows, under some weights, with torch.distributions. [P Eq 7]"
    torch.nn.utils.vector_to_parameters(weights, list(policy.parameters()))
    traj, alphas = batch.trajectory, policy.pipeline.scheduler.alphas_cumprod
    alpha, prev = (alphas[policy.timesteps[s]].view(-1, 1, 1, 1) for s in (step, step + 1))
    std = ((1 - prev) / (1 - alpha) * (1 - alpha / prev)).sqrt()  # DDIM Eq 16
    x, cond = traj.latents[step, sample], policy.encode(traj.prompts).rows()['prompt_embeds'][sample]
    v = policy.network(x, policy.timesteps[step], cond).sample
    x0, noise = alpha.sqrt() * x - (1 - alpha).sqrt() * v, alpha.sqrt() * v + (1 - alpha).sqrt() * x
    mean = prev.sqrt() * x0 + (1 - prev - std**2).clamp(min=0).sqrt() * noise
    density = torch.distributions.Normal(mean, std).log_prob(traj.latents[step + 1, sample])
    w, a = (density.flatten(1).mean(1) - traj.log_probs[step, sample]).exp(), batch.advantage[sample]
    loss = (scale * torch.maximum(-a * w, -a * w.clamp(1 - clip, 1 + clip))).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])


def check_gradients(trainer, seen, scales):
    "Each optimiser step took the gradient of its own rows, all compared with the policy that sampled."
    policy = Policy(tiny_sd(), num_steps=STEPS)
    parts = [(batch, part) for batch, parts in seen.batches for part in parts]
    assert len(parts) == len(seen.steps) == len(scales)
    for (batch, part), (weights, found), scale in zip(parts, seen.steps, scales):
        right = gradient(
            policy, weights, batch, part['sample'], part['step'], scale, trainer.objective.clip_range
        )
        assert torch.allclose(found, right, rtol=2e-3, atol=2e-3 * right.abs().max().item())


def test_one_optimiser_step_for_each_shared_timestep():
    "The first paper's code: random steps shared by the batch; each is a step on all samples."
    trainer, seen = run(minibatch_by='timestep', shared_timesteps=True, train_steps=3)
    batch, parts = seen.batches[0]
    steps = [part['step'].unique().tolist() for part in parts]
    assert sorted(map(len, steps)) == [1, 1, 1] and len({s for (s,) in steps}) == 3
    assert all(sorted(part['sample'].tolist()) == list(range(SAMPLES)) for part in parts)
    check_gradients(trainer, seen, [1 / SAMPLES] * 3)
    orders = {
        tuple(part['step'][0].item() for part in run(minibatch_by='timestep', seed=seed)[1].batches[0][1])
        for seed in (1, 2, 3)
    }
    assert len(orders) > 1  # in a random order, as `random.sample` gives them


def test_timesteps_of_samples_own_steps_count_as_they_would_together():
    "Where each sample has steps of its own, a timestep's minibatch has those that drew it, at the same weight."
    trainer, seen = run(minibatch_by='timestep', train_steps=2, micro_batch=8)
    _, parts = seen.batches[0]
    assert sum(len(part['step']) for part in parts) == 2 * SAMPLES and len(parts) == STOCHASTIC
    check_gradients(trainer, seen, [STOCHASTIC / (2 * SAMPLES)] * STOCHASTIC)


def test_a_minibatch_of_samples_has_all_their_steps():
    trainer, seen = run(minibatch_by='sample', num_minibatches=3)
    _, parts = seen.batches[0]
    samples = [part['sample'].unique().tolist() for part in parts]
    assert [len(s) for s in samples] == [4, 4, 4] and sorted(sum(samples, [])) == list(range(SAMPLES))
    assert samples != [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert all(len(part['step']) == 4 * STOCHASTIC for part in parts)
    check_gradients(trainer, seen, [3 / (STOCHASTIC * SAMPLES)] * 3)


def test_a_minibatch_of_groups_has_all_their_samples():
    trainer, seen = run(tasks=grouped(), minibatch_by='group', num_minibatches=2)
    _, parts = seen.batches[0]
    size = 3
    groups = [(part['sample'] // size).unique().tolist() for part in parts]
    assert sorted(sum(groups, [])) == list(range(SAMPLES // size)) and len(groups[0]) == len(groups[1])
    for part, whole in zip(parts, groups):
        samples = sorted(part['sample'].unique().tolist())
        assert samples == [group * size + i for group in sorted(whole) for i in range(size)]
        assert len(part['step']) == len(samples) * STOCHASTIC
    check_gradients(trainer, seen, [2 / (STOCHASTIC * SAMPLES)] * 2)


def grouped():
    return [Task('red', ['a cat', 'a dog', 'a key'], redness, group_size=3, samples=SAMPLES)]


def test_a_group_is_noised_alike():
    "One noise and the same steps for the images of a group, others for the next group."
    options = dict(likelihood='matching', group_noise=True, minibatch_by='group', train_steps=2)
    trainer, seen = run(tasks=grouped(), **options)
    batch, parts = seen.batches[0]
    tables, clean = trainer.policy.coefficients, batch.trajectory.latents[-1].float()
    noises = {}
    for part in parts:
        mine, step = clean[part['sample']], part['step']
        zero = tables.noised(mine, step, torch.zeros_like(mine))
        one = tables.noised(mine, step, torch.ones_like(mine))
        noise = (part['latents'] - zero) / (one - zero)
        for sample, t, of_row in zip(part['sample'].tolist(), step.tolist(), noise):
            noises.setdefault((sample // 3, t), []).append(of_row)
    assert len(noises) == 2 * SAMPLES // 3 and all(len(alike) == 3 for alike in noises.values())
    assert all(torch.allclose(row, alike[0], atol=1e-3) for alike in noises.values() for row in alike)
    firsts = [alike[0] for alike in noises.values()]
    assert not any(torch.allclose(a, b, atol=0.1) for i, a in enumerate(firsts) for b in firsts[:i])


def test_noise_of_a_group_needs_groups():
    with pytest.raises(
        ValueError, match='group_size must be 2 or more in a task with group_noise; got 1 in all'
    ):
        run(likelihood='matching', group_noise=True)


@pytest.mark.parametrize('alike', (1, 4))
def test_what_a_group_has_in_common_cancels(alike):
    "From four times the same image nothing can be learnt: noised alike nothing is, noised apart the noise is."
    policy = Policy(tiny_sd(), num_steps=STEPS)
    trajectory = rollout(policy, 4 * ['a cat'], seed=0)
    trajectory.latents[-1].copy_(trajectory.latents[-1][:1].clone())
    steps, generator = torch.tensor(4 * [[1, 3]]), torch.Generator().manual_seed(0)
    likelihood = LIKELIHOODS['matching']
    rows = likelihood.transitions(policy, trajectory, steps, generator, alike=alike)
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5])[rows['sample']]
    (advantage * likelihood.log_prob(policy, rows).log_prob).mean().backward()
    largest = max(p.grad.abs().max().item() for p in policy.parameters() if p.grad is not None)
    assert largest < 1e-6 if alike == 4 else largest > 1e-3


def test_a_fixed_number_of_samples_counts_those_that_are_kept():
    "B²: only chosen samples are in the data; a minibatch is a mean over a fixed number of them."
    task = Task(
        'red',
        ['a cat', 'a dog'],
        redness,
        group_size=6,
        samples=24,
        advantage=Contrastive(high=0.1, low=-0.1),
    )
    trainer, seen = run(tasks=[task], minibatch_by='sample', minibatch_size=3, inner_epochs=2)
    batch, parts = seen.batches[0]
    kept = batch.advantage.nonzero().flatten().tolist()
    assert 3 < len(kept) <= 8
    sizes = [3] * (len(kept) // 3) + [len(kept) % 3] * (len(kept) % 3 > 0)
    assert [len(part['sample'].unique()) for part in parts] == 2 * sizes
    passes = parts[: len(sizes)], parts[len(sizes) :]
    for each in passes:
        assert sorted(i for part in each for i in part['sample'].unique().tolist()) == kept
    assert [p['sample'].unique().tolist() for p in passes[0]] != [
        p['sample'].unique().tolist() for p in passes[1]
    ]  # shuffled anew
    check_gradients(trainer, seen, [1 / (3 * STOCHASTIC)] * len(parts))


def test_inner_epochs_pass_again_and_compare_with_the_policy_that_sampled():
    "With subsets of steps these are drawn anew, as in ddpo-pytorch."
    trainer, seen = run(inner_epochs=3, num_minibatches=2, train_steps=2)
    batch, parts = seen.batches[0]
    assert len(parts) == 6
    passes = [
        sorted((i, s) for part in two for i, s in zip(part['sample'].tolist(), part['step'].tolist()))
        for two in (parts[:2], parts[2:4], parts[4:])
    ]
    assert all(len(rows) == 2 * SAMPLES for rows in passes) and passes[0] != passes[1] != passes[2]
    for part in parts[1:]:
        assert torch.equal(part['old_log_prob'], batch.trajectory.log_probs[part['step'], part['sample']])
    check_gradients(trainer, seen, [2 / (2 * SAMPLES)] * 6)


def test_inner_epochs_of_matching_compare_with_the_policy_that_sampled():
    trainer, seen = run(inner_epochs=2, num_minibatches=1, train_steps=2, likelihood='matching', lr=1e-2)
    (_, (first, second)), policy = seen.batches[0], Policy(tiny_sd(), num_steps=STEPS)
    assert 'old_log_prob' not in first
    predicted = policy.predict(second['latents'], second['step'], policy.encode(['a cat'] * 24))
    assert predicted.shape == second['target'].shape
    now = trainer.objective.likelihood.log_prob(trainer.policy, second).log_prob
    cond = policy.encode([seen.batches[0][0].trajectory.prompts[i] for i in second['sample']])
    then = (
        -(policy.predict(second['latents'], second['step'], cond) - second['target']).square().mean((1, 2, 3))
    )
    assert torch.allclose(second['old_log_prob'], then, atol=1e-5)
    assert not torch.allclose(now, then, atol=1e-5)


def two_tasks():
    return [
        Task('red', ['a cat', 'a dog'], redness, samples=SAMPLES),
        Task('warm', ['a key', 'a tree'], warmth, samples=SAMPLES),
    ]


def test_theta_old_is_fixed_for_all_tasks():
    "All sample before the first update, and all ratios are to that policy. [P §3.3]"
    trainer, seen = run(tasks=two_tasks(), strategy=SampleFirst(), num_minibatches=1, lr=1e-2)
    policy = Policy(tiny_sd(), num_steps=STEPS)
    for batch, _ in seen.batches:
        again = rollout(policy, batch.trajectory.prompts, seed=trainer.seed_of(batch.task))
        assert torch.equal(batch.trajectory.latents, again.latents)
    check_gradients(trainer, seen, [1 / (STOCHASTIC * SAMPLES)] * 2)
    red, warm = (trainer.history[0]['tasks'][name] for name in ('red', 'warm'))
    assert red['ratio_error'] == 0 and red['ratio_max'] == 1 and 'ratio_cause' not in warm
    assert 'ratio_error' not in warm and warm['ratio_max'] > 1 > warm['ratio_min']
    in_turn = run(tasks=two_tasks(), num_minibatches=1, lr=1e-2)[1].batches
    assert torch.equal(in_turn[0][0].trajectory.latents, seen.batches[0][0].trajectory.latents)
    assert not torch.equal(in_turn[1][0].trajectory.latents, seen.batches[1][0].trajectory.latents)


@pytest.mark.parametrize(
    'likelihood, surrogate', [('matching', 'ppo'), ('matching', 'nft'), ('path', 'guard')]
)
def test_what_is_remembered_of_theta_old_is_of_theta_old(likelihood, surrogate):
    "Whatever a surrogate compares with, the second task's comes from before the first one's updates."
    config = dict(likelihood=likelihood, surrogate=surrogate, train_steps=2, num_minibatches=1, lr=1e-2)
    trainer, seen = run(tasks=two_tasks(), strategy=SampleFirst(), **config)
    (part,), policy = seen.batches[1][1], Policy(tiny_sd(), num_steps=STEPS)
    rows = part | dict(cond=policy.encode([seen.batches[1][0].trajectory.prompts[i] for i in part['sample']]))
    for name, right in trainer.objective.remembered(policy, rows).items():
        assert torch.allclose(part[name], right, atol=1e-5)
        assert not torch.allclose(trainer.objective.remembered(trainer.policy, part)[name], right, atol=1e-5)


def test_old_log_probs_of_all_waiting_tasks_are_replaced_where_sampling_was_noisy(monkeypatch):
    trainer, _ = run(epochs=0, tasks=two_tasks(), strategy=SampleFirst(), num_minibatches=2)
    rescored = []
    monkeypatch.setattr(type(trainer.objective), 'is_noisy', lambda *_: True)
    monkeypatch.setattr(
        type(trainer.objective), 'anchor', lambda self, run, parts: rescored.append(len(parts)) or 0
    )
    real = trainer.updates.ratio.look
    monkeypatch.setattr(
        trainer.updates.ratio,
        'look',
        lambda run, batch, metrics, rows: real(
            run, batch, metrics | dict(ratio_error=1e-6, ratio_noise=1e-6), rows
        ),
    )
    trainer.fit(2)
    assert rescored == [3, 3]  # the first task's second minibatch and both of the other's, in each epoch


@pytest.mark.parametrize(
    'config, words',
    [
        (dict(minibatch_size=4), "minibatch_by must be 'sample' with minibatch_size 4.*got 'transition'"),
        (
            dict(surrogate='reinforce', num_minibatches=1, inner_epochs=2),
            "inner_epochs must be 1 with surrogate 'reinforce'.*got 2",
        ),
        (
            dict(surrogate='reinforce', minibatch_by='timestep'),
            "minibatch_by must be 'transition' with surrogate.*got 'timestep'",
        ),
        (
            dict(reuse_graphs=True, minibatch_by='sample', minibatch_size=4, num_minibatches=1),
            'reuse_graphs needs minibatch_size=0 .*got minibatch_size=4',
        ),
        (
            dict(matching_prediction='conditional'),
            "matching_prediction must be 'guided' with likelihood 'path'.*got 'conditional'",
        ),
        (dict(inner_epochs=0), 'inner_epochs must be 1 or more; got 0'),
        (dict(max_nonfinite=1.5), r'max_nonfinite must be in \[0, 1\]; got 1.5'),
        (dict(group_noise=True), "group_noise must be false with likelihood 'path'.*got True"),
        (dict(minibatch_by='prompt'), "minibatch_by must be one of .*'timestep'.*got 'prompt'"),
    ],
)
def test_what_does_not_fit_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**config)


def test_what_needs_the_weights_that_sampled_is_refused_with_one_theta_old():
    build = partial(run, epochs=0, tasks=two_tasks(), strategy=SampleFirst(), num_minibatches=1)
    with pytest.raises(ValueError, match="surrogate must be 'ppo' with strategy SampleFirst.*'reinforce'"):
        build(surrogate='reinforce')
    with pytest.raises(ValueError, match='reuse_graphs must be False with strategy SampleFirst.*got True'):
        build(reuse_graphs=True)


def test_what_an_epoch_costs_is_said():
    says = lambda **config: TrainConfig(**config).updates_in_words()
    assert says() == '2 optimiser steps per task' and says(num_minibatches=1) == '1 optimiser step per task'
    assert says(minibatch_by='timestep') == 'an optimiser step per task and trained denoising step'
    assert says(minibatch_by='sample', minibatch_size=128, inner_epochs=2) == (
        'an optimiser step per 128 samples of a task, in each of 2 passes over its samples'
    )


def test_a_clip_range_of_1_or_more_clips_no_fall():
    "B²'s .1 on the mean of 16,384 dimensions is 3.6 on 1,024: in effect no clip."
    assert TrainConfig(clip_range=3.6).clip_range == 3.6 and tuple(clip_pair(3.6)) == (3.6, 3.6)
    change, advantage = torch.tensor([-9.0, -1.0, 0.5, 1.4]), torch.tensor([-1.0, 1.0, -2.0, 1.0])
    log_prob = change.clone().requires_grad_()
    ppo_clip(log_prob, torch.zeros(4), advantage, 3.6).loss.backward()
    assert torch.allclose(log_prob.grad, -advantage * change.exp() / 4)
    with pytest.raises(ValueError, match='clip_range must be a finite number above 0'):
        clip_pair(math.inf)


@pytest.mark.parametrize('prediction', ['guided', 'conditional'])
def test_matching_fits_the_guided_or_the_conditional_prediction(prediction):
    "The KL penalty's reference too; of the conditional one the unconditional branch has no part."
    seen, policy = Seen(), Policy(tiny_sd(), num_steps=STEPS, guidance_scale=4.0)
    config = TrainConfig(
        likelihood='matching',
        matching_prediction=prediction,
        kl_weight=0.1,
        train_steps=2,
        num_minibatches=1,
        warmup=0,
        grad_clip=0,
        measure_every=0,
    )
    tasks = [Task('red', ['a cat', 'a dog'], redness, samples=8)]
    trainer = Trainer(policy, tasks, config, callbacks=[seen])
    seen.watch(trainer).watch(trainer)
    trainer.fit(1)
    batch, (part,) = seen.batches[0]
    weights, found = seen.steps[0]
    torch.nn.utils.vector_to_parameters(weights, list(policy.parameters()))
    embeds, empty = (
        policy.encode(prompts).rows()['prompt_embeds']
        for prompts in ([batch.trajectory.prompts[i] for i in part['sample']], [''] * 16)
    )
    ask = lambda cond: policy.network(part['latents'], policy.timesteps[part['step']], cond).sample
    now = ask(embeds) if prediction == 'conditional' else ask(empty) + 4 * (ask(embeds) - ask(empty))
    assert torch.allclose(part['reference'], now, atol=1e-4)
    error = (now - part['target']).square().mean((1, 2, 3))
    ratio = (error.detach() - error).exp()
    loss = -(ratio * batch.advantage[part['sample']]).sum() / 16 + 0.1 * (now - now.detach()).square().mean()
    right = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])
    assert torch.allclose(found, right, rtol=2e-3, atol=2e-3 * right.abs().max().item())


def test_nfts_clip_is_its_papers_or_its_codes():
    "r = ½ + ½ clip(A, ±c)/c with c of 1 in the paper and 5 in the release."
    policy, advantage = Policy(tiny_sd(), num_steps=2), torch.tensor([-9.0, -2.5, 0.0, 0.5, 2.5])
    goodness = lambda **config: (
        PolicyGradient(TrainConfig(surrogate='nft', likelihood='matching', **config), policy)
        .surrogate.goodness(advantage)
        .tolist()
    )
    assert goodness() == [0, 0, 0.5, 0.75, 1]
    assert goodness(nft_clip=5.0) == pytest.approx([0, 0.25, 0.5, 0.55, 0.75])
