"""Every lesson of the course runs from top to bottom; its exercises tell the stub and a wrong answer what is missing, and the
solution that it is right; and it keeps to the form of a lesson."""

import pytest

import lessons
from drl_toolkit.ui.words import TERMS

LESSONS = [pytest.param(path, id=path.stem) for path in lessons.lessons()]


@pytest.mark.parametrize('lesson', LESSONS)
def test_lesson_keeps_the_form(lesson):
    assert not lessons.misshapen(lesson), '\n'.join(lessons.misshapen(lesson))


@pytest.mark.parametrize('lesson', LESSONS)
def test_lesson_runs_and_its_exercises_check_themselves(lesson):
    done = lessons.run(lesson)
    assert not done['faults'], '\n'.join(done['faults'])
    assert len(done['answers']) == lessons.form(lesson)['exercises']
    for exercise, (stub, wrong, solution) in done['answers'].items():
        assert stub != wrong, f'{exercise} says the same to an empty answer and to a wrong one: {wrong}'


def test_the_glossary_has_the_words_of_the_panel():
    "Each is a term of the course, or stands with the one that it is on the panel."
    text = ''.join(cell['source'] for cell in lessons.cells(lessons.ROOT / 'nbs/course/glossary.ipynb'))
    missing = [
        w for w in TERMS if lessons.slug(w) not in lessons.terms() and f'On the panel: *{w}*' not in text
    ]
    assert not missing, missing
