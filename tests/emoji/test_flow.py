"The second base: what it is trained on is what diffusers' pipeline and scheduler do with it."

import json, os

import pytest, torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from drl_toolkit.emoji import prompts as P
from drl_toolkit.emoji.evaluation import read_images
from drl_toolkit.emoji.pretrain import flow
from drl_toolkit.evaluation.evaluate import PromptSet, sample_prompt_sets
from drl_toolkit.sampling.loading import open_pipeline
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.sampling.rollout import rollout
from drl_toolkit.utils.loading import shipped_folder

CAPTIONS = ['a portrait of a doctor', 'an apple next to an avocado on a blue background']


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return flow.FlowDenoiser().eval()


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('flow')
    flow.export_flow(model, folder)
    model.float()
    return folder


@torch.no_grad()
def test_training_sees_the_words_as_the_pipeline_does(model, folder):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
    options = dict(do_classifier_free_guidance=False, max_sequence_length=flow.CONTEXT)
    embeds, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, None, None, **options)
    ours = model.encode(flow.tokens_of(CAPTIONS))
    assert torch.allclose(ours['encoder_hidden_states'], embeds, atol=1e-5)
    assert torch.allclose(ours['pooled_projections'], pooled, atol=1e-5)


@torch.no_grad()
def test_a_policy_gives_t5_as_many_tokens_as_it_was_trained_on(folder):
    policy = Policy.from_pretrained(folder, num_steps=2)
    embeds = policy.encode(CAPTIONS).rows()['prompt_embeds']
    assert embeds.shape == (2, 2 * flow.CONTEXT, 128)
    images = rollout(policy, CAPTIONS, seed=1).images
    assert images.shape == (2, 3, 64, 64) and images.isfinite().all()


def test_timesteps_and_sigmas_are_the_schedulers():
    scheduler = flow.new_scheduler()
    scheduler.set_timesteps(flow.STEPS)
    assert torch.allclose(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    torch.manual_seed(0)
    sigma = flow.sigmas_for(40_000, scheduler.sigmas[:-1])
    own = torch.isin(sigma, scheduler.sigmas[:-1])
    assert own.float().mean().item() == pytest.approx(0.5, abs=0.01)
    # σ = s u / (1 + (s - 1) u) for u uniform: P(σ < 1/2) = P(u < 1 / (s + 1))
    below = (sigma[~own] < 0.5).float().mean().item()
    assert below == pytest.approx(1 / (flow.SHIFT + 1), abs=0.01)


def test_the_loss_is_that_of_the_straight_lines_velocity(model):
    "Zero for the velocity that leads from noise to the image, and Euler's step along it ends there."
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 2, 16, 8, 8, generator=generator)
    sigma = torch.tensor([0.25, 1.0])
    seen = {}

    def exact(noisy, timestep, tokens):
        seen.update(noisy=noisy, timestep=timestep)
        return (noisy - clean) / sigma.view(-1, 1, 1, 1)

    loss = flow.flow_loss(exact, clean, {}, sigma, noise)
    assert loss.item() < 1e-10
    assert torch.equal(seen['timestep'], torch.tensor([250.0, 1000.0]))
    scheduler = flow.new_scheduler()
    scheduler.set_timesteps(sigmas=[1.0])
    end = scheduler.step(noise[1:] - clean[1:], scheduler.timesteps[0], seen['noisy'][1:]).prev_sample
    assert torch.allclose(end, clean[1:], atol=1e-6)
    tokens = flow.tokens_of(CAPTIONS)
    flow.flow_loss(model, clean, tokens, sigma, noise).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert all('final_layer_norm' in n or 'layers.1.' in n for n in silent)


# --- the shipped one


@pytest.fixture(scope='module')
def shipped():
    return Policy.from_pretrained('demo-sd3', num_steps=flow.STEPS, guidance_scale=2.0)


def test_both_bases_have_one_vae():
    "And plain diffusers puts the second together from the same two folders."
    first, second = open_pipeline('demo'), open_pipeline(os.path.relpath(shipped_folder('demo-sd3')))
    vae = AutoencoderKL.from_pretrained(shipped_folder('demo'), subfolder='vae', shift_factor=0.0)
    plain = StableDiffusion3Pipeline.from_pretrained(
        shipped_folder('demo-sd3'), vae=vae, dtype=torch.float32
    )
    for one, two, three in zip(*(p.vae.parameters() for p in (first, second, plain)), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    for two, three in zip(second.transformer.parameters(), plain.transformer.parameters(), strict=True):
        assert torch.equal(two, three)
    assert second.vae.config.shift_factor == 0 == plain.vae.config.shift_factor
    assert second.vae.config.scaling_factor == first.vae.config.scaling_factor


def test_the_second_base_draws_what_it_is_asked_for(shipped):
    "As the detector and the reader of tones see it; both have never seen an image of this network."
    objects = PromptSet('objects/all', tuple(P.objects()))
    portraits = PromptSet('portraits/all', tuple(P.portraits('all') * 4))
    images = sample_prompt_sets(shipped, [objects, portraits])
    assert read_images(objects, images['objects/all'])['object'].mean() > 0.8
    read = read_images(portraits, images['portraits/all'])
    assert read['face'].mean() > 0.8 and read['occupation'].mean() > 0.8


def test_a_lora_on_the_second_base_knows_it_by_name(tmp_path):
    policy = Policy.from_pretrained('demo-sd3', num_steps=2)
    for p in policy.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    policy.save(tmp_path / 'lora')
    assert json.loads((tmp_path / 'lora/policy.json').read_text())['base'] == 'demo-sd3'
    again = Policy.from_pretrained(tmp_path / 'lora')
    mine, other = (rollout(each, CAPTIONS, seed=0).images for each in (policy, again))
    assert torch.allclose(mine, other, atol=1e-4)
