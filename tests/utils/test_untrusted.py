"""Whatever lies where a file of a run, a checkpoint, a list of prompts, a ballot or a reply should be: it loads, or
one line says what is wrong. Nothing runs, nothing waits, memory is bounded.

The long form, twelve times as many files (a quarter of an hour on a busy core): FUZZ=12 python -m pytest
tests/utils/test_untrusted.py"""

import json, os, re, shutil, signal
from contextlib import contextmanager
from pathlib import Path

import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from drl_toolkit.ui import pages

from drl_toolkit.sampling import loading


from drl_toolkit.rewards import remote


from drl_toolkit.evaluation import votes
from drl_toolkit.runs.recordings import read_frames, recorded_epochs
from drl_toolkit.prompts.task import load_prompts
from drl_toolkit.runs.run import Run, find_runs
from drl_toolkit.runs.control import Control
from drl_toolkit.prompts.streams import PromptStream
from drl_toolkit.recipes.config import read_config
from drl_toolkit.runs.state import load_state, save_state

TIMES, SECONDS, MEGABYTES = int(os.environ.get('FUZZ', 1)), 10, 600
fuzz = lambda count: settings(
    max_examples=count * TIMES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def in_memory(mark):
    return (
        next(
            int(line.split()[1])
            for line in Path('/proc/self/status').read_text().splitlines()
            if line.startswith(mark)
        )
        / 1024
    )


@pytest.fixture(autouse=True)
def bounded_memory():
    "No test of this file takes more than so many megabytes at any moment, by the kernel's own mark (Linux)."
    if not Path('/proc/self/clear_refs').exists():
        yield
        return
    Path('/proc/self/clear_refs').write_text('5')
    before = in_memory('VmRSS')
    yield
    assert in_memory('VmHWM') - before < MEGABYTES


KNOWN = (
    ValueError,
    OSError,
    TypeError,
    # RunError is a ValueError; TypeError only where a value of the wrong kind stands in prompts or
    # configurations
)

# a folder with one good file of each kind


def recorded(folder):
    "A run with frames, as the package ships it, and everything else that is read."
    shutil.copytree(Path(__file__).parents[2] / 'assets/runs/joint', folder / 'run')
    run = Run.open(folder / 'run')
    frames = run.folder / 'frames' / f'epoch_{recorded_epochs(run)[-1]:04d}'
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_state(
        folder / 'state',
        dict(net.named_parameters()),
        optimizer,
        dict(epoch=3, history=[dict(epoch=0, tasks={})]),
    )
    votes.make_ballot(folder / 'ballot', ['a cat', 'a dog'], torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8))
    votes.Ballot(folder / 'ballot').vote('0000', 'left', 'me')
    words = ['a cat', 'a dog, "quoted"', 'a key ⏰'] * 5
    for name, text in dict(
        txt='\n'.join(words),
        csv='prompt,n\n' + ''.join(f'"{w.replace(chr(34), chr(34) * 2)}",{i}\n' for i, w in enumerate(words)),
        tsv='prompt\tn\na cat\t1\n',
        jsonl='\n'.join(json.dumps(dict(prompt=w)) for w in words),
        json=json.dumps(words),
    ).items():
        (folder / f'prompts.{name}').write_text(text)
    import pyarrow, pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(dict(prompt=words)), folder / 'prompts.parquet')
    (folder / 'policy.json').write_text(json.dumps(dict(base='demo', train='lora', num_steps=3)))
    (run.folder / 'control.json').write_text('{"want": "pause"}')
    (run.folder / 'samples').mkdir(exist_ok=True)
    Image.new('RGB', (8, 8)).save(run.folder / 'samples/fuzz.png')
    (folder / 'tax.json').write_text(json.dumps(dict(kept=dict(base=dict(a=0.0), joint=dict(a=0.5, b=None)))))
    return run, frames, net, optimizer


@pytest.fixture(scope='module')
def loaders(tmp_path_factory):
    "name -> (file, how it is read)"
    folder = tmp_path_factory.mktemp('fuzz')
    run, frames, net, optimizer = recorded(folder)

    def looked_at():
        found = read_frames(run, recorded_epochs(run)[-1])
        for task in found.tasks.values():
            assert (
                len(task.samples) >= 0
                and all(p.steps is not None for p in task.paths)
                and task.boxes is not None
            )
        return found

    def strips():
        for task in looked_at().tasks.values():
            assert task.pictures is not None and all(p.noisy is not None for p in task.paths)

    def state():
        before = [p.detach().clone() for p in net.parameters()]
        try:
            return load_state(folder / 'state', dict(net.named_parameters()), optimizer)
        except Exception:
            assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))  # refused whole
            raise
        finally:
            with torch.no_grad():
                [p.copy_(b) for p, b in zip(net.parameters(), before)]

    def stream(kind):
        return lambda: PromptStream(folder / f'prompts.{kind}').check()

    def ballot():
        b = votes.Ballot(folder / 'ballot')
        b.draw('you'), b.result()

    def configured():
        return read_config(Run.open(run.folder).config)

    own = lambda name: run.folder / name
    return {
        'config.json': (own('config.json'), lambda: find_runs(folder)),
        'configuration': (own('config.json'), configured),
        'metrics.jsonl': (own('metrics.jsonl'), run.metrics),
        'lock': (own('lock'), lambda: run.alive),
        'control.json': (own('control.json'), lambda: Control(run.folder).want),
        'frames.json': (frames / 'frames.json', looked_at),
        'webp': (next(frames.glob('*.pictures.webp')), strips),
        'path webp': (next(frames.glob('*.path_*.webp')), strips),
        'sheet': (own('samples/fuzz.png'), lambda: pages.open_image(run, 'samples', 'fuzz.png')),
        'tax.json': (folder / 'tax.json', lambda: pages._kept(folder / 'tax.json')),
        **{
            name: (folder / 'state' / name, state)
            for name in ('weights.safetensors', 'optimizer.safetensors', 'state.json')
        },
        'policy.json': (folder / 'policy.json', lambda: loading.read_note(folder / 'policy.json')),
        'pairs.json': (folder / 'ballot/pairs.json', ballot),
        'votes.jsonl': (folder / 'ballot/votes.jsonl', ballot),
        'ballot png': (folder / 'ballot/0000_a.png', ballot),
        'list': (folder / 'prompts.txt', lambda: load_prompts(folder / 'prompts.txt')),
        **{
            kind: (folder / f'prompts.{kind}', stream(kind))
            for kind in ('txt', 'csv', 'tsv', 'jsonl', 'json', 'parquet')
        },
    }


NAMES = (
    'config.json',
    'configuration',
    'metrics.jsonl',
    'lock',
    'control.json',
    'frames.json',
    'webp',
    'path webp',
    'sheet',
    'tax.json',
    'weights.safetensors',
    'optimizer.safetensors',
    'state.json',
    'policy.json',
    'pairs.json',
    'votes.jsonl',
    'ballot png',
    'list',
    'txt',
    'csv',
    'tsv',
    'jsonl',
    'json',
    'parquet',
)
JSON = [n for n in NAMES if n.endswith(('.json', '.jsonl', 'json')) or n == 'configuration']

# what may lie there


@contextmanager
def in_time():
    "Nothing takes longer than this, not even an open that waits for a writer."

    def late(*_):
        raise AssertionError(f'it took more than {SECONDS} seconds')

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tried(load, *args):
    "It loads, or says in one line why not."
    with in_time():
        try:
            load(*args)
        except KNOWN as e:
            assert str(e) and '\n' not in str(e) and len(str(e)) < 1000, e


@contextmanager
def replaced(file, data):
    "The file with other bytes, for a moment."
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(data)
    try:
        yield
    finally:
        file.write_bytes(before) if before is not None else file.unlink()


CUTS = st.tuples(
    st.sampled_from(('flip', 'cut', 'double', 'drop', 'insert')),
    st.floats(0, 1),
    st.integers(0, 255),
    st.integers(1, 64),
)
ODD = (
    b'\x00',
    b'\xff\xfe',
    b'[' * 3000,
    b'{"a":' * 2000,
    b'9' * 400,
    b'1e999',
    b'-1',
    b'NaN',
    b'null',
    b'"',
    b'\n',
    b'\r',
    b',',
    b'\xed\xa0\x80',
    b'99999999999999999999',
    b'"\\ud800"',
)


def mutated(data, cuts):
    data = bytearray(data)
    for kind, where, byte, length in cuts:
        i = int(where * len(data))
        if kind == 'flip' and i < len(data):
            data[i] ^= byte or 1
        elif kind == 'cut':
            del data[i:]
        elif kind == 'double':
            data[i:i] = data[i : i + length]
        elif kind == 'drop':
            del data[i : i + length]
        else:
            data[i:i] = ODD[byte % len(ODD)]
    return bytes(data)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from(
        [
            10**30,
            -(10**30),
            2**63,
            2**31,
            1e308,
            -1.5,
            float('nan'),
            float('inf'),
            '',
            'a',
            '../../x',
            'a' * 2000,
            '\ud800',
            '0',
        ]
    ),
    st.text(max_size=5),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def places(value, here=()):
    "Every place in some JSON."
    yield here
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(inner, (*here, key))


def swapped(value, where, new):
    "The value with another one at a place, or without what is there."
    if not where:
        return new
    value = value.copy()
    if new is LEFT_OUT and len(where) == 1:
        value.pop(where[0])
    else:
        value[where[0]] = swapped(value[where[0]], where[1:], new)
    return value


LEFT_OUT = object()


def with_swap(text, data):
    "Some JSON, or a line of JSON lines, with one place swapped."
    lines = text.splitlines() if text.count('\n{') else [text]
    i = data.draw(st.integers(0, len(lines) - 1))
    value = json.loads(lines[i])
    where = data.draw(st.sampled_from(list(places(value))[:3000]))
    new = data.draw(VALUES | st.just(LEFT_OUT))
    lines[i] = json.dumps(swapped(value, where, None if new is LEFT_OUT and not where else new))
    return '\n'.join(lines + [''])


@pytest.mark.parametrize('name', NAMES)
def test_any_bytes(loaders, name):
    file, load = loaders[name]

    @fuzz(8)
    @given(st.binary(max_size=300) | st.sampled_from(ODD))
    def check(data):
        with replaced(file, data):
            tried(load)

    check()


@pytest.mark.parametrize('name', NAMES)
def test_damaged_files(loaders, name):
    file, load = loaders[name]
    good = file.read_bytes() if file.exists() else b''

    @fuzz(12)
    @given(st.lists(CUTS, min_size=1, max_size=4))
    def check(cuts):
        with replaced(file, mutated(good, cuts)):
            tried(load)

    check()


@pytest.mark.parametrize('name', JSON)
def test_wrong_values(loaders, name):
    file, load = loaders[name]
    good = file.read_text()

    @fuzz(15)
    @given(st.data())
    def check(data):
        with replaced(file, with_swap(good, data).encode()):
            tried(load)

    check()


@fuzz(60)
@given(
    st.sampled_from(
        [
            (200, dict(protocol=1, values=[0.5, 1.0], figures={})),
            (200, dict(protocol=1, values=[0.5, 1.0], figures=dict(a=1.0))),
            (500, dict(protocol=1, error='no')),
        ]
    ),
    st.data(),
)
def test_replies_and_requests(reply, data):
    status, good = reply
    text = with_swap(json.dumps(good), data).encode()
    for body in (
        text,
        mutated(text, data.draw(st.lists(CUTS, max_size=3))),
        data.draw(st.binary(max_size=100)),
    ):
        tried(remote.read_reply, status, body, 2)
    asked = json.dumps(
        dict(
            protocol=1,
            format=data.draw(st.sampled_from(remote.FORMATS)),
            prompts=['a'],
            images=remote.encode_images(torch.zeros(1, 3, 2, 2), 'npz'),
        )
    ).encode()
    for body in (
        with_swap(asked.decode(), data).encode(),
        mutated(asked, data.draw(st.lists(CUTS, max_size=3))),
    ):
        tried(remote.read_request, body)


# what is no file


def stands_in(path, kind):
    if kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'folder':
        path.mkdir()
    else:
        path.symlink_to(
            {
                'endless device': '/dev/zero',
                'nothing': 'nowhere',
                'itself': path.name,
                'link to a pipe': path.with_name('a pipe'),
            }[kind]
        )
    if kind == 'link to a pipe':
        os.mkfifo(path.with_name('a pipe'))


@pytest.mark.parametrize('kind', ['pipe', 'folder', 'endless device', 'nothing', 'itself', 'link to a pipe'])
@pytest.mark.parametrize('name', NAMES)
def test_what_is_no_file(loaders, name, kind):
    file, load = loaders[name]
    aside = file.with_name('aside')
    if file.exists():
        file.rename(aside)
    try:
        stands_in(file, kind)
        tried(load)
    finally:
        file.rmdir() if kind == 'folder' else file.unlink()
        if kind == 'link to a pipe':
            file.with_name('a pipe').unlink()
        if aside.exists():
            aside.rename(file)


# too much


@pytest.mark.parametrize('name', NAMES)
def test_files_of_any_size(loaders, name, tmp_path):
    "Ten gigabytes of zeros (a file with a hole, which takes no room)."
    file, load = loaders[name]
    with replaced(file, b''):
        os.truncate(file, 10 * 2**30)
        tried(load)


def test_a_million_brackets_and_endless_lines(loaders):
    for data in (b'[' * 10**6, b'{"a":' * 10**5, b'9' * 10**6, b'[' + b'[],' * 10**5 + b'[]]'):
        for name in (
            'config.json',
            'metrics.jsonl',
            'frames.json',
            'state.json',
            'votes.jsonl',
            'json',
            'jsonl',
        ):
            file, load = loaders[name]
            with replaced(file, data):
                tried(load)
    file, load = loaders['csv']
    with (
        replaced(file, b'prompt,n\n' + b'"a\n",' * 10**6),
        pytest.raises(ValueError, match='the row is longer'),
    ):
        load()


def test_a_picture_that_unfolds(loaders):
    "A PNG of a few kilobytes that claims more pixels than fit in memory."
    import struct, zlib

    part = lambda kind, data: (
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    )
    bomb = (
        b'\x89PNG\r\n\x1a\n'
        + part(b'IHDR', struct.pack('>IIBBBBB', 60000, 60000, 8, 2, 0, 0, 0))
        + part(b'IDAT', zlib.compress(b'\0' * 10**6))
        + part(b'IEND', b'')
    )
    for name in ('sheet', 'ballot png', 'webp'):
        file, load = loaders[name]
        with replaced(file, bomb):
            tried(load)


# nothing is run


def test_the_source_unpickles_nothing():
    "Whatever can run code that is hidden in data."
    source = {p: p.read_text() for p in (Path(__file__).parents[2] / 'drl_toolkit').rglob('*.py')}
    for pattern in (
        r'\bpickle\.',
        r'import (pickle|dill|joblib|shelve|marshal)',
        r'allow_pickle\s*=\s*True',
        r'weights_only\s*=\s*False',
        r'\byaml\.(load|unsafe_load)\(',
        r'read_pickle',
        r'(?<![\w.])eval\(',
        r'use_safetensors\s*=\s*False',
    ):
        assert not [p.name for p, text in source.items() if re.search(pattern, text)], pattern
    assert [p.name for p, text in source.items() if re.search(r'(?<![\w./])exec\(', text)] == [
        'widgets.py'
    ]  # the cell in which the reader of a notebook writes a reward
    for p, text in source.items():
        for call in re.findall(r'torch\.load\([^\n]*', text):
            assert 'weights_only=True' in call, (p.name, call)


def test_a_pickle_in_disguise_is_not_run(loaders, tmp_path):
    "Bytes that would leave a mark if anything unpickled them, under every name."
    import pickle

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / 'ran'),))

    for name in NAMES:
        file, load = loaders[name]
        with replaced(file, pickle.dumps(Trap())):
            tried(load)
    assert not (tmp_path / 'ran').exists()
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / 'ran').exists()  # the trap works


# folders of models


@pytest.fixture(scope='module')
def pipeline_folder(tmp_path_factory):
    from drl_toolkit.emoji.tiny import tiny_sd

    folder = tmp_path_factory.mktemp('model') / 'tiny'
    tiny_sd().save_pretrained(folder)
    return folder


EVIL = [
    dict(_class_name=['evil', 'Evil']),
    dict(_class_name='evil'),
    dict(unet=['evil', 'Evil']),
    dict(scheduler=['evil', 'Evil']),
    dict(vae=['evil.evil', 'Evil']),
    dict(text_encoder=['os', 'system']),
    dict(tokenizer=['diffusers.utils', 'Evil']),
    dict(extra=['evil', 'Evil']),
    dict(unet={'evil': 'Evil'}),
    dict(unet=['diffusers', 'evil']),
    dict(unet=[None, 'Evil']),
]


@pytest.mark.parametrize('change', EVIL, ids=str)
def test_a_folder_of_a_model_runs_no_code(pipeline_folder, tmp_path, monkeypatch, change):
    """Refused before diffusers sees it, whatever its version: that of the declared floor imported what such a
    folder names."""
    from drl_toolkit.sampling.policy import Policy

    folder = tmp_path / 'model'
    shutil.copytree(pipeline_folder, folder)
    for place in (folder, folder / 'evil', folder / 'unet'):
        place.mkdir(exist_ok=True)
        (place / 'evil.py').write_text(
            f'open({str(tmp_path / "ran")!r}, "w"); class_ = 1\nclass Evil: pass\n'
        )
    monkeypatch.syspath_prepend(str(folder))
    about = json.loads((folder / 'model_index.json').read_text())
    (folder / 'model_index.json').write_text(json.dumps(about | change))
    with pytest.raises(ValueError, match='must be a'):
        Policy.from_pretrained(str(folder))
    assert not (tmp_path / 'ran').exists()


def test_pieces_of_weights_are_never_unpickled(pipeline_folder, tmp_path):
    import pickle
    from drl_toolkit.sampling.policy import Policy

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / 'ran'),))

    folder = tmp_path / 'model'
    shutil.copytree(pipeline_folder, folder)
    (folder / 'text_encoder/model.safetensors').unlink()
    (folder / 'text_encoder/part.bin').write_bytes(pickle.dumps(Trap()))
    for piece in ('part.bin', '../text_encoder/part.bin', 7, '/etc/x.safetensors'):
        (folder / 'text_encoder/model.safetensors.index.json').write_text(
            json.dumps(dict(metadata={}, weight_map={'a': piece}))
        )
        with pytest.raises(ValueError, match='must name pieces of safetensors'):
            Policy.from_pretrained(str(folder))
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('train', ['lora', 'full'])
def test_what_is_saved_tells_nothing_of_this_machine(pipeline_folder, tmp_path, train, monkeypatch):
    "No absolute path in any text that a save leaves; and it loads again, from anywhere."
    from drl_toolkit.sampling.policy import Policy

    policy = Policy.from_pretrained(str(pipeline_folder), train=train, num_steps=2)
    saved = policy.save(tmp_path / 'a/weights', str(pipeline_folder), 'trained on nothing')
    for file in saved.rglob('*'):
        if file.suffix in ('.json', '.md', '.txt'):
            assert (
                str(tmp_path.parent) not in file.read_text() and str(pipeline_folder) not in file.read_text()
            ), file
    monkeypatch.chdir('/')
    again = Policy.from_pretrained(str(saved))
    assert all(
        torch.equal(a, b)
        for a, b in zip(policy.pipeline.unet.state_dict().values(), again.pipeline.unet.state_dict().values())
    )
