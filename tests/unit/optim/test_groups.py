from dataclasses import replace
from types import SimpleNamespace

import pytest

from megachat.errors import UserError
from megachat.model.gpt import ModelOptions, build_layers
from megachat.model.parameters import placed_parameters
from megachat.optim.groups import GROUPS, Group, assign_groups, rate_multipliers, require_used_patterns
from megachat.place import place_of
from megachat.planning.dimensions import NORMS, Dimensions, window_sizes
from megachat.planning.plan import RATES
from megachat.settings import OptimizerConfig

DIMS = Dimensions(4, 64, 4, 2, 16, 32, 100, window_sizes("SL", 4, 32))


def _place(name, whole=(4, 4), cut="whole"):
    return SimpleNamespace(name=name, whole=whole, cut=cut)


def test_every_parameter_has_one_group_and_every_matrix_is_on_muon():
    places = [place_of(parameter) for parameter in placed_parameters(build_layers(DIMS, ModelOptions()))]
    assigned = assign_groups(places)
    assert set(assigned) == {place.name for place in places}
    on_muon = {name for name, group in assigned.items() if group.optimizer == "muon"}
    assert on_muon == {name for name in assigned if name.startswith("transformer.h.")}
    assert any(name.endswith("ve_gate.weight") for name in on_muon)


def test_every_rate_has_a_setting_and_every_group_a_rate():
    assert {group.rate for group in GROUPS} == RATES.keys()
    settings = {key for key in OptimizerConfig.model_fields if key.endswith("_lr")}
    assert {rule.setting for rule in RATES.values()} == settings


def test_scales_of_norms_are_on_adamw_without_decay():
    dims = replace(DIMS, norm_scales=NORMS)
    places = [place_of(parameter) for parameter in placed_parameters(build_layers(dims, ModelOptions()))]
    groups = {name: group for name, group in assign_groups(places).items() if group.name == "norm_scale"}
    assert len(groups) == 2 + 4 * DIMS.depth and all(name.endswith("_scale") for name in groups)
    assert {(group.optimizer, group.weight_decay) for group in groups.values()} == {("adamw", 0.0)}


def test_a_parameter_in_no_group_or_in_two_is_an_error():
    with pytest.raises(ValueError, match="transformer.extra.* 0 .*none"):
        assign_groups([_place("transformer.extra")])
    doubled = (*GROUPS, Group("again", "adamw", ("*.c_q.weight",), "x0"))
    with pytest.raises(ValueError, match="c_q.weight.* 2 .*matrix, again"):
        assign_groups([_place("transformer.h.0.attn.c_q.weight", cut="column")], doubled)


def test_a_matrix_that_is_not_on_muon_and_a_vector_that_is_are_errors():
    others = tuple(group for group in GROUPS if group.optimizer != "muon")
    with pytest.raises(ValueError, match="c_q.*Muon.*late.*adamw"):
        assign_groups(
            [_place("transformer.h.0.attn.c_q.weight", cut="column")],
            (*others, Group("late", "adamw", ("transformer.h.*",), "x0")),
        )
    with pytest.raises(ValueError, match=r"attn.bias.weight.*\(4,\).*matrices only"):
        assign_groups([_place("transformer.h.0.attn.bias.weight", whole=(4,))])


def test_multipliers_by_rule_and_by_name():
    shapes = {
        "h.0.attn.c_q.weight": (8, 8),
        "h.0.mlp.c_fc.weight": (32, 8),
        "h.0.mlp.c_proj.weight": (8, 32),
        "h.0.attn.c_k.weight": (4, 8),
    }
    assert list(rate_multipliers(shapes, "rows_over_cols").values()) == [1.0, 2.0, 1.0, 1.0]
    assert list(rate_multipliers(shapes, "flipped").values()) == [1.0, 1.0, 2.0, 1.0]
    assert list(rate_multipliers(shapes, {"*.c_q.*": 3.0}).values()) == [3.0, 2.0, 1.0, 1.0]
    with pytest.raises(UserError, match=r"muon_multiplier.*h.0.attn.c_q.weight.*c_q.*attn.*one"):
        rate_multipliers(shapes, {"*.c_q.*": 3.0, "*attn*": 1.0})
    places = [_place("transformer.h.0.attn.c_q.weight", cut="column"), _place("transformer.wte.weight", cut="rows")]
    require_used_patterns({"*.c_q.*": 3.0}, places)
    with pytest.raises(UserError, match=r"muon_multiplier.*typo.*matches no matrix.*h.0.attn.c_q.weight"):
        require_used_patterns({"*.c_q.*": 3.0, "*.typo.*": 3.0}, places)
    with pytest.raises(UserError, match=r"muon_multiplier.*wte.*matches no matrix"):
        require_used_patterns({"*.wte.*": 3.0}, places)
