"""One epoch of DDPO by drl_toolkit, by TRL 0.23.1 and by the bare network: same pipeline, samples, steps, guidance; interleaved.

    pip install --no-deps trl==0.23.1        # the last version that has DDPO; into an environment that has drl_toolkit
    OMP_NUM_THREADS=1 python tests/benchmarks/against_trl.py --out benchmark.json [--model emoji|tiny|sd15|sd2] [--repeats 5] [--precision fp32|bf16]

Each case is an epoch: sample, score, one optimiser step per `train_batch` samples over all denoising steps. `kept_graphs` is an epoch here with
`keep_graphs`, where there is one optimiser step. `floor` is the forwards and
backwards of the network that the epoch needs, and nothing else, at the batch size that is fastest for it. Times are medians of the repeats,
in which the three take turns, so that a noisy machine is noisy for all; what to read is the ratios. Memory is the peak of an epoch in a
process of its own, above what the imports take. On a CPU the epoch here and the floor reuse freed memory (`policy.keep_freed_memory`); for TRL's turns
the allocator is put back to the widest limits that it sets itself by default. On a GPU the share of its peak is the floor's operations, counted by torch, over the time
of our epoch, against what a large matrix product reaches on the same card."""
import argparse, contextlib, json, statistics, sys, tempfile, time, warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import accelerate, psutil, torch
from diffusers import DDIMScheduler
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))                                # for the processes that measure memory

from drl_toolkit.policy import Policy, keep_freed_memory
from drl_toolkit.prompts import Task, objects
from drl_toolkit.rewards import reward
from drl_toolkit.tiny import tiny_sd
from drl_toolkit.trainer import TrainConfig, Trainer
from drl_toolkit.world import load_demo

@dataclass(frozen=True)
class Case:
    "What an epoch consists of."
    train: str            # 'full' or 'lora'
    guidance: float
    sample_batch: int     # TRL's; ours is chosen by ourselves
    train_batch: int      # samples per optimiser step
    samples: int = 16
    steps: int = 10
    pixels: int = 0       # 0 is the model's own size
    precision: str = 'fp32'

@reward
def redness(images, prompts): return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

def models(name):
    "A pipeline in a folder, since that is what TRL takes."
    folder = Path(tempfile.mkdtemp()) / name
    pipeline = dict(emoji=load_demo, tiny=tiny_sd).get(name, lambda: random_sd(name))()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=False)   # at zero terminal SNR TRL's step divides zero by zero
    pipeline.save_pretrained(folder)
    return folder

def random_sd(name):
    "Random weights in the shape of Stable Diffusion 1.5 or 2."
    from diffusers import AutoencoderKL, UNet2DConditionModel
    width, heads = dict(sd15=(768, 8), sd2=(1024, (5, 10, 20, 20)))[name]
    pipeline = load_demo()
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=pipeline.text_encoder.config.hidden_size, attention_head_dim=heads, use_linear_projection=name == 'sd2')
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
                        down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4)
    pipeline.register_modules(unet=unet, vae=vae)
    return pipeline

def ours(folder, case, device, **more):
    "A function that trains an epoch and returns (seconds of sampling and scoring, of training)."
    policy = Policy.from_pretrained(folder, train=case.train, num_steps=case.steps, guidance_scale=case.guidance, device=device, lora_rank=4, precision=case.precision, image_size=case.pixels)
    config = TrainConfig(epochs=1, warmup=0, train_steps=0, updates=case.samples // case.train_batch, measure_every=0, clip_range=1e-4, **more)
    trainer = Trainer(policy, [Task('red', objects(), redness, samples=case.samples)], config, callbacks=[])
    epoch = iter(range(10**6))
    def run():
        began = time.perf_counter()
        batch = trainer.collect(trainer.tasks[0], next(epoch)); synchronise(device)
        sampled = time.perf_counter()
        trainer.learn(batch); synchronise(device)
        return sampled - began, time.perf_counter() - sampled
    return run

def kept(folder, case, device):
    "The same with the graphs of sampling kept for the update."
    return ours(folder, case, device, keep_graphs=True)

def trls(folder, case, device):
    "The same of TRL."
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    batches = case.samples // case.sample_batch
    config = DDPOConfig(mixed_precision=None if case.precision == 'fp32' else case.precision, sample_num_steps=case.steps, sample_guidance_scale=case.guidance, sample_batch_size=case.sample_batch, sample_num_batches_per_epoch=batches,
                        train_batch_size=case.train_batch, train_cfg=case.guidance > 1, save_freq=10**9, project_kwargs=dict(project_dir=tempfile.mkdtemp()))
    prompts = iter(objects() * 10**4)
    pipeline = DefaultDDPOStableDiffusionPipeline(str(folder), use_lora=case.train == 'lora')
    if case.pixels: pipeline.sd_pipeline.unet.register_to_config(sample_size=case.pixels // pipeline.sd_pipeline.vae_scale_factor)
    trainer = DDPOTrainer(config, lambda images, prompts, metadata: (redness(images.float().clamp(0, 1), list(prompts)), {}), lambda: (next(prompts), {}), pipeline)
    clock, generate = {}, trainer._generate_samples
    def timed(*args, **options):
        found = generate(*args, **options); synchronise(device); clock['sampled'] = time.perf_counter()
        return found
    trainer._generate_samples = timed
    epoch = iter(range(1, 10**6))
    def run():
        with default_memory():
            began = time.perf_counter()
            trainer.step(next(epoch), 0); synchronise(device)
            done = time.perf_counter()
        return clock['sampled'] - began, done - clock['sampled']
    return run

@contextlib.contextmanager
def default_memory():
    "Inside this context the allocator gives large pieces back to the kernel, as it does for programs that leave it alone: 32 MB and 64 MB are as far as its limits grow by themselves."
    keep_freed_memory(2**25, 2**26)
    try: yield
    finally: keep_freed_memory()

def bare(folder, case, device, sizes=(1, 4, 16, 32, 64, 128)):
    "The network alone: forwards for sampling, forwards and backwards for training, at the fastest of some batch sizes."
    policy = Policy.from_pretrained(folder, train=case.train, num_steps=case.steps, device=device, lora_rank=4, precision=case.precision, image_size=case.pixels)
    unet, rows = policy.pipeline.unet, case.samples * case.steps * (2 if case.guidance > 1 else 1)
    told = policy.encode(['an apple']).tensors['prompt_embeds']
    def batch(n, backward):
        x = torch.randn(n, *policy.latent_shape, device=device)
        half = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=case.precision == 'bf16')
        with half, contextlib.nullcontext() if backward else torch.inference_mode():
            out = unet(x, torch.full((n,), 500, device=device), told.expand(n, -1, -1)).sample
            if backward: out.square().mean().backward()
        synchronise(device)
    def rate(n, backward):
        batch(n, backward); began = time.perf_counter(); batch(n, backward)
        return (time.perf_counter() - began) / n
    best = {backward: min((n for n in sizes if n <= rows), key=lambda n: rate(n, backward)) for backward in (False, True)}
    def run():
        times = []
        for backward in (False, True):
            began = time.perf_counter()
            for start in range(0, rows, best[backward]): batch(min(best[backward], rows - start), backward)
            times.append(time.perf_counter() - began)
        return tuple(times)
    return run

CONTESTANTS = dict(drl_toolkit=ours, kept_graphs=kept, trl=trls, floor=bare)
RATIOS = dict(trl_over_ours=('trl', 'drl_toolkit'), trl_over_kept=('trl', 'kept_graphs'), ours_over_floor=('drl_toolkit', 'floor'), kept_over_floor=('kept_graphs', 'floor'))

def peak(make, *args, device):
    "MB that the function which `make` makes needs at most, above the imports."
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool: return pool.submit(_peak, make, args, device).result()

def _peak(make, args, device):
    warnings.simplefilter('ignore')
    accelerate.PartialState(cpu=device == 'cpu')
    with high_water(device) as most: make(*args, device)()
    return most()

@contextlib.contextmanager
def high_water(device):
    "A function that tells the most MB that were in use since, above what was in use before; on a CPU by the kernel's own mark (Linux)."
    Path('/proc/self/clear_refs').write_text('5')
    before = psutil.Process().memory_info().rss
    highest = lambda: next(int(line.split()[1]) for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM')) * 1024
    yield lambda: round((torch.cuda.max_memory_allocated() if device != 'cpu' else highest() - before) / 1e6)

def operations(folder, case, device):
    "Floating-point operations of the network in an epoch."
    run, counter = bare(folder, case, device, sizes=(1,)), FlopCounterMode(display=False)
    with counter: run()
    return counter.get_total_flops()

def card_peak(device, n=8192):
    "Operations a second that this card reaches in a large bf16 matrix product."
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    for _ in range(3): a @ a
    torch.cuda.synchronize(); began = time.perf_counter()
    for _ in range(20): a @ a
    torch.cuda.synchronize()
    return 20 * 2 * n**3 / (time.perf_counter() - began)

def synchronise(device):
    if str(device).startswith('cuda'): torch.cuda.synchronize()

def measure(folder, case, device, repeats, names):
    "Medians of each part of each contestant, and the ratios."
    runs = {name: CONTESTANTS[name](folder, case, device) for name in names}
    for run in runs.values(): run()                                            # warm up
    seen = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items(): seen[name].append(run())
    median = lambda values: round(statistics.median(values), 4)
    row = {name: dict(sampling=median([s for s, _ in t]), training=median([u for _, u in t]), epoch=median([s + u for s, u in t])) for name, t in seen.items()}
    epochs = {name: [s + u for s, u in t] for name, t in seen.items()}
    ratio = lambda a, b: median([x / y for x, y in zip(epochs[a], epochs[b])])
    seconds = row[next(n for n in ('drl_toolkit', 'kept_graphs') if n in row)]['epoch']
    for name in runs: row[name]['memory_mb'] = peak(CONTESTANTS[name], folder, case, device=device)
    card = {} if device == 'cpu' else dict(share_of_peak=round(operations(folder, case, device) / seconds / card_peak(device), 3))
    found = {name: ratio(*pair) for name, pair in RATIOS.items() if {*pair} <= runs.keys()}
    return asdict(case) | row | found | dict(images_per_second=round(case.samples / seconds, 3)) | card

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='emoji', choices=('emoji', 'tiny', 'sd15', 'sd2')); parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--samples', type=int, default=16); parser.add_argument('--steps', type=int, default=10); parser.add_argument('--pixels', type=int, default=0, help="side of a picture; 0 is the model's own")
    parser.add_argument('--batches', type=int, nargs='+', default=(1, 2, 8, 16), help="TRL's batch sizes, for sampling and for training"); parser.add_argument('--train', nargs='+', default=('full', 'lora'), choices=('full', 'lora'))
    parser.add_argument('--who', nargs='+', default=tuple(CONTESTANTS), choices=tuple(CONTESTANTS), help='who takes part; one of the first two at least'); parser.add_argument('--precision', default='fp32', choices=('fp32', 'bf16')); parser.add_argument('--out', required=True)
    args = parser.parse_args()
    if not {'drl_toolkit', 'kept_graphs'} & {*args.who}: parser.error(f"who is {' '.join(args.who)}; drl_toolkit or kept_graphs must be among them")
    warnings.simplefilter('ignore')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    accelerate.PartialState(cpu=device == 'cpu')                               # TRL's own would fail on a CPU
    folder, rows = models(args.model), []
    for train in args.train:
        for batch in sorted({b for b in args.batches if b <= args.samples}):
            case = Case(train, 5., batch, batch, args.samples, args.steps, args.pixels, args.precision)   # without guidance TRL 0.23.1 fails on current diffusers
            names = [n for n in CONTESTANTS if n in args.who and (n != 'kept_graphs' or batch == args.samples)]   # graphs serve one optimiser step
            rows.append(dict(model=args.model) | measure(folder, case, device, args.repeats, names))
            print(json.dumps(rows[-1]), flush=True)
            Path(args.out).write_text(json.dumps(dict(device=device, threads=torch.get_num_threads(), torch=torch.__version__, repeats=args.repeats, rows=rows), indent=1))

if __name__ == '__main__': main()
