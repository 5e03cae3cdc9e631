"Every method of the table trains a tiny Stable Diffusion with random weights, and its reward rises."

import pytest, torch

from drl_toolkit.algorithms import advantages
from drl_toolkit.prompts.task import Task
from drl_toolkit.recipes.recipes import load_recipe, make_trainer
from drl_toolkit.recipes.methods import METHODS, combined, left_behind, method_fields
from drl_toolkit.recipes.config import RunConfig, recipe_names
from drl_toolkit.rewards.reward import reward
from drl_toolkit.emoji.tiny import tiny_sd
from tiers import some


@reward
def warmth(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def trainer(name, epochs=7, samples=32, model=None, **more):
    "Five steps, two prompts, families of four."
    told = (
        dict(
            epochs=epochs,
            num_steps=5,
            train_steps=0,
            num_minibatches=2,
            lr=3e-3,
            warmup=0,
            train='full',
            seed=1,
        )
        | method_fields(name)
        | more
    )
    return make_trainer(
        RunConfig(**told),
        [Task('warm', ['a cat', 'a dog'], warmth, group_size=4, samples=samples)],
        model or tiny_sd(),
        callbacks=[],
    )


RISES = ('ppo', 'branch_grpo', 'raft', 'nft', 'draft_lv')  # one of each kind of sampler and objective


@pytest.mark.parametrize('name', some(METHODS, RISES))
def test_the_reward_rises(name):
    t = trainer(name)
    before = [p.detach().clone() for p in t.params]
    rewards = [row['tasks']['warm']['reward'] for row in t.fit()]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2
    assert any(not torch.equal(a, b) for a, b in zip(before, t.params))
    assert all(row['tasks']['warm']['ratio_error'] == 0 and row['nfe'] > 0 for row in t.history)


@pytest.mark.parametrize(
    'name', some(['ppo', 'branch_grpo', 'raft', 'nft', 'draft', 'alignprop', 'refl'], ['nft', 'refl'])
)
def test_every_regulariser_goes_with_every_objective(name):
    """The KL penalty with its target, the base's own images as data, decay to the base, averaged weights: all at
    once."""
    t = trainer(
        name,
        epochs=3,
        kl_weight=0.1,
        kl_target=1e-6,
        data_weight=0.1,
        data='base',
        base_decay=0.5,
        ema_decay=0.5,
    )
    history = t.fit()
    rows = [row['tasks']['warm'] for row in history]
    assert (
        all(row['kl'] > 0 for row in rows[1:])
        and rows[-1]['kl_weight'] > 0.1
        and all(row['data_loss'] > 0 for row in history)
    )  # what leaves 1e-6 is held harder
    assert any(not torch.equal(p, a) for p, a in zip(t.params, t.ema))


@pytest.mark.parametrize(
    'name',
    some(
        ['ppo_prompt', 'ddpo_sf', 'grpo', 'rloo', 'grpo_guard', 'dpok', 'awm', 'rwr', 'nft'],
        ['ppo_prompt', 'grpo_guard', 'rwr', 'nft'],
    ),
)
def test_branches_go_with_every_policy_gradient(name):
    t = trainer(name, epochs=2, progressive=0.6, branching=True)
    rows = [row['tasks']['warm'] for row in t.fit()]
    assert all(row['ratio_error'] == 0 and row['grad_norm'] > 0 for row in rows) and t.sampler.share_prefix


ADVANTAGES = [
    ('ppo', 'batch'),
    ('nft', 'per_prompt'),
    ('ppo', 'group'),
    ('nft', 'leave_one_out'),
    ('ppo', 'moving_average'),
    ('nft', 'rank'),
]


@pytest.mark.parametrize('name, credit', some(ADVANTAGES, [('nft', 'per_prompt'), ('ppo', 'moving_average')]))
def test_normalisations_are_one_word(name, credit):
    rows = [row['tasks']['warm'] for row in trainer(name, epochs=2, advantage=credit).fit()]
    assert all(row['grad_norm'] > 0 and 1 < row['effective_group'] <= 4 for row in rows)


@pytest.mark.parametrize(
    'told, words',
    [
        (dict(tree='0 9'), 'splits must be below 5 .*got .0, 9.'),
        (dict(tree='2 0'), 'ascending steps'),
        (dict(tree='a'), "tree must be .*got 'a'"),
        (dict(tree='0 1 2'), 'power such as 8 or 27 with 3 branch points; a group has 4 samples'),
        (dict(tree='0', branching=True), "tree must be empty with branching; got '0'"),
        (dict(tree='0', likelihood='matching'), "likelihood must be 'path' with tree"),
        (dict(tree='0', overlap=True), 'overlap must be false with tree'),
        (
            dict(objective='draft', branching=True),
            "objective must be 'policy' with branching True; got 'draft'",
        ),
        (dict(objective='refl', tree='0'), "objective must be 'policy' with tree '0'; got 'refl'"),
    ],
)
def test_what_does_not_go_together_is_named(told, words):
    with pytest.raises(ValueError, match=words):
        trainer('ppo', **told)


@pytest.mark.parametrize('name', ['grpo', 'rloo', 'grpo_guard', 'raft', 'rwr', 'nft', 'awm'])
def test_group_credit_without_a_group_is_refused_before_anything_is_sampled(name):
    drawn = []
    task = lambda size: Task('warm', ['a cat'], lambda images, prompts: drawn.append(1), group_size=size)
    made = lambda size, **more: make_trainer(
        RunConfig(**method_fields(name) | dict(num_steps=5, train_steps=2) | more),
        [task(size)],
        tiny_sd(),
        callbacks=[],
    )
    with pytest.raises(
        ValueError,
        match=r"group_size of task 'warm' must be 2 or more with advantage '.*got 1 \(or take "
        r"advantage='batch'\)$",
    ):
        made(1)
    made(2)
    made(1, advantage='batch')
    assert not drawn


@pytest.mark.parametrize('told', [dict(branching=True), dict(tree='0')])
def test_a_single_picture_has_no_siblings(told):
    config = RunConfig(num_steps=5, train_steps=0, **told)
    with pytest.raises(ValueError, match='group_size of task .*got 1'):
        make_trainer(config, [Task('warm', ['a cat'], warmth)], tiny_sd(), callbacks=[])


def unit(config, name):
    "What the number of a field is measured in: a clip's by the surrogate, too."
    if config.objective != 'policy':
        return (config.objective,)
    surrogate = (config.surrogate,) if name.startswith('clip') else ()
    return (config.objective, config.likelihood, *surrogate)


@pytest.mark.parametrize('recipe', recipe_names())
def test_no_weight_of_a_recipe_leaks_into_another_likelihood(recipe):
    """Over all methods: where the likelihood or the objective is another one, weights are the method's own or
    none."""
    own = load_recipe(recipe)[1]
    for method in METHODS:
        config, left = combined(own, method)
        said, dropped = method_fields(method), set()
        for name in ('kl_weight', 'kl_target', 'clip_range', 'clip_high'):
            stays, none = unit(config, name) == unit(own, name), getattr(RunConfig, name)
            assert getattr(config, name) == said.get(name, getattr(own, name) if stays else none), (
                method,
                name,
            )
            if not stays and name not in said and getattr(own, name) != none:
                dropped.add(name)
        assert set(left) == dropped and bool(left_behind(own, left)) == bool(dropped)
    assert combined(own, 'ppo', dict(kl_weight=0.25))[0].kl_weight == 0.25  # what is asked for is given
    assert combined(own)[0] == own


def test_the_kl_of_another_likelihood_no_longer_holds_the_path(capsys):
    "`composition --method ppo`: the weight of the recipe, .4 of a mean, was .4 nats of a sum over D."
    from drl_toolkit.cli.main import _train_config, parse

    told = parse(['train', 'composition', '--method', 'ppo'])
    assert _train_config(told, None)[0].kl_weight == 0
    assert capsys.readouterr().out.startswith('kl_weight=0.4 of the recipe is left out: ')
    assert (
        _train_config(parse(['train', 'composition', '--method', 'awm']), None)[0].kl_weight == 0.4
        and not capsys.readouterr().out
    )


def test_method_b2_is_the_recipe_b2():
    "One estimator, that of B²'s code, by its name in the table and in the recipes."
    recipe = load_recipe('b2')
    named = advantages.ADVANTAGES[METHODS['b2']['advantage']]()
    assert named == recipe.tasks[0].advantage == load_recipe('b2', 'paper').tasks[0].advantage
    assert (named.rounds, named.history, named.correction, named.clamp) == (8, 'run', 1, 5.0)
    for name in ('progressive', 'branching', 'grow', 'likelihood', 'surrogate'):
        assert method_fields('b2')[name] == getattr(recipe.config, name)
