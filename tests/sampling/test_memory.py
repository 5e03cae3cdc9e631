"The estimate of memory against what PyTorch's allocator hands out during a whole epoch."

import gc, sys
from pathlib import Path

import pytest, torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile

from drl_toolkit.sampling.memory import GpuBytes, Load, advise, cuda_autocast, estimate, hollow_pipeline
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.sampling.config import PolicyConfig
from drl_toolkit.prompts.task import Task
from drl_toolkit.emoji.tiny import tiny_flux, tiny_pixart, tiny_sd, tiny_sd3, tiny_sdxl
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.config import TrainConfig
from tiers import long, some

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
import shapes


def medium_sd():
    "A Stable Diffusion with a UNet of 12 million weights and latents of 32 × 32."
    pipeline = tiny_sd(image_size=256)
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 256),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=16,
        cross_attention_dim=32,
        down_block_types=('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'),
    )
    pipeline.register_modules(unet=unet.eval())
    return pipeline


def measured(folder, config, load):
    "The allocator's peak, from opening the model to the end of an epoch."
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        policy = Policy.from_pretrained(folder, **vars(config))
        task = Task('bright', ['a cat'], lambda images, prompts: images.mean((1, 2, 3)), samples=load.samples)
        train = TrainConfig(
            train_steps=load.train_steps,
            micro_batch=load.micro_batch,
            kl_weight=0.1 * load.kl,
            ema_decay=0.5 * load.ema,
            num_minibatches=1,
            measure_every=int(load.measured),
            reuse_graphs=load.reuse_graphs,
        )
        Trainer(policy, [task], train, callbacks=[]).fit(1)
    live = peak = 0
    for event in sorted(
        (e for e in record.profiler.kineto_results.events() if e.name() == '[memory]'),
        key=lambda e: e.start_ns(),
    ):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


CASES = [
    (tiny_sd, dict(train='full'), dict(samples=32, kl=True, ema=True)),
    (tiny_sd, dict(train='full', checkpointing=True), dict(samples=32, micro_batch=64)),
    (tiny_sdxl, dict(train='lora', guidance_scale=3.0), dict(samples=32, kl=True)),
    (tiny_sd3, dict(train='lora'), dict(samples=32)),
    (tiny_flux, dict(train='full'), dict(samples=16, kl=True)),
    (tiny_pixart, dict(train='full'), dict(samples=32)),
    (medium_sd, dict(train='lora'), dict(samples=8, micro_batch=16, kl=True)),
    (medium_sd, dict(train='full'), dict(samples=8, micro_batch=16)),
    (medium_sd, dict(train='full'), dict(samples=8, micro_batch=8, measured=True)),
    (tiny_sd, dict(train='full', guidance_scale=3.0), dict(samples=32, reuse_graphs=True)),
]


@pytest.mark.parametrize(
    'build, told, load',
    some(CASES, [c for c in CASES if c[0] is not medium_sd]),
    ids=lambda v: v.__name__ if callable(v) else v.get('train', '') if isinstance(v, dict) else '',
)
def test_the_estimate_is_within_a_fifth(build, told, load, tmp_path):
    build().save_pretrained(tmp_path)
    config, load = PolicyConfig(num_steps=3, **told), Load(**dict(micro_batch=32, train_steps=2) | load)
    assert estimate(tmp_path, config, load)['peak'] == pytest.approx(
        measured(tmp_path, config, load), rel=0.2
    )


def test_it_costs_no_memory_and_no_weights(tmp_path):
    "The weights may be missing altogether."
    medium_sd().save_pretrained(tmp_path)
    for file in tmp_path.rglob('*.safetensors'):
        file.unlink()
    pipeline = hollow_pipeline(tmp_path)
    assert all(p.is_meta for p in pipeline.unet.parameters())
    assert estimate(tmp_path, PolicyConfig(train='full'), Load(samples=8, micro_batch=16))['peak'] > 1e9


@long
def test_advice_is_true():
    "Each option is estimated to save what it is said to save, and the ones that matter are there."
    now, saved = advise('demo', PolicyConfig(train='full'), Load(samples=192, kl=True))
    assert list(saved.values()) == sorted(saved.values(), reverse=True) and {
        '--micro-batch 32',
        '--checkpointing',
        '--precision bf16',
    } <= set(saved)
    assert (
        now['peak']
        - estimate('demo', PolicyConfig(train='full', checkpointing=True), Load(samples=192, kl=True))['peak']
        == saved['--checkpointing']
    )


def test_offloaded_text_encoders_do_not_count(tmp_path):
    tiny_flux().save_pretrained(tmp_path)
    words = sum(
        p.numel() * 4
        for name in ('text_encoder', 'text_encoder_2')
        for p in getattr(hollow_pipeline(tmp_path), name).parameters()
    )
    here, away = (
        estimate(tmp_path, PolicyConfig(offload=offload), Load(samples=4)) for offload in (False, True)
    )
    assert here['weights'] - away['weights'] == pytest.approx(words, rel=0.01) and away[
        'reading'
    ] == pytest.approx(words, rel=0.01)


def test_threads_count_where_each_has_a_batch(tmp_path, monkeypatch):
    "A batch of a large network, or one that reads its prompts in every call, has all threads."
    tiny_sd().save_pretrained(tmp_path)
    told = lambda threads, **config: estimate(
        tmp_path, PolicyConfig(**config), Load(samples=64, micro_batch=16, threads=threads)
    )['peak']
    assert told(4) > told(1) and told(4, train_text_encoder=True) == told(1, train_text_encoder=True)
    monkeypatch.setattr('drl_toolkit.sampling.policy.LARGE', 0)
    assert told(4) == told(1)


def hollow_folder(folder, name):
    "A pipeline in the shape of a published one, as configurations without weights."
    with pytest.MonkeyPatch.context() as patch:
        for kind in ('UNet2DConditionModel', 'AutoencoderKL'):
            patch.setattr(shapes, kind, on_meta(getattr(shapes, kind)))
        pipeline = shapes.random_pipeline(name)
    for part in ('unet', 'vae'):
        getattr(pipeline, part).save_config(folder / part)
    pipeline.text_encoder.config.save_pretrained(folder / 'text_encoder')
    pipeline.tokenizer.save_pretrained(folder / 'tokenizer')
    pipeline.scheduler.save_pretrained(folder / 'scheduler')
    pipeline.save_config(folder)


def on_meta(kind):
    def make(*args, **options):
        with torch.device('meta'):
            return kind(*args, **options)

    return make


MEASURED = {
    False: 20.97e9,
    True: 17.26e9,
}  # checkpointing -> torch.cuda.max_memory_allocated() of an epoch on an H100, torch 2.11, 28 November 2026


def test_a_gpu_measured_the_same(tmp_path):
    """Stable Diffusion 1.5's shape: LoRA of rank 16 in bf16, guidance 5, 16 images in 10 steps of which 5
    are trained, 8 transitions at once."""
    hollow_folder(tmp_path, 'sd15')
    load, known = Load(samples=16, micro_batch=8, train_steps=5, gpu=True), {}
    for checkpointing, measured in MEASURED.items():
        found = estimate(
            tmp_path,
            PolicyConfig(guidance_scale=5.0, precision='bf16', checkpointing=checkpointing),
            load,
            known,
        )
        assert found['peak'] == pytest.approx(measured, rel=0.1)
        assert max(('sampling', 'update', 'decoding'), key=found.get) == (
            'decoding' if checkpointing else 'update'
        )


@pytest.mark.parametrize('kind', (torch.bfloat16, torch.float16))
def test_casts_are_those_of_autocast(kind):
    "What each function returns, and what its graph keeps, in the types that PyTorch documents for CUDA."
    x, weight = torch.randn(2, 8, 4, 4), torch.randn(8, 8, 1, 1, requires_grad=True)
    with cuda_autocast(kind):
        convolved, normed = F.conv2d(x, weight), F.group_norm(x.to(kind), 4)
        product, share = F.linear(x, weight[..., 0, 0][:4, :4]), F.softmax(x.to(kind), -1)
    assert (convolved.dtype, product.dtype, normed.dtype, share.dtype) == (
        kind,
        kind,
        torch.float32,
        torch.float32,
    )
    assert convolved.grad_fn._saved_weight.dtype == kind and F.conv2d(x, weight).dtype == torch.float32
    with cuda_autocast(torch.float32):
        assert F.conv2d(x, weight).dtype == torch.float32


def test_copies_of_layout_count_while_a_kernel_runs():
    """A convolution whose weights have channels last takes a copy of what has not, and gives its result
    channels last; a group norm the reverse."""
    x, size = torch.empty(4, 64, 32, 32, device='meta'), 4 * 4 * 64 * 32 * 32
    layer = torch.nn.Conv2d(64, 64, 3, padding=1, bias=False, device='meta').to(
        memory_format=torch.channels_last
    )

    def peak(function, *args):
        with torch.no_grad(), GpuBytes() as count:
            out = function(*args)
        return count.peak, out

    taken, out = peak(layer, x)
    assert taken == 2 * size and out.is_contiguous(memory_format=torch.channels_last)
    assert peak(layer, out)[0] == size
    assert peak(F.group_norm, out, 4)[0] == pytest.approx(2 * size, rel=0.01) and peak(F.group_norm, x, 4)[
        0
    ] == pytest.approx(size, rel=0.01)
