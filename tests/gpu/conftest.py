"""Skips the tests here without a CUDA device. `report` records their measurements for docs/benchmarks.md."""

import json
import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(
                    pytest.mark.skip(reason="no CUDA device: run bash tests/run_gpu.sh on a machine with one")
                )


@pytest.fixture
def report(request):
    """report(name, value) appends a line to the file that MEGACHAT_GPU_REPORT names."""

    def write_line(name, value):
        path = os.environ.get("MEGACHAT_GPU_REPORT")
        if path:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"test": request.node.name, "name": name, "value": value}) + "\n")

    return write_line
