"""Fine-tune text-to-image diffusion models with reinforcement learning, and see what happens.

The names of the first page are imported when they are used: `import drl_toolkit` loads neither torch nor diffusers."""
__version__ = "0.1.0"

from importlib import import_module

_HOMES = dict(Policy='sampling.policy', rollout='sampling.rollout', reward='rewards.reward', Task='prompts.task',
              Trainer='training.trainer', TrainConfig='training.trainer', load_demo='emoji.world')
__all__ = ['__version__', *_HOMES]

def __getattr__(name):
    if name not in _HOMES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)

def __dir__(): return sorted([*globals(), *_HOMES])
