"""The recipes of the speedrun, and what one call of it trains and where."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megachat.config import Config, load_config
from megachat.installation import config_folder

RECIPES = {"nanochat-run6": "speedrun_run6", "public-2026": "speedrun_public", "megachat": "speedrun"}
SMALL_DEPTH = 8  # models below it are for a CPU, and take row length, batch and horizon from demo.json
_FROM_DEMO = (
    *("model.head_size", "model.sequence_len", "data.streams", "batch.tokens", "batch.micro_rows", "horizon.steps"),
    *("optimizer.scale_to_batch", "optimizer.warmup_steps", "evaluate.every", "evaluate.tokens", "checkpoint.every"),
)
_SMALL = (
    *("precision.fp8=off", "precision.compile=false", "batch.recompute=none"),
    *("model.vocab_size=4096", "evaluate.core_every=0", "evaluate.core_unfit=leave_out"),  # its rows are short
)
RECORD_NAME, DRAFT_NAME = "record.md", "draft.md"


@dataclass(frozen=True)
class Speedrun:
    """What is trained and where. settings: overrides of the recipe's config, for all runs.

    shards: to download, None for a data folder that exists. ranks: of the training, None where a plan names a machine.
    base_url: a mirror of the shards.

    draft: whether a draft is enough where no record can come of the runs. max_per_task: CORE's examples per task, -1
    for all.
    """

    recipe: str
    settings: tuple[str, ...] = ()
    runs: int = 1
    shards: int | None = 170
    ranks: int | None = None
    base_url: str | None = None
    draft: bool = False
    max_per_task: int = -1

    @property
    def config_file(self) -> Path:
        return config_folder() / f"{RECIPES[self.recipe]}.json"

    @property
    def name(self) -> str:
        """The record's name: of the recipe, and of the depth if that is another."""
        depth, recipe_depth = (config.model.depth for config in (self.config, load_config(self.config_file)))
        return f"speedrun-{self.recipe}" + (f"-d{depth}" if depth != recipe_depth else "")

    @property
    def config(self) -> Config:
        return load_config(self.config_file, self.settings)

    def settings_of(self, run: int) -> list[str]:
        """Returns the overrides of a run, counted from 0, each key once; the runs have different seeds."""
        seed = self.config.run.seed + run
        settings = [*self.settings, f"run.name={self.name}-{run + 1}", f"run.seed={seed}"]
        return list({setting.partition("=")[0].strip(): setting for setting in settings}.values())

    def config_of(self, run: int) -> Config:
        """Returns the config of a run."""
        return load_config(self.config_file, self.settings_of(run))

    def text_file(self, *, draft: bool) -> Path:
        """Returns the file of the record, or of the draft."""
        return Path(self.config.run.folder) / f"{self.name}.{DRAFT_NAME if draft else RECORD_NAME}"

    def folder_of(self, run: int) -> Path:
        """Returns the run folder."""
        return Path(self.config.run.folder) / f"{self.name}-{run + 1}"


def settings_of_depth(recipe: str, depth: int, chosen: Sequence[str] = ()) -> list[str]:
    """Returns the overrides of another depth than the recipe's; of a small one also those that a CPU needs.

    chosen: overrides that follow them. The warm-up of a small depth ends before the warm-down of these begins.
    """
    path = config_folder() / f"{RECIPES[recipe]}.json"
    ngram = load_config(path).ngram
    settings = [f"model.depth={depth}"]
    if ngram.blocks:
        settings.append(f"ngram.blocks={_dumps([block for block in ngram.blocks if block < depth] or [0])}")
    if depth >= SMALL_DEPTH:
        return settings
    demo = load_config(config_folder() / "demo.json").model_dump(mode="json")
    settings += [f"{key}={_dumps(demo[key.partition('.')[0]][key.partition('.')[2]])}" for key in _FROM_DEMO]
    settings += [*_SMALL, *(["ngram.rows=4096", "ngram.width=null"] if ngram.blocks else [])]
    config = load_config(path, [*settings, *chosen])
    steps, optimizer = config.horizon.steps or demo["horizon"]["steps"], config.optimizer
    most = steps - round(optimizer.warmdown_ratio * steps)
    return settings + ([f"optimizer.warmup_steps={most}"] if most < demo["optimizer"]["warmup_steps"] else [])


def _dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))  # pdsh would split at a blank
