"Figures of a set by hand, by brute force and by their definitions."

import pytest, torch
from hypothesis import given, settings, strategies as st

from drl_toolkit.rewards.diversity import (
    diversity,
    diversity_reward,
    mode_coverage,
    pairwise_distance,
    vendi,
    vendi_score,
)


def features(n, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000))
def test_pairwise_distance_is_the_mean_over_pairs(n, seed):
    f = features(n, seed=seed)
    pairs = [1 - torch.cosine_similarity(f[i], f[j], dim=0) for i in range(n) for j in range(i)]
    assert pairwise_distance(f).item() == pytest.approx(sum(pairs).item() / len(pairs), abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_vendi_is_the_exponential_of_an_entropy(n, seed):
    f = torch.nn.functional.normalize(features(n, seed=seed), dim=1).double()
    eigen = torch.linalg.svdvals(f) ** 2 / n
    assert vendi_score(f).item() == pytest.approx(
        torch.distributions.Categorical(probs=eigen).entropy().exp().item(), rel=1e-4
    )
    assert 1 - 1e-6 <= vendi_score(f) <= min(n, 6) + 1e-6


def test_small_sets():
    assert pairwise_distance(features(1)) == 0 == pairwise_distance(features(0)) == vendi_score(
        features(0)
    ) and vendi_score(features(1)).item() == pytest.approx(1)


def test_coverage_by_hand():
    real = torch.tensor([[0.0, 0], [1, 0], [0, 1], [10, 10], [11, 10], [10, 11]])
    assert (
        mode_coverage(torch.tensor([[0.1, 0.1]]), real, k=2).item() == 0.5
        and mode_coverage(torch.tensor([[0.1, 0.1], [10.1, 10.1]]), real, k=2) == 1
    )
    assert mode_coverage(torch.tensor([[100.0, 100]]), real, k=2) == 0 == mode_coverage(real[:0], real, k=2)
    with pytest.raises(ValueError, match='k must be 1 to 5 .*; got 6'):
        mode_coverage(real, real, k=6)


@pytest.mark.parametrize('measure', [pairwise_distance, vendi_score])
def test_own_credit_is_what_the_group_would_lose(measure):
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images[1] = images[0]
    embed = lambda x: x.flatten(1) - 0.5
    own, metrics = diversity_reward(measure, embed).report(images, ['p'] * 5)
    expected = [
        measure(embed(images)) - measure(embed(images[[j for j in range(5) if j != i]])) for i in range(5)
    ]
    assert (
        torch.allclose(own, torch.stack(expected), atol=1e-5)
        and torch.isclose(own[0], own[1], atol=1e-5)
        and own[:2].max() < own[2:].min()
    )
    shared = diversity_reward(measure, embed, credit='shared')(
        torch.cat([images, images[:3]]), ['p'] * 5 + ['q'] * 3
    )
    assert shared[:5].tolist() == pytest.approx([metrics['diversity']] * 5) and shared[5] < shared[0]


@pytest.mark.parametrize('r', [diversity, vendi, diversity_reward(vendi_score, credit='shared')])
def test_gradient_spreads_the_pictures(r):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = r.score(images, ['p'] * 3)[0]
    values.mean().backward()
    assert images.grad.isfinite().all() and images.grad.abs().sum() > 0


def test_identical_pictures_have_a_finite_gradient():
    images = torch.rand(1, 3, 64, 64).expand(4, -1, -1, -1).clone().requires_grad_()
    vendi.score(images, ['p'] * 4)[0].sum().backward()
    assert images.grad.isfinite().all()


def test_wrong_credit():
    with pytest.raises(ValueError, match="credit must be .*; got 'all'"):
        diversity_reward(credit='all')
