"""Run every notebook from top to bottom, each in a process of its own, two at a time. Cells marked `#| heavy` are skipped.
The course's lessons are left to tests/course/test_lessons.py, which runs their exercises, too.

python tests/notebooks.py [NAME …]      # names or parts of names, such as 03_mdp; all by default
"""

import os, re, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds for one notebook on a busy machine; the promise is 120 on a free one
os.environ |= dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', MPLBACKEND='agg')
FORKS = get_context('forkserver')  # imports what all of them import once, not sixty times
FORKS.set_forkserver_preload(
    ['nbdev.test', 'matplotlib.pyplot', 'drl_toolkit.recipes.recipes', 'drl_toolkit.evaluation.evaluate']
)


def lesson(notebook):
    "Whether it is one of the course's numbered lessons."
    return notebook.parent.name == 'course' and re.match(r'\d\d_', notebook.name)


def execute(notebook, told):
    "In a process of its own: run the notebook; what it prints goes to a file."
    from nbdev.test import test_nb

    out = os.open(told, os.O_WRONLY)
    for handle in (1, 2):
        os.dup2(out, handle)
    os.chdir(ROOT)
    good = test_nb(ROOT / notebook, skip_flags=['heavy'], basepath=ROOT)[0]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(not good)  # threads of a library do not keep it


def run(notebook):
    "(path, seconds, output of a failure or None)"
    began = time.time()
    with tempfile.NamedTemporaryFile('r', errors='replace') as told:
        process = FORKS.Process(target=execute, args=(notebook, told.name))
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            return notebook, LIMIT, f'not done after {LIMIT} seconds'
        return (
            notebook,
            time.time() - began,
            told.read()[-6000:] + f'exit status {process.exitcode}' if process.exitcode else None,
        )


def main(wanted):
    notebooks = sorted(
        p.relative_to(ROOT)
        for p in (ROOT / 'nbs').rglob('*.ipynb')
        if not p.name.startswith(('.', '_')) and '.ipynb_checkpoints' not in p.parts and not lesson(p)
    )
    notebooks = [p for p in notebooks if not wanted or any(w in str(p) for w in wanted)]
    if not notebooks:
        sys.exit(f'no notebook matches {wanted}')
    notebooks.reverse()  # among the last are long ones: nobody should wait for one of them alone
    failures, began = [], time.time()
    with ThreadPoolExecutor(2) as pool:
        for i, (notebook, seconds, failure) in enumerate(pool.map(run, notebooks), 1):
            print(
                f"{i:3}/{len(notebooks)}  {'FAILED' if failure else 'passed'}  {seconds:5.0f} s  {notebook}",
                flush=True,
            )
            if failure:
                failures.append(notebook)
                print(failure, flush=True)
    print(
        f"{len(notebooks) - len(failures)} of {len(notebooks)} notebooks passed in "
        f"{time.time() - began:.0f} s" + (f"; failed: {', '.join(map(str, failures))}" if failures else '')
    )
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
