"Prompt sets, tasks and their draws."
import pytest, torch

from drl_toolkit import world
from drl_toolkit.prompts import Task, counts, load_prompts, objects, pairs, portraits
from drl_toolkit.rewards import jpeg_compressibility, reward

of = lambda prompts: {world.pair_key(*world.parse(p).names) for p in prompts}
grouped = reward(lambda x, p: x.std(), level='group', name='grouped')

def test_sets_follow_the_worlds_lists_and_all_prompts_parse():
    assert of(pairs()) == world.TRAIN_PAIRS and of(pairs('held_out')) == world.HELD_OUT_PAIRS and of(pairs('unseen')) == world.UNSEEN_PAIRS
    assert {world.parse(p).names[0] for p in portraits('held_out')} == set(world.HELD_OUT_OCCUPATIONS)
    assert sorted(portraits('train') + portraits('held_out')) == sorted(portraits('all')) and len(portraits('all')) == 16
    assert len(pairs()) == 4 * len(world.TRAIN_PAIRS) and len(objects()) == 24 and len(counts()) == 48
    for ps in (portraits(backgrounds=True), objects(True), counts(True), pairs(backgrounds=True)):
        assert len(ps) == len(set(ps)) and all(world.parse(p).background for p in ps)
    with pytest.raises(ValueError, match="split is 'test'"): pairs('test')

@pytest.mark.parametrize('change, words', [
    (dict(name=''), 'name'), (dict(prompts='a cat'), 'prompts'), (dict(prompts=[]), 'prompts is empty'), (dict(prompts=['a cat', ' ']), 'prompts'),
    (dict(samples=0), 'samples is 0'), (dict(samples=True), 'samples'), (dict(group_size=-2), 'group_size is -2'), (dict(group_size=1.5), 'group_size'),
    (dict(weight=0), 'weight is 0'), (dict(weight=float('nan')), 'weight'), (dict(weight='1'), 'weight'), (dict(reward=3), 'reward is 3'),
    (dict(reward=grouped), "'grouped' judges a group"), (dict(advantage='batch'), 'advantage')])
def test_bad_tasks_are_one_line(change, words):
    with pytest.raises((ValueError, TypeError), match=words): Task(**(dict(name='t', prompts=['a cat'], reward=jpeg_compressibility) | change))

def test_samples_are_rounded_up_with_a_sentence():
    with pytest.warns(UserWarning, match='60 samples do not fill groups of 16; 64 are drawn'):
        assert Task('t', ['a cat'], grouped, group_size=16, samples=60).samples == 64

def test_draws_depend_on_seed_and_epoch_alone():
    task, same = (Task('t', portraits(), grouped, group_size=4, samples=96) for _ in range(2))
    torch.rand(3)
    for epoch in (5, 0, 5): assert task.draw(1, epoch)[0] == same.draw(1, epoch)[0]
    assert task.draw(1, 0)[0] != task.draw(1, 1)[0] and task.draw(1, 0)[0] != task.draw(2, 0)[0]

def test_draws_are_whole_groups_of_one_prompt_spread_evenly():
    task = Task('t', portraits(), grouped, group_size=4, samples=4 * 30)
    prompts, groups = task.draw(0, 0)
    assert len(prompts) == 120 and groups.dtype == torch.long and groups.bincount().tolist() == [4] * 30
    for g in range(30): assert len({p for p, i in zip(prompts, groups.tolist()) if i == g}) == 1
    times = [prompts.count(p) // 4 for p in task.prompts]
    assert sum(times) == 30 and set(times) <= {2, 3}

def test_prompts_from_a_file(tmp_path):
    file = tmp_path / 'p.txt'
    file.write_text('\ufeff# mine\n a cat \n\nun café\n', encoding='utf-8')
    assert load_prompts(file) == ['a cat', 'un café']
    with pytest.raises(ValueError, match="line 4: prompt 'un café'"): load_prompts(file, vocabulary=True)
    (tmp_path / 'empty.txt').write_text('# nothing\n'); (tmp_path / 'bytes.txt').write_bytes(b'a cat\n\xff\xfe')
    for name, error in (('empty.txt', 'no prompt'), ('bytes.txt', 'byte 6'), ('none.txt', 'there is none'), ('.', 'it is a folder')):
        with pytest.raises((ValueError, OSError), match=error): load_prompts(tmp_path / name)
