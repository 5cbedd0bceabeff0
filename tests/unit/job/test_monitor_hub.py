"""Which rank holds up the others, from what the ranks report."""

from megachat.job.monitor_hub import blocking_ranks


def state(
    text: str,
    *,
    waits: bool = True,
    axis: str = "",
    ranks: tuple[int, ...] = (),
    number: int = 0,
    counts: dict | None = None,
) -> dict:
    return {
        "text": text,
        "waits": waits,
        "axis": axis,
        "ranks": list(ranks),
        "number": number,
        "counts": counts or {axis: number},
    }


def collective(number: int, text: str = "bucket 2") -> dict:
    return state(text, axis="data", ranks=(0, 1, 2), number=number)


def test_a_silent_rank_comes_first_then_a_busy_one():
    assert blocking_ranks({0: collective(4), 1: state("forward", waits=False)}, (2,)) == [2]
    assert blocking_ranks({0: collective(4), 1: state("forward", waits=False), 2: collective(4)}, ()) == [1]


def test_of_ranks_that_all_wait_the_one_that_is_behind_on_the_axis():
    receiving = state("receiving activations", counts={"data": 3})
    assert blocking_ranks({0: receiving, 1: collective(4), 2: collective(4)}, ()) == [0]
    assert blocking_ranks({0: receiving, 1: collective(4)}, ()) == [0], "also where as many wait here as there"
    assert blocking_ranks({0: collective(4), 1: collective(4), 2: collective(2)}, ()) == [2]


def test_else_the_few_that_wait_in_another_operation_or_nobody():
    assert blocking_ranks({0: collective(4), 1: collective(4, "norm"), 2: collective(4)}, ()) == [1]
    assert blocking_ranks({rank: collective(4) for rank in range(3)}, ()) == []
