"What is given away of a run: what training added to its base, in 8 bits, and what a page shows."

import json, shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.runs.models import open_policy
from drl_toolkit.runs.recordings import recorded_epochs, slim_copy
from drl_toolkit.runs.run import Run
from drl_toolkit.sampling.loading import base_of
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.sampling.rollout import rollout
from drl_toolkit.sampling.saving import save_parts
from drl_toolkit.ui.pairs import film, most_changed, pairs_of, save_film
from drl_toolkit.ui.pages import sheets
from drl_toolkit.utils.files import check_manifest
from drl_toolkit.utils.loading import assets_dir, recorded_run
from panel import add_ballot, make_run
from panel import quick  # noqa: F401 (a fixture)


@pytest.fixture
def trained(tmp_path):
    "A run of full weights, with images, a ballot and a checkpoint."
    tiny_sd().save_pretrained(tmp_path / 'base')
    policy = Policy.from_pretrained(tmp_path / 'base', num_steps=2, train='full')
    torch.manual_seed(0)
    for p in policy.parameters():
        p.data += 0.02 * torch.randn_like(p)
    add_ballot(make_run(tmp_path / 'runs/r', epochs=6))
    run = Run.open(tmp_path / 'runs/r')
    (run.folder / 'checkpoints/epoch_0006').mkdir(parents=True)
    policy.save(run.folder / 'weights', base=str(tmp_path / 'base'))
    about = json.loads((run.folder / 'config.json').read_text())
    about['model'] = str(tmp_path / 'base')
    (run.folder / 'config.json').write_text(json.dumps(about))
    return run.folder, policy


def test_a_small_copy_draws_what_the_run_draws(trained, tmp_path):
    "Its folder holds what was added to the network alone, and no weight is off by more than half of its row's step."
    folder, policy = trained
    small = slim_copy(folder, tmp_path / 'small', small=True)
    assert sorted(p.name for p in small.iterdir()) == [
        'config.json',
        'eval',
        'frames',
        'metrics.jsonl',
        'samples',
        'weights',
    ]
    assert not (small / 'eval/ballot').exists()
    assert {p.parent.name for p in small.glob('weights/*/*.safetensors')} == {'unet'}
    assert [p.name for p in small.glob('weights/*/*.safetensors')] == ['difference.safetensors']
    again = open_policy(str(small), num_steps=2, device='cpu')
    base_policy = Policy.from_pretrained(tmp_path / 'base', num_steps=2, train='full')
    for (name, p), (_, q) in zip(
        policy.named_parameters().items(), again.named_parameters().items(), strict=True
    ):
        added = p.data - base_policy.named_parameters()[name].data
        largest = added.abs().flatten(1).amax(1) if p.ndim > 1 else added.abs().max()
        step = (largest / 127).view(-1, *[1] * (p.ndim - 1))
        assert ((p - q).abs() <= 0.5 * step + 1e-6).all() and (p - q).abs().max() > 0, name
    assert Path(base_of(small / 'weights')).resolve() == (tmp_path / 'base').resolve()
    before, after = (rollout(each, ['a cat'], seed=0).images for each in (policy, again))
    base = rollout(Policy.from_pretrained(tmp_path / 'base', num_steps=2), ['a cat'], seed=0).images
    off, moved = ((before - other).abs() for other in (after, base))
    print(f'off by {off.mean():.5f}, moved by {moved.mean():.5f}')
    assert off.mean() < 0.03 * moved.mean() and moved.max() > 0.01
    (small / 'weights/unet/difference.safetensors').rename(small / 'weights/unet/x.safetensors')
    with pytest.raises(ValueError, match='missing'):
        open_policy(str(small), device='cpu')


def test_a_small_copy_is_added_to_its_own_base_alone(trained, tmp_path):
    "To another it would be noise. Where the base is elsewhere, the parts are written whole."
    folder, policy = trained
    small = slim_copy(folder, tmp_path / 'small', small=True)
    other = tiny_sd(seed=1)
    other.save_pretrained(tmp_path / 'other')
    with pytest.raises(ValueError, match='difference to another base'):
        Policy.from_pretrained(small / 'weights', base=tmp_path / 'other')
    file = small / 'weights/unet/difference.safetensors'
    whole = file.read_bytes()
    for damaged in (whole[:-9], whole.replace(b'"base"', b'"ease"'), b''):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match='cannot be read'):
            Policy.from_pretrained(small / 'weights')
    shutil.rmtree(tmp_path / 'base/unet')
    (tmp_path / 'whole').mkdir()
    assert save_parts(folder / 'weights', tmp_path / 'whole') == ['unet']
    other.unet = type(other.unet).from_pretrained(tmp_path / 'whole/unet')
    for mine, theirs in zip(policy.parameters(), other.unet.parameters(), strict=True):
        assert torch.equal(mine.half().float(), theirs)


def test_a_copy_of_a_lora_finds_its_base_from_where_it_lies(tmp_path):
    "The note of a base is relative to the folder of the weights, and a copy may lie deeper or less deep."
    tiny_sd().save_pretrained(tmp_path / 'base')
    make_run(tmp_path / 'runs/r', epochs=1)
    policy = Policy.from_pretrained(tmp_path / 'base', num_steps=2)
    policy.save(tmp_path / 'runs/r/weights', base=str(tmp_path / 'base'))
    for place in ('copy', 'some/where/else'):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        copy = slim_copy(tmp_path / 'runs/r', tmp_path / place)
        assert Path(base_of(copy / 'weights')).resolve() == (tmp_path / 'base').resolve()
        check_manifest(copy / 'weights')


def test_a_small_copy_keeps_every_other_epoch_and_all_sheets(trained, tmp_path):
    folder, _ = trained
    small = Run.open(slim_copy(folder, tmp_path / 'small', small=True))
    assert recorded_epochs(Run.open(folder)) == [0, 1, 2, 3, 4, 5] and recorded_epochs(small) == [0, 2, 4, 5]
    assert sorted(sheets(small)) == [0, 6] and {p.suffix for p in sheets(small).values()} == {'.webp'}
    one, other = (
        np.asarray(Image.open(sheets(Run.open(f))[6]).convert('RGB'), float) for f in (folder, small.folder)
    )
    assert np.abs(one - other).mean() < 6


def test_a_film_has_a_frame_for_each_sheet(tmp_path):
    "Of each prompt the seed that changed most, at its place of every sheet."
    run = Run.open(assets_dir() / 'runs/joint')
    found, frames = pairs_of(run), film(run, columns=3, scale=1)
    chosen = most_changed(found)
    assert len(frames) == len(found.epochs) and len(chosen) == len({p.prompt for p in found.pairs})
    for pair in chosen:
        assert pair.change == max(p.change for p in found.pairs if p.prompt == pair.prompt)
    save_film(frames, tmp_path / 'film.webp', seconds=0.5)
    with Image.open(tmp_path / 'film.webp') as image:
        assert image.n_frames == len(frames) and image.info['loop'] == 0
    with pytest.raises(ValueError, match='two sheets'):
        film(make_run(tmp_path / 'r', epochs=1, sheets=False))


def test_a_recorded_run_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recorded_run('recorded/joint') == str(assets_dir() / 'runs/joint')
    for name in ('demo', 'joint', 'recorded/nothing', 'recorded/../clip', 'recorded/'):
        assert recorded_run(name) == name
    (tmp_path / 'recorded/joint').mkdir(parents=True)
    assert recorded_run('recorded/joint') == 'recorded/joint'


def test_what_travels_with_the_package_is_small():
    assert sum(p.stat().st_size for p in assets_dir().rglob('*') if p.is_file()) < 40e6


def test_the_recorded_run_is_of_the_recipe_as_it_is():
    "Its configuration is what `drl train joint --minutes 0` begins with today, and it holds weights and an evaluation."
    from drl_toolkit.recipes.recipes import recipe_config

    run = Run.open(assets_dir() / 'runs/joint')
    now = asdict(recipe_config('joint'))
    then = {k: v for k, v in run.config.items() if k != 'minutes'}
    assert then == {k: v for k, v in now.items() if k in then}
    assert (run.folder / 'weights/unet').is_dir() and (run.folder / 'eval/table.md').is_file()
