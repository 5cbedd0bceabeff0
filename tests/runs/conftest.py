"""Inputs that all runs share, written once, and the uninterrupted runs that others are compared with."""

from pathlib import Path

import pytest

from tests.runs.job import Place, make_place, train


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Place:
    return make_place(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="session")
def one(place) -> Path:
    return train(place, "one", "--resume", "auto")  # with nothing there yet, it starts


@pytest.fixture(scope="session")
def two(place) -> Path:
    return train(place, "two", launcher="torchrun", world=2)
