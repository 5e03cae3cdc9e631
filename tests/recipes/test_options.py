"What `drl train` takes, as the command line and `drl compare` read it."

import subprocess, sys
from dataclasses import fields

import pytest

from drl_toolkit.cli.main import main, parse
from drl_toolkit.recipes.compare import check_made_with, requested_run
from drl_toolkit.recipes.config import RunConfig, recipe_config
from drl_toolkit.recipes.options import parse_train_options, said_fields
from drl_toolkit.runs.folder import RunError
from drl_toolkit.runs.run import Run


def test_the_command_line_and_the_comparison_read_the_same_options():
    words = ['clip', '--method', 'grpo', '--seed', '3', '--frames', '0', '--lr', '1e-4', '--no-grow']
    said = said_fields(parse_train_options(words))
    assert said == said_fields(parse(['train', *words])) == dict(seed=3, frames=0.0, lr=1e-4, grow=False)
    _, config, model = requested_run('clip', 'grpo', 3, ['--lr', '1e-4', '--model', 'demo'])
    assert (config.lr, config.seed, config.advantage, model) == (1e-4, 3, 'group', 'demo')
    assert requested_run('clip', 'grpo', 3).model is None


def test_a_compared_run_may_be_of_the_papers_size(tmp_path):
    "With `-- --preset paper` the run that is there is the preset's, as `drl train` made it."
    asked = requested_run('b2', 'b2', 0, ['--preset', 'paper'])
    own, paper = recipe_config('b2'), recipe_config('b2_paper')
    assert asked.recipe == 'b2_paper' and own.num_steps == paper.num_steps
    assert (asked.config.lr, asked.config.guidance_scale) == (paper.lr, paper.guidance_scale) != (own.lr, own.guidance_scale)
    Run.create(tmp_path / 'b2-0', asked.config, asked.recipe, asked.model).close()
    check_made_with(tmp_path / 'b2-0', asked)
    with pytest.raises(RunError, match="recipe must be as in the run .*'b2_paper'; got 'b2'"):
        check_made_with(tmp_path / 'b2-0', requested_run('b2', 'b2', 0))
    with pytest.raises(ValueError, match="preset must be one of paper; got 'huge'"):
        requested_run('b2', 'b2', 0, ['--preset', 'huge'])


def test_every_field_has_an_option_with_dashes_and_with_underscores():
    for declared in fields(RunConfig):
        if declared.name == 'reward':
            continue  # `--reward`, which may be given several times
        value = 'text' if declared.type is str else '1'
        for option in (f'--{declared.name}', f"--{declared.name.replace('_', '-')}"):
            words = [option] if declared.type is bool else [option, value]
            said = said_fields(parse_train_options(['clip', *words]))
            assert list(said) == [declared.name]


@pytest.mark.parametrize(
    'words, answer',
    [
        (['--lrr', '1'], "drl train: '--lrr' is unknown; did you mean --lr?"),
        (['--keep-graphs'], "drl train: '--keep-graphs' is called --reuse-graphs now"),
        (['--epochs', 'many'], 'drl train: argument --epochs'),
    ],
)
def test_a_wrong_option_is_one_line_and_status_2(words, answer, capsys):
    for call in (lambda: parse_train_options(['clip', *words]), lambda: main(['train', 'clip', *words])):
        with pytest.raises(SystemExit) as stop:
            call()
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith(answer) and said.count('\n') == 1


def test_options_load_no_torch():
    script = 'import drl_toolkit.recipes.options, sys; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', script], check=True)
