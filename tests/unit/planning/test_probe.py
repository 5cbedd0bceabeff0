"""Reading a probe, and speeds between and beyond what it measured."""

import json
import math

import pytest

from megachat.config import load_config
from megachat.errors import UserError
from megachat.planning.plan import resolve_plan
from megachat.planning.probe import PROBE_FORMAT, PROBE_VERSION, read_probe
from megachat.planning.step_time import predict_step
from megachat.planning.step_work import AttentionWork, Gemm

RATE = 1e10  # FLOPs per second of every product


def document(**changes) -> dict:
    shapes = [(2048, 256, 256), (2048, 1024, 256), (256, 256, 2048), (512, 256, 256)]

    def measured(ranks: int) -> dict:
        return {
            "ranks": ranks,
            "threads": 1,
            "products": [[*shape, "bfloat16", ranks * 2 * math.prod(shape) / RATE] for shape in shapes],
            "attention": [[4, 512, heads, heads, 128, 512, "bfloat16", 1e-3 * heads, 2e-3 * heads] for heads in (1, 2)],
            "moved": [[1 << 18, 2e-10], [1 << 20, 1e-10]],
            "streamed": 1e-10,
            "logits": [[512, 2e-9], [2048, 1e-9]],
            "polar": [[256, 256, 1e-3], [1024, 256, 4e-3]],
            "collectives": {
                kind: [[1 << 12, 1e-4], [1 << 20, 1e-2]]
                for kind in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send")
                if ranks > 1
            },
        }

    return {
        "format": PROBE_FORMAT,
        "version": PROBE_VERSION,
        "machine": {"device": "a CPU", "device_count": 0, "memory_bytes": 16 * 10**9},
        "config": load_config("configs/d4_cpu.json").model_dump(mode="json"),
        "dtype": "bfloat16",
        "sets": [measured(1), measured(2)],
        "factors": {"passes": 1.0, "optimizer": 1.0},
        "error": 0.08,
        "overlap": 0.0,
    } | changes


def written(tmp_path, **changes):
    path = tmp_path / "probe.json"
    path.write_text(json.dumps(document(**changes)))
    return path


def test_speeds_are_exact_where_measured_and_smooth_between(tmp_path):
    one = read_probe(written(tmp_path)).speeds(1)
    for shape in ((2048, 256, 256), (1024, 384, 256), (4096, 4096, 512)):  # a constant rate stays so
        assert one.product(Gemm(*shape, "bfloat16", 3)) == pytest.approx(3 * 2 * math.prod(shape) / RATE)
    attention = AttentionWork(4, 512, 2, 2, 128, 512, "bfloat16", 1, 1)
    assert one.attention(attention) == pytest.approx(6e-3)
    assert one.attention(attention._replace(forward=2)) == pytest.approx(8e-3)
    assert one.moved(1e6, 1 << 20, 0) == pytest.approx(1e-4)
    assert 1e-4 < one.moved(1e6, 1 << 19, 0) < 2e-4
    assert one.logits(1e6, 512, 0) == pytest.approx(2e-3)
    assert one.polar(256, 1024, "bfloat16") == pytest.approx(4e-3)
    assert read_probe(written(tmp_path)).speeds(2).product(Gemm(512, 256, 256, "bfloat16")) == pytest.approx(
        2 * one.product(Gemm(512, 256, 256, "bfloat16"))
    )


def test_collectives_lie_on_a_line_and_follow_the_ring_for_fewer_ranks(tmp_path):
    two = read_probe(written(tmp_path)).speeds(2)
    assert two.collective("all_reduce", 1 << 12, 2, 1) == pytest.approx(1e-4)
    assert two.collective("all_reduce", 1 << 16, 2, 1) == pytest.approx(1e-3)
    assert two.collective("all_reduce", 1 << 22, 2, 1) == pytest.approx(4e-2)


def test_a_step_is_predicted_with_the_factors_of_the_real_step(tmp_path):
    config = load_config("configs/d4_cpu.json", [])
    plan = resolve_plan(config, 1, 4096)
    plain = predict_step(config, plan, read_probe(written(tmp_path)))
    path = written(tmp_path, factors={"passes": 2.0, "optimizer": 3.0})
    corrected = predict_step(config, plan, read_probe(path))
    assert plain.error == 0.08
    for part, seconds in corrected.parts.items():
        assert seconds == pytest.approx(plain.parts[part] * (3 if part == "optimizer" else 2)), part
    two = predict_step(config, resolve_plan(config, 2, 4096), read_probe(path))
    assert two.parts["data axis"] > 0 and not any(two.hidden.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"version": PROBE_VERSION + 1},
            f"is of probe version {PROBE_VERSION + 1}, but this megachat reads version {PROBE_VERSION}",
        ),
        ({"format": "other"}, "is not a file of `megachat probe`"),
        ({"sets": []}, "is not a file of `megachat probe`"),
        ({"error": None}, "is not a file of `megachat probe`"),
        ({"factors": {"passes": -1.0}}, "a number that is not above 0"),
        ({"sets": [document()["sets"][0] | {"polar": [[256, 256, "x"]]}]}, "is not a file of `megachat probe`"),
    ],
)
def test_another_version_and_another_file_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_probe(written(tmp_path, **changes))


def test_missing_files_and_more_ranks_than_measured_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_probe(tmp_path / "none.json")
    with pytest.raises(UserError, match="measured up to 2 ranks"):
        read_probe(written(tmp_path)).speeds(3)
