"Every test runs offline, on one thread."
import os

os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

import pytest, torch

@pytest.fixture(autouse=True, scope='session')
def one_thread(): torch.set_num_threads(1)

@pytest.fixture
def few_prompt_sets(monkeypatch):
    "`drl eval` asks for sixteen pictures of each prompt_set at most."
    from drl_toolkit.evaluation import evaluate
    few = [evaluate.PromptSet(p.name, p.prompts[:16]) for p in evaluate.emoji_prompt_sets(.1)]
    monkeypatch.setattr(evaluate, 'emoji_prompt_sets', lambda size: few)
