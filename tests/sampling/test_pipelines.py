"""Every pipeline class as a policy: diffusers' own images, exact ratios, frozen parts that stay, weights
that come back."""

import json

import diffusers, pytest, torch
from diffusers import DDIMScheduler, IPNDMScheduler, PNDMScheduler

from drl_toolkit.sampling.rollout import rollout
from drl_toolkit.algorithms.objectives import data_loss
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.sampling.config import PolicyConfig
from drl_toolkit.prompts.task import Task
from drl_toolkit.emoji.tiny import tiny_flux, tiny_pixart, tiny_sd, tiny_sd3, tiny_sdxl
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.config import TrainConfig
from tiers import some

BUILDERS = dict(sd=tiny_sd, sdxl=tiny_sdxl, sd3=tiny_sd3, flux=tiny_flux, pixart=tiny_pixart)
PROMPTS = ['a portrait of a doctor', 'an apple', 'a cat above a dog']
SMALL = dict(
    flux=dict(max_sequence_length=512), pixart=dict(use_resolution_binning=False, clean_caption=False)
)
every = pytest.mark.parametrize('name', BUILDERS)
train_of = lambda name: 'full' if name == 'pixart' else 'lora'


def policy_of(name, **options):
    return Policy(BUILDERS[name](), **dict(num_steps=4, train=train_of(name)) | options)


def their_images(policy, generators, **more):
    "The pipeline's own call, with a generator per sample."
    name = next(k for k, b in BUILDERS.items() if type(b()) is type(policy.pipeline))
    size = dict(height=policy.adapter.image_size, width=policy.adapter.image_size)
    return policy.pipeline(
        PROMPTS,
        generator=generators,
        num_inference_steps=policy.num_steps,
        output_type='pt',
        **size,
        **SMALL.get(name, {}),
        **more,
    ).images


def generators(policy):
    return [torch.Generator().manual_seed(s) for s in rollout(policy, PROMPTS, seed=3).seeds]


@pytest.mark.parametrize(
    'name, guidance',
    some([(n, g) for n in BUILDERS for g in (1.0, 4.0)], [('sd', 1.0), *((n, 4.0) for n in BUILDERS)]),
)
def test_without_noise_the_rollout_is_the_pipelines_own_picture(name, guidance):
    policy = policy_of(name, eta=0.0, guidance_scale=guidance)
    assert not policy.stochastic.any()
    ours = rollout(policy, PROMPTS, seed=3).images
    more = dict(eta=0.0) if name in ('sd', 'sdxl', 'pixart') else {}
    assert torch.allclose(
        ours, their_images(policy, generators(policy), guidance_scale=guidance, **more), atol=2e-4
    )
    if guidance != 1:
        assert not torch.allclose(
            ours, rollout(policy_of(name, eta=0.0), PROMPTS, seed=3).images, atol=1e-3
        )  # it does something


NOISY = ['DDIMScheduler', 'DDPMScheduler', 'EulerAncestralDiscreteScheduler', 'DPMSolverMultistepScheduler']


@pytest.mark.parametrize(
    'name, scheduler',
    some(
        [(n, s) for n in ('sd', 'sdxl', 'pixart') for s in NOISY],
        [*(('sd', s) for s in NOISY), ('sdxl', NOISY[2]), ('pixart', NOISY[3])],
    ),
)
def test_with_noise_too(name, scheduler):
    "The same generators, the same numbers, every stochastic scheduler."
    policy = policy_of(name, scheduler=scheduler)
    assert type(policy.pipeline.scheduler).__name__ == scheduler and policy.stochastic.any()
    ours = rollout(policy, PROMPTS, seed=3).images
    assert torch.allclose(
        ours,
        their_images(
            policy,
            generators(policy),
            guidance_scale=1.0,
            **(dict(eta=1.0) if scheduler == 'DDIMScheduler' else {}),
        ),
        atol=5e-4,
    )


# the schedulers that pipelines are published with, and what samples them
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear')
PUBLISHED = [
    (name, 'sd', 'DDIMScheduler', 'has no Gaussian transition')
    for name in (
        'PNDM',
        'EulerDiscrete',
        'LCM',
        'UniPCMultistep',
        'HeunDiscrete',
        'DEISMultistep',
        'LMSDiscrete',
        'KDPM2Discrete',
        'DPMSolverSinglestep',
        'TCD',
    )
]
PUBLISHED += [
    ('DPMSolverMultistep', 'sd', 'DPMSolverMultistepScheduler', 'of order 2 looks back'),
    ('FlowMatchHeunDiscrete', 'sd3', 'FlowMatchEulerDiscreteScheduler', 'has no Gaussian'),
]


@pytest.mark.parametrize('published, name, chosen, words', PUBLISHED)
def test_every_published_scheduler_is_sampled_by_a_stochastic_one_of_its_process(
    published, name, chosen, words, capsys, monkeypatch
):
    """Said in one line, once; named in the configuration; noise of the same betas or the same path; the same
    image as diffusers' with that scheduler."""
    monkeypatch.setattr('drl_toolkit.utils.messages._SAID', set())
    own = getattr(diffusers, f'{published}Scheduler')(**BETAS if name == 'sd' else dict(shift=3.0))
    made = lambda: Policy(BUILDERS[name](scheduler=own), num_steps=4)
    policy, _ = made(), made()
    told = capsys.readouterr().err
    assert (
        told.count('\n') == 1
        and f'scheduler: {published}Scheduler' in told
        and words in told
        and f'sampling with {chosen}' in told
        and '--scheduler chooses another' in told
    )
    assert (
        policy.config.scheduler == policy.scheduler == chosen == type(policy.pipeline.scheduler).__name__
        and policy.stochastic.any()
    )
    if name == 'sd':
        assert torch.allclose(policy.pipeline.scheduler.alphas_cumprod, own.alphas_cumprod)
    else:
        assert policy.pipeline.scheduler.shift == 3.0
    if chosen == 'DDIMScheduler':
        assert torch.allclose(
            rollout(policy, PROMPTS, seed=3).images,
            their_images(policy, generators(policy), guidance_scale=1.0, eta=1.0),
            atol=5e-4,
        )


def test_a_solver_on_flow_sigmas_is_sampled_as_the_flow():
    policy = Policy(
        tiny_sd3(
            scheduler=diffusers.UniPCMultistepScheduler(
                use_flow_sigmas=True, prediction_type='flow_prediction', flow_shift=3.0
            )
        ),
        num_steps=4,
    )
    assert (
        policy.scheduler == 'FlowMatchEulerDiscreteScheduler'
        and policy.pipeline.scheduler.shift == 3.0
        and policy.stochastic.any()
    )


@pytest.mark.parametrize(
    'pipeline, scheduler, words',
    [
        (
            tiny_sd3,
            'DDIMScheduler',
            "scheduler is 'DDIMScheduler', which is of discrete betas; .* FlowMatchEulerDiscreteScheduler "
            "is of flow matching, so FlowMatchEulerDiscreteScheduler is right",
        ),
        (
            tiny_flux,
            'DPMSolverMultistepScheduler',
            "'DPMSolverMultistepScheduler', which is of discrete betas; .* of flow matching",
        ),
        (
            tiny_sd,
            'FlowMatchEulerDiscreteScheduler',
            "'FlowMatchEulerDiscreteScheduler', which is of flow matching; the pipeline's own DDIMScheduler "
            "is of discrete betas, so DDIMScheduler is right",
        ),
        (tiny_sd, 'EDMEulerScheduler', 'scheduler must be one of DDIMScheduler.*; got EDMEulerScheduler'),
        (tiny_sd3, 'PNDMScheduler', 'scheduler must be one of .*; got PNDMScheduler'),
        (
            lambda: tiny_sd(scheduler=diffusers.EDMEulerScheduler()),
            'DDIMScheduler',
            "own EDMEulerScheduler is of EDM's preconditioned σ, so such a pipeline cannot be sampled here",
        ),
        (
            lambda: tiny_sd(scheduler=diffusers.EDMDPMSolverMultistepScheduler()),
            '',
            "scheduler is EDMDPMSolverMultistepScheduler, of EDM's preconditioned σ; a pipeline with a "
            "scheduler of discrete betas or flow",
        ),
        (
            lambda: tiny_sd3(scheduler=DDIMScheduler()),
            '',
            'scheduler is DDIMScheduler, but StableDiffusion3Pipeline is a flow-matching model; '
            'FlowMatchEulerDiscreteScheduler is right',
        ),
        (
            lambda: tiny_sd(scheduler=IPNDMScheduler()),
            '',
            'scheduler is IPNDMScheduler, of a noise process that is not known here',
        ),
        (
            lambda: tiny_sd(prediction_type='epsilon', zero_snr=True),
            '',
            "prediction_type is 'epsilon', but its schedule starts at pure noise",
        ),
    ],
)
def test_schedulers_of_another_noise_process_are_refused(pipeline, scheduler, words):
    with pytest.raises((ValueError, TypeError), match=words):
        Policy(pipeline(), num_steps=4, scheduler=scheduler)


def test_saved_weights_name_the_scheduler_that_sampled(tmp_path, capsys, monkeypatch):
    """In policy.json and on the card; the card's code gives plain diffusers the same scheduler, and the
    policy comes back as it was."""
    tiny_sd(
        prediction_type='epsilon', scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    ).save_pretrained(tmp_path / 'base')
    for train in ('lora', 'full'):
        policy = Policy.from_pretrained(tmp_path / 'base', num_steps=4, train=train)
        folder = policy.save(tmp_path / train)
        card = (folder / 'README.md').read_text()
        assert (
            json.loads((folder / 'policy.json').read_text())['scheduler'] == 'DDIMScheduler'
            and 'with DDIMScheduler' in card
        )
        code = card.split('```python')[1].split('```')[0]
        found = {}
        monkeypatch.chdir(folder)  # the card's paths are seen from where it lies
        exec(code, found)
        mine, theirs = (p.scheduler for p in (policy.pipeline, found['pipeline']))
        settings = lambda s: {k: v for k, v in s.config.items() if not k.startswith('_')}
        assert type(theirs) is DDIMScheduler and settings(theirs) == settings(mine)
        again = Policy.from_pretrained(folder)
        assert torch.equal(rollout(again, PROMPTS, seed=1).images, rollout(policy, PROMPTS, seed=1).images)


@pytest.mark.parametrize('name', ['sd', 'sdxl', 'sd3', 'pixart'])
def test_negative_prompts_and_rescaled_guidance(name):
    options = dict(guidance_rescale=0.7) if name in ('sd', 'sdxl') else {}
    policy = policy_of(name, eta=0.0, guidance_scale=3.0, negative_prompt='a dog', **options)
    theirs = their_images(
        policy,
        generators(policy),
        guidance_scale=3.0,
        negative_prompt=['a dog'] * 3 if name != 'pixart' else 'a dog',
        **options,
    )
    assert torch.allclose(rollout(policy, PROMPTS, seed=3).images, theirs, atol=2e-4)


@pytest.mark.parametrize(
    'name, guidance',
    some(
        [(n, g) for n in BUILDERS for g in (1.0, 3.0)],
        [('sd', 1.0), ('sdxl', 3.0), ('sd3', 3.0), ('flux', 3.0), ('pixart', 3.0)],
    ),
)
def test_ratio_is_one_and_batches_do_not_matter(name, guidance):
    policy = policy_of(name, guidance_scale=guidance, num_steps=3)
    prompts = PROMPTS * 6
    traj = rollout(policy, prompts, seed=1)
    for size in (1, 3, 16):
        other = rollout(policy, prompts, seed=1, batch_size=size)
        assert torch.allclose(
            other.latents, traj.latents, atol=2e-5
        )  # the transformers' rounding depends on the batch; the UNet's does not
        if name in ('sd', 'sdxl'):
            assert torch.equal(other.latents, traj.latents)
    rows = traj.transitions(policy.stochastic.nonzero().T.expand(len(prompts), -1))
    cond = policy.encode(prompts)[rows['sample']]
    ratio = (
        policy.transition(rows['latents'], rows['step'], cond).log_prob(rows['next_latents'])
        - rows['old_log_prob']
    ).exp()
    assert (ratio - 1).abs().max() < (1e-7 if name in ('sd', 'sdxl') else 2e-6)


def moved_task():
    return Task('bright', PROMPTS, lambda images, prompts: images.mean((1, 2, 3)), samples=6)


@pytest.mark.parametrize(
    'name, train',
    some(
        [(n, t) for n in BUILDERS for t in ('lora', 'full')],
        [
            ('sd', 'lora'),
            ('sdxl', 'full'),
            ('sd3', 'lora'),
            ('flux', 'full'),
            ('pixart', 'lora'),
            ('pixart', 'full'),
        ],
    ),
)
def test_one_step_of_training_moves_what_it_should_and_comes_back(name, train, tmp_path):
    if (name, train) == ('pixart', 'lora'):
        with pytest.raises(
            ValueError,
            match="train must be 'full': diffusers cannot load a LoRA into PixArtSigmaPipeline; got 'lora'",
        ):
            policy_of(name, train='lora')
        return
    BUILDERS[name]().save_pretrained(tmp_path / 'base')
    policy = Policy.from_pretrained(tmp_path / 'base', num_steps=3, train=train)
    state = lambda p: {
        f'{part}.{n}': t.clone()
        for part, m in p.pipeline.components.items()
        if isinstance(m, torch.nn.Module)
        for n, t in m.state_dict().items()
    }
    before, trained = state(policy), {f'{policy.adapter.network_name}.{n}' for n in policy.named_parameters()}
    if train == 'full':
        policy.base_weights()
    was = rollout(policy, PROMPTS, seed=1).images
    Trainer(
        policy, [moved_task()], TrainConfig(epochs=2, lr=1e-2, warmup=0, train_steps=2), callbacks=[]
    ).fit()
    after = state(policy)
    assert all(torch.equal(before[n], after[n]) for n in before if n not in trained) and any(
        not torch.equal(before[n], after[n]) for n in trained
    )
    now = rollout(policy, PROMPTS, seed=1).images
    assert not torch.allclose(was, now, atol=1e-4)
    with policy.reference():
        assert torch.equal(rollout(policy, PROMPTS, seed=1).images, was)
    folder = policy.save(tmp_path / 'tuned', base=str(tmp_path / 'base'), notes='## Training\nbright')
    assert torch.equal(rollout(Policy.from_pretrained(folder), PROMPTS, seed=1).images, now)
    assert (
        json.loads((folder / 'policy.json').read_text())['train'] == train
        and 'bright' in (folder / 'README.md').read_text()
    )
    plain = type(policy.pipeline).from_pretrained(
        folder if train == 'full' else tmp_path / 'base'
    )  # plain diffusers reads it too
    if train == 'lora':
        plain.load_lora_weights(str(folder), weight_name='pytorch_lora_weights.safetensors')
    plain.set_progress_bar_config(disable=True)
    assert torch.allclose(
        rollout(Policy(plain, num_steps=3, train=train), PROMPTS, seed=1).images, now, atol=1e-5
    )


@pytest.mark.parametrize(
    'name, train',
    some(
        [(n, t) for n in ('sd', 'sdxl', 'sd3', 'flux') for t in ('lora', 'full')],
        [('sdxl', 'lora'), ('sd3', 'full')],
    ),
)
def test_text_encoders_learn_if_asked(name, train, tmp_path):
    BUILDERS[name]().save_pretrained(tmp_path / 'base')
    policy = Policy.from_pretrained(
        tmp_path / 'base', num_steps=2, train=train, train_text_encoder=True, guidance_scale=2.0
    )
    words = [n for n in policy.named_parameters() if n.startswith('text_encoder')]
    assert words
    before = {n: policy.named_parameters()[n].detach().clone() for n in words}
    was = rollout(policy, PROMPTS, seed=1).images
    if train == 'full':
        policy.base_weights()
    record = Trainer(
        policy,
        [moved_task()],
        TrainConfig(epochs=2, lr=1e-2, warmup=0, train_steps=1, kl_weight=1e-4),
        callbacks=[],
    ).fit()
    assert all(row['tasks']['bright']['ratio_error'] < 2e-6 for row in record)
    assert any(not torch.equal(before[n], p) for n, p in policy.named_parameters().items() if n in before)
    now = rollout(policy, PROMPTS, seed=1).images
    with policy.reference():
        assert torch.equal(rollout(policy, PROMPTS, seed=1).images, was)
    folder = policy.save(tmp_path / 'tuned', base=str(tmp_path / 'base'))
    assert torch.allclose(rollout(Policy.from_pretrained(folder), PROMPTS, seed=1).images, now, atol=1e-5)


@every
def test_data_loss_and_its_gradient(name):
    policy = policy_of(name)
    loss = data_loss(policy, torch.rand(4, 3, 64, 64), PROMPTS + ['a key'], torch.Generator().manual_seed(0))
    loss.backward()
    with_gradient = [p for p in policy.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert (
        0.1 < loss.item() < 20 and len(with_gradient) >= len(policy.parameters()) / 3
    )  # of a new LoRA the first matrices have none, and SD3's and FLUX's last block drops its text


def test_the_unconditional_branch_can_be_left_out_of_the_gradient():
    "The same images and ratios; another gradient."
    found = {}
    for both in (True, False):
        policy = policy_of('sd', guidance_scale=3.0, train='full', train_unconditional=both)
        x, cond = (
            torch.randn(16, *policy.latent_shape, generator=torch.Generator().manual_seed(0)),
            policy.encode(['a cat'] * 16),
        )
        out = policy.predict(x, 1, cond)
        out.square().mean().backward()
        found[both] = out.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert torch.allclose(found[True][0], found[False][0], atol=1e-5) and not torch.allclose(
        found[True][1], found[False][1], rtol=0.1
    )


def test_words_are_read_once():
    policy, calls = policy_of('sdxl'), []
    real = policy.adapter.encode
    policy.adapter.encode = lambda prompts: calls.append(list(prompts)) or real(prompts)
    for _ in range(3):
        policy.encode(PROMPTS * 4)
    policy.encode(['a key', 'an apple'])
    assert calls == [PROMPTS, ['a key']]


def test_checkpointing_is_the_same_gradient():
    grads = []
    for checkpointing in (False, True):
        policy = policy_of('sd', train='full', checkpointing=checkpointing)
        x = torch.randn(16, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        policy.predict(x, 1, policy.encode(['a cat'] * 16)).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(sde='x'), "sde must be one of '', .*got 'x'"),
        (dict(precision='fp8'), "precision must be one of .*got 'fp8'"),
        (dict(latents_dtype='int8'), "latents_dtype must be one of .*got 'int8'"),
        (dict(guidance_rescale=2.0), r'guidance_rescale must be in \[0, 1\]; got 2.0'),
        (dict(noise_level=0.5), 'noise_level is 0.5, but DDIMScheduler has noise of its own'),
        (dict(sde_start=3, sde_steps=4), 'stochastic_steps must hold indices from 0 to 3; got 4'),
        (dict(scheduler='Adam'), "scheduler must be the name of a scheduler .*; got 'Adam'"),
        (dict(image_size=100), 'image_size must be a multiple of 16.*; got 100'),
        (dict(lora_rank=0), 'lora_rank must be 1 or more; got 0'),
        (dict(guidance_scale='3'), "guidance_scale must be a finite number; got '3'"),
        (dict(scheduler='PNDMScheduler'), 'scheduler must be one of .*; got PNDMScheduler'),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        policy_of('sd', **options)


def test_other_classes_are_named():
    with pytest.raises(TypeError, match='must be one of StableDiffusionPipeline, StableDiffusionXLPipeline'):
        Policy(object())
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidance'"):
        PolicyConfig(guidance=3.0)
    with pytest.raises(ValueError, match='offload must be False with train_text_encoder'):
        policy_of('sd', train_text_encoder=True, offload=True)
    with pytest.raises(ValueError, match='PixArtSigmaPipeline has no CLIP text encoder'):
        policy_of('pixart', train_text_encoder=True)


@pytest.mark.parametrize('name', ['sd', 'sdxl', 'sd3', 'flux', 'pixart'])
def test_offloaded_text_encoders_come_only_to_read_new_prompts(name, monkeypatch):
    "The moves are watched; there is only one device here, so that the pictures must be the same."
    moves = []
    real = torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module,
        'to',
        lambda self, *a, **k: (
            a and isinstance(a[0], (str, torch.device)) and moves.append((type(self).__name__, str(a[0]))),
            real(self, *a, **k),
        )[1],
    )
    kept, policy = policy_of(name, guidance_scale=2.0), policy_of(name, guidance_scale=2.0, offload=True)
    count = len(policy.text_encoders)
    moves.clear()
    assert torch.equal(rollout(kept, PROMPTS, seed=1).images, rollout(policy, PROMPTS, seed=1).images)
    assert len(moves) == count * 2 * (
        1 if policy.adapter.guided_by_input else 2
    )  # to the device and back, for the prompts and for the negative one
    rollout(policy, PROMPTS, seed=2)
    assert len(moves) == count * 2 * (1 if policy.adapter.guided_by_input else 2)


@pytest.mark.parametrize(
    'size, words',
    [
        ((8, 16), 'draws 128 x 64 pixels.*image_size=64'),
        (None, 'says no size; give one by image_size'),
        (9, 'image_size must be a multiple of 16, such as 64; got 72, as the model says'),
        ((8, None), 'says no size'),
    ],
)
def test_sizes_that_cannot_be_drawn_are_refused_before_anything_is_sampled(size, words):
    for name in ('sd', 'sdxl', 'sd3', 'pixart'):
        pipeline = BUILDERS[name]()
        getattr(pipeline, 'unet' if hasattr(pipeline, 'unet') else 'transformer').register_to_config(
            sample_size=size
        )
        with pytest.raises(ValueError, match=words) as caught:
            Policy(pipeline, num_steps=2, train='full')
        assert '\n' not in str(caught.value)
    policy = Policy(pipeline, num_steps=2, train='full', image_size=64)  # said: squares of this size
    assert rollout(policy, PROMPTS[:1]).images.shape[-2:] == (64, 64)


def test_sizes_of_flux_and_of_the_user():
    pipeline = BUILDERS['flux']()
    pipeline.vae.register_to_config(sample_size=(64, 128))
    with pytest.raises(ValueError, match='of the vae is .* draws 128 x 64'):
        Policy(pipeline, num_steps=2)
    pipeline = BUILDERS['sd']()
    for bad, near in ((65, 64), (7, 16)):
        with pytest.raises(
            ValueError, match=f'image_size must be a multiple of 16, such as {near}; got {bad}'
        ):
            Policy(pipeline, num_steps=2, image_size=bad)
    pipeline.unet.register_to_config(sample_size=(8, 8))
    assert Policy(pipeline, num_steps=2).latent_shape == (4, 8, 8)


def test_t5_sees_as_many_tokens_as_its_tokenizer_says():
    "256 in Stable Diffusion 3; a model that was trained on fewer would see padding it has never met."
    pipeline = tiny_sd3()
    whole = Policy(pipeline, num_steps=2).encode(['a cat']).rows()['prompt_embeds'].shape[1]
    pipeline.tokenizer_3.model_max_length = 16
    few = Policy(pipeline, num_steps=2).encode(['a cat']).rows()['prompt_embeds']
    theirs = pipeline.encode_prompt(
        ['a cat'], None, None, do_classifier_free_guidance=False, max_sequence_length=16
    )[0]
    assert whole - few.shape[1] == 256 - 16
    assert torch.equal(few, theirs)
