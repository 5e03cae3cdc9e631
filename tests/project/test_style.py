"""What a reader may rely on: every public parameter has a type and a comment, every public function a docstring,
no line is over 120 columns, and no public function returns a bare tuple or dict."""

import ast
from pathlib import Path

import drl_toolkit

PACKAGE = Path(drl_toolkit.__file__).parent
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sources():
    "Name and text of every module that a notebook exports."
    for file in sorted(PACKAGE.rglob('*.py')):
        if file.name not in ('_modidx.py', '__init__.py'):
            yield str(file.relative_to(PACKAGE)), file.read_text(encoding='utf-8')


def is_record(
    node: ast.ClassDef,
) -> bool:
    "Whether its annotated names are parameters: of a dataclass or a NamedTuple."
    decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    names = [getattr(d, 'id', getattr(d, 'attr', '')) for d in (*decorators, *node.bases)]
    return 'dataclass' in names or 'NamedTuple' in names


def is_setter(node) -> bool:
    return any(isinstance(d, ast.Attribute) and d.attr == 'setter' for d in node.decorator_list)


def is_public(node) -> bool:
    return not node.name.startswith('_') or node.name in ('__init__', '__call__')


def public_functions(
    tree: ast.Module,
):
    "(qualified name, node) of functions and methods, patched ones among them."
    for node in tree.body:
        if isinstance(node, FUNCTIONS) and is_public(node):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and is_public(node):
            yield from (
                (f'{node.name}.{m.name}', m) for m in node.body if isinstance(m, FUNCTIONS) and is_public(m)
            )


def parameters(node):
    "(argument, last line) of each; `self` and `cls` need no words."
    a = node.args
    first, last = [*a.posonlyargs, *a.args], a.defaults
    ends = {x.arg: d.end_lineno for x, d in zip(first[::-1], last[::-1])}
    ends |= {x.arg: d.end_lineno for x, d in zip(a.kwonlyargs, a.kw_defaults) if d}
    stars = [x for x in (a.vararg, a.kwarg) if x]
    for x in (*first, *a.kwonlyargs, *stars):
        if x.arg not in ('self', 'cls'):
            yield x, ends.get(x.arg, x.end_lineno)


def has_comment(
    lines: list[str],
    start: int,  # first line of a parameter, from 1
    end: int,  # last one
) -> bool:
    "As docments reads them: behind the parameter, or alone on the line above it."
    above = lines[start - 2].strip()
    return '  # ' in lines[end - 1] or above.startswith('# ') and not above.startswith('# %%')


def undocumented(
    text: str,
) -> list[str]:
    "What a module's public parameters, fields, functions and classes lack."
    tree, lines, found = ast.parse(text), text.splitlines(), []
    for name, node in public_functions(tree):
        for x, end in parameters(node):
            if x.annotation is None:
                found.append(f'{name}: {x.arg} has no type')
            if not has_comment(lines, x.lineno, end):
                found.append(f'{name}: {x.arg} has no comment')
        if not ast.get_docstring(node) and node.name != '__init__' and not is_setter(node):
            found.append(f'{name} has no docstring')
        if isinstance(node.returns, ast.Name) and node.returns.id in ('tuple', 'dict'):
            found.append(f'{name} returns a bare {node.returns.id}')
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or not is_public(node):
            continue
        if not ast.get_docstring(node):
            found.append(f'{node.name} has no docstring')
        for field in node.body if is_record(node) else ():
            if not isinstance(field, ast.AnnAssign) or field.target.id.startswith('_'):
                continue
            help_text = getattr(getattr(field.value, 'func', None), 'id', '') == 'setting'
            if not help_text and not has_comment(lines, field.lineno, field.end_lineno):
                found.append(f'{node.name}.{field.target.id} has no comment')
    return found


def long_lines(
    text: str,
    limit: int = 120,  # columns
) -> list[int]:
    "Lines over the limit; the list of names that nbdev writes does not count."
    names = [
        range(n.lineno, n.end_lineno + 1)
        for n in ast.parse(text).body
        if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__'
    ]
    return [
        i
        for i, line in enumerate(text.splitlines(), 1)
        if len(line) > limit and not any(i in lines for lines in names)
    ]


def test_the_checks_see_what_is_missing():
    text = '''
def bare(a, b: int, *rest: str) -> tuple:
    return a, b


class Pair(NamedTuple):
    left: int
    # above
    right: int = field(
        default=0
    )

    def read(self, x: int): "Read."
    def _own(self, x): pass
'''
    assert undocumented(text) == [
        'bare: a has no type',
        'bare: a has no comment',
        'bare: b has no comment',
        'bare: rest has no comment',
        'bare has no docstring',
        'bare returns a bare tuple',
        'Pair.read: x has no comment',
        'Pair has no docstring',
        'Pair.left has no comment',
    ]
    assert long_lines(f"__all__ = ['{'a' * 120}']\n# {'b' * 119}\n# {'c' * 118}") == [2]


def test_everything_public_has_its_words():
    assert {name: found for name, text in sources() if (found := undocumented(text))} == {}


def test_lines_are_short():
    assert {name: found for name, text in sources() if (found := long_lines(text))} == {}
