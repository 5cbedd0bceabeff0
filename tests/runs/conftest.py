"""Inputs that all runs share, written once, and the uninterrupted runs that others are compared with."""

import dataclasses
from pathlib import Path

import pytest

from tests.runs.job import Place, make_place, train


@pytest.fixture(scope="session")
def shared_place(tmp_path_factory) -> Place:
    return make_place(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def place(shared_place, request) -> Place:
    """The shared inputs, and a folder for this file's runs: tests in two files may give their runs one name."""
    runs = shared_place.runs / request.module.__name__.rpartition(".")[2]
    runs.mkdir()
    return dataclasses.replace(shared_place, runs=runs)


@pytest.fixture(scope="session")
def one(shared_place) -> Path:
    return train(shared_place, "one", "--resume", "auto")  # with nothing there yet, it starts


@pytest.fixture(scope="session")
def two(shared_place) -> Path:
    return train(shared_place, "two", world=2)
