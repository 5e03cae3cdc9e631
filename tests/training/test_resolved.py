"What a run keeps of the values that its configuration left to the model."

import json, math

import pytest

from drl_toolkit.cli.main import main
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.recipes.config import RunConfig
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.training.config import TrainConfig
from drl_toolkit.training.policy_gradient import PolicyGradient
from drl_toolkit.training.resolved import resolved


def clip_of(dims):
    "The clip of a ratio of mean log-probs that is 1e-4 at Stable Diffusion's 16,384 dimensions, at others."
    return math.expm1(math.log1p(1e-4) * 16384 / dims)


@pytest.mark.parametrize(
    'train, alpha, expected', [('lora', 0, (8, 8.0)), ('lora', 2, (8, 2.0)), ('full', 0, (0, 0.0))]
)
def test_automatic_values_are_those_that_are_used(train, alpha, expected):
    policy = Policy(tiny_sd(), num_steps=4, train=train, lora_rank=8, lora_alpha=alpha)
    found = resolved(policy, PolicyGradient(TrainConfig(), policy))
    dims = math.prod(policy.latent_shape)
    assert found.dims == dims and found.num_steps == 4 and found.scheduler == 'DDIMScheduler'
    assert found.clip_low == found.clip_high == pytest.approx(clip_of(dims))  # 1.64 nats of the sum
    assert (found.lora_rank, found.lora_alpha) == expected
    with pytest.raises(AttributeError):
        found.clip_low = 1.0


def test_a_run_keeps_them_and_resumes(tmp_path):
    words = 'train compressibility --samples 2 --train-steps 1 --frames 0 --out'.split() + [
        str(tmp_path / 'r')
    ]
    assert main([*words, '--epochs', '1']) == 0
    about = json.loads((tmp_path / 'r/config.json').read_text())
    assert about['config']['clip_range'] == RunConfig().clip_range == 0
    assert about['resolved']['clip_low'] == pytest.approx(clip_of(1024))
    assert about['resolved']['lora_rank'] == 0  # the recipe trains all weights
    assert main([*words, '--epochs', '2', '--resume']) == 0
    assert json.loads((tmp_path / 'r/config.json').read_text())['resolved'] == about['resolved']
