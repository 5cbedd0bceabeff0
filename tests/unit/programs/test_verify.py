"""The comparison behind tools/verify.py: what counts as equal, what is named first, and what cannot be compared."""

import json

import pytest
import torch

from megachat.checkpoint.storage import save_rectangles
from megachat.config import Config
from megachat.convert.architecture import weight_shapes
from megachat.errors import UserError
from megachat.parallel.mesh import Axis
from megachat.planning.plan import resolve_plan
from megachat.planning.sizes import resolve_dimensions
from megachat.programs.verify_layout import certificate, compare_runs, verification_config
from megachat.programs.verify_resume import resume_config
from megachat.settings import BatchConfig
from tests.training import SMALL_VOCAB, small_config

ORDER, KINDS = ["first", "second"], ("gradient", "weight", "update")
ALONE = Axis("world", 1, 0, None, (0,))


def observed(folder, losses, **changes):
    """A run's folder; changes: tensor name -> elements to add to its front. The update of every weight is 0.01."""
    for step, loss in enumerate(losses):
        (folder / str(step)).mkdir(parents=True)
        tensors = {
            f"{kind}/{name}": torch.linspace(-1, 1, 4000).view(40, 100).clone() for kind in KINDS for name in ORDER
        }
        for name in ORDER:
            tensors[f"update/{name}"].fill_(0.01)
        for name, values in changes.items():
            tensors[name.replace("__", "/")].view(-1)[: len(values)] += torch.tensor(values)
        pieces = {name: ((40, 100), [((0, 0), (40, 100), tensor)]) for name, tensor in tensors.items()}
        save_rectangles(folder / str(step), pieces, ALONE)
        numbers = {"loss": loss, "norm": 3.0, "decay": 0.005}
        (folder / str(step) / "numbers.json").write_text(json.dumps(numbers))
    return folder


def verdict(tmp_path, losses, **changes) -> dict:
    wanted = observed(tmp_path / "wanted", [7.0, 6.0])
    return certificate(
        list(compare_runs(observed(tmp_path / "found", losses, **changes), wanted, ORDER)), layout={"tensor": 2}
    )


def test_rounding_is_equal_and_every_tensor_is_listed(tmp_path):
    report = verdict(tmp_path, [7.0 * (1 + 5e-7), 6.0], gradient__first=[5e-6], weight__second=[9e-7])
    assert report["passed"] and report["first_difference"] is None and report["layout"] == {"tensor": 2}
    assert [entry["name"] for entry in report["compared"]] == [
        name
        for step in (0, 1)
        for name in (
            f"loss/step {step}",
            f"gradient/first, step {step}",
            f"gradient/second, step {step}",
            f"norm/step {step}",
            f"weight/first, step {step}",
            f"weight/second, step {step}",
        )
    ]
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize(
    ("losses", "changes", "first"),
    [
        ([7.0, 6.00002], {}, "loss/step 1"),
        ([7.0, float("nan")], {}, "loss/step 1"),
        ([7.0, 6.0], {"gradient__second": [2e-5], "weight__first": [1.0] * 9}, "gradient/second, step 0"),
        ([7.0, 6.0], {"weight__first": [2e-5]}, "weight/first, step 0"),
        ([7.0, 6.0], {"weight__second": [float("nan")]}, "weight/second, step 0"),
    ],
)
def test_the_first_difference_is_named(tmp_path, losses, changes, first):
    report = verdict(tmp_path, losses, **changes)
    assert not report["passed"] and report["first_difference"]["name"] == first


def test_a_weight_may_lack_its_decay_only_where_a_run_did_not_move_it(tmp_path):
    """The first weight is -1, its update 0.01: without it and with the decay, it is 0.005 apart."""
    assert verdict(tmp_path / "a", [7.0, 6.0], weight__first=[0.004], update__first=[-0.01])["passed"]
    assert not verdict(tmp_path / "b", [7.0, 6.0], weight__first=[0.004], update__first=[0.004])["passed"]
    assert not verdict(tmp_path / "c", [7.0, 6.0], weight__first=[0.006], update__first=[-0.01])["passed"]


def test_runs_with_other_tensors_cannot_be_compared(tmp_path):
    with pytest.raises(UserError, match="gradient/third is not in both"):
        list(
            compare_runs(observed(tmp_path / "a", [1.0, 1.0]), observed(tmp_path / "b", [1.0, 1.0]), [*ORDER, "third"])
        )


def test_the_order_is_the_models():
    names = list(weight_shapes(resolve_plan(small_config(), 1, SMALL_VOCAB).dims))
    assert (
        names[0] == "transformer.wte.weight"
        or names[0].startswith("smear")
        and names[-1] in ("lm_head.weight", "backout_lambda")
    )
    assert names.index("transformer.h.0.attn.c_q.weight") < names.index("transformer.h.2.mlp.c_proj.weight") and len(
        set(names)
    ) == len(names)


def test_a_config_is_scaled_down_and_runs_in_float32_with_equal_micro_batches():
    config = Config.model_validate({"model": {"depth": 24, "kv_heads": 3}, "parallel": {"sequence": True, "tensor": 4}})
    reduced = verification_config(config, data=2, tensor=2, pipeline=2, depth=4, rows_per_rank=6)
    assert (reduced.model.depth, reduced.model.kv_heads, reduced.precision.compute) == (4, 3, "float32")
    assert (reduced.parallel.tensor, reduced.parallel.pipeline, reduced.parallel.sequence) == (2, 2, True)
    assert (reduced.batch.micro_rows, reduced.batch.accumulation) == (1, 6)
    recomputed = config.model_copy(update={"batch": BatchConfig(recompute="block", tokens=4096)})
    reduced = verification_config(recomputed, data=2, tensor=1, pipeline=1, depth=4, rows_per_rank=6)
    assert (reduced.batch.recompute, reduced.batch.tokens) == ("block", None)
    resumed = resume_config(recomputed, reduced, 4, {"data": 1, "tensor": 1, "pipeline": 1}, exact=False)
    assert (resumed.batch.recompute, resumed.batch.tokens) == ("block", 4 * 2048)
    assert not verification_config(config, data=1, tensor=1, pipeline=1, depth=None, rows_per_rank=6).parallel.sequence


@pytest.mark.parametrize(
    "full",
    [
        {"depth": 4},
        {"depth": 24},
        {"depth": 32, "kv_heads": 4},
        {"depth": 64, "head_size": 64},
        {"depth": 5, "aspect_ratio": 48},
    ],
)
def test_scaled_down_the_heads_stay_so_that_the_tensor_axis_fits(full):
    config = Config.model_validate({"model": full})
    whole = resolve_dimensions(config, SMALL_VOCAB)
    for depth in (1, 2, 3, 7, 20):
        reduced = resolve_dimensions(
            verification_config(config, data=1, tensor=1, pipeline=1, depth=depth, rows_per_rank=1), SMALL_VOCAB
        )
        assert (reduced.depth, reduced.heads, reduced.kv_heads) == (
            depth,
            whole.heads,
            whole.kv_heads,
        ) and reduced.width == reduced.heads * reduced.head_size
        assert reduced.width <= whole.width or depth > whole.depth


def test_absurd_sizes_on_the_command_line_are_one_sentence():
    for sizes in ({"depth": 10**30, "rows_per_rank": 1}, {"depth": 4, "rows_per_rank": 10**30}):
        with pytest.raises(UserError, match="^the scaled config: .* should be less than or equal to [0-9]+: "):
            verification_config(Config(), data=1, tensor=1, pipeline=1, **sizes)
