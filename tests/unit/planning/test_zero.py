import pytest

from megachat.place import place_of
from megachat.planning.zero import zero1_owners
from tests.harness import run_ranks
from tests.training import SMALL_VOCAB, build, small_config


def held(config):
    return [
        place_of(parameter).name + str(place_of(parameter).offset)
        for parameter, *_ in build(config, SMALL_VOCAB).engine.adamw.fragments()
    ]


@pytest.mark.parametrize("world", [1, 3])
def test_owners_are_deepspeeds(world):
    config = small_config()
    by_rank = run_ranks(held, world, config)
    training_groups = run_ranks(sizes, 1, config)[0]
    for members in training_groups:
        for (name, _), owners in zip(members, zero1_owners([size for _, size in members], world), strict=True):
            assert owners == tuple(rank for rank in range(world) if name in by_rank[rank]), name


def sizes(config):
    zero = build(config, SMALL_VOCAB).engine.adamw
    return [
        [(place_of(parameter).name + str(place_of(parameter).offset), parameter.numel()) for parameter in group]
        for group in zero.bit16_groups
    ]


def test_a_padded_share():
    assert zero1_owners([1, 1, 1], 4) == [(0,), (0,), (1,)]
    assert zero1_owners([100], 2) == [(0, 1)]
