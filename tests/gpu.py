"""What the tests show on a CPU, shown on a GPU in at most five minutes, for a machine that has one and is lent for
minutes.

    python tests/gpu.py --out gpu.json [--device cpu --quick] [--matrix-seconds 150]

Parts: the models of tests/sampling/test_matrix.py × precision × LoRA or all weights; two equal runs and a resumed
one, to the bit; the ratio before the first update; kept graphs; estimated against measured memory; a short
benchmark. The file is written anew after each part and each case. A part that fails is an entry that says why, and
the exit status is 1."""

# On a lent machine, which has torch 2.11, transformers and peft, and no network. Here first, in the root of
# the repository:
#     echo /wheels/ >> .git/info/exclude
#     python -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels \
#         diffusers==0.42.1 fastcore==1.14.5 open_clip_torch==3.3.0 ftfy==6.3.1 wcwidth==0.9.4
# There, with `wheels` carried and a limit of 420 s:
# python3 -m pip install -q --no-index --no-deps --target /tmp/site wheels/*.whl && PYTHONPATH=/tmp/site:.
# python3 tests/gpu.py --out $OUT/gpu.json
import argparse, json, os, statistics, sys, tempfile, time, warnings
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), *(str(HERE / name) for name in ('.', 'benchmarks', 'sampling'))]
import test_matrix as matrix

from drl_toolkit.sampling.policy import Policy
from drl_toolkit.sampling.config import PolicyConfig
from drl_toolkit.utils.devices import best_device, prepare_deterministic
from drl_toolkit.prompts.task import Task
from drl_toolkit.runs.run import Run
from drl_toolkit.runs.recorder import Recorder, resume
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.config import TrainConfig


def case(build, precision, train, device):
    "One row: seconds, the ratio's error, and whether both ways of reloading give the same image."
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        base, weights = Path(folder) / 'base', Path(folder) / 'weights'
        build().save_pretrained(base)
        policy, history = matrix.trained(base, precision, train, device=device)
        policy.save(weights, base=str(base))
        again = Policy.from_pretrained(
            weights, device=device, **(dict(base=str(base)) if train == 'lora' else {})
        )
        plain = matrix.plain(base, weights, train)
        there = Policy(plain, num_steps=4, train=train, precision=precision, lora_rank=4, device=device)
        found = dict(
            here=bool(matrix.same_images(policy, again)), plain=bool(matrix.same_images(policy, there))
        )
    errors = [row['tasks']['red']['ratio_error'] for row in history]
    return found | dict(
        ok=all(found.values()), ratio_error=errors, seconds=round(time.perf_counter() - began, 2)
    )


def attempt(part, *args):
    "What a part finds; its error, where it fails."
    try:
        return part(*args)
    except Exception as e:
        return dict(ok=False, failed=f'{type(e).__name__}: {e}'[:300])


def cases(args, keep):
    "The matrix, the most telling cases first, until its time is used; what was left out is named."
    ordered = sorted(matrix.EVERY, key=lambda c: (c not in matrix.SHORT, c[1] == 'fp32'))
    if args.quick:
        ordered = [matrix.SHORT[0], matrix.SHORT[-1]]
    rows, left, began = [], [], time.perf_counter()
    for build, precision, train in ordered:
        about = dict(model=build.__name__, precision=precision, train=train)
        if time.perf_counter() - began > args.matrix_seconds:
            left.append(' '.join(about.values()))
            continue
        rows.append(about | attempt(case, build, precision, train, args.device))
        keep(dict(rows=rows, left_out=left))
    return dict(ok=all(row['ok'] for row in rows), rows=rows, left_out=left)


def trainer_of(policy, samples=8, **config):
    "A trainer of redness that says nothing."
    config = TrainConfig(**dict(epochs=4, warmup=0, measure_every=0, train_steps=2, lr=1e-3) | config)
    return Trainer(
        policy,
        [Task('red', matrix.PROMPTS, matrix.redness, samples=samples, group_size=4)],
        config,
        callbacks=[],
    )


def tiny(args, **options):
    torch.manual_seed(0)
    return Policy(
        tiny_sd(),
        **dict(num_steps=4, train='lora', lora_rank=4, guidance_scale=5.0, device=args.device) | options,
    )


def deterministic(args, keep):
    """The largest difference of weights between two runs of four epochs, and between one and two epochs with
    two more after a resume."""
    precision = 'fp32' if args.device == 'cpu' else 'bf16'
    make = lambda: trainer_of(tiny(args, precision=precision), deterministic=True)
    weights = lambda trainer: [p.detach().clone() for p in trainer.policy.parameters()]
    one, two = make(), make()
    start = weights(one)
    one.fit()
    two.fit()
    with tempfile.TemporaryDirectory() as folder:
        with Run.create(Path(folder) / 'r', {}) as run:
            begun = make()
            begun.callbacks.append(Recorder(run, ['a cat'], every=1))
            begun.fit(epochs=2)
        with Run.open(Path(folder) / 'r') as run:
            resumed = make()
            done = resume(resumed, run)
            resumed.fit()
    apart = lambda a, b: max((x - y).abs().max().item() for x, y in zip(a, b))
    last = weights(one)
    found = dict(
        two_runs=apart(last, weights(two)),
        resumed=apart(last, weights(resumed)),
        moved=apart(last, start),
        resumed_at=done,
    )
    return dict(ok=found['two_runs'] == found['resumed'] == 0 < found['moved'] and done == 2) | found


def first_ratio(args, keep):
    """In the first minibatch the ratio is exactly 1: with the device's own rounding, and where predictions
    move with the rows beside them and the anchor is used."""
    found = {}
    for precision in ('fp32', 'bf16') if args.quick else ('fp32', 'bf16', 'fp16'):
        for name, noise in dict(own=0, moved=1e-2).items():
            policy = tiny(args, precision=precision)
            exact = policy.adapter.forward
            policy.adapter.forward = lambda x, *rest, exact=exact, noise=noise: (
                exact(x, *rest) + noise * x.mean(0) if noise else exact(x, *rest)
            )
            trainer = trainer_of(policy, 16, num_minibatches=2, micro_batch=16, train_steps=0)
            batch = trainer.collect(trainer.tasks[0])
            stats = trainer.updates.gradient(trainer.updates.plan(batch)[0], batch)
            row = {
                key: float(stats.get(key, 0))
                for key in ('ratio_min', 'ratio_max', 'ratio_noise', 'anchored_transitions')
            }
            row['ok'] = row['ratio_min'] == row['ratio_max'] == 1 and (
                not noise or row['anchored_transitions'] > 0
            )
            found[f'{precision} {name}'] = row
    return dict(ok=all(row['ok'] for row in found.values()), **found)


def recorded_graphs(args, keep):
    """Seconds an epoch, in turns, with steps shared by the batch: without and with kept graphs; and these
    with steps of each sample's own."""
    from against_trl import synchronise

    options = dict(num_minibatches=1, epochs=10**4)
    ways = dict(
        shared=dict(shared_timesteps=True),
        kept_shared=dict(shared_timesteps=True, reuse_graphs=True),
        kept_own=dict(reuse_graphs=True),
    )
    samples, turns = (8, 2) if args.quick else (64, 6)
    runs = {name: trainer_of(tiny(args), samples, **options | way) for name, way in ways.items()}
    seen = {name: [] for name in runs}
    for turn in range(turns):
        for name, trainer in runs.items():
            began = time.perf_counter()
            trainer.fit(turn + 1)
            synchronise(args.device)
            seen[name].append(time.perf_counter() - began)
    return dict(ok=True) | {name: round(statistics.median(times[1:]), 4) for name, times in seen.items()}


RATIO = 'ratio_error', 'ratio_noise', 'anchored_transitions'


def memory(args, keep):
    """Estimated over measured bytes of an epoch of Stable Diffusion 1.5's shape, and its ratio before the
    first update."""
    if args.device == 'cpu':
        return dict(ok=True, skipped='a CPU does not count its bytes')
    from against_trl import models
    from drl_toolkit.sampling.memory import Load, estimate

    config = PolicyConfig(guidance_scale=5.0, precision='bf16', num_steps=10)
    with models('sd15') as folder:
        guess = estimate(folder, config, Load(samples=16, micro_batch=8, train_steps=5, gpu=True))
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainer = trainer_of(
            Policy.from_pretrained(folder, device=args.device, **vars(config)),
            16,
            micro_batch=8,
            train_steps=5,
        )
        stats = trainer.fit(1)[0]['tasks']['red']
        measured = torch.cuda.max_memory_allocated() - held
    ratio = guess['peak'] / measured
    return dict(
        ok=abs(ratio - 1) < 0.1, estimated=guess['peak'], measured=measured, ratio=round(ratio, 4)
    ) | {name: stats.get(name) for name in RATIO}


def benchmark(args, keep):
    """Images a second, seconds of sampling and training in an epoch, and the network's operations over what a
    large product reaches."""
    from against_trl import Case, models, operations, ours, peak_rate

    about = (
        Case('lora', 5.0, 4, 4, samples=4, steps=3)
        if args.quick
        else Case('lora', 5.0, 16, 16, precision='bf16')
    )
    with models('tiny' if args.quick else 'sd15') as folder:
        run = ours(folder, about, args.device)
        run()
        times = [run() for _ in range(1 if args.quick else 3)]
        sampling, training = (statistics.median(t[i] for t in times) for i in (0, 1))
        found = dict(
            ok=True,
            images_per_second=round(about.samples / sampling, 3),
            sampling=round(sampling, 4),
            training=round(training, 4),
        )
        if args.quick:
            return found
        return found | dict(
            share_of_peak=round(operations(folder, about) / (sampling + training) / peak_rate(args.device), 4)
        )


PARTS = dict(
    matrix=cases,
    deterministic=deterministic,
    first_ratio=first_ratio,
    recorded_graphs=recorded_graphs,
    memory=memory,
    benchmark=benchmark,
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--device', default=best_device())
    parser.add_argument(
        '--quick', action='store_true', help='two cases in place of all, and the smallest of everything'
    )
    parser.add_argument(
        '--matrix-seconds', type=float, default=150, help='no case of the matrix begins after so long'
    )
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    prepare_deterministic(args.device)
    card = torch.cuda.get_device_name() if args.device.startswith('cuda') else args.device
    found = dict(device=card, torch=torch.__version__, parts={})

    def keep(name, part):
        found['parts'][name] = part
        beside = args.out.with_name(args.out.name + '.new')
        beside.write_text(json.dumps(found, indent=1) + '\n')
        os.replace(beside, args.out)

    for name, part in PARTS.items():
        began = time.perf_counter()
        entry = attempt(part, args, lambda so_far: keep(name, so_far))
        if 'failed' in entry:
            entry = found['parts'].get(name, {}) | entry  # with what it had found
        keep(name, entry | dict(took=round(time.perf_counter() - began, 2)))
        print(json.dumps({name: found['parts'][name]}), flush=True)
    sys.exit(not all(part['ok'] for part in found['parts'].values()))


if __name__ == '__main__':
    main()
