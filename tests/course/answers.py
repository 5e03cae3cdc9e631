"Typical wrong answers to the exercises of the course, one file for each lesson: `wrong_NN.py`."

from typing import NamedTuple


class Wrong(NamedTuple):
    "An answer that a learner would give, and what the check must say to it."

    source: str  # in place of the stub
    says: str  # a part of the sentence
