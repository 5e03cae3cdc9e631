"The evidence's arithmetic on records that are made up by hand."

import re

import pytest, torch

from drl_toolkit.recipes import evidence as V

REWARD, LOWER = V.TASK_METRICS[0], V.Metric('cost', (V.TASK,), 'cost', 'lower')


def record(arm, seed=0, **judged):
    curves = {'looks: reward': [1.0, 2.0, 4.0], 'cpu_seconds': [5.0, 3.0, 2.0]}
    return dict(arm=arm, seed=seed, epochs=3, curves=curves, judged={V.TASK: judged})


def repeated(*means):
    "Eight values for each of several prompts, around their means."
    return [m + d for m in means for d in (-0.2, -0.1, -0.1, 0.0, 0.0, 0.1, 0.1, 0.2)]


@pytest.fixture
def records():
    return dict(
        base=[record('base', reward=repeated(1, 2, 3), cost=repeated(5, 5, 5))],
        alone=[record('alone', s, reward=repeated(2, 3, 4), cost=repeated(3, 3, 3)) for s in range(3)],
        joint=[record('joint', s, reward=repeated(1, 2, 4.5), cost=repeated(4, 4, 4)) for s in range(3)],
    )


def test_shares_of_a_gain(records):
    assert V.gain_kept(records, 'joint', 'alone', REWARD) == pytest.approx(0.5)
    assert V.gain_kept(records, 'joint', 'alone', LOWER) == pytest.approx(
        0.5
    )  # it fell by 1 where alone by 2
    assert V.gain_kept(records, 'alone', 'alone', LOWER) == pytest.approx(1)


def test_a_win_is_of_the_same_prompt_and_noise(records):
    "Alone wins everywhere over the base; joint ties in two of three prompts, and each tie is half a win."
    assert V.win_rate_of(records, 'alone', 'base', REWARD).tuned == 1
    assert V.win_rate_of(records, 'joint', 'base', REWARD).tuned == pytest.approx(2 / 3)
    table = V.win_matrix(records, REWARD)
    assert list(table.index) == ['alone', 'joint'] and list(table.columns) == ['base', 'alone', 'joint']
    assert table.loc['joint', 'joint'] == '' and table.loc['alone', 'base'].startswith('100%')
    assert table.loc['alone', 'joint'].startswith('67%') and table.loc['joint', 'alone'].startswith('33%')
    for text in table.to_numpy().flatten():
        shares = [float(found) for found in re.findall(r'-?\d+', text)]
        assert all(0 <= share <= 100 for share in shares)


def test_differences_are_taken_seed_by_seed(records):
    table = V.difference_table(records, [('joint', 'alone'), ('alone', 'joint')], (REWARD, LOWER))
    assert list(table.index) == ['joint − alone (3 seeds)', 'alone − joint (3 seeds)']
    assert table['reward'].iloc[0].startswith('-0.500 (') and table['reward'].iloc[1].startswith('+0.500 (')
    assert table['cost'].tolist() == ['+1.000 (+1.000 … +1.000)', '-1.000 (-1.000 … -1.000)']


def test_an_epoch_is_drawn_before_its_own_cost_is_paid(records):
    assert V.spent_before(records, 'alone').tolist() == [0, 5, 8]
    assert V.cost_table(records).loc['alone'].tolist() == ['3', '10', '3.3']


def test_moving_means_look_back_only():
    curve = torch.tensor([[1.0, 2.0, 6.0, 0.0]])
    assert V.moving_mean(curve, 2).tolist() == [[1.0, 1.5, 4.0, 3.0]]
    assert torch.equal(V.moving_mean(curve, 1), curve)


@pytest.mark.parametrize('size', (1.0, 0.5, 0.25))
@pytest.mark.parametrize('metric', V.METRICS[:-1], ids=lambda m: m.label)
def test_values_are_clustered_by_their_prompts(metric, size):
    "A parity belongs to the one prompt of its sixteen images, on every share of the prompt sets."
    prompts = {p.name: p.prompts for p in V.emoji_prompt_sets(size)}
    images = [prompt for name in metric.of for prompt in prompts[name]]
    groups = 'parity' in metric.name
    count = len(images) // V.GROUP if groups else len(images)
    found = V.clusters_of(metric, count, size)
    assert len(found) == count
    assert found == (images[:: V.GROUP] if groups else images)


def test_records_say_on_which_share_they_were_judged(records):
    assert V.size_of(records) == 1.0
    assert V.size_of(dict(base=[dict(size=0.25)])) == 0.25
