"""Runs of before the names were the field's (schema 1) open, and go on.

`schema_1/` was written by commit 70a99b1, the last with the old names: drl train compressibility --epochs 2
--num-steps 2 --samples 8 --train lora --lora-rank 1 --frames 0 --updates 1 --average .5 --credit per_prompt
--train-steps 1 (its older checkpoint and its images were left out)."""

import json, shutil
from pathlib import Path

import pytest

from drl_toolkit.cli.main import main
from drl_toolkit.recipes.config import read_config
from drl_toolkit.runs.run import Run
from drl_toolkit.runs.models import open_policy
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.utils.aliases import FIELDS, METRICS

OLD = Path(__file__).with_name('schema_1')


@pytest.fixture
def old(tmp_path):
    return Path(shutil.copytree(OLD, tmp_path / 'old'))


def test_it_really_has_the_old_names():
    about, rows = json.loads((OLD / 'config.json').read_text()), (OLD / 'metrics.jsonl').read_text()
    assert (
        about['schema'] == 1
        and set(FIELDS) - set(about['config']) == set()
        and not set(FIELDS.values()) & set(about['config'])
    )
    assert all(f'"{name}"' in rows for name in METRICS if name != 'frac_zero_std' and name != 'flat_groups')


def test_its_configuration_and_metrics_are_read(old):
    config, rows = read_config(Run.open(old).config), Run.open(old).metrics()
    assert (config.num_minibatches, config.ema_decay, config.advantage, config.latents_dtype) == (
        1,
        0.5,
        'per_prompt',
        'fp32',
    )
    row = next(r for r in rows if r['task'])
    assert (
        {'clip_fraction_high', 'clip_fraction_low', 'diagnosis'} <= set(row)
        and 'nfe' in rows[-1]
        and not set(METRICS) & {k for r in rows for k in r}
    )


def test_its_weights_open(old):
    policy = Policy.from_pretrained(old / 'weights')
    assert policy.num_steps == 2 and policy.lora_rank == 1 and open_policy(old).num_steps == 2
    assert any(p.abs().max() > 0 for name, p in policy.named_parameters().items() if 'lora_B' in name)


def test_it_is_resumed_and_its_history_has_the_new_names(old, capsys):
    assert main(['train', 'compressibility', '--resume', '--out', str(old), '--epochs', '3']) == 0
    assert 'going on after 2 of 3 epochs' in capsys.readouterr().out
    run = Run.open(old)
    rows = [r for r in run.metrics() if r['task']]
    assert [r['epoch'] for r in rows] == [0, 1, 2] and len(
        {frozenset(r) - {'diagnosis', 'signal_to_noise', 'half_cosine'} for r in rows[:2]}
    ) == 1
    state = json.loads((run.checkpoints()[-1] / 'state.json').read_text())
    assert not set(METRICS) & {
        k for record in state['history'] for k in {**record, **record['tasks']['compressibility']}
    }


def test_an_old_option_is_named_with_the_new_one(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['train', 'joint', '--keep-graphs'])
    assert stop.value.code == 2 and "'--keep-graphs' is called --reuse-graphs now" in capsys.readouterr().err
