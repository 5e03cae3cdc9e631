"Losses against autograd, finite differences and few-line references."

import math

import pytest, torch

from drl_toolkit.algorithms.objectives import (
    NegativeAware,
    data_loss,
    kl_penalty,
    ppo_clip,
    reinforce,
    scale_clip,
    transition_weights,
)
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.sampling.transitions import Gaussian

g = torch.Generator().manual_seed(0)
OLD, ADV = (
    torch.randn(300, generator=g, dtype=torch.double),
    torch.randn(300, generator=g, dtype=torch.double),
)
NEW = OLD + 0.2 * torch.randn(300, generator=g, dtype=torch.double)


def by_hand(new, old, a, low, high):
    "One transition of Eq 7, in plain Python."
    ratio = math.exp(new - old)
    return -min(ratio * a, (1 + high) * a if a >= 0 else (1 - low) * a)


@pytest.mark.parametrize('clip, low, high', [(0.1, 0.1, 0.1), ((0.05, 0.3), 0.05, 0.3)])
def test_ppo_value_and_gradient(clip, low, high):
    new = NEW.clone().requires_grad_()
    loss, stats = ppo_clip(new, OLD, ADV, clip)
    rows = [by_hand(*t, low, high) for t in zip(NEW.tolist(), OLD.tolist(), ADV.tolist())]
    assert loss.item() == pytest.approx(sum(rows) / 300)
    loss.backward()
    for i in range(0, 300, 7):  # central differences of the plain Python
        n, o, a = NEW[i].item(), OLD[i].item(), ADV[i].item()
        slope = (by_hand(n + 1e-6, o, a, low, high) - by_hand(n - 1e-6, o, a, low, high)) / 2e-6 / 300
        assert new.grad[i].item() == pytest.approx(slope, abs=1e-7)
    ratio = (NEW - OLD).exp()
    assert stats['clip_fraction_high'].item() == pytest.approx(
        ((ratio > 1 + high) & (ADV > 0)).double().mean().item()
    )
    assert stats['clip_fraction_low'].item() == pytest.approx(
        ((ratio < 1 - low) & (ADV < 0)).double().mean().item()
    )
    assert (new.grad == 0).double().mean().item() == pytest.approx(
        stats['clip_fraction_high'].item() + stats['clip_fraction_low'].item()
    )
    assert stats['ratio_max'] == ratio.max()


def test_the_harmful_side_keeps_its_gradient():
    "DPOK's clamp of the ratio alone has none there."
    for a, move in ((1.0, -0.5), (-1.0, 0.5)):
        x = torch.tensor([move], requires_grad=True)
        ppo_clip(x, torch.zeros(1), torch.tensor([a]), 0.1)[0].backward()
        assert x.grad.item() == pytest.approx(-a * math.exp(move))


def test_first_gradient_is_reinforce():
    x, y = OLD.clone().requires_grad_(), OLD.clone().requires_grad_()
    ppo_clip(x, OLD, ADV, 0.1)[0].backward()
    reinforce(y, ADV).backward()
    assert torch.allclose(x.grad, y.grad)


def test_a_low_of_1_clips_no_fall():
    "Gradient of the ratio itself, however far it fell; the rise is clipped where it is said, above 2 too."
    new, old = torch.tensor([-9.0, 1.2]).requires_grad_(), torch.zeros(2)
    ppo_clip(new, old, torch.tensor([-1.0, 1.0]), (1.0, 3.0))[0].backward()
    assert torch.allclose(new.grad, torch.tensor([1.0, -1.0]) * new.detach().exp() / 2)


@pytest.mark.parametrize('advantage, release', [(0.0, 0.5), (2.5, 0.75), (-2.5, 0.25), (9.0, 1.0)])
def test_nfts_goodness(advantage, release):
    a = torch.tensor([advantage])
    assert NegativeAware(advantage_clip=5.0).goodness(a) == release and NegativeAware().goodness(
        a
    ) == 0.5 + 0.5 * max(-1, min(1, advantage))


@pytest.mark.parametrize('clip', [0, -0.1, float('inf'), (0.1, 0), float('nan')])
def test_bad_clip(clip):
    with pytest.raises(ValueError, match='clip_range'):
        ppo_clip(NEW, OLD, ADV, clip)


def test_scale_clip_keeps_the_nats():
    assert scale_clip(16384) == pytest.approx(1e-4) and scale_clip(dims=512) == pytest.approx(
        3.2e-3, rel=0.01
    )
    for dims in (512, 1024, 65536):
        assert dims * math.log1p(scale_clip(dims)) == pytest.approx(16384 * math.log1p(1e-4))
    with pytest.raises(ValueError, match='dims must be .*; got 0'):
        scale_clip(0)


def test_random_k_of_t_is_unbiased_and_samples_count_the_same():
    losses = torch.randn(4, 6, generator=g) + torch.linspace(0, 2, 6)
    from itertools import combinations

    for k in (1, 2, 5, 6):  # exact: all subsets, the same for each sample
        sample = torch.arange(4).repeat_interleave(k)
        values = [
            (transition_weights(sample) * losses[:, list(s)].flatten()).sum()
            for s in combinations(range(6), k)
        ]
        assert torch.stack(values).mean().item() == pytest.approx(losses.mean().item(), abs=1e-6)
    uneven = transition_weights(torch.tensor([7, 7, 7, 2]))
    assert (
        torch.allclose(uneven, torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 2]))
        and transition_weights(torch.tensor([0]), samples=4).item() == 0.25
    )


@pytest.mark.parametrize('size', [1, 7, 128, 299])
def test_micro_batches_do_not_change_the_gradient(size):
    weights = transition_weights(torch.arange(300) // 9).double()
    whole, cut = NEW.clone().requires_grad_(), NEW.clone().requires_grad_()
    ppo_clip(whole, OLD, ADV, 0.1, weights)[0].backward()
    for rows in torch.arange(300).split(size):
        ppo_clip(cut[rows], OLD[rows], ADV[rows], 0.1, weights[rows])[0].backward()
    assert torch.allclose(whole.grad, cut.grad)


def test_kl_in_nats_and_its_estimate():
    mean, shift, std = torch.randn(3000, 2, 4, 4, generator=g), 0.02, torch.full((3000, 1, 1, 1), 0.4)
    q, p = Gaussian(mean, std), Gaussian(mean + shift, std)
    truth = (
        torch.distributions.kl_divergence(
            torch.distributions.Normal(p.mean, 0.4), torch.distributions.Normal(q.mean, 0.4)
        )
        .sum((1, 2, 3))
        .mean()
        .item()
    )
    assert kl_penalty(p, q).item() == pytest.approx(truth, rel=1e-3)
    x = q.mean + q.std * torch.randn(mean.shape, generator=g)
    estimate = ppo_clip(p.log_prob(x), q.log_prob(x), torch.ones(3000), 0.1, dims=32)[1]['approx_kl'].item()
    assert estimate == pytest.approx(truth + truth**2 / 2, rel=0.1)
    std[1:] = 0  # deterministic steps have none
    weights = torch.full((3000,), 1 / 3000)
    one = ((shift / 0.4) ** 2 / 2) * 32
    q, p = Gaussian(mean, std), Gaussian(mean + shift, std)
    assert kl_penalty(p, q).item() == pytest.approx(one, rel=1e-3) and kl_penalty(
        p, q, weights
    ).item() == pytest.approx(one / 3000, rel=1e-3)


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction', 'sample'])
def test_data_loss_is_the_plain_denoising_error(kind):
    policy = Policy(tiny_sd(prediction_type=kind), num_steps=4, guidance_scale=5.0)  # guidance must not enter
    z, captions = torch.randn(3, *policy.latent_shape, generator=g), ['a cat', 'a dog', 'an apple']
    loss = data_loss(policy, z, captions, torch.Generator().manual_seed(1))
    again = torch.Generator().manual_seed(1)
    t, noise = torch.randint(1000, (3,), generator=again), torch.randn(z.shape, generator=again)
    a = policy.pipeline.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    target = dict(epsilon=noise, sample=z, v_prediction=a.sqrt() * noise - (1 - a).sqrt() * z)[kind]
    out = policy.network(
        a.sqrt() * z + (1 - a).sqrt() * noise,
        t,
        encoder_hidden_states=policy.encode(captions).rows()['prompt_embeds'],
    ).sample
    assert loss.item() == pytest.approx((out - target).square().mean().item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in policy.parameters())


def test_data_loss_takes_pictures_and_chosen_timesteps():
    policy = Policy(tiny_sd(), num_steps=4)
    value = data_loss(
        policy,
        torch.rand(2, 3, 64, 64, generator=g),
        ['a cat', 'a dog'],
        torch.Generator().manual_seed(0),
        timesteps=policy.timesteps,
    )
    assert value.isfinite() and value.ndim == 0


def test_the_data_loss_may_draw_latents_from_the_vae_as_pretraining_does():
    policy, images = Policy(tiny_sd(), num_steps=4), torch.rand(3, 3, 64, 64, generator=g)
    captions = ['a cat', 'a dog', 'an apple']
    again, shape = torch.Generator().manual_seed(5), (3, *policy.latent_shape)
    distribution = policy.vae.encode(images * 2 - 1).latent_dist
    drawn = distribution.mean + distribution.std * torch.randn(shape, generator=again)
    rest = data_loss(policy, drawn * policy.vae.config.scaling_factor, captions, again)
    loss = lambda **more: data_loss(policy, images, captions, torch.Generator().manual_seed(5), **more)
    assert loss(sample=True).item() == pytest.approx(rest.item(), rel=1e-4)
    assert loss().item() != pytest.approx(rest.item(), rel=1e-4)
