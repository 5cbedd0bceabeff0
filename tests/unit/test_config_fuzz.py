"""Seeded configs that nobody would write: each is planned, or refused in sentences, quickly and without a traceback."""

import json
import random
import time

import pytest
import torch

from megachat.config import Config, load_config
from megachat.errors import UserError
from megachat.planning.explain import describe_config, describe_plan, setting_warnings
from megachat.planning.manifest import describe_ownership, ownership
from megachat.planning.memory import memory_of_stages
from megachat.planning.memory_advice import memory_warning
from megachat.planning.plan import resolve_plan
from tests.limits import slowness

CASES, BOX_S, MOST_S = 3000, 15.0, 5.0
MEMORY_EVERY = 8  # it takes ten times as long as the rest
NUMBERS = [0, 1, 2, 3, 7, 16, 64, 127, 1000, 4096, 10**6, 10**9, 10**12, 2**31, 2**63, 2**64, 10**30, 10**300, 10**4000]
NUMBERS += [-number for number in NUMBERS]
FLOATS = [0.0, 1e-300, 1e-12, 1e-7, 0.5, 1.5, 12.0, 1e6, 1e30, 1e300, -1e-9, -1.0]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 2000, '{"a":' * 300 + "1" + "}" * 300, "-0", "1e5"]
TEXTS = ["", "x", "SL", "L" * 500, "a\0b", "\ud800", "../..", "a\nb", "x" * 300, "auto", "🙂", "true", "bfloat16"]
KEYS = ["", "depht", "activation", "x0_beta1", "moe", "a.b", "model", "__class__", "\0", "\n", "k" * 999, "Depth"]
SECTIONS = {name: list(field.annotation.model_fields) for name, field in Config.model_fields.items()}


def value(chance: random.Random, depth: int = 0):
    kind = chance.randrange(9 if depth < 3 else 6)
    if kind < 3:
        return chance.choice(NUMBERS)
    if kind < 5:
        return chance.choice((*FLOATS, None, True, False))
    if kind == 5:
        return chance.choice(TEXTS)
    items = [value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return items if kind < 7 else {chance.choice(KEYS): item for item in items}


def near_default(chance: random.Random, section: str, key: str):
    default = getattr(getattr(Config(), section, None), key, None)
    if isinstance(default, bool) or not isinstance(default, int | float):
        return list(default) if isinstance(default, tuple) else default
    return type(default)(default * chance.choice([0.5, 1, 1, 2, 10, 1000]))


def case(seed: int) -> tuple[str, list[str], int]:
    """The text of a config, overrides and the number of ranks. Most values are near what is allowed."""
    chance = random.Random(seed)
    sections: dict = {"model": {"depth": chance.choice([1, 2, 4, 12] * 12 + [24, 128]), "vocab_size": 4096}}
    wild = chance.choice([0.0, 0.1, 0.5])
    for _ in range(chance.randrange(1, 5)):
        section = chance.choice([*SECTIONS] * (5 if wild else 50) + KEYS)
        keys = SECTIONS.get(section, ["depth"])
        if chance.random() < wild / 10:
            sections[section] = value(chance)
        elif isinstance(sections.setdefault(section, {}), dict):
            key = chance.choice(keys * (3 if wild else 30) + KEYS[:3])
            plausible = near_default(chance, section, key)
            sections[section][key] = value(chance) if chance.random() < wild else plausible
    text = json.dumps(sections)
    if chance.random() < wild / 5:
        text = text.replace("4096", chance.choice(RAW), 1)
    if chance.random() < wild / 5:
        cut = chance.randrange(len(text))
        text = text[:cut] + chance.choice(['"', "}", "\x00", "", "\\u12"]) + text[cut + 1 :]
    overrides = []
    if chance.random() < wild / 2:
        section = chance.choice([*SECTIONS])
        shown = chance.choice([*RAW, *TEXTS, str(chance.choice(NUMBERS))])
        overrides.append(f"{section}.{chance.choice(SECTIONS[section])}={shown}")
    return text, overrides, chance.choice([1, 1, 2, 3, 8, 64])


def plan_or_refuse(path, seed: int) -> bool:
    """Whether the case was planned."""
    text, overrides, world = case(seed)
    path.write_text(text, encoding="utf-8")
    try:
        config = load_config(path, overrides)
        plan = resolve_plan(config, world, config.model.vocab_size or 4096)
        assert describe_config(config) and describe_plan(plan) and isinstance(setting_warnings(config, plan), list)
        if seed % MEMORY_EVERY == 0:
            stages = memory_of_stages(config, plan, torch.bfloat16)
            memory_warning(config, plan, torch.bfloat16, stages[0].total // 2, stages=stages)
            assert describe_ownership(ownership(config, plan))
        return True
    except UserError as refusal:
        for line in str(refusal).split("\n"):
            assert 10 < len(line) < 600 and line.isprintable(), line
        return False


def test_thousands_of_configs_are_planned_or_refused_in_sentences(tmp_path):
    planned = done = 0
    most_s, first = MOST_S * slowness(), time.process_time()
    for seed in range(CASES):
        begin = time.process_time()
        try:
            planned += plan_or_refuse(tmp_path / "config.json", seed)
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}; its config: {case(seed)!r:.600}")
        done += 1
        now = time.process_time()
        assert now - begin < most_s, f"seed {seed} took {now - begin:.1f} s: {case(seed)!r:.600}"
        if now - first > BOX_S:  # a slower machine tries fewer
            break
    assert planned > done / 10 and planned < done, "both kinds must be tried"
