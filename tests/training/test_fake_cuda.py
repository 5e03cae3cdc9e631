"""Training, sampling and checkpoints on a GPU that is not there: no operation mixes tensors of both sides,
and the numbers are the CPU's."""

import pytest, torch
from diffusers import DDIMScheduler

from drl_toolkit.rewards.composition import shipped_detector
from drl_toolkit.rewards.fairness import shipped_reader
from drl_toolkit.rewards.lab import check_reward
from drl_toolkit.rewards.reward import Reward
from drl_toolkit.sampling.rollout import rollout
from drl_toolkit.sampling.transitions import transition
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.recipes.recipes import composition_task, fairness_task, make_trainer, preference_task
from drl_toolkit.recipes.methods import METHODS, method_fields
from drl_toolkit.recipes.config import RunConfig
from drl_toolkit.runs.run import Run
from drl_toolkit.runs.recorder import Recorder, resume
from drl_toolkit.emoji.tiny import tiny_flux, tiny_pixart, tiny_sd, tiny_sd3, tiny_sdxl
from drl_toolkit.emoji.world import load_demo
from fake_cuda import CUDA, Far, fake_cuda
from tiers import long, some
from test_every_reward import ASKED, GROUPS, SAMPLES, pictures
from test_methods import trainer


def test_the_device_refuses_what_a_gpu_refuses():
    with fake_cuda():
        there, here = torch.ones(3, device='cuda'), torch.ones(3)
        assert (
            there.device == CUDA
            and (there * 2).device == CUDA
            and there.to('cpu').device.type == 'cpu'
            and here.to(there).device == CUDA
        )
        for mixed in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: here[there.long()],
            lambda: torch.where(there > 0, here, there),
            lambda: torch.nn.Linear(3, 1)(there),
        ):
            with pytest.raises(RuntimeError, match='same device'):
                mixed()
        for none in (there.numpy, there.__array__):
            with pytest.raises(TypeError, match='cpu'):
                none()
        with pytest.raises(TypeError, match='float64'):
            there.double()
        assert (
            (there + torch.tensor(1.0)).tolist() == [2, 2, 2]
            and there[torch.tensor([0, 2])].device == CUDA
            and here.copy_(there).device.type == 'cpu'
        )


def test_gradients_go_there_and_back():
    x = torch.arange(3.0).requires_grad_()
    with fake_cuda():
        layer = torch.nn.Linear(3, 2).to('cuda')
        layer(x.to('cuda')).square().sum().cpu().backward()
        assert (
            isinstance(layer.weight, Far)
            and isinstance(layer.weight.grad, Far)
            and x.grad.device.type == 'cpu'
        )
        before = layer.weight.cpu()
        torch.optim.AdamW(layer.parameters()).step()
        assert not torch.equal(before, layer.weight.cpu())


def tiny_trainer(device, name='ppo', **more):
    "Four steps and eight images."
    return trainer(
        name, samples=8, model=tiny_sd().to(device), **dict(epochs=1, num_steps=4, lr=RunConfig.lr) | more
    )


def same_epochs(make, *metrics):
    "What is trained there has the metrics of what is trained here."
    here = make('cpu').fit()
    with fake_cuda():
        far = make('cuda')
        there = far.fit()
    assert far.policy.device == CUDA and all(isinstance(p, Far) for p in far.params)
    for a, b in zip(here, there):
        for task in a['tasks']:
            for name in metrics:
                assert b['tasks'][task][name] == pytest.approx(a['tasks'][task][name], rel=2e-3, abs=1e-5), (
                    name
                )


@pytest.mark.parametrize('name', some(METHODS, ('b2', 'nft', 'refl_data')))
def test_every_method_trains(name):
    more = dict(back_steps=4) if method_fields(name).get('back_steps') == 5 else {}
    same_epochs(lambda device: tiny_trainer(device, name, **more), 'reward', 'grad_norm')


OPTIONS = [
    dict(train='lora', kl_weight=0.1, kl_target=1e-6, data_weight=0.1, data='base', ema_decay=0.5),
    dict(train='full', base_decay=0.5, checkpointing=True, latents_dtype='bf16', offload=True),
    dict(num_minibatches=1, reuse_graphs=True, measure_every=0),
    dict(train='lora', train_text_encoder=True, guidance_scale=3.0),
]


@pytest.mark.parametrize('more', some(OPTIONS, OPTIONS[1:2]))
def test_options(more):
    same_epochs(lambda device: tiny_trainer(device, **more), 'reward', 'grad_norm')


@pytest.mark.parametrize('build', [tiny_sdxl, tiny_sd3, tiny_flux, tiny_pixart])
def test_every_pipeline_samples_and_is_replayed(build):
    told = dict(num_steps=3, guidance_scale=3.0, train='full')
    here = rollout(Policy(build(), **told), ['a cat', 'a dog'])
    with fake_cuda():
        policy = Policy(build().to('cuda'), **told)
        there = rollout(policy, ['a cat', 'a dog'])
        again = policy.transition(
            there.latents[0],
            torch.zeros(2, dtype=torch.long, device='cuda'),
            policy.encode(['a cat', 'a dog']),
        ).log_prob(there.latents[1])
        again.sum().backward()
    assert torch.allclose(here.images, there.images.cpu(), atol=1e-4) and torch.allclose(
        there.log_probs[0].cpu(), again.detach().cpu(), atol=1e-4
    )


@pytest.fixture
def readers():
    "The shipped readers go where the images are; nobody else shall find them there."
    yield
    shipped_reader.cache_clear()
    shipped_detector.cache_clear()


@long
def test_the_three_rewards_of_the_joint_recipe(readers):
    def make(device):
        config = RunConfig(
            epochs=1,
            num_steps=2,
            train_steps=1,
            likelihood='matching',
            kl_weight=0.1,
            warmup=0,
            lr=1e-9,
            train='full',
        )
        return make_trainer(
            config,
            [fairness_task(16), composition_task(4), preference_task(4)],
            load_demo().to(device),
            callbacks=[],
        )

    same_epochs(make, 'reward')


EVERY = SAMPLES | GROUPS


@pytest.mark.filterwarnings('ignore:reward .* gave')
@pytest.mark.parametrize(
    'name',
    some(
        EVERY,
        [
            'fairness',
            'composition',
            'preference',
            'clip_score',
            'balance by classifier',
            'balance by prompts',
            'detection by owl',
            'diversity',
            'jpeg_compressibility',
        ],
    ),
)
def test_every_reward_judges_there(name, tmp_path_factory, readers):
    make, asked = (
        lambda: EVERY[name](lambda: tmp_path_factory.mktemp('model')),
        [f'a sign that says "{p}"' for p in ASKED] if name == 'text' else ASKED,
    )
    torch.manual_seed(0)
    here = make()(pictures(), asked)
    torch.manual_seed(0)
    with fake_cuda():
        there = make()(pictures().to('cuda'), asked)
    assert isinstance(there, Far) and torch.allclose(there.elem, here, atol=1e-4)


def test_what_is_for_looking_works_there():
    "A step's distribution from the first page, and the lab's report of a reward."
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    noisy = Reward(lambda x, p: x.mean((1, 2, 3)) + 0.01 * x.flatten(1).std(1), 'mean')
    scheduler, x = DDIMScheduler(), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(10)
    looked = lambda device: transition(scheduler, x.to(device), 600, x.to(device)).log_prob(x.to(device))
    report = lambda images: check_reward(noisy, images, ['a cat', 'a dog'] * 2, others=[])
    here = looked('cpu'), report(images)
    with fake_cuda():
        assert torch.allclose(looked('cuda').cpu(), here[0], atol=1e-6)
        there = report(images.to('cuda'))
    assert torch.allclose(there.values, here[1].values) and there.noise_share == here[1].noise_share == 0
    assert there.problems == here[1].problems and there.ties == pytest.approx(here[1].ties)


@pytest.mark.parametrize('train', some(['lora', 'full'], ['full']))
def test_a_run_begun_there_goes_on_here(tmp_path, train):
    "Checkpoints, sheets and the weights at the end are written from there, and read on both sides."
    with Run.create(tmp_path / 'r', {}) as run, fake_cuda():
        there = tiny_trainer('cuda', epochs=2, train=train)
        there.callbacks.append(Recorder(run, ['a cat'], every=1))
        there.fit(epochs=1)
    weights = {name: p.cpu() for name, p in there.policy.named_parameters().items()}
    for device in ('cpu', 'cuda'):
        with Run.open(tmp_path / 'r') as run, fake_cuda():
            taken_up = tiny_trainer(device, epochs=2, train=train)
            assert resume(taken_up, run) == 1 and all(
                torch.equal(p.cpu(), weights[name]) for name, p in taken_up.policy.named_parameters().items()
            )
            taken_up.fit()
    assert list((tmp_path / 'r' / 'weights').rglob('*.safetensors'))
