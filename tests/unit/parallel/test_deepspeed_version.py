"""Another DeepSpeed than the tested one is refused in one sentence, unless the user accepts it and it has all private
names.
"""

import re
from pathlib import Path

import pytest
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from megachat.errors import UserError
from megachat.installation import DEEPSPEED_VERSION
from megachat.parallel.deepspeed_version import OVERRIDE, PRIVATE_NAMES, check_deepspeed, missing_names
from megachat.parallel.engine import ZeroAdamW
from megachat.parallel.zero_state import ZeroState

SETUP = Path(__file__).resolve().parents[3] / "setup.py"


class Library:
    """Stands for a class of DeepSpeed: one method, which uses one attribute."""

    def step(self):
        return self.partition_size


def test_names_are_methods_or_attributes_that_methods_use():
    assert missing_names({Library: ["step", "partition_size"]}) == []
    assert missing_names({Library: ["step", "gone", "partition_size"]}) == ["Library.gone"]
    assert missing_names(PRIVATE_NAMES) == []


def test_another_version_is_refused_unless_accepted(monkeypatch):
    monkeypatch.delenv(OVERRIDE, raising=False)
    check_deepspeed("1.0", "1.0", {Library: ["step"]})
    with pytest.raises(UserError) as refusal:
        check_deepspeed("1.1", "1.0", {Library: ["step"]})
    for fact in ("1.1", "pip install deepspeed==1.0", f"{OVERRIDE}=1"):
        assert fact in str(refusal.value)
    monkeypatch.setenv(OVERRIDE, "1")
    check_deepspeed("1.1", "1.0", {Library: ["step"]})
    with pytest.raises(UserError, match=r"Library\.gone"):
        check_deepspeed("1.1", "1.0", {Library: ["step", "gone"]})


def test_setup_pins_the_tested_version():
    assert re.search(r'"deepspeed==([^"]+)"', SETUP.read_text()).group(1) == DEEPSPEED_VERSION


def test_two_methods_of_zero_are_overridden():
    methods = {name for cls in (ZeroState, ZeroAdamW) for name, value in vars(cls).items() if callable(value)}
    overridden = {name for name in methods if hasattr(DeepSpeedZeroOptimizer, name)}
    assert overridden - set(vars(object)) == {"scaled_global_norm", "_update_scale"}
