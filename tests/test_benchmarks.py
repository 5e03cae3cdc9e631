"""The benchmark commands: shapes as published, contestants that do the same work, one line for wrong words."""
import sys
from pathlib import Path

import pytest, torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent / 'benchmarks'))
import against_trl, levers, shapes
from forms import long

@pytest.mark.parametrize('name, count', dict(sd15=859_520_964, sd2=865_910_724, sdxl=2_567_463_684).items())
def test_shapes_are_the_published_ones(name, count):
    with torch.device('meta'): unet, codec = UNet2DConditionModel(**shapes.UNETS[name]), shapes.codec(512)
    assert sum(p.numel() for p in unet.parameters()) == count and sum(p.numel() for p in codec.parameters()) == 83_653_863

CASE = against_trl.Case('lora', 5., 2, 2, samples=2, steps=3)

@pytest.fixture(scope='module')
def folder():
    with against_trl.models('tiny') as found: yield found

@pytest.mark.parametrize('name', ['drl_toolkit', 'kept_graphs', 'floor', pytest.param('compiled', marks=long)])
def test_contestants_time_an_epoch(folder, name):
    run = against_trl.CONTESTANTS[name](folder, CASE, 'cpu')
    run()                                                                      # compiles, where it does
    assert all(0 < t < 60 for t in run())

def test_contestants_have_processes_of_their_own(folder):
    "And memory, threads and allocators of their own."
    with against_trl.Contestant(against_trl.ours, folder, CASE, device='cpu') as one, against_trl.Contestant(against_trl.bare, folder, CASE, device='cpu') as other:
        assert len({*one.pool._processes, *other.pool._processes}) == 2
        assert all(0 < t < 60 for c in (one, other) for t in c.epoch()) and one.memory_mb > 0

def test_operations_are_those_of_the_floor(folder):
    run = against_trl.bare(folder, CASE, 'cpu', sizes=(1, 4))
    with FlopCounterMode(display=False) as counter: run()
    assert against_trl.operations(folder, CASE) == pytest.approx(counter.get_total_flops(), rel=.03)      # attention is counted in another form on the meta device

@pytest.mark.parametrize('module, words, says', [
    (against_trl, '--who trl floor', 'who is trl floor'), (against_trl, '--samples 4 --batches 3', '4 samples are no multiple of 3'),
    (against_trl, '--who kept_graphs --batches 1', 'kept_graphs needs 16'), (against_trl, '--samples 0', '0 is not a positive whole number'), (against_trl, '--samples 1', 'samples is 1; 2 or more'),
    (levers, '--only compile,warp', "only names 'warp'"), (levers, '--samples 6', 'samples is 6')])
def test_wrong_words_are_told(module, words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark', *words.split(), '--out', str(tmp_path / 'found.json')])
    with pytest.raises(SystemExit, match='2'): module.main()
    assert says in capsys.readouterr().err

def test_a_place_that_is_not_there_is_told_at_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark', '--out', 'nowhere/found.json'])
    with pytest.raises(SystemExit, match='2'): against_trl.main()
    assert 'its folder does not exist' in capsys.readouterr().err
