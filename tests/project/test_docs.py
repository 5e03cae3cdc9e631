"""The site: every notebook has a page in its room, and the room's page lists it.

That Sphinx builds it is for the long form."""

import json, os, re
from pathlib import Path

import pytest

import docs, readme

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site') / 'source'
    docs.stage(folder)
    return folder


def test_every_notebook_is_a_page_of_its_room(source):
    for page in readme.notebooks():
        assert (source / page).is_file()
        if len(page.parts) > 1:
            assert (
                f'<{page.relative_to(page.parts[0]).with_suffix("")}>'
                in (source / page.parts[0] / 'index.md').read_text()
            )


def test_every_room_of_the_package_has_a_page(source):
    rooms = {p.parent.name for p in (ROOT / 'drl_toolkit').glob('*/__init__.py')}
    assert rooms == set(readme.rooms()) and all((source / room / 'names.md').is_file() for room in rooms)


def test_names_come_with_the_comments_of_their_parameters(source):
    text = (source / 'algorithms/names.md').read_text()
    assert '### `group_deviation`' in text and '| `groups` | `torch.Tensor` | (B,) long |' in text


def test_pages_hold_no_cells_of_nbdev(source):
    for page in readme.notebooks():
        cells = json.loads((source / page).read_text())['cells']
        assert not [
            c for c in cells if c['cell_type'] == 'code' and re.search(r'^#\|', ''.join(c['source']), re.M)
        ], page


def test_llms_txt_leads_somewhere():
    for name in ('llms.txt', 'CHANGELOG.md'):
        for target in re.findall(r'\]\(((?!#|http)[^)#]+)\)', (ROOT / name).read_text(encoding='utf-8')):
            assert (ROOT / target).exists(), target


@pytest.mark.skipif(not os.environ.get('LONG'), reason='about a minute: LONG=1')
def test_the_site_builds(tmp_path):
    pytest.importorskip('myst_nb')
    assert docs.build(tmp_path) == 0
    assert '<math' in (tmp_path / 'html/sampling/02_transitions.html').read_text()
