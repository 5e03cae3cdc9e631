"""Run every notebook from top to bottom, each in a process of its own, two at a time. Cells marked `#| heavy` are skipped.

    python tests/notebooks.py [NAME …]      # names or parts of names, such as 03_mdp; all by default
"""
import os, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600   # seconds for one notebook on a busy machine; the promise is 120 on a free one
TEST = 'import sys; from pathlib import Path; from nbdev.test import test_nb; sys.exit(not test_nb(Path(sys.argv[1]), skip_flags=["heavy"], basepath=sys.argv[2])[0])'

def run(notebook):
    "(path, seconds, output of a failure or None)"
    began = time.time()
    try: done = subprocess.run([sys.executable, '-c', TEST, notebook, ROOT], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT,
                               env=os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', MPLBACKEND='agg'))
    except subprocess.TimeoutExpired: return notebook, LIMIT, f'not done after {LIMIT} seconds'
    return notebook, time.time() - began, (done.stdout + done.stderr)[-6000:] if done.returncode else None

def main(wanted):
    notebooks = sorted(p.relative_to(ROOT) for p in (ROOT / 'nbs').rglob('*.ipynb') if not p.name.startswith(('.', '_')) and '.ipynb_checkpoints' not in p.parts)
    notebooks = [p for p in notebooks if not wanted or any(w in str(p) for w in wanted)]
    if not notebooks: sys.exit(f'no notebook matches {wanted}')
    failures, began = [], time.time()
    with ThreadPoolExecutor(2) as pool:
        for i, (notebook, seconds, failure) in enumerate(pool.map(run, notebooks), 1):
            print(f"{i:3}/{len(notebooks)}  {'FAILED' if failure else 'passed'}  {seconds:5.0f} s  {notebook}", flush=True)
            if failure: failures.append(notebook); print(failure, flush=True)
    print(f"{len(notebooks) - len(failures)} of {len(notebooks)} notebooks passed in {time.time() - began:.0f} s"
          + (f"; failed: {', '.join(map(str, failures))}" if failures else ''))
    return 1 if failures else 0

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
