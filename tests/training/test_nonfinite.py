"""Every kind of bad number, put in where it would arise: the sample is named, a step or the run is given up,
and no good state is lost."""

import math

import pytest, torch

from drl_toolkit.algorithms.minibatches import LossOutput
from drl_toolkit.algorithms.reward_gradients import DRaFT
from drl_toolkit.algorithms.multi_task import MGDA, PCGrad
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.prompts.task import Task
from drl_toolkit.rewards.reward import reward
from drl_toolkit.runs.run import Run
from drl_toolkit.runs.recorder import Recorder, named_state, resume
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.nonfinite import MOST_SKIPPED
from drl_toolkit.algorithms.async_rewards import AsyncRewardSampler
from drl_toolkit.training.config import TrainConfig
from tiers import some


@reward
def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@reward
def warmth(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def tasks():
    return [Task('red', ['a cat', 'a dog'], redness, samples=8)]


KINDS = dict(ppo=dict, matching=lambda: dict(likelihood='matching'), draft=lambda: dict(objective=DRaFT(1)))


def trainer(
    train='lora', callbacks=(), objective=None, of=None, sampler=None, strategy=None, precision='fp32', **more
):
    told = (
        dict(epochs=3, lr=1e-3, train_steps=2, num_minibatches=2, warmup=0, measure_every=0, ema_decay=0.5)
        | more
    )
    return Trainer(
        Policy(tiny_sd(), num_steps=3, train=train, precision=precision),
        of or tasks(),
        TrainConfig(**told),
        callbacks=list(callbacks),
        objective=objective,
        sampler=sampler,
        strategy=strategy,
    )


def spoil(t, how, when=lambda t: True, sample=3):
    "Of one sample the loss is NaN, or only its gradient."
    loss = t.objective.loss

    def spoilt(run, rows):
        value, stats = loss(run, rows)
        if not when(run) or sample not in rows['sample'].tolist():
            return LossOutput(value, stats)
        zero = sum((p * 0).sum() for p in run.policy.parameters())
        return LossOutput(value + (zero * math.nan if how == 'loss' else zero.abs().sqrt()), stats)

    t.objective.loss = spoilt


def state(t):
    return {n: p.detach().clone() for n, p in named_state(t).items()} | {
        f'moment/{i}/{k}': v.clone()
        for i, p in enumerate(t.params)
        for k, v in t.optimizer.state.get(p, {}).items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


BAD = [
    ('ppo', 'lora', 'loss'),
    ('ppo', 'full', 'gradient'),
    ('matching', 'lora', 'gradient'),
    ('matching', 'full', 'loss'),
    ('draft', 'lora', 'gradient'),
    ('draft', 'full', 'loss'),
]


@pytest.mark.parametrize('kind, train, how', some(BAD, BAD[1:4]))
def test_a_bad_step_is_left_out_and_the_sample_is_named(kind, train, how, capsys):
    "In the second epoch one sample spoils its minibatch: the other step is made, the third epoch goes on."
    t, seen = trainer(train, **KINDS[kind]()), []
    spoil(t, how, lambda t: t.epoch == 1)
    step = t.updates.step

    def stepped(*args):
        before = state(t)
        norm = step(*args)
        seen.append((t.epoch, bool(norm.isfinite()), same(before, state(t))))
        return norm

    t.updates.step = stepped
    rows = [r['tasks']['red'] for r in t.fit()]
    assert [r['skipped_steps'] for r in rows] == [0, rows[1]['skipped_steps'], 0] and rows[1][
        'skipped_steps'
    ] in (1, 2)
    assert (
        all(good != kept for _, good, kept in seen) and len(seen) == 6
    )  # a bad step changes no weight, moment or average; a good one does
    assert all(math.isfinite(r['grad_norm']) for r in rows)
    told = capsys.readouterr().out
    prompts, _ = t.tasks[0].draw(t.seed_of(t.tasks[0]), 1)
    assert (
        'epoch 1: a gradient is not finite' in told
        and f"task 'red', {prompts[3]!r}, seed " in told
        and f'({how})' in told
    )
    assert 'more' not in told and told.count('seed') == rows[1]['skipped_steps']


@pytest.mark.parametrize('kind', some(KINDS, ['ppo']))
def test_too_many_in_a_row_end_the_run(kind, tmp_path, capsys):
    t = trainer(epochs=9, num_minibatches=1, **KINDS[kind]())
    spoil(t, 'loss', lambda t: t.epoch > 1)
    with Run.create(tmp_path / 'r', t.config) as run:
        t.callbacks = [Recorder(run, ['a cat'], every=1)]
        with pytest.raises(FloatingPointError, match=f'That was the {MOST_SKIPPED + 1}th step in a row') as e:
            t.fit()
        assert (
            '\n' not in str(e.value) and t.epoch == 2 + MOST_SKIPPED and not (tmp_path / 'r/weights').exists()
        )
        assert capsys.readouterr().out.count('the step is skipped') == MOST_SKIPPED
        assert [r['skipped_steps'] for r in run.metrics() if r['task']] == [0, 0] + [1] * MOST_SKIPPED
        good = trainer(**KINDS[kind]())
        resume(good, run)
        assert (
            same(state(t), state(good)) and good.updates.nonfinite.skipped == MOST_SKIPPED
        )  # a resume knows how many there were


@pytest.mark.parametrize('strategy', [MGDA, PCGrad])
def test_strategies_that_mix_gradients(strategy, capsys):
    t = trainer(
        of=[*tasks(), Task('warm', ['a key'], warmth, samples=8)], strategy=strategy(), num_minibatches=1
    )
    spoil(t, 'loss', lambda t: t.epoch == 1)
    rows = t.fit()
    for name in ('red', 'warm'):
        assert [r['tasks'][name]['skipped_steps'] for r in rows] == [0, 1, 0]
    assert (
        all(p.isfinite().all() for p in t.params)
        and capsys.readouterr().out.count('the step is skipped') == 1
    )


def test_a_spoilt_data_loss(capsys):
    data = lambda count, seed: (torch.full((count, 3, 64, 64), math.nan), ['a cat'] * count)
    policy = Policy(tiny_sd(), num_steps=3)
    t = Trainer(
        policy,
        tasks(),
        TrainConfig(epochs=2, train_steps=2, data_weight=0.5, data_batch=2),
        data=data,
        callbacks=[],
    )
    t.fit()
    assert all(p.isfinite().all() for p in t.params) and 'or the data loss' in capsys.readouterr().out


def test_overflow_in_fp16_is_how_the_scale_is_found(capsys):
    t = trainer(precision='fp16', num_minibatches=1, epochs=2, train_steps=1)
    t.updates.optimization.scaler = torch.amp.GradScaler('cpu', init_scale=2.0**60, backoff_factor=2.0**-50)
    before = state(t)
    rows = [r['tasks']['red']['skipped_steps'] for r in t.fit()]
    assert (
        rows == [1, 0]
        and t.updates.nonfinite.skipped == 0
        and not same(before, state(t))
        and 'the step is skipped' not in capsys.readouterr().out
    )
    t = trainer(num_minibatches=1, epochs=9, train_steps=1)
    t.updates.optimization.scaler = torch.amp.GradScaler('cpu', init_scale=2.0)
    spoil(t, 'loss')
    with pytest.raises(FloatingPointError, match='in a row'):
        t.fit()
    assert t.epoch == 1 + MOST_SKIPPED  # the first halved the scale to 1


@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('sampler', [None, AsyncRewardSampler(batch_size=3)])
@pytest.mark.parametrize('level', ['sample', 'group'])
def test_a_bad_reward_stops_and_names_the_sample(bad, sampler, level, tmp_path):
    calls, count = [], 4 if level == 'group' else 1

    @reward(level=level)
    def broken(images, prompts):
        calls.extend(prompts)
        values = images.mean((1, 2, 3))
        return (
            torch.where(
                torch.arange(len(images)) == (len(calls) > 13) * (len(images) - 1),
                bad if len(calls) > 13 else 0.0,
                1.0,
            )
            * values
        )

    t = trainer(
        of=[Task('odd', ['a cat', 'a dog'], broken, samples=8, group_size=count)], sampler=sampler, epochs=9
    )
    with Run.create(tmp_path / 'r', t.config) as run:
        t.callbacks = [Recorder(run, ['a cat'], every=1)]
        with pytest.raises(
            ValueError,
            match=r"epoch 1, task 'odd', seed \d+: reward 'broken' returned (NaN|an infinite value)",
        ) as e:
            t.fit()
        assert (
            t.epoch == 1
            and [p.name for p in run.checkpoints()] == ['epoch_0001']
            and not (tmp_path / 'r/weights').exists()
        )
    from drl_toolkit.sampling.rollout import sample_seed

    seeds = [sample_seed(t.seed_of(t.tasks[0]), 1, i) for i in range(8)]
    prompts = t.tasks[0].draw(t.seed_of(t.tasks[0]), 1)[0]
    named = seeds.index(int(str(e.value).split('seed ')[1].split(':')[0]))
    assert f'shows {prompts[named]!r}' in str(e.value) and (sampler or named == 7)


def test_a_bad_picture_stops_before_anyone_judges_it():
    t = trainer()
    before = t.policy.decode
    t.policy.decode = lambda latents, **o: before(latents, **o).index_fill(0, torch.tensor([5]), math.nan)
    with pytest.raises(ValueError, match=r"epoch 0, task 'red', seed \d+: 1 of 8 images"):
        t.fit()


def test_bad_weights_are_never_written(tmp_path):
    "An optimiser step that leaves an infinity behind."
    t = trainer('full')
    with Run.create(tmp_path / 'r', t.config) as run:
        t.callbacks = [Recorder(run, ['a cat'], every=1)]
        t.fit(epochs=1)
        good = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
        step = t.optimizer.step
        t.optimizer.step = lambda *args: (step(*args), t.params[0].data[:1].fill_(math.inf))
        with pytest.raises(FloatingPointError, match='not recorded|not finite'):
            t.fit(epochs=2)
        t.params[0].data[:1].fill_(math.inf)  # the fit that failed has put the weights back
        with pytest.raises(FloatingPointError, match="weights' is not written"):
            run.save_weights(t.policy)
        with pytest.raises(FloatingPointError, match="epoch_0002' is not written"):
            run.checkpoint(2, named_state(t), t.optimizer, t.state_dict())
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == good


def spoilt(how, count=1):
    "A reward whose value for the last images of a batch of more than one is bad."

    @reward
    def odd(images, prompts):
        values = images.mean((1, 2, 3)).tolist()
        if how == 'raise':
            if any('dog' in p for p in prompts):
                raise RuntimeError('no dogs')
            return values
        return values[:-count] + [how] * count

    return odd


@pytest.mark.parametrize('how', [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize('kind, train', [('ppo', 'lora'), ('matching', 'full')])
def test_a_skipped_sample_changes_nothing_but_itself(how, kind, train, capsys):
    """Neither its value nor its image reaches the advantages, the means or the gradient, with a KL penalty
    too."""
    weight = dict(kl_weight=0.1)
    t = trainer(
        train,
        of=[Task('odd', ['a cat'], spoilt(how), samples=8)],
        on_nonfinite='skip',
        epochs=2,
        **KINDS[kind]() | weight,
    )
    rows = []
    plan = t.updates.plan

    def planned(batch):
        made = plan(batch)
        rows.append((batch, {i for part in made for i in part['sample'].tolist()}))
        return made

    t.updates.plan = planned
    records = [r['tasks']['odd'] for r in t.fit()]
    for record, (batch, used) in zip(records, rows):
        assert used == set(range(7)) and batch.advantage[7] == 0 and record['skipped_samples'] == 1
        kept = batch.values[0][:7].double()
        assert torch.allclose(
            batch.advantage[:7].double(),
            (kept - kept.mean()) / (kept.var(correction=0) + 1e-8).sqrt(),
            atol=1e-5,
        )
        assert record['reward'] == pytest.approx(kept.mean().item(), rel=1e-5) and math.isfinite(
            record['grad_norm']
        )
    told = capsys.readouterr().out
    assert told.count("reward 'odd' is not finite for 'a cat'") == 2 and 'seed ' in told


def test_too_many_skipped_samples_stop_the_run():
    t = trainer(of=[Task('odd', ['a cat'], spoilt(math.nan, 3), samples=8)], on_nonfinite='skip')
    with pytest.raises(
        ValueError,
        match="seed .*reward 'odd' is not finite for 'a cat', one of 3 such of 8 samples; at most 25%",
    ):
        t.fit()


def test_a_reward_that_raises_for_some_images_skips_them():
    t = trainer(
        of=[Task('odd', ['a cat'] * 7 + ['a dog'], spoilt('raise'), samples=8)], on_nonfinite='skip', epochs=1
    )
    assert t.fit()[0]['tasks']['odd']['skipped_samples'] == 1
    with pytest.raises(RuntimeError, match='no dogs'):
        trainer(of=[Task('odd', ['a dog'], spoilt('raise'), samples=8)], on_nonfinite='skip').fit()


def test_a_list_may_be_of_whole_numbers_and_float64_may_be_too_large():
    images = torch.rand(2, 3, 8, 8)
    assert reward(lambda x, p: [1, 0], name='ints')(images, ['a', 'b']).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="reward 'big' returned 1e.300 for 'b', more than float32"):
        reward(lambda x, p: torch.tensor([0, 1e300], dtype=torch.double), name='big')(images, ['a', 'b'])


@pytest.mark.parametrize('how', ['raise', math.nan])
def test_a_watched_reward_never_ends_a_run(how, tmp_path, capsys):
    from drl_toolkit.evaluation.held_out import Watch

    t = trainer(epochs=2)
    bad = reward(lambda images, prompts: 1 / 0, name='bad') if how == 'raise' else spoilt(how)
    with Run.create(tmp_path / 'r', t.config) as run:
        t.callbacks = [
            Watch(t.policy, [redness], [bad, warmth], ['a cat'] * 4, every=1),
            Recorder(run, ['a cat'], every=1),
        ]
        t.fit()
        assert [p.name for p in run.checkpoints()][-1] == 'epoch_0002' and all(
            math.isfinite(r['watch/watched']) for r in t.history
        )
    assert ("'bad' failed" if how == 'raise' else "1 of 4 images") in capsys.readouterr().out


def test_progress_shows_the_headline_figure():
    from drl_toolkit.emoji.rewards import fairness
    from drl_toolkit.rewards.reward import jpeg_compressibility
    from drl_toolkit.training.callbacks import headline

    assert headline(fairness, dict(reward=0.003, parity=0.41), 'fairness') == ('fairness parity', '0.410')
    assert headline(jpeg_compressibility, dict(reward=-2.0), 'small') == ('small', '-2.000 kB, negative')


def test_values_that_float32_does_not_hold_are_named():
    from drl_toolkit.rewards.reward import reward

    images = torch.rand(3, 3, 8, 8)
    with pytest.raises(ValueError, match="reward 'huge' returned 1e\\+300 for 'b', more than float32 holds"):
        reward(lambda x, p: torch.tensor([1.0, 1e300, 2.0], dtype=torch.double), name='huge')(
            images, ['a', 'b', 'c']
        )


def test_a_figure_that_is_no_number_is_named():
    from drl_toolkit.rewards.reward import reward

    images = torch.rand(3, 3, 8, 8)
    with pytest.raises(
        TypeError, match=r"reward 'mine': metric 'x' is torch.float32 \(3,\); one number is right"
    ):
        reward(lambda x, p: (torch.rand(3), {'x': torch.rand(3)}), name='mine').report(images, ['a'] * 3)
    assert reward(lambda x, p: (torch.rand(3), {'x': torch.tensor(2.0)}), name='mine').report(
        images, ['a'] * 3
    )[1] == {'x': 2.0}


def test_undefined_rewards_may_be_many(capsys):
    "[P]'s code leaves them out of the mean, the deviation and the gradient; three of them are named."
    many = Task('odd', ['a cat'], spoilt(math.nan, 5), samples=8)
    t = trainer(of=[many], on_nonfinite='skip', max_nonfinite=1.0, epochs=1, num_minibatches=1)
    batches, real = [], t.updates.plan
    t.updates.plan = lambda batch: batches.append(batch) or real(batch)
    assert t.fit()[0]['tasks']['odd']['skipped_samples'] == 5
    (batch,) = batches
    kept = batch.values[0][:3].double()
    right = (kept - kept.mean()) / (kept.var(correction=0) + 1e-8).sqrt()
    assert torch.allclose(batch.advantage[:3].double(), right, atol=1e-5) and (batch.advantage[3:] == 0).all()
    assert set(batch.minibatches[0]['sample'].tolist()) == {0, 1, 2}
    told = capsys.readouterr().out
    assert told.count('is not finite') == 3 and '2 more samples are skipped for the same reason' in told
    none = Task('odd', ['a cat'], spoilt(math.nan, 8), samples=8)
    with pytest.raises(
        ValueError, match='one of 8 such of 8 samples; at most 100% are skipped, and never all'
    ):
        trainer(of=[none], on_nonfinite='skip', max_nonfinite=1.0).fit()
