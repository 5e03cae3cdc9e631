"Before and after: pairs of images, in a browser and without one."

import io, time

import httpx, numpy as np, pytest
from PIL import Image

from drl_toolkit.runs.folder import RunError
from drl_toolkit.runs.run import Run
from drl_toolkit.ui import pairs
from drl_toolkit.utils.images import to_tensor
from browsing import violations, wait_for_address
from panel import make_run, picture, serving
from panel import quick  # noqa: F401 (a fixture)
from tiers import some

COUNT = 20
PROMPTS = [f'prompt number {i}' for i in range(COUNT)]


def shots_at(epoch):
    "Images of which number i changes the more the larger i is."
    base = [np.asarray(picture(25 * i), float) for i in range(COUNT)]
    share = 0 if epoch == 0 else 0.5 + epoch / 20
    fade = lambda image, i: image * (1 - share * i / COUNT)
    return [Image.fromarray(fade(image, i).astype(np.uint8)) for i, image in enumerate(base)]


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('pairs') / 'runs'
    run = make_run(home / 'faded', epochs=10, sheets=False)
    for epoch in (0, 5, 10):
        run.save_sheet(epoch, to_tensor(shots_at(epoch)))
    run.save_sheet_prompts(PROMPTS, seed=1)
    return home


@pytest.fixture(scope='module')
def panel(home):
    with serving(home) as (address, _):
        yield address


def test_the_largest_change_comes_first(home):
    "By a mean of numpy's; the prompt goes with its image, blank places of the sheet do not count."
    found = pairs.pairs_of(Run.open(home / 'faded'))
    assert (found.before, found.after, found.epochs) == (0, 10, [0, 5, 10])
    before, after = shots_at(0), shots_at(10)
    truth = [np.abs(np.asarray(b, float) - np.asarray(a, float)).mean() / 255 for b, a in zip(before, after)]
    order = sorted(range(COUNT), key=lambda i: -truth[i])
    assert [p.cell for p in found.pairs] == order and len(set(truth)) == COUNT
    assert [p.prompt for p in found.pairs] == [PROMPTS[i] for i in order]
    assert np.allclose([p.change for p in found.pairs], [truth[i] for i in order], atol=1e-9)


@pytest.mark.parametrize('epoch, after', [(None, 10), (10, 10), (9, 5), (5, 5), (3, 5), (0, 5)])
def test_the_epoch_chooses_the_second_picture(home, epoch, after):
    assert pairs.pairs_of(Run.open(home / 'faded'), epoch).after == after


def test_prompts_that_nobody_knows(tmp_path):
    "Neither told nor guessed: blank places are left out, and the page says which image it is."
    run = make_run(tmp_path / 'r', epochs=5, sheets=False)
    assert 'There are no pairs yet' in pairs.before_after(run)
    for epoch in (0, 5):
        run.save_sheet(epoch, to_tensor(shots_at(epoch)[:11]))
    assert len(pairs.pairs_of(run).pairs) == 11 and 'image 11 of the sheet' in pairs.before_after(run)
    other = pairs.PageContext(sheet_prompts=lambda run: ['one'] * 3)  # of another recipe
    assert {p.prompt for p in pairs.pairs_of(run, context=other).pairs} == {''}


@pytest.mark.parametrize('text', ['{', '{}', '[]', '{"prompts": 3}', '{"prompts": [1]}'])
def test_damaged_prompts_are_named(tmp_path, text):
    run = make_run(tmp_path / 'r', epochs=2)
    (run.folder / 'samples/prompts.json').write_text(text)
    with pytest.raises(RunError, match='prompts.json'):
        pairs.pairs_of(run)


def test_the_prompts_are_written_once(tmp_path):
    with Run.create(tmp_path / 'r', {}) as run:
        run.save_sheet_prompts(['a'], seed=1)
        run.save_sheet_prompts(['b'], seed=2)
    assert pairs.prompts_of_sheets(run) == ['a']


def test_pictures_have_addresses(panel, home):
    "The image of the sheet, and the map of a difference: dark where nothing changed."
    shown = lambda **query: httpx.get(f'{panel}/sheet', params=dict(run='faded') | query)
    opened = lambda answer: np.asarray(Image.open(io.BytesIO(answer.content)).convert('RGB'), float)
    answer = shown(epoch=5, cell=19)
    assert answer.headers['content-type'] == 'image/webp' and 'private' in answer.headers['cache-control']
    assert np.abs(opened(answer) - np.asarray(shots_at(5)[19], float)).mean() < 6  # WebP's loss
    assert (
        opened(shown(epoch=10, against=0, cell=0)).mean()
        < 4
        < 40
        < opened(shown(epoch=10, against=0, cell=19)).mean()
    )
    for bad in (
        dict(epoch=5, cell=99),
        dict(epoch=5, cell=-1),
        dict(epoch=7, cell=0),
        dict(epoch=5, cell=0, against=3),
    ):
        answer = shown(**bad)
        assert answer.status_code == 404 and 'must be' in answer.text or 'got' in answer.text
    gone = shown(run='../faded', epoch=5, cell=0)
    assert gone.status_code == 404 and str(home) not in gone.text
    assert shown(epoch='x', cell=0).status_code == 422


def names(page):
    "The prompts that can be seen, from the first to the last."
    return page.evaluate(
        "[...document.querySelectorAll('.pair-grid > li:not([hidden]) h2')].map(h => h.innerText)"
    )


def test_pairs_in_a_browser(look, panel):
    page = look(f'{panel}/?run=faded&view=pairs', '#pairs .pair-grid')
    page.wait_for_selector('#first', state='detached')
    quoted = [f'“{p}”' for p in PROMPTS]
    ranked = names(page)
    assert len(ranked) == 8 and ranked[0] in quoted[15:] and '8 of 20 pairs' in page.inner_text('.tally')
    page.select_option('.tools [name=count]', '16')
    assert len(names(page)) == 16 and names(page)[:8] == ranked
    page.select_option('.tools [name=order]', 'least')
    assert names(page)[0] == quoted[0]
    page.fill('.tools [name=find]', 'NUMBER 1')
    assert set(names(page)) == {quoted[1], *quoted[10:]}
    page.fill('.tools [name=find]', 'nothing')
    assert names(page) == [] and page.is_visible('.none')
    page.fill('.tools [name=find]', '')
    page.locator('.tools input[value=drag]').check()
    border = page.locator('.pair-grid .drag input').first
    border.fill('20')
    assert page.evaluate(
        "getComputedStyle(document.querySelector('.pair-grid > li .drag .is')).clipPath"
    ).endswith('20%)')
    again = look(wait_for_address(page, 'show=drag', 'order=least', 'count=16'), '#pairs .pair-grid')
    again.wait_for_selector('#first', state='detached')
    again.wait_for_function("document.querySelector('.pair-grid').dataset.show === 'drag'")
    assert names(again) == names(page)


def test_one_pair_large(look, panel):
    "Click, arrow keys, the slider through the epochs, Escape; all of it in the address."
    page = look(f'{panel}/?run=faded&view=pairs', '#pairs .pair-grid')
    page.wait_for_selector('#first', state='detached')
    ranked = names(page)
    page.locator('.open').nth(1).click()
    title = lambda: page.inner_text('.viewer h2')
    assert title() == ranked[1] and '2 of 20' in page.inner_text('.viewer .where')
    wait_for_address(page, 'pair=')
    page.keyboard.press('ArrowRight')
    assert title() == ranked[2]
    for _ in range(4):
        page.keyboard.press('ArrowLeft')
    assert title() == ranked[0] and page.is_disabled('.viewer [data-by="-1"]')
    through = page.locator('.viewer [name=through]')
    assert through.input_value() == '2' and 'epoch 10' in page.inner_text('.viewer .through output')
    began = time.perf_counter()
    through.fill('1')
    page.wait_for_function(
        "[...document.querySelectorAll('.viewer .one.is img')].every(i => i.complete && i.src.includes('epoch=5&'))"
    )
    print(f'another epoch after {time.perf_counter() - began:.3f} s')
    assert 'epoch 5' in page.inner_text('.viewer .one.is figcaption')
    page.locator('.viewer input[value=heat]').check()
    page.wait_for_function("document.querySelector('.viewer .heat img').naturalWidth === 64")
    assert 'against=0' in page.get_attribute('.viewer .heat img', 'src')
    page.keyboard.press('Escape')
    page.wait_for_selector('.viewer', state='hidden')
    wait_for_address(page, lacks=['pair='])
    shared = look(f'{panel}/?run=faded&view=pairs&pair=3', '.viewer[open]')
    assert shared.inner_text('.viewer h2') == '“prompt number 3”'


@pytest.mark.parametrize(
    'width, scheme',
    some([(1280, 'light'), (1280, 'dark'), (390, 'light'), (390, 'dark')], [(1280, 'light'), (390, 'dark')]),
)
def test_pairs_can_be_used_by_all(look, panel, width, scheme):
    page = look(f'{panel}/?run=faded&view=pairs', '#pairs .pair-grid', width=width, scheme=scheme)
    page.wait_for_selector('#first', state='detached')
    for view in ('side', 'drag', 'heat'):
        page.locator(f'.tools input[value={view}]').check()
        assert violations(page, '#pairs') == [], view
        assert page.evaluate('document.documentElement.scrollWidth') <= width
    page.locator('.open').first.click()
    assert violations(page, '.viewer') == []
    assert page.evaluate("document.querySelector('.viewer').getBoundingClientRect().right") <= width
