"What tests of the panel share: runs that nobody had to train, and a server of them."

import json, threading
from contextlib import contextmanager

import pytest, uvicorn
from PIL import Image, ImageDraw

from drl_toolkit.recipes.panel import panel_world
from drl_toolkit.ui.panel import make_app
from drl_toolkit.runs.recordings import save_frames
from drl_toolkit.runs.run import Run
from drl_toolkit.utils.atomic import write_json
from drl_toolkit.rewards.fairness import TONES
from drl_toolkit.utils.images import to_tensor

STEPS = 4


@pytest.fixture(autouse=True, scope='module')
def quick():
    "Nobody pulls the plug of a test, so nothing need be forced to the disk."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('os.fsync', lambda handle: None)
        yield


def picture(hue, text=''):
    image = Image.new('RGB', (64, 64), f'hsl({hue % 360},60%,70%)')
    ImageDraw.Draw(image).text((4, 24), text, fill='black')
    return image


def note(prompts, group, epoch, categories=None, boxes=None, split=None):
    "A task's part of frames.json, as the recorder writes it."
    count = len(prompts)
    rewards = [(i * 37 + epoch * 11) % 100 / 100 for i in range(count)]
    path = lambda i: dict(
        sample=i,
        advantage=rewards[i] - 0.5,
        steps=[*range(STEPS)],
        timesteps=[900.0, 600.0, 300.0, 0.0],
        log_prob=[-1.4] * STEPS,
        ratio=[1.02, 0.97, 1.0, 1.01],
        kl=[0.01, 0.02, 0.03, None],
        trained=[True, False, True, True],
        clipped=[False, False, True, False],
        noise_std=[0.6, 0.4, 0.2, 0.0],
    )
    return dict(
        prompts=prompts,
        seeds=[*range(count)],
        groups=[i // group for i in range(count)],
        advantages=[r - 0.5 for r in rewards],
        rewards={'score': rewards},
        categories=categories or {},
        split=split,
        shown=[*range(min(8, count))],
        boxes={i: b for i, b in enumerate(boxes or [])},
        paths=[path(0), path(1)],
    )


def add_epoch(run, epoch, frames=True, prompt='a portrait of a doctor'):
    "One more epoch of a run."
    row = dict(reward=0.4 + 0.02 * epoch, kl=0.01)
    run.log(
        dict(
            epoch=epoch,
            tasks=dict(
                fairness=row | dict(parity=max(0.22, 0.45 - 0.02 * epoch), parity_floor=0.21), composition=row
            ),
            seconds=2.0,
        )
    )
    if not frames:
        return
    values = [(i + epoch) % 5 if i % 3 else 0 for i in range(16)]
    fair = note(
        [prompt] * 8 + ['a portrait of a cook'] * 8,
        8,
        epoch,
        categories={'skin tone': dict(names=list(TONES), values=values)},
    )
    pairs = note(
        ['an apple next to a cat'] * 4 + ['a dog above a car'] * 4,
        4,
        epoch,
        boxes=[[['apple', 0.9, 0.1, 0.2, 0.45, 0.8], ['cat', 0.7, 0.5, 0.2, 0.9, 0.8]]] * 8,
        split=2,
    )
    shots = [picture(40 * i + epoch, str(epoch)) for i in range(8)]
    paths = [
        (
            [picture(30 * s + k, f'x{s}') for s in range(STEPS + 1)],
            [picture(30 * s + k, f'p{s}') for s in range(STEPS)],
        )
        for k in (0, 90)
    ]
    save_frames(
        run,
        epoch,
        dict(fairness=fair, composition=pairs),
        dict(fairness=(shots, paths), composition=(shots, paths)),
    )


def make_run(folder, epochs=6, every=1, name='joint', planned=None, sheets=True, **more):
    "A run as training would have left it."
    with Run.create(folder, dict(epochs=planned or epochs, seed=0), recipe=name) as run:
        for epoch in range(epochs):
            add_epoch(run, epoch, frames=epoch % every == 0 or epoch == epochs - 1, **more)
        for epoch in (0, epochs) if sheets else ():
            run.save_sheet(epoch, to_tensor([picture(20 * i + epoch, f's{epoch}') for i in range(16)]))
    return Run.open(folder)


def long_run(folder, epochs=1000):
    "A run of a thousand epochs, quickly."
    run = make_run(folder, epochs=3, planned=epochs)
    row = lambda e, task: json.dumps(
        dict(epoch=e, task=task)
        | (
            dict(seconds=2.0)
            if task is None
            else dict(
                reward=0.4 + e / 5000,
                reward_std=0.1,
                kl=0.01,
                grad_norm=0.2,
                parity=0.4 - e / 10000,
                parity_floor=0.21,
            )
        )
    )
    (run.folder / 'metrics.jsonl').write_text(
        ''.join(
            row(e, t) + '\n' for e in range(epochs) for t in ('fairness', 'composition', 'preference', None)
        )
    )
    for epoch in range(10, epochs, 40):
        add_frames_only(run, epoch)
    return run


def add_frames_only(run, epoch):
    "Images of an epoch whose numbers are there."
    before = (run.folder / 'metrics.jsonl').read_bytes()
    add_epoch(run, epoch)
    (run.folder / 'metrics.jsonl').write_bytes(before)


def add_weights(run):
    "Something to download."
    (run.folder / 'weights' / 'unet').mkdir(parents=True)
    (run.folder / 'weights/unet/model.safetensors').write_bytes(b'tensors')
    write_json(run.folder / 'weights/model_index.json', dict(a=1))


def add_ballot(run, pairs=3):
    "Pairs to vote on."
    from drl_toolkit.evaluation.votes import make_ballot

    images = lambda hue: to_tensor([picture(hue + 50 * i) for i in range(pairs)])
    make_ballot(run.folder / 'eval/ballot', [f'prompt {i}' for i in range(pairs)], images(0), images(180))


@contextmanager
def serving(folder, **options):
    "A panel's address, while it is served; and the application."
    app = make_app(folder, **dict(world=panel_world()) | options)
    server = uvicorn.Server(uvicorn.Config(app, host='127.0.0.1', port=0, log_level='critical'))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        threading.Event().wait(0.02)
    try:
        yield f'http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}', app
    finally:
        server.should_exit, server.force_exit = True, True
        thread.join(10)
        if app.state.bench:
            app.state.bench.close()
