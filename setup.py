"Package metadata comes from settings.ini; the models and sprites in assets/ travel inside the wheel."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
EXTRAS = [key.removesuffix('_requirements') for key in cfg if key.endswith('_requirements')]

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    author=cfg['author'],
    license='Apache-2.0',
    python_requires='>=' + cfg['min_python'],
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=[*find_packages(include=['drl_toolkit', 'drl_toolkit.*']), 'drl_toolkit.assets'],
    package_dir={'drl_toolkit.assets': 'assets'},
    package_data={
        'drl_toolkit': ['py.typed'],
        'drl_toolkit.assets': [
            str(p.relative_to(here / 'assets')) for p in (here / 'assets').rglob('*') if p.is_file()
        ],
        '': ['templates/*', 'static/*'],
    },
    install_requires=cfg['requirements'].split(),
    extras_require={kind: cfg[f'{kind}_requirements'].split() for kind in EXTRAS},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    zip_safe=False,
)
