"""--dry-run tells what would be done, and the owners it names are those of the real optimizers."""

import re

import pytest

from megachat.optim.groups import assign_groups
from megachat.place import place_of
from megachat.planning.manifest import ownership
from megachat.planning.plan import resolve_plan
from megachat.train.step import set_schedules
from tests.harness import run_ranks
from tests.runs.forked import run_forked
from tests.runs.job import command
from tests.training import SMALL_VOCAB, build, small_config


def dry_run(place, *arguments):
    done = run_forked(command(place, "dry", "--dry-run", *arguments))
    assert (done.status, done.err) == (0, "")
    assert not (place.runs / "dry").exists()
    return done.out


def test_a_dry_run_prints_config_plan_owners_and_memory(place):
    out = dry_run(place, "--set", "optimizer.matrix_lr=0.03", "--verbose")
    verdict, config, plan, owners = out.split("\n\n")
    first, no_time, memory, *checks = verdict.splitlines()
    assert no_time.startswith(
        "time and price: not predicted, because the speed of 1 rank on this machine is not known;"
    )
    assert first.startswith("needs ") and first.endswith(" MB per rank; no problem on this machine")
    assert [line.split(":")[0] for line in checks] == [
        f"ok      {name}" for name in ("data folder", "tokenizer", "trackers", "disk", "port", "CORE bundle")
    ]
    assert re.fullmatch(
        r"estimated memory per rank: [\d.]+ MB \(weights 0\.2 MB, .*, workspace [\d.]+ MB\); computed in float32",
        memory,
    )
    assert (
        "* optimizer.matrix_lr = 0.03" in config
        and "  optimizer.embedding_lr = 0.3" in config
        and "* model.depth = 2" in config
    )
    assert "layout = data 1 x tensor 1 x pipeline 1" in plan
    assert "width = 32   [depth * aspect_ratio up to whole heads = 2 * 16 up to a multiple of 16]" in plan
    assert "accumulation = 6   [rows_per_step / (micro_rows * ranks)]" in plan
    assert "rates.matrix = 0.03   [matrix_lr * 1 (optimizer.scale_to_batch is off)" in plan
    assert "parameters.total = 55,350" in plan
    lines = owners.splitlines()
    assert lines[1].split() == [
        "parameter",
        "shape",
        "optimizer",
        "stage",
        "cut",
        "state",
        "on",
        "ranks",
        "owner",
        "lr",
        "decay",
    ]
    assert lines[-1] == "13 matrices on Muon, 8 tensors on AdamW" and len(lines) == 2 + 21 + 1
    (row,) = [line.split() for line in lines if line.startswith("transformer.h.1.mlp.c_fc.weight")]
    assert row[1:] == ["128x32", "muon", "0", "whole", "0", "0", "0.06", "0.28"]


def test_a_dry_run_plans_for_any_number_of_ranks(place):
    out = dry_run(
        place,
        "--world",
        "3",
        "--set",
        f"data.folder={place.data / 'none'}",
        "--set",
        "model.vocab_size=265",
        "--verbose",
    )
    assert "fp8" not in out.split("config (*")[0]
    assert "; 1 problem on this machine" in out and f"PROBLEM data folder: the data folder {place.data}" in out
    assert "layout = data 3 x tensor 1 x pipeline 1" in out and "accumulation = 2 " in out
    owners = [re.split(r"  +", line) for line in out.splitlines() if re.search(r" (muon|adamw) ", line)]
    assert {row[6] for row in owners if row[2] == "muon"} == {"0", "1", "2"}, "all ranks own some matrices"
    assert all(row[6] == "-" for row in owners if row[2] == "adamw")


def test_a_dry_run_lists_the_matrices_in_fp8(place):
    settings = ("model.aspect_ratio=128", "model.head_size=128", "precision.fp8=tensorwise", "precision.fp8_head=false")
    options = [part for setting in settings for part in ("--set", setting)]
    out = dry_run(place, *options, "--set", "precision.compute=bfloat16", "--memory-gb", "80")
    assert "\nfp8 tensorwise for attn.c_q, attn.c_k, attn.c_v, attn.c_proj, mlp.c_fc, mlp.c_proj in training; " in out
    assert "not for lm_head: precision.fp8_head is false" in out


def held(config):
    """Each rank's AdamW state as name -> (rate, decay), names of its masters and of the matrices that it
    orthogonalizes, and every name's group.
    """
    training = build(config, SMALL_VOCAB)
    set_schedules(training, 5)  # after the warm-up and before the decay the multiplier is 1
    zero = training.engine.adamw
    groups = {
        place_of(parameter).name: group
        for group, flat in zip(zero.param_groups, zero.bit16_groups, strict=True)
        for parameter in flat
    }
    mine = {
        place_of(parameter).name: (
            groups[place_of(parameter).name]["lr"],
            groups[place_of(parameter).name]["weight_decay"],
        )
        for parameter, _, _, _ in zero.fragments()
    }
    moments = {name for kind, name, _, pieces in training.muon.state_shards() if kind == "second_moment" and pieces}
    masters = {name for kind, name, _, pieces in training.muon.state_shards() if kind == "master" and pieces}
    return mine, masters, moments, assign_groups(place_of(p) for p in training.layers.parameters())


@pytest.mark.parametrize(
    ("world", "parallel"), [(2, {}), (3, {}), (4, {"tensor": 2, "pipeline": 2}), (8, {"tensor": 2, "pipeline": 2})]
)
def test_the_owners_are_those_of_the_running_optimizers(world, parallel):
    model = {"aspect_ratio": 32, "head_size": 16, "kv_heads": 2}
    config = small_config(
        model=model, optimizer={"muon_multiplier": "flipped"}, parallel=parallel, batch={"tokens": 160 * 12}
    )
    ranks = run_ranks(held, world, config)
    groups = {name: group for *_, parameters in ranks for name, group in parameters.items()}
    lines = ownership(config, resolve_plan(config, world, SMALL_VOCAB))
    assert {line.name for line in lines} == set(groups) and len(lines) == len(groups)
    for line in lines:
        assert line.optimizer == groups[line.name].optimizer
        if line.optimizer == "muon":
            assert line.state_ranks == tuple(
                rank for rank, (_, masters, _, _) in enumerate(ranks) if line.name in masters
            ), line.name
            assert [line.owner] == [rank for rank, (_, _, moments, _) in enumerate(ranks) if line.name in moments], (
                line.name
            )
        else:
            assert line.state_ranks == tuple(rank for rank, (adamw, *_) in enumerate(ranks) if line.name in adamw), (
                line.name
            )
            assert {(line.lr, line.decay)} == {adamw[line.name] for adamw, *_ in ranks if line.name in adamw}, line.name
    assert len({len(line.state_ranks) for line in lines}) > 1 or world == 4  # two data ranks share some and not others
