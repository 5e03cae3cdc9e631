"What tests in a real browser share: Chromium, a page in which nothing may go wrong, and axe-core."

from importlib.util import find_spec
from pathlib import Path

import pytest

from browser import CHROMIUM, FLAGS


@pytest.fixture(scope='module')
def browser():
    if not CHROMIUM:
        pytest.skip('there is no chromium on this machine; apt-get install chromium, as .ci/run does')
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        yield p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture
def look(browser, tmp_path):
    "A function that opens an address and returns the page; at the end nothing may have gone wrong in it."
    wrong, contexts = [], []

    def open_(address, selector='#overview h1', width=1280, scheme='light'):
        context = browser.new_context(
            viewport=dict(width=width, height=900), color_scheme=scheme, accept_downloads=True
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120000)
        page.on('console', lambda m: wrong.append(m.text) if m.type == 'error' else None)
        page.on('pageerror', lambda e: wrong.append(str(e)))
        page.on(
            'request',
            lambda r: (
                None
                if r.url.startswith((address.split('/?')[0], 'data:', 'blob:'))
                else wrong.append(f'asked for {r.url}')
            ),
        )
        page.goto(address, wait_until='domcontentloaded')
        page.wait_for_selector(selector)
        return page

    yield open_
    for context in contexts:
        context.close()
    # a server that was stopped before its pages
    faults = [w for w in wrong if 'ERR_CONNECTION' not in w and 'ERR_INCOMPLETE' not in w]
    assert not faults, faults


def turn(page, name):
    page.get_by_role('tab', name=name, exact=True).click()


def wait_for_address(
    page,  # of Playwright
    *there: str,  # what the address has to hold
    lacks: list = (),  # and what it must not
) -> str:  # the address then
    "The page's own address: Playwright's `page.url` learns of a change later, and so does a closed dialog."
    page.wait_for_function(
        """([there, lacks]) => there.every(word => location.href.includes(word))
        && !lacks.some(word => location.href.includes(word))""",
        arg=[list(there), list(lacks)],
        timeout=10000,
    )
    return page.evaluate('location.href')


# --- accessibility

# What axe-core finds of the tags below is a violation of WCAG 2.2 AA, or of its authors' best practices.
TAGS = ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']


def violations(
    page,  # of Playwright
    inside: str = None,  # a selector: only what lies there is looked at
    tags: list = TAGS,
) -> list:  # of strings: a rule, and the places that break it
    "What axe-core finds on a page."
    spec = find_spec('axe_playwright_python')
    if spec is None:
        pytest.skip('axe-playwright-python is not installed; make test installs it')
    if not page.evaluate('() => Boolean(window.axe)'):
        page.evaluate(Path(spec.origin).with_name('axe.min.js').read_text(encoding='utf-8'))
    found = page.evaluate(
        '([inside, tags]) => axe.run(inside || document, {runOnly: tags, resultTypes: ["violations"]})',
        [inside, tags],
    )
    return [
        f"{rule['id']}: {node['target']} {node['failureSummary'].splitlines()[-1].strip()}"
        for rule in found['violations']
        for node in rule['nodes']
    ]
