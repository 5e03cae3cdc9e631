"""The versions that a set-up installs. `assets/constraints.txt` holds what was tested,
`tests/constraints-oldest.txt` the floors of settings.ini.

    python tests/versions.py tested     # print what is installed in this environment, as constraints
    python tests/versions.py oldest     # print the floors
"""

import re, sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ('panel', 'widgets', 'course', 'data', 'ocr', 'dev', 'docs')
OF_A_GPU = re.compile(r'nvidia-|cuda-|triton$')  # torch's own metadata pins them, for each platform others


def settings():
    "What settings.ini says."
    config = ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def requirements(*extras) -> list:  # of `Requirement`
    "What the package needs, with some of its extras."
    fields = ['requirements', *(f'{extra}_requirements' for extra in extras)]
    return [Requirement(word) for field in fields for word in settings()[field].split()]


def installed(wanted) -> dict:  # canonical name -> distribution
    "What is installed of requirements and of all that they need in turn."
    found, left = {}, [(r, ('',)) for r in wanted]
    while left:
        requirement, extras = left.pop()
        if requirement.marker and not any(requirement.marker.evaluate(dict(extra=e)) for e in extras):
            continue
        name = canonicalize_name(requirement.name)
        try:
            known, found[name] = name in found, distribution(name)
        except PackageNotFoundError:
            continue
        if known and not requirement.extras:
            continue
        left += [(Requirement(r), ('', *requirement.extras)) for r in found[name].requires or []]
    return found


def pin(package) -> str:  # a line
    "A version, for the Pythons that it is for; others take what fits them."
    line = f"{canonicalize_name(package.metadata['Name'])}=={Version(package.version).public}"
    lowest = max(
        (
            Version(s.version)
            for s in SpecifierSet(package.metadata['Requires-Python'] or '')
            if s.operator == '>='
        ),
        default=Version('3'),
    )
    return (
        line if lowest <= Version(settings()['min_python']) else f'{line} ; python_full_version >= "{lowest}"'
    )


def tested() -> str:  # a constraints file
    "What is installed here."
    found = installed(requirements(*EXTRAS))
    return ''.join(pin(found[name]) + '\n' for name in sorted(found) if not OF_A_GPU.match(name))


def oldest() -> str:  # a constraints file
    "The floors of what the package imports, and of the extras that users install."
    floor = lambda r: next((s.version for s in r.specifier if s.operator == '>='), None)
    return ''.join(
        f'{canonicalize_name(r.name)}=={floor(r)}\n' for r in requirements('panel', 'widgets', 'data', 'ocr')
    )


if __name__ == '__main__':
    print(dict(tested=tested, oldest=oldest)[sys.argv[1]](), end='')
