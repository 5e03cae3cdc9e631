"""How much thirty viewers of the panel slow a run that trains beside it.

    OMP_NUM_THREADS=1 python tests/benchmarks/viewers.py [--viewers 30] [--rounds 6]

A run trains in one process with one thread, the panel serves it from a second, the viewers are a third: each has the page open, which asks
once a second whether there is something new, and turns a page or an epoch every ten seconds. Phases of some epochs with and without viewers
take turns. Reported: the median epoch of both, the cores that the panel and its viewers used meanwhile, and how long answers took."""

import argparse, asyncio, json, os, re, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import httpx, psutil

from drl_toolkit.runs.run import Run


async def watch(address, number, until, waits):
    "One viewer: the page, a tick a second, now and then something else."
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        config = (await client.get('/config')).json()
        known = {
            d['targets'][0][1]: d['id'] for d in config['dependencies'] if d['targets'] and d['backend_fn']
        }

        async def call(name, *data):
            began = time.perf_counter()
            answer = await client.post(
                '/gradio_api/run/predict',
                json=dict(fn_index=known[name], data=list(data), session_hash=f'viewer{number}'),
            )
            assert answer.status_code == 200, answer.text
            waits.append(time.perf_counter() - began)

        await client.get('/')
        await call('load')
        for second in range(10**6):
            if time.monotonic() > until():
                return
            await call('tick', None, 'run', 0, None, None, None)
            if second % 10 == number % 10:
                await call('load')
            await asyncio.sleep(1)


def look(address, viewers, end):
    "All viewers until a moment; the seconds that they waited for each answer."
    waits = []

    async def everybody():
        await asyncio.gather(*(watch(address, i, lambda: end, waits) for i in range(viewers)))

    asyncio.run(everybody())
    return waits


def used(process):
    return sum(process.cpu_times()[:2])


def epochs_between(run, since):
    return [r['seconds'] for r in run.metrics() if r['task'] is None and r['epoch'] >= since]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--viewers', type=int, default=30)
    parser.add_argument('--rounds', type=int, default=6)
    parser.add_argument('--seconds', type=int, default=25)
    args = parser.parse_args()
    home = Path(tempfile.mkdtemp()) / 'runs'
    home.mkdir()
    environ = os.environ | dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1')
    start = lambda *words, **more: subprocess.Popen(
        [sys.executable, '-m', 'drl_toolkit.cli.main', *words], env=environ, text=True, **more
    )
    training = start(
        'train',
        'compressibility',
        '--num-steps',
        '4',
        '--train-steps',
        '1',
        '--epochs',
        '10000',
        '--out',
        str(home / 'run'),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    panel = start('app', str(home), '--port', '0', stdout=subprocess.PIPE)
    try:
        address = re.search(r'http://\S+', panel.stdout.readline())[0]
        while not (home / 'run/metrics.jsonl').is_file():
            if training.poll() is not None:
                sys.exit('the run did not start')
            time.sleep(1)
        time.sleep(10)
        run, server, seen, cores, waits = (
            Run.open(home / 'run'),
            psutil.Process(panel.pid),
            {True: [], False: []},
            [],
            [],
        )
        count = lambda: sum(r['task'] is None for r in run.metrics())
        for turn in range(2 * args.rounds):
            watched, first, began, before = (
                bool(turn % 2),
                count() + 1,
                time.monotonic(),
                used(server) + used(psutil.Process()),
            )
            if watched:
                waits += look(address, args.viewers, began + args.seconds)
            else:
                time.sleep(args.seconds)
            if watched:
                cores.append((used(server) + used(psutil.Process()) - before) / (time.monotonic() - began))
            seen[watched] += epochs_between(run, first)
            print(
                f"{'with' if watched else 'without'} viewers: "
                f"{statistics.median(epochs_between(run, first)):.3f} s an epoch",
                flush=True,
            )
        alone, together = (statistics.median(seen[w]) for w in (False, True))
        print(
            json.dumps(
                dict(
                    viewers=args.viewers,
                    epoch_alone=alone,
                    epoch_together=together,
                    slower=together / alone - 1,
                    cores_of_panel_and_viewers=statistics.median(cores),
                    cores=os.cpu_count(),
                    answers=len(waits),
                    answer_median=statistics.median(waits),
                    answer_most=max(waits),
                ),
                indent=1,
            )
        )
    finally:
        for process in (training, panel):
            process.terminate()


if __name__ == '__main__':
    main()
