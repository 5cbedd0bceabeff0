"""The size of the demo's run: by the speed of the machine, kept by a run that exists."""

import pytest

from megachat.config import load_config, save_config
from megachat.installation import config_folder
from megachat.programs import demo_size

DEMO = str(config_folder() / "demo.json")
TOKENS = 240 * 8192


def test_a_slow_machine_gets_the_short_run():
    config = load_config(DEMO)
    least = demo_size.OVERHEAD * TOKENS / demo_size.LIMIT_S
    whole = load_config(DEMO, demo_size.choose_size(config, 1.01 * least))
    assert whole.horizon == config.horizon and whole.batch == config.batch and "about 3.3 minutes" in whole.run.note
    short = load_config(DEMO, demo_size.choose_size(config, 0.99 * least))
    assert short.horizon.steps * short.batch.tokens == TOKENS / 2 and "shortened to 983,040 tokens" in short.run.note
    assert short.horizon.steps % short.evaluate.every == short.horizon.steps % short.checkpoint.every == 0


@pytest.mark.parametrize("tokens_per_s", [100.0, 1e6])
def test_a_run_keeps_its_size(tmp_path, monkeypatch, tokens_per_s):
    config = load_config(DEMO)
    monkeypatch.setattr(demo_size, "passes_per_second", lambda config, vocab_size: tokens_per_s)
    first = load_config(DEMO, demo_size.size_settings(config, tmp_path, 4096))
    save_config(first, tmp_path / "config.json")
    monkeypatch.setattr(demo_size, "passes_per_second", lambda config, vocab_size: 1 / 0)
    again = load_config(DEMO, demo_size.size_settings(config, tmp_path, 4096))
    assert again == first
    save_config(load_config(DEMO, ["horizon.steps=20"]), tmp_path / "config.json")
    assert load_config(DEMO, demo_size.size_settings(config, tmp_path, 4096)).horizon == config.horizon


def test_passes_are_measured_on_any_layout():
    config = load_config(DEMO, ["model.depth=1", "parallel.tensor=3", "batch.micro_rows=1", "batch.tokens=256"])
    assert demo_size.passes_per_second(config, 64, seconds=0.0) > 0
