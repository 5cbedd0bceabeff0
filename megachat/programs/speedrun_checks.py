"""What is known before the training of a speedrun: mistakes, and reasons for which a record will refuse its runs."""

import json
from collections.abc import Sequence
from pathlib import Path

from megachat.config import Config
from megachat.data.shards import check_data_folder, open_shards, shard_hashes, split_shards
from megachat.data.tokenizer import METADATA_FILE, load_origin, load_tokenizer
from megachat.errors import UserError
from megachat.evals.core_bundle import Bundle, check_max_per_task, describe_bundle, open_bundle
from megachat.evals.core_download import BUNDLE_PATH
from megachat.evals.core_prompts import check_questions, row_limit
from megachat.installation import git
from megachat.planning.plan import resolve_plan
from megachat.planning.sizes import resolve_dimensions
from megachat.prepare.tokenizer_training import check_vocabulary
from megachat.programs.speedrun_recipe import Speedrun
from megachat.studies.record import bundle_problem, core_problems, horizon_problem, recipe_of, shard_problems
from megachat.studies.runs import is_run, load_run, newest_start


def local_bundle(config: Config) -> Bundle | None:
    """Returns the bundle of CORE, None for nanochat's before its download."""
    path = config.evaluate.core_bundle
    return open_bundle(path) if path or BUNDLE_PATH.exists() else None


def obstacles(speedrun: Speedrun) -> list[str]:
    """Returns one sentence for each reason, known before anything starts, for which a record will refuse the runs.

    Raises UserError for what can neither be trained nor shown in a draft: before hours of training.
    """
    config, folders = speedrun.config, [speedrun.folder_of(run) for run in range(speedrun.runs)]
    _check_training(speedrun)
    bundle = local_bundle(config)
    done = [finished(folder, speedrun.config_of(run)) for run, folder in enumerate(folders)]
    if all(done) and not any(core_problems(load_run(folder)) for folder in folders):
        return []
    problems = _bundle_obstacles(speedrun, bundle)
    if config.evaluate.core_crop:
        problems.append("evaluate.core_crop is true, but a record has uncropped prompts: leave it out")
    if all(done):
        return problems
    if speedrun.shards is None:
        shards = shard_hashes(Path(config.data.folder))["shards"]
        problems += [f"{config.data.folder}: {problem}" for problem in shard_problems(shards)]
    if (Path(config.data.tokenizer) / METADATA_FILE).exists() and bundle:
        problems += unfit_questions(speedrun)
    return problems + _start_obstacles(speedrun, folders)


def _check_training(speedrun: Speedrun) -> None:
    """Raises UserError for a training that cannot start, or whose steps are too few for any time."""
    config = speedrun.config
    folder, tokenizer, vocab_size = Path(config.data.folder), Path(config.data.tokenizer), config.model.vocab_size
    if vocab_size is None:
        raise UserError("model.vocab_size is null, but the tokenizer needs a size: leave it as the recipe has it")
    ranks = speedrun.ranks or config.parallel.tensor * config.parallel.pipeline  # of a plan: they do not change steps
    plan = resolve_plan(config, ranks, vocab_size)
    if problem := horizon_problem(plan.steps):
        raise UserError(f"this recipe {problem}")
    if plan.stop_step < plan.steps:
        raise UserError(
            f"horizon.stop_step is {plan.stop_step}, before the last of {plan.steps} steps, and only a whole run has a "
            "time: leave it out"
        )
    if (tokenizer / METADATA_FILE).exists():
        describe_tokenizer(tokenizer, config)
    else:
        there = split_shards(open_shards(folder), "train") if speedrun.shards is None else ()
        check_vocabulary(vocab_size, there)
    if speedrun.shards is None:
        check_data_folder(folder)


def _bundle_obstacles(speedrun: Speedrun, bundle: Bundle | None) -> list[str]:
    evaluate, limit, problems = speedrun.config.evaluate, speedrun.max_per_task, []
    if limit != -1:
        problems.append(f"--max-per-task is {limit}, but a record has all examples of CORE: leave it out")
    if bundle:
        check_max_per_task(bundle, limit, "--max-per-task")
        if problem := bundle_problem(bundle):
            problems.append(f"{evaluate.core_bundle or BUNDLE_PATH}: {problem}")
    return problems


def _start_obstacles(speedrun: Speedrun, folders: Sequence[Path]) -> list[str]:
    """Returns what differs between the runs that have started and what would be trained now."""
    commit, problems = git("rev-parse", "HEAD"), []
    if not commit:
        problems.append("megachat is used without a git repository, but a record has a commit: use a clone with git")
    for folder in folders:
        start = newest_start(folder)
        then, world = start.get("commit"), start.get("launch", {}).get("world_size")
        fix = "or remove that run"
        if commit and then and then != commit:
            problems.append(f"{folder} was trained with commit {then[:12]}, now it is {commit[:12]}: go back, {fix}")
        if speedrun.ranks and world and world != speedrun.ranks:
            problems.append(f"{folder} was trained on {world} ranks, now on {speedrun.ranks}: take {world}, {fix}")
    return problems


def unfit_questions(speedrun: Speedrun) -> list[str]:
    """Returns that some of CORE's questions do not fit the model; downloads the bundle if it is not there.

    Takes seconds. Raises UserError if they are not to be left out (evaluate.core_unfit).
    """
    config = speedrun.config
    tokenizer = load_tokenizer(config.data.tokenizer)
    limit = row_limit(resolve_dimensions(config, tokenizer.vocab_size), config.evaluate)
    bundle = open_bundle(config.evaluate.core_bundle)
    counts = check_questions(bundle, tokenizer, limit, speedrun.max_per_task)
    if not counts:
        return []
    listed = ", ".join(f"{label} {count:,}" for label, count in counts.items())
    return [
        f"{sum(counts.values()):,} questions of CORE do not fit the model's {limit.tokens:,} tokens ({listed}), and a "
        "record needs all: raise model.sequence_len"
    ]


def made_by_stages(speedrun: Speedrun) -> dict[str, str]:
    """Returns what a plan of the training says in place of checks that the stages before and after it answer."""
    config, made = speedrun.config, dict[str, str]()
    if speedrun.shards:
        made["data folder"] = f"{config.data.folder}, downloaded by the stage before"
    if not (Path(config.data.tokenizer) / METADATA_FILE).exists():
        made["tokenizer"] = f"{config.data.tokenizer}, trained by the stage before, {config.model.vocab_size:,} tokens"
    bundle = local_bundle(config)
    made["CORE bundle"] = describe_bundle(bundle) if bundle else f"downloaded to {BUNDLE_PATH} before the training"
    return made


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
