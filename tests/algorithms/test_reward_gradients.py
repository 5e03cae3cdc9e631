"Gradients through the sampler against finite differences and a sampler written here."

import pytest, torch

from drl_toolkit.algorithms.reward_gradients import (
    AlignProp,
    DRaFT,
    DRaFTLV,
    ReFL,
    randn_of_steps,
    rewards_of,
    denoise_with_graph,
)
from drl_toolkit.sampling.rollout import rollout, sample_seed
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.prompts.task import Task
from drl_toolkit.rewards.reward import jpeg_compressibility, reward
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.config import TrainConfig


@reward
def warmth(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 2].square().mean((1, 2))


PROMPTS = ['a cat', 'a dog', 'a cat']


def trainer(objective, steps=5, **told):
    task = Task('warm', PROMPTS, told.pop('reward', warmth), samples=6)
    return Trainer(
        Policy(tiny_sd(), num_steps=steps, train='full', eta=told.pop('eta', 1.0)),
        [task],
        TrainConfig(epochs=2, num_minibatches=1, lr=1e-3, warmup=0, **told),
        callbacks=[],
        objective=objective,
    )


@pytest.mark.parametrize('eta', [0.0, 1.0])
@pytest.mark.parametrize('depth', [1, 3, 5])
def test_walking_again_gives_the_same_picture(depth, eta):
    policy = Policy(tiny_sd(), num_steps=5, eta=eta)
    traj, steps = rollout(policy, PROMPTS, seed=2), range(5 - depth, 5)
    again, told = denoise_with_graph(
        policy,
        traj.latents[5 - depth],
        policy.encode(PROMPTS),
        randn_of_steps(policy, traj.seeds, steps),
        steps,
    )
    assert torch.equal(again, traj.latents[-1]) and told.shape[1] == depth


def by_hand(policy, traj, depth):
    """Minus the mean reward after the last DDIM steps, from the scheduler's alphas and the noise that the
    stored latents imply."""
    x, alphas, cond = (
        traj.latents[5 - depth],
        policy.pipeline.scheduler.alphas_cumprod,
        policy.encode(traj.prompts).rows()['prompt_embeds'],
    )
    for i in range(5 - depth, 5):
        v = policy.network(x, policy.timesteps[i].expand(len(x)), cond).sample
        alpha, prev = (
            alphas[policy.timesteps[i]],
            alphas[policy.timesteps[i + 1]] if i < 4 else policy.pipeline.scheduler.final_alpha_cumprod,
        )
        x0, noise = alpha.sqrt() * x - (1 - alpha).sqrt() * v, alpha.sqrt() * v + (1 - alpha).sqrt() * x
        std = ((1 - prev) / (1 - alpha) * (1 - alpha / prev)).sqrt()
        mean = prev.sqrt() * x0 + (1 - prev - std**2).clamp(min=0).sqrt() * noise
        x = mean + (traj.latents[i + 1] - mean).detach()  # the same draw; its noise has no gradient
    images = policy.vae.decode(x / policy.vae.config.scaling_factor).sample / 2 + 0.5
    return -warmth.score(images, traj.prompts).mean()


@pytest.mark.parametrize('depth', [1, 3])
def test_the_gradient_is_that_of_a_sampler_written_here(depth):
    t = trainer(DRaFT(depth))
    batch = t.collect(t.tasks[0])
    (rows,) = t.updates.plan(batch)
    t.updates.gradient(rows)
    theirs = torch.autograd.grad(by_hand(t.policy, batch.trajectory, depth), t.params)
    assert all(torch.allclose(p.grad, g, atol=1e-6 + 1e-3 * g.abs().max()) for p, g in zip(t.params, theirs))


@pytest.mark.parametrize(
    'objective', [DRaFT(2), AlignProp(3), DRaFTLV(repeats=3), ReFL(late=0.5)], ids=lambda o: type(o).__name__
)
def test_the_gradient_by_finite_differences(objective):
    t = trainer(objective)
    (rows,) = t.updates.plan(t.collect(t.tasks[0]))
    t.updates.gradient(rows)
    along = [p.grad.clone() for p in t.params]
    norm = torch.stack([g.square().sum() for g in along]).sum().sqrt()

    def moved(by):
        with torch.no_grad():
            torch._foreach_add_(t.params, along, alpha=by / norm)
            value = objective.loss(t, rows)[0].item()
            torch._foreach_add_(t.params, along, alpha=-by / norm)
        return value

    assert (moved(0.01) - moved(-0.01)) / 0.02 == pytest.approx(norm.item(), rel=0.05)


def test_saturated_pixels_keep_their_gradient():
    policy = Policy(tiny_sd(), num_steps=2)
    with torch.no_grad():
        policy.vae.decoder.conv_out.bias.add_(4.0)
    latents = torch.randn(
        2, *policy.latent_shape, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    assert (policy.decode(latents) == 1).all()  # every pixel is too bright
    rewards_of(policy, warmth, latents, ['a cat'] * 2).sum().backward()
    assert latents.grad.abs().sum() > 0


def test_depths_of_alignprop_and_steps_of_refl_are_all_drawn():
    t, g = trainer(AlignProp(3)), torch.Generator().manual_seed(0)
    assert {t.objective.count(g) for _ in range(60)} == {1, 2, 3}
    t = trainer(ReFL(late=0.4))
    seen = set()
    for t.epoch in range(4):
        batch = t.collect(t.tasks[0])
        seen |= set(
            t.objective.transitions(t.context, batch, torch.Generator().manual_seed(t.epoch))['step'].tolist()
        )
    assert seen == {3, 4}


def test_refl_scores_what_the_network_expects():
    t = trainer(ReFL(late=1.0))
    rows = t.objective.transitions(
        t.context, batch := t.collect(t.tasks[0]), torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        clean, _ = t.objective.finish(t.policy, rows)
    for i, step in enumerate(rows['step'].tolist()):
        alpha, x = (
            t.policy.pipeline.scheduler.alphas_cumprod[t.policy.timesteps[step]],
            batch.trajectory.latents[step, i : i + 1],
        )
        with torch.no_grad():
            v = t.policy.network(
                x,
                t.policy.timesteps[step][None],
                t.policy.encode([batch.trajectory.prompts[i]]).rows()['prompt_embeds'],
            ).sample
        assert torch.allclose(clean[i], (alpha.sqrt() * x - (1 - alpha).sqrt() * v)[0], atol=1e-4)


def test_kl_penalty_micro_batches_and_resume():
    whole, small = (trainer(DRaFT(2), kl_weight=0.5, micro_batch=m) for m in (64, 2))
    for t in (whole, small):
        t.fit()
    assert (
        whole.history[0]['tasks']['warm']['kl'] == pytest.approx(0, abs=1e-12)
        and whole.history[1]['tasks']['warm']['kl'] > 0
    )
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(whole.params, small.params))


def test_refl_has_the_pretraining_loss_that_its_paper_has():
    "Its gradient is the sum of both."
    data = lambda count, seed: (
        torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed)),
        ['a cat'] * count,
    )
    gradients = []
    for told in ({}, dict(data_weight=0.3, data_mode='joined', data_batch=4)):
        t = Trainer(
            Policy(tiny_sd(), num_steps=4, train='full'),
            [Task('warm', PROMPTS, warmth, samples=6)],
            TrainConfig(epochs=1, num_minibatches=1, **told),
            data=data,
            callbacks=[],
            objective=ReFL(),
        )
        (rows,) = t.updates.plan(t.collect(t.tasks[0]))
        t.updates.gradient(rows)
        gradients.append([p.grad.clone() for p in t.params])
    t.optimizer.zero_grad()
    t.updates.data_loss.add(sample_seed(t.config.seed, 0, -2), 0.3)
    assert all(
        torch.allclose(both, alone + p.grad, atol=1e-6) for alone, both, p in zip(*gradients, t.params)
    )


@pytest.mark.parametrize(
    'objective, told, words',
    [
        (DRaFT(0), {}, 'steps must be in 1 … 5 .*got 0'),
        (DRaFT(6), {}, 'steps must be in 1 … 5 .*got 6'),
        (ReFL(late=0.0), {}, r'late must be in \(0, 1\]; got 0'),
        (DRaFT(), dict(reward=jpeg_compressibility), 'has no gradient'),
    ],
)
def test_what_cannot_be_trained_is_refused(objective, told, words):
    with pytest.raises(ValueError, match=words):
        trainer(objective, **told)


def test_refls_release_lets_rewards_beyond_its_margin_be_and_has_no_guidance():
    "1e-3 max(2 - r, 0) of the conditional prediction, by hand; a policy without guidance gives the same."
    bright = reward(lambda images, prompts: 40 * warmth.score(images, prompts) - 6.5, name='bright')
    gradients = []
    for guidance, objective in ((4.0, ReFL.released()), (4.0, ReFL())):
        policy = Policy(tiny_sd(), num_steps=4, train='full', guidance_scale=guidance)
        task = Task('bright', PROMPTS, bright, samples=8)
        t = Trainer(policy, [task], TrainConfig(num_minibatches=1), callbacks=[], objective=objective)
        (rows,) = t.updates.plan(t.collect(task))
        t.updates.gradient(rows)
        gradients.append((t, rows, [p.grad.clone() for p in t.params]))
    t, rows, found = gradients[0]
    alpha = t.policy.pipeline.scheduler.alphas_cumprod[t.policy.timesteps[rows['step']]].view(-1, 1, 1, 1)
    x, cond = rows['latents'], rows['cond'].rows()['prompt_embeds']
    v = t.policy.network(x, t.policy.timesteps[rows['step']], cond).sample
    x0 = alpha.sqrt() * x - (1 - alpha).sqrt() * v
    images = t.policy.vae.decode(x0 / t.policy.vae.config.scaling_factor).sample / 2 + 0.5
    r = bright.score(images, PROMPTS)
    assert (r > 2).any() and (r < 2).any()
    loss = 1e-3 * torch.nn.functional.relu(2 - r).mean()
    right = torch.autograd.grad(loss, t.params)
    assert all(torch.allclose(a, b, atol=1e-8 + 2e-3 * b.abs().max()) for a, b in zip(found, right))
    assert not any(
        torch.allclose(a, b, rtol=0.5) for a, b in zip(found, gradients[1][2]) if b.abs().max() > 1e-4
    )
    with pytest.raises(ValueError, match='scale must be above 0; got 0'):
        trainer(ReFL(scale=0))
