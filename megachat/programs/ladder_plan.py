"""What a ladder will cost, before it starts: FLOPs, hours and price of each rung by the planner's model of time."""

from collections.abc import Callable, Sequence
from typing import Any

from megachat.config import load_config
from megachat.programs.dry_run import THIS_MACHINE, Hardware, timed_plan
from megachat.studies.ladder import rung_trials
from megachat.text import text_table


def plan_rungs(
    config: str,
    both: Sequence[str],
    changes: Sequence[str],
    depths: Sequence[int],
    *,
    seeds: Sequence[int],
    ranks: int,
    hardware: Hardware = THIS_MACHINE,
) -> list[dict[str, Any]]:
    """Returns as JSON values for each depth: runs, and the sums over them of tokens, FLOPs, hours and price; hours are
    None where the machine's speeds are not known.

    Raises UserError for a plan that does not exist, a missing tokenizer, and a price where no time is known.
    """
    rows = []
    for depth in depths:
        total: dict[str, Any] = {"depth": depth, "runs": 0, "tokens": 0, "flops": 0.0, "hours": 0.0, "price": 0.0}
        for side in rung_trials(depth, changes, seeds):
            plan, time = timed_plan(load_config(config, [*both, *side[0].settings]), ranks, hardware)
            total["runs"] += len(side)
            total["tokens"] += len(side) * plan.stop_step * plan.tokens_per_step
            total["flops"] += len(side) * plan.stop_step * plan.flops_per_step
            for key, name in (("hours", "wall_hours"), ("price", "price")):
                value = time.get(name) if time else None
                total[key] = None if value is None or total[key] is None else total[key] + len(side) * value
        total["source"] = time["source"] if time else None
        rows.append(total)
    return rows


def plan_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the plan as a table with its sum."""
    keys: list[tuple[str, Callable]] = [
        ("runs", lambda value: str(value)),
        ("tokens", lambda value: f"{value:,}"),
        ("flops", lambda value: f"{value:.3g}"),
        ("hours", lambda value: f"{value:,.2f}"),
        ("price", lambda value: f"{value:,.2f}"),
    ]
    keys = [(key, show) for key, show in keys if rows[0][key] is not None]
    table = [("depth", *(key.replace("flops", "FLOPs") for key, _ in keys))]
    table += [(str(row["depth"]), *(show(row[key]) for key, show in keys)) for row in rows]
    table.append(("all", *(show(sum(row[key] for row in rows)) for key, show in keys)))
    lines = text_table(table, right=range(len(keys) + 1))
    if rows[0]["source"]:
        lines.append(f"a plan, not measured: hours by the {rows[0]['source']}, without start-up and CORE")
    else:
        lines.append("a plan; its hours are not known before the first run: give --probe FILE, or --gpu KIND")
    return lines
