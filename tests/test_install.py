"A wheel, installed outside the checkout, finds its models."
import os, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A folder with the package unpacked from its wheel; built in a copy, so that the checkout stays as it is."
    source, wheels, target = (tmp_path_factory.mktemp(n) for n in ('source', 'wheels', 'site'))
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(ROOT / name, source)
    for name in ('drl_toolkit', 'assets'): shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    subprocess.run([*PIP, 'wheel', '--no-deps', '--no-build-isolation', '-w', wheels, source], check=True)
    subprocess.run([*PIP, 'install', '--no-deps', '--no-index', '--target', target, *wheels.glob('*.whl')], check=True)
    return target

def python(site, code, cwd):
    env = os.environ | dict(PYTHONPATH=str(site), HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, '-c', code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

def test_every_module_is_there(site):
    inside = lambda root: {str(p.relative_to(root)) for p in (root / 'drl_toolkit').rglob('*.py')}
    assert inside(ROOT) <= inside(site)
    assets = {str(p.relative_to(ROOT / 'assets')) for p in (ROOT / 'assets').rglob('*') if p.is_file()}
    assert assets <= {str(p.relative_to(site / 'drl_toolkit/assets')) for p in (site / 'drl_toolkit/assets').rglob('*') if p.is_file()}

def test_the_models_load_from_the_installed_package(site, tmp_path):
    code = """
import drl_toolkit, torch
from drl_toolkit import world
from drl_toolkit.composition import shipped_detector
from drl_toolkit.fairness import shipped_reader
from drl_toolkit.policy import Policy
from drl_toolkit.mdp import rollout
from drl_toolkit.rewards import clip_score
from drl_toolkit.preference import preference
prompts = ['a portrait of a doctor', 'a cat next to a dog']
images = rollout(Policy(world.load_demo(), num_steps=2), prompts).images
shipped_reader()(images); shipped_detector()(images); clip_score(images, prompts); preference(images, prompts); world.sprite('cat')
print(drl_toolkit.__file__, world.assets_dir())
"""
    package, assets = python(site, code, tmp_path).split()
    assert Path(package).is_relative_to(site) and Path(assets).is_relative_to(site)

def test_the_command_is_installed(site, tmp_path):
    assert 'usage: drl' in python(site, "import sys; sys.argv = ['drl', '--help']; from drl_toolkit.cli import main; main()", tmp_path)
