import json

import pytest

from megachat.config import Config, known_keys, load_config, save_config
from megachat.errors import UserError


def write(tmp_path, text: str):
    path = tmp_path / "c.json"
    path.write_text(text)
    return path


def mistakes(path, *overrides) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def test_a_file_holds_differences_and_overrides_win(tmp_path):
    path = write(tmp_path, '{"model": {"depth": 4}, "evaluate": {"prompts": ["a"]}}')
    config = load_config(
        path,
        [
            "model.depth=6",
            "run.name=x",
            'optimizer.muon_multiplier={"*": 2.0}',
            "horizon.flops=1e18",
            "model.kv_heads=null",
        ],
    )
    assert (config.model.depth, config.run.name, config.horizon.flops, config.model.kv_heads) == (6, "x", 1e18, None)
    assert config.evaluate.prompts == ("a",)
    assert config.optimizer.muon_multiplier == {"*": 2.0}
    assert config.batch == Config().batch


def test_saved_config_runs_again(tmp_path):
    config = load_config(write(tmp_path, '{"model": {"depth": 4}, "horizon": {"ratio": 8}}'))
    save_config(config, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == {"model": {"depth": 4}, "horizon": {"ratio": 8.0}}
    assert load_config(tmp_path / "again.json") == config


def test_all_mistakes_at_once_one_line_each_with_the_nearest_name(tmp_path):
    path = write(
        tmp_path,
        (
            '{"model": {"dept": 3, "depth": "4", "depth": 5}, "btch": {}, "batch": {"steps": 3, "tokens": '
            '-1, "micro_rows": 2.5}}'
        ),
    )
    lines = mistakes(path, "optimizer.matrix_lrr=1", "nonsense", "log.wandb=loud")
    expected = (
        "'depth' is given twice",
        "--set nonsense: give section.key=value",
        "unknown key model.dept; did you mean model.depth?",
        "batch.tokens is -1",
        "batch.micro_rows is 2.5",
        "unknown key batch.steps; did you mean horizon.steps?",
        "unknown key optimizer.matrix_lrr; did you mean optimizer.matrix_lr?",
        "unknown key btch; did you mean batch?",
        'log.wandb is "loud"',
    )
    for part in expected:
        assert any(part in line for line in lines), (part, lines)
    assert len(lines) == len(expected)
    options = [line for line in lines if "matrix_lrr" in line or "wandb" in line]
    assert all(line.startswith("--set: ") for line in options), "the file does not have these"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("orders=[1,2]", "is 1 but should be greater than or equal to 2"),
        ("orders=[9]", "is 9 but should be less than or equal to 8"),
        ("orders=[2,3,2]", "must not contain 2 twice"),
        ("blocks=[1,1]", "must not contain 1 twice"),
        ("blocks=[-1]", "is -1 but should be greater than or equal to 0"),
        ("blocks=3", "is 3 but should be a valid"),
        ("rows=0", "is 0 but should be greater"),
        ("rows=3000000000", "the hash chooses a row with 32 bits"),
        ("width=0", "is 0 but should be greater"),
        ("storage=disk", "should be 'device' or 'host'"),
        ("optimizer=muon", "should be 'adamw' or 'rowwise'"),
        ("bos=-1", "is -1 but"),
    ],
)
def test_settings_of_ngrams_that_cannot_be_are_one_sentence(tmp_path, setting, words):
    (line,) = mistakes(write(tmp_path, "{}"), f"ngram.{setting}")
    assert line.startswith("--set: ngram.") and words in line


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/root", "a\nb"])
def test_the_name_of_a_run_is_no_path(name, tmp_path):
    (line,) = mistakes(write(tmp_path, json.dumps({"run": {"name": name}})))
    assert "run.name" in line and "run.folder" in line


def test_a_byte_order_mark_is_not_part_of_a_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"model": {"depth": 4}}')
    assert load_config(path).model.depth == 4


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "not JSON at line 1 column 2"),
        ("[1]", "a config is a JSON object"),
        ('{"model": 3}', "model is 3"),
        ('{"model": {"depth": true}}', "model.depth is true"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, part):
    assert part in mistakes(write(tmp_path, text))[0]


@pytest.mark.parametrize(
    ("recipe", "part"),
    [
        ("rowwise", "scales by row have no equivalent in Transformer Engine: set tensorwise, or blockwise"),
        ("delayed", "delayed scaling keeps a history of maxima that checkpoints do not hold: set tensorwise"),
        ("mxfp8", "MXFP8 needs a Blackwell GPU and is not supported: set blockwise"),
        ("full", "should be 'off', 'tensorwise' or 'blockwise'"),
    ],
)
def test_an_fp8_recipe_without_an_equivalent_is_refused_by_name(tmp_path, recipe, part):
    (line,) = mistakes(write(tmp_path, "{}"), f"precision.fp8={recipe}")
    assert f'precision.fp8 is "{recipe}" but {part}' in line


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("horizon.ratio=1e-12", "horizon.ratio is 1e-12 but should be greater than or equal to 0.001"),
        (f"model.depth={10**30}", "should be less than or equal to 128: the rules for width and rates are known up to"),
        (f"model.vocab_size={'9' * 5000}", "model.vocab_size is "),
        ("run.name=a\0b", 'run.name is "a\\u0000b" but must not contain the character NUL'),
        ('evaluate.prompts=["a\\u0000"]', "must not contain the character NUL"),
        ('run.name="\\ud800"', "half of a surrogate pair"),
        ("run.name=" + "x" * 300, "should have at most 200 characters"),
        ("parallel.timeout_s=1e30", "parallel.timeout_s is 1e+30 but "),
        (f"parallel.timeout_s={10**30}", "should be less than or equal to 10000000: no job waits 116 days"),
        ("optimizer.matrix_lr=1e300", "should be less than or equal to 100: already a rate of 1 moves"),
        (f"evaluate.tokens={10**30}", "should be less than or equal to 10000000000: the evaluation would take days"),
        (f"evaluate.sample_tokens={10**30}", "should be less than or equal to 100000: a longer sample takes hours"),
        ('optimizer.muon_multiplier={"*": -1}', "optimizer.muon_multiplier is -1 but should be greater than or equal"),
        ("model.norm_epsilon=1e300", "should be less than or equal to 0.1: a norm would depend on it more than on the"),
        ("model.depth=" + "[" * 100_000, "model.depth is "),
        ("model.depth=" + "[" * 300 + "]" * 300, "recursion limit exceeded"),
    ],
    ids=lambda value: value[:30],
)
def test_absurd_values_are_refused_in_one_short_sentence_with_the_reason(tmp_path, override, part):
    lines = mistakes(write(tmp_path, "{}"), override)
    assert any(part in line for line in lines), lines
    assert all(len(line) < 400 and line.isprintable() for line in lines)


@pytest.mark.parametrize("text", ['{"model": {"depth": ' + "9" * 5000 + "}}", "[" * 100_000, '{"a":' * 100_000])
def test_deep_files_and_endless_numbers_are_refused(tmp_path, text):
    assert "not a config: " in mistakes(write(tmp_path, text))[0]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("optimizer.beta1", "each group of parameters has a pair"),
        ("model.activation", "the MLP has nanochat's squared ReLU"),
        ("model.swiglu", "nanochat measured SwiGLU to be worse"),
        ("model.moe_experts", "mixtures of experts are not supported"),
        ("model.mtp_heads", "multi-token prediction is not supported"),
        ("batch.ramp_steps", "the batch is constant"),
        ("model.dropout", "dropout is not supported"),
        ("model.nothing_like_it", "see megachat/settings/ for all keys"),
        ("model.width", "the model's width is model.depth times"),
        ("optimizer.warm_up_steps", "did you mean optimizer.warmup_steps?"),
    ],
)
def test_only_near_keys_are_suggested_and_refused_ideas_are_known(tmp_path, key, hint):
    (line,) = mistakes(write(tmp_path, "{}"), f"{key}=1")
    assert f"unknown key {key}; " in line and hint in line


def test_every_upper_bound_has_a_reason():
    for name, section in Config.model_fields.items():
        for key, field in section.annotation.model_fields.items():
            numeric = field.annotation in (int, float, int | None, float | None)
            bounds = [limit.le for limit in field.metadata if hasattr(limit, "le")]
            assert not numeric or (bounds and (bounds == [1] or field.json_schema_extra["reason"])), f"{name}.{key}"


def test_a_missing_file_is_refused(tmp_path):
    assert "cannot read the config" in mistakes(tmp_path / "none.json")[0]


def test_config_is_frozen_and_every_field_is_documented():
    with pytest.raises(ValueError):
        Config().model.depth = 3
    for name, section in Config.model_fields.items():
        for key, field in section.annotation.model_fields.items():
            assert field.description, f"{name}.{key} has no description"
    assert "model.depth" in known_keys()
