"Every test runs offline, on one thread."
import os

os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

import pytest, torch

@pytest.fixture(autouse=True, scope='session')
def one_thread(): torch.set_num_threads(1)
