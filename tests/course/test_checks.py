"What a check says to answers that are no answers."

import pytest

from drl_toolkit.course.checks import check, require


@check
def doubled(double, offset=0):
    require(double(2) == 4 + offset, f'double(2) is {double(2)}')
    return 'right'


def stub(x): ...


def partly(x):
    return x, ...


def broken(x):
    half = x
    return half / 0


@pytest.mark.parametrize(
    'answer, says',
    [
        (stub, 'stub returns nothing'),
        (partly, 'partly returns nothing'),
        (..., 'replace the `...`'),
        (None, 'replace the `...`'),
        (broken, 'broken stopped in its line 3 with ZeroDivisionError'),
        (lambda x: ... * x, 'still holds a `...`'),
        ('two', "wrong form: TypeError: 'str' object is not callable"),
        (lambda x: 3, 'double(2) is 3'),
    ],
)
def test_a_mistake_is_told_in_a_sentence(answer, says):
    found = doubled(answer)
    assert not found and says in found.says and '✗' in repr(found)


def test_a_right_answer_passes_and_named_answers_are_looked_at():
    assert doubled(lambda x: 2 * x) and doubled(lambda x: 2 * x).says == 'right'
    assert not doubled(lambda x: 2 * x, offset=...)


def test_only_the_learner_is_excused():
    "Ctrl-C ends a check, as it ends any other cell."

    def interrupted(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        doubled(interrupted)


def test_a_sentence_is_shown_as_text():
    assert '&lt;b&gt;' in doubled(lambda x: '<b>')._repr_html_()
