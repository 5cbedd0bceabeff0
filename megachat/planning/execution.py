"""How a step executes: refuses settings that do not work together, and lists the matrices that FP8 multiplies."""

import math

from megachat.config import Config
from megachat.errors import UserError
from megachat.planning.dimensions import (
    FP8_LEAST_SIDE,
    FP8_TILES,
    Dimensions,
    fits_fp8,
    head_fits_fp8,
    linear_shapes,
    lookup_shapes,
    up_to_multiple,
)


def check_execution(config: Config, ranks_of_stage: int) -> None:
    """Raises UserError for a setting that would do nothing, and for a graph of what cannot be captured.

    ranks_of_stage: data x tensor ranks of a pipeline stage.
    """
    precision = config.precision
    if precision.compile_mode != "default" and not precision.compile:
        raise UserError(
            f"precision.compile_mode is {precision.compile_mode}, but precision.compile is false, so nothing is "
            "compiled: set precision.compile=true, or leave precision.compile_mode out"
        )
    if precision.optimizer_graph and ranks_of_stage > 1:
        raise UserError(
            f"precision.optimizer_graph is true, but the {ranks_of_stage} data x tensor ranks of a pipeline stage "
            "exchange Muon's updates, and collectives are not captured: use one rank per stage, or set "
            "precision.optimizer_graph=false"
        )


def nearest_multiples(value: int, unit: int) -> str:
    """Returns the multiples of `unit` on both sides of `value`, for messages."""
    return " or ".join(str(count) for count in (value // unit * unit, up_to_multiple(value, unit)) if count)


def check_fp8(config: Config, dims: Dimensions, tensor: int, micro_rows: int) -> None:
    """Raises UserError if FP8 is configured but the dtype, the micro-batch or every matrix does not allow it."""
    recipe, compute = config.precision.fp8, config.precision.compute
    if recipe == "off":
        return
    if compute not in ("auto", "bfloat16"):
        raise UserError(
            f"precision.fp8 is {recipe}, which needs bfloat16, but precision.compute is {compute}: "
            "set precision.compute=bfloat16, or precision.fp8=off"
        )
    tile, length = FP8_TILES[recipe], dims.sequence_len
    if micro_rows * length % tile:
        rows = nearest_multiples(micro_rows, tile // math.gcd(tile, length))
        raise UserError(
            f"precision.fp8={recipe} needs a multiple of {tile} tokens in a micro-batch, but {micro_rows} rows of "
            f"{length} are {micro_rows * length}: set batch.micro_rows to {rows}, or model.sequence_len to "
            f"{nearest_multiples(length, tile)}"
        )
    if not any(fits_fp8(*shape, recipe) for shape in linear_shapes(dims, tensor).values()):
        cut = f" cut in {tensor}" if tensor > 1 else ""
        raise UserError(
            f"precision.fp8={recipe} would change nothing: no matrix of width {dims.width}{cut} has sides of at least "
            f"{FP8_LEAST_SIDE} in multiples of {tile}: set precision.fp8=off, or use a wider model"
        )


def fp8_fits(dims: Dimensions, tensor: int, recipe: str, *, head: bool) -> dict[str, bool]:
    """Returns whether FP8 multiplies each kind of matrix in training, forward and for both gradients, by name.

    tensor: ranks of the tensor axis. head: precision.fp8_head; without it lm_head is left out.
    """
    shapes = linear_shapes(dims, tensor)
    if dims.lookup:
        names = ("lookup.w_up", "lookup.w_mix_up", "lookup.w_mix_x")
        shapes |= dict(zip(names, lookup_shapes(dims, dims.lookup, tensor), strict=True))
    if dims.ngram and dims.ngram.width < dims.kv_width:
        shapes["ngram.up"] = dims.kv_width // tensor, dims.ngram.width
    fits = {name: fits_fp8(*shape, recipe) for name, shape in shapes.items()}
    return fits | ({"lm_head": head_fits_fp8(dims, tensor, recipe)} if head else {})


def describe_fp8_matrices(dims: Dimensions, tensor: int, recipe: str, *, head: bool) -> str:
    """Returns which matrices are in FP8 in training, and which are not, with the reason."""
    fits = fp8_fits(dims, tensor, recipe, head=head)
    line = f"{', '.join(name for name in fits if fits[name])} in training"
    if plain := ", ".join(name for name in fits if not fits[name]):
        line += f"; not for {plain}: their sides are not multiples of {FP8_TILES[recipe]} of at least {FP8_LEAST_SIDE}"
    if not head:
        line += "; not for lm_head: precision.fp8_head is false"
    return f"{line}; never for embeddings, gates and attention's scores"
