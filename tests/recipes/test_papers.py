"The two papers' recipes against what the papers say: each number is typed here from the paper, not from our code."

from dataclasses import replace

import pytest, torch

from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.recipes.config import RunConfig, preset_name, recipe_config
from drl_toolkit.recipes.custom import only_tasks
from drl_toolkit.recipes.papers import FOUR_TONES, four_tones
from drl_toolkit.recipes.recipes import load_recipe, make_trainer, with_prompts
from drl_toolkit.rewards.reward import reward

PINTEREST = dict(  # arXiv 2401.12244, Table 6, and the released code
    num_steps=50,
    eta=1.0,
    guidance_scale=7.0,
    train='full',
    lr=2e-6,
    lr_end=1.0,
    weight_decay=0.01,
    beta2=0.999,
    grad_clip=0.0,
    clip_range=1e-4,
    advantage_clip=10.0,
    train_steps=5,
    shared_timesteps=True,
    minibatch_by='timestep',
    inner_epochs=1,
    max_nonfinite=1.0,
    likelihood='path',
    surrogate='ppo',
    kl_weight=0.0,
    ema_decay=0.0,
    data_weight=1.0,
    data_mode='step',
    data_batch=2048,
    on_nonfinite='skip',
)
B2 = dict(  # hu-zijing/B2-DiffuRL, run_process.sh and run_train.py
    num_steps=20,
    guidance_scale=5.0,
    train='lora',
    lora_rank=4,
    lr=1e-4,
    weight_decay=1e-4,
    grad_clip=1.0,
    epochs=100,
    progressive=0.7,
    branching=True,
    grow=True,
    train_steps=0,
    minibatch_by='sample',
    minibatch_size=128,
    inner_epochs=2,
    clip_range=0.1,
    kl_weight=0.0,
)


@pytest.mark.parametrize('name, said', [('large_scale', PINTEREST), ('b2', B2)])
def test_the_preset_has_the_papers_numbers(name, said):
    config = load_recipe(name, 'paper').config
    assert {field: getattr(config, field) for field in said} == said


def test_the_emoji_size_differs_from_the_paper_in_what_is_said_only():
    sizes = {'epochs', 'num_steps', 'guidance_scale', 'precision', 'checkpointing', 'lr', 'clip_range'}
    sizes |= {'data', 'data_batch', 'lora_rank'}
    for name in ('large_scale', 'b2'):
        own, paper = recipe_config(name), recipe_config(preset_name(name, 'paper'))
        differ = {f for f in vars(own) if getattr(own, f) != getattr(paper, f)}
        assert differ <= sizes, f'{name}: {differ - sizes}'


def test_every_task_of_the_first_paper_is_normalised_over_its_batch_and_has_no_window():
    for preset in ('', 'paper'):
        tasks = load_recipe('large_scale', preset).tasks
        assert [t.name for t in tasks] == ['preference', 'fairness', 'composition']
        values = torch.tensor([1.0, 2, 3, 6])
        for task in tasks:
            z = (values - values.mean()) / values.std(correction=0)
            assert torch.allclose(task.advantage(values, groups=None, prompts=None), z.float(), atol=1e-6)
            assert task.window is None
        assert [t.group_size for t in tasks] == [1, 16, 1]
        assert len({t.samples for t in tasks}) == 1  # as many images of each


def test_b2_keeps_the_extremes_of_a_branch_group_by_z_scores_of_the_prompt():
    "One prompt, two groups of five: by hand, with the unbiased deviation."
    advantage = load_recipe('b2').tasks[0].advantage
    values = torch.tensor([0.0, 1, 2, 3, 4, 2, 2, 2, 2, 2])
    groups = torch.arange(2).repeat_interleave(5)
    z = (values - values.mean()) / values.std(correction=1)
    found = advantage(values, groups=groups, prompts=['a'] * 10)
    kept = torch.tensor([1, 0, 0, 0, 1] + [0] * 5).bool()  # 2 is the mean: neither half above nor below
    assert torch.allclose(found, torch.where(kept, z, 0.0), atol=1e-6)


def test_four_tones_are_the_angle_s_classes():
    import math

    angle = torch.tensor([60.0, 45, 35, 20, 0, -60])  # degrees: above 41, 41 to 28, 28 to 10, below
    radians = angle * math.pi / 180
    lab = torch.stack([50 + 20 * radians.sin(), torch.zeros(6), 20 * radians.cos()], 1)
    assert [FOUR_TONES[i] for i in four_tones(lab)] == [
        'light',
        'light',
        'intermediate',
        'tan',
        'dark',
        'dark',
    ]


@reward
def brightness(images, prompts):
    return images.mean((1, 2, 3))


def group_brightness(name):
    from drl_toolkit.rewards.reward import Reward

    return Reward(lambda images, prompts: images.mean().expand(len(images)), name, 'group')


@pytest.mark.parametrize('name', ['large_scale', 'b2'])
def test_the_preset_trains_a_tiny_model_of_the_same_shape(name):
    "All of the paper's numbers but the images of an epoch and the reward models."
    recipe = load_recipe(name, 'paper')
    prompts = ['a cat', 'a dog', 'a horse']

    def smaller(task):
        judge = group_brightness(task.name) if task.reward.level == 'group' else brightness.named(task.name)
        size = dict(group_size=4, samples=4) if task.group_size == 16 else dict(samples=task.group_size * 2)
        return replace(task, prompts=prompts, reward=judge, **size)

    config = replace(recipe.config, data_batch=2, micro_batch=16, epochs=1)
    trainer = make_trainer(config, [smaller(t) for t in recipe.tasks], model=tiny_sd(), callbacks=[])
    before = [p.detach().clone() for p in trainer.params]
    (record,) = trainer.fit()
    assert set(record['tasks']) == {t.name for t in recipe.tasks}
    assert any((a != b).any() for a, b in zip(before, trainer.params))
    for metrics in record['tasks'].values():
        assert abs(metrics['ratio_error']) < 1e-3


def test_presets_and_tasks_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="recipe must be large_scale or b2 with preset 'paper'; got 'joint'"):
        load_recipe('joint', 'paper')
    with pytest.raises(ValueError, match="preset must be one of paper; got 'huge'"):
        load_recipe('b2', 'huge')
    tasks = load_recipe('large_scale').tasks
    assert [t.name for t in only_tasks(tasks, 'composition, preference')] == ['preference', 'composition']
    with pytest.raises(ValueError, match="only must be of the recipe's tasks .*; got 'beauty'"):
        only_tasks(tasks, 'beauty')


def test_a_file_of_prompts_takes_the_place_of_the_streamed_ones(tmp_path):
    "The first paper's preference prompts come from DiffusionDB; the other tasks keep their own."
    file = tmp_path / 'prompts.txt'
    file.write_text('a red house\na blue house\n')
    tasks = load_recipe('large_scale', 'paper').tasks
    mine = with_prompts(tasks, file)
    assert set(mine[0].prompts.take(2)) == {'a red house', 'a blue house'}
    assert mine[1].prompts == tasks[1].prompts and mine[2].prompts == tasks[2].prompts
    with pytest.raises(ValueError, match='this recipe has 3 tasks'):
        with_prompts(load_recipe('joint').tasks, file)


def test_the_presets_are_valid_configurations():
    for name in ('large_scale_paper', 'b2_paper'):
        assert isinstance(recipe_config(name), RunConfig)
