"What is generated is what its notebooks say: the package, and the README."

import shutil, subprocess, sys
from pathlib import Path

import readme

ROOT = Path(__file__).resolve().parents[2]


def test_the_package_is_what_the_notebooks_export(tmp_path):
    for name in ('settings.ini', 'pyproject.toml', 'setup.py'):
        shutil.copy(ROOT / name, tmp_path)
    for name in ('nbs', 'drl_toolkit'):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
        )
    subprocess.run(
        [Path(sys.executable).parent / 'nbdev_export'], cwd=tmp_path, check=True, stdin=subprocess.DEVNULL
    )
    read = lambda root: {
        str(p.relative_to(root)): p.read_text()
        for p in [*(root / 'drl_toolkit').rglob('*.py'), root / 'pyproject.toml']
    }
    ours, theirs = read(ROOT), read(tmp_path)
    assert ours == theirs, (
        f'run nbdev_export: {sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))}'
    )


def test_the_readme_is_the_index_notebook():
    assert readme.differences() == [], 'run make readme'
