"Curves: every number of a run, and of others beside it."

import json, math, shutil, statistics, time

import httpx, pytest

from drl_toolkit.runs.run import Run
from drl_toolkit.ui import curves
from browsing import violations, wait_for_address
from panel import long_run, make_run, serving
from panel import quick  # noqa: F401 (a fixture)
from tiers import long, some


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('curves') / 'runs'
    make_run(home / 'joint', epochs=6, sheets=False)
    other = make_run(home / 'other', epochs=4, sheets=False)
    about = json.loads((other.folder / 'config.json').read_text())
    about['config']['seed'], about['created'] = 7, '2099-01-01T00:00:00+0000'
    (other.folder / 'config.json').write_text(json.dumps(about))
    return home


@pytest.fixture(scope='module')
def panel(home):
    with serving(home) as (address, _):
        yield address


def test_every_number_of_the_metrics_can_be_drawn(home):
    run = Run.open(home / 'joint')
    names = curves.about_run(run)['names']
    rows = run.metrics()
    assert set(names) == {
        k for r in rows for k, v in r.items() if isinstance(v, float) and k not in ('epoch', 'task')
    }
    for name, tasks in names.items():
        found = curves.series(run, name)
        assert list(found) == tasks
        for task, points in found.items():
            truth = [[r['epoch'], r[name]] for r in rows if (r['task'] or '') == task and name in r]
            assert [e for e, _ in points] == [e for e, _ in truth]
            assert all(math.isclose(a, b, rel_tol=1e-5) for (_, a), (_, b) in zip(points, truth))


def test_the_best_and_the_watched_epochs(tmp_path):
    with Run.create(tmp_path / 'r', dict(keep_best='-watch/loss')) as run:
        for epoch, loss in enumerate([3.0, 1.0, 2.0]):
            row = {'reward': float(epoch)} | ({'watch/loss': loss} if epoch else {})
            run.log(dict(epoch=epoch, tasks=dict(t=row)))
    about = curves.about_run(run)
    assert about['best'] == dict(epoch=2, by='watch/loss') and about['watched'] == [
        1,
        2,
    ]  # known after the update
    run.about['config']['keep_best'] = ''
    assert curves.about_run(run)['best'] == dict(epoch=2, by='training rewards')


@pytest.mark.parametrize('count', [1, 2, 1999, 2000, 2001, 9999])
def test_a_long_series_keeps_its_ends(count):
    points = [[i, float(i)] for i in range(count)]
    thin = curves._thinned(points)
    assert thin[0] == points[0] and thin[-1] == points[-1] and len(thin) <= curves.MOST + 1
    assert thin == sorted(thin) and len({e for e, _ in thin}) == len(thin)


def test_what_a_browser_asks_for(panel, home):
    ask = lambda **query: httpx.get(f'{panel}/series', params=query)
    assert ask().json() == dict(runs=['other', 'joint'])
    assert ask(run='joint', name='kl').json()['fairness'][0] == [0, 0.01]
    assert ask(run='joint', name='nothing').json() == {}
    gone = ask(run='../x')
    assert gone.status_code == 404 and str(home) not in gone.text


def ready(page, charts):
    page.wait_for_function(
        f"document.querySelectorAll('#curves .chart .line').length && document.querySelectorAll('#curves .chart').length === {charts}"
    )


def test_curves_in_a_browser(look, panel):
    page = look(f'{panel}/?run=joint&view=curves', '#curves h1')
    ready(page, 2)  # the reward of two tasks
    value = lambda: [
        float(t) for t in page.locator('#curves .chart').first.locator('.key-list b').all_inner_texts()
    ]
    title = lambda: page.locator('#curves .chart h2').all_inner_texts()
    assert title() == ['reward of fairness', 'reward of composition'] and value() == [0.5]
    read = page.locator('#curves .read input').first
    read.fill('1')
    assert value() == [0.42] and 'epoch 1' in page.locator('#curves .read output').first.inner_text()
    chart = page.locator('#curves .chart > svg').first
    box = chart.bounding_box()
    page.mouse.move(box['x'] + box['width'] - 16, box['y'] + 60)
    assert value() == [0.5]
    page.locator('#curves [name=apart]').uncheck()
    ready(page, 1)
    page.select_option('#curves [name=add]', 'kl')
    ready(page, 2)
    page.select_option('#curves [name=x]', 'kl')
    page.wait_for_function(
        "document.querySelector('#curves .chart > svg').getAttribute('aria-label').includes('over kl')"
    )
    page.select_option('#curves [name=x]', 'minutes')
    page.wait_for_function(
        "document.querySelector('#curves .chart > svg').getAttribute('aria-label').includes('over minutes')"
    )
    assert not page.is_visible('#curves .differences')
    page.select_option('#curves [name=with]', 'other')
    page.wait_for_selector('#curves .differences')
    rows = [r.split('\t') for r in page.inner_text('#curves .differences table').splitlines()]
    assert ['seed', '0', '7'] in rows and ['epochs', '6', '4'] in rows and len(rows) == 3
    assert (
        len(page.locator('#curves .chart').first.locator('.line').all()) == 8
    )  # two runs, two tasks, and their keys
    page.locator('#curves [name=smooth]').fill('0.9')
    page.wait_for_selector('#curves .raw', state='attached')
    page.locator('#curves [name=log]').check()
    words = ('metric=reward%2Ckl', 'x=minutes', 'with=other', 'smooth=0.9', 'log=1', 'apart=0')
    again = look(wait_for_address(page, *words), '#curves h1')
    ready(again, 2)
    assert again.locator('#curves .chosen li').count() == 2 and again.is_checked('#curves [name=log]')
    again.locator('#curves .chosen button').click()
    again.wait_for_function("!document.querySelector('#curves .chosen li')")
    again.locator('#curves [name=latest]').check()  # the newest is the other one
    again.wait_for_function("document.querySelectorAll('#curves .chosen li').length === 2")


def test_smoothing_is_a_mean_without_bias(look, panel):
    "Against the sum that defines it."
    page = look(f'{panel}/?run=joint&view=curves', '#curves h1')
    ready(page, 2)
    values = [3.0, -1.0, 4.0, 1.5, 0.0]
    found = page.evaluate(
        "values => (drl.curves.state.smooth = '0.7', drl.curves.smoothed(values.map((y, i) => ({x: i, y, epoch: i}))).map(p => p.y))",
        values,
    )
    for i, y in enumerate(found):
        weights = [0.7 ** (i - k) for k in range(i + 1)]
        assert math.isclose(y, sum(w * v for w, v in zip(weights, values)) / sum(weights), rel_tol=1e-9)


@pytest.mark.parametrize(
    'width, scheme',
    some([(1280, 'light'), (1280, 'dark'), (390, 'light'), (390, 'dark')], [(1280, 'light'), (390, 'dark')]),
)
def test_curves_can_be_used_by_all(look, panel, width, scheme):
    page = look(
        f'{panel}/?run=joint&view=curves&with=other&smooth=0.5', '#curves h1', width=width, scheme=scheme
    )
    ready(page, 2)
    assert violations(page, '#curves') == []
    assert page.evaluate('document.documentElement.scrollWidth') <= width


@long
def test_two_hundred_runs_of_a_thousand_epochs(look, tmp_path):
    "Another number, more smoothing and another epoch, each below 0.3 s, with room for a machine that does other things too."
    import os

    first = long_run(tmp_path / 'runs/000')
    for i in range(1, 200):
        shutil.copytree(
            first.folder, tmp_path / f'runs/{i:03d}', ignore=shutil.ignore_patterns('frames', 'samples')
        )
    with serving(tmp_path / 'runs') as (address, _):
        page = look(f'{address}/?run=000&view=curves&with=001,002,003', '#curves h1')
        ready(page, 3)
        assert page.locator('#curves [name=with] option').count() == 197
        waits = dict(smooth=[], read=[])
        for value in ('0.5', '0.9', '0.3', '0.8'):
            began = time.perf_counter()
            page.locator('#curves [name=smooth]').fill(value)
            page.wait_for_function(
                f"document.querySelector('#curves .tools output').innerText === '{value}'", polling='raf'
            )
            waits['smooth'].append(time.perf_counter() - began)
            began = time.perf_counter()
            page.locator('#curves .read input').first.fill(str(int(900 * float(value))))
            page.wait_for_function(
                f"document.querySelector('#curves .read output').innerText === 'epoch {int(900 * float(value))}'",
                polling='raf',
            )
            waits['read'].append(time.perf_counter() - began)
        print({k: round(statistics.median(v), 3) for k, v in waits.items()})
        busy = max(1, os.getloadavg()[0] / os.cpu_count())
        assert all(statistics.median(v) < 0.3 * 1.5 * busy for v in waits.values())
