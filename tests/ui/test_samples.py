"Samples of an epoch, and the command that draws one again."

import io, json, shlex

import httpx, numpy as np, pytest
from PIL import Image

from drl_toolkit.runs.recordings import read_frames
from drl_toolkit.runs.run import Run
from drl_toolkit.ui import samples
from drl_toolkit.utils.loading import assets_dir
from browsing import violations, wait_for_address
from panel import make_run, serving
from panel import quick  # noqa: F401 (a fixture)
from tiers import some


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('samples') / 'runs'
    make_run(home / 'joint', epochs=3)
    return home


@pytest.fixture(scope='module')
def panel(home):
    with serving(home) as (address, _):
        yield address


def test_all_that_was_kept_is_shown(home):
    run = Run.open(home / 'joint')
    frames = read_frames(run, 2)
    for found, task in zip(samples.samples_of(run, frames), frames.tasks.values(), strict=True):
        assert {s.index for s in found.samples} == set(task.shown) and found.drawn == len(task.samples)
        assert [s.reward for s in found.samples] == sorted((s.reward for s in found.samples), reverse=True)
        for s in found.samples:
            row = task.samples.loc[s.index]
            assert (s.prompt, s.seed, s.advantage) == (row.prompt, row.seed, row.advantage)
        assert {s.index for s in found.samples if s.path} == {p.sample for p in task.paths}


@pytest.mark.parametrize(
    'values', [[], [np.nan], [1.0], [1.0, 1.0], [0.0, 1.0, np.nan, np.inf], list(range(500))]
)
def test_a_histogram_counts_what_is_finite(values):
    values = np.array(values, float)
    bars = samples.histogram(values, values[:3])
    assert sum(b.count for b in bars) == np.isfinite(values).sum() and len(bars) <= 12
    assert sum(b.kept for b in bars) == np.isfinite(values[:3]).sum()
    assert all(0 <= b.height <= 100 for b in bars)


def test_the_command_draws_the_recorded_picture(tmp_path, monkeypatch, capsys):
    "The last words of the command, run: the base model draws an image of the recorded epoch 0 as it was kept."
    from drl_toolkit.cli.main import main

    run = Run.open(assets_dir() / 'runs/joint')
    frames = read_frames(run, 0)
    task = frames.tasks['composition']
    kept = np.asarray(task.pictures[1], float)
    again = samples.again_of(run, 0, task, 1, len(frames.tasks))
    _, written, drawn = again.command.splitlines()
    line = shlex.split(written)[2]
    assert json.loads(line)['model'] == 'demo' and json.loads(line)['prompt'] == task.samples.prompt[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'again').mkdir()
    (tmp_path / 'again/images.jsonl').write_text(line + '\n')
    assert not main(shlex.split(drawn)[1:])
    image = np.asarray(Image.open(tmp_path / 'again/drawn/0000_00.png').convert('RGB'), float)
    others = [np.abs(np.asarray(task.pictures[i], float) - image).mean() for i in task.shown if i != 1]
    assert np.abs(kept - image).mean() < 8 < min(others)  # WebP's loss, and a model that may be newer


def test_what_cannot_be_drawn_again_has_no_command(home):
    run = Run.open(home / 'joint')
    frames = read_frames(run, 1)
    for task in frames.tasks.values():  # seeds that no run has made, and a branch
        assert samples.again_of(run, 1, task, 0, 2).command == ''


def test_pictures_have_addresses(panel, home):
    shown = lambda **query: httpx.get(f'{panel}/sample', params=dict(run='joint') | query)
    answer = shown(epoch=2, task='fairness', sample=3)
    truth = read_frames(Run.open(home / 'joint'), 2).tasks['fairness'].pictures[3]
    image = Image.open(io.BytesIO(answer.content)).convert('RGB')
    assert np.abs(np.asarray(image, float) - np.asarray(truth, float)).mean() < 6
    for bad in (
        dict(epoch=9, task='fairness', sample=0),
        dict(epoch=2, task='no', sample=0),
        dict(epoch=2, task='fairness', sample=15),
        dict(epoch=2, task='../x', sample=-1),
    ):
        answer = shown(**bad)
        assert answer.status_code == 404 and str(home) not in answer.text


def test_samples_in_a_browser(look, panel):
    page = look(f'{panel}/?run=joint&view=samples', '#samples .sample')
    page.wait_for_selector('#first', state='detached')
    rewards = lambda: page.evaluate(
        "[...document.querySelectorAll('section:not([hidden]) .sample:not([hidden])')].map(s => +s.dataset.reward)"
    )
    page.wait_for_function("document.querySelector('#samples .tally').innerText.includes('8 of 8')")
    assert rewards() == sorted(rewards(), reverse=True) and len(rewards()) == 8
    page.select_option('#samples [name=sort]', 'worst')
    assert rewards() == sorted(rewards())
    page.locator('#samples input[value=up]').check()
    assert 0 < len(rewards()) < 8 and all(r > 0.5 for r in rewards())
    page.locator('#samples input[value=all]').check()
    bar = page.locator('#samples section:not([hidden]) .bars button').last
    low = float(bar.get_attribute('data-low'))
    bar.click()
    assert rewards() and all(r >= low for r in rewards()) and bar.get_attribute('aria-pressed') == 'true'
    bar.click()
    assert len(rewards()) == 8
    page.fill('#samples [name=find]', 'nobody')
    assert rewards() == [] and page.is_visible('#samples section:not([hidden]) .none')
    page.fill('#samples [name=find]', '')
    page.select_option('#samples [name=class]', 'light')
    assert 0 < len(rewards()) < 8
    page.select_option('#samples [name=task]', 'composition')
    assert len(rewards()) == 8
    wait_for_address(page, 'task=composition', 'sort=worst')
    page.locator('section:not([hidden]) .sample a').first.click()
    page.wait_for_selector('#trajectories .path')
    assert 'epoch 2' in page.inner_text('#trajectories .eyebrow')
    assert page.inner_text('#trajectories .eyebrow').startswith('composition')


@pytest.mark.parametrize(
    'width, scheme',
    some([(1280, 'light'), (1280, 'dark'), (390, 'light'), (390, 'dark')], [(1280, 'dark'), (390, 'light')]),
)
def test_samples_can_be_used_by_all(look, panel, width, scheme):
    page = look(f'{panel}/?run=joint&view=samples', '#samples .sample', width=width, scheme=scheme)
    page.wait_for_selector('#first', state='detached')
    page.locator('#samples summary').first.click()
    assert violations(page, '#samples') == []
    assert page.evaluate('document.documentElement.scrollWidth') <= width
