"""What each lever does to the time and the memory of one epoch, with all others as they are.

    OMP_NUM_THREADS=1 python tests/benchmarks/levers.py --out levers.json [--model emoji|tiny|sd15|sd2|sdxl]
        [--repeats 3] [--only 'no folding,compile']

An epoch samples, scores and updates; `as it is` is drl_toolkit without a lever pulled. Some levers are pulled by
default: for these the entry shows what an epoch costs *without* them, so that every row says by itself whether its
lever is worth having. An epoch with a lever pulled comes right after one without, so that a noisy machine is noisy
for both; ratios are medians of the ratios of such pairs ('as it is' shows their noise). Each of the two has a
process of its own, and on a GPU only the one whose turn it is holds memory there (against_trl.py). Memory is the
peak of a process in its first epoch."""

import argparse, json, statistics, sys, time, warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))
from against_trl import Contestant, models, place, redness, synchronise, whole
from shapes import UNETS

from drl_toolkit.algorithms.branching import BranchSampler
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.utils.devices import best_device
from drl_toolkit.prompts.task import Task
from drl_toolkit.emoji.prompts import objects
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.algorithms.interfaces import RolloutSampler
from drl_toolkit.training.config import TrainConfig


@dataclass(frozen=True)
class Lever:
    "One change to an epoch."

    words: str  # what is different from `as it is`
    policy: dict = field(default_factory=dict)  # fields of the policy
    config: dict = field(default_factory=dict)  # fields of the configuration
    prepare: object = None  # trainer -> None, once
    during: object = nullcontext  # trainer -> context of each epoch
    sampler: object = RolloutSampler
    half: bool = False  # half of the samples get no advantage
    against: str = 'as it is'  # what it is compared with


@contextmanager
def without_skipping(trainer):
    "Rows whose advantage is zero are computed too."
    with mock.patch.object(
        type(trainer.objective),
        'has_gradient',
        lambda self, rows: torch.ones(len(rows['step']), dtype=torch.bool),
    ):
        yield


@contextmanager
def prompts_read_every_time(trainer):
    "Nothing of a prompt is kept."
    kept = Policy.encode

    def encode(policy, *args, **options):
        policy._embeddings.clear()
        return kept(policy, *args, **options)

    with mock.patch.object(Policy, 'encode', encode):
        yield


@contextmanager
def inference(trainer):
    "Sampling in inference mode, which tracks even less than no_grad."
    sample = RolloutSampler.sample

    def fast(*args, **options):
        with torch.inference_mode():
            found = sample(*args, **options)
        found.latents, found.log_probs = (
            found.latents.clone(),
            found.log_probs.clone(),
        )  # so that autograd may use them
        return found

    with mock.patch.object(RolloutSampler, 'sample', fast):
        yield


def unfused(trainer):
    trainer.optimizer.param_groups[0]['fused'] = False


def contiguous(trainer):
    trainer.policy.network.to(memory_format=torch.contiguous_format)


def compiled(trainer):
    trainer.policy.network.compile(dynamic=False)


LEVERS = {
    'as it is': Lever('the defaults'),
    'no folding': Lever(
        'one denoising step per forward, as the reference scripts do', config=dict(micro_batch=8)
    ),
    'half of them': Lever('half of the samples have no advantage and are skipped', half=True),
    'no skipping': Lever(
        'the same, computed all the same', half=True, during=without_skipping, against='half of them'
    ),
    'KL penalty': Lever('KL to the base, whose predictions are made once per epoch', config=dict(kl_weight=0.1)),
    'no prompt cache': Lever('text encoder asked in every call', during=prompts_read_every_time),
    'branches': Lever(
        'groups share half of their path (B²-DiffuRL)', sampler=lambda: BranchSampler(0.5, grow=False)
    ),
    'inference mode': Lever('sampling in inference mode', during=inference),
    'channels first': Lever("the network in PyTorch's usual layout", prepare=contiguous),
    'compile': Lever('the network through torch.compile', prepare=compiled),
    'unfused step': Lever('AdamW in a loop over the weights', prepare=unfused),
    'one update': Lever('one optimiser step in place of two', config=dict(num_minibatches=1)),
    'kept graphs': Lever(
        'the same, and sampling keeps its graphs',
        config=dict(num_minibatches=1, reuse_graphs=True),
        against='one update',
    ),
    'bf16': Lever('the network in bf16', policy=dict(precision='bf16')),
    'store bf16': Lever('latents kept in bf16', policy=dict(latents_dtype='bf16')),
    'checkpointing': Lever('activations computed twice', policy=dict(checkpointing=True)),
    'small batches': Lever('micro-batches of 16 transitions', config=dict(micro_batch=16)),
    'lora': Lever('LoRA of rank 4 in place of all weights', policy=dict(train='lora', lora_rank=4)),
    # for a GPU
    'large calls': Lever('micro-batches of 512 transitions', config=dict(micro_batch=512)),
    'bf16 channels first': Lever(
        "bf16, the network in PyTorch's usual layout",
        policy=dict(precision='bf16'),
        prepare=contiguous,
        against='bf16',
    ),
    'bf16 compile': Lever(
        'bf16, the network through torch.compile',
        policy=dict(precision='bf16'),
        prepare=compiled,
        against='bf16',
    ),
    'bf16 decoding': Lever(
        "bf16, and images decoded in it (a time alone: not for a VAE that says `force_upcast`)",
        policy=dict(precision='bf16'),
        prepare=lambda t: t.policy.vae.bfloat16(),
        against='bf16',
    ),
}

FOR_A_GPU = (
    'large calls',
    'bf16 channels first',
    'bf16 compile',
    'bf16 decoding',
)  # measured where --only names them


def make(name, folder, args, device):
    """A function that trains one epoch with a lever pulled and returns its seconds: of sampling and scoring,
    of training."""
    lever = LEVERS[name]
    policy = Policy.from_pretrained(
        folder,
        device=device,
        image_size=args.pixels,
        num_steps=args.steps,
        **dict(train='full') | lever.policy,
    )
    config = TrainConfig(
        **dict(epochs=1, warmup=0, train_steps=0, num_minibatches=2, measure_every=0) | lever.config
    )
    trainer = Trainer(
        policy,
        [Task('red', objects(), redness, samples=args.samples, group_size=4)],
        config,
        callbacks=[],
        sampler=lever.sampler(),
    )
    if lever.prepare:
        lever.prepare(trainer)
    epoch = iter(range(10**6))

    def run():
        with lever.during(trainer):
            began = time.perf_counter()
            trainer.epoch = next(epoch)
            batch = trainer.collect(trainer.tasks[0])
            synchronise(device)
            sampled = time.perf_counter()
            if lever.half:
                batch.advantage[::2] = 0
            trainer.updates.learn(batch)
            synchronise(device)
            return sampled - began, time.perf_counter() - sampled

    return run


def compare(folder, args, device):
    "Every lever against what it changes, each time one right after the other, in processes of their own."
    names, rows = (
        ['as it is', *(n for n in args.only.split(',') if n)]
        if args.only
        else [n for n in LEVERS if n not in FOR_A_GPU],
        [],
    )
    for name in names:
        rows.append(found(name, folder, args, device))
        print(json.dumps(rows[-1]), flush=True)
        about = dict(
            model=args.model,
            device=device,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            repeats=args.repeats,
            samples=args.samples,
            steps=args.steps,
        )
        args.out.write_text(json.dumps(about | dict(rows=rows), indent=1) + '\n')


def found(name, folder, args, device):
    "What one lever does: ratios of time, seconds, MB."
    lever, pairs = LEVERS[name], []
    with (
        Contestant(make, lever.against, folder, args, device=device) as before,
        Contestant(make, name, folder, args, device=device) as pulled,
    ):
        for _ in range(args.repeats):
            pairs.append([(*times, sum(times)) for times in (before.epoch(), pulled.epoch())])
    median = lambda values: round(statistics.median(values), 4)
    ratios = {
        part: median([b[i] / a[i] for a, b in pairs])
        for i, part in enumerate(('sampling', 'training', 'epoch'))
    }
    return (
        dict(lever=name, words=lever.words, against=lever.against)
        | ratios
        | dict(seconds=median([b[2] for _, b in pairs]), memory_mb=pulled.memory_mb)
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--model', default='emoji', choices=('emoji', 'tiny', *UNETS))
    parser.add_argument('--repeats', type=whole, default=3)
    parser.add_argument('--samples', type=whole, default=32)
    parser.add_argument('--steps', type=whole, default=10)
    parser.add_argument('--pixels', type=int, default=0)
    parser.add_argument('--only', default='', help='levers with commas between')
    parser.add_argument('--out', type=place, required=True)
    args = parser.parse_args()
    if wrong := [n for n in args.only.split(',') if n and n not in LEVERS]:
        parser.error(f'only names {wrong[0]!r}; one of these is right: {", ".join(LEVERS)}')
    if args.samples % 8:
        parser.error(
            f'samples is {args.samples}; a multiple of 8 is right, for two updates of whole groups of four'
        )
    warnings.simplefilter('ignore')
    with models(args.model) as folder:
        compare(folder, args, best_device())


if __name__ == '__main__':
    main()
