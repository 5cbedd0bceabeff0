"""Writes docs/configuration.md and configs/schema.json from the declarations of the settings.

    python tools/config_docs.py

A test compares both files with what this writes.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a clone that was not installed

from megachat.config import Config, config_from_values  # noqa: E402
from megachat.errors import user_errors_end_the_program  # noqa: E402
from megachat.planning.key_docs import describe_key  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
SCHEMA = ROOT / "configs" / "schema.json"
LONGEST_DEFAULT = 40  # characters of a default that are shown
MEMORY = "estimated memory"
MEMORY_SECTIONS = ("model", "lookup", "ngram", "batch", "optimizer", "precision", "parallel")  # what memory.py reads
WORLD, VOCABULARY = 8, 4096
# Small runs in which each key has its effect. Depth 4, because many rules are neutral at their reference depth 12.
SMALL = {"depth": 4, "sequence_len": 512}
RUNS: tuple[dict[str, dict[str, Any]], ...] = (
    {"model": SMALL},
    {"model": SMALL, "precision": {"fp8": "tensorwise"}, "parallel": {"pipeline": 2}},
    {
        "model": SMALL | {"vocab_size": VOCABULARY, "norm_scales": ["mlp"]},
        "lookup": {"after_blocks": [1]},
        "ngram": {"blocks": [2]},
        "parallel": {"tensor": 2},
    },
)
INTRODUCTION = """\
<!-- Written by tools/config_docs.py from megachat/settings/: change it there. -->

# Configuration

A config is a JSON file with what differs from the defaults: `{"model": {"depth": 20}, "horizon": {"ratio": 8}}`. Every
key is in a section, and unknown keys are refused. `--set model.depth=20` overrides a key on the command line; its value
is JSON, or else a text, and `null` takes back what a file sets. [The configs of megachat](../configs/README.md) are
examples.

Nearly all numbers of a run follow from few keys. Each key lists the numbers of the plan that it can move, as
`megachat plan` prints them with their formulas. It is measured: plans of small runs are resolved with other values of
each key. `estimated memory` is that of the fullest rank. `name.*` stands for several numbers. A key without numbers
changes how the run computes, reads, saves or logs, but not its plan.

## Editors

[configs/schema.json](../configs/schema.json) has all keys with their types, ranges and meanings. Editors that know
JSON schemas complete and check a config that names it; megachat ignores this line:

    {"$schema": "schema.json", "model": {"depth": 20}}

The path is relative to the config. An installed package has the file in the folder `megachat/configs`. In VS Code, all
files of a folder get the schema without that line by this part of `.vscode/settings.json`:

    "json.schemas": [
      {
        "fileMatch": ["configs/*.json", "runs/*/config.json"],
        "url": "./configs/schema.json"
      }
    ]
"""


def moved_numbers(key: str, *, memory: bool = True) -> list[str]:
    """Returns the numbers of the plan that change in a small run when the key gets other values, and MEMORY.

    The names are those of `megachat explain`; several with the same prefix are shortened to `prefix.*`. memory: also
    compare the estimated memory.
    """
    from megachat.planning.influence import influenced, numbers_of

    memory = memory and key.partition(".")[0] in MEMORY_SECTIONS
    numbers = partial(numbers_of, world=WORLD, vocab_size=VOCABULARY, memory=memory)
    names = {name for run in RUNS for name in influenced(config_from_values(run, "a small run"), key, numbers)}
    parts = [name.partition(".")[0] for name in names if "." in name]
    short = {f"{part}.*" if parts.count(part := name.partition(".")[0]) > 2 else name for name in names}
    return sorted({MEMORY if name.startswith("memory.") else name for name in short})


def configuration_page(moved: Callable[[str], list[str]] = moved_numbers) -> str:
    """Returns the text of docs/configuration.md. moved: key -> the numbers of the plan that it moves."""
    parts = [INTRODUCTION]
    for name, section in Config():
        parts.append(f"## {name}\n\n{type(section).__doc__}\n")
        parts += [_entry(f"{name}.{key}", moved) for key in type(section).model_fields]
    return "\n".join(parts)


def _entry(key: str, moved: Callable[[str], list[str]]) -> str:
    description = describe_key(key)
    default = description.default
    if len(default) > LONGEST_DEFAULT:
        default = default[: default.index(",")] + ", ...]"
    values = f"{description.kind}, {description.allowed}".removesuffix(", ")
    lines = [f"### {key}\n", f"{description.meaning}\n", f"- default: `{default}`", f"- values: {values}"]
    if numbers := ", ".join(moved(key)).replace("*", r"\*"):
        lines.append(f"- moves: {numbers}")
    return "\n".join(lines) + "\n"


def config_schema() -> dict[str, Any]:
    """Returns the JSON schema of config files."""
    schema = Config.model_json_schema()
    properties = {name: {"$ref": section["$ref"]} for name, section in schema["properties"].items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "config of megachat",
        "type": "object",
        "additionalProperties": False,
        "properties": {"$schema": {"type": "string"}} | properties,
        "$defs": schema["$defs"],
    }


@user_errors_end_the_program()
def main(arguments: list[str] | None = None) -> None:
    """Writes both files."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    SCHEMA.write_text(json.dumps(config_schema(), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(configuration_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
