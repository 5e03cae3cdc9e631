"Prompt sets, tasks and their draws."

import pytest, torch

from drl_toolkit.emoji import world
from drl_toolkit.prompts.task import (
    ACTIVITIES,
    ANIMALS,
    B2_RELATIONS,
    PAPER_OCCUPATIONS,
    PAPER_RELATIONS,
    Compositions,
    Task,
    animal_activities,
    animal_counts,
    coloured_fruits,
    load_prompts,
    paper_portraits,
)
from drl_toolkit.emoji.prompts import counts, objects, pairs, portraits
from drl_toolkit.rewards.reward import jpeg_compressibility, reward

of = lambda prompts: {world.pair_key(*world.parse(p).names) for p in prompts}
grouped = reward(lambda x, p: x.std(), level='group', name='grouped')


def test_sets_follow_the_worlds_lists_and_all_prompts_parse():
    assert (
        of(pairs()) == world.TRAIN_PAIRS
        and of(pairs('held_out')) == world.HELD_OUT_PAIRS
        and of(pairs('unseen')) == world.UNSEEN_PAIRS
    )
    assert {world.parse(p).names[0] for p in portraits('held_out')} == set(world.HELD_OUT_OCCUPATIONS)
    assert (
        sorted(portraits('train') + portraits('held_out')) == sorted(portraits('all'))
        and len(portraits('all')) == 16
    )
    assert len(pairs()) == 4 * len(world.TRAIN_PAIRS) and len(objects()) == 24 and len(counts()) == 48
    for ps in (portraits(backgrounds=True), objects(True), counts(True), pairs(backgrounds=True)):
        assert len(ps) == len(set(ps)) and all(world.parse(p).background for p in ps)
    with pytest.raises(ValueError, match="split must be .*; got 'test'"):
        pairs('test')


def test_the_papers_hundred_occupations():
    assert (
        len(set(PAPER_OCCUPATIONS)) == 100
        and PAPER_OCCUPATIONS[0] == 'accountant'
        and PAPER_OCCUPATIONS[-1] == 'web designer'
    )
    assert all(o == o.strip() and o and '\n' not in o for o in PAPER_OCCUPATIONS)
    assert (
        paper_portraits()[1] == 'a portrait of administrative assistant'
        and paper_portraits(articles=True)[1] == 'a portrait of an administrative assistant'
    )


def test_compositions_are_all_ordered_pairs_written_when_asked_for():
    names, relations = ['apple', 'car', 'umbrella', 'key'], PAPER_RELATIONS
    with_article = lambda n: ('an ' if n[0] in 'aeiou' else 'a ') + n
    truth = [
        f'{with_article(a)} {r} {with_article(b)}' for a in names for b in names if a != b for r in relations
    ]
    made = Compositions(names)
    assert (
        list(made) == truth == made[:]
        and len(made) == len(set(made)) == 60
        and made[-1] == truth[-1]
        and made[7:3:-2] == truth[7:3:-2]
    )
    assert len(Compositions(map(str, range(450)))) == 1_010_250  # the paper's million [P §4.3]
    with pytest.raises(IndexError):
        made[60]
    assert set(B2_RELATIONS['train']) < set(B2_RELATIONS['held_out'])
    for names, relations, words in (
        (['a'], ('on',), 'names holds 1'),
        (['a', 'a'], ('on',), 'names holds 1'),
        (['a', 'b'], (), 'relations must hold one or more'),
    ):
        with pytest.raises(ValueError, match=words):
            Compositions(names, relations)


def test_the_sets_of_ddpo_and_b2():
    train, test = animal_activities('train'), animal_activities('held_out')
    assert (
        len(set(ANIMALS)) == 45
        and (len(train), len(test)) == (45, 90)
        and sorted(train + test) == sorted(animal_activities())
        and 'an ant' in ' '.join(train)
    )
    assert [sum(p.endswith(a) for p in train) for a in ACTIVITIES] == [15, 15, 15] and [
        sum(p.endswith(a) for p in test) for a in ACTIVITIES
    ] == [30, 30, 30]
    train, test = coloured_fruits('train'), coloured_fruits('held_out')
    assert (len(set(train)), len(set(test))) == (40, 40) and not set(train) & set(test)
    for word in (0, 1):
        assert {p.split()[word] for p in train} == {p.split()[word] for p in test}
    assert (
        len(animal_counts()) == 8 * 45
        and {'two mice', 'nine sheep', 'five geese', 'three turkeys', 'two flies'} < set(animal_counts())
        and animal_counts(1, 1)[0] == 'one cat'
    )
    for call, words in (
        (lambda: animal_activities('test'), "split must be .*; got 'test'"),
        (lambda: coloured_fruits('x'), "split must be .*; got 'x'"),
        (lambda: animal_counts(3, 2), 'low and high must be .*; got low 3'),
        (lambda: animal_counts(1, 10), 'high 10'),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(name=''), 'name'),
        (dict(prompts='a cat'), 'prompts'),
        (dict(prompts=[]), 'prompts must be a list of strings'),
        (dict(prompts=['a cat', ' ']), 'prompts'),
        (dict(samples=0), 'samples must be .*; got 0'),
        (dict(samples=True), 'samples'),
        (dict(group_size=-2), 'group_size must be .*; got -2'),
        (dict(group_size=1.5), 'group_size'),
        (dict(weight=0), 'weight must be .*; got 0'),
        (dict(weight=float('nan')), 'weight'),
        (dict(weight='1'), 'weight'),
        (dict(reward=3), 'reward must be .*; got 3'),
        (dict(reward=grouped), "'grouped' judges a group"),
        (dict(advantage='batch'), 'advantage'),
    ],
)
def test_bad_tasks_are_one_line(change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        Task(**(dict(name='t', prompts=['a cat'], reward=jpeg_compressibility) | change))


def test_samples_are_rounded_up_with_a_sentence():
    with pytest.warns(UserWarning, match='60 samples do not fill groups of 16; 64 are drawn'):
        assert Task('t', ['a cat'], grouped, group_size=16, samples=60).samples == 64


def test_draws_depend_on_seed_and_epoch_alone():
    task, same = (Task('t', portraits(), grouped, group_size=4, samples=96) for _ in range(2))
    torch.rand(3)
    for epoch in (5, 0, 5):
        assert task.draw(1, epoch)[0] == same.draw(1, epoch)[0]
    assert task.draw(1, 0)[0] != task.draw(1, 1)[0] and task.draw(1, 0)[0] != task.draw(2, 0)[0]


def test_draws_are_whole_groups_of_one_prompt_spread_evenly():
    task = Task('t', portraits(), grouped, group_size=4, samples=4 * 30)
    prompts, groups = task.draw(0, 0)
    assert len(prompts) == 120 and groups.dtype == torch.long and groups.bincount().tolist() == [4] * 30
    for g in range(30):
        assert len({p for p, i in zip(prompts, groups.tolist()) if i == g}) == 1
    times = [prompts.count(p) // 4 for p in task.prompts]
    assert sum(times) == 30 and set(times) <= {2, 3}


def test_prompts_from_a_file(tmp_path):
    file = tmp_path / 'p.txt'
    file.write_text('\ufeff# mine\n a cat \n\nun café\n', encoding='utf-8')
    with pytest.warns(UserWarning, match='1 line that begins with # is a comment'):
        assert load_prompts(file) == ['a cat', 'un café']
    with pytest.raises(ValueError, match="line 4: prompt 'un café'"), pytest.warns(UserWarning):
        load_prompts(file, check=world.parse)
    bad = {
        'empty.txt': (b'\n \n', 'no prompt'),
        'bytes.txt': (b'a cat\n\xff\xfe', 'line 2: byte 0'),
        'nul.txt': (b'a cat\na\0dog\n', 'line 2: it holds a NUL'),
        'wide.txt': ('a cat\n'.encode('utf-16-le'), 'NUL byte, as UTF-16'),
        'nul.jsonl': (b'"a\\u0000cat"\n', 'holds a NUL'),
        'nul.json': (b'["a\\u0000cat"]', 'holds a NUL'),
        'a.pdf': (b'a cat', 'ends with'),
        'a.csv': (b'caption\na cat\n', "--prompt-column. must be one of 'caption'"),
    }
    for name, (content, error) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises((ValueError, OSError), match=error):
            load_prompts(tmp_path / name)
    for name, error in (('none.txt', 'there is none'), ('.', 'it is a folder')):
        with pytest.raises((ValueError, OSError), match=error):
            load_prompts(tmp_path / name)


@pytest.mark.parametrize(
    'name, content',
    [
        ('p.txt', 'a cat\r\n\r\na dog\r\na cat\r\n'),
        ('p.csv', '\ufeffid,prompt\r\n1,a cat\r\n\r\n2,a dog\r\n3,a cat\r\n'),
        ('p.tsv', 'prompt\tid\na cat\t1\na dog\t2\na cat\t3\n'),
        ('p.jsonl', '{"prompt": "a cat"}\n\n"a dog"\n{"prompt": "a cat"}\n'),
        ('p.json', '["a cat", {"prompt": "a dog"}, "a cat"]'),
    ],
)
def test_all_commands_read_the_same_of_every_format(name, content, tmp_path):
    from drl_toolkit.prompts.streams import PromptStream

    (tmp_path / name).write_bytes(content.encode())
    assert (
        load_prompts(tmp_path / name)
        == ['a cat', 'a dog', 'a cat']
        == PromptStream(tmp_path / name, shuffle=False).take(3)
    )


def test_a_hash_is_a_comment_in_text_alone(tmp_path):
    (tmp_path / 'p.csv').write_text('prompt\n#sunset\n')
    assert load_prompts(tmp_path / 'p.csv') == ['#sunset']
