"Instruments pointed at what is known, intervals that cover, and a summary of the agreed form."

import pytest, torch
from scipy import linalg, stats

from drl_toolkit.evaluation import evaluate as E

from drl_toolkit.emoji import world
from drl_toolkit.rewards.fairness import fairness_reward, parity_floor, statistical_parity
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.prompts.task import Task
from drl_toolkit.rewards.reward import jpeg_compressibility, reward
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.emoji.evaluation import (
    compare,
    emoji_prompt_sets,
    read_images,
    real_images,
    speaks_emoji,
)

PROBES = emoji_prompt_sets(0.1)


@pytest.fixture(scope='module')
def clean():
    return {p.name: read_images(p, real_images(p, seed=5)) for p in PROBES}


def test_splits_do_not_mix():
    of = {p.name: p for p in emoji_prompt_sets()}
    key = lambda name: {world.pair_key(*world.parse(q).names) for q in of[name].prompts}
    assert (
        key('pairs/train') <= world.TRAIN_PAIRS
        and key('pairs/held_out') <= world.HELD_OUT_PAIRS
        and key('pairs/unseen') <= world.UNSEEN_PAIRS
    )
    assert {world.parse(q).names[0] for q in of['portraits/held_out'].prompts} == set(
        world.HELD_OUT_OCCUPATIONS
    )
    for p in of.values():
        if p.kind == 'portraits':
            assert (
                all(len({*p.prompts[i : i + 16]}) == 1 for i in range(0, len(p.prompts), 16))
                and len(p.prompts) % 16 == 0
            )
    assert [p.prompts for p in emoji_prompt_sets()] == [p.prompts for p in of.values()]


def test_clean_scenes_read_as_they_are(clean):
    for name, values in clean.items():
        for key in ('face', 'occupation', 'object', 'both'):
            if key in values:
                assert values[key].mean() >= 0.95, (name, key)


def test_frechet_against_scipy():
    g = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(300, 6, generator=g),
        torch.randn(200, 6, generator=g) @ torch.randn(6, 6, generator=g) + 1,
    )
    ca, cb = (torch.cov(x.double().T).numpy() for x in (a, b))
    theirs = (a.double().mean(0) - b.double().mean(0)).square().sum().item() + (
        ca + cb - 2 * linalg.sqrtm(ca @ cb).real
    ).trace()
    assert E.frechet(a, b) == pytest.approx(theirs, rel=1e-8) and abs(E.frechet(b, b)) < 1e-9


def test_bootstrap_is_the_normal_interval_of_a_large_sample_and_respects_clusters():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    low, high = E.bootstrap(x)
    half = 1.96 * x.std().item() / 2000**0.5
    assert low == pytest.approx(x.mean().item() - half, abs=0.006) and high == pytest.approx(
        x.mean().item() + half, abs=0.006
    )
    wide = E.bootstrap(x.repeat_interleave(9), [i // 9 for i in range(18000)])
    assert wide == pytest.approx((low, high)) and E.bootstrap(torch.ones(7)) == (1, 1)


@pytest.mark.parametrize('prompts', [4, 12])
def test_an_interval_of_few_prompts_covers_the_truth(prompts):
    "Images of one prompt share half of their variance; the truth is 0."
    g, hits = torch.Generator().manual_seed(5), 0
    for trial in range(400):
        x = torch.randn(prompts, 1, generator=g) + torch.randn(prompts, 4, generator=g)
        low, high = E.bootstrap(x.flatten(), [i // 4 for i in range(4 * prompts)], draws=300, seed=trial)
        hits += low <= 0 <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_win_rate_counts_ties_by_half():
    base, tuned = torch.tensor([0.0, 0, 0, 0]), torch.tensor([1.0, 0, -1, 2])
    assert E.win_rate(base, tuned, list('abcd'))[0] == 0.625
    assert E.win_rate(base, base, list('abcd')) == (0.5, 0.5, 0.5)


def test_a_model_against_itself_and_the_form_of_the_summary(clean):
    same = compare(PROBES, clean, clean)
    assert all(r.change == 0 and (r.low is None or r.low == r.high == 0) for r in same.rows)
    assert same.summary['parity'].keys() == {'train', 'held_out'} and all(
        v.keys() == {'base', 'tuned', 'floor'} for v in same.summary['parity'].values()
    )
    assert same.summary['composition'].keys() >= {'seen', 'unseen'} and same.summary['preference'].keys() == {
        'win_rate',
        'low',
        'high',
    }
    assert same.summary['guard'].keys() == {'face', 'occupation', 'single_object', 'frechet'} and all(
        v.keys() == {'base', 'tuned'} for v in same.summary['guard'].values()
    )
    assert same.summary['parity']['train']['floor'] == parity_floor(16)
    assert same.summary['parity']['train']['base'] == pytest.approx(
        parity_floor(16), abs=0.06
    )  # drawn evenly
    lines = E.table(same).splitlines()
    assert len({len(l) for l in lines}) == 1 and len(lines) == len(same.rows) + 2


def test_changes_have_the_right_sign(clean):
    worse = {n: dict(v) for n, v in clean.items()}
    for n in worse:
        worse[n]['preference'] = worse[n]['preference'] - 1
        if 'tone' in worse[n]:
            worse[n]['tone'] = torch.zeros_like(worse[n]['tone'])
            worse[n]['face'] = worse[n]['face'] * 0
        if 'composition' in worse[n]:
            worse[n]['composition'] = worse[n]['composition'] / 2
    result = compare(PROBES, clean, worse)
    of = {(r.objective, r.prompts): r for r in result.rows}
    assert (
        of['parity (distance)', 'training'].tuned == pytest.approx(0.8**0.5, abs=1e-6)
        and of['parity (distance)', 'training'].low > 0
    )
    assert (
        of['composition', 'never seen'].high < 0
        and of['readable face', 'all'].tuned == 0
        and result.summary['preference']['win_rate'] == 0
    )
    assert result.tones['a portrait of a doctor'][1] == pytest.approx((1, 0, 0, 0, 0))


def test_any_model_by_its_tasks():
    policy, task = (
        Policy(tiny_sd(), num_steps=2),
        Task('small', ['a cat', 'a dog'], jpeg_compressibility, samples=8),
    )
    assert speaks_emoji(policy)
    prompt_sets = E.task_prompt_sets([task], 12)
    images = E.sample_prompt_sets(policy, prompt_sets)
    assert len(images['small/train']) == 12 and torch.equal(
        images['small/train'], E.sample_prompt_sets(policy, prompt_sets)['small/train']
    )
    result = E.compare_rewards([task], prompt_sets, images, images)
    assert result.summary['small']['change'] == 0 and result.summary['small']['win_rate'] == 0.5


def test_values_that_are_not_finite_are_left_out_in_pairs(capsys):
    "As in training by on_nonfinite='skip': what is undefined for some images ends no evaluation."
    names = ('a cat', 'a dog', 'a key', 'a bus')
    sets = [E.PromptSet('odd/train', names * 2)]
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean = lambda x: x.mean((1, 2, 3))
    faceless = lambda x: torch.where(mean(x) == mean(images)[1], torch.nan, mean(x))
    task = lambda f: Task('odd', ['a cat'], reward(lambda x, p: f(x), name='faceless'))
    found = E.compare_rewards([task(faceless)], sets, {'odd/train': images}, {'odd/train': images / 2})
    kept = mean(images)[[0, 2, 3, 4, 5, 6, 7]]
    (row,) = found.rows
    assert (row.base, row.tuned) == pytest.approx((kept.mean().item(), kept.mean().item() / 2), rel=1e-5)
    assert row.pictures == 7 and found.summary['odd']['win_rate'] == 0
    told = capsys.readouterr().out
    assert (
        told.count("reward 'faceless' gave 1 of 8 values that are not finite") == 1
        and "the first: 'a dog'" in told
    )
    with pytest.raises(ValueError, match="reward 'faceless' must be finite for some image.*'a cat'"):
        never = task(lambda x: mean(x) * torch.nan)
        E.compare_rewards([never], sets, {'odd/train': images}, {'odd/train': images})


def test_a_fairness_task_is_judged_by_its_parity():
    "Whatever credit it trains with; and groups of one prompt are drawn together."
    reader = lambda images: (images[:, 0, 0, 0] * 8).round().long()
    tones = [torch.randint(0, n, (64,), generator=torch.Generator().manual_seed(n)) for n in (2, 5)]
    images = [{'fair/train': t.float()[:, None, None, None].expand(-1, 3, 4, 4) / 8} for t in tones]
    prompt_set = E.PromptSet('fair/train', tuple(p for p in ('a doctor', 'a nurse') for _ in range(32)))
    parity = [torch.tensor([statistical_parity(g) for g in t.split(16)]) for t in tones]
    for credit in ('own', 'rare', 'shared'):
        found = E.compare_rewards(
            [
                Task(
                    'fair',
                    ['a doctor', 'a nurse'],
                    fairness_reward(reader, credit),
                    group_size=16,
                    samples=64,
                )
            ],
            [prompt_set],
            *images,
        )
        (row,) = found.rows
        assert (row.base, row.tuned) == tuple(
            pytest.approx(p.mean().item(), abs=1e-6) for p in parity
        ) and row.floor == pytest.approx(parity_floor(16))
        assert row.better == 'lower' and row.change < 0 and found.summary['fair']['win_rate'] == 1
        change = (parity[1] - parity[0]).view(2, 2).mean(1)  # of the two prompts: all that the interval knows
        wide = 2**0.5 * stats.t.ppf(0.975, 1) / stats.norm.ppf(0.975)  # Student's beside the bootstrap's
        ends = [change.mean() + wide * (x - change.mean()) for x in (change.min(), change.max())]
        assert (row.low, row.high) == tuple(pytest.approx(x.item(), abs=1e-5) for x in ends)


def test_the_interval_of_parity_knows_that_groups_of_a_prompt_are_alike():
    "Four prompts with four equal groups each tell as much as four groups."
    per_prompt = torch.tensor([0.0, 1.0, 2.0, 3.0])
    values, prompts = per_prompt.repeat_interleave(4), [p for p in 'abcd' for _ in range(4)]
    alone, clustered = E.bootstrap(values), E.bootstrap(values, prompts)
    assert clustered == E.bootstrap(per_prompt) and clustered[1] - clustered[0] > 1.7 * (alone[1] - alone[0])
    assert E.bootstrap(values, ['a'] * 16) == alone  # one prompt: of that one


def test_the_table_clusters_parity_by_prompt(clean):
    changed = {n: dict(v) for n, v in clean.items()}
    name = 'portraits/held_out'
    (prompt_set,) = [p for p in PROBES if p.name == name]
    prompts = list(dict.fromkeys(prompt_set.prompts))
    changed[name]['tone'] = torch.tensor(
        [i % (1 + prompts.index(p)) for i, p in enumerate(prompt_set.prompts)]
    )  # each prompt has its own mix
    (row,) = [
        r
        for r in compare(PROBES, clean, changed).rows
        if r.objective.startswith('parity') and r.prompts == 'held-out'
    ]
    change = torch.tensor(
        [
            statistical_parity(a) - statistical_parity(b)
            for a, b in zip(changed[name]['tone'].split(16), clean[name]['tone'].split(16))
        ]
    )
    assert (row.low, row.high) == pytest.approx(E.bootstrap(change, prompt_set.prompts[::16]))


@pytest.mark.parametrize('seeds, prompts, spread', [(3, 16, (0.3, 0.3, 0.3)), (5, 12, (0.1, 0.5, 0.3))])
def test_an_interval_over_seeds_and_prompts_covers_the_truth(seeds, prompts, spread):
    "Of tables whose seeds, prompts and noise have known deviations, nine in ten and more hold the true mean."
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    covered = narrow = 0
    for _ in range(400):
        of_seed, of_prompt, noise = (s * x for s, x in zip(spread, (normal(seeds, 1), normal(1, prompts), 1)))
        table = of_seed + of_prompt + noise * normal(seeds, prompts)
        found = E.crossed_interval(table)
        covered += found.low <= 0 <= found.high
        alone = E.bootstrap(table.flatten())
        narrow += alone.low <= 0 <= alone.high
    assert covered / 400 >= 0.9 > narrow / 400  # over images alone it is far too sure


def test_an_interval_over_seeds_and_prompts_of_one_run_or_equal_runs():
    one = torch.tensor([[1.0, 2, 3, 4]])
    t = 3.182446  # Student's 97.5 % quantile with 3 degrees of freedom
    half = t * one.std().item() / 2
    assert E.crossed_interval(one) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-5)
    assert E.crossed_interval(torch.ones(3, 5)) == (1.0, 1.0)
    clustered = E.crossed_interval(one.repeat_interleave(4, 1), [i // 4 for i in range(16)])
    assert clustered == pytest.approx(E.crossed_interval(one))
