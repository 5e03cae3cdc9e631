"A configuration needs no torch, and what it may be told is what there is."

import subprocess, sys
from dataclasses import fields

import pytest

from drl_toolkit.recipes.config import (
    DATA_NAMES,
    OBJECTIVE_NAMES,
    RECIPE_CONFIGS,
    STRATEGY_NAMES,
    RunConfig,
    recipe_config,
    recipe_names,
)
from drl_toolkit.sampling.config import PRECISION_NAMES, SDE_NAMES
from drl_toolkit.training.config import ADVANTAGE_NAMES, LIKELIHOOD_NAMES, SURROGATE_LIKELIHOODS


def test_the_words_of_a_configuration_are_those_of_the_tables():
    "Declared without torch, they could differ from what is there."
    from drl_toolkit.algorithms import advantages, objectives
    from drl_toolkit.recipes import recipes
    from drl_toolkit.sampling import policy, transitions

    assert ADVANTAGE_NAMES == tuple(advantages.ADVANTAGES) and LIKELIHOOD_NAMES == tuple(
        objectives.LIKELIHOODS
    )
    assert SURROGATE_LIKELIHOODS == {name: make().likelihoods for name, make in objectives.SURROGATES.items()}
    assert SDE_NAMES == tuple(transitions.SDES) and PRECISION_NAMES == tuple(policy.PRECISIONS)
    for name in OBJECTIVE_NAMES:
        made = recipes.make_objective(RunConfig(objective=name, back_steps=2))
        assert (made is None) == (name == 'policy')
    for name in STRATEGY_NAMES:
        assert recipes.make_strategy(RunConfig(strategy=name, keep='a, b')) is not None
    assert DATA_NAMES == (*recipes.DATA, 'base') and list(recipes.RECIPE_TASKS) == recipe_names()


def test_every_field_says_what_it_is():
    for declared in fields(RunConfig):
        help = declared.metadata['help']
        assert help and not help.endswith('.') and declared.type in (bool, int, float, str), declared.name
        if declared.type in (int, float) and declared.name != 'seed':
            assert declared.metadata['within'], declared.name


@pytest.mark.parametrize(
    'wrong, words',
    [
        (dict(lr=-1), r'lr must be 0 or more; got -1$'),
        (dict(clip_range=-1), r'clip_range must be 0 or more; got -1$'),
        (dict(epochs=1.5), 'epochs must be a whole number; got 1.5'),
        (dict(epochs=True), 'epochs must be a finite number; got True'),
        (dict(lr=float('nan')), 'lr must be a finite number; got nan'),
        (dict(lr=float('inf')), 'lr must be a finite number'),
        (dict(train='half'), "train must be one of 'lora', 'full'; got 'half'"),
        (dict(grow=1), 'grow must be true or false; got 1'),
        (dict(watch=3), 'watch must be a word or several; got 3'),
        (dict(watch='x' * 801), 'watch must be at most 800 letters'),
        (dict(lr_end=0), r'lr_end must be in \(0, 1\]; got 0'),
        (dict(patience=1), 'patience is 1, but watch is empty'),
        (dict(surrogate='nft'), "likelihood must be 'matching' with surrogate 'nft'; got 'path'"),
        (dict(tree='2 0'), "tree must be ascending steps such as '0 2'; got '2 0'"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_right(wrong, words):
    with pytest.raises(ValueError, match=words):
        RunConfig(**wrong)


def test_recipes_are_fresh():
    one = recipe_config('joint')
    one.epochs = 1
    assert recipe_config('joint').epochs == RECIPE_CONFIGS['joint']['epochs'] == 30


def test_a_seed_of_a_run_is_that_of_its_lora_unless_it_is_told():
    from drl_toolkit.emoji.tiny import tiny_sd
    from drl_toolkit.recipes.recipes import make_policy

    first = lambda **options: next(
        iter(make_policy(RunConfig(num_steps=2, **options), tiny_sd(), 'cpu').named_parameters().values())
    ).detach()
    assert (
        (first(seed=3) == first(lora_seed=3)).all()
        and (first(seed=3) == first(seed=4, lora_seed=3)).all()
        and not (first(seed=3) == first(seed=4)).all()
    )


@pytest.mark.parametrize(
    'what', ['drl_toolkit', 'drl_toolkit.recipes.methods', 'drl_toolkit.training.config']
)
def test_a_configuration_needs_no_torch(what):
    code = (
        f"import sys, time; began = time.perf_counter(); import {what}; print(time.perf_counter() - began, "
        f"*({{'torch', 'diffusers', 'numpy'}} & set(sys.modules)))"
    )
    seconds, *heavy = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not heavy and float(seconds) < 1  # .05 on a free core


NEW_NAMES = """
import sys
from drl_toolkit.algorithms import names

names.ADVANTAGES['signs'] = 'my_method:signs'
names.SURROGATES['plain'] = names.SurrogatePlace('my_method:Plain', ('path',))
names.STRATEGIES['backwards'] = 'my_method:Backwards'

from drl_toolkit.recipes.options import parse_train_options, said_fields

words = ['clip', '--advantage', 'signs', '--surrogate', 'plain', '--strategy', 'backwards']
said = said_fields(parse_train_options(words))
assert 'torch' not in sys.modules and 'my_method' not in sys.modules

import my_method, torch
from drl_toolkit.algorithms import advantages, objectives
from drl_toolkit.recipes.config import RunConfig
from drl_toolkit.recipes.recipes import make_strategy

config = RunConfig(**said)
assert advantages.ADVANTAGES[config.advantage]() is my_method.signs
assert isinstance(objectives.SURROGATES[config.surrogate](), my_method.Plain)
assert isinstance(make_strategy(config), my_method.Backwards)
for wrong in (dict(surrogate='plain', likelihood='matching'), dict(advantage='sings')):
    try:
        RunConfig(**wrong)
    except ValueError as e:
        print(e)
"""

MY_METHOD = """
from drl_toolkit.algorithms.interfaces import Strategy
from drl_toolkit.algorithms.objectives import Surrogate

def signs(rewards, groups, prompts=None): return (rewards - rewards.mean()).sign()
class Plain(Surrogate): likelihoods = ('path',)
class Backwards(Strategy): pass
"""


def test_a_new_name_on_the_command_line_is_one_line(tmp_path):
    (tmp_path / 'my_method.py').write_text(MY_METHOD)
    (tmp_path / 'run.py').write_text(NEW_NAMES)
    done = subprocess.run([sys.executable, 'run.py'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "likelihood must be 'path' with surrogate 'plain'; got 'matching'"
    assert second.startswith('advantage must be one of') and second.endswith("'signs'; got 'sings'")
