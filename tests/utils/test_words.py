"English nouns of the prompt sets: articles, plurals, and back."

import pytest

from drl_toolkit.emoji.world import OBJECTS
from drl_toolkit.prompts.task import ANIMALS
from drl_toolkit.utils.words import IRREGULAR, article, plural, singular

TRUTH = dict(
    apple='apples',
    strawberry='strawberries',
    key='keys',
    monkey='monkeys',
    box='boxes',
    fish='fish',
    grapes='grapes',
    bus='buses',
    wolf='wolves',
    mouse='mice',
    fly='flies',
    cactus='cacti',
    mushroom='mushrooms',
    person='people',
)


def test_plurals_are_those_of_english():
    assert {name: plural(name) for name in TRUTH} == TRUTH


@pytest.mark.parametrize('names', [OBJECTS, ANIMALS, IRREGULAR.values()])
def test_the_singular_takes_a_plural_back(names):
    assert [singular(plural(f'red {name}')) for name in names] == [f'red {name}' for name in names]


def test_articles():
    assert [article(name) for name in ('apple', 'banana', 'office worker')] == [
        'an apple',
        'a banana',
        'an office worker',
    ]
