"Tiny pipelines: real classes, seeded weights, prompts that matter, folders that load again."

import random, time

import numpy as np, pytest, torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

from drl_toolkit.emoji.tiny import t5_tokenizer, tiny_flux, tiny_pixart, tiny_sd, tiny_sd3, tiny_sdxl

BUILDERS = [tiny_sd, tiny_sdxl, tiny_sd3, tiny_flux, tiny_pixart]
PROMPTS = ['a cat', 'a portrait of a doctor']
every = pytest.mark.parametrize('build', BUILDERS)


def network(pipeline):
    return getattr(pipeline, 'unet', None) or pipeline.transformer


def parts(pipeline):
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def weights(pipeline):
    return {
        f'{name}.{key}': w for name, part in parts(pipeline).items() for key, w in part.state_dict().items()
    }


def draw(pipeline, prompts=PROMPTS, **settings):
    "Two steps of the pipeline's own `__call__`, every image from the same noise."
    if 'PixArt' in type(pipeline).__name__:
        settings |= dict(use_resolution_binning=False, clean_caption=False)
    return pipeline(
        prompts,
        num_inference_steps=2,
        output_type='pt',
        generator=[torch.Generator().manual_seed(0) for _ in prompts],
        **settings,
    ).images


def calls(pipeline, **settings):
    "What the network was given and what it gave, step by step."
    seen = []
    handle = network(pipeline).register_forward_hook(
        lambda module, args, kwargs, out: seen.append((args, kwargs, out[0])), with_kwargs=True
    )
    draw(pipeline, **settings)
    handle.remove()
    return seen


def settings(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith('_')}


def global_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@every
def test_builds_quickly_and_leaves_random_states_alone(build):
    build()  # imports and caches
    before, start = global_states(), time.perf_counter()
    pipeline = build()
    assert (
        time.perf_counter() - start < 5 and global_states() == before
    )  # 0.1 s; the limit is for a busy machine
    assert sum(w.numel() for w in weights(pipeline).values()) < 400_000
    assert not any(part.training for part in parts(pipeline).values())
    assert pipeline._progress_bar_config == {'disable': True}


@every
def test_weights_depend_on_the_seed_alone(build):
    first = weights(build(seed=3))
    torch.manual_seed(11)
    second, other = weights(build(seed=3)), weights(build(seed=4))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert not any(
        torch.equal(first[k], other[k])
        for k in first
        if k.endswith('proj_out.weight') or k.endswith('conv_out.weight')
    )


@every
def test_prompts_reach_the_output(build):
    (*_, out), *_ = calls(build(), guidance_scale=1.0)
    assert 0.1 < out.std() < 3 and (out[0] - out[1]).abs().max() > 1e-2


@every
@pytest.mark.parametrize('guidance', [1.0, 4.0])
def test_a_saved_folder_draws_the_same_picture(build, guidance, tmp_path):
    pipeline = build()
    pipeline.save_pretrained(tmp_path)
    assert list(tmp_path.rglob('*.safetensors')) and not list(tmp_path.rglob('*.bin'))
    again = type(pipeline).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    images = draw(pipeline, guidance_scale=guidance)
    assert images.shape == (2, 3, 64, 64) and torch.isfinite(images).all() and images.std() > 0.01
    assert torch.equal(
        draw(again, guidance_scale=guidance, height=64, width=64), images
    )  # FLUX forgets its size
    assert (
        settings(again.scheduler) == settings(pipeline.scheduler)
        and weights(again).keys() == weights(pipeline).keys()
    )


@every
@pytest.mark.parametrize('size', [40, 0, -16, 8])
def test_bad_sizes(build, size):
    with pytest.raises(ValueError, match=f'image_size: {size} is not a positive multiple of 16'):
        build(image_size=size)


@every
@pytest.mark.parametrize('size', [16, 48])
def test_other_sizes(build, size):
    assert draw(build(image_size=size)).shape == (2, 3, size, size)


@pytest.mark.parametrize('build', [tiny_sd, tiny_sdxl, tiny_pixart])
@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction', 'sample'])
def test_prediction_types(build, kind):
    scheduler = build(prediction_type=kind).scheduler
    assert scheduler.config.prediction_type == kind and scheduler.config.clip_sample is False
    assert (scheduler.alphas_cumprod[-1] < 1e-6) == (kind != 'epsilon')


def test_another_scheduler():
    for build, scheduler in (
        (tiny_sdxl, EulerDiscreteScheduler()),
        (tiny_pixart, DPMSolverMultistepScheduler()),
    ):
        pipeline = build(scheduler=scheduler)
        assert pipeline.scheduler is scheduler and torch.isfinite(draw(pipeline)).all()


def perturbed(pipeline, change, **settings):
    "How far the first output moves if the network's arguments are changed."
    args, kwargs, out = calls(pipeline, guidance_scale=1.0, **settings)[0]
    with torch.no_grad():
        return (network(pipeline)(*args, **change(kwargs))[0] - out).abs().max()


def scaled(name, rows=slice(None), columns=slice(None)):
    "Doubles a part of one tensor."

    def change(kwargs):
        value = kwargs[name].clone()
        value[:, rows, columns] *= 2
        return kwargs | {name: value}

    return change


def test_sdxl_listens_to_both_encoders_and_to_sizes():
    pipeline = tiny_sdxl()
    assert pipeline.vae.config.force_upcast and pipeline.text_encoder_2.config.projection_dim == 32
    assert [t.pad_token for t in (pipeline.tokenizer, pipeline.tokenizer_2)] == ['<|endoftext|>', '!']
    _, kwargs, _ = calls(pipeline, guidance_scale=1.0)[0]
    added = kwargs['added_cond_kwargs']
    assert kwargs['encoder_hidden_states'].shape == (2, 16, 16 + 32) and added['text_embeds'].shape == (2, 32)
    assert added['time_ids'].tolist() == [[64, 64, 0, 0, 64, 64]] * 2

    def cond(name, factor):
        return lambda kwargs: kwargs | dict(added_cond_kwargs=added | {name: added[name] * factor})

    for change in (
        scaled('encoder_hidden_states', columns=slice(16)),
        scaled('encoder_hidden_states', columns=slice(16, None)),
        cond('text_embeds', 2),
        cond('time_ids', 2),
    ):
        assert perturbed(pipeline, change) > 1e-3


def test_sd3_listens_to_three_encoders():
    pipeline = tiny_sd3()
    _, kwargs, out = calls(pipeline, guidance_scale=1.0)[0]
    words = kwargs['encoder_hidden_states']
    assert (
        words.shape == (2, 16 + 256, 64)
        and not words[:, :16, 48:].any()
        and kwargs['pooled_projections'].shape == (2, 48)
    )
    assert (
        kwargs['hidden_states'].shape == out.shape == (2, 16, 8, 8) and pipeline.scheduler.config.shift == 3
    )
    for change in (
        scaled('encoder_hidden_states', slice(16), slice(16)),
        scaled('encoder_hidden_states', slice(16), slice(16, 48)),
        scaled('encoder_hidden_states', slice(16, None)),
    ):
        assert perturbed(pipeline, change) > 1e-3
    assert (
        perturbed(pipeline, lambda kwargs: kwargs | dict(pooled_projections=2 * kwargs['pooled_projections']))
        > 1e-3
    )


def test_flux_packs_latents_and_takes_guidance():
    pipeline = tiny_flux()
    _, kwargs, out = calls(pipeline, guidance_scale=3.5)[0]
    assert (
        kwargs['hidden_states'].shape == out.shape == (2, 16, 64) and kwargs['guidance'].tolist() == [3.5] * 2
    )
    assert kwargs['encoder_hidden_states'].shape == (2, 512, 64) and kwargs['pooled_projections'].shape == (
        2,
        32,
    )
    assert kwargs['timestep'].tolist() == [1.0, 1.0] and kwargs['img_ids'].shape == (16, 3)
    assert pipeline.scheduler.config.use_dynamic_shifting and pipeline.vae.config.shift_factor == 0.1159
    assert not torch.equal(draw(pipeline, guidance_scale=1.0), draw(pipeline, guidance_scale=9.0))
    schnell = tiny_flux(guidance_embeds=False)
    assert torch.equal(draw(schnell, guidance_scale=1.0), draw(schnell, guidance_scale=9.0))


def test_pixart_throws_the_variance_away_and_masks_padding():
    pipeline = tiny_pixart()
    _, kwargs, out = calls(pipeline, guidance_scale=1.0)[0]
    assert (
        out.shape == (2, 8, 8, 8)
        and pipeline.transformer.config.out_channels == 2 * pipeline.transformer.config.in_channels
    )
    assert kwargs['encoder_attention_mask'].sum(1).tolist() == [3, 6]  # words and the end of the text
    assert perturbed(pipeline, scaled('encoder_hidden_states', slice(6, None))) == 0
    assert perturbed(pipeline, scaled('encoder_hidden_states', slice(3))) > 1e-3


def test_t5_tokenizer(tmp_path):
    tokenizer = t5_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for text in ('a cat above a dog', 'two Zebras, 100% glad!', '', 'ünknown'):
        ids = tokenizer(text).input_ids
        assert (
            ids == type(tokenizer).from_pretrained(tmp_path)(text).input_ids
            and ids[-1] == tokenizer.eos_token_id == 1
        )
    assert (
        tokenizer('a cat').input_ids == tokenizer.convert_tokens_to_ids(['▁a', '▁cat', '</s>'])
        and tokenizer.pad_token_id == 0
    )
