"The worked examples of CONTRIBUTING.md, each written into one file and run as it stands."

import json, os, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ('reward', 'advantage estimator', 'objective', 'pipeline', 'scheduler')
RUNNER = '''
import json, runpy, sys, traceback
errors = {}
for file in sys.argv[1:]:
    try: runpy.run_path(file)
    except BaseException: errors[file] = traceback.format_exc()
print(json.dumps(errors))
'''


def page(name):
    "The text of a section, up to the next one."
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    (found,) = re.findall(rf'^## Add an? {name}\n(.*?)(?=^## )', text, re.M | re.S)
    return found


def example(name):
    "The file that a page shows: its name, which its first line says, and its text."
    (code,) = re.findall(r'^```python\n(.*?)^```$', page(name), re.M | re.S)
    return re.match(r'# (my_\w+\.py)\n', code)[1], code


@pytest.fixture(scope='module')
def errors(tmp_path_factory):
    """What went wrong in each example: all in one process, so that the libraries are loaded once and what
    they register stays there."""
    folder = tmp_path_factory.mktemp('contributing')
    files = {}
    for name in PAGES:
        file, code = example(name)
        files[name] = folder / file
        files[name].write_text(code, encoding='utf-8')
    env = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    done = subprocess.run(
        [sys.executable, '-c', RUNNER, *map(str, files.values())],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: found.get(str(file), '') for name, file in files.items()}


@pytest.mark.parametrize('name', PAGES)
def test_the_example_runs_from_one_file(errors, name):
    assert not errors[name], errors[name]


@pytest.mark.parametrize('name', PAGES)
def test_a_page_is_short_and_registers_in_one_line(name):
    text, code = page(name), example(name)[1]
    prose = [line for line in text.partition('```')[0].splitlines() if line.strip()]
    registrations = re.findall(r'^ADAPTERS\[|^@columns\.register|^@reward', code, re.M)
    assert len(prose) <= 10 and len(registrations) <= 1 and 'assert' in code


def test_links_lead_somewhere():
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    for target in re.findall(r'\]\(((?!#|http)[^)#]+)\)', text):
        assert (ROOT / target).exists(), target
