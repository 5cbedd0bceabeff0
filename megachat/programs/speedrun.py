"""The speedrun in one call: data, tokenizer, training, CORE, report, record. A second call continues where it was."""

import importlib.util
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megachat.data.shards import check_data_folder
from megachat.data.tokenizer import METADATA_FILE
from megachat.errors import SAVED_STATUS, STOPPED_STATUS, UserError, same_command
from megachat.files import REPORT_NAME, write_atomically
from megachat.installation import CHECKOUT
from megachat.job.local_job import run_launcher
from megachat.planning.plan import resolve_plan
from megachat.prepare.download import HUB_SOURCES, shard_names
from megachat.programs.speedrun_checks import describe_tokenizer, finished, local_bundle, obstacles, unfit_questions
from megachat.programs.speedrun_recipe import Speedrun
from megachat.studies.record import build_record, core_problems, has_partial_core
from megachat.studies.record_text import record_text
from megachat.studies.runs import is_run, load_run
from megachat.text import plural

TOKENIZER_SHARDS = 8  # of climbmix, as nanochat: more than the 2e9 characters that are read
CLIMBMIX_SHARD_BYTES = 100e6  # of a shard of climbmix, by nanochat's runs/speedrun.sh
CLIMBMIX_SHARD_TOKENS = 250e6 / 4.8  # characters of a shard by characters of a token, by older versions of that script
_BY_SIGNAL = (130, STOPPED_STATUS)  # statuses of a launcher that a signal has ended
DRAFT_HINT = "with --draft it trains anyway, and ends with the text of a record that is marked as none"
Start = Callable[[list[str]], int]  # runs `megachat ARGUMENTS` and returns its exit status


@dataclass(frozen=True)
class Stage:
    """One step on the way. done: why it is skipped, "" if it must run. arguments: of the command that does it.

    ranks: whether the command runs on all ranks. left_out: why there is none. run: that is trained.
    """

    name: str
    done: str
    arguments: list[str]
    ranks: bool = False
    left_out: str = ""
    run: Path | None = None


def stages(speedrun: Speedrun) -> Iterator[Stage]:
    """Yields the stages in order, each looked at when the one before it has ended. Raises UserError."""
    config = speedrun.config
    folder, tokenizer = Path(config.data.folder), Path(config.data.tokenizer)
    if speedrun.shards is None:
        yield Stage("data", str(check_data_folder(folder)), [])
    else:  # the command itself keeps what is complete
        download = ["data", "--source", "climbmix", "--shards", str(speedrun.shards), "--out", str(folder)]
        yield Stage("data", "", download + (["--base-url", speedrun.base_url] if speedrun.base_url else []))
    done = describe_tokenizer(tokenizer, config) if (tokenizer / METADATA_FILE).exists() else ""
    training = ["tokenizer", "--data", str(folder), "--vocab-size", str(config.model.vocab_size)]
    if speedrun.shards:  # the same tokenizer however many are downloaded
        training += ["--shards", f"0-{min(TOKENIZER_SHARDS, speedrun.shards) - 1}"]
    yield Stage("tokenizer", done, [*training, "--out", str(tokenizer)])
    for run in range(speedrun.runs):
        run_folder = speedrun.folder_of(run)
        chosen = [word for setting in speedrun.settings_of(run) for word in ("--set", setting)]
        pretrain = ["pretrain", "--config", str(speedrun.config_file), *chosen, "--resume", "auto"]
        trained = finished(run_folder, speedrun.config_of(run))
        yield Stage(f"training {run_folder.name}", trained, pretrain, ranks=True, run=run_folder)
        bundle = [config.evaluate.core_bundle] if config.evaluate.core_bundle else []
        evaluate = ["evaluate", "--checkpoint", str(run_folder), "--core", *bundle]
        evaluate += [] if speedrun.max_per_task == -1 else ["--max-per-task", str(speedrun.max_per_task)]
        yield Stage(f"CORE of {run_folder.name}", evaluated(run_folder, speedrun), evaluate, ranks=True)
        missing = importlib.util.find_spec("plotly") is None
        left_out = "left out, it needs plotly: pip install 'megachat[report]'" if missing else ""
        report = ["report", str(run_folder)]
        yield Stage(f"report of {run_folder.name}", reported(run_folder), report, left_out=left_out)


def evaluated(run_folder: Path, speedrun: Speedrun) -> str:
    """Returns that the last step has a CORE that a record accepts, or that the draft requests, or ""."""
    if not is_run(run_folder):
        return ""
    run = load_run(run_folder)
    if not core_problems(run):
        return "evaluated"
    bundle = local_bundle(speedrun.config)
    partial = speedrun.draft and bundle and has_partial_core(run, speedrun.max_per_task, bundle.digest)
    return "evaluated for a draft" if partial else ""


def reported(run_folder: Path) -> str:
    """Returns that the report is newer than the evaluations, or ""."""
    report, evaluations = run_folder / REPORT_NAME, list((run_folder / "evaluations").glob("*.json"))
    newest = max((path.stat().st_mtime for path in evaluations), default=0.0)
    return f"{report} exists" if report.exists() and report.stat().st_mtime > newest else ""


def run_speedrun(speedrun: Speedrun, start: Start, start_ranks: Start) -> int:
    """Runs what is not done yet and writes the record; returns the exit status of the first stage that fails, or 0.

    start: runs a command in this process. start_ranks: on all ranks. Raises UserError.
    """
    known, ready = obstacles(speedrun), False
    _report_obstacles(known, speedrun)
    for stage in stages(speedrun):
        if skipped := stage.done or stage.left_out:
            print(f"== {stage.name}: {skipped}", flush=True)
            continue
        if stage.ranks and not ready:  # the tokenizer is there: before hours of training
            _report_obstacles([problem for problem in unfit_questions(speedrun) if problem not in known], speedrun)
            ready = True
        print(f"== {stage.name}: megachat {shlex.join(stage.arguments)}", flush=True)
        if status := (start_ranks if stage.ranks else start)(stage.arguments):
            status = SAVED_STATUS if status in _BY_SIGNAL and stage.run and _is_saved(stage.run) else status
            print(f"== {stage.name} ended with status {status}: {same_command('speedrun')} continues here", flush=True)
            return status
    record = build_record([load_run(speedrun.folder_of(run)) for run in range(speedrun.runs)], draft=speedrun.draft)
    path = speedrun.text_file(draft=bool(record["problems"]))
    write_atomically(path, record_text(record, speedrun.name).encode() + b"\n")
    kind = "draft, which is no record" if record["problems"] else "record"
    print(f"== {kind}: {path}\n\n{path.read_text(encoding='utf-8')}", end="", flush=True)
    return 0


def _is_saved(run_folder: Path) -> bool:
    """Returns whether a run that a signal has ended has saved its last step: the launcher's status does not say it."""
    return is_run(run_folder) and load_run(run_folder).state == "stopped"


def _report_obstacles(problems: list[str], speedrun: Speedrun) -> None:
    """Prints what a record will refuse, before a draft. Raises UserError where a record is requested."""
    lines = [f"no record can come of this: {problem}" for problem in problems]
    if lines and not speedrun.draft:
        raise UserError("\n".join([*lines, DRAFT_HINT]))
    for line in lines:
        print(f"== {line}", flush=True)


def describe_speedrun(speedrun: Speedrun, problems: Sequence[str] = (), price: float | None = None) -> str:
    """Returns the stages and which of them are done, what is downloaded, and what the plan that follows is about, as
    lines of text. Nothing is started. problems: `obstacles`. price: of a GPU-hour, if the plan has one.
    """
    lines = []
    for stage in stages(speedrun):
        command = f"megachat {shlex.join(stage.arguments)}" + (" (on all ranks)" if stage.ranks else "")
        lines.append(f"{stage.name}: {f'done, {stage.done}' if stage.done else stage.left_out or command}")
    lines += [f"no record can come of this: {problem}" for problem in problems]
    if speedrun.draft or not problems:
        lines.append(f"{'draft' if problems else 'record'}: {speedrun.text_file(draft=bool(problems))}")
    else:
        lines.append(f"so nothing would be started; {DRAFT_HINT}")
    if speedrun.shards:
        names = shard_names(HUB_SOURCES["climbmix"], speedrun.shards)
        missing = sum(not (Path(speedrun.config.data.folder) / name).exists() for name in names)
        size = f"about {missing * CLIMBMIX_SHARD_BYTES / 1e9:.1f} GB (nanochat's shards have about 100 MB)"
        lines.append(f"download: {plural(missing, 'shard')} of climbmix, {size}; the bundle of CORE, once")
        lines += _passes(speedrun)
    several = f"; {speedrun.runs} runs take {speedrun.runs} times that" if speedrun.runs > 1 else ""
    lines.append(
        f"the plan is of one run, without CORE, and without data and tokenizer, which are made before{several}"
    )
    if price:
        lines.append(f"its price is in the currency of --price, {price:g} per GPU-hour")
    return "\n".join(lines)


def _passes(speedrun: Speedrun) -> list[str]:
    """Returns a line with the passes over the text, if it is too short for one."""
    config, shards = speedrun.config, speedrun.shards
    assert shards and config.model.vocab_size  # checked before
    ranks = config.parallel.tensor * config.parallel.pipeline  # they do not change the tokens
    plan = resolve_plan(config, speedrun.ranks or ranks, config.model.vocab_size)
    there = shards * CLIMBMIX_SHARD_TOKENS
    if plan.total_tokens <= there:
        return []
    return [
        f"text: {plural(shards, 'shard')} have about {there / 1e9:.1f} billion tokens, and the plan takes "
        f"{plan.total_tokens / 1e9:.1f}: at least {plan.total_tokens / there:.1f} passes over the same text; give more "
        "--shards to avoid that"
    ]


def start_on_hosts(hostfile: Path, arguments: Sequence[str]) -> int:
    """Runs the training of `pretrain --config CONFIG ...` on the hosts of a hostfile; returns its exit status.

    Raises UserError without a clone.
    """
    if CHECKOUT is None:
        raise UserError("--hostfile needs launch/hostfile.sh, which is in a clone of megachat only: use a clone")
    config, *rest = arguments[2:]
    script = CHECKOUT / "launch" / "hostfile.sh"
    return run_launcher(["bash", str(script), str(hostfile.resolve()), config, *rest])
