"""What tools/bench.py lookup_step compares."""

from megachat.config import load_config
from megachat.planning.dimensions import flops_per_token
from megachat.planning.sizes import resolve_dimensions
from tools.bench.lookup import step_plans


def test_the_sides_without_tables_bracket_the_flops_at_the_same_width():
    config = load_config("configs/d4_cpu.json", ["lookup.after_blocks=[1, 2]", "lookup.max_rows_per_token=100"])
    sides = step_plans(config, resolve_dimensions(config, 500).lookup, 500)
    dims = {name: plan.dims for name, (_, plan) in sides.items()}
    plain, tables, deeper = (flops_per_token(dims[name]) for name in ("plain", "tables", "deeper"))
    assert plain < tables <= deeper and dims["tables"].lookup and not dims["deeper"].lookup
    assert len({one.width for one in dims.values()}) == 1 and dims["plain"].depth == 4 < dims["deeper"].depth
    assert len({plan.rows_per_step for _, plan in sides.values()}) == 1
