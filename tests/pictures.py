"""The images of README.md, from the runs that are shipped: `python tests/pictures.py`, or `make pictures`.

The film of the joint run, and the panel's pages in Chromium. Whoever makes them anew looks at them."""

import io, sys, tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from browser import CHROMIUM, FLAGS
from drl_toolkit.runs.run import Run
from drl_toolkit.ui.pairs import film, save_film
from drl_toolkit.utils.loading import assets_dir
from panel import serving

IMAGES = Path(__file__).parent.parent / 'nbs/images'
RUNS = assets_dir() / 'runs'
PAGES = dict(overview='joint', trajectories='joint', fairness='joint', branches='branches')  # page -> its run
# All images that are seen have come.
SEEN = "[...document.images].filter(i => i.offsetParent && i.loading !== 'lazy').every(i => i.complete)"
WIDTH, HEIGHT = 1180, 820  # pixels of a page; what is lower is cut off


def pictures_of_the_panel(folder):
    "An image of each page, on a light ground."
    nowhere = Path(tempfile.gettempdir()) / 'no-runs-here'
    with serving(nowhere, home='runs', recorded=RUNS) as (address, _), sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=dict(width=WIDTH, height=HEIGHT), color_scheme='light')
        for name, run in PAGES.items():
            page.goto(f'{address}/?run=recorded/{run}&view={name}', wait_until='domcontentloaded')
            page.wait_for_selector('#first', state='detached')
            page.wait_for_selector(f'#{name} h1')
            page.wait_for_function(SEEN)
            shot = Image.open(io.BytesIO(page.screenshot()))
            shot.convert('RGB').save(folder / f'panel_{name}.webp', 'WEBP', quality=82, method=6)
            print(folder / f'panel_{name}.webp')
        browser.close()


def main(folder=IMAGES):
    save_film(film(Run.open(RUNS / 'joint')), folder / 'change.webp')
    print(folder / 'change.webp')
    pictures_of_the_panel(folder)


if __name__ == '__main__':
    main(*map(Path, sys.argv[1:]))
