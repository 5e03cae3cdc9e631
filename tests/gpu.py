"""What the tests show on a CPU, shown on a GPU in a few minutes, for a machine that has one and is lent for minutes.

    python tests/gpu.py --out gpu.json [--device cpu --quick]

The models of tests/test_matrix.py × precision × LoRA or all weights: two epochs, saved, reloaded here and in plain diffusers to the same picture; the time of each and the ratio's error
before the first update. Each case is written as it comes, and one that fails is a row that says why. Such a machine may lack diffusers, tyro and pytest's neighbours: carry them as wheels."""
import argparse, json, sys, tempfile, time, warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import test_matrix as matrix

from drl_toolkit.policy import Policy, best_device

def case(build, precision, train, device):
    "One row: seconds, the ratio's error, and whether both ways of reloading give the same picture."
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        base, weights = Path(folder) / 'base', Path(folder) / 'weights'
        build().save_pretrained(base)
        policy, history = matrix.trained(base, precision, train, device=device)
        policy.save(weights, base=str(base))
        again = Policy.from_pretrained(weights, device=device, **(dict(base=str(base)) if train == 'lora' else {}))
        there = Policy(matrix.plain(base, weights, train), num_steps=4, train=train, precision=precision, lora_rank=4, device=device)
        return dict(here=bool(matrix.same_pictures(policy, again)), plain=bool(matrix.same_pictures(policy, there)),
                    ratio_error=[row['tasks']['red']['ratio_error'] for row in history], seconds=round(time.perf_counter() - began, 2))

def attempt(build, precision, train, device):
    "The same, whatever happens."
    about = dict(model=build.__name__, precision=precision, train=train)
    try: return about | case(build, precision, train, device)
    except Exception as e: return about | dict(failed=f'{type(e).__name__}: {e}'[:300])

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True); parser.add_argument('--device', default=best_device())
    parser.add_argument('--quick', action='store_true', help='two cases in place of all')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    rows = []
    for each in [matrix.SHORT[0], matrix.SHORT[-1]] if args.quick else matrix.EVERY:
        rows.append(attempt(*each, args.device))
        print(json.dumps(rows[-1]), flush=True)
        args.out.write_text(json.dumps(dict(device=args.device, torch=torch.__version__, rows=rows), indent=1) + '\n')
    sys.exit(not all(row.get('here') and row.get('plain') for row in rows))

if __name__ == '__main__': main()
