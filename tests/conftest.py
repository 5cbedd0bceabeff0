"""One thread in the test process, as in the ranks it starts: they share the cores with it, and other thread counts may cut a matrix
multiplication elsewhere and give other bits."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # OpenMP's idle threads sleep; read when torch is loaded

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """Also after a test that changed the number."""
    torch.set_num_threads(1)
