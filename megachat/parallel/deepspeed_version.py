"""DeepSpeed's private names on which we rely, and the check, at import, that the installed version has them."""

import deepspeed
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from megachat.device import variable
from megachat.errors import UserError
from megachat.installation import DEEPSPEED_VERSION

# What we use beyond the documented interface of DeepSpeed and of torch's optimizers: methods that we call or override,
# and attributes that its methods use. Only engine.py, zero_state.py and build.py of this folder name them.
PRIVATE_NAMES = {
    PipelineEngine: """
        _INSTRUCTION_MAP _exec_schedule _compute_loss grad_layer pipe_buffers _running_engine_backward total_loss
        pipe_recv_buf _grad_layer_buf first_output_send""".split(),
    PipelineModule: "_partition_layers _set_bounds _layer_specs loss_fn".split(),
    DeepSpeedZeroOptimizer: """
        setup_buckets reduce_gradients get_gradient_for_reduction backward_epilogue scaled_global_norm _update_scale
        update_lp_params set_gradient_accumulation_boundary loss_scale loss_scaler averaged_gradients
        params_in_partition bit16_groups round_robin_bit16_offsets single_partition_of_fp32_groups
        use_grad_accum_attribute unflatten""".split(),
    DynamicLossScaler: "cur_scale cur_iter last_overflow_iter cur_hysteresis".split(),
}
OVERRIDE = "MEGACHAT_ANY_DEEPSPEED"  # environment variable: 1 accepts another version that has all private names


def missing_names(private_names: dict[type, list[str]]) -> list[str]:
    """Returns the listed names that the classes neither define nor use in a method, as "Class.name"."""
    missing = []
    for cls, names in private_names.items():
        functions = [value for base in cls.__mro__ for value in vars(base).values()]
        codes = [code for function in functions if (code := getattr(function, "__code__", None))]
        used = {name for code in codes for name in code.co_names}
        missing += [f"{cls.__name__}.{name}" for name in names if not hasattr(cls, name) and name not in used]
    return missing


def check_deepspeed(version: str, tested: str, private_names: dict[type, list[str]]) -> None:
    """Raises UserError unless `version` is the tested one or the user accepts another, and all private names exist."""
    install = f"pip install deepspeed=={tested}"
    if version != tested and variable(OVERRIDE) != "1":
        raise UserError(
            f"DeepSpeed {version} is installed, but megachat relies on private names of {tested}: {install}, "
            f"or set {OVERRIDE}=1 to try this version"
        )
    if missing := missing_names(private_names):
        raise UserError(f"DeepSpeed {version} has no {', '.join(missing)}, which megachat uses: {install}")


check_deepspeed(deepspeed.__version__, DEEPSPEED_VERSION, PRIVATE_NAMES)
