"""A wheel, installed outside the checkout, finds its models; set-ups install versions that were tested, and
no library is imported that is not declared."""

import ast, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

import versions

ROOT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A folder with the package unpacked from its wheel; built in a copy, so that the checkout stays as it is."
    source, wheels, target = (tmp_path_factory.mktemp(n) for n in ('source', 'wheels', 'site'))
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    for name in ('drl_toolkit', 'assets'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    subprocess.run([*PIP, 'wheel', '--no-deps', '--no-build-isolation', '-w', wheels, source], check=True)
    subprocess.run(
        [*PIP, 'install', '--no-deps', '--no-index', '--target', target, *wheels.glob('*.whl')], check=True
    )
    return target


def python(site, code, cwd):
    env = os.environ | dict(PYTHONPATH=str(site), HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, '-c', code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_module_is_there(site):
    inside = lambda root, pattern: {str(p.relative_to(root)) for p in (root / 'drl_toolkit').rglob(pattern)}
    for pattern in ('*.py', '*.html', '*.css', '*.js'):
        assert inside(ROOT, pattern) and inside(ROOT, pattern) <= inside(site, pattern)
    assets = {str(p.relative_to(ROOT / 'assets')) for p in (ROOT / 'assets').rglob('*') if p.is_file()}
    assert assets <= {
        str(p.relative_to(site / 'drl_toolkit/assets'))
        for p in (site / 'drl_toolkit/assets').rglob('*')
        if p.is_file()
    }


def test_pages_are_made_from_the_installed_package(site, tmp_path):
    "Templates, style sheets and scripts are files beside the modules."
    code = """
import drl_toolkit.ui.words  # whose filter the templates use
from drl_toolkit.utils.templates import PACKAGE, environment, render
print(PACKAGE)
note = render('ui/templates/note.html', title='here', lines=[], command='', kind='', level=2)
assert '.note' in render('ui/templates/head.html') and '<h2>here</h2>' in note
for name in environment.list_templates(['html']): environment.get_template(name)
"""
    assert Path(python(site, code, tmp_path)).is_relative_to(site)


def test_the_models_load_from_the_installed_package(site, tmp_path):
    code = """
import drl_toolkit, torch
from drl_toolkit.emoji import world
from drl_toolkit.rewards.composition import shipped_detector
from drl_toolkit.rewards.fairness import shipped_reader
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.sampling.rollout import rollout
from drl_toolkit.rewards.reward import clip_score
from drl_toolkit.rewards.preference import preference
from drl_toolkit.utils.loading import assets_dir
prompts = ['a portrait of a doctor', 'a cat next to a dog']
images = rollout(Policy(world.load_demo(), num_steps=2), prompts).images
shipped_reader()(images); shipped_detector()(images); clip_score(images, prompts); preference(images, prompts); world.sprite('cat')
print(drl_toolkit.__file__, assets_dir())
"""
    package, assets = python(site, code, tmp_path).split()
    assert Path(package).is_relative_to(site) and Path(assets).is_relative_to(site)


def test_the_command_is_installed(site, tmp_path):
    assert 'usage: drl' in python(
        site,
        "import sys; sys.argv = ['drl', '--help']; from drl_toolkit.cli.main import main; main()",
        tmp_path,
    )


# ---- versions


def constraints(file):
    "name -> version of a constraints file, whose every line is of names and versions only."
    found = {}
    for line in file.read_text(encoding='utf-8').splitlines():
        assert re.fullmatch(r'[a-z0-9-]+==[0-9][0-9.a-z]*( ; python_full_version >= "[0-9.]+")?', line), line
        name, _, found_version = line.partition(' ')[0].partition('==')
        assert found.setdefault(name, found_version) == found_version
    return found


TESTED, OLDEST = ROOT / 'assets/constraints.txt', ROOT / 'tests/constraints-oldest.txt'


def test_set_ups_install_versions_that_were_tested():
    "Every library that settings.ini names has a tested version, and settings.ini allows it."
    tested = constraints(TESTED)
    for requirement in versions.requirements(*versions.EXTRAS):
        name = canonicalize_name(requirement.name)
        assert name in tested and requirement.specifier.contains(tested[name]), requirement
    assert len(tested) > 150 and not [
        name for name in tested if versions.OF_A_GPU.match(name)
    ]  # all that is installed, but for torch's own


def test_every_floor_is_one_that_is_tested():
    "`make test-oldest` installs exactly the floors of settings.ini, and none is above what was tested."
    assert OLDEST.read_text(encoding='utf-8') == versions.oldest()
    oldest, tested = constraints(OLDEST), constraints(TESTED)
    assert oldest['diffusers'] == '0.38' and all(
        Version(oldest[name]) <= Version(tested[name]) for name in oldest
    )  # below, code in a model's folder is executed
    on_a_gpu = dict(torch='2.11.0', transformers='5.17.0', peft='0.21.0', diffusers='0.42.1', gradio='6.31.0')
    for requirement in versions.requirements():
        assert requirement.specifier.contains(
            on_a_gpu.get(requirement.name, tested[canonicalize_name(requirement.name)])
        )


def test_what_is_installed_here_is_what_the_list_would_say(monkeypatch):
    """The list of an environment holds what the package needs, whatever needs it, and marks what is not for
    every Python."""
    lines = versions.tested().splitlines()
    names = [line.partition('==')[0] for line in lines]
    assert names == sorted(set(names)) and {
        'torch',
        'diffusers',
        'starlette',
        'jupyterlab-server',
        'tokenizers',
    } <= set(names)

    class Package:
        version, metadata = '3.1+cpu', {'Name': 'A_b', 'Requires-Python': '>=3.99.1,<4'}

    assert versions.pin(Package) == 'a-b==3.1 ; python_full_version >= "3.99.1"'


def test_make_installs_them_for_every_set_up():
    def dry(*words):
        return subprocess.run(
            ['make', '-n', '-B', *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout

    for target in ('demo', 'app', 'test', 'readme'):
        installs = [line for line in dry(target, 'VENV=/nowhere/venv').splitlines() if 'pip install' in line]
        assert installs and all('-c assets/constraints.txt' in line for line in installs), target
    assert '-c tests/constraints-oldest.txt' in dry('test-oldest')
    newest = dry('renew-constraints')
    assert (
        'pip install' in newest
        and ' -c ' not in newest.replace('python -c', '')
        and newest.index('tests/notebooks.py') < newest.index('versions.py tested')
    )


OF_THE_NOTEBOOK = {'ipykernel'}  # asked only where a notebook runs, which has it
TRACKERS = {'trackio'}  # the user's choice, named by an error where it is missing

OF_A_MODULE = dict.fromkeys(('panel.py', 'voting.py', 'server.py', 'serving.py'), ('panel',)) | {
    'widgets.py': ('widgets',)
}  # modules that need an extra as a whole


def test_a_training_machine_needs_no_gradio():
    "Nor widgets: what the command imports before it trains."
    code = '''
import sys
for name in ('gradio', 'fastapi', 'uvicorn', 'ipywidgets', 'anywidget'): sys.modules[name] = None
from drl_toolkit.cli import main
import drl_toolkit.recipes.custom, drl_toolkit.runs.recordings, drl_toolkit.ui.plots, drl_toolkit.cli.doctor
print('ready')'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == 'ready', done.stderr[-2000:]


def test_what_is_declared_is_imported():
    "In the package, or by a library that needs it and does not ask for it itself."
    text = ''.join(p.read_text(encoding='utf-8') for p in (ROOT / 'drl_toolkit').rglob('*.py'))
    named = {'scikit-image': 'skimage', 'pillow': 'PIL', 'open-clip-torch': 'open_clip', 'ipython': 'IPython'}
    by_others = {
        'accelerate',
        'onnxruntime',
        'torchvision',
        'uvicorn',
    }  # diffusers' fast loading, rapidocr's engine, transformers' image processors, and what FastAPI is served by
    for requirement in versions.requirements('panel', 'widgets', 'data', 'ocr'):
        name = canonicalize_name(requirement.name)
        module = named.get(name, name.replace('-', '_'))
        assert name in by_others or re.search(rf'\b(import|from) ([\w., ]*\b)?{module}\b', text), name


def test_what_is_imported_is_declared():
    """Every library that a module imports is one that pip installs; what only a function imports may be in an
    extra."""
    names = {'skimage': 'scikit-image', 'PIL': 'pillow', 'open_clip': 'open-clip-torch', 'IPython': 'ipython'}
    declared = lambda *extras: {canonicalize_name(r.name) for r in versions.requirements(*extras)}
    for file in (ROOT / 'drl_toolkit').rglob('*.py'):
        tree = ast.parse(file.read_text(encoding='utf-8'))
        for node in ast.walk(tree):
            found = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            for name in (
                {n.partition('.')[0] for n in found}
                - set(sys.stdlib_module_names)
                - {'drl_toolkit'}
                - OF_THE_NOTEBOOK
                - TRACKERS
            ):
                extras = (
                    OF_A_MODULE.get(file.name, ())
                    if node in tree.body
                    else ('panel', 'widgets', 'data', 'ocr')
                )
                assert canonicalize_name(names.get(name, name)) in declared(*extras), (
                    f'{file.name} imports {name}'
                )
