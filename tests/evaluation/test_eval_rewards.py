"Judges, drift, the alignment tax and the watch, against known changes and hand-made tables."

import math

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from skimage.measure import shannon_entropy

from drl_toolkit.evaluation import (
    drift as D,
    evaluate as E,
    eval_rewards as J,
    alignment_tax as T,
    held_out as W,
)

from drl_toolkit.rewards.fairness import fairness_reward
from drl_toolkit.emoji.rewards import fairness, rare_fairness, shared_fairness
from drl_toolkit.rewards.lab import EDITS, base_samples
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.prompts.task import Task
from drl_toolkit.rewards.reward import Reward, clip_score, reward
from drl_toolkit.runs.run import Run
from drl_toolkit.runs.recorder import Recorder, named_state, resume
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.config import TrainConfig
from drl_toolkit.emoji.evaluation import EMOJI_EVAL_REWARDS
from drl_toolkit.recipes.custom import named_rewards
from witnesses import onlooker

PROBES = [
    E.PromptSet('portraits/train', ('a portrait of a doctor',) * 32),
    E.PromptSet('objects/train', ('a cat', 'a dog') * 4),
    E.PromptSet('pairs/unseen', ('a cat next to a dog',)),
]


@reward
def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@reward
def paleness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.fixture(scope='module')
def pictures():
    return {
        p.name: torch.rand(len(p.prompts), 3, 64, 64, generator=torch.Generator().manual_seed(i))
        for i, p in enumerate(PROBES)
    }


# judges


def test_effect_and_wins_of_a_known_shift(pictures):
    shifted = {k: v * 0.9 + 0.1 * torch.tensor([1.0, 0, 0])[:, None, None] for k, v in pictures.items()}
    table = J.evaluate_rewards(
        [J.EvalReward(redness, ())], PROBES, pictures, shifted, trained=('redness',)
    ).set_index('prompts')
    b, t = (torch.cat([redness(x[p.name], list(p.prompts)) for p in PROBES[:2]]) for x in (pictures, shifted))
    row = table.loc['training']
    assert (
        row['effect'] == pytest.approx(((t - b).mean() / b.std()).item(), rel=1e-5)
        and row['win_rate'] == 1 == row['win_low']
        and bool(row['trained'])
        and row['images'] == 40
    )
    assert (
        table.index.tolist() == ['training', 'never seen']
        and row['effect_low'] <= row['effect'] <= row['effect_high']
    )


def test_a_group_counts_once_and_single_pictures_are_no_group():
    values, clusters = J.judged(
        J.eval_reward_of(fairness, EMOJI_EVAL_REWARDS), PROBES[0], torch.rand(32, 3, 64, 64)
    )
    assert (
        len(values) == 2 and clusters == ['a portrait of a doctor'] * 2
    )  # groups of one prompt are drawn together
    seen = []
    count = Reward(lambda x, p: (seen.append(len(p)), torch.tensor(float(len(p))))[1], 'count', 'group')
    prompt_set = E.PromptSet('objects/train', ('a cat', 'a dog', 'a cat'))
    assert J.judged(J.EvalReward(count), prompt_set, torch.rand(3, 3, 8, 8))[0].tolist() == [
        2.0
    ] and seen == [2]
    assert len(J.judged(J.EvalReward(count), PROBES[2], torch.rand(1, 3, 8, 8))[0]) == 0
    assert J.evaluate_rewards(
        [J.EvalReward(count)], PROBES[2:], *[{'pairs/unseen': torch.rand(1, 3, 8, 8)}] * 2
    ).empty


def test_judges_are_asked_what_they_know():
    asked = {j.reward.name: [p.kind for p in PROBES if j.asked(p)] for j in EMOJI_EVAL_REWARDS}
    assert (
        asked['composition'] == ['pairs']
        and asked['shared_fairness'] == ['portraits']
        and asked['clip_score'] == ['portraits', 'objects', 'pairs']
    )
    assert (
        J.eval_reward_of(rare_fairness, EMOJI_EVAL_REWARDS) is J.eval_reward_of(fairness, EMOJI_EVAL_REWARDS)
        and J.eval_reward_of(rare_fairness, EMOJI_EVAL_REWARDS).reward is shared_fairness
    )
    mine = fairness_reward(lambda images: torch.zeros(len(images)).long())
    assert J.eval_reward_of(mine).reward(torch.rand(16, 3, 4, 4), ['a face'] * 16)[0] == pytest.approx(
        -(0.8**0.5)
    )  # by its own reader
    assert (
        J.eval_reward_of(fairness, EMOJI_EVAL_REWARDS).reward.name == 'shared_fairness'
        and J.eval_reward_of(redness).reward is redness
    )


# drift


def test_drift_measures_against_other_libraries():
    images = base_samples()[0][:6]
    theirs = [
        shannon_entropy((x.permute(1, 2, 0) * 8).long().clamp(max=7).numpy() @ np.array([64, 8, 1]), base=2)
        for x in images
    ]
    assert torch.allclose(D.colour_entropy(images), torch.tensor(theirs, dtype=torch.float32), atol=1e-4)
    gray = D.brightness(images)
    wave = lambda f: (0.5 + 0.4 * torch.sin(2 * math.pi * f * torch.arange(64.0)))[None, None, None].expand(
        1, 3, 64, 64
    )
    assert D.high_frequency(wave(0.125)) < 1e-6 and D.high_frequency(wave(0.375)) > 0.999999
    assert (
        D.high_frequency(images.flip(-1)).sub(D.high_frequency(images)).abs().max() < 1e-5
        and (D.edge_density(images) > 0).all()
        and gray.shape == (6, 64, 64)
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(list(EDITS)))
def test_drift_is_zero_for_the_same_and_signed_otherwise(seed, edit):
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    for m in D.MEASURES:
        assert torch.equal(m.of(x), m.of(x.clone())) and m.of(EDITS[edit](x).clamp(0, 1)).isfinite().all()
    assert (D.high_frequency(EDITS['blurring'](x)) < D.high_frequency(x)).all()


def test_the_table_and_its_alarms():
    images, prompts = base_samples()
    same = D.drift(images, images, prompts)
    assert same['change'].abs().max() < 1e-5 and D.alarms(same) == []
    loud = D.drift(images, EDITS['a fine grid'](images).clamp(0, 1), prompts, torch.tensor([3.0, 5.0]))
    assert loud.set_index('measure').loc['KL of the paths', 'change'] == 4 and any(
        'high frequency went up' in s for s in D.alarms(loud)
    )


def test_path_kl_refuses_other_samplers():
    a, b = Policy(tiny_sd(), num_steps=3), Policy(tiny_sd(), num_steps=4)
    from drl_toolkit.sampling.rollout import rollout

    traj = rollout(a, ['x', 'y'], seed=0)
    with pytest.raises(ValueError, match='same timesteps; got'):
        D.path_kl(a, b, traj)
    nats = D.path_kl(a, Policy(tiny_sd(seed=1), num_steps=3), traj, batch_size=1)
    assert nats.shape == (3, 2) and (nats[a.stochastic] > 0).all() and (nats[~a.stochastic] == 0).all()
    assert torch.allclose(
        nats, D.path_kl(a, Policy(tiny_sd(seed=1), num_steps=3), traj), rtol=1e-3, atol=1e-4
    )


# tax


def test_share_kept_by_hand():
    scores = pd.DataFrame(dict(a=[0.0, 2, -1, 1], b=[10.0, 10, 14, 13]), index=['base', 'A', 'B', 'both'])
    kept = T.share_kept(scores, dict(a='A', b='B'))
    assert (
        kept.loc['both'].tolist() == [0.5, 0.75]
        and kept.loc['B', 'a'] == -0.5
        and kept.loc['A'].tolist() == [1, 0]
    )
    assert T.tax_sentences(kept, dict(a='A', b='B')) == [
        'B pays with a (-50%) of what a specialist gains there',
        'both keeps 50% of a, 75% of b',
    ]
    less = T.share_kept(-scores, dict(a='A', b='B'), lower=('a', 'b'))  # of distances
    assert less.equals(kept) and T.share_kept(-scores, dict(a='A', b='B'), lower=('a',))['b'].isna().all()
    assert (
        T.share_kept(scores, dict(a='B', b='B'))['a'].isna().all()
    )  # a specialist that gained nothing has nothing to share
    with pytest.raises(ValueError, match="'C' is no row"):
        T.share_kept(scores, dict(a='C'))


def test_scores_are_means_over_the_probes(pictures):
    table = T.score_table(
        dict(red=J.EvalReward(redness, ('objects',))), PROBES, dict(base=pictures, same=pictures)
    )
    assert (
        table.loc['base', 'red'] == pytest.approx(redness(pictures['objects/train'], ['x'] * 8).mean().item())
        and table.loc['base', 'red'] == table.loc['same', 'red']
    )


# watch


def watched_trainer(patience=0, epochs=4, train='full', average=0.0, **watch):
    policy = Policy(tiny_sd(), num_steps=3, train=train)
    trainer = Trainer(
        policy,
        [Task('red', ['a cat', 'a dog'], redness, samples=8)],
        TrainConfig(epochs=epochs, lr=1e-3, train_steps=2, ema_decay=average),
        callbacks=[],
    )
    trainer.callbacks.append(
        W.Watch(
            policy, [redness], [paleness], ['a cat', 'a dog'] * 2, **dict(every=1, patience=patience) | watch
        )
    )
    return trainer


def test_looks_are_recorded_and_cost_the_training_nothing():
    trainer = watched_trainer()
    watch = onlooker(trainer.callbacks[0], adds=('watch/', 'drift/'))
    trainer.fit()
    assert watch.looked == 2 + 4 * 3  # looking changes nothing
    looks = W.looks_of(trainer.history)
    assert list(looks['epoch']) == [1, 2, 3, 4] and {
        'trained',
        'watched',
        'redness',
        'paleness',
        'drift/CLIP distance',
        'drift/high frequency',
    } <= set(looks)
    now = watch.look()
    by_hand = (
        (redness(now, watch.prompts) - redness(watch.base, watch.prompts)).mean()
        / redness(watch.base, watch.prompts).std()
    ).item()
    assert looks['trained'].iloc[-1] == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize('average', (0.0, 0.5))
def test_it_stops_when_the_watched_rewards_turn_and_puts_the_best_back(average, monkeypatch, capsys):
    script = iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr(
        W.Watch, 'metrics', lambda self, now: {'watch/watched': next(script), 'watch/trained': 1.0}
    )
    trainer, kept = watched_trainer(patience=2, epochs=6, average=average), []
    monkeypatch.setattr(
        W.Watch,
        'keep',
        lambda self, t, keep=W.Watch.keep: (
            keep(self, t),
            kept.append([p.detach().clone() for p in (t.ema or t.params)]),
        ),
    )
    trainer.fit()
    assert len(trainer.history) == 4 and 'put back to those of epoch 2' in capsys.readouterr().out
    assert len(kept) == 2 and all(torch.equal(a, b) for a, b in zip(trainer.params, kept[-1]))


def test_stopping_resumes_exactly(tmp_path):
    whole = watched_trainer(patience=9, epochs=4)
    with Run.create(tmp_path / 'a', whole.config) as run:
        whole.callbacks.append(Recorder(run, ['a cat'], every=2))
        whole.fit()
    first = watched_trainer(patience=9, epochs=2)
    with Run.create(tmp_path / 'b', first.config) as run:
        first.callbacks.append(Recorder(run, ['a cat'], every=2))
        first.fit()
    again = watched_trainer(patience=9, epochs=4)
    with Run.open(tmp_path / 'b', write=True) as run:
        again.callbacks.append(Recorder(run, ['a cat'], every=2))
        assert resume(again, run) == 2
        again.fit()
    assert all(torch.equal(a, named_state(again)[n]) for n, a in named_state(whole).items())
    assert W.looks_of(Run.open(tmp_path / 'a').metrics()).equals(
        W.looks_of(Run.open(tmp_path / 'b').metrics())
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-3, 3), max_size=12), st.floats(0, 0.5))
def test_best_look_by_its_definition(looks, tolerance):
    best, record = 0, 0.0
    for i, v in enumerate(looks):
        if v > record + tolerance:
            best, record = i + 1, v
    assert W.best_look(looks, tolerance) == best and (best == 0 or looks[best - 1] == record)


def test_bad_watches():
    policy = Policy(tiny_sd(), num_steps=3)
    for trained, watched, words in (
        ([], [], 'no reward is watched'),
        ([redness], [redness], "'redness' is trained"),
        ([], [fairness], 'judges groups'),
    ):
        with pytest.raises(ValueError, match=words):
            W.Watch(policy, trained, watched, ['a cat'])
    with pytest.raises(ValueError, match="reward 'beauty' does not exist; one of clip_score"):
        named_rewards('clip_score beauty')
    assert [r.name for r in named_rewards('clip_score, preference')] == [
        'clip_score',
        'preference',
    ] and named_rewards('clip_score')[0] is clip_score
    assert W.looks_of([]).empty and W.turned(pd.DataFrame()) is None
