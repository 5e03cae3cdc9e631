"Parity, floor and credit against hand-made cases and simulation."

from itertools import product

import pytest, torch
from hypothesis import given, settings, strategies as st

from drl_toolkit.rewards.fairness import (
    balancing_credit,
    fairness_reward,
    leave_one_out_credit,
    parity_floor,
    rarity_credit,
    statistical_parity,
)
from drl_toolkit.rewards.reward import NotFinite, keep_nonfinite


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=2, max_size=20))
def test_parity_by_hand(values):
    n, counts = len(values), [values.count(a) for a in range(5)]
    counts[counts.index(max(counts))] += values.count(-1)
    expected = sum((c / n - 0.2) ** 2 for c in counts) ** 0.5
    assert abs(statistical_parity(torch.tensor(values)) - expected) < 1e-6


def test_floor_matches_the_papers_magnitudes_and_its_own_limit():
    assert [round(parity_floor(n, 4), 2) for n in (4, 8, 16, 64)] == [0.40, 0.28, 0.20, 0.10]
    exact, limit = parity_floor(40, 4), parity_floor(2000, 4) * (2000 / 40) ** 0.5
    assert abs(exact - limit) < 0.01 * exact


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=2, max_size=16), st.data())
def test_a_ruined_face_never_improves_parity(values, data):
    ruined = values.copy()
    ruined[data.draw(st.integers(0, len(values) - 1))] = -1
    assert statistical_parity(torch.tensor(ruined)) >= statistical_parity(torch.tensor(values)) - 1e-6


def test_ruining_faces_never_pays():
    "An unreadable image makes parity worse and has the lowest credit."
    tones = torch.tensor([0, 1, 2, 3, 4] * 3 + [0])
    ruined = tones.clone()
    ruined[15] = -1
    assert leave_one_out_credit(ruined).argmin() == 15
    everything = torch.full((16,), -1)
    assert statistical_parity(everything) > 0.89 and (leave_one_out_credit(everything) < 0).all()


def test_reward_sees_groups_whole():
    reader = lambda images: (images[:, 0, 0, 0] * 10).round().long()
    tone = lambda *t: torch.tensor(t)[:, None, None, None].expand(-1, 3, 4, 4) / 10
    images, groups = torch.cat([tone(0, 0, 0, 1), tone(0, 1, 2, 3)]), torch.tensor([0] * 4 + [1] * 4)
    prompts = ['a'] * 4 + ['b'] * 4
    shared = fairness_reward(reader, credit='shared')(images, prompts, groups)
    assert (
        torch.allclose(shared[:4], torch.tensor(-statistical_parity(torch.tensor([0, 0, 0, 1]))))
        and shared[4] > shared[0]
    )
    own, metrics = fairness_reward(reader).report(images, prompts, groups)
    assert (
        own[3] > 0 > own[0]
        and metrics['readable'] == 1
        and metrics['parity_floor'] == pytest.approx(parity_floor(4))
    )
    with pytest.raises(ValueError, match="credit must be .*; got 'all'"):
        fairness_reward(credit='all')


def test_rarity_is_the_even_share_less_the_share_among_the_others():
    tones = torch.tensor([0] * 6 + [2] * 3 + [4] + [-1] * 2)
    by_hand = [
        0.2 - sum(o == t for j, o in enumerate(tones.tolist()) if j != i) / 11
        for i, t in enumerate(tones.tolist())
    ]
    credit = rarity_credit(tones)
    assert torch.allclose(credit[:10], torch.tensor(by_hand[:10])) and (credit[10:] < credit[:10].min()).all()
    values, metrics = fairness_reward(lambda images: tones, credit='rare').report(
        torch.rand(12, 3, 8, 8), ['a portrait of a judge'] * 12, torch.zeros(12, dtype=torch.long)
    )
    assert torch.allclose(values, credit) and metrics['parity'] == pytest.approx(statistical_parity(tones))


def test_an_unreadable_image_may_be_undefined():
    "It has no value, and the others' parity is that of the readable ones."
    tones = torch.tensor([0, 0, -1, 1, -1, -1, -1, -1])
    images, prompts = (tones[:, None, None, None] + 1).expand(8, 3, 2, 2) / 10, ['a'] * 4 + ['b'] * 4
    read = lambda images: (10 * images[:, 0, 0, 0]).round().long() - 1
    shared = fairness_reward(read, 'shared', undefined=True)
    with keep_nonfinite():
        values, metrics = shared.report(images, prompts)
    parity = statistical_parity(torch.tensor([0, 0, 1]))
    assert values[[0, 1, 3]].tolist() == pytest.approx([-parity] * 3)
    assert values[2].isnan() and values[4:].isnan().all()
    assert metrics['readable'] == pytest.approx(3 / 8)
    with pytest.raises(NotFinite, match="reward 'fairness' returned NaN for 1 of 4"):
        shared(images, prompts)
    assert shared.measured_by(images, prompts).isfinite().all()
    with keep_nonfinite():
        own = fairness_reward(read, undefined=True)(images, prompts)
    assert torch.allclose(own[[0, 1, 3]], leave_one_out_credit(torch.tensor([0, 0, 1])))


def test_balanced_credit_is_the_gradient_of_the_likelihood_of_even_shares():
    "Over all groups of four that a softmax over three tones can draw: Σ_k 1/3 P(k was drawn) ∇log p_k."
    logits = torch.tensor([1.5, 0.0, -1.0], dtype=torch.double, requires_grad=True)
    shares = logits.softmax(0)
    expected = torch.zeros(3, dtype=torch.double)
    for group in product(range(3), repeat=4):
        tones = torch.tensor(group)
        weighted = balancing_credit(tones, 3).double() * shares[tones].log()
        (found,) = torch.autograd.grad(weighted.mean(), logits, retain_graph=True)
        expected += shares[tones].prod().item() * found
    drawn = 1 - (1 - shares.detach()) ** 4
    (right,) = torch.autograd.grad((drawn / 3 * shares.log()).sum(), logits)
    assert torch.allclose(expected, right, atol=1e-7)


def test_balanced_credit_by_hand():
    "Four of a tone share what one of a rare tone has; what cannot be read has nothing."
    found = balancing_credit(torch.tensor([0, 0, 0, 0, 2, -1]))
    assert torch.allclose(found, torch.tensor([0.3, 0.3, 0.3, 0.3, 1.2, 0.0]))
    assert torch.equal(balancing_credit(torch.tensor([-1, -1])), torch.zeros(2))
