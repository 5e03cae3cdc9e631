"""README.md is nbs/index.ipynb in Markdown, with its pictures beside it. `python tests/readme.py` writes it; `--check` compares."""
import re, sys
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
    for c in nb.cells: c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
    template = PICTURES + '/{cell_index}_{index}{extension}'
    text, resources = MarkdownExporter(config=Config(ExtractOutputPreprocessor=dict(output_filename_template=template))).from_notebook_node(nb)
    text = re.sub(r'\]\((?!https?:|#|nbs/|/)', '](nbs/', text)                 # links beside the notebook, seen from the root
    text = '\n'.join(line.rstrip() for line in text.strip().splitlines()) + '\n'
    return {'README.md': text.encode()} | resources.get('outputs', {})

def differences():
    "What is not as the notebook says."
    files = rendered()
    stale = {str(p.relative_to(ROOT)) for p in (ROOT / PICTURES).glob('*')} - set(files)
    return sorted(stale) + [name for name, data in files.items() if not (ROOT / name).is_file() or (ROOT / name).read_bytes() != data]

def write():
    for name in differences(): (ROOT / name).unlink(missing_ok=True)
    for name, data in rendered().items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(data)

if __name__ == '__main__':
    if '--check' not in sys.argv: write()
    sys.exit(f"not as nbs/index.ipynb says: {', '.join(differences())}; run make readme" if differences() else 0)
