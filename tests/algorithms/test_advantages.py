"Credit against oracles and few-line references."

import json
from pathlib import Path

import numpy as np, pytest, torch

from drl_toolkit.algorithms.advantages import (
    ADVANTAGES,
    PerPrompt,
    batch,
    centred,
    credit_stats,
    frac_zero_std,
    group,
    leave_one_out,
    needs_group,
)

ORACLE = json.loads((Path(__file__).parents[1] / 'oracles' / 'oracles.json').read_text())[
    'per_prompt_tracker'
]
g = torch.Generator().manual_seed(0)
REWARDS, GROUPS = torch.randn(24, generator=g), torch.arange(6).repeat(4)


def test_per_prompt_is_ddpos_tracker_on_float_rewards():
    tracker = PerPrompt(ORACLE['buffer_size'], ORACLE['min_count'], clamp=None)
    for row in ORACLE['rounds']:
        got = tracker(torch.tensor(row['rewards'], dtype=torch.float64), row['prompts'])
        np.testing.assert_allclose(got.numpy(), row['advantages'], rtol=1e-5, atol=1e-6)


def test_per_prompt_resumes_exactly_through_json():
    whole, first, second = (PerPrompt(ORACLE['buffer_size'], ORACLE['min_count']) for _ in range(3))
    rounds = [(torch.tensor(r['rewards']), r['prompts']) for r in ORACLE['rounds']]
    expected = [whole(*r) for r in rounds]
    first(*rounds[0])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for r, e in zip(rounds[1:], expected[1:]):
        assert torch.equal(second(*r), e)


def test_per_prompt_keeps_prompts_apart_that_ddpos_decoded_text_merges():
    tracker = PerPrompt(4, 2)
    tracker(torch.tensor([0.0, 1.0, 5.0, 6.0]), ['a Cat', 'a Cat', 'a cat', 'a cat'])
    assert tracker.state_dict() == {'a Cat': [0, 1], 'a cat': [5, 6]}


def test_warm_up_by_prompt_says_nothing_about_which_prompt_is_easy():
    rewards, prompts = torch.tensor([9.0, 9.2, 1.0, 1.2]), ['easy', 'easy', 'hard', 'hard']
    ddpo, ours = PerPrompt(16, 16)(rewards, prompts), PerPrompt(16, 16, warmup='prompt')(rewards, prompts)
    assert (ddpo[:2] > 0.9).all() and (ddpo[2:] < -0.9).all()  # the flaw, kept for comparison
    assert torch.allclose(ours, torch.tensor([-1.0, 1, -1, 1]), atol=1e-4)


@pytest.mark.parametrize('credit', [batch, group, leave_one_out, PerPrompt(4, 2)])
def test_integers_and_nan_are_refused(credit):
    call = lambda r: credit(rewards=r, groups=GROUPS[:3], prompts=['a', 'b', 'a'])
    with pytest.raises(TypeError, match='int64'):
        call(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match='NaN'):
        call(torch.tensor([1.0, float('nan'), 3]))


def test_batch_is_equation_10():
    r = REWARDS.double().numpy()
    np.testing.assert_allclose(
        batch(REWARDS, eps=1e-8).numpy(), (r - r.mean()) / np.sqrt(r.var() + 1e-8), rtol=1e-5, atol=1e-6
    )
    outlier = torch.cat([torch.zeros(999), torch.tensor([1.0])])
    assert (
        batch(outlier).max() == 10
        and batch(outlier, clamp=None).max() > 31
        and batch(torch.ones(3)).abs().sum() == 0
        and batch(torch.ones(1)).item() == 0
    )


def test_large_offset_costs_no_precision():
    assert torch.allclose(batch(REWARDS.double() + 1e9), batch(REWARDS), atol=1e-5)


def test_group_and_leave_one_out_by_hand():
    r, gs = REWARDS.double().numpy(), GROUPS.numpy()
    grpo, loo = np.zeros(24), np.zeros(24)
    for i in range(24):
        mine = r[gs == gs[i]]
        grpo[i] = (r[i] - mine.mean()) / np.sqrt(mine.var() + 1e-8)
        loo[i] = r[i] - (mine.sum() - r[i]) / (len(mine) - 1)
    np.testing.assert_allclose(group(REWARDS, GROUPS).numpy(), grpo, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        leave_one_out(REWARDS, GROUPS).numpy(), loo / np.sqrt((loo**2).mean()), rtol=1e-4, atol=1e-6
    )
    flow = (r - np.array([r[gs == k].mean() for k in gs])) / np.sqrt(
        np.mean([r[gs == k].var() for k in range(6)]) + 1e-8
    )
    np.testing.assert_allclose(group(REWARDS, GROUPS, shrink=1.0).numpy(), flow, rtol=1e-4, atol=1e-6)


def test_flat_groups_are_masked_and_counted_and_a_group_of_one_is_flat():
    rewards, groups = torch.tensor([0.3, 0.3, 0.3, 1.0, 2.0, 7.0]), torch.tensor([4, 4, 4, 2, 2, 9])
    for credit in (group, leave_one_out):
        a = credit(rewards, groups=groups)
        assert a.isfinite().all() and (a[[0, 1, 2, 5]] == 0).all() and a[3] < 0 < a[4]
    assert frac_zero_std(rewards, groups).tolist() == [True] * 3 + [False] * 2 + [True]
    stats = credit_stats(rewards, group(rewards, groups), groups)
    assert stats['frac_zero_std'] == pytest.approx(2 / 3) and stats['no_credit'] == pytest.approx(4 / 6)


def test_effective_group_is_the_mean_over_groups_that_count():
    rewards, groups = (
        torch.tensor([1.0, -1.0, 3.0, 3.0, 3.0, 3.0, 1.0, 0.0, 0.0, 0.0]),
        torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2, 2]),
    )
    stats = credit_stats(rewards, group(rewards, groups), groups)
    assert stats['effective_group'] == pytest.approx(
        (2 + (1 + 3 / 3) ** 2 / (1 + 3 / 9)) / 2
    )  # of two equal ones; nothing of the flat one; of 1 and three times -1/3
    assert credit_stats(rewards, torch.zeros(10), groups)['effective_group'] == 0


def test_a_near_tie_is_shrunk():
    rewards, groups = torch.tensor([0.5, 0.5003, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    assert group(rewards, groups)[1] > 0.5 and group(rewards, groups, shrink=0.5)[1] < 0.01


@pytest.mark.parametrize('name', [*ADVANTAGES, 'centred'])
def test_which_credits_need_a_group_is_what_they_do(name):
    "With groups of one sample, such a credit is the same for every reward."
    credit = centred if name == 'centred' else ADVANTAGES[name]()
    rewards = torch.randn(64, generator=torch.Generator().manual_seed(0))
    found = credit(rewards, groups=torch.arange(64), prompts=['a', 'b'] * 32)
    assert needs_group(credit) == (found.max() == found.min()).item()
