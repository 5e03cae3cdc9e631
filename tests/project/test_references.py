"""What a notebook names is there: files, other notebooks, pictures. A sentence that ends with a colon is followed by a cell of code.
No reference by a chapter's number, since notebooks have none."""

import json, re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(p for p in ROOT.glob('nbs/**/*.ipynb') if '.ipynb_checkpoints' not in p.parts)
NAMES = {str(p.relative_to(ROOT / 'nbs').with_suffix('')) for p in NOTEBOOKS}
FOLDERS = 'assets', 'tests', 'nbs', 'drl_toolkit'


def missing(
    cell: str,  # Markdown
    folder: Path,  # of its notebook
) -> list:  # of what is named and not there
    links = re.findall(r'\]\(((?!https?:|#|mailto:)[^)\s#]+)', cell)
    found = [link for link in links if not (folder / link).exists()]
    paths = [p for p in re.findall(r'`([a-z_]+/[\w./-]+)`', cell) if 'NAME' not in p]
    found += [p for p in paths if p.split('/')[0] in FOLDERS and not (ROOT / p).exists()]
    named = [p for p in paths if re.fullmatch(r'[a-z]+/\d\d[a-z]?_\w+', p)]
    return found + [p for p in named if not {p, f'emoji/{p}'} & NAMES]


def cells(notebook):
    return [
        (c['cell_type'], ''.join(c['source']))
        for c in json.loads(notebook.read_text(encoding='utf-8'))['cells']
    ]


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_what_a_notebook_names_is_there(notebook):
    found = cells(notebook)
    text = [s for kind, s in found if kind == 'markdown']
    assert not [m for s in text for m in missing(s, notebook.parent)]
    assert not [m for s in text for m in re.findall(r'\bchapters? \d\w*', s)]
    follows = [kind for kind, _ in found[1:]] + ['']
    hanging = [
        s
        for (kind, s), after in zip(found, follows)
        if kind == 'markdown' and s.rstrip().endswith(':') and after != 'code'
    ]
    assert not hanging


def test_something_that_is_not_there_is_found(tmp_path):
    (tmp_path / 'there.png').touch()
    cell = '![a](there.png) [b](gone.ipynb#x) `assets/nothing.json` `tests/tiers.py` `training/99_gone` `training/02_trainer`'
    assert missing(cell, tmp_path) == ['gone.ipynb', 'assets/nothing.json', 'training/99_gone']
