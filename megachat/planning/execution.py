"""How a step executes: refuses settings that do not work together, and lists the matrices that FP8 multiplies."""

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
