"""Callbacks that look on: what a training depends on, before and after somebody looked at it, within one run.

Two runs need not agree to the bit on every processor."""

import copy

import torch

from drl_toolkit.runs.recorder import named_state
from drl_toolkit.runs.state import optimizer_tensors
from drl_toolkit.training.callbacks import Callback

HOOKS = ('before_fit', 'after_sample', 'after_plan', 'after_epoch', 'after_fit')


def copied(tensors):
    return {n: t.detach().clone() for n, t in tensors.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def weights_and_moments(trainer):  # two dicts, name -> tensor, as in a checkpoint
    named = named_state(trainer)
    return copied(named), copied(optimizer_tensors(trainer.optimizer, {p: n for n, p in named.items()}))


class EachEpoch(Callback):
    "Keeps a copy of the weights and moments after each epoch, by the number of epochs done."

    def __init__(self):
        self.seen = {}

    def after_epoch(self, trainer, record):
        self.seen[trainer.epoch] = weights_and_moments(trainer)


def everything(trainer, args):
    """All that the rest of a training depends on: tensors, and other things that can be compared.

    No global random state: a resume is exact without."""
    weights, moments = weights_and_moments(trainer)
    rows = [row for arg in args if isinstance(arg, list) for row in arg if isinstance(row, dict)]
    learnt_from = {
        f'{i}/{k}': v for i, row in enumerate(rows) for k, v in row.items() if isinstance(v, torch.Tensor)
    }
    gradients = {f'gradient/{i}': p.grad for i, p in enumerate(trainer.params) if p.grad is not None}
    tensors = weights | moments | copied(learnt_from | gradients)
    modes = [
        (m.training, [p.requires_grad for p in m.parameters(False)]) for m in trainer.policy.network.modules()
    ]
    return tensors, (copy.deepcopy(trainer.state_dict()), modes)


def without(state, prefixes):  # prefixes: a tuple, of which an empty one begins no name
    "The same without the figures that a callback may add to the record of an epoch."
    first, modes = state
    return first | dict(
        history=[{k: v for k, v in row.items() if not k.startswith(prefixes)} for row in first['history']]
    ), modes


def onlooker(
    callback: Callback,  # none of its hooks may change what the training depends on
    adds: tuple = (),  # beginnings of the figures that it adds to the record
) -> Callback:  # the same, which checks that
    def checked(hook):
        def called(trainer, *args):
            tensors, state = everything(trainer, args)
            hook(trainer, *args)
            after, state_after = everything(trainer, args)
            assert same(tensors, after) and without(state, adds) == without(state_after, adds), (
                hook.__qualname__
            )
            callback.looked += 1

        return called

    callback.looked = 0
    for name in HOOKS:
        setattr(callback, name, checked(getattr(callback, name)))
    return callback
