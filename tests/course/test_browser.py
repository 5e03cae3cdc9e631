"""A lesson in JupyterLab, in a real browser: it runs from top to bottom, a wrong answer that is typed into a stub shows its sentence,
and the right one a tick. Screenshots go where SCREENSHOTS says."""

import json, os, re, time, urllib.request
from pathlib import Path

import pytest

import lessons
from browser import CHROMIUM, FLAGS, SLOW, jupyter_lab
from tiers import long

LESSONS = lessons.lessons()


@pytest.fixture(scope='module')
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp('course')
    for page in lessons.ROOT.glob('nbs/course/*.ipynb'):
        found = json.loads(page.read_text(encoding='utf-8'))
        for cell in found['cells']:  # as nobody has run it
            cell |= dict(outputs=[], execution_count=None) if cell['cell_type'] == 'code' else {}
        (folder / page.name).write_text(json.dumps(found), encoding='utf-8')
    with jupyter_lab(folder) as address:
        yield address


@pytest.fixture(scope='module')
def chromium():
    sync = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    if not CHROMIUM:
        pytest.skip('no chromium on this machine')
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Notebook:
    "A lesson that is open in a browser."

    def __init__(self, page, lesson, sessions):
        self.page, self.lesson, self.sessions = page, lesson, sessions
        self.exercises = [lessons.role(cell) for cell in lessons.cells(lesson)]

    def cell(self, exercise, role):
        return self.page.locator('.jp-Notebook .jp-Cell').nth(self.exercises.index((exercise, role)))

    def run_all(self, seconds=300):
        "Run, Run All Cells; wait until each has its number."
        self.page.locator('.lm-MenuBar-item', has_text='Run').first.click()
        self.page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
        done = lambda: self.left() == 0 and self.sessions.idle(self.lesson) or self.errors()
        until(done, seconds, lambda: f'{self.left()} cells have not run')
        assert not self.errors(), self.errors()

    def left(self):
        """How many code cells have no number, as in '[3]:', yet: '[*]:' waits, '[ ]:' was never asked for. A folded cell
        shows none."""
        shown = '.jp-Notebook .jp-CodeCell:not(:has(.jp-InputPlaceholder)) .jp-InputPrompt'
        prompts = self.page.locator(shown).all_inner_texts()
        return sum(not re.search(r'\d', text) for text in prompts)

    def errors(self):
        "What was printed in red: exceptions, warnings."
        return self.page.locator(f'[data-mime-type="{ERROR}"], [data-mime-type="{STDERR}"]').all_inner_texts()

    def run(self, exercise, role, source=None):
        "Shift and Enter in a cell, with another source if there is one."
        self.cell(exercise, role).locator('.cm-content').click()
        if source is not None:
            self.page.keyboard.press('Control+a')
            self.page.keyboard.insert_text(source)
        self.page.keyboard.press('Shift+Enter')

    def shows(self, exercise, text):
        "Wait until the check of an exercise says so."
        found = self.cell(exercise, 'check').locator('.jp-OutputArea', has_text=text)
        found.first.wait_for(timeout=60_000 * SLOW)

    def shot(self, exercise, name):
        "An image of the page at an exercise, for people to look at."
        if folder := os.environ.get('SCREENSHOTS'):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.cell(exercise, 'check').scroll_into_view_if_needed()
            self.page.screenshot(path=Path(folder) / f'{self.lesson.stem}_{name}.png')


ERROR, STDERR = 'application/vnd.jupyter.error', 'application/vnd.jupyter.stderr'


def until(holds, seconds, what):
    "Wait for something to hold; `what` says what does not."
    end = time.time() + SLOW * seconds
    while not holds():
        assert time.time() < end, what()
        time.sleep(0.5)


class Sessions:
    "What the server says of notebooks and their kernels: unlike the page it is not idle before there is a kernel."

    def __init__(self, address):
        self.address = f'{address}/api/sessions'

    def of(self, lesson):
        found = json.load(urllib.request.urlopen(self.address))
        return next((session for session in found if session['path'] == lesson.name), None)

    def idle(self, lesson):
        "Whether a page is connected to its kernel, which waits for it."
        kernel = (self.of(lesson) or {}).get('kernel') or {}
        return kernel.get('execution_state') == 'idle' and kernel.get('connections', 0) > 0

    def end(self, lesson):
        "A kernel keeps a gigabyte of memory."
        if session := self.of(lesson):
            address = f'{self.address}/{session["id"]}'
            urllib.request.urlopen(urllib.request.Request(address, method='DELETE')).close()


@pytest.fixture
def notebook(address, chromium, lesson):
    page, sessions = chromium.new_page(viewport=dict(width=1280, height=1000)), Sessions(address)
    page.set_default_timeout(30_000 * SLOW)
    space = (
        f'{address}/lab/workspaces/{lesson.stem}'  # of its own: another would open the last lesson beside it
    )
    page.goto(f'{space}/tree/{lesson.name}', wait_until='domcontentloaded')
    page.locator('.jp-Notebook .jp-Cell').first.wait_for(timeout=90_000 * SLOW)
    until(lambda: sessions.idle(lesson), 90, lambda: f'no kernel: {sessions.of(lesson)}')
    yield Notebook(page, lesson, sessions)
    page.close()
    sessions.end(lesson)


@long
@pytest.mark.parametrize('lesson', LESSONS, ids=lambda path: path.stem)
def test_a_lesson_in_jupyterlab(notebook, lesson):
    notebook.run_all()
    wrong = lessons.wrong_answers(lesson)
    notebook.shot(min(wrong), 'whole')
    assert notebook.page.locator('.jp-OutputArea', has_text='✓').count() == len(wrong)
    exercise = min(wrong)
    notebook.run(exercise, 'stub', wrong[exercise].source.strip())
    notebook.run(exercise, 'check')
    notebook.shows(exercise, '✗')
    notebook.shows(exercise, wrong[exercise].says)
    notebook.shot(exercise, 'wrong')
    solution = next(c for c in lessons.cells(lesson) if lessons.role(c) == (exercise, 'solution'))
    notebook.run(exercise, 'stub', solution['source'].rpartition('\n')[0])
    notebook.run(exercise, 'check')
    notebook.shows(exercise, '✓')
    notebook.shot(exercise, 'right')
