"""megachat/doctor/hosts.py's and rank.py's arithmetic: who is slow, what is unlike, and in which rounds pairs meet."""

from megachat.doctor.hosts import differing_facts, slow_names
from megachat.doctor.rank import rounds_of_pairs


def test_slow_is_below_nine_tenths_of_the_median():
    assert slow_names({"a": 100.0, "b": 90.0, "c": 89.9, "d": 100.0, "e": 400.0}) == ["c"]
    assert slow_names({}) == [] and slow_names({"a": 1.0}) == []


def test_facts_that_one_host_lacks_are_unlike():
    hosts = {"a": {"torch": "2.13", "driver": "580"}, "b": {"torch": "2.13"}}
    assert differing_facts(hosts) == {"driver": {"a": "580", "b": "none"}}


def test_every_pair_meets_once_and_nobody_twice_in_a_round():
    for count in range(1, 10):
        rounds = rounds_of_pairs(count)
        assert sorted(pair for pairs in rounds for pair in pairs) == [
            (one, other) for one in range(count) for other in range(one + 1, count)
        ]
        assert all(len({place for pair in pairs for place in pair}) == 2 * len(pairs) for pairs in rounds)
        assert len(rounds) == (count - 1 if count % 2 == 0 else count if count > 1 else 1)
