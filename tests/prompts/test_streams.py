"Streams of prompts: formats, order, split, position, memory, a killed process; and embeddings on disk."

import json, multiprocessing, os, random, signal, subprocess, sys, time
from pathlib import Path

import datasets, huggingface_hub, pyarrow as pa, pyarrow.parquet as pq, pytest, torch
from hypothesis import given, settings, strategies as st

from drl_toolkit.sampling import embeddings, policy as policies

from drl_toolkit.prompts import streams

from drl_toolkit.emoji import world
from drl_toolkit.sampling.embeddings import EmbeddingCache, text_identity
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.prompts.task import Compositions, Task
from drl_toolkit.emoji.prompts import portraits
from drl_toolkit.rewards.reward import jpeg_compressibility, reward
from drl_toolkit.runs.run import Run
from drl_toolkit.runs.recorder import Recorder, resume, training_notes
from drl_toolkit.prompts.streams import (
    BLOCK,
    HUB,
    WINDOW,
    Filtered,
    HubSet,
    Mixed,
    PromptStream,
    is_held_out,
    normalised,
    prompt_files,
)
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.config import TrainConfig
from tiers import long

ENV = os.environ | dict(PYTHONPATH=os.pathsep.join(p for p in sys.path if p), OMP_NUM_THREADS='1')


def numbered(count, word='prompt'):
    return [f'{word} {i}' for i in range(count)]


def parquet(path, prompts, group=5000, **more):
    pq.write_table(
        pa.table({'id': list(range(len(prompts))), 'prompt': prompts}), path, row_group_size=group, **more
    )
    return path


def written(path, prompts):
    "The same prompts in any format."
    if path.suffix == '.parquet':
        return parquet(path, prompts, 700)
    if path.suffix == '.txt':
        path.write_text(''.join(p + '\n' for p in prompts))
    if path.suffix == '.jsonl':
        path.write_text(''.join(json.dumps(dict(id=i, prompt=p)) + '\n' for i, p in enumerate(prompts)))
    if path.suffix == '.json':
        path.write_text(json.dumps(prompts))
    if path.suffix in ('.csv', '.tsv'):
        comma = ',' if path.suffix == '.csv' else '\t'
        path.write_text(f'id{comma}prompt\n' + ''.join(f'{i}{comma}"{p}"\n' for i, p in enumerate(prompts)))
    return path


SUFFIXES = ['.txt', '.csv', '.tsv', '.jsonl', '.json', '.parquet']


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_every_format_gives_the_same_rows_in_any_order_of_blocks(tmp_path, suffix):
    prompts = numbered(3 * BLOCK + 17)
    source = prompt_files(written(tmp_path / f'p{suffix}', prompts))
    assert source.rows == len(prompts) and sum(source.read(list(range(source.blocks))), []) == prompts
    some = [source.blocks - 1, 0, 2]
    assert source.read(some) == [source.read([b])[0] for b in some] and source.read([0])[0][0] == 'prompt 0'
    assert list(PromptStream(source, shuffle=False, passes=2)) == prompts * 2


def test_a_big_row_group_is_read_in_blocks_and_nothing_is_lost_at_the_edges(tmp_path):
    prompts = numbered(9999, 'un café') + [None, ' ', 'last']
    for group, more in (
        (20_000, {}),
        (BLOCK, {}),
        (BLOCK + 1, dict(data_page_size=512)),
        (977, dict(use_dictionary=False, compression='zstd')),
    ):
        source = prompt_files(parquet(tmp_path / f'{group}.parquet', prompts, group, **more))
        assert list(PromptStream(source, shuffle=False, passes=1)) == [p for p in prompts if p and p.strip()]
        assert sorted(PromptStream(source, passes=1)) == sorted(p for p in prompts if p and p.strip())


def test_text_columns_of_all_kinds(tmp_path):
    for i, kind in enumerate((pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))):
        pq.write_table(
            pa.table({'prompt': pa.array(['a cat', 'a dog'], pa.string()).cast(kind)}),
            tmp_path / f'{i}.parquet',
        )
        assert PromptStream(tmp_path / f'{i}.parquet', shuffle=False).take(2) == ['a cat', 'a dog']


def test_csv_with_quotes_commas_and_line_breaks_inside(tmp_path):
    import csv

    hard = [f'{i}, "quoted"\nand broken, café' if i % 3 else f'plain {i}' for i in range(2500)]
    with open(tmp_path / 'p.csv', 'w', newline='', encoding='utf-8-sig') as f:
        rows = csv.writer(f)
        rows.writerow(['id', 'prompt', 'x'])
        rows.writerows([i, p, ''] for i, p in enumerate(hard))
    assert list(PromptStream(tmp_path / 'p.csv', shuffle=False, passes=1)) == hard
    assert prompt_files(tmp_path / 'p.csv').read([2, 1])[1][0] == hard[BLOCK]


def test_several_files_are_one_source(tmp_path):
    parts = [numbered(1500, w) for w in 'abc']
    files = [
        written(tmp_path / f'{i}{s}', p) for i, (s, p) in enumerate(zip(('.txt', '.parquet', '.csv'), parts))
    ]
    whole = prompt_files(*files)
    assert whole.rows == 4500 and sum(whole.read(list(range(whole.blocks))), []) == sum(parts, [])
    assert whole.read([whole.blocks - 1, 0, 2]) == [whole.read([b])[0] for b in (whole.blocks - 1, 0, 2)]


BAD = [
    ('none.txt', None, 'there is none'),
    ('empty.parquet', b'', 'it must hold one prompt or more; got none'),
    ('p.xlsx', b'x', "ends with '.xlsx'; one of .txt"),
    ('blank.csv', b'prompt\n', 'no prompt in it'),
    ('head.csv', b'id,text\n1,a\n', "no column 'prompt'.*must be one of 'id', 'text'"),
    ('short.csv', b'id,prompt\n1,a\n2\n', 'line 3: it has 1 fields; 2'),
    ('quote.csv', b'prompt\n"a cat\n', 'line 2: unexpected end of data'),
    ('bytes.txt', b'a\nb\n\xff\xfe\n', 'line 3: byte 0 is no UTF-8'),
    ('late.csv', b'prompt\na\n\xff\n', 'line 3: byte 0'),
    ('torn.jsonl', b'{"prompt": "a"}\n\n{"prompt', 'line 3: it is no JSON'),
    (
        'key.jsonl',
        b'{"prompt": "a"}\n{"text": "a"}\n',
        "line 2: there is no column 'prompt'.*must be one of 'text'",
    ),
    ('type.jsonl', b'{"prompt": ["a"]}\n', r"line 1: the prompt must be text; got \['a'\]"),
    ('list.json', b'{"a": 1}', 'holds dict; a list'),
    ('bad.json', b'[1', 'is no JSON'),
    ('number.json', b'["a", 3]', 'entry 2: the prompt must be text; got 3'),
    ('noise.parquet', b'PAR1' + b'x' * 200, 'torn or no Parquet'),
    ('long.txt', b'a' * (streams.LONGEST + 1), 'line 1: it is longer'),
]


@pytest.mark.parametrize('name, content, words', BAD, ids=[b[0] for b in BAD])
def test_bad_files_are_one_line(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, TypeError, OSError), match=words) as error:
        PromptStream(tmp_path / name).check()
    assert '\n' not in str(error.value) and name in str(error.value)


def test_a_folder_and_a_number_column_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='it is a folder'):
        prompt_files(tmp_path)
    with pytest.raises(TypeError, match="column 'id' holds int64; text is right"):
        prompt_files(parquet(tmp_path / 'p.parquet', ['a']), column='id')
    with pytest.raises(ValueError, match="no column 'text'.*must be one of 'id', 'prompt'"):
        prompt_files(tmp_path / 'p.parquet', column='text')


def test_a_parquet_file_torn_anywhere_is_an_error_and_never_other_prompts(tmp_path):
    prompts = [f'{random.Random(i).random()}' for i in range(4000)]
    data = parquet(tmp_path / 'p.parquet', prompts, 1000).read_bytes()
    for cut in (10, len(data) // 2, len(data) - 1):
        (tmp_path / 'torn.parquet').write_bytes(data[:cut])
        with pytest.raises(ValueError, match='torn or no Parquet'):
            PromptStream(tmp_path / 'torn.parquet').check()
    (tmp_path / 'torn.parquet').write_bytes(
        data[:2000] + b'\xff' * 9000 + data[11000:]
    )  # the footer is whole, a page is not
    with pytest.raises(ValueError, match='torn or no Parquet'):
        PromptStream(tmp_path / 'torn.parquet').check()


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(split='test'), "split must be .*; got 'test'"),
        (dict(held_out=1.0), 'held_out is 1.0'),
        (dict(held_out=0), 'held_out is 0'),
        (dict(seed=-1), 'seed must be .*; got -1'),
        (dict(passes=True), 'passes must be .*; got True'),
        (dict(seed=0.5), 'seed must be .*; got 0.5'),
    ],
)
def test_bad_options_are_one_line(options, words):
    with pytest.raises(ValueError, match=words):
        PromptStream(['a cat'], **options)


def test_empty_sources_and_short_streams_are_errors():
    with pytest.raises(ValueError, match='no prompt in it'):
        PromptStream([])
    with pytest.raises(ValueError, match='no prompt in it'):
        PromptStream([' ', '']).take(1)
    with pytest.raises(TypeError, match='row 2: the prompt must be text; got 3'):
        PromptStream(['a', 3])
    with pytest.raises(ValueError, match='ended after 3 of 4'):
        PromptStream(['a', 'b', 'c'], passes=1).take(4)


def test_take_takes_no_more_than_it_gives():
    stream = PromptStream(numbered(10), shuffle=False)
    assert stream.take(3) + stream.take(0) + stream.take(4) == numbered(7)


def test_passes_have_every_row_once_and_orders_of_their_own():
    rows = numbered(40_000)
    stream = PromptStream(rows, seed=1, passes=2)
    first, second = stream.take(40_000), stream.take(40_000)
    assert (
        sorted(first) == sorted(second) == sorted(rows)
        and len({tuple(first), tuple(second), tuple(PromptStream(rows, seed=2).take(40_000)), tuple(rows)})
        == 4
    )
    assert next(stream, None) is None


def test_shuffling_takes_a_row_far_from_its_neighbours():
    rows = list(map(str, range(200_000)))
    places = [int(p) for p in PromptStream(rows).take(WINDOW * BLOCK)]
    apart = sum(abs(a - b) < 10 for a, b in zip(places, places[1:])) / len(places)
    assert apart < 0.005 and len({p // 20_000 for p in places}) >= 7  # of ten strips


texts = st.text(st.characters(blacklist_categories=('Cs',)), min_size=1, max_size=40)


@given(texts, st.floats(0.01, 0.99), st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=200)
def test_the_split_follows_the_words_and_grows_with_its_share(prompt, small, large):
    small, large = sorted((small, large))
    assert is_held_out(prompt, small) <= is_held_out(prompt, large) and normalised(
        normalised(prompt)
    ) == normalised(prompt)
    for other in (f'  {prompt}\t', prompt + '.', prompt.replace(' ', '  ')):
        if normalised(other) == normalised(prompt):
            assert is_held_out(other, small) == is_held_out(prompt, small)


def test_spellings_of_a_prompt_never_leak():
    spell = [str.upper, str.title, lambda p: f'"{p}"', lambda p: p.replace(' ', '  '), lambda p: p + '!!']
    prompts = numbered(3000, 'a cat, by artist')
    rows = prompts + [f(p) for f in spell for p in prompts]
    random.Random(0).shuffle(rows)
    train, test = (
        {normalised(p) for p in PromptStream(rows, split=s, held_out=0.1, passes=1)}
        for s in ('train', 'held_out')
    )
    assert not train & test and len(train | test) == 3000 and 220 < len(test) < 380
    assert PromptStream(rows, split='held_out', held_out=0.1).check() == 6 * len(test)
    assert normalised('★ ★') == '★ ★' and normalised('ＣＡＴ') == 'cat'


@given(
    st.integers(1, 3000),
    st.integers(0, 6000),
    st.integers(0, 400),
    st.sampled_from(['all', 'train', 'held_out']),
    st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_resume_is_exact_at_every_position(count, before, after, split, shuffle):
    made = lambda: PromptStream(numbered(count), seed=3, split=split, held_out=0.4, shuffle=shuffle)
    one, two = made(), made()
    if not sum(is_held_out(p, 0.4) == (split == 'held_out') for p in numbered(count)) and split != 'all':
        return
    one.take(before)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert one.take(after) == two.take(after) and one.state_dict() == two.state_dict()


def test_a_position_of_another_stream_is_refused(tmp_path):
    state = PromptStream(numbered(50), seed=1).state_dict()
    assert len(json.dumps(state)) < 200
    for other, words in (
        (PromptStream(numbered(50), seed=2), 'seed 1'),
        (PromptStream(numbered(51), seed=1), 'source'),
        (PromptStream(numbered(50), seed=1, split='train'), "split 'all'"),
    ):
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(state)
    a, b = (
        parquet(tmp_path / 'a.parquet', numbered(50)),
        parquet(tmp_path / 'b.parquet', numbered(50, 'pRompt')),
    )
    moved = tmp_path / 'moved.parquet'
    moved.write_bytes(a.read_bytes())
    PromptStream(moved).load_state_dict(PromptStream(a).state_dict())
    with pytest.raises(ValueError, match='source'):
        PromptStream(b).load_state_dict(PromptStream(a).state_dict())


def test_mixed_and_filtered_streams_keep_weights_and_resume():
    def made():
        return Mixed(
            [
                PromptStream(numbered(3000, 'a')),
                Filtered(PromptStream(numbered(3000, 'b')), lambda p: p.endswith('7')),
            ],
            [3, 1],
            seed=5,
        )

    one, two = made(), made()
    drawn = one.take(6000)
    assert abs(sum(p.startswith('a') for p in drawn) / 6000 - 0.75) < 0.02 and all(
        p.endswith('7') for p in drawn if p.startswith('b')
    )
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert one.take(500) == two.take(500)
    with pytest.raises(ValueError, match='weights'):
        Mixed(made().streams, [1, 1], seed=5).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda s: Mixed([]), 'streams must be'),
        (lambda s: Mixed([['a']]), 'streams must be'),
        (lambda s: Mixed([s], [1, 2]), '2 weights for 1'),
        (lambda s: Mixed([s], [0]), 'weight must be a number above 0; got 0'),
        (lambda s: Mixed([s], [float('nan')]), 'weight must be a number above 0; got nan'),
        (lambda s: Filtered(['a'], len), 'stream must be'),
        (lambda s: Filtered(s, 'a'), 'keep must be'),
        (lambda s: Filtered(s, lambda p: False, patience=9).take(1), 'refused 9 prompts in a row'),
    ],
)
def test_bad_mixtures_and_filters_are_one_line(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make(PromptStream(['a cat']))


def test_hub_sets_by_id(tmp_path, monkeypatch):
    asked = []
    table = datasets.Dataset.from_dict(dict(caption=numbered(3000), user=list(range(3000))))
    monkeypatch.setattr(datasets, 'load_dataset', lambda id, split: asked.append((id, split)) or table)
    assert sorted(PromptStream(HUB['pickapic'].open(), passes=1)) == sorted(numbered(3000))
    with pytest.raises(
        ValueError, match="'owner/name'.*no column 'prompt'.*must be one of 'caption', 'user'"
    ):
        HubSet('owner/name').open()

    def download(id, name, repo_type):
        asked.append((id, name))
        return str(written(tmp_path / Path(name).name, numbered(20, name)))

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    assert HUB['diffusiondb'].open().rows == 20 and HUB['hpd'].open().rows == 80
    assert asked == [
        ('yuvalkirstain/pickapic_v1_no_images', 'train'),
        ('owner/name', 'train'),
        ('poloclub/diffusiondb', 'metadata.parquet'),
        *(('zhwang/HPDv2', f'benchmark/{s}.json') for s in ('anime', 'concept-art', 'paintings', 'photo')),
    ]


def test_hub_sets_that_cannot_be_read_are_one_line(monkeypatch):
    with pytest.raises(ValueError, match="id must be 'owner/name'; got 'cats'"):
        HubSet('cats').open()
    for where in (HUB['diffusiondb'], HUB['partiprompts']):  # offline, as all tests are
        with pytest.raises(OSError, match=f'{where.id}.* cannot be fetched') as error:
            where.open()
        assert '\n' not in str(error.value)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    file = parquet(tmp_path / 'p.parquet', ['a cat'])
    for name in ('pyarrow', 'datasets'):
        monkeypatch.setitem(sys.modules, name, None)
    for read in (lambda: prompt_files(file), HUB['partiprompts'].open):
        with pytest.raises(ImportError, match=r"pip install 'drl_toolkit\[data\]'"):
            read()


MEASURE = r"""
import psutil, re, sys, time
from pathlib import Path
from drl_toolkit.prompts.streams import PromptStream
assert not {'pyarrow', 'datasets'} & set(sys.modules), 'imported before they are needed'
import pyarrow.parquet
peak = lambda: int(re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[1]) / 2**10
before = psutil.Process().memory_info().rss / 2**20
for file in sys.argv[1:]:
    began = time.perf_counter()
    stream = PromptStream(file, passes=1)
    stream.take(64); first = time.perf_counter() - began
    print(64 + sum(1 for _ in stream), first, peak() - before)
"""


def test_memory_stays_small_and_the_first_batch_comes_at_once(tmp_path):
    prompts = [
        f'{i} ' + 'a long and detailed painting of a castle ' * 4 for i in range(200_000)
    ]  # 34 MB of text
    files = [str(parquet(tmp_path / f'{group}.parquet', prompts, group)) for group in (20_000, 200_000)]
    printed = subprocess.run(
        [sys.executable, '-c', MEASURE, *files], env=ENV, capture_output=True, text=True, check=True
    ).stdout
    for line in printed.splitlines():
        count, first, grown = map(float, line.split())
        assert count == 200_000 and first < 1 and grown < 50, printed


WORKER = """
import json, sys
from pathlib import Path
from drl_toolkit.prompts.streams import PromptStream
stream, log = PromptStream(sys.argv[1], seed=3, split='train'), Path(sys.argv[2])
whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith(chr(10))] if log.exists() else []
if whole: stream.load_state_dict(json.loads(whole[-1])['position'])
log.write_text(''.join(whole))
with open(log, 'a') as out:
    for batch in range(len(whole), int(sys.argv[3])):
        out.write(json.dumps(dict(prompts=stream.take(64), position=stream.state_dict())) + chr(10)); out.flush()
"""


@long
def test_a_killed_process_goes_on_at_the_next_prompt(tmp_path):
    file, log = parquet(tmp_path / 'p.parquet', numbered(50_000)), tmp_path / 'log.jsonl'
    start = lambda batches: subprocess.Popen(
        [sys.executable, '-c', WORKER, str(file), str(log), str(batches)], env=ENV
    )
    process = start(10**6)
    while not log.exists() or log.stat().st_size < 500_000:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = log.read_bytes().count(b'\n') + 50
    assert start(done).wait() == 0
    prompts = [p for line in log.read_text().splitlines() for p in json.loads(line)['prompts']]
    assert len(prompts) == 64 * done and prompts == PromptStream(file, seed=3, split='train').take(
        len(prompts)
    )


@reward
def brightness(images, prompts):
    return images.mean((1, 2, 3))


def trained(tmp_path, name, epochs, stop=None):
    "A tiny run over a stream; with `stop` it is made in two processes' worth of objects."
    stream = lambda: Mixed(
        [
            PromptStream(portraits('all') * 30, seed=1),
            PromptStream([f'a {c} on a blue background' for c in ('cat', 'dog', 'key')], seed=2),
        ]
    )
    make = lambda: Trainer(
        Policy(world.load_demo(), num_steps=2, lora_rank=2),
        [Task('t', stream(), brightness, samples=4), Task('list', ['a cat', 'a dog'], brightness, samples=2)],
        TrainConfig(epochs=epochs, train_steps=1, num_minibatches=1),
        callbacks=[],
    )
    seen = []
    for until in [stop, epochs] if stop else [epochs]:
        trainer = make()
        run = (
            Run.open(tmp_path / name, write=True)
            if (tmp_path / name).exists()
            else Run.create(tmp_path / name, trainer.config)
        )
        with run:
            resume(trainer, run)
            trainer.callbacks = [Recorder(run, ['a cat'], every=1)]
            sample = trainer.sampler.sample
            trainer.sampler.sample = lambda run, request: seen.append(request.prompts) or sample(run, request)
            trainer.fit(until)
    return seen, trainer


def test_a_trainer_keeps_the_streams_position(tmp_path):
    (whole, one), (parts, two) = trained(tmp_path, 'whole', 4), trained(tmp_path, 'parts', 4, stop=2)
    assert whole == parts and len({tuple(p) for p in whole[::2]}) == 4
    for a, b in zip(one.params, two.params):
        assert torch.equal(a, b)
    assert (
        "stream 'a list'" in training_notes(one)
        and '| 2 prompts |' in training_notes(one)
        and 'stream' in one.tasks[0].describe()
    )


def test_a_task_takes_the_streams_next_prompts_in_groups():
    task = Task(
        't',
        PromptStream(Compositions(['apple', 'car', 'key']), shuffle=False),
        jpeg_compressibility,
        group_size=2,
        samples=4,
    )
    assert [task.draw(0, 0)[0], task.draw(0, 0)[0]] == [
        ['an apple and a car'] * 2 + ['an apple next to a car'] * 2,
        ['an apple near a car'] * 2 + ['an apple on side of a car'] * 2,
    ]


# --- embeddings on disk


@pytest.fixture(scope='module')
def policy():
    return Policy(world.load_demo())


def test_cached_embeddings_are_those_of_the_encoder_bit_for_bit(tmp_path, policy):
    prompts = portraits('all') * 2 + ['', 'Ünïcode 🎉']
    plain = policy.encode(prompts)
    for hits in (0, 18):
        other = Policy(world.load_demo())
        other.cache = EmbeddingCache(tmp_path, other)
        found = other.encode(prompts)
        assert torch.equal(found.tensors['prompt_embeds'], plain.tensors['prompt_embeds']) and (
            other.cache.hits,
            other.cache.misses,
        ) == (hits, 18 - hits)
    assert not list(tmp_path.rglob('.*'))


def test_another_model_has_other_keys(tmp_path, policy):
    mine = text_identity(policy)
    assert mine == text_identity(
        Policy(world.load_demo(), num_steps=3, lora_rank=2)
    )  # what is trained does not matter
    other = Policy(world.load_demo())
    other.pipeline.text_encoder.get_parameter(
        next(n for n, _ in other.pipeline.text_encoder.named_parameters())
    ).data.view(-1)[-1] += 0.5
    assert mine != text_identity(other) and mine != text_identity(Policy(world.load_demo(), precision='bf16'))
    assert EmbeddingCache(tmp_path, policy).path('a cat') != EmbeddingCache(tmp_path, other).path('a cat')


def test_torn_files_are_read_again_and_the_bound_holds(tmp_path, policy):
    cache = EmbeddingCache(tmp_path, policy, max_bytes=100_000)
    value = dict(x=torch.arange(1000.0))
    cache.put('a cat', value)
    for damage in (b'', b'\x80\x04.', cache.path('a cat').read_bytes()[:-10]):
        cache.path('a cat').write_bytes(damage)
        assert cache.get('a cat') is None
        assert torch.equal(
            cache(lambda prompts: dict(x=value['x'][None]), ['a cat'])['x'][0], value['x']
        ) and torch.equal(cache.get('a cat')['x'], value['x'])
    for i in range(100):
        cache.put(f'p{i}', value)
        os.utime(cache.path('a cat'), (2e9, 2e9))  # used later than any other
    assert sum(f.stat().st_size for f in tmp_path.rglob('*.safetensors')) <= 100_000
    assert cache.get('a cat') is not None and cache.get('p0') is None and cache.get('p99') is not None


def test_a_disk_that_cannot_be_written_costs_the_cache_and_not_the_run(tmp_path, policy, monkeypatch):
    cache = EmbeddingCache(tmp_path, policy)

    def full(*a):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(embeddings, 'save_file', full)
    with pytest.warns(UserWarning, match='not kept in .*No space left'):
        assert cache(lambda p: dict(x=torch.ones(1, 2)), ['a'])['x'].shape == (1, 2)


@pytest.mark.parametrize(
    'make, error, words',
    [
        (lambda p, d: EmbeddingCache(d, p, max_bytes=0), ValueError, 'max_bytes must be .*; got 0'),
        (lambda p, d: EmbeddingCache(__file__, p), NotADirectoryError, 'is a file'),
        (
            lambda p, d: EmbeddingCache(d, Policy(world.load_demo(), train_text_encoder=True)),
            ValueError,
            'train_text_encoder must be False',
        ),
    ],
)
def test_bad_caches_are_one_line(tmp_path, policy, make, error, words):
    with pytest.raises(error, match=words):
        make(policy, tmp_path)


def use_the_cache(folder, policy):
    "More prompts than fit, again and again; every answer must be that of its prompt."
    cache = EmbeddingCache(folder, policy, max_bytes=60_000)
    for i in [*range(40)] * 5:
        assert cache(lambda prompts: dict(x=torch.full((1, 1000), float(i))), [f'p{i}'])['x'].eq(i).all()


def test_processes_share_a_folder(tmp_path, policy):
    processes = [
        multiprocessing.get_context('fork').Process(target=use_the_cache, args=(tmp_path, policy))
        for _ in range(3)
    ]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert sum(f.stat().st_size for f in tmp_path.rglob('*.safetensors')) <= 60_000 + 3 * 5000


def test_the_policy_forgets_the_oldest_when_memory_is_full(monkeypatch):
    policy = Policy(world.load_demo())
    each = policy.encode(['a cat']).tensors['prompt_embeds'].nbytes
    monkeypatch.setattr(policies, 'MAX_EMBEDDING_BYTES', 10 * each)
    for i in range(30):
        policy.encode([f'{i} cats'])
    assert list(policy._embeddings) == [f'{i} cats' for i in range(20, 30)]
    assert (
        len(policy.encode([f'{i} dogs' for i in range(25)]).tensors['prompt_embeds']) == 25
        and len(policy._embeddings) == 25
    )
