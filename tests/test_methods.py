"Every method of the table trains a tiny Stable Diffusion with random weights, and its reward rises."
import pytest, torch

from drl_toolkit.prompts import Task
from drl_toolkit.recipes import METHODS, RunConfig, make_trainer, method_fields
from drl_toolkit.rewards import reward
from drl_toolkit.tiny import tiny_sd

@reward
def warmth(images, prompts): return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))

def trainer(name, epochs=7, **more):
    "Five steps, two prompts, families of four."
    told = dict(epochs=epochs, num_steps=5, train_steps=0, updates=2, lr=3e-3, warmup=0, train='full', seed=1) | method_fields(name) | more
    return make_trainer(RunConfig(**told), [Task('warm', ['a cat', 'a dog'], warmth, group_size=4, samples=32)], tiny_sd(), callbacks=[])

@pytest.mark.parametrize('name', METHODS)
def test_the_reward_rises(name):
    t = trainer(name)
    before = [p.detach().clone() for p in t.params]
    rewards = [row['tasks']['warm']['reward'] for row in t.fit()]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2
    assert any(not torch.equal(a, b) for a, b in zip(before, t.params))
    assert all(row['tasks']['warm']['ratio_error'] == 0 and row['evaluations'] > 0 for row in t.history)
