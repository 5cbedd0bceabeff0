"""The config of a run: its file holds what differs from the defaults; unknown keys are refused."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megachat import config_checks
from megachat.config_checks import Section
from megachat.errors import UserError, raise_if_unreadable
from megachat.files import lfs_problem, write_atomically
from megachat.settings import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    HorizonConfig,
    LogConfig,
    LookupConfig,
    ModelConfig,
    NgramConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ReliabilityConfig,
    RunConfig,
)


class Config(Section):
    """All settings of a run; see each section's fields."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    lookup: LookupConfig = LookupConfig()
    ngram: NgramConfig = NgramConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    horizon: HorizonConfig = HorizonConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    reliability: ReliabilityConfig = ReliabilityConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def changed(self, section: str, /, **values: object) -> "Config":
        """Returns the config with other values in a section. They are not validated."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=values)})


def known_keys() -> list[str]:
    """Returns every `section.key`."""
    return [f"{name}.{key}" for name, section in Config() for key in type(section).model_fields]


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Loads a JSON file with `section.key=value` overrides on top (a value is JSON, else a string).

    Raises UserError with one line per mistake: a file missing or not JSON, unknown, duplicate or mistyped keys, values
    out of range.
    """
    path, mistakes = Path(path), list[str]()

    def checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        mistakes.extend(f"{path}: key {key!r} is given twice in one object; keep one" for key in repeated)
        return dict(pairs)

    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=checked_object)
    except OSError as error:
        raise_if_unreadable(f"the config {path}", error)
        raise UserError(
            f"{path}: cannot read the config ({error.strerror or error}); name a JSON file, such as configs/d4_cpu.json"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; a config is JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        if pointer := lfs_problem(path):
            raise UserError(f"{path} {pointer}") from None
        raise UserError(f"{path}: not JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not a config: a number has thousands of digits, or too many levels") from None
    if not isinstance(values, dict):
        raise UserError(f'{path}: a config is a JSON object of sections, for example {{"model": {{"depth": 12}}}}')
    return config_from_values(values, str(path), overrides, mistakes)


def config_from_values(
    values: dict[str, Any], source: str, overrides: list[str] | tuple[str, ...] = (), mistakes: list[str] | None = None
) -> Config:
    """Returns the settings of a dictionary with overrides on top.

    Raises UserError as `load_config`, with `mistakes` before its own. source: names the dictionary in errors.
    """
    mistakes, config = list(mistakes or ()), Config()
    fields = {name: type(section).model_fields for name, section in config}
    try:
        values = json.loads(json.dumps(values))
        values.pop("$schema", None)  # names configs/schema.json, for editors
        for override in overrides:
            _apply_override(values, override, mistakes)
        config = Config.model_validate_json(json.dumps(values, ensure_ascii=False).encode())
    except ValidationError as error:
        overridden = {override.partition("=")[0].strip() for override in overrides}
        for problem in error.errors():
            named = "--set" if ".".join(map(str, problem["loc"][:2])) in overridden else source
            mistakes.append(config_checks.describe_mistake(named, problem, fields))
    except UnicodeEncodeError:
        mistakes.append(f"{source}: a name or value has half of a surrogate pair, which is no character; remove it")
    except RecursionError:
        mistakes.append(f"{source}: not a config: it is nested too deeply; settings are two levels deep")
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(mistakes)))
    return config


def _apply_override(values: dict[str, Any], override: str, mistakes: list[str]) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        mistakes.append(
            f"--set {config_checks.shown(override)}: give section.key=value, for example --set model.depth=12"
        )
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    inner = values.setdefault(section, {})
    if isinstance(inner, dict):
        inner[key] = value


def save_config(config: Config, path: str | Path) -> None:
    """Writes only what differs from the defaults, so that the file can be run again as it is."""
    differences = config.model_dump(mode="json", exclude_defaults=True)
    write_atomically(Path(path), json.dumps(differences, indent=2).encode() + b"\n")
