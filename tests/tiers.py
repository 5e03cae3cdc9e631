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


# The quickest tests of every room: what `make test-quick` runs, a file or a test each.
QUICK = {
    'tests/project/test_rooms.py': ('imports_go_one_way', 'reader_of_imports'),
    'tests/project/test_contributing.py': ('short',),
    'tests/utils/test_words.py': (),
    'tests/sampling/test_transitions.py': (),
    'tests/rewards/test_pixels.py': (),
    'tests/rewards/test_reward.py': (),
    'tests/prompts/test_task.py': (),
    'tests/distributed/test_shards.py': ('policies_that_cannot',),
    'tests/algorithms/test_advantages.py': (),
    'tests/training/test_trainer.py': ('one_update_equals',),
    'tests/runs/test_run.py': ('torn', 'best_of_the_metrics', 'refused', 'bad_line'),
    'tests/evaluation/test_evaluate.py': ('frechet', 'win_rate', 'few_prompts', 'bootstrap'),
    'tests/ui/test_plots.py': ('every_figure_has',),
    'tests/emoji/test_tiny.py': ('bad_sizes', 'seed_alone'),
    'tests/recipes/test_methods.py': ('refused',),
    'tests/course/test_checks.py': (),
    'tests/course/test_lessons.py': ('form',),
    'tests/cli/test_doctor.py': ('torch_and', 'fill_a_micro', 'memory_disk'),
}


def quick(
    nodeid,  # of a test
) -> bool:
    "Whether a test is one of the quickest: all of its file's, or those that one of the words names."
    file, _, name = nodeid.partition('::')
    words = QUICK.get(file)
    return words is not None and (not words or any(word in name for word in words))


if __name__ == '__main__':
    print(*QUICK)
