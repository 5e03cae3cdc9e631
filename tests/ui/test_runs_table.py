"The table of runs: what people write beside a run, the bin, what can be taken along; in a browser and without."

import csv, io, shutil, time, zipfile

import httpx, pytest

from drl_toolkit.runs import notes
from drl_toolkit.runs.folder import RunError
from drl_toolkit.runs.run import Run
from drl_toolkit.ui import exports, pages
from browsing import violations
from panel import add_weights, make_run, serving
from panel import quick  # noqa: F401 (a fixture)


@pytest.fixture
def home(tmp_path):
    home = tmp_path / 'runs'
    add_weights(make_run(home / 'first', epochs=2, sheets=False))
    make_run(home / 'group/second', epochs=3, sheets=False, name='fairness')
    return home


@pytest.mark.parametrize(
    'fields, words',
    [
        (dict(title='x' * 81), 'title must be at most 80 letters; got 81'),
        (dict(tags=' '.join(map(str, range(13)))), 'at most 12'),
        (dict(tags='x' * 31), 'of 30 letters'),
        (dict(note='x' * 2001), 'note must be at most 2000'),
    ],
)
def test_what_is_too_long_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        notes.tidy(**fields)


def test_notes_never_break_a_run(home, tmp_path):
    run = Run.open(home / 'first')
    for told in ('', '[]', '{"title": 3}', '{"title": "x", "tags": 5, "note": ""}', 'x' * 10**5):
        (run.folder / 'panel.json').write_text(told)
        assert notes.read_notes(run) == notes.Notes()
    (run.folder / 'panel.json').unlink()
    (tmp_path / 'secret').write_text('{"title": "secret", "tags": [], "note": ""}')
    (run.folder / 'panel.json').symlink_to(tmp_path / 'secret')
    assert notes.read_notes(run) == notes.Notes()
    with pytest.raises(RunError, match='nothing leads out'):
        notes.write_notes(run, notes.tidy('mine'))
    assert 'secret' in (tmp_path / 'secret').read_text()


def test_a_deleted_run_comes_back_whole(home):
    "Every file of it, in a folder of folders too; nothing is overwritten, nothing outside is moved."
    before = {p.relative_to(home): p.read_bytes() for p in home.rglob('*') if p.is_file()}
    gone = notes.delete(home, Run.open(home / 'group/second'))
    assert not (home / 'group/second').exists() and notes.deleted(home) == [gone]
    make_run(home / 'group/second', epochs=1, sheets=False)
    with pytest.raises(RunError, match='again'):
        notes.restore(home, gone.id)
    shutil.rmtree(home / 'group/second')
    assert notes.restore(home, gone.id) == 'group/second' and notes.deleted(home) == []
    assert {p.relative_to(home): p.read_bytes() for p in home.rglob('*') if p.is_file()} == before
    for id in ('..', '../first', '', gone.id):
        with pytest.raises(RunError, match='no deleted run'):
            notes.restore(home, id)
    with pytest.raises(RunError, match='does not lie in'):
        notes.delete(home / 'group', Run.open(home / 'first'))
    with Run.open(home / 'first', write=True) as live, pytest.raises(RunError, match='being trained'):
        notes.delete(home, live)


def test_what_is_taken_along_is_what_is_there(home):
    run = Run.open(home / 'first')
    rows = list(csv.DictReader(io.StringIO(exports.metrics_csv(run).decode())))
    assert len(rows) == len(run.metrics()) and [
        float(r['reward']) for r in rows if r['task'] == 'fairness'
    ] == [row['reward'] for row in run.metrics() if row['task'] == 'fairness']
    assert exports.curves_png(run)[:8] == b'\x89PNG\r\n\x1a\n'
    with zipfile.ZipFile(io.BytesIO(b''.join(exports.weights_zip(run, part=3)))) as archive:
        assert archive.testzip() is None and archive.read('first/unet/model.safetensors') == b'tensors'
    with pytest.raises(RunError, match='no weights'):
        exports.weights_zip(Run.open(home / 'group/second'))
    notes.write_notes(run, notes.tidy('=cmd()', 'a b', 'best'))
    table = list(csv.DictReader(io.StringIO(exports.runs_csv({'first': run}).decode())))
    assert table[0]['title'] == "'=cmd()" and table[0]['tags'] == 'a b' and table[0]['epochs'] == '2'


def test_only_who_may_edit_edits(home):
    ask = httpx.Client(timeout=120)
    form = dict(action='notes', run='first', title='mine', tags='', note='')
    with serving(home) as (address, _):
        answer = ask.post(f'{address}/runs', data=form)
        assert answer.status_code == 403 and '--allow-edit' in answer.text
        assert 'data-edit' not in ask.get(f'{address}/?view=runs').text
        assert ask.get(f'{address}/export/weights.zip?run=group%2Fsecond').status_code == 404
        assert ask.get(f'{address}/export/config.json?run=first').status_code == 404
        found = ask.get(f'{address}/export/weights.zip?run=first')
        assert 'first-weights.zip' in found.headers['content-disposition'] and found.content[:2] == b'PK'
    with serving(home, allow_edit=True) as (address, _):
        assert ask.post(f'{address}/runs', data=form).text == 'first'
        assert notes.read_notes(Run.open(home / 'first')).title == 'mine'
        other = ask.post(f'{address}/runs', data=form, headers=dict(origin='http://evil.example'))
        assert other.status_code == 403 and ask.post(f'{address}/runs', json=form).status_code == 415
        for bad in (
            dict(run='../x'),
            dict(action='rm'),
            dict(title='x' * 99),
            dict(action='restore', id='..'),
        ):
            answer = ask.post(f'{address}/runs', data=form | bad)
            assert answer.status_code == 400 and str(home) not in answer.text
        assert ask.post(f'{address}/runs', content='x' * 200_000).status_code in (413, 415)


def test_the_table_in_a_browser(look, home):
    "Sorted by a column, filtered by words."
    for i in range(20):
        shutil.copytree(
            home / 'first', home / f'copy{i:02d}', ignore=shutil.ignore_patterns('frames', 'weights')
        )
    with serving(home, allow_edit=True) as (address, _):
        page = look(f'{address}/?view=runs&run=first', '#runs table.list')
        page.wait_for_selector('#first', state='detached')
        names = lambda: [
            a.inner_text() for a in page.locator('#runs table.list tbody a').all() if a.is_visible()
        ]
        assert len(names()) == 22
        page.click('#runs th button >> text=epochs')
        assert names()[0] == 'group/second' and not violations(page)
        page.fill('#runs .filter', 'copy0')
        assert len(names()) == 10 and '10 of 22' in page.inner_text('#runs .tools')


def test_two_hundred_runs_are_one_table_within_a_second(home):
    "Measured in processor time: a machine that does other things makes nobody wait here."
    for i in range(198):
        shutil.copytree(home / 'first', home / f'{i:03d}', ignore=shutil.ignore_patterns('frames', 'weights'))
    from drl_toolkit.ui.panel import Library

    library, start = Library(home), time.process_time()
    html = pages.runs_page(*library.scan(), 'runs')
    took = time.process_time() - start
    print(f'{took:.2f} s of the processor')
    assert html.count('<tr') == 201 and all(f'run={i:03d}"' in html for i in range(198))
    assert took < 1.5, took
