"""One epoch of DDPO by drl_toolkit, by TRL 0.23.1 and by the bare network: same pipeline, samples, steps, guidance;
interleaved.

    pip install --no-deps trl==0.23.1        # the last version that has DDPO; where drl_toolkit is
    OMP_NUM_THREADS=1 python tests/benchmarks/against_trl.py --out benchmark.json [--model emoji|tiny|sd15|sd2|sdxl]
        [--repeats 5] [--precision fp32|bf16]

Each case is an epoch: sample, score, one optimiser step per `train_batch` samples over all denoising steps.
`recorded_graphs` is an epoch here with `reuse_graphs`, where there is one optimiser step. `compiled` is an epoch
here with the network through torch.compile; since that compiles for minutes before the first epoch, it takes part
only where `--who` names it. `floor` is the forwards and backwards of the network that the epoch needs, and nothing
else, at the batch size that is fastest for it. Times are medians of the repeats, in which all take turns, so that a
noisy machine is noisy for all; what to read is the ratios. Each contestant has a process of its own, as it would
for its users: on a CPU the epoch here and the floor reuse freed memory (`policy.keep_freed_memory`), and TRL has
the allocator as it is. On a GPU only the contestant whose turn it is holds memory of the card: between turns its
tensors wait in the CPU's, and a turn there begins with an epoch that is not timed, since the allocator starts from
nothing. Memory is the peak of a process in its first epoch, above what the imports take. The share of the peak is
the network's operations in an epoch, counted by torch, over the time of our epoch, against what a large matrix
product reaches on the same device in the same run: in bf16 on a GPU, in fp32 on a CPU. TRL's DDPO has no Stable
Diffusion XL."""

import argparse, contextlib, gc, json, statistics, sys, tempfile, time, warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import accelerate, psutil, torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))  # for the processes of the contestants

from drl_toolkit.sampling.policy import Policy
from drl_toolkit.utils.devices import best_device
from drl_toolkit.prompts.task import Task
from drl_toolkit.emoji.prompts import objects
from drl_toolkit.rewards.reward import reward
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.config import TrainConfig
from drl_toolkit.emoji.world import load_demo
from shapes import UNETS, random_pipeline


@dataclass(frozen=True)
class Case:
    "What an epoch consists of."

    train: str  # 'full' or 'lora'
    guidance: float
    sample_batch: int  # TRL's; ours is chosen by ourselves
    train_batch: int  # samples per optimiser step
    samples: int = 16
    steps: int = 10
    pixels: int = 0  # 0 is the model's own size
    precision: str = 'fp32'


@reward
def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@contextlib.contextmanager
def models(name):
    "A pipeline in a folder, since that is what TRL takes; gone afterwards."
    pipeline = random_pipeline(name) if name in UNETS else dict(emoji=load_demo, tiny=tiny_sd)[name]()
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, rescale_betas_zero_snr=False
    )  # at zero terminal SNR TRL's step divides zero by zero
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        del pipeline
        yield folder


def ours(folder, case, device, compiled=False, **more):
    "A function that trains an epoch and returns (seconds of sampling and scoring, of training)."
    policy = Policy.from_pretrained(
        folder,
        train=case.train,
        num_steps=case.steps,
        guidance_scale=case.guidance,
        device=device,
        lora_rank=4,
        precision=case.precision,
        image_size=case.pixels,
    )
    if compiled:
        policy.network.compile(dynamic=False)
    config = TrainConfig(
        epochs=1,
        warmup=0,
        train_steps=0,
        num_minibatches=case.samples // case.train_batch,
        measure_every=0,
        clip_range=1e-4,
        **more,
    )
    trainer = Trainer(policy, [Task('red', objects(), redness, samples=case.samples)], config, callbacks=[])
    epoch = iter(range(10**6))

    def run():
        began = time.perf_counter()
        trainer.epoch = next(epoch)
        batch = trainer.collect(trainer.tasks[0])
        synchronise(device)
        sampled = time.perf_counter()
        trainer.updates.learn(batch)
        synchronise(device)
        return sampled - began, time.perf_counter() - sampled

    return run


def kept(folder, case, device):
    "The same with the graphs of sampling kept for the update."
    return ours(folder, case, device, reuse_graphs=True)


def compiled(folder, case, device):
    "The same with the network through torch.compile."
    return ours(folder, case, device, compiled=True)


def trls(folder, case, device):
    "The same of TRL."
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    batches = case.samples // case.sample_batch
    config = DDPOConfig(
        mixed_precision=None if case.precision == 'fp32' else case.precision,
        sample_num_steps=case.steps,
        sample_guidance_scale=case.guidance,
        sample_batch_size=case.sample_batch,
        sample_num_batches_per_epoch=batches,
        train_batch_size=case.train_batch,
        train_cfg=case.guidance > 1,
        save_freq=10**9,
        project_kwargs=dict(project_dir=tempfile.mkdtemp()),
    )
    prompts = iter(objects() * 10**4)
    pipeline = DefaultDDPOStableDiffusionPipeline(str(folder), use_lora=case.train == 'lora')
    if case.pixels:
        pipeline.sd_pipeline.unet.register_to_config(
            sample_size=case.pixels // pipeline.sd_pipeline.vae_scale_factor
        )
    trainer = DDPOTrainer(
        config,
        lambda images, prompts, metadata: (redness(images.float().clamp(0, 1), list(prompts)), {}),
        lambda: (next(prompts), {}),
        pipeline,
    )
    clock, generate = {}, trainer._generate_samples

    def timed(*args, **options):
        found = generate(*args, **options)
        synchronise(device)
        clock['sampled'] = time.perf_counter()
        return found

    trainer._generate_samples = timed
    epoch = iter(range(1, 10**6))

    def run():
        began = time.perf_counter()
        trainer.step(next(epoch), 0)
        synchronise(device)
        return clock['sampled'] - began, time.perf_counter() - clock['sampled']

    return run


def network(folder, case, device):
    """A function that takes the network, and nothing else, once forward with `n` rows, and backward if asked;
    and the rows of an epoch."""
    policy = Policy.from_pretrained(
        folder,
        train=case.train,
        num_steps=case.steps,
        guidance_scale=case.guidance,
        device=device,
        lora_rank=4,
        precision=case.precision,
        image_size=case.pixels,
    )
    told = policy.encode(['an apple']).tensors

    def batch(n, backward, device=device):
        x, t = torch.randn(n, *policy.latent_shape, device=device), torch.full((n,), 500, device=device)
        half = (
            torch.autocast(torch.device(device).type, torch.bfloat16)
            if case.precision == 'bf16'
            else contextlib.nullcontext()
        )
        with half, contextlib.nullcontext() if backward else torch.inference_mode():
            out = policy.adapter.forward(
                x, t, {name: e.to(device).expand(n, *e.shape[1:]) for name, e in told.items()}, case.guidance
            )
            if backward:
                out.square().mean().backward()
        synchronise(device)

    return policy, batch, case.samples * case.steps * (2 if case.guidance > 1 else 1)


def bare(folder, case, device, sizes=(1, 4, 16, 32, 64, 128)):
    """The network alone: forwards for sampling, forwards and backwards for training, at the fastest of some
    batch sizes."""
    _, batch, rows = network(folder, case, device)

    def rate(n, backward):
        batch(n, backward)
        began = time.perf_counter()
        batch(n, backward)
        return (time.perf_counter() - began) / n

    best = {
        backward: min((n for n in sizes if n <= rows), key=lambda n: rate(n, backward))
        for backward in (False, True)
    }

    def run():
        times = []
        for backward in (False, True):
            began = time.perf_counter()
            for start in range(0, rows, best[backward]):
                batch(min(best[backward], rows - start), backward)
            times.append(time.perf_counter() - began)
        return tuple(times)

    return run


OURS = {'drl_toolkit', 'recorded_graphs', 'compiled'}  # an epoch of this toolkit
CONTESTANTS = dict(drl_toolkit=ours, recorded_graphs=kept, compiled=compiled, trl=trls, floor=bare)
RATIOS = dict(
    trl_over_ours=('trl', 'drl_toolkit'),
    trl_over_kept=('trl', 'recorded_graphs'),
    trl_over_compiled=('trl', 'compiled'),
    ours_over_floor=('drl_toolkit', 'floor'),
    kept_over_floor=('recorded_graphs', 'floor'),
    compiled_over_floor=('compiled', 'floor'),
)


class Contestant:
    """Runs epochs in a process of its own, and waits between them; one that `rests` holds no memory of the
    device while it waits."""

    def __init__(self, make, *args, device, rests=None):
        self.pool = ProcessPoolExecutor(1, mp_context=get_context('spawn'))
        self.rests = device != 'cpu' if rests is None else rests
        self.device, self.memory_mb = (
            device,
            self.pool.submit(_warm_up, make, args, device, self.rests).result(),
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown()

    def epoch(self):
        return self.pool.submit(_epoch, self.device, self.rests).result()

    def held(self):
        "Bytes of the device that its tensors hold now."
        return self.pool.submit(_held, self.device).result()


def _warm_up(make, args, device, rests):
    "MB that the function which `make` makes needs at most in its first epoch, above the imports."
    global run, resting
    resting = {}
    warnings.simplefilter('ignore')
    accelerate.PartialState(cpu=device == 'cpu')  # TRL's own would fail on a CPU
    with high_water(device) as most:
        run = make(*args, device)
        run()
        found = most()
    if rests:
        resting = rest(device)
    return found


def _epoch(device, rests):
    "One turn."
    global resting
    wake(resting)
    if rests and device != 'cpu':
        run()  # the allocator asks the driver for all of it anew
    times = run()
    if rests:
        resting = rest(device)
    return times


def storages(device):
    "Every storage of a device that this process knows, once each, gradients included."
    found, kind = {}, torch.device(device).type
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor):
            continue  # isinstance would ask lazy modules, which then load
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            if tensor is None or tensor.device.type != kind or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            if storage.resizable():
                found[storage.data_ptr() or id(storage)] = storage
    return list(found.values())


def rest(device):
    """Copies in the CPU's memory of all that this process has on a device, which then holds none of it.

    Views still share what they shared."""
    gc.collect()
    waiting = [(storage, storage.cpu().clone()) for storage in storages(device) if storage.nbytes()]
    for storage, _ in waiting:
        storage.resize_(0)
    if torch.device(device).type == 'cuda':
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    return waiting


def wake(waiting):
    "Bring back what `rest` took away."
    while waiting:
        storage, copy = waiting.pop()
        storage.resize_(copy.nbytes())
        storage.copy_(copy)


def _held(device):
    if torch.device(device).type == 'cuda':
        return torch.cuda.memory_reserved()
    return sum(storage.nbytes() for storage in storages(device))


@contextlib.contextmanager
def high_water(device):
    """A function that tells the most MB that were in use since, above what was in use before; on a CPU by the
    kernel's own mark (Linux)."""
    Path('/proc/self/clear_refs').write_text('5')
    before = psutil.Process().memory_info().rss
    highest = lambda: (
        next(
            int(line.split()[1])
            for line in Path('/proc/self/status').read_text().splitlines()
            if line.startswith('VmHWM')
        )
        * 1024
    )
    yield lambda: round((torch.cuda.max_memory_allocated() if device != 'cpu' else highest() - before) / 1e6)


def two_products(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **rest):
    """Attention as its definition says: every kernel makes these two products, and which of them torch's
    counter knows depends on the device and on the version."""
    weights = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        weights = (
            weights + torch.where(attn_mask, 0.0, -torch.inf)
            if attn_mask.dtype == torch.bool
            else weights + attn_mask
        )
    return weights.softmax(-1) @ value


@contextlib.contextmanager
def counted():
    """A counter of the floating-point operations inside this context: of products, twice their
    multiplications."""
    with (
        patch.object(F, 'scaled_dot_product_attention', two_products),
        FlopCounterMode(display=False) as counter,
    ):
        yield counter


def operations(folder, case):
    """Floating-point operations of the network in an epoch, counted without computing: a row forward, and a
    row forward and backward, times the rows."""
    policy, batch, rows = network(folder, replace(case, precision='fp32'), 'cpu')
    policy.network.to('meta')
    with counted() as counter:
        for backward in (False, True):
            batch(1, backward, 'meta')
    return rows * counter.get_total_flops()


def peak_rate(device):
    "Operations a second that this device reaches in a large matrix product: in bf16, on a CPU in fp32."
    n, dtype = (2048, torch.float32) if device == 'cpu' else (8192, torch.bfloat16)
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(3):
        a @ a
    synchronise(device)
    began = time.perf_counter()
    for _ in range(20):
        a @ a
    synchronise(device)
    return 20 * 2 * n**3 / (time.perf_counter() - began)


def synchronise(device):
    if str(device).startswith('cuda'):
        torch.cuda.synchronize()


def measure(folder, case, device, repeats, names):
    "Medians of each part of each contestant, and the ratios."
    seen, rates = {name: [] for name in names}, []
    with contextlib.ExitStack() as stack:
        runs = {
            name: stack.enter_context(Contestant(CONTESTANTS[name], folder, case, device=device))
            for name in names
        }
        for _ in range(repeats):
            for name, run in runs.items():
                seen[name].append(run.epoch())
            rates.append(peak_rate(device))
    median = lambda values, digits=4: round(statistics.median(values), digits)
    row = {
        name: dict(
            sampling=median([s for s, _ in t]),
            training=median([u for _, u in t]),
            epoch=median([s + u for s, u in t]),
        )
        for name, t in seen.items()
    }
    epochs = {name: [s + u for s, u in t] for name, t in seen.items()}
    for name in seen:
        row[name] |= dict(memory_mb=runs[name].memory_mb)
    found = {
        name: median([x / y for x, y in zip(epochs[a], epochs[b])])
        for name, (a, b) in RATIOS.items()
        if {a, b} <= seen.keys()
    }
    own, count = epochs[next(n for n in CONTESTANTS if n in seen)], operations(folder, case)
    return (
        asdict(case)
        | row
        | found
        | dict(
            images_per_second=round(case.samples / median(own), 3),
            share_of_peak=median([count / s / r for s, r in zip(own, rates)], 3),
        )
    )


def whole(word):
    "A count from the command line."
    if (number := int(word)) < 1:
        raise argparse.ArgumentTypeError(f'{word} is not a positive whole number')
    return number


def place(word):
    "A file that can be written when the numbers are there."
    if not Path(word).resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f'{word}: its folder does not exist')
    return Path(word)


def arguments():
    "What is to be measured."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--model', default='emoji', choices=('emoji', 'tiny', *UNETS))
    parser.add_argument('--repeats', type=whole, default=5)
    parser.add_argument('--samples', type=whole, default=16)
    parser.add_argument('--steps', type=whole, default=10)
    parser.add_argument('--pixels', type=int, default=0, help="side of an image; 0 is the model's own")
    parser.add_argument(
        '--batches',
        type=whole,
        nargs='+',
        help="TRL's batch sizes, for sampling and for training; those of 1, 2, 8 and 16 that divide the "
        "samples when not given",
    )
    parser.add_argument('--train', nargs='+', default=('full', 'lora'), choices=('full', 'lora'))
    parser.add_argument(
        '--who',
        nargs='+',
        default=tuple(n for n in CONTESTANTS if n != 'compiled'),
        choices=tuple(CONTESTANTS),
        help='who takes part; one of the first three at least; compiled does only when named',
    )
    parser.add_argument('--precision', default='fp32', choices=('fp32', 'bf16'))
    parser.add_argument('--out', type=place, required=True)
    args = parser.parse_args()
    args.batches = args.batches or [b for b in (1, 2, 8, 16) if not args.samples % b]
    if args.samples == 1:
        parser.error(
            'samples is 1; 2 or more are right, since a sample alone has no advantage and is not trained'
        )
    if not OURS & {*args.who}:
        parser.error(
            f"who is {' '.join(args.who)}; one of drl_toolkit, recorded_graphs and compiled must be among "
            "them"
        )
    if OURS & {*args.who} == {'recorded_graphs'} and args.samples not in args.batches:
        parser.error(f'batches is {args.batches}; recorded_graphs needs {args.samples}, all samples at once')
    if wrong := [b for b in args.batches if args.samples % b]:
        parser.error(f'batches is {args.batches}; {args.samples} samples are no multiple of {wrong[0]}')
    return args


def compare(folder, args, device):
    "Every case, written as it comes."
    rows = []
    for train in args.train:
        for batch in sorted({*args.batches}):
            case = Case(
                train, 5.0, batch, batch, args.samples, args.steps, args.pixels, args.precision
            )  # without guidance TRL 0.23.1 fails on current diffusers
            names = [
                n
                for n in CONTESTANTS
                if n in args.who
                and (n != 'recorded_graphs' or batch == args.samples)  # graphs serve one optimiser step
                and (n != 'trl' or args.model != 'sdxl')
            ]
            if not OURS & {*names}:
                continue
            rows.append(dict(model=args.model) | measure(folder, case, device, args.repeats, names))
            print(json.dumps(rows[-1]), flush=True)
            args.out.write_text(
                json.dumps(
                    dict(
                        device=device,
                        threads=torch.get_num_threads(),
                        torch=torch.__version__,
                        repeats=args.repeats,
                        rows=rows,
                    ),
                    indent=1,
                )
            )


def main():
    args = arguments()
    warnings.simplefilter('ignore')
    with models(args.model) as folder:
        compare(folder, args, best_device())


if __name__ == '__main__':
    main()
