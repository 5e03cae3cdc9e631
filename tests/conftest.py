"Every test runs offline, on one thread."

import os, signal

os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

import pytest, torch


def pytest_addoption(parser):
    parser.addoption(
        "--quick", action="store_true", help="the quickest tests of every room, see tests/tiers.py"
    )


def pytest_collection_modifyitems(config, items):
    "Leave out what is not quick, where only that is asked for."
    if not config.getoption("--quick"):
        return
    from tiers import quick

    left_out = [item for item in items if not quick(item.nodeid)]
    items[:] = [item for item in items if quick(item.nodeid)]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True, scope='session')
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope='session')
def interrupts():
    """A shell starts what is to run in the background with Ctrl-C ignored, and so would all processes be that
    the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup's
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def few_prompt_sets(monkeypatch):
    "`drl eval` asks for sixteen images of each prompt_set at most."
    from drl_toolkit.emoji import evaluation
    from drl_toolkit.evaluation.evaluate import PromptSet

    few = [PromptSet(p.name, p.prompts[:16]) for p in evaluation.emoji_prompt_sets(0.1)]
    monkeypatch.setattr(evaluation, 'emoji_prompt_sets', lambda size: few)
