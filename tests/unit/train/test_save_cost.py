"""The steps after a save beside those before it."""

from megachat.train.save_cost import SaveCost


def steps(cost: SaveCost, *seconds: float) -> list[bool]:
    return [cost.add(each) for each in seconds]


def test_ten_steps_after_a_save_are_compared_with_the_ten_before_it():
    cost = SaveCost()
    steps(cost, 9.0, *[1.0] * 10)  # the oldest is forgotten
    cost.begin(11)
    assert steps(cost, 2.0, 1.5, *[1.0] * 8) == [False] * 9 + [True]
    assert cost.values == {"checkpoint/step": 11, "checkpoint/steps_after_ratio": 1.15}
    assert cost.line == "the 10 steps since the save took 1.150 times the 10 before it"
    steps(cost, *[1.0] * 10)
    cost.begin(31)
    assert steps(cost, *[1.05] * 10)[-1]
    for blocked_s in (0.01, 0.03):
        cost.finish(blocked_s, 1.0)
    assert cost.row == (
        "2 saves; training waited 0.04 s, 2.0% of their 2.00 s; 10 steps since a save took 1.100 times "
        "the 10 before it (median)"
    )


def test_steps_between_two_saves_that_are_close_are_not_compared():
    cost = SaveCost()
    steps(cost, *[1.0] * 9)
    cost.begin(9)  # too few before it
    assert not any(steps(cost, *[1.0] * 10))
    cost.begin(19)  # all before it are after the first
    assert not any(steps(cost, *[2.0] * 5))
    cost.begin(24)
    assert not any(steps(cost, *[2.0] * 10))
    steps(cost, *[1.0] * 10)
    cost.begin(44)
    assert steps(cost, *[1.25] * 10)[-1] and cost.last == (44, 1.25)
