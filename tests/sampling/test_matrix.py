"""Every model, precision and way of training, with a network that rounds by its batch: two epochs, saved, and reloaded
here and in plain diffusers to the same image.

Plain diffusers loads the weights (`from_pretrained`, `load_lora_weights`); both are then sampled from the same
seeds by the same sampler, so that what differs is the weights.

`make test` runs a cover in which every model, precision and way of training occurs; the long form has all of them."""

import json, os, subprocess, sys
from itertools import product
from pathlib import Path

import pytest, torch

from drl_toolkit.sampling.rollout import rollout
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.prompts.task import Task
from drl_toolkit.emoji.tiny import tiny_flux, tiny_pixart, tiny_sd, tiny_sd3, tiny_sdxl
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.config import TrainConfig
from tiers import some

sys.path.insert(0, str(Path(__file__).parents[1]))

PROMPTS = ['a cat', 'a dog']
EVERY = [
    case
    for case in product(
        (tiny_sd, tiny_sdxl, tiny_sd3, tiny_flux, tiny_pixart), ('fp32', 'bf16', 'fp16'), ('lora', 'full')
    )
    if case[0] is not tiny_pixart or case[2] == 'full'
]  # diffusers loads no LoRA into PixArt
SHORT = [
    (tiny_sd, 'fp32', 'lora'),
    (tiny_sd, 'bf16', 'full'),
    (tiny_sdxl, 'fp16', 'lora'),
    (tiny_sdxl, 'fp32', 'full'),
    (tiny_sd3, 'bf16', 'lora'),
    (tiny_flux, 'fp16', 'full'),
    (tiny_pixart, 'bf16', 'full'),
]


def round_by_batch(policy):
    "A network whose answer depends a little on how many rows are beside a row, as a GPU's kernels do."

    def after(module, args, options, out):
        out.sample = out.sample * (1 + 1e-6 * len(out.sample))
        return out

    return policy.network.register_forward_hook(after, with_kwargs=True)


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@torch.no_grad()
def round_as_saved(policy):
    """Weights of full training as `Policy.save` writes them, in the policy's precision: how far that rounding moves an
    image is the processor's affair, and was .7 of bf16's steps on one."""
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[policy.precision]
    for p in policy.parameters():
        p.copy_(p.to(dtype))


def trained(folder, precision, train, epochs=2, device='cpu'):  # (policy, records)
    "A policy after some epochs, whose weights moved and are numbers."
    policy = Policy.from_pretrained(
        folder, num_steps=4, train=train, precision=precision, lora_rank=4, device=device
    )
    hook, before = round_by_batch(policy), [p.detach().clone() for p in policy.parameters()]
    config = TrainConfig(
        train_steps=2, micro_batch=8, lr=2e-2 if train == 'lora' else 1e-3, warmup=0, measure_every=0
    )
    history = Trainer(
        policy, [Task('red', PROMPTS, redness, samples=8, group_size=4)], config, callbacks=[]
    ).fit(epochs)
    hook.remove()
    assert len(history) == epochs and all(row['tasks']['red']['grad_norm'] > 0 for row in history)
    assert any(not torch.equal(p, b) for p, b in zip(policy.parameters(), before)) and all(
        p.isfinite().all() for p in policy.parameters()
    )
    if train == 'full':
        round_as_saved(policy)
    return policy, history


def plain(base, saved, train):
    "What diffusers makes of the folder by itself."
    kind = type(Policy.from_pretrained(base, train='full').pipeline)
    pipeline = kind.from_pretrained(saved if train == 'full' else base)
    if train == 'lora':
        pipeline.load_lora_weights(saved)
    return pipeline


def same_images(policy, other):
    """Both draw the same latents of the same seeds, in fp32's rounding where the policy computes in fp32 and
    to a few roundings of its precision otherwise."""
    mine, others = (rollout(p, PROMPTS, seed=3, epoch=0) for p in (policy, other))
    scale, allowed = mine.latents.float().abs().max(), dict(fp32=1e-5, bf16=5e-3, fp16=2e-3)[policy.precision]
    return (mine.latents.float() - others.latents.float()).abs().max() <= allowed * scale


@pytest.mark.parametrize(
    'build, precision, train', some(EVERY, SHORT), ids=lambda v: getattr(v, '__name__', v)
)
def test_trained_saved_and_reloaded_to_the_same_picture(build, precision, train, tmp_path):
    build().save_pretrained(tmp_path / 'base')
    policy, _ = trained(tmp_path / 'base', precision, train)
    saved = policy.save(tmp_path / 'weights', base=str(tmp_path / 'base'))
    again = Policy.from_pretrained(saved, **(dict(base=str(tmp_path / 'base')) if train == 'lora' else {}))
    assert again.precision == precision and same_images(policy, again)
    there = plain(tmp_path / 'base', saved, train)
    assert same_images(policy, Policy(there, num_steps=4, train=train, precision=precision, lora_rank=4))
    untrained = Policy.from_pretrained(
        tmp_path / 'base', num_steps=4, train=train, precision=precision, lora_rank=4
    )
    assert not same_images(policy, untrained)  # or the comparison would say nothing


def test_the_script_for_a_gpu_runs_here(tmp_path):
    "As a command, from anywhere, in its quick form, to its end."
    import gpu

    words = '--device', 'cpu', '--quick', '--out', tmp_path / 'found.json'
    alone = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | dict(OMP_NUM_THREADS='1')
    done = subprocess.run(
        [sys.executable, gpu.__file__, *words], cwd=tmp_path, env=alone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]
    parts = json.loads((tmp_path / 'found.json').read_text())['parts']
    rows, same, graphs = parts['matrix']['rows'], parts['deterministic'], parts['recorded_graphs']
    assert list(parts) == list(gpu.PARTS) and all(part['ok'] for part in parts.values())
    assert (
        same['two_runs'] == same['resumed'] == 0 < same['moved']
        and min(graphs['shared'], graphs['kept_own']) > 0
    )
    assert len(rows) == 2 and all(row['here'] and row['plain'] and row['seconds'] > 0 for row in rows)


def test_a_part_that_fails_is_an_entry(tmp_path, monkeypatch):
    "The others run to their end, and the status is 1."
    import gpu

    def broken(args, keep):
        keep(dict(rows=[1]))
        raise RuntimeError('out of memory')

    monkeypatch.setattr(gpu, 'PARTS', dict(matrix=broken, after=lambda args, keep: dict(ok=True)))
    monkeypatch.setattr(
        'sys.argv', ['gpu', '--device', 'cpu', '--quick', '--out', str(tmp_path / 'found.json')]
    )
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    parts = json.loads((tmp_path / 'found.json').read_text())['parts']
    assert (
        ended.value.code == 1
        and parts['after']['ok']
        and list(tmp_path.iterdir()) == [tmp_path / 'found.json']
    )
    assert parts['matrix']['failed'] == 'RuntimeError: out of memory' and parts['matrix']['rows'] == [1]
