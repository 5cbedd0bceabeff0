"""The speedrun in one call: data, tokenizer, training, CORE, report, record. A second call continues where it was."""

import importlib.util
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megachat.config import Config, load_config
from megachat.data.shards import check_data_folder, open_shards, shard_hashes, split_shards
from megachat.data.tokenizer import METADATA_FILE, load_origin, load_tokenizer
from megachat.errors import UserError
from megachat.evals.core_bundle import open_bundle
from megachat.files import REPORT_NAME, write_atomically
from megachat.installation import CHECKOUT, config_folder
from megachat.job.local_job import run_launcher
from megachat.planning.plan import resolve_plan
from megachat.prepare.download import HUB_SOURCES, shard_names
from megachat.prepare.tokenizer_training import check_vocabulary
from megachat.studies.record import build_record, core_problems, recipe_of, record_text, shard_problems
from megachat.studies.runs import is_run, load_run
from megachat.text import plural

RECIPES = {"nanochat-run6": "speedrun_run6", "public-2026": "speedrun_public", "megachat": "speedrun"}
SMALL_DEPTH = 8  # models below it are for a CPU, and take row length, batch and horizon from demo.json
_FROM_DEMO = (
    *("model.head_size", "model.sequence_len", "data.streams", "batch.tokens", "batch.micro_rows", "horizon.steps"),
    *("optimizer.scale_to_batch", "optimizer.warmup_steps", "evaluate.every", "evaluate.tokens", "checkpoint.every"),
)
_SMALL = (
    *("precision.fp8=off", "precision.compile=false", "batch.recompute=none"),
    *("model.vocab_size=4096", "evaluate.core_every=0"),
)
TOKENIZER_SHARDS = 8  # of climbmix, as nanochat: more than the 2e9 characters that are read
CLIMBMIX_SHARD_BYTES = 100e6  # of a shard of climbmix, by nanochat's runs/speedrun.sh
RECORD_NAME = "record.md"
Start = Callable[[list[str]], int]  # runs `megachat ARGUMENTS` and returns its exit status


@dataclass(frozen=True)
class Speedrun:
    """What is trained and where. settings: overrides of the recipe's config, for all runs.

    shards: to download, None for a data folder that exists. ranks: of the training, None where a plan names a machine.
    """

    recipe: str
    settings: tuple[str, ...] = ()
    runs: int = 1
    shards: int | None = 170
    ranks: int | None = None

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
        """Returns the overrides of a run, counted from 0; the runs have different seeds."""
        seed = self.config.run.seed + run
        return [*self.settings, f"run.name={self.name}-{run + 1}", f"run.seed={seed}"]

    def folder_of(self, run: int) -> Path:
        """Returns the run folder."""
        return Path(self.config.run.folder) / f"{self.name}-{run + 1}"


def settings_of_depth(recipe: str, depth: int) -> list[str]:
    """Returns the overrides of another depth than the recipe's; of a small one also those that a CPU needs."""
    ngram = load_config(config_folder() / f"{RECIPES[recipe]}.json").ngram
    settings = [f"model.depth={depth}"]
    if ngram.blocks:
        settings.append(f"ngram.blocks={_dumps([block for block in ngram.blocks if block < depth] or [0])}")
    if depth >= SMALL_DEPTH:
        return settings
    demo = load_config(config_folder() / "demo.json").model_dump(mode="json")
    settings += [f"{key}={_dumps(demo[key.partition('.')[0]][key.partition('.')[2]])}" for key in _FROM_DEMO]
    return settings + list(_SMALL) + (["ngram.rows=4096", "ngram.width=null"] if ngram.blocks else [])


def _dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))  # pdsh would split at a blank


@dataclass(frozen=True)
class Stage:
    """One step on the way. done: why it is skipped, "" if it must run. arguments: of the command that does it.

    ranks: whether the command runs on all ranks.
    """

    name: str
    done: str
    arguments: list[str]
    ranks: bool = False


def stages(speedrun: Speedrun) -> Iterator[Stage]:
    """Yields the stages in order, each looked at when the one before it has ended. Raises UserError."""
    config = speedrun.config
    if config.evaluate.core_bundle:
        open_bundle(config.evaluate.core_bundle)  # refused before days of training
    folder, tokenizer = Path(config.data.folder), Path(config.data.tokenizer)
    if config.model.vocab_size is None:
        raise UserError("model.vocab_size is null, but the tokenizer needs a size: leave it as the recipe has it")
    if speedrun.ranks:
        resolve_plan(config, speedrun.ranks, config.model.vocab_size)  # a layout that does not fit is refused now
    if not (tokenizer / METADATA_FILE).exists():
        there = split_shards(open_shards(folder), "train") if speedrun.shards is None else ()
        check_vocabulary(config.model.vocab_size, there)
    if speedrun.shards is None:
        summary = str(check_data_folder(folder))
        if problems := shard_problems(shard_hashes(folder)["shards"]):  # before a training whose record is refused
            raise UserError("\n".join(f"{folder}: {problem}" for problem in problems))
        yield Stage("data", summary, [])
    else:  # the command itself keeps what is complete
        shards = str(speedrun.shards)
        yield Stage("data", "", ["data", "--source", "climbmix", "--shards", shards, "--out", str(folder)])
    done = describe_tokenizer(tokenizer, config) if (tokenizer / METADATA_FILE).exists() else ""
    training = ["tokenizer", "--data", str(folder), "--vocab-size", str(config.model.vocab_size)]
    if speedrun.shards:  # the same tokenizer however many are downloaded
        training += ["--shards", f"0-{min(TOKENIZER_SHARDS, speedrun.shards) - 1}"]
    yield Stage("tokenizer", done, [*training, "--out", str(tokenizer)])
    for run in range(speedrun.runs):
        run_folder = speedrun.folder_of(run)
        chosen = [word for setting in speedrun.settings_of(run) for word in ("--set", setting)]
        pretrain = ["pretrain", "--config", str(speedrun.config_file), *chosen, "--resume", "auto"]
        trained = finished(run_folder, load_config(speedrun.config_file, speedrun.settings_of(run)))
        yield Stage(f"training {run_folder.name}", trained, pretrain, ranks=True)
        bundle = [config.evaluate.core_bundle] if config.evaluate.core_bundle else []
        evaluate = ["evaluate", "--checkpoint", str(run_folder), "--core", *bundle]
        yield Stage(f"CORE of {run_folder.name}", evaluated(run_folder), evaluate, ranks=True)
        yield Stage(f"report of {run_folder.name}", reported(run_folder), ["report", str(run_folder)])


def describe_tokenizer(folder: Path, config: Config) -> str:
    """Returns where a tokenizer comes from. Raises UserError if it has not the recipe's vocabulary."""
    size, origin = load_tokenizer(folder).vocab_size, load_origin(folder)
    if size != config.model.vocab_size:
        raise UserError(f"{folder} has {size} tokens, not {config.model.vocab_size}: give another --tokenizer")
    shards = origin.get("shards")
    return f"{folder} exists, trained on {f'{len(shards)} shards' if shards else 'a whole data folder'}"


def finished(run_folder: Path, config: Config) -> str:
    """Returns that a run is finished, or "". Raises UserError if it was trained with another recipe."""
    run = load_run(run_folder) if is_run(run_folder) else None
    if run is None or run.state != "finished":
        return ""
    trained, wanted = recipe_of(run.config), recipe_of(config.model_dump(mode="json", exclude_defaults=True))
    for key in sorted(trained.keys() | wanted.keys()):
        if trained.get(key) != wanted.get(key):
            raise UserError(
                f"{run_folder} was trained with {key}={_recipe_text(trained, key)}, not "
                f"{_recipe_text(wanted, key)}: give another --set run.folder, or remove that run"
            )
    return f"all {run.plan['steps']} steps are done"


def _recipe_text(recipe: dict, key: str) -> str:
    return json.dumps(recipe[key]) if key in recipe else "its default"


def evaluated(run_folder: Path) -> str:
    """Returns that the last step has a CORE that a record accepts, or ""."""
    return "evaluated" if is_run(run_folder) and not core_problems(load_run(run_folder)) else ""


def reported(run_folder: Path) -> str:
    """Returns that the report is newer than the evaluations or cannot be made, or ""."""
    if importlib.util.find_spec("plotly") is None:
        return "without plotly there is none: pip install 'megachat[report]'"
    report, evaluations = run_folder / REPORT_NAME, list((run_folder / "evaluations").glob("*.json"))
    newest = max((path.stat().st_mtime for path in evaluations), default=0.0)
    return f"{report} exists" if report.exists() and report.stat().st_mtime > newest else ""


def run_speedrun(speedrun: Speedrun, start: Start, start_ranks: Start) -> int:
    """Runs what is not done yet and writes the record; returns the exit status of the first stage that fails, or 0.

    start: runs a command in this process. start_ranks: on all ranks. Raises UserError.
    """
    for stage in stages(speedrun):
        if stage.done:
            print(f"== {stage.name}: {stage.done}", flush=True)
            continue
        print(f"== {stage.name}: megachat {shlex.join(stage.arguments)}", flush=True)
        if status := (start_ranks if stage.ranks else start)(stage.arguments):
            print(f"== {stage.name} ended with status {status}: the same command continues here", flush=True)
            return status
    record = build_record([load_run(speedrun.folder_of(run)) for run in range(speedrun.runs)])
    path = Path(speedrun.config.run.folder) / f"{speedrun.name}.{RECORD_NAME}"
    write_atomically(path, record_text(record, speedrun.name).encode() + b"\n")
    print(f"== record: {path}\n\n{path.read_text(encoding='utf-8')}", end="", flush=True)
    return 0


def describe_speedrun(speedrun: Speedrun, price: float | None = None) -> str:
    """Returns the stages and which of them are done, what is downloaded, and what the plan that follows is about, as
    lines of text. Nothing is started. price: of a GPU-hour, if the plan has one.
    """
    lines = []
    for stage in stages(speedrun):
        command = f"megachat {shlex.join(stage.arguments)}" + (" (on all ranks)" if stage.ranks else "")
        lines.append(f"{stage.name}: {f'done, {stage.done}' if stage.done else command}")
    lines.append(f"record: {speedrun.config.run.folder}/{speedrun.name}.{RECORD_NAME}")
    if speedrun.shards:
        names = shard_names(HUB_SOURCES["climbmix"], speedrun.shards)
        missing = sum(not (Path(speedrun.config.data.folder) / name).exists() for name in names)
        size = f"about {missing * CLIMBMIX_SHARD_BYTES / 1e9:.1f} GB (nanochat's shards have about 100 MB)"
        lines.append(f"download: {plural(missing, 'shard')} of climbmix, {size}; the bundle of CORE, once")
    several = f"; {speedrun.runs} runs take {speedrun.runs} times that" if speedrun.runs > 1 else ""
    lines.append(
        f"the plan is of one run, without CORE, and without data and tokenizer, which are made before{several}"
    )
    if price:
        lines.append(f"its price is in the currency of --price, {price:g} per GPU-hour")
    return "\n".join(lines)


def start_on_hosts(hostfile: Path, arguments: Sequence[str]) -> int:
    """Runs the training of `pretrain --config CONFIG ...` on the hosts of a hostfile; returns its exit status.

    Raises UserError without a clone.
    """
    if CHECKOUT is None:
        raise UserError("--hostfile needs launch/hostfile.sh, which is in a clone of megachat only: use a clone")
    config, *rest = arguments[2:]
    script = CHECKOUT / "launch" / "hostfile.sh"
    return run_launcher(["bash", str(script), str(hostfile.resolve()), config, *rest])
