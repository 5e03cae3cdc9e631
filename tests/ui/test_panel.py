"""The panel in a real browser, and its server without one.

Screenshots go to the folder named by DRL_SHOTS, or to pytest's own; they are meant to be looked at."""

import json, os, re, shutil, statistics, subprocess, sys, tempfile, textwrap, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx, pytest

from drl_toolkit.ui import panel as app
from drl_toolkit.runs.run import Run
from tiers import long, some
from panel import add_ballot, add_weights, long_run, make_run, serving
from browsing import turn, violations, wait_for_address
from panel import quick  # noqa: F401 (a fixture)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Runs to look at: a whole one that can be voted on, one of a thousand epochs, one with an odd name."
    home = tmp_path_factory.mktemp('panel') / 'runs'
    add_ballot(make_run(home / 'joint'))
    add_weights(Run.open(home / 'joint'))
    (home / 'joint/checkpoints/epoch_0006').mkdir(parents=True)
    make_run(
        home / 'odd "<b>" {{7*7}} name',
        epochs=2,
        prompt='a <img src=x onerror="document.title=1"> {{value}} ${document.title=1}',
    )
    long_run(home / 'long')
    return home


@pytest.fixture(scope='module')
def panel(home):
    with serving(home) as (address, _):
        yield address


@pytest.fixture(scope='module')
def shots(tmp_path_factory):
    return Path(os.environ.get('DRL_SHOTS') or tmp_path_factory.mktemp('shots'))


# All images that are seen have come.
SEEN = "Promise.all([...document.images].filter(i => i.offsetParent && i.loading !== 'lazy').map(i => i.decode())).then(() => true)"


# --- in a browser


@pytest.mark.parametrize(
    'width, scheme',
    some([(1280, 'light'), (1280, 'dark'), (390, 'light'), (390, 'dark')], [(1280, 'light'), (390, 'dark')]),
)
def test_every_page_opens(look, panel, shots, width, scheme):
    page = look(f'{panel}/?run=joint', width=width, scheme=scheme)
    page.wait_for_function("document.querySelector('#run input').value === 'joint'")
    for name, label in app.LABELS.items():
        if name == 'train':
            continue
        turn(page, label)
        page.wait_for_selector(f'#{name} h1, #{name} .note, #tab-{name} h1')
        page.wait_for_function(SEEN)
        page.screenshot(path=shots / f'{name}_{width}_{scheme}.png', full_page=True)
        assert page.evaluate('document.documentElement.scrollWidth') <= width, (
            f'{name} is wider than the screen'
        )
        assert page.evaluate('[...document.images].every(i => i.alt)'), (
            f'{name} has an image without a description'
        )
        page.wait_for_url(f'**view={name}*') if name != 'overview' else None
        assert not violations(page), name
    assert ('dark' in page.evaluate('document.body.className')) == (scheme == 'dark')


def test_sliders_and_keyboard(look, panel):
    page = look(f'{panel}/?view=trajectories&run=joint', '.path .told p')
    assert 'epoch 5' in page.inner_text('#trajectories .eyebrow')
    slider = page.locator('#epoch input[type=range]')
    for epoch in (0, 3, 5):
        slider.fill(str(epoch))
        page.wait_for_function(
            f"document.querySelector('#trajectories .eyebrow').innerText.includes('epoch {epoch}')"
        )
    steps = page.locator('.player input')
    steps.fill('3')
    assert 'Step 3 of 4' in page.inner_text('.told') and '3 of 4' in page.inner_text('.player output')
    assert page.get_attribute('.big.noisy', 'src') == page.get_attribute(
        '.strip li:nth-child(3) img.noisy', 'src'
    )
    steps.press('ArrowRight')
    assert (
        'Step 4 of 4' in page.inner_text('.told')
        and 'nothing to choose' in page.inner_text('.told')
        and 'not measured' in page.inner_text('.told')
    )
    page.locator('.strip [data-step]').nth(1).press('Enter')
    assert 'Step 2 of 4' in page.inner_text('.told')
    page.click('.play')
    page.wait_for_function("document.querySelector('.told').innerText.includes('Step 4')")
    page.locator('#pick-trajectories input').click()
    page.get_by_role('option').nth(2).click()
    page.wait_for_function(
        "document.querySelector('#trajectories .eyebrow').innerText.startsWith('composition')"
    )
    wait_for_address(page, 'sample=composition', 'epoch=5')


@pytest.mark.parametrize(
    'asked, words',
    [
        ('?run=long', '1000 of 1000 epochs'),
        ('?run=long&view=trajectories&epoch=10', 'epoch 10'),
        ('?run=joint&view=runs', 'joint'),
        ('?run=nowhere', 'is not here'),
    ],
)
def test_the_page_that_is_served_can_be_read(panel, asked, words):
    "Without a script; what is done on a page needs Gradio."
    page = httpx.get(f'{panel}/{asked}').text
    first = page.partition('<div id="first"')[2].partition('<gradio-app')[0]
    assert words in first and 'view=fairness' in first and page.count('<gradio-app') == 1


def test_nothing_is_served_early_where_something_is_done(panel):
    assert 'id="first"' not in httpx.get(f'{panel}/?view=vote').text


def test_a_name_in_the_served_page_is_only_text(panel):
    page = httpx.get(f'{panel}/', params=dict(run='<script>bad()</script>')).text
    assert '<script>bad' not in page and '&lt;script&gt;bad' in page


def test_deep_links(look, panel):
    page = look(f'{panel}/?run=joint&epoch=2&sample=composition%2F1', '.path .told p')
    assert (
        'composition' in page.inner_text('#trajectories .eyebrow')
        and 'epoch 2' in page.inner_text('#trajectories .eyebrow')
        and 'sample 1' in page.inner_text('#trajectories .eyebrow')
    )
    assert page.input_value('#epoch input[type=range]') == '2'
    gone = look(f'{panel}/?run=..%2Fsecret&epoch=-1&sample=%3Cb%3E', '#trajectories .note.error')
    assert 'This run is not here' in gone.inner_text('#trajectories')
    look(f'{panel}/?run=joint&epoch=99999999999&view=nothing&page=junk&deep_link=x', '#overview h1')


def test_back_and_forward_and_an_address_with_a_step(look, panel):
    "The address, the tab and the page say the same, whichever way one came."
    page = look(f'{panel}/?run=joint')
    page.wait_for_selector('#first', state='detached')
    chosen = '[role=tab][aria-selected=true]'
    at = lambda tab: page.wait_for_function(f"document.querySelector('{chosen}').innerText === '{tab}'")
    turn(page, 'Fairness')
    page.wait_for_selector('#fairness h1')
    turn(page, 'Results')
    page.wait_for_selector('#costs h1')
    assert not page.locator('#epoch').is_visible()  # nothing there depends on it
    page.go_back()
    at('Fairness')
    page.wait_for_selector('#fairness h1')
    wait_for_address(page, 'view=fairness')
    assert page.locator('#epoch').is_visible()
    page.go_back()
    at('Overview')
    wait_for_address(page, lacks=['view='])
    page.go_forward()
    at('Fairness')
    page.goto(f'{panel}/?run=joint&view=trajectories&step=3')
    page.wait_for_selector('#first', state='detached')
    page.wait_for_selector('.path .told p')
    assert 'Step 3 of 4' in page.inner_text('.told')


def test_every_view_keeps_its_state_in_the_address(look, panel):
    "And only its own; back brings the view as it was left, and an address that was copied brings all of it."
    page = look(f'{panel}/?run=joint&view=pairs', '#pairs .pair-grid')
    page.wait_for_selector('#first', state='detached')
    page.locator('.tools input[value=drag]').check()
    page.fill('.pairs-page [name=find]', 'a')
    turn(page, 'Samples')
    page.wait_for_selector('.samples-page')
    wait_for_address(page, lacks=['show=', 'find='])
    assert page.input_value('.samples-page [name=find]') == ''
    page.locator('.samples-page section:not([hidden]) .bars button').last.click()
    shared = wait_for_address(page, 'bar=')
    assert re.search(r'bar=\d', shared)
    kept = page.inner_text('.samples-page section:not([hidden]) .tally')
    again = look(shared, '.samples-page .tally')
    again.wait_for_selector('#first', state='detached')
    again.wait_for_function(f"document.querySelector('.samples-page .tally').innerText === '{kept}'")
    turn(page, 'Runs')
    page.wait_for_selector('#runs table.list')
    wait_for_address(page, lacks=['bar='])
    page.fill('#runs .filter', 'odd')
    page.click('#runs th button >> text=epochs')
    again = look(wait_for_address(page, 'words=odd', 'by=-epochs'), '#runs table.list')
    again.wait_for_selector('#first', state='detached')
    again.wait_for_function("document.querySelector('#runs .filter').value === 'odd'")
    assert again.get_attribute('#runs th:nth-child(3)', 'aria-sort') == 'descending'
    page.go_back()
    page.wait_for_url('**bar=*')
    page.go_back()
    page.wait_for_url('**show=drag*')
    page.wait_for_function("document.querySelector('.pair-grid').dataset.show === 'drag'")


def test_tabs_follow_the_pattern_of_tabs(look, panel):
    "WAI-ARIA's: one stop for the tab key, arrows, Home and End move and turn; the panel is named by its tab."
    page = look(f'{panel}/?run=joint')
    page.wait_for_selector('#first', state='detached')
    tabs = page.locator('#pages [role=tab]:visible')
    names = tabs.all_inner_texts()
    tabs.first.focus()
    focused = lambda: page.evaluate('document.activeElement.innerText')
    for key, name in (
        ('ArrowRight', names[1]),
        ('End', names[-1]),
        ('ArrowRight', names[0]),
        ('ArrowLeft', names[-1]),
        ('Home', names[0]),
    ):
        page.keyboard.press(key)
        page.wait_for_function(f'document.activeElement.innerText === {json.dumps(name)}')
        assert page.get_attribute('#pages [role=tab][aria-selected=true]', 'id') == page.evaluate(
            'document.activeElement.id'
        )
    assert focused() == names[0]
    stops = page.evaluate(
        "[...document.querySelectorAll('#pages [role=tab]')].filter(t => t.offsetParent && t.tabIndex === 0).map(t => t.innerText)"
    )
    assert stops == [names[0]]
    chosen = page.locator('#pages [role=tab][aria-selected=true]')
    shown = page.locator(f'#{chosen.get_attribute("aria-controls")}')
    assert shown.get_attribute('role') == 'tabpanel' and shown.is_visible()
    assert shown.get_attribute('aria-labelledby') == chosen.get_attribute('id')


def test_focus_is_seen_and_motion_can_be_less(look, panel):
    page = look(f'{panel}/?run=joint')
    page.wait_for_selector('#first', state='detached')
    style = lambda selector, name: page.evaluate(
        f"getComputedStyle(document.querySelector('{selector}')).{name}"
    )
    assert style('#overview .bar i', 'transitionDuration') != '0s'
    page.emulate_media(reduced_motion='reduce')
    assert style('#overview .bar i', 'transitionProperty') == 'none'
    for selector in ('#pages [role=tab][tabindex="0"]', '#overview summary', '#epoch input[type=range]'):
        page.locator(selector).first.focus()
        page.keyboard.press('Shift')  # as by the keyboard
        outline = page.evaluate(
            "(s => [s.outlineStyle, parseFloat(s.outlineWidth)])(getComputedStyle(document.activeElement))"
        )
        assert outline == ['solid', 3], selector


@pytest.mark.parametrize('path', ['glossary', 'vote?run=joint'])
def test_pages_that_stand_alone_can_be_used_by_everybody(look, panel, shots, path):
    page = look(f'{panel}/?run=joint', width=390, scheme='dark')
    page.goto(f'{panel}/{path}')
    page.wait_for_selector('h1')
    page.screenshot(path=shots / f'{path.partition("?")[0]}_390_dark.png', full_page=True)
    assert not violations(page) and page.evaluate('document.documentElement.scrollWidth') <= 390


def test_tabs_without_content_say_what_would_fill_them(look, tmp_path):
    "A run that nobody looked at for faces or objects."
    run = make_run(tmp_path / 'runs/plain', epochs=2, sheets=False)
    for file in (run.folder / 'frames').glob('*/frames.json'):
        told = json.loads(file.read_text())
        for task in told['tasks'].values():
            task |= dict(categories={}, boxes={})
        file.write_text(json.dumps(told))
    with serving(tmp_path / 'runs') as (address, _):
        page = look(address)
        page.wait_for_selector('#first', state='detached')
        tabs = [t.inner_text() for t in page.get_by_role('tab').all() if t.is_visible()]
        assert tabs[:2] == ['Overview', 'Results']
        for name in ('fairness', 'composition'):
            turn(page, name.capitalize())
            page.wait_for_selector(f'#{name} .note')
            assert f'drl train {name}' in page.inner_text(f'#{name}')


def test_names_are_only_text(look, panel):
    for view in ('overview', 'trajectories', 'runs'):
        page = look(f'{panel}/?run=odd+%22%3Cb%3E%22+%7B%7B7*7%7D%7D+name&view={view}', f'#{view} h1')
        assert page.title() != '1'
    assert '{{7*7}}' in page.inner_text('#runs') and page.locator('#runs h2 b').count() == 0
    assert '<img src=x' in look(
        f'{panel}/?run=odd+%22%3Cb%3E%22+%7B%7B7*7%7D%7D+name&view=trajectories', '#trajectories h1'
    ).inner_text('#trajectories h1')


def test_votes_are_counted_and_stay_blind(look, panel, home):
    told = lambda: page.inner_text('#tab-vote')
    page = look(f'{panel}/?run=joint&view=vote', '.ballot img')
    assert '0 of 3 pairs' in told()
    page.click('#vote-left')
    page.wait_for_function("document.querySelector('#tab-vote').innerText.includes('1 of 3 pairs')")
    assert '%' not in told() and 'tuned' not in told() and page.locator('.rate').count() == 0
    page.locator('.ballot h1').click()
    for keys in ('Alt+ArrowRight', 'Control+ArrowRight', 'Shift+ArrowLeft', 'Meta+ArrowLeft'):
        page.keyboard.press(keys)
    page.evaluate(
        "const held = {key: 'ArrowRight', repeat: true, bubbles: true};"
        "for (let i = 0; i < 25; i++) document.dispatchEvent(new KeyboardEvent('keydown', held))"
    )
    time.sleep(1)
    assert '1 of 3 pairs' in told()
    page.keyboard.press('ArrowRight')
    page.wait_for_function("document.querySelector('#tab-vote').innerText.includes('2 of 3 pairs')")
    page.click('#vote-tie')
    page.wait_for_selector('text=You have seen all 3 pairs')
    assert not page.locator('#vote-left').count() and 'of 1 voter on 3 pairs' in page.inner_text('#tab-vote')
    assert len((home / 'joint/eval/ballot/votes.jsonl').read_text().splitlines()) == 3


def test_weights_come_down(look, panel):
    page = look(f'{panel}/?run=joint&view=runs', '#runs .files')
    with page.expect_download() as got:
        page.click('text=unet/model.safetensors')
    assert Path(got.value.path()).read_bytes() == b'tensors'
    assert 'drl train joint --out runs/joint --resume' in page.inner_text('#runs')


WRITER = textwrap.dedent('''
    import os, sys, time
    os.fsync = lambda handle: None
    from drl_toolkit.runs.run import Run
    from panel import add_epoch
    with Run.open(sys.argv[1], write=True) as run:
        print('ready', flush=True)
        for epoch in range(2, 8): add_epoch(run, epoch); print(time.time(), flush=True); sys.stdin.readline()
''')


def test_a_live_run_is_followed(look, tmp_path):
    "Another process writes six epochs; a viewer at the end sees each, one who looks back keeps what they chose, and nothing flickers."
    make_run(tmp_path / 'runs/live', epochs=2, planned=8)
    with serving(tmp_path / 'runs') as (address, _):
        follower, looker = (
            look(f'{address}/?view=overview'),
            look(f'{address}/?run=live&epoch=0&sample=composition/1', '.path .told p'),
        )
        looker.locator('.player input').fill('3')
        follower.evaluate(
            "window.shortest = 1e9; const letters = () => document.querySelector('#overview').innerText.length;"
            "setInterval(() => shortest = Math.min(shortest, letters()), 10)"
        )
        writer = subprocess.Popen(
            [sys.executable, '-c', WRITER, tmp_path / 'runs/live'],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path)),
        )
        try:
            assert writer.stdout.readline() == 'ready\n'
            waits = []
            for epoch in range(2, 8):
                written = float(writer.stdout.readline())
                follower.wait_for_function(
                    f"document.querySelector('#overview .eyebrow').innerText.includes('{epoch + 1} of 8')",
                    polling=50,
                )
                waits.append(time.time() - written)
                writer.stdin.write('\n')
                writer.stdin.flush()
            print('seconds until a new epoch was seen:', [round(w, 2) for w in waits])
            assert statistics.median(waits) < 3 * max(1, os.getloadavg()[0] / os.cpu_count() / 2)
            assert (
                follower.input_value('#epoch input[type=range]') == '7'
                and follower.evaluate('shortest') > 100
            )
            looker.wait_for_function("document.querySelector('#epoch input[type=range]').max === '7'")
            assert (
                looker.input_value('#epoch input[type=range]') == '0'  # which was not the newest
                and 'epoch 0' in looker.inner_text('#trajectories .eyebrow')
                and 'sample 1' in looker.inner_text('#trajectories .eyebrow')
            )
            assert 'Step 3 of 4' in looker.inner_text('.told')
        finally:
            writer.communicate('\n' * 9, timeout=60)


@long
def test_a_thousand_epochs(look, panel, browser):
    "The first page below 2 s, the slider below 0.3 s, with room for a machine that does other things too."
    look(f'{panel}/?run=long')  # the browser's first start is not the panel's
    start = time.perf_counter()
    page = look(f'{panel}/?run=long', '.look h1')
    first, waits = time.perf_counter() - start, []
    page.wait_for_selector('#first', state='detached')
    alive = time.perf_counter() - start
    turn(page, 'Trajectories')
    page.wait_for_selector('.path .told p')
    for epoch in range(10, 1000, 80):
        start = time.perf_counter()
        page.locator('#epoch input[type=range]').fill(str(epoch))
        page.wait_for_function(
            f"document.querySelector('#trajectories .eyebrow').innerText.includes('epoch {epoch} ')",
            polling='raf',
        )
        waits.append(time.perf_counter() - start)
    print(f'first page {first:.2f} s, with sliders {alive:.2f} s, slider {statistics.median(waits):.3f} s')
    busy = max(1, os.getloadavg()[0] / os.cpu_count())  # processes that want a core
    assert first < 2 * 1.5 * busy and statistics.median(waits) < 0.3 * 1.5 * busy


def test_empty_folder_is_friendly(look, tmp_path):
    (tmp_path / 'runs').mkdir()
    with serving(tmp_path / 'runs') as (address, _):
        page = look(address, '#overview .note')
        assert 'There are no runs here yet' in page.inner_text('#overview')
        assert 'drl train joint --out runs/joint' in page.inner_text('#overview')
        make_run(tmp_path / 'runs/first', epochs=2)  # and it appears by itself
        page.wait_for_selector('#overview h1')


def test_a_run_that_is_gone_does_not_stop_the_panel(look, tmp_path):
    "Asked for by name, deleted or renamed while it is looked at: the page says so, goes on, and shows the run when it is (back) there."
    home = tmp_path / 'runs'
    make_run(home / 'one', epochs=2)
    make_run(home / 'two', epochs=3)
    with serving(home) as (address, _):
        page = look(f'{address}/?run=gone', '#overview .note.error')
        turn(page, 'Trajectories')
        page.wait_for_selector('#trajectories .note.error')
        make_run(home / 'gone', epochs=4)
        page.wait_for_selector('#trajectories .path .told p')
        assert page.input_value('#run input') == 'gone'
        os.rename(home / 'gone', home / 'elsewhere')
        page.wait_for_selector('#trajectories .note.error')
        turn(page, 'Runs')
        page.wait_for_function("document.querySelector('#runs').innerText.includes('elsewhere')")
        page.locator('#run input').click()
        page.get_by_role('option', name='two').click()
        turn(page, 'Overview')
        page.wait_for_function("document.querySelector('#overview').innerText.includes('3 of 3')")


def test_every_run_of_many_can_be_chosen(look, tmp_path):
    first = make_run(tmp_path / 'runs/000', epochs=2, sheets=False)
    for i in range(1, 150):
        shutil.copytree(first.folder, tmp_path / f'runs/{i:03d}', ignore=shutil.ignore_patterns('frames'))
    with serving(tmp_path / 'runs') as (address, _):
        page = look(address)
        page.wait_for_selector('#first', state='detached')
        page.locator('#run input').click()
        page.keyboard.press('Control+a')
        page.keyboard.type('149')  # the menu shows a hundred; typing finds each
        page.locator('[role=option][aria-label="149"]').click()
        page.wait_for_function("new URL(location).searchParams.get('run') === '149'")
        start = time.perf_counter()
        turn(page, 'Runs')
        page.wait_for_function("document.querySelectorAll('#runs td.says').length === 150")
        print(f'{time.perf_counter() - start:.2f} s')


NGINX = """worker_processes 1; pid %(home)s/pid; error_log %(home)s/error; daemon off; master_process off;
events { worker_connections 64; }
http { access_log off; client_body_temp_path %(home)s/a; proxy_temp_path %(home)s/b;
  fastcgi_temp_path %(home)s/c; uwsgi_temp_path %(home)s/d; scgi_temp_path %(home)s/e;
  server { listen 127.0.0.1:%(port)d; location = /favicon.ico { return 204; }
    location /deep/panel/ { proxy_pass %(address)s/; proxy_set_header Host $http_host;
      proxy_set_header X-Forwarded-Prefix /deep/panel; proxy_buffering off; proxy_http_version 1.1; }
    location /plain/ { proxy_pass %(rooted)s/; proxy_set_header Host $http_host; proxy_buffering off; proxy_http_version 1.1; } } }"""


@pytest.mark.parametrize('place', ['deep/panel', 'plain'])
def test_behind_a_proxy_below_a_path(look, home, tmp_path, place):
    "nginx that says what it cut off (X-Forwarded-Prefix), and one that does not (--root-path)."
    import socket

    if not shutil.which('nginx'):
        pytest.skip('there is no nginx on this machine')
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    with serving(home) as (address, _), serving(home, root_path='/plain') as (rooted, _):
        (tmp_path / 'nginx.conf').write_text(
            NGINX % dict(home=tmp_path, port=port, address=address, rooted=rooted)
        )
        proxy = subprocess.Popen(
            ['nginx', '-c', str(tmp_path / 'nginx.conf'), '-p', str(tmp_path)], stderr=subprocess.PIPE
        )
        try:
            assert any(socket_there(port) or time.sleep(0.1) for _ in range(100)), proxy.stderr.read()
            page = look(f'http://127.0.0.1:{port}/{place}/?run=joint&view=trajectories', '.path .told p')
            page.wait_for_selector('#first', state='detached')
            turn(page, 'Runs')
            page.wait_for_selector('#runs .files')
            with page.expect_download() as got:
                page.click('text=unet/model.safetensors')
            assert Path(got.value.path()).read_bytes() == b'tensors'
            wait_for_address(page, f'/{place}/?')
        finally:
            proxy.terminate()
            proxy.wait(10)
            proxy.stderr.close()


def socket_there(port):
    import socket

    try:
        socket.create_connection(('127.0.0.1', port), 1).close()
    except OSError:
        return False
    return True


def test_training_from_the_page(look, tmp_path):
    "Start, pause, go on, stop: a real run in another process."
    with serving(tmp_path / 'runs', allow_train=True) as (address, served):
        bench = served.state.bench
        bench.options = (
            '--num-steps',
            '2',
            '--train-steps',
            '1',
            '--num-minibatches',
            '1',
            '--train',
            'lora',
        )
        page = look(f'{address}/?view=train', '#train-start')
        for button in ('pause', 'run', 'stop'):  # nothing that they could do
            page.wait_for_selector(f'#train-{button}:disabled')
        page.locator('#epochs input[type=range]').fill('20')
        page.click('#train-start')
        page.wait_for_selector('text=is training')
        page.wait_for_selector('#train-start:disabled')
        done = lambda: (
            (bench.out / 'metrics.jsonl').read_text().count('"task": null')
            if (bench.out / 'metrics.jsonl').exists()
            else 0
        )
        until = lambda test, seconds=300: next(
            (True for _ in range(seconds * 10) if test() or time.sleep(0.1)), False
        )
        assert until(lambda: done() >= 1), bench.said()
        page.wait_for_selector('text=of 20 epochs are done')
        page.wait_for_function(f"document.querySelector('#run input').value === '{bench.out.name}'")
        wait_for_address(page, f'run={bench.out.name}')
        assert str(tmp_path) not in page.inner_text('body')
        page.click('#train-pause')
        page.wait_for_selector('text=It pauses after this epoch')
        assert until(lambda: (count := done()) and not time.sleep(4) and done() == count), 'it went on'
        page.click('#train-run')
        assert until(lambda n=done(): done() > n), 'it did not go on'
        page.click('#train-stop')
        assert until(lambda: not bench.busy), 'it did not stop'
        page.wait_for_selector('text=has ended')
        assert done() < 20 and Run.open(bench.out).about['recipe'] == 'compressibility'
        turn(page, 'Overview')
        page.wait_for_selector('#overview h1')


# --- without a browser


def functions(address):
    return httpx.get(f'{address}/config').json()['dependencies']


def test_read_only_has_nothing_to_train_with(panel, tmp_path):
    told = httpx.get(f'{panel}/config').text
    assert 'train-start' not in told and 'Train a model here' not in told
    with serving(tmp_path / 'runs', allow_train=True) as (address, _):
        assert 'train-start' in httpx.get(f'{address}/config').text


SECRET = '/etc/passwd'


@pytest.mark.parametrize(
    'path',
    [
        f'gradio_api/file={SECRET}',
        f'file={SECRET}',
        f'gradio_api/file/{SECRET}',
        f'gradio_api/file=../../../../..{SECRET}',
        f'gradio_api/file=%2e%2e/%2e%2e{SECRET}',
        f'static/../../../../../..{SECRET}',
        f'assets/..%2f..%2f..%2f..%2f..%2f..{SECRET}',
        f'static/%2e%2e/%2e%2e/%2e%2e/%2e%2e{SECRET}',
        f'assets//{SECRET}',
        'gradio_api/proxy=http://127.0.0.1:22/',
        f'gradio_api/custom_component/x/y/z/..%2f..{SECRET}',
        f'svelte/..{SECRET}',
        'gradio_api/deep_link',
        f'weights?run=joint&file={SECRET}',
        'weights?run=joint&file=../config.json',
        f'weights?run=..&file={SECRET}',
        f'weights?run={SECRET}&file=x',
        'weights?run=joint&file=unet',
        'weights?run=joint',
        'monitoring',
        'gradio_api/runs',
        'gradio_api/openapi.json',
        'docs',
        'openapi.json',
        'gradio_api/vibe-code',
        'gradio_api/app_id',
        'gradio_api/dev/reload',
        f'%00{SECRET}',
        f'..{SECRET}',
        f'//{SECRET}',
        'weights?run=joint&file=unet%2fmodel.safetensors%00.json',
    ],
)
def test_nothing_else_is_answered(panel, path):
    "Raw requests, since clients tidy paths."
    import http.client

    connection = http.client.HTTPConnection(panel.removeprefix('http://'), timeout=30)
    connection.putrequest('GET', f'/{path}', skip_host=False)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status in (400, 403, 404, 422) and b'root:' not in body and b'"recipe"' not in body, (
        answer.status,
        body[:200],
    )


@pytest.mark.parametrize(
    'path',
    [
        'gradio_api/upload',
        'gradio_api/component_server',
        'gradio_api/component_server_upload',
        'gradio_api/stream/x',
        'gradio_api/process_recording',
        'gradio_api/vibe-edit',
        'gradio_api/run-history/connect',
        'gradio_api/call/open',
        'login',
        'gradio_api/api/predict',
        'gradio_api/run/open',
    ],
)
def test_nothing_can_be_sent(panel, path):
    assert httpx.post(f'{panel}/{path}', files=dict(files=b'x')).status_code in (404, 405)


def test_hostile_calls(panel, home, tmp_path):
    "Every function of the page, with what no page would send."
    start, before = (
        time.time(),
        {p: p.read_bytes() for p in home.rglob('*') if p.is_file() and p.name != 'votes.jsonl'},
    )
    evil = [
        '../../etc',
        SECRET,
        {'path': SECRET, 'meta': {'_type': 'gradio.FileData'}},
        None,
        10**30,
        -1,
        '__class__',
        ['x'],
        {'a': {}},
        '<script>',
    ]
    for function in functions(panel):
        if not function['backend_fn']:
            continue
        for i in range(3):
            values = [evil[(i + k) % len(evil)] for k in range(len(function['inputs']))]
            answer = httpx.post(
                f'{panel}/gradio_api/run/predict',
                json=dict(fn_index=function['id'], data=values, session_hash=f's{i}'),
                timeout=60,
            )
            assert (
                'root:' not in answer.text and str(home) not in answer.text and 'Traceback' not in answer.text
            )
            assert answer.status_code == (400 if any(isinstance(v, (dict, list)) for v in values) else 200)
    assert {p: p.read_bytes() for p in home.rglob('*') if p.is_file() and p.name != 'votes.jsonl'} == before
    copies = [
        p
        for p in Path(tempfile.gettempdir(), 'gradio').rglob('*')
        if p.is_file() and p.read_bytes() == Path(SECRET).read_bytes() and p.stat().st_mtime > start
    ]
    assert not copies


@pytest.mark.parametrize('view', app.LABELS)
def test_no_page_is_a_dead_one(tmp_path, view):
    "Whatever is wrong with a run, each function that draws its page answers, and says so."
    home = tmp_path / 'runs'
    linked, voted, numbers = (
        make_run(home / 'linked', epochs=2),
        make_run(home / 'voted', epochs=2),
        make_run(home / 'numbers', epochs=2),
    )
    (tmp_path / 'outside').mkdir()
    (linked.folder / 'weights').symlink_to(tmp_path / 'outside')
    (voted.folder / 'ballot').mkdir()
    (voted.folder / 'ballot/pairs.json').write_text('{}')
    rows = ''.join(
        '{"epoch": %d, "task": "x", "reward": NaN, "kl": NaN, "parity": NaN}\n{"epoch": %d, "task": null, "seconds": NaN}\n'
        % (e, e)
        for e in range(9)
    )
    (numbers.folder / 'metrics.jsonl').write_text(rows)
    from drl_toolkit.ui.panel import Library, Panel

    if view == 'train':
        return
    panel = Panel(Library(home))
    for name in ('linked', 'voted', 'numbers', 'gone', None):
        shown = panel.look(view, name, None, '')[panel.html[view]]
        assert isinstance(shown, str) and str(tmp_path) not in shown


def test_no_voting_page_is_a_dead_one(tmp_path):
    "A run without a ballot, with a damaged one, with none of its name: a sentence, and no place of a folder."
    from fastapi.testclient import TestClient

    home = tmp_path / 'runs'
    voted, linked = (
        make_run(home / 'voted', epochs=2, sheets=False),
        make_run(home / 'linked', epochs=2, sheets=False),
    )
    (voted.folder / 'ballot').mkdir()
    (voted.folder / 'ballot/pairs.json').write_text('{}')
    add_ballot(make_run(tmp_path / 'outside', epochs=2, sheets=False))
    (linked.folder / 'eval').symlink_to(tmp_path / 'outside/eval')
    client = TestClient(app.make_app(home), base_url='http://localhost')
    form = {'content-type': 'application/x-www-form-urlencoded'}
    for query in ('?run=voted', '?run=linked', '?run=gone', '?run=..%2Foutside', ''):
        for answer in (
            client.get(f'/vote{query}'),
            client.post(f'/vote{query}', content='pair=0000&choice=left', headers=form),
            client.get(f'/vote/0000/left.png{query}'),
        ):
            assert (
                answer.status_code in (400, 403, 500)
                and 'note error' in answer.text
                and str(tmp_path) not in answer.text
            )
    assert (
        client.post('/vote?run=voted', json={}).status_code == 415
        and client.post('/vote?run=voted', content='x' * 2000, headers=form).status_code == 413
    )


# --- who may ask

EVIL = [
    dict(Host='evil.example'),
    dict(Host='evil.example:80', Origin='http://evil.example:80'),
    dict(Origin='http://evil.example'),
    dict(Origin='null'),
    dict(Origin='http://127.0.0.1:9'),
    dict(Host='127.0.0.1.evil.example'),
]


@pytest.mark.parametrize('headers', EVIL)
def test_other_names_and_other_pages_get_nothing(panel, headers):
    for method, path in (
        ('GET', '/'),
        ('GET', '/config'),
        ('GET', '/weights?run=joint&file=unet/model.safetensors'),
        ('OPTIONS', '/gradio_api/run/predict'),
        ('POST', '/gradio_api/run/predict'),
    ):
        answer = httpx.request(
            method, f'{panel}{path}', headers=headers, **(dict(json={}) if method == 'POST' else {})
        )
        assert (
            answer.status_code in (403, 421)
            and not [h for h in answer.headers if h.startswith('access-control')]
            and 'joint' not in answer.text
        )


def test_a_rebound_name_does_not_start_training(tmp_path):
    with serving(tmp_path / 'runs', allow_train=True) as (address, served):
        start = next(d for d in functions(address) if len(d['inputs']) == 2 and d['backend_fn'])
        call = dict(fn_index=start['id'], data=['compressibility', 1], session_hash='x')
        for headers in EVIL:
            assert httpx.post(
                f'{address}/gradio_api/run/predict', json=call, headers=headers
            ).status_code in (403, 421)
        assert (
            httpx.post(
                f'{address}/gradio_api/run/predict',
                content='{"data": []}',
                headers={'content-type': 'text/plain'},
            ).status_code
            == 415
        )
        assert served.state.bench.process is None


def test_beyond_this_machine_a_token_is_needed(home):
    from drl_toolkit.utils.web import access_to

    access = access_to('0.0.0.0')
    with (
        serving(home, access=access) as (address, _),
        httpx.Client(base_url=address, follow_redirects=False) as client,
    ):
        for path in ('/', '/config', '/weights?run=joint&file=x', '/?token=guess'):
            assert client.get(path).status_code == 401
        assert client.post('/gradio_api/run/predict', json={}).status_code == 401
        moved = client.get('/', params=dict(run='joint', token=access.token))
        assert (
            moved.status_code == 303
            and moved.headers['location'] == '?run=joint'
            and 'HttpOnly' in moved.headers['set-cookie']
            and access.token not in moved.headers['location']
        )
        assert (
            client.get('/?run=joint').status_code == 200
            and client.get('/', headers=dict(host='192.0.2.7')).status_code == 200
        )
        assert client.get('/', headers=dict(host='evil.example')).status_code == 421


def test_training_by_viewers_never_without_a_token(tmp_path):
    from drl_toolkit.ui.panel import serve

    with pytest.raises(ValueError, match='open must be off'):
        serve(tmp_path, 0, '0.0.0.0', allow_train=True, open=True)


@pytest.mark.parametrize('chunked', [False, True])
def test_a_large_body_is_refused_before_it_is_held(panel, chunked):
    "200 MB: the process that serves is this one, so its memory tells."
    import socket

    peak = lambda: int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1024
    if not Path('/proc/self/clear_refs').exists():
        pytest.skip('Linux only')
    Path('/proc/self/clear_refs').write_text('5')
    before, port = peak(), int(panel.rpartition(':')[2])
    with socket.create_connection(('127.0.0.1', port), 20) as s:
        kind = b'Transfer-Encoding: chunked' if chunked else b'Content-Length: 200000000'
        s.sendall(
            b'POST /gradio_api/run/predict HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n'
            % port
            + kind
            + b'\r\n\r\n'
        )
        part = b' ' * 2**16
        try:
            for _ in range(3200):
                s.sendall(b'10000\r\n' + part + b'\r\n' if chunked else part)
        except OSError:
            pass
        try:
            answer = s.recv(4096)
        except OSError:
            answer = b' 413 '  # closed in our face, while we still sent
    assert b' 413 ' in answer and peak() - before < 60


def test_an_image_has_an_address_and_is_encoded_once(panel, monkeypatch):
    "The same images on a page that is drawn again, for another viewer, in another epoch; a browser keeps them."
    app._drawn.cache_clear()
    encoded, encode = [], app.encode_image
    monkeypatch.setattr(app, 'encode_image', lambda *a, **k: encoded.append(1) or encode(*a, **k))
    addresses = lambda view: set(
        re.findall(r'src="(images/[^"]+)"', httpx.get(f'{panel}/?run=joint&epoch=3&view={view}').text)
    )
    first = addresses('trajectories')
    assert len(first) > 5 and len(encoded) <= len(first)
    count = len(encoded)
    app._drawn.cache_clear()
    assert addresses('trajectories') == first and len(encoded) == count
    for address in [*first, *addresses('fairness')]:
        answer = httpx.get(f'{panel}/{address}')
        assert (
            answer.status_code == 200
            and answer.headers['content-type']
            == ('image/svg+xml' if address.endswith('svg') else 'image/webp')
            and 'immutable' in answer.headers['cache-control']
        )
    assert httpx.get(f'{panel}/images/{"0" * 32}.webp').status_code == 404


def test_half_a_request_is_not_held_by_the_panel(home):
    import socket
    from drl_toolkit.utils.server import Server
    import threading

    with (
        Server(app.make_app(home), '127.0.0.1', 0, seconds=0.3) as server,
        socket.create_connection(server.server_address, 5) as line,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        began = time.monotonic()
        line.sendall(b'GET / HT')
        assert line.recv(1000) == b'' and time.monotonic() - began < 3
        server.shutdown()


def test_the_panel_takes_no_chosen_voter(panel, home):
    votes = home / 'joint/eval/ballot/votes.jsonl'
    before = votes.read_bytes() if votes.exists() else b''
    for i in range(5):
        for cookie in ({}, dict(voter=f'me{i}'), dict(voter='a.b')):
            assert (
                httpx.post(
                    f'{panel}/vote?run=joint', data=dict(pair='0001', choice='left'), cookies=cookie
                ).status_code
                == 403
            )
    for headers in EVIL:
        assert httpx.post(
            f'{panel}/vote?run=joint', data=dict(pair='0001', choice='left'), headers=headers
        ).status_code in (403, 421)
    assert (votes.read_bytes() if votes.exists() else b'') == before


def test_headers(panel):
    answer = httpx.get(panel)
    assert (
        "default-src 'self'" in answer.headers['content-security-policy']
        and answer.headers['x-content-type-options'] == 'nosniff'
    )
    assert all(
        word in httpx.get(f'{panel}/vote?run=joint').headers['set-cookie']
        for word in ('HttpOnly', 'SameSite=strict')
    )
    assert 'fonts.googleapis' not in answer.text and str(Path.home()) not in answer.text


@long
def test_thirty_viewers(panel):
    "They open the page, wait and look at another epoch, all at once."
    known = {d['targets'][0][1] if d['targets'] else '': d for d in functions(panel) if d['backend_fn']}
    load, tick = known['load'], known['tick']

    def viewer(i):
        with httpx.Client(base_url=panel, timeout=120) as client:
            call = lambda f, *data: client.post(
                '/gradio_api/run/predict?run=long',
                json=dict(fn_index=f['id'], data=list(data), session_hash=f'viewer{i}'),
            )
            return [client.get('/').status_code, call(load).status_code] + [
                call(tick, None, 'long', 1000, None, None, None).status_code for _ in range(6)
            ]

    with ThreadPoolExecutor(30) as pool:
        answers = [s for statuses in pool.map(viewer, range(30)) for s in statuses]
    assert answers == [200] * 240


@pytest.mark.parametrize(
    'argv, words',
    [
        (['app', 'no-such-folder'], "'no-such-folder' is not there"),
        (['app', '--port', '99999'], 'port is 99999'),
        (['app', '--port', 'x'], '--port'),
        (['app', 'a', 'b'], 'unknown'),
        (['app', '--host', '203.0.113.9', '--port', '0'], 'cannot listen'),
    ],
)
def test_drl_app_says_what_is_wrong(argv, words, capsys, tmp_path, monkeypatch):
    from drl_toolkit.cli.main import main

    monkeypatch.chdir(tmp_path)
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and words in capsys.readouterr().err
