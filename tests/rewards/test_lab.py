"The reward lab: what it must find, and what it must not."

import time, warnings

import pytest, torch
from scipy.stats import spearmanr

from drl_toolkit.rewards import lab
from drl_toolkit.rewards.lab import (
    OTHERS,
    base_samples,
    centred,
    check_reward,
    crispness,
    gradient_slopes,
    rank_correlation,
)
from drl_toolkit.rewards.reward import Reward, clip_score, jpeg_incompressibility

IMAGES, PROMPTS = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), ['a cat', 'a dog'] * 3
mean = lambda x: x.mean((1, 2, 3))
examine = lambda f, **kw: check_reward(Reward(f, 'r', **kw), IMAGES, PROMPTS, others=[])


def test_it_finds_what_hurts():
    verdict = lambda f, **kw: ' '.join(examine(f, **kw).problems)
    assert verdict(lambda x, p: mean(x)) == '' and verdict(lambda x, p: x.std(0).mean(), level='group') == ''
    assert 'deterministic' in verdict(lambda x, p: mean(x) + torch.rand(len(x)))
    assert 'neighbours' in verdict(lambda x, p: mean(x) - mean(x).mean())
    assert 'order' in verdict(lambda x, p: mean(x) + torch.arange(len(x)))
    assert 'constant' in verdict(lambda x, p: x.new_ones(len(x)))


def test_a_report_can_be_read_as_text_and_in_a_notebook():
    report = check_reward(lambda x, p: mean(x).double(), IMAGES, PROMPTS, others=[])
    assert (
        report.dtype == 'float64'
        and 'ms per image' in repr(report)
        and 'data:image/png' in report._repr_html_()
        and report.mean == pytest.approx(mean(IMAGES).mean().item())
    )
    constant = examine(lambda x, p: x.new_ones(len(x)))
    assert 'not tried' in repr(constant) and 'data:image/png' in constant._repr_html_()


def test_it_finds_what_is_easy_to_hack():
    doubts = lambda f: ' '.join(examine(f).suspicions)
    assert 'tied to brightness' in doubts(lambda x, p: mean(x)) and 'brightening alone raises it' in doubts(
        lambda x, p: mean(x)
    )
    levels = mean(IMAGES).sort().values
    assert 'saturated' in doubts(lambda x, p: mean(x).clamp(max=levels[2])) and 'silent' in doubts(
        lambda x, p: (mean(x) - levels[4]).clamp(min=0)
    )
    assert 'does not read the prompt' in doubts(lambda x, p: mean(x)) and 'does not read' not in doubts(
        lambda x, p: mean(x) * torch.tensor([len(set(q)) + ('dog' in q) for q in p])
    )
    assert 'file size' in ' '.join(
        check_reward(jpeg_incompressibility, *base_samples(), others=[]).suspicions
    )


def test_a_gradient_is_compared_with_finite_differences():
    error = lambda f: max(s.error for s in gradient_slopes(Reward(f), IMAGES, PROMPTS))
    assert error(lambda x, p: mean(x)) < 1e-2 and error(lambda x, p: x.square().sum((1, 2, 3)).sqrt()) < 2e-2
    half = lambda x, p: x[:, 0].mean((1, 2)) - x[:, 1:].detach().mean((1, 2, 3))
    wrong = lambda x, p: mean(x.detach()) + (mean(x) - mean(x).detach()) * -1
    assert error(half) > 0.4 and error(wrong) > 1
    assert any('gradient' in p for p in examine(half).problems) and any(
        'zero' in p
        for p in examine(lambda x, p: mean(x) + 0 * x.sum() - (mean(x) - mean(x).detach())).problems
    )
    for claims_none in (
        lambda x, p: mean(x.detach()),
        lambda x, p: torch.from_numpy(x.numpy()).mean((1, 2, 3)),
        lambda x, p: mean(x).tolist(),
    ):
        assert gradient_slopes(Reward(claims_none), IMAGES, PROMPTS) == []


def test_rank_correlation_is_spearmans():
    a, b = torch.rand(2, 20, generator=torch.Generator().manual_seed(3))
    b = (4 * b).round()  # with ties
    assert rank_correlation(a, b, list(map(str, range(20)))) == pytest.approx(spearmanr(a, b).statistic)
    prompts = ['a', 'b'] * 10
    assert rank_correlation(a, b, prompts) == pytest.approx(
        spearmanr(centred(a, prompts), centred(b, prompts)).statistic
    )
    assert centred(torch.tensor([1.0, 3, 10]), ['a', 'a', 'b']).tolist() == [-1, 1, 0]


def test_others_that_cannot_judge_are_told():
    def picky(images, prompts):
        raise ValueError('not my kind of prompt')

    report = check_reward(
        lambda x, p: mean(x), IMAGES, PROMPTS, others=[Reward(picky), Reward(lambda x, p: -mean(x), 'dark')]
    )
    assert (
        report.others['dark'] == pytest.approx(-1)
        and 'picky cannot judge these' in repr(report)
        and 'nearly the same as dark' in ' '.join(report.suspicions)
    )
    report._repr_html_()


def test_images_and_prompts_come_together():
    with pytest.raises(ValueError, match='prompts is None'):
        check_reward(clip_score, IMAGES)
    with pytest.raises(TypeError):
        check_reward(3)


def test_a_function_is_enough_and_seconds_too():
    base_samples()
    began = time.process_time()
    report = check_reward(crispness)
    assert time.process_time() - began < 15  # measured: 1 to 3 seconds of one core
    assert (
        not report.problems
        and {'adding noise', 'a fine grid'} <= set(report.raised_by)
        and 'sharpness' in report.tied
        and set(report.others) == {r.name for r in OTHERS}
    )


def test_a_warning_about_constants_is_left_to_the_report():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        examine(lambda x, p: x.new_ones(len(x)))


def test_the_judges_share_of_the_variance():
    "Two calls, as independent draws of noise of variance 1 on images of variance 3."
    g = torch.Generator().manual_seed(0)
    true = 3**0.5 * torch.randn(20000, generator=g)
    assert lab.noise_share(*(true + torch.randn(20000, generator=g) for _ in range(2))) == pytest.approx(
        0.25, abs=0.01
    )
    assert lab.noise_share(true, true) == 0 == lab.noise_share(torch.ones(4), torch.ones(4))
    assert (
        'of the variance of its values is its own noise'
        in examine(lambda x, p: mean(x) + torch.rand(len(x))).problems[0]
    )
