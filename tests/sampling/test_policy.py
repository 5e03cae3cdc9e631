"A pipeline as a policy: same images as diffusers, exact ratio, weights that come back."

import os, subprocess, sys

import pytest, torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from drl_toolkit.sampling.lora_layer import in_one_product
from drl_toolkit.sampling.rollout import rollout, sample_seed
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.utils.devices import keep_freed_memory
from drl_toolkit.emoji.tiny import tiny_sd

PROMPTS = ['a portrait of a doctor', 'an apple', 'a cat above a dog']


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction'])
@pytest.mark.parametrize('guidance', [1.0, 4.0])
def test_the_pipelines_own_picture(prediction, guidance):
    "η = 0: the policy's sampler is the pipeline's."
    pipeline = tiny_sd(prediction_type=prediction)
    policy = Policy(pipeline, num_steps=4, eta=0.0, guidance_scale=guidance)
    noise = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = noise
        for step in range(4):
            x = policy.transition(x, step, policy.encode(PROMPTS)).mean
    theirs = pipeline(
        PROMPTS, latents=noise, num_inference_steps=4, guidance_scale=guidance, eta=0.0, output_type='pt'
    ).images
    assert torch.allclose(policy.decode(x), theirs, atol=1e-4)


@pytest.mark.parametrize('guidance', [1.0, 3.0])
def test_ratio_is_exactly_one_and_samples_do_not_depend_on_batches(guidance):
    policy = Policy(tiny_sd(), num_steps=5, guidance_scale=guidance)
    prompts = PROMPTS * 6
    traj = rollout(policy, prompts, seed=3, epoch=2)
    for size in (1, 3, 16):
        other = rollout(policy, prompts, seed=3, epoch=2, batch_size=size)
        assert torch.equal(other.latents, traj.latents) and torch.equal(other.log_probs, traj.log_probs)
    flat = traj.transitions(policy.stochastic.nonzero().T.expand(len(prompts), -1))
    cond = policy.encode(prompts)
    for rows in torch.randperm(len(flat['step'])).split(23):
        now = policy.transition(
            flat['latents'][rows], flat['step'][rows], cond[flat['sample'][rows]]
        ).log_prob(flat['next_latents'][rows])
        assert torch.equal(now.detach(), flat['old_log_prob'][rows])


@pytest.mark.parametrize(
    'options, large, rows',
    [({}, 10**8, 16), ({}, 1, 3), (dict(min_batch_size=1), 10**8, 3), (dict(min_batch_size=8), 1, 8)],
)
def test_small_batches_are_filled_up_where_it_is_cheap(options, large, rows, monkeypatch):
    "And the caller gets as many predictions as it asked for."
    monkeypatch.setattr('drl_toolkit.sampling.policy.LARGE', large)
    policy, seen = Policy(tiny_sd(), num_steps=2, **options), []
    monkeypatch.setattr(
        policy.adapter, 'forward', lambda x, *rest: seen.append(len(x)) or torch.zeros_like(x)
    )
    assert policy.predict(
        torch.zeros(3, *policy.latent_shape), torch.tensor(0), policy.encode(PROMPTS)
    ).shape[0] == 3 and seen == [rows]


def test_seeds_belong_to_samples():
    assert (
        sample_seed(0, 0, 0) == sample_seed(0, 0, 0)
        and len({sample_seed(r, e, i) for r in range(3) for e in range(3) for i in range(50)}) == 450
    )
    policy = Policy(tiny_sd(), num_steps=3)
    first, second = (
        rollout(policy, PROMPTS[:1] * 2, seed=1),
        rollout(policy, PROMPTS[:1] * 2, seed=1, epoch=1),
    )
    assert not torch.equal(first.latents[:, 0], first.latents[:, 1]) and not torch.equal(
        first.latents, second.latents
    )


@pytest.mark.parametrize('train', ['lora', 'full'])
def test_saved_weights_come_back_and_the_reference_stays(train, tmp_path):
    base = tmp_path / 'base'
    tiny_sd(seed=1).save_pretrained(base)
    policy = Policy.from_pretrained(base, num_steps=3, train=train)
    x, cond = torch.randn(16, *policy.latent_shape), policy.encode(PROMPTS[:1] * 16)
    before = policy.predict(x, 1, cond).detach()
    frozen = {n: p.clone() for n, p in policy.network.named_parameters() if not p.requires_grad}
    if train == 'full':
        policy.base_weights()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for _ in range(2):
        policy.transition(x, 1, cond).log_prob(torch.randn_like(x)).sum().backward()
        optimizer.step()
    moved = policy.predict(x, 1, cond).detach()
    with policy.reference(), torch.no_grad():
        assert torch.equal(policy.predict(x, 1, cond), before)
    assert not torch.equal(moved, before) and all(
        torch.equal(p, frozen[n]) for n, p in policy.network.named_parameters() if n in frozen
    )
    again = Policy.from_pretrained(policy.save(tmp_path / 'out', base=str(base)), num_steps=3, train=train)
    assert torch.equal(again.predict(x, 1, cond).detach(), moved)
    if train == 'lora':  # plain diffusers reads it too
        from diffusers import StableDiffusionPipeline

        plain = StableDiffusionPipeline.from_pretrained(
            base, safety_checker=None, requires_safety_checker=False
        )
        plain.load_lora_weights(str(tmp_path / 'out'), weight_name='pytorch_lora_weights.safetensors')
        with torch.no_grad():
            assert torch.allclose(
                plain.unet(x, policy.timesteps[1].expand(16), cond.rows()["prompt_embeds"]).sample,
                moved,
                atol=1e-5,
            )


def test_bad_models_are_one_line(tmp_path):
    for name in ('nothing-here', './nothing/here', str(tmp_path / 'x' / 'y')):
        with pytest.raises(FileNotFoundError, match='is no folder'):
            Policy.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match='without model_index.json'):
        Policy.from_pretrained(tmp_path)
    tiny_sd().save_pretrained(tmp_path / 'cut')
    weights = tmp_path / 'cut' / 'unet' / 'diffusion_pytorch_model.safetensors'
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match='cannot be read') as caught:
        Policy.from_pretrained(tmp_path / 'cut')
    assert '\n' not in str(caught.value)
    with pytest.raises(ValueError, match="train must be one of .*got 'half'"):
        Policy(tiny_sd(), train='half')
    with pytest.raises(ValueError, match='num_steps must be 1 or more; got 0'):
        Policy(tiny_sd(), num_steps=0)


def test_freed_memory_is_used_again():
    """After the first calls the kernel is asked for no more pages; a forward of these rows would need
    thousands."""
    resource = pytest.importorskip('resource')
    policy = Policy(tiny_sd())
    if not keep_freed_memory():
        pytest.skip('this system\'s allocator cannot be told')
    x, cond = torch.randn(256, *policy.latent_shape), policy.encode(['a cat'] * 256)

    def pages():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with torch.inference_mode():
            policy.predict(x, 1, cond)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min([pages() for _ in range(6)][2:]) < 100


TWO_THREADS = '''
import resource, statistics, torch
from drl_toolkit.sampling.rollout import in_parallel
from drl_toolkit.sampling.policy import Policy
policy = Policy.from_pretrained('demo')
x, cond = torch.randn(64, *policy.latent_shape), policy.encode(['a cat'] * 64)
def gradient(_): return torch.autograd.grad(policy.predict(x, 1, cond).sum(), policy.parameters())
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    list(in_parallel(gradient, range(2), 2))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(2)
print(statistics.median([pages() for _ in range(10)][3:]))
'''


def test_freed_memory_of_threads_is_used_again():
    "In a process of its own, as in `drl train`: threads of earlier tests have heaps already."
    pytest.importorskip('resource')
    if not keep_freed_memory():
        pytest.skip('this system\'s allocator cannot be told')
    done = subprocess.run(
        [sys.executable, '-c', TWO_THREADS],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | dict(OMP_NUM_THREADS='2'),
    )
    assert float(done.stdout) < 2000  # without: ten thousand and more


# ---- LoRA in one product


def plain():
    "Two linear layers, always of the same numbers."
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.ReLU(), torch.nn.Linear(10, 6))


def layers(**options):
    "The same with a LoRA that is not zero: as peft makes it, and as a policy does."
    theirs, ours = (
        inject_adapter_in_model(
            LoraConfig(r=3, lora_alpha=2, target_modules=['0', '2'], init_lora_weights=False, **options),
            plain(),
        ).eval()
        for _ in range(2)
    )
    in_one_product(ours)
    return theirs, ours


def answers(module, x):
    "Output, and the gradients of input and factors."
    x = x.detach().requires_grad_()
    out = module(x)
    trained = [p for n, p in module.named_parameters() if 'lora_' in n]
    return [out, *torch.autograd.grad(out.float().square().sum(), [x, *trained])]


def used(module, x):
    "Whether the output comes from one product."
    return 'OneProduct' in type(module(x).grad_fn).__name__


@pytest.mark.parametrize('shape', [(4, 12), (2, 3, 12), (1, 2, 2, 12)])
def test_one_product_is_the_lora_of_peft(shape):
    theirs, ours = layers()
    x = torch.randn(shape)
    assert used(ours, x) and not used(theirs, x)
    for a, b in zip(answers(ours, x), answers(theirs, x)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    'options',
    [dict(use_dora=True), dict(lora_dropout=0.3), dict(bias='lora_only'), dict(lora_bias=True)],
    ids=lambda o: next(iter(o)),
)
def test_other_loras_stay_those_of_peft(options):
    theirs, ours = layers(**options)
    x = torch.randn(5, 12)
    assert not used(ours, x)
    for a, b in zip(answers(ours, x), answers(theirs, x)):
        assert torch.equal(a, b)


def test_half_precision_and_several_adapters_stay_those_of_peft():
    theirs, ours = layers()
    x = torch.randn(5, 12)
    with torch.autocast('cpu', torch.bfloat16):
        assert not used(ours, x)
        for a, b in zip(answers(ours, x), answers(theirs, x)):
            assert torch.equal(a, b)
    for module in (theirs, ours):
        torch.manual_seed(1)
        inject_adapter_in_model(
            LoraConfig(r=2, target_modules=['0', '2'], init_lora_weights=False), module, 'second'
        )
        for m in module.modules():
            if isinstance(m, BaseTunerLayer):
                m.set_adapter(['default', 'second'])
    assert not used(ours, x) and torch.equal(ours(x), theirs(x))


def test_switched_off_the_base_is_left():
    _, ours = layers()
    x = torch.randn(5, 12)
    for m in ours.modules():
        if isinstance(m, BaseTunerLayer):
            m.enable_adapters(False)
    assert torch.equal(ours(x), plain()(x))
