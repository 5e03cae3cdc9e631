"The estimate of memory against what PyTorch's allocator hands out during a whole epoch."
import gc

import pytest, torch
from diffusers import UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile

from drl_toolkit.memory import Load, advise, estimate, hollow_pipeline
from drl_toolkit.policy import Policy, PolicyConfig
from drl_toolkit.prompts import Task
from drl_toolkit.tiny import tiny_flux, tiny_pixart, tiny_sd, tiny_sd3, tiny_sdxl
from drl_toolkit.trainer import TrainConfig, Trainer
from forms import long, some

def medium_sd():
    "A Stable Diffusion with a UNet of 12 million weights and latents of 32 × 32."
    pipeline = tiny_sd(image_size=256)
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, block_out_channels=(64, 128, 256), layers_per_block=1, norm_num_groups=16, attention_head_dim=16,
        cross_attention_dim=32, down_block_types=('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'))
    pipeline.register_modules(unet=unet.eval())
    return pipeline

def measured(folder, config, load):
    "The allocator's peak, from opening the model to the end of an epoch."
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        policy = Policy.from_pretrained(folder, **vars(config))
        task = Task('bright', ['a cat'], lambda images, prompts: images.mean((1, 2, 3)), samples=load.samples)
        train = TrainConfig(train_steps=load.train_steps, micro_batch=load.micro_batch, kl_weight=.1 * load.kl, average=.5 * load.average, updates=1, measure_every=int(load.measured), keep_graphs=load.keep_graphs)
        Trainer(policy, [task], train, callbacks=[]).fit(1)
    live = peak = 0
    for event in sorted((e for e in record.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak

CASES = [(tiny_sd, dict(train='full'), dict(samples=32, kl=True, average=True)), (tiny_sd, dict(train='full', checkpointing=True), dict(samples=32, micro_batch=64)),
         (tiny_sdxl, dict(train='lora', guidance_scale=3.), dict(samples=32, kl=True)), (tiny_sd3, dict(train='lora'), dict(samples=32)), (tiny_flux, dict(train='full'), dict(samples=16, kl=True)),
         (tiny_pixart, dict(train='full'), dict(samples=32)), (medium_sd, dict(train='lora'), dict(samples=8, micro_batch=16, kl=True)),
         (medium_sd, dict(train='full'), dict(samples=8, micro_batch=16)), (medium_sd, dict(train='full'), dict(samples=8, micro_batch=8, measured=True)),
         (tiny_sd, dict(train='full', guidance_scale=3.), dict(samples=32, keep_graphs=True))]

@pytest.mark.parametrize('build, told, load', some(CASES, [c for c in CASES if c[0] is not medium_sd]), ids=lambda v: v.__name__ if callable(v) else v.get('train', '') if isinstance(v, dict) else '')
def test_the_estimate_is_within_a_fifth(build, told, load, tmp_path):
    build().save_pretrained(tmp_path)
    config, load = PolicyConfig(num_steps=3, **told), Load(**dict(micro_batch=32, train_steps=2) | load)
    assert estimate(tmp_path, config, load)['peak'] == pytest.approx(measured(tmp_path, config, load), rel=.2)

def test_it_costs_no_memory_and_no_weights(tmp_path):
    "The weights may be missing altogether."
    medium_sd().save_pretrained(tmp_path)
    for file in tmp_path.rglob('*.safetensors'): file.unlink()
    pipeline = hollow_pipeline(tmp_path)
    assert all(p.is_meta for p in pipeline.unet.parameters())
    assert estimate(tmp_path, PolicyConfig(train='full'), Load(samples=8, micro_batch=16))['peak'] > 1e9

@long
def test_advice_is_true():
    "Each option is estimated to save what it is said to save, and the ones that matter are there."
    now, saved = advise('demo', PolicyConfig(train='full'), Load(samples=192, kl=True))
    assert list(saved.values()) == sorted(saved.values(), reverse=True) and {'--micro-batch 32', '--checkpointing', '--precision bf16'} <= set(saved)
    assert now['peak'] - estimate('demo', PolicyConfig(train='full', checkpointing=True), Load(samples=192, kl=True))['peak'] == saved['--checkpointing']

def test_offloaded_text_encoders_do_not_count(tmp_path):
    tiny_flux().save_pretrained(tmp_path)
    words = sum(p.numel() * 4 for name in ('text_encoder', 'text_encoder_2') for p in getattr(hollow_pipeline(tmp_path), name).parameters())
    here, away = (estimate(tmp_path, PolicyConfig(offload=offload), Load(samples=4)) for offload in (False, True))
    assert here['weights'] - away['weights'] == pytest.approx(words, rel=.01) and away['reading'] == pytest.approx(words, rel=.01)

def test_threads_count_where_each_has_a_batch(tmp_path, monkeypatch):
    "A batch of a large network, or one that reads its prompts in every call, has all threads."
    tiny_sd().save_pretrained(tmp_path)
    told = lambda threads, **config: estimate(tmp_path, PolicyConfig(**config), Load(samples=64, micro_batch=16, threads=threads))['peak']
    assert told(4) > told(1) and told(4, train_text_encoder=True) == told(1, train_text_encoder=True)
    monkeypatch.setattr('drl_toolkit.policy.LARGE', 0)
    assert told(4) == told(1)
