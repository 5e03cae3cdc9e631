"""Two forms of the tests. `make test` runs the short one, in which each thing is shown once or on the models that differ most.
The long one, `make test-long`, has every method, model and number of processes."""

import os

import pytest

LONG = os.environ.get('LONG', '') not in ('', '0')
long = pytest.mark.skipif(not LONG, reason='in the long form: make test-long')


def some(every, short):
    "What a test is run for: all of `every` in the long form, `short` otherwise."
    every, short = list(every), list(short)
    assert all(x in every for x in short), f'{[x for x in short if x not in every]} not among {every}'
    return every if LONG else short
