"""What counts as a fault, and what is done about it."""

import math

import pytest

from megachat.train.nonfinite import chosen_action, find_fault


@pytest.mark.parametrize(
    ("loss", "norm", "loss_scale", "fault"),
    [
        (2.0, 1.0, 1.0, None),
        (2.0, math.inf, 1.0, "gradient"),
        (2.0, math.inf, 2.0, None),  # float16's scale can still fall
        (math.nan, math.inf, 2.0**16, "loss"),  # the scale is no part of the forward pass
    ],
)
def test_an_overflow_is_a_fault_at_the_least_loss_scale(loss, norm, loss_scale, fault):
    assert find_fault(loss, norm, loss_scale) == fault


def test_the_policy_decides_and_an_update_that_was_made_cannot_be_skipped():
    actions = {fault: chosen_action("auto", fault, skipped=True) for fault in ("loss", "gradient")}
    assert actions == {"loss": "stop", "gradient": "skip"}
    for policy in ("stop", "skip", "rewind"):
        assert {chosen_action(policy, fault, skipped=True) for fault in ("loss", "gradient")} == {policy}
    assert chosen_action("skip", "loss", skipped=False) == "stop"
