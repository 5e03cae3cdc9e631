"""The documentation site: every notebook as a page with its committed outputs, and a page of names for every room. Nothing is executed.

python tests/docs.py [FOLDER]      # _docs by default: pages in FOLDER/html, what Sphinx reads in FOLDER/source
"""

import ast, json, re, shutil, sys
from pathlib import Path

from readme import heading, notebooks, rooms

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / 'nbs'
HIDDEN = re.compile(r'^#\| *(hide|default_exp)|nbdev_export\(\)', re.M)  # cells that are for nbdev
CONFIG = dict(
    project='drl_toolkit',
    author='the drl_toolkit authors',
    extensions=['myst_nb', 'sphinx_copybutton', 'docs'],
    html_theme='furo',
    root_doc='index',
    exclude_patterns=[],
    html_title='drl_toolkit',
    html_show_sphinx=False,
    nb_execution_mode='off',
    html_math_renderer='mathml',
    nb_merge_streams=True,
    myst_enable_extensions=['dollarmath', 'amsmath'],
    myst_heading_anchors=3,
    myst_url_schemes=['http', 'https', 'mailto'],
    html_theme_options=dict(navigation_with_keys=True),
    suppress_warnings=[
        'mystnb.unknown_mime_type',
        'myst.header',
        'myst.xref_missing',
        'toc.not_included',
        'misc.highlighting_failure',
        'image.not_readable',
    ],
)


def plain(
    notebook: dict,  # as JSON
) -> dict:
    "A notebook without what only nbdev reads."
    cells = [
        c for c in notebook['cells'] if not (c['cell_type'] == 'code' and HIDDEN.search(''.join(c['source'])))
    ]
    for cell in cells:
        if cell['cell_type'] == 'code':
            cell['source'] = re.sub(r'^#\|.*\n?', '', ''.join(cell['source']), flags=re.M)
    return notebook | dict(cells=cells)


def parameters(
    function,  # `ast.FunctionDef`
    lines: list,  # of the module
) -> list:  # (name with default, type, comment)
    "A row for each parameter, with the comment that stands behind it."
    given, rest = function.args, []
    named = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(named) - len(given.defaults)) + given.defaults
    for arg, default in [*zip(named, defaults), *zip(given.kwonlyargs, given.kw_defaults)]:
        if arg.arg in ('self', 'cls'):
            continue
        comment = re.search(r'#\s*(.*)', lines[arg.lineno - 1]) if arg.lineno != function.lineno else None
        kind = ast.unparse(arg.annotation) if arg.annotation else ''
        rest.append(
            (arg.arg + (f' = {ast.unparse(default)}' if default else ''), kind, comment[1] if comment else '')
        )
    return rest


def cell(text):
    return ' '.join(text.split()).replace('|', '\\|').replace('<', '&lt;')


def described(node, lines, level):
    """A function or a class in Markdown: name, first line of its docstring, a table of its parameters, its
    public methods."""
    words = (ast.get_docstring(node) or '').strip()
    yield f'{"#" * level} `{node.name}`\n\n{words}\n'
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.FunctionDef) and not child.name.startswith('_'):
                yield from described(child, lines, level + 1)
        return
    if node.returns:
        yield f'Returns `{ast.unparse(node.returns)}`.\n'
    rows = parameters(node, lines)
    if rows:
        yield '| parameter | type | |\n|---|---|---|\n' + ''.join(
            f'| `{cell(n)}` | {f"`{cell(k)}`" if k else ""} | {cell(c)} |\n' for n, k, c in rows
        )


def names_page(room: str) -> str:  # Markdown
    "The public names of a room, module by module; read from the source, which is not imported."
    parts = [f'# Names in {room}\n']
    for file in sorted((ROOT / 'drl_toolkit' / room).rglob('*.py')):
        text = file.read_text(encoding='utf-8')
        tree, lines = ast.parse(text), text.splitlines()
        public = [
            n
            for n in tree.body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef))
            and not n.name.startswith('_')
            and not own_class(n)
        ]
        if not public:
            continue
        parts.append(
            "## "
            f"{'.'.join(file.relative_to(ROOT).with_suffix('').parts)}\n\n{ast.get_docstring(tree) or ''}\n"
        )
        for node in public:
            parts += described(node, lines, 3)
            if isinstance(node, ast.ClassDef):
                for child in tree.body:
                    if own_class(child) == node.name and not child.name.startswith('_'):
                        parts += described(child, lines, 4)
    return '\n'.join(parts)


def own_class(node):
    "The class that `@patch` adds a function to."
    if not isinstance(node, ast.FunctionDef) or not any(
        'patch' in ast.unparse(d) for d in node.decorator_list
    ):
        return None
    annotation = node.args.args[0].annotation if node.args.args else None
    return annotation.id if isinstance(annotation, ast.Name) else None


def stage(
    source: Path,  # where to
):
    """Write what Sphinx reads: plain notebooks, a page for each room, and a list of rooms at the end of the
    index."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(NOTEBOOKS / 'images', source / 'images')
    pages = notebooks()
    for page in pages:
        (source / page).parent.mkdir(parents=True, exist_ok=True)
        found = plain(json.loads((NOTEBOOKS / page).read_text(encoding='utf-8')))
        if page.name == 'index.ipynb':
            found['cells'].append(markdown(navigation()))
        (source / page).write_text(json.dumps(found), encoding='utf-8')
    for room, question in rooms().items():
        inside = [p for p in pages if p.parts[0] == room]
        entries = '\n'.join(f'{cell(heading(p)[0])} <{p.relative_to(room).with_suffix("")}>' for p in inside)
        (source / room / 'index.md').write_text(
            f'# {room}\n\n{question}\n\n```{{toctree}}\n:maxdepth: 1\n\n{entries}\nnames\n```\n',
            encoding='utf-8',
        )
        (source / room / 'names.md').write_text(names_page(room), encoding='utf-8')
    for name in ('CONTRIBUTING.md', 'CHANGELOG.md', 'SECURITY.md'):
        shutil.copy(ROOT / name, source / name)


def markdown(text):
    return dict(cell_type='markdown', id='navigation', metadata={}, source=text)


def navigation() -> str:
    "What the sidebar shows."
    tree = lambda caption, names: (
        f'```{{toctree}}\n:caption: {caption}\n:hidden:\n:maxdepth: 1\n\n' + '\n'.join(names) + '\n```\n'
    )
    return (
        tree('Learn', ['The course <course/index>'])
        + '\n'
        + tree('Start', ['architecture', 'CONTRIBUTING', 'CHANGELOG', 'SECURITY'])
        + '\n'
        + tree('Reference', [f'{room}/index' for room in rooms() if room != 'course'])
    )


def mathml(self, node):
    "A formula as MathML, which browsers draw without a script from elsewhere."
    from docutils import nodes
    from latex2mathml.converter import convert

    block = isinstance(node, nodes.math_block)
    made = convert(node.astext(), display='block' if block else 'inline')
    self.body.append(f'<div class="math">{made}</div>' if block else made)
    raise nodes.SkipNode


def setup(app):
    "This file is an extension of Sphinx, too."
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)


def build(
    folder: Path,  # of the site
) -> int:  # 0 where all went well
    "Pages as HTML."
    from sphinx.application import Sphinx

    stage(folder / 'source')
    app = Sphinx(
        folder / 'source',
        None,
        folder / 'html',
        folder / 'doctrees',
        'html',
        confoverrides=CONFIG,
        warning=sys.stderr,
    )
    app.build()
    return app.statuscode


if __name__ == '__main__':
    sys.exit(build(Path(sys.argv[1] if sys.argv[1:] else ROOT / '_docs').resolve()))
