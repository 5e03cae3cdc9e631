"""The benchmark commands: shapes as published, contestants that do the same work, one line for wrong words."""

import contextlib, sys
from dataclasses import replace
from pathlib import Path

import pytest, torch
from diffusers import UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
import against_trl, levers, shapes
from tiers import long


@pytest.mark.parametrize('name, count', dict(sd15=859_520_964, sd2=865_910_724, sdxl=2_567_463_684).items())
def test_shapes_are_the_published_ones(name, count):
    with torch.device('meta'):
        unet, vae = UNet2DConditionModel(**shapes.UNETS[name]), shapes.published_vae(512)
    assert (
        sum(p.numel() for p in unet.parameters()) == count
        and sum(p.numel() for p in vae.parameters()) == 83_653_863
    )


CASE = against_trl.Case('lora', 5.0, 2, 2, samples=2, steps=3)


@pytest.fixture(scope='module')
def folder():
    with against_trl.models('tiny') as found:
        yield found


@pytest.mark.parametrize(
    'name', ['drl_toolkit', 'recorded_graphs', 'floor', pytest.param('compiled', marks=long)]
)
def test_contestants_time_an_epoch(folder, name):
    run = against_trl.CONTESTANTS[name](folder, CASE, 'cpu')
    run()  # compiles, where it does
    assert all(0 < t < 60 for t in run())


def learner(folder, case, device):
    "A stand-in for a contestant: a layer, its gradient, its optimiser's moments, and a view of a weight."
    layer = torch.nn.Linear(64, 64, bias=False, device=device)
    torch.nn.init.eye_(layer.weight)
    view, optimizer = layer.weight.detach()[0], torch.optim.AdamW(layer.parameters(), 0.1)

    def run():
        optimizer.zero_grad()
        layer(torch.ones(4, 64, device=device)).square().sum().backward()
        optimizer.step()
        assert view.data_ptr() == layer.weight.data_ptr()
        return view.sum().item(), layer.weight.grad.sum().item()

    return run


def test_contestants_have_processes_of_their_own_and_hold_memory_in_turns(folder):
    "Nobody holds a byte while another has its turn, and nobody forgets what it had learnt."
    with contextlib.ExitStack() as stack:
        start = lambda make, rests: stack.enter_context(
            against_trl.Contestant(make, folder, CASE, device='cpu', rests=rests)
        )
        one, other = start(learner, True), start(against_trl.ours, True)
        assert len({*one.pool._processes, *other.pool._processes}) == 2 and other.memory_mb > 0
        turns = []
        for _ in range(2):
            assert (one.held(), other.held()) == (0, 0)
            turns.append(one.epoch())
            assert all(0 < t < 60 for t in other.epoch())
    alone = learner(folder, CASE, 'cpu')
    assert [alone() for _ in range(3)][1:] == turns  # the first warmed up


def test_what_does_not_rest_is_seen(folder):
    "By the same count, in this process."
    weight = torch.ones(1000)
    assert sum(s.nbytes() for s in against_trl.storages('cpu')) >= weight.nbytes


def test_operations_are_those_of_the_floor(folder):
    """What an epoch of the bare network really computes, row by row; a LoRA's own product is one of a call,
    not of a row."""
    run = against_trl.bare(folder, CASE, 'cpu', sizes=(1,))
    with against_trl.counted() as counter:
        run()
    assert against_trl.operations(folder, CASE) == pytest.approx(counter.get_total_flops(), rel=1e-9)


def by_hand(network, call):
    """Operations of a forward and of its backward pass where all weights are trained: of each layer from its
    shapes, of each attention from its length."""
    forward = backward = 0

    def count(module, args, out):
        nonlocal forward, backward
        x, weight = args[0], module.weight
        once = (
            2 * weight.numel() * (out.numel() // weight.shape[0])
        )  # every weight meets every place of the output once
        forward, backward = forward + once, backward + once * (1 + x.requires_grad)

    def attend(query, key, value, **rest):
        nonlocal forward, backward
        rows, heads, length, width = query.shape
        once = (
            2 * rows * heads * length * key.shape[2] * width
        )  # a product with the keys, and one with the values
        forward, backward = forward + 2 * once, backward + 4 * once
        return attention(query, key, value, **rest)

    attention = torch.nn.functional.scaled_dot_product_attention
    layers = [m for m in network.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, 'scaled_dot_product_attention', attend)
        call()
    for handle in handles:
        handle.remove()
    return forward, backward


def test_operations_are_those_of_first_principles(folder):
    "Without torch's counter, whose list of attention kernels differs from version to version."
    case = replace(CASE, train='full')
    policy, batch, rows = against_trl.network(folder, case, 'cpu')
    forward, backward = by_hand(policy.network, lambda: batch(1, True))
    assert against_trl.operations(folder, case) == rows * (2 * forward + backward)


@pytest.mark.parametrize(
    'module, words, says',
    [
        (against_trl, '--who trl floor', 'who is trl floor'),
        (against_trl, '--samples 4 --batches 3', '4 samples are no multiple of 3'),
        (against_trl, '--who recorded_graphs --batches 1', 'recorded_graphs needs 16'),
        (against_trl, '--samples 0', '0 is not a positive whole number'),
        (against_trl, '--samples 1', 'samples is 1; 2 or more'),
        (levers, '--only compile,warp', "only names 'warp'"),
        (levers, '--samples 6', 'samples is 6'),
    ],
)
def test_wrong_words_are_told(module, words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark', *words.split(), '--out', str(tmp_path / 'found.json')])
    with pytest.raises(SystemExit, match='2'):
        module.main()
    assert says in capsys.readouterr().err


def test_a_place_that_is_not_there_is_told_at_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark', '--out', 'nowhere/found.json'])
    with pytest.raises(SystemExit, match='2'):
        against_trl.main()
    assert 'its folder does not exist' in capsys.readouterr().err
