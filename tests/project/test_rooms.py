"The rooms of the package: imports go one way, from the bottom of this list to its top."

import ast, subprocess, sys
from pathlib import Path

import drl_toolkit

PACKAGE = Path(drl_toolkit.__file__).parent
ROOMS = (
    'utils',
    'sampling',
    'rewards',
    'prompts',
    'distributed',
    'algorithms',
    'training',
    'runs',
    'evaluation',
    'ui',
    'emoji',
    'methods',
    'recipes',
    'cli',
    'course',
)


def imported(
    tree: ast.AST,  # of a module
    package: tuple,  # names of the packages that it lies in, without drl_toolkit
):
    "Every import of the package's own modules, inside functions too: (room, line)."
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            ours = node.level or node.module.split('.')[0] == 'drl_toolkit'
            if not ours:
                continue
            start = package[: len(package) - node.level + 1] if node.level else ()
            named = (node.module or '').split('.')[0 if node.level else 1 :]
            for alias in node.names:
                path = [*start, *filter(None, named), alias.name]
                yield path[0], node.lineno
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split('.')
                if first == 'drl_toolkit' and rest:
                    yield rest[0], node.lineno


def modules():
    "Every module in a room: its name, its packages, its syntax tree."
    for file in sorted(PACKAGE.rglob('*.py')):
        *package, name = file.relative_to(PACKAGE).with_suffix('').parts
        if package:
            yield '.'.join((*package, name)), tuple(package), ast.parse(file.read_text(encoding='utf-8'))


def upward():
    "Imports against the direction: (module, room) -> lines."
    found = {}
    for name, package, tree in modules():
        for room, line in imported(tree, package):
            if room in ROOMS and ROOMS.index(room) > ROOMS.index(package[0]):
                found.setdefault((name, room), []).append(line)
    return found


def test_every_module_is_in_a_known_room():
    assert {package[0] for _, package, _ in modules()} <= set(ROOMS)


def test_the_reader_of_imports_sees_every_form():
    text = '''
from drl_toolkit.emoji.world import parse
from drl_toolkit import emoji
from ..emoji import world
from .. import emoji as e
import drl_toolkit.emoji.world
from .lab import check_reward
def later():
    from ..emoji.world import parse
'''
    assert [room for room, _ in imported(ast.parse(text), ('rewards',))] == ['emoji'] * 5 + [
        'rewards',
        'emoji',
    ]
    assert [
        room for room, _ in imported(ast.parse('from ...utils.files import read_json'), ('emoji', 'pretrain'))
    ] == ['utils']


def test_imports_go_one_way():
    wrong = [f'{name} imports {room} (line {lines[0]})' for (name, room), lines in upward().items()]
    assert not wrong, '; '.join(wrong)


def test_the_quick_tests_have_every_room():
    import tiers

    rooms = {package[0] for _, package, _ in modules()}
    assert rooms <= {file.split('/')[1] for file in tiers.QUICK} and all(
        (PACKAGE.parent / file).is_file() for file in tiers.QUICK
    )


def test_rewards_and_prompts_load_no_library_before_it_is_needed():
    "open_clip, transformers and diffusers take many seconds; a reward that is a formula needs none of them."
    modules = (
        'rewards.reward',
        'rewards.pixels',
        'rewards.fairness',
        'rewards.composition',
        'rewards.zero_shot',
        'rewards.attributes',
        'rewards.preference',
        'rewards.reward_models',
        'rewards.alignment',
        'rewards.diversity',
        'prompts.task',
        'emoji.prompts',
        'emoji.rewards',
    )
    script = '; '.join(f'import drl_toolkit.{name}' for name in modules) + '; import sys; print(*sys.modules)'
    loaded = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {'open_clip', 'transformers', 'diffusers', 'huggingface_hub', 'torchvision', 'skimage'} & set(
        loaded
    )
