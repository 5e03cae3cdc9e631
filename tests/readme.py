"""README.md is nbs/index.ipynb in Markdown, with its pictures beside it. `python tests/readme.py` writes it; `--check` compares.

The index's section "The chapters" is made of the rooms of nbs/architecture.ipynb and of the title and first sentence of every notebook."""

import ast, json, re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
PICTURES = 'nbs/index_files'


def rendered(notebook=ROOT / 'nbs/index.ipynb'):
    "{path: bytes} of README.md and of the pictures that its outputs hold."
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [c for c in nb.cells if not re.search(r'^#\| *(hide|default_exp)', c.source, re.M)]
    for c in nb.cells:
        c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
    template = PICTURES + '/{cell_index}_{index}{extension}'
    text, resources = MarkdownExporter(
        config=Config(ExtractOutputPreprocessor=dict(output_filename_template=template))
    ).from_notebook_node(nb)
    text = re.sub(
        r'\]\((?!https?:|#|nbs/|/)', '](nbs/', text
    )  # links beside the notebook, seen from the root
    text = '\n'.join(line.rstrip() for line in text.strip().splitlines()) + '\n'
    return {'README.md': text.encode()} | resources.get('outputs', {})


def rooms():  # name -> question
    "As nbs/architecture.ipynb has them, from top to bottom."
    cells = json.loads((ROOT / 'nbs/architecture.ipynb').read_text(encoding='utf-8'))['cells']
    source = next(''.join(c['source']) for c in cells if 'ROOMS = ' in ''.join(c['source']))
    call = next(
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and node.targets[0].id == 'ROOMS'
    )
    return {keyword.arg: keyword.value.value for keyword in call.keywords}


def notebooks():
    "All pages, relative to nbs/, in the order of their numbers."
    found = (p.relative_to(ROOT / 'nbs') for p in (ROOT / 'nbs').rglob('*.ipynb'))
    return sorted(p for p in found if not any(part.startswith(('.', '_')) for part in p.parts))


def heading(
    page,  # relative to nbs/
):
    "A notebook's title and the sentence below it."
    cells = json.loads((ROOT / 'nbs' / page).read_text(encoding='utf-8'))['cells']
    first = next(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    title, sentence = re.search(r'^# (.+)$', first, re.M), re.search(r'^> (.+)$', first, re.M)
    return title[1] if title else page.stem, sentence[1] if sentence else ''


def chapters():
    "The section of the index: which room answers which question, and what is in each."
    lines = [
        '## The chapters',
        '',
        'A room knows only the rooms above it; [architecture](architecture.ipynb) has their picture, and '
        'one trajectory\'s way through them.',
        '',
        '| room | its question |',
        '|---|---|',
        *(f'| [{room}](#{anchor(room, question)}) | {question} |' for room, question in rooms().items()),
    ]
    for room, question in rooms().items():
        lines += ['', f'### {room}: {question}', '', '| chapter | subject |', '|---|---|']
        for page in notebooks():
            if page.parts[0] == room:
                lines.append(
                    '| [{}]({}) | {} |'.format(
                        *(
                            word.replace('|', '\\|')
                            for word in (heading(page)[0], str(page), heading(page)[1])
                        )
                    )
                )
    return '\n'.join(lines) + '\n'


def anchor(room, question):
    return re.sub(r'[^\w\- ]', '', f'{room} {question}'.lower()).replace(' ', '-')


def with_chapters(
    source,  # of the index's cell
):
    "The cell with its section as the notebooks say."
    return re.sub(
        r'^## The chapters\n.*?(?=^## |\Z)', lambda _: chapters() + '\n', source, flags=re.M | re.S
    ).rstrip('\n')


def write_chapters():
    "Bring the index's section up to date."
    path = ROOT / 'nbs/index.ipynb'
    notebook = json.loads(path.read_text(encoding='utf-8'))
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        if '## The chapters' in source:
            cell['source'] = with_chapters(source).splitlines(keepends=True)
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + '\n'
    if text != path.read_text(encoding='utf-8'):
        path.write_text(text, encoding='utf-8')


def stale_chapters():
    "Whether the index's section is not what the notebooks say."
    cells = json.loads((ROOT / 'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    source = next(''.join(c['source']) for c in cells if '## The chapters' in ''.join(c['source']))
    return with_chapters(source) != source.rstrip('\n')


def differences():
    "What is not as the notebook says."
    files = rendered()
    stale = {str(p.relative_to(ROOT)) for p in (ROOT / PICTURES).glob('*')} - set(files)
    return (
        ['nbs/index.ipynb, The chapters'] * stale_chapters()
        + sorted(stale)
        + [
            name
            for name, data in files.items()
            if not (ROOT / name).is_file() or (ROOT / name).read_bytes() != data
        ]
    )


def write():
    write_chapters()
    for name in differences():
        (ROOT / name).unlink(missing_ok=True)
    for name, data in rendered().items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(data)


if __name__ == '__main__':
    if '--check' not in sys.argv:
        write()
    sys.exit(f"not as the notebooks say: {', '.join(differences())}; run make readme" if differences() else 0)
