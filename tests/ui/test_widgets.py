"""Widgets: what they draw, what their buttons do to a run, and all of it again in a real JupyterLab with a
real browser."""

import base64, io, json, os, re, shutil, time
from contextlib import closing
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pandas as pd, pytest, torch
from PIL import Image

from browser import CHROMIUM, FLAGS, jupyter_lab

from drl_toolkit.ui import plots, widgets
from drl_toolkit.runs.recordings import FrameRecorder, read_frames
from drl_toolkit.rewards.lab import crispness
from drl_toolkit.sampling.rollout import rollout
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.prompts.task import Task
from drl_toolkit.rewards.reward import Reward, Observations
from drl_toolkit.runs.run import Run
from drl_toolkit.runs.recorder import Recorder
from drl_toolkit.runs.folder import RunError
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.config import TrainConfig
from drl_toolkit.ui.widgets import (
    BranchExplorer,
    Demographics,
    Monitor,
    PathExplorer,
    RewardLab,
    RunComparison,
    View,
    img,
    live_path,
)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def seen_brightness(images, prompts):
    "As a fairness reward does: a value, and a class that was seen."
    values = images.mean((1, 2, 3))
    return values, {'shade': Observations((values > values.median()).long(), ('dark', 'bright'))}


def tiny_trainer(*callbacks, epochs=4, lr=3e-3, reward=brightness, seed=0):
    task = Task('bright', ['a cat', 'a dog'], reward, group_size=4, samples=8)
    return Trainer(
        Policy(tiny_sd(), num_steps=4),
        [task],
        TrainConfig(epochs=epochs, train_steps=2, lr=lr, warmup=0, seed=seed),
        callbacks=list(callbacks),
    )


def recorded(folder, **more):
    "A short run on disk."
    with closing(Run.create(folder, dict(note='a test'))) as run:
        tiny_trainer(
            Recorder(run, ['a cat', 'a dog'], every=1),
            FrameRecorder(run),
            epochs=3,
            reward=Reward(seen_brightness, level='group'),
            **more,
        ).fit()
    return run


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    return {name: recorded(folder / name, lr=lr) for name, lr in (('slow', 1e-3), ('fast <b>', 1e-2))}


def pictures_in(page):
    return [
        Image.open(io.BytesIO(base64.b64decode(part.split('"')[0]))) for part in page.split('base64,')[1:]
    ]


# --- pages


def test_what_people_wrote_stays_text():
    page = img(Image.new('RGB', (3, 2)), '<script>"a" & b')
    assert (
        '<script>' not in page
        and '&lt;script&gt;&#34;a&#34; &amp; b' in page
        and pictures_in(page)[0].size == (3, 2)
    )


class Plain(View):
    what = 'a plain view'

    def __init__(self):
        self.box, self.drawn = widgets.W.VBox(), 0

    def still(self):
        return Image.new('RGB', (40, 30), 'red')

    def draw(self):
        self.drawn += 1


@pytest.mark.parametrize('allowed, live', ((True, True), (False, False), (None, True)))
def test_programs_that_execute_notebooks_get_the_still_alone(monkeypatch, allowed, live):
    kernel = None if allowed is None else SimpleNamespace(_allow_stdin=allowed)
    monkeypatch.setattr(widgets, 'get_ipython', lambda: SimpleNamespace(kernel=kernel))
    view = Plain()
    view.redraw()
    bundle = view._repr_mimebundle_()
    assert ('application/vnd.jupyter.widget-view+json' in bundle) == live == bool(view.drawn) and bundle[
        'text/plain'
    ] == 'Plain: a plain view'
    assert Image.open(io.BytesIO(base64.b64decode(bundle['image/png']))).convert('RGB').getpixel((5, 5)) == (
        255,
        0,
        0,
    )


def test_a_saved_notebook_keeps_a_still_that_the_controls_hide(monkeypatch):
    "Two outputs: the picture, and the box with the rule that hides it; a program gets the picture alone."
    shown, views = [], [Plain(), Plain()]
    monkeypatch.setattr(widgets, 'display', lambda thing, raw=False: shown.append(thing))
    for allowed, view in zip((True, False), views):
        kernel = SimpleNamespace(_allow_stdin=allowed)
        monkeypatch.setattr(widgets, 'get_ipython', lambda: SimpleNamespace(kernel=kernel))
        view._ipython_display_()
    still, box, alone = shown
    mark = re.search('<div class="(drl-still-[0-9a-f]{32})"><img', still.data)[1]
    assert 'alt="a plain view"' in still.data and 'data:image/png;base64,' in still.data
    assert (
        box.children[0] is not view.box
        and box.children[1].value == f'<style>.{mark} {{ display: none }}</style>'
    )
    assert set(alone) == {'text/plain', 'image/png'}
    assert not callable(widgets.Monitor._ipython_display_)


# --- the monitor


class Meddler(widgets.ControlCallback):
    "Presses a button after a given epoch, and looks whether it was heard."

    def __init__(self, monitor, at):
        self.monitor, self.at, self.told = monitor, at, []

    def after_epoch(self, trainer, record):
        if want := self.at.get(trainer.epoch):
            self.monitor.ask(want)
            self.told.append(self.monitor.head.value)


def test_stop_ends_after_this_epoch_in_good_order():
    monitor = Monitor()
    trainer = tiny_trainer(Meddler(monitor, {2: 'stop'}), monitor, epochs=5)
    assert (
        len(trainer.fit()) == 2 and 'stopped' in monitor.head.value and 'epoch 2 of 5' in monitor.head.value
    )
    assert all(b.disabled for b in monitor.buttons.values()) and monitor.bar.value == 2


def test_pause_waits_until_resumed_and_changes_nothing():
    monitor, heads = Monitor(), []
    trainer = tiny_trainer(Meddler(monitor, {1: 'pause'}), monitor, epochs=2)

    def resume():
        while 'paused' not in monitor.head.value:
            time.sleep(0.02)
        heads.append((trainer.epoch, monitor.head.value))
        time.sleep(0.5)
        heads.append((trainer.epoch, ''))
        monitor.buttons['run'].click()

    helper = Thread(target=resume)
    helper.start()
    history = trainer.fit()
    helper.join()
    plain = tiny_trainer(epochs=2).fit()
    assert [e for e, _ in heads] == [1, 1] and [r['tasks']['bright']['reward'] for r in history] == [
        r['tasks']['bright']['reward'] for r in plain
    ]
    assert 'done' in monitor.head.value


def test_save_now_leaves_a_checkpoint_and_goes_on(tmp_path):
    with closing(Run.create(tmp_path / 'run', {})) as run:
        monitor = Monitor(run)
        tiny_trainer(Meddler(monitor, {1: 'save'}), monitor, epochs=2).fit()
    assert [p.name for p in run.checkpoints()] == ['epoch_0001'] and (run.folder / 'weights').is_dir()


def test_no_wish_is_forgotten_for_another(tmp_path):
    class Both(Meddler):
        def after_epoch(self, trainer, record):
            self.monitor.ask('save')
            self.monitor.ask('stop')

    with closing(Run.create(tmp_path / 'run', {})) as run:
        monitor = Monitor(run)
        trainer = tiny_trainer(Both(monitor, {}), monitor)
        assert len(trainer.fit()) == 1 and [p.name for p in run.checkpoints()] == ['epoch_0001']
    with pytest.raises(ValueError, match="want must be one of .*got 'sleep'"):
        monitor.ask('sleep')


def test_an_error_is_not_called_an_end():
    def broken(images, prompts):
        raise RuntimeError('no such luck')

    monitor = Monitor()
    with pytest.raises(RuntimeError):
        tiny_trainer(monitor, reward=broken).fit()
    assert 'failed' in monitor.head.value and all(b.disabled for b in monitor.buttons.values())


def test_without_a_run_there_is_nothing_to_save():
    monitor = Monitor()
    trainer = tiny_trainer(monitor)
    monitor.before_fit(trainer)
    assert monitor.buttons['save'].disabled and not monitor.buttons['stop'].disabled


def test_in_a_thread_the_run_is_the_same_and_errors_come_back():
    monitor = Monitor()
    trainer = tiny_trainer(monitor, epochs=2)
    monitor.start(trainer)
    monitor.wait()
    assert [r['tasks']['bright']['reward'] for r in trainer.history] == [
        r['tasks']['bright']['reward'] for r in tiny_trainer(epochs=2).fit()
    ]

    def broken(images, prompts):
        raise RuntimeError('no such luck')

    monitor = Monitor()
    trainer = tiny_trainer(monitor, reward=broken)
    monitor.start(trainer)
    with pytest.raises(RuntimeError, match='no such luck'):
        monitor.wait()
    assert 'no such luck' in monitor.head.value
    with pytest.raises(ValueError, match='callbacks=\\[monitor\\]'):
        Monitor().start(trainer)


def test_the_monitor_sees_classes_and_all_that_it_shows_has_words():
    monitor = Monitor(pictures=3)
    tiny_trainer(monitor, epochs=2, reward=Reward(seen_brightness, level='group')).fit()
    rewards, classes, names = monitor.now['bright']
    assert names == ('dark', 'bright') and classes.tolist().count(1) < 8 and len(rewards) == 8
    for page, pictures in ((monitor.curves, 1), (monitor.spread, 1), (monitor.samples, 1)):
        assert (
            len(pictures_in(page.value)) == pictures == page.value.count('alt="')
            and 'alt=""' not in page.value
        )
    assert pictures_in(monitor.samples.value)[0].size[0] == 3 * 64 + 2 * 2


@pytest.mark.parametrize('field, value', (('share', 0), ('share', 1.5), ('pictures', 0)))
def test_a_monitor_refuses_what_makes_no_sense(field, value):
    with pytest.raises(ValueError, match=f'{field} is {value}'):
        Monitor(**{field: value})


def test_drawing_keeps_to_its_share_of_the_time():
    """A fake clock: drawing takes a second, an epoch ten, so that 3 % is three drawings in ten epochs, after
    the first."""
    monitor, trainer = (
        Monitor(share=0.03),
        SimpleNamespace(
            history=[],
            epoch=0,
            config=TrainConfig(epochs=200),
            callbacks=[],
            processes=SimpleNamespace(stop_asked=False),
        ),
    )
    drawn = []

    def redraw(change=None):
        drawn.append(trainer.epoch)
        monitor.spent += 1.0
        monitor.cost = 1.0

    monitor.redraw, monitor.state = redraw, 'training'
    for trainer.epoch in range(1, 201):
        record = dict(epoch=trainer.epoch - 1, tasks=dict(bright=dict(reward=0.5)), seconds=10.0)
        trainer.history.append(record)
        monitor.after_epoch(trainer, record)
    assert drawn[:3] == [1, 7, 11] and len(drawn) == 59 and monitor.spent <= 0.03 * monitor.trained


def test_time_left_obeys_the_limit_in_minutes():
    trainer = SimpleNamespace(
        epoch=10, config=TrainConfig(epochs=20, minutes=2.0), history=[dict(seconds=6.0)] * 10
    )
    assert widgets.time_left(trainer) == 60
    trainer.config.minutes = 0.0
    assert widgets.time_left(trainer) == 60
    trainer.config.minutes = 1.5
    assert widgets.time_left(trainer) == 30


# --- the explorers


def test_every_step_of_every_path_can_be_shown(runs):
    paths = read_frames(runs['slow'], 2).tasks['bright'].paths
    view, seen = PathExplorer(paths), set()
    for view.sample.value in range(len(paths)):
        for view.step.value in range(view.step.max + 1):
            assert len(pictures_in(view.page.value)) == (2 if view.step.value < 4 else 1)
            seen.add(view.page.value)
    assert len(seen) == 5 * len(paths) and view.still().get_size_inches().min() > 1
    with pytest.raises(ValueError, match='paths is empty'):
        PathExplorer([])


def test_paths_of_different_lengths_follow_each_other():
    paths = [
        live_path(policy, rollout(policy, ['a cat']))
        for policy in (Policy(tiny_sd(), num_steps=5), Policy(tiny_sd(), num_steps=3))
    ]
    view = PathExplorer(paths)
    view.step.value = 5
    view.sample.value = 1
    assert view.step.max == view.step.value == 3 == view.play.max and 'finished image' in view.page.value
    view.sample.value = 0
    assert view.step.max == 5


def test_a_live_path_says_what_the_trajectory_says():
    policy = Policy(tiny_sd(), num_steps=4)
    traj = rollout(policy, ['a cat', 'a dog'], seed=3)
    path = live_path(policy, traj, 1)
    assert (
        path.log_prob.tolist() == traj.log_probs[:, 1].tolist()
        and abs(path.kl).max() < 1e-6
        and path.prompt == 'a dog'
    )  # nothing was trained yet
    last = torch.tensor(pd.DataFrame(path.noisy[-1].get_flattened_data()).values) / 255
    assert (last.T.reshape(3, 64, 64) - traj.images[1]).abs().max() < 1 / 255


def test_a_family_shares_as_much_as_the_slider_says():
    view = BranchExplorer(Policy(tiny_sd(), num_steps=4), brightness, prompt='a cat', branches=3)
    assert len(view.task.pictures) == 3 and view.task.split == 1
    view.count.value, view.split.value = 5, 3
    late = view.task.samples['brightness']
    view.split.value = 0
    assert (
        len(view.task.pictures) == 5
        and late.std() < view.task.samples['brightness'].std()
        and view.task.split == 0
    )
    before = view.page.value
    view.again.click()
    assert view.page.value != before and not view.again.disabled and view.again.description == 'Resample'


def test_a_reward_that_fails_is_said_in_place_of_the_picture():
    def picky(images, prompts):
        if prompts[0] != 'a cat':
            raise ValueError('only <cats>')
        return images.mean((1, 2, 3))

    view = BranchExplorer(Policy(tiny_sd(), num_steps=2), picky, prompt='a cat', branches=2)
    view.prompt.value = 'a dog'
    assert 'only &lt;cats&gt;' in view.page.value and not view.again.disabled
    view.prompt.value = 'a cat'
    assert pictures_in(view.page.value)
    with pytest.raises(ValueError, match='only <cats>'):
        BranchExplorer(view.policy, picky, prompt='a dog')
    with pytest.raises(ValueError, match='branches is 1'):
        BranchExplorer(view.policy, picky, branches=1)


def test_demographics_of_each_prompt_and_epoch(runs, monkeypatch):
    asked = []
    monkeypatch.setattr(
        plots,
        'demographics',
        lambda now, category, target=None, base=None, names=None: (
            asked.append((set(now['prompt']), category, len(now), len(base))),
            Image.new('RGB', (4, 4)),
        )[1],
    )
    view = Demographics(runs['slow'])
    view.prompt.value = 'a cat'
    view.epoch.value = view.epochs[0]
    assert asked[0] == ({'a cat', 'a dog'}, 'shade', 8, 8) and asked[-1] == ({'a cat'}, 'shade', 4, 4)


def test_runs_without_what_is_asked_for_are_named(tmp_path, runs):
    empty = Run.create(tmp_path / 'empty', {})
    empty.close()
    with pytest.raises(RunError, match='empty.*no classes'):
        Demographics(empty)
    with pytest.raises(RunError, match='no epochs|no sheets'):
        RunComparison({'a': empty, 'b': empty})
    with pytest.raises(ValueError, match='two runs with different names; got 1'):
        RunComparison({'a': runs['slow']})


def test_two_runs_are_compared_at_the_same_epochs(runs):
    view = RunComparison(runs)
    assert (
        view.epoch.options == (0, 1, 2, 3)
        and len(pictures_in(view.page.value)) == 3
        and 'fast &lt;b&gt;' in view.page.value
        and 'fast <b>' not in view.page.value.split('alt=')[0]
    )
    last = view.page.value
    view.epoch.value = 0
    assert view.page.value != last and view.still().width > 100
    table = widgets.spent_so_far(runs, 'bright')
    assert (
        list(table.groupby('method').size()) == [3, 3]
        and table.groupby('method')['seconds'].is_monotonic_increasing.all()
    )


@pytest.fixture
def lab():
    return RewardLab(
        'def red(images, prompts): return images[:, 0].mean((1, 2))', torch.rand(6, 3, 8, 8), ['a', 'b'] * 3
    )


def test_an_edited_reward_is_scored(lab):
    assert '<b>red</b>' in lab.page.value and torch.allclose(lab.values, lab.images[:, 0].mean((1, 2)))
    lab.text.value = 'def blue(images, prompts): return images[:, 2].mean((1, 2))'
    assert '<b>blue</b>' in lab.page.value
    lab.score.click()
    assert '<b>blue</b>' in lab.page.value and torch.allclose(lab.values, lab.images[:, 2].mean((1, 2)))


@pytest.mark.parametrize(
    'text, told',
    (
        ('def f(images, prompts) return 1', 'SyntaxError in line 1'),
        ('x = 3', 'must define a function'),
        ('', 'must define a function'),
        ('def f(images, prompts):\n    y = images\n    return y.nope', 'AttributeError in line 3'),
        ('def f(images, prompts): return images.mean()', 'shape'),
        ('def f(images, prompts): return images.mean((1, 2, 3)) * float("nan")', 'NaN'),
        ('raise SystemExit\ndef f(images, prompts): pass', 'SystemExit in line 1'),
        ('def f(images): return 1', 'TypeError'),
    ),
)
def test_mistakes_are_shown_and_nothing_breaks(lab, text, told):
    lab.text.value = text
    lab.score.click()
    assert told in lab.page.value and '<pre role="alert"' in lab.page.value
    lab.text.value = 'def fine(images, prompts): return images[:, 1].mean((1, 2))'
    lab.score.click()
    assert '<b>fine</b>' in lab.page.value


def test_a_lab_begins_with_a_function_or_its_text():
    lab = RewardLab(brightness, torch.rand(4, 3, 8, 8), ['a'] * 4)
    assert lab.text.value.startswith('def brightness') and lab.reward.name == 'brightness'
    assert (
        RewardLab(crispness, torch.rand(4, 3, 8, 8), ['a'] * 4).reward.card == crispness.card
    )  # with all that its module knows
    with pytest.raises(ValueError, match='prompts is None'):
        RewardLab('', torch.rand(2, 3, 8, 8))


# --- in JupyterLab

CELLS = dict(
    setup='''
import time, torch; torch.set_num_threads(1)
from pathlib import Path
from drl_toolkit.ui import widgets as w
from drl_toolkit.runs.recordings import read_frames
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.prompts.task import Task
from drl_toolkit.runs.run import Run
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.config import TrainConfig
slow, fast = Run.open('runs/slow'), Run.open('runs/fast')
def patient(images, prompts): time.sleep(.4); return images.mean((1, 2, 3))
def make(monitor, epochs=60):
    task = Task('bright', ['a cat', 'a dog'], patient, group_size=4, samples=8)
    return Trainer(Policy(tiny_sd(), num_steps=4), [task], TrainConfig(epochs=epochs, train_steps=2, warmup=0), callbacks=[monitor])
print('all set')''',
    monitor="out = Run.create('runs/out', {})\ntrainer = make(w.Monitor(out))\nhistory = "
    "trainer.fit()\nprint('fit has ended')",
    after="print('checkpoints:', [p.name for p in out.checkpoints()], 'epochs:', len(history) == "
    "trainer.epoch)",
    thread="monitor = w.Monitor(); monitor.start(make(monitor))",
    free="print('the kernel is free:', monitor.thread.is_alive())",
    paths="w.PathExplorer(read_frames(slow, 2).tasks['bright'].paths)",
    branches="w.BranchExplorer(Policy(tiny_sd(), num_steps=4), patient, prompt='a cat', branches=3)",
    classes="w.Demographics(slow)",
    lab="w.RewardLab('def red(images, prompts): return images[:, 0].mean((1, 2))', torch.rand(12, 3, 32, "
    "32), ['a cat', 'a dog'] * 6)",
    runs="w.RunComparison({'slow': slow, 'fast': fast})",
)


def notebook(sources):
    cells = [
        dict(cell_type='code', id=name, metadata={}, execution_count=None, outputs=[], source=source.strip())
        for name, source in sources.items()
    ]
    return dict(
        nbformat=4,
        nbformat_minor=5,
        metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')),
        cells=cells,
    )


@pytest.fixture(scope='module')
def jupyter(tmp_path_factory, runs):
    "A JupyterLab of our own on a folder with a notebook and two runs: its address."
    folder = tmp_path_factory.mktemp('lab')
    (folder / 'widgets.ipynb').write_text(json.dumps(notebook(CELLS)))
    for name, run in zip(('slow', 'fast'), runs.values()):
        shutil.copytree(run.folder, folder / 'runs' / name)
    with jupyter_lab(folder) as address:
        yield address


class Lab:
    "A notebook in a browser."

    def __init__(self, page, shots):
        self.page, self.shots = page, shots

    def cell(self, name):
        return self.page.locator('.jp-Notebook .jp-Cell').nth(list(CELLS).index(name))

    def run(self, name):
        "Shift and Enter; does not wait."
        self.cell(name).locator('.cm-content').click()
        self.page.keyboard.press('Shift+Enter')

    def says(self, name, text, seconds=60):
        self.cell(name).locator('.jp-OutputArea', has_text=text).first.wait_for(timeout=1000 * seconds)

    def button(self, name, text):
        return self.cell(name).get_by_role('button', name=text)

    def page_of(self, name, which=0):
        return self.cell(name).locator('.widget-html-content').nth(which).inner_html()

    def changes(self, name, act, which=0, seconds=30):
        "What a page shows after an act has changed it."
        before, end = self.page_of(name, which), time.time() + seconds
        act()
        while (now := self.page_of(name, which)) == before:
            assert time.time() < end, f'{name}: nothing changed in {seconds} s'
            time.sleep(0.05)
        return now

    def slide(self, name, label, key):
        "Move a slider by a key."
        self.cell(name).locator('.widget-inline-hbox', has_text=label).locator('.noUi-handle').focus()
        self.page.keyboard.press(key)

    def choose(self, name, label, option):
        self.cell(name).locator('.widget-dropdown', has_text=label).locator('select').select_option(
            label=option
        )

    def shot(self, name):
        "An image of a cell, for people to look at."
        self.cell(name).screenshot(path=self.shots / f'widgets_{name}.png')


@pytest.fixture(scope='module')
def lab_page(jupyter, tmp_path_factory):
    "The notebook, open, its first cell run. Screenshots go where SCREENSHOTS says."
    sync = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    if not CHROMIUM:
        pytest.skip('no chromium on this machine')
    shots = Path(os.environ.get('SCREENSHOTS') or tmp_path_factory.mktemp('shots'))
    shots.mkdir(parents=True, exist_ok=True)
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.goto(f'{jupyter}/lab/tree/widgets.ipynb', wait_until='domcontentloaded')
        lab = Lab(page, shots)
        page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status=idle]', timeout=90_000)
        end = time.time() + 150
        while not lab.cell('setup').locator('.jp-OutputArea', has_text='all set').count():
            assert time.time() < end, 'the first cell does not run'
            if lab.cell('setup').locator('.jp-InputPrompt').inner_text() == '[ ]:':
                lab.run('setup')  # a kernel that is just starting may drop a request
            time.sleep(1)
        yield lab
        page.screenshot(path=shots / 'widgets_end.png')
        browser.close()


def test_paths_are_stepped_and_played(lab_page):
    lab, at = lab_page, 'paths'
    lab.run(at)
    lab.says(at, 'steps done')
    first = lab.changes(at, lambda: lab.slide(at, 'steps done', 'ArrowRight'))
    assert first.count('<img') == 2 and 'next: step 2' in first
    assert lab.changes(at, lambda: lab.slide(at, 'path', 'ArrowRight')) != first
    lab.changes(at, lambda: lab.cell(at).locator('.widget-play button').first.click())
    lab.says(at, 'finished image')
    lab.shot(at)


def test_buttons_work_while_the_cell_runs(lab_page):
    lab, at = lab_page, 'monitor'
    lab.run('paths')
    lab.says('paths', 'steps done')  # whichever tests ran before in this kernel
    lab.run(at)
    lab.run('after')  # the next cell waits for its turn
    lab.says(at, 'epoch 2 of 60')
    lab.button(at, 'Pause').click()
    lab.says(at, 'paused')
    epoch = lab.page_of(at).split('epoch ')[1]
    lab.shot('monitor')
    lab.button(at, 'Save now').click()
    lab.says(at, 'saved, paused')
    assert lab.page_of(at).split('epoch ')[1] == epoch
    lab.button(at, 'Resume').click()
    lab.says(at, 'training')
    lab.changes(at, lambda: None)
    for key in ('ArrowRight', 'ArrowRight', 'Home'):
        lab.changes('paths', lambda: lab.slide('paths', 'steps done', key))  # other widgets answer too
    lab.button(at, 'Stop after this epoch').click()
    lab.says(at, 'fit has ended')
    assert (
        'stopped' in lab.page_of(at)
        and lab.button(at, 'Pause').is_disabled()
        and lab.cell(at).locator('.widget-html img').count() == 3
    )
    lab.says('after', "checkpoints: ['epoch_00")
    lab.says('after', 'epochs: True')


def test_a_run_in_a_thread_leaves_the_kernel_free(lab_page):
    lab, at = lab_page, 'thread'
    lab.run(at)
    lab.says(at, 'epoch 1 of 60')
    lab.run('free')
    lab.says('free', 'the kernel is free: True')
    lab.button(at, 'Pause').click()
    lab.says(at, 'paused')
    lab.button(at, 'Resume').click()
    lab.says(at, 'training')
    lab.button(at, 'Stop after this epoch').click()
    lab.says(at, 'stopped')
    lab.shot(at)


def test_branches_are_grown_again(lab_page):
    lab, at = lab_page, 'branches'
    lab.run(at)
    lab.button(at, 'Resample').wait_for()
    pages = [
        lab.changes(at, act)
        for act in (
            lambda: lab.slide(at, 'shared', 'ArrowRight'),
            lambda: lab.slide(at, 'branches', 'ArrowRight'),
            lambda: lab.button(at, 'Resample').click(),
        )
    ]
    assert '4 branches' in pages[-1] and 'share 2 of 4 steps' in pages[-1] and len(set(pages)) == 3
    lab.cell(at).locator('.widget-text input').fill('three stars')
    lab.changes(at, lambda: lab.page.keyboard.press('Enter'))
    lab.shot(at)


def test_classes_by_prompt_and_epoch(lab_page):
    lab, at = lab_page, 'classes'
    lab.run(at)
    lab.cell(at).locator('.widget-html-content img').wait_for()
    assert 'of a cat' in lab.changes(at, lambda: lab.choose(at, 'prompt', 'a cat'))
    assert 'epoch 1 beside' in lab.changes(at, lambda: lab.slide(at, 'epoch', 'Home'))
    lab.shot(at)


def test_a_reward_is_edited_and_examined(lab_page):
    lab, at = lab_page, 'lab'
    lab.run(at)
    lab.cell(at).locator('.widget-html-content img').wait_for()
    text = lab.cell(at).locator('textarea')
    text.fill('def blue(images, prompts):\n    return images[:, 2].nope')
    assert 'AttributeError in line 2' in lab.changes(at, lambda: lab.button(at, 'Score').click())
    text.fill('def blue(images, prompts):\n    return images[:, 2].mean((1, 2))')
    assert '<b>blue</b>' in lab.changes(at, lambda: lab.button(at, 'Score').click())
    lab.shot(at)
    assert 'cheaply' in lab.changes(at, lambda: lab.button(at, 'Examine').click(), seconds=90)


def test_two_runs_side_by_side(lab_page):
    lab, at = lab_page, 'runs'
    lab.run(at)
    lab.cell(at).locator('.widget-html-content img').nth(2).wait_for()
    assert 'after 2 epochs' in lab.changes(at, lambda: lab.slide(at, 'epochs done', 'ArrowLeft'))
    lab.shot(at)
