"""README.md is nbs/index.ipynb in Markdown, with its images beside it. `python tests/readme.py` writes it; `--check` compares.

The index's sections "The course" and "The chapters" are made of the rooms of nbs/architecture.ipynb and of the title and first sentence of
every notebook."""

import ast, json, re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
PICTURES = 'nbs/index_files'


def rendered(notebook=ROOT / 'nbs/index.ipynb'):
    "{path: bytes} of README.md and of the images that its outputs hold."
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


def table(
    room,  # whose pages
    first,  # heads of the columns
    second,
):
    "Lines of a table: each page of a room with its sentence."
    cells = lambda page: (text.replace('|', '\\|') for text in heading(page))
    rows = [(page, *cells(page)) for page in notebooks() if page.parts[0] == room]
    return [
        f'| {first} | {second} |',
        '|---|---|',
        *(f'| [{title}]({page}) | {sentence} |' for page, title, sentence in rows),
    ]


def course():
    "The section of the index that comes before the chapters: the lessons."
    lines = [
        '## The course',
        '',
        'For people who know PyTorch and have never met REINFORCE. `make course` opens the first lesson in JupyterLab; in ten '
        'minutes a reward of three lines has changed the images. Each lesson takes at most 45 minutes, derives what it uses, '
        'and has exercises that check themselves.',
        '',
        *table('course', 'lesson', 'what it is about'),
    ]
    return '\n'.join(lines) + '\n'


def chapters():
    "The section of the index: which room answers which question, and what is in each."
    reference = {room: question for room, question in rooms().items() if room != 'course'}
    lines = [
        '## The chapters',
        '',
        'The reference: the source of everything, room by room. A room knows only the rooms above it; '
        '[architecture](architecture.ipynb) has their picture, and one trajectory\'s way through them.',
        '',
        '| room | its question |',
        '|---|---|',
        *(f'| [{room}](#{anchor(room, question)}) | {question} |' for room, question in reference.items()),
    ]
    for room, question in reference.items():
        lines += ['', f'### {room}: {question}', '', *table(room, 'chapter', 'subject')]
    return '\n'.join(lines) + '\n'


def anchor(room, question):
    return re.sub(r'[^\w\- ]', '', f'{room} {question}'.lower()).replace(' ', '-')


SECTIONS = {'## The course': course, '## The chapters': chapters}


def with_chapters(
    source,  # of a cell of the index
):
    "The cell with its sections as the notebooks say."
    for title, section in SECTIONS.items():
        source = re.sub(rf'^{title}\n.*?(?=^## |\Z)', lambda _: section() + '\n', source, flags=re.M | re.S)
    return source.rstrip('\n')


def write_chapters():
    "Bring the index's sections up to date."
    path = ROOT / 'nbs/index.ipynb'
    notebook = json.loads(path.read_text(encoding='utf-8'))
    for cell in notebook['cells']:
        cell['source'] = with_chapters(''.join(cell['source'])).splitlines(keepends=True)
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + '\n'
    if text != path.read_text(encoding='utf-8'):
        path.write_text(text, encoding='utf-8')


def stale_chapters():
    "Whether a section of the index is missing, or is not what the notebooks say."
    cells = json.loads((ROOT / 'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells]
    missing = [title for title in SECTIONS if not any(f'{title}\n' in source for source in sources)]
    return bool(missing) or any(with_chapters(source) != source.rstrip('\n') for source in sources)


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
