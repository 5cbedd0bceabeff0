"""Parameters, FLOPs and bytes from dimensions alone; no tensor is made."""

from dataclasses import dataclass, fields
from typing import Literal

from megachat.errors import UserError

VOCAB_MULTIPLE = 64
MLP_RATIO = 4
SMEAR_CHANNELS = 24
GATE_CHANNELS = 12
WINDOW_TILE = 128  # short windows are whole tiles of the attention kernels
NORM_EPSILON = 1.1920929e-07
ROTARY_BASE = 100_000.0
QK_SCALE = 1.2
FP8_TILES = {
    "tensorwise": 16,
    "blockwise": 128,
}  # both sides of an FP8 weight and the tokens that meet it are multiples of this
FP8_LEAST_SIDE = 128  # smaller matrices cost more to round than they save


def up_to_multiple(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Dimensions:
    """The sizes that fix a model. windows[i] is the number of earlier positions that block i's queries see (sequence_len: all).

    The fields with defaults are nanochat's choices; its first version, which transformers' NanoChat computes, made others: no value embeddings,
    no scale on normed queries and keys, and no residual mix, smear or backout, which "neutral" lambdas leave without effect.
    """

    depth: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    sequence_len: int
    vocab_size: int
    windows: tuple[int, ...]
    rotary_base: float = ROTARY_BASE
    qk_scale: float = QK_SCALE
    norm_epsilon: float = NORM_EPSILON
    value_embeddings: bool = True
    lambdas: Literal["learned", "neutral"] = "learned"

    @property
    def padded_vocab(self) -> int:
        """Rows of the tables."""
        return up_to_multiple(self.vocab_size, VOCAB_MULTIPLE)

    @property
    def kv_width(self) -> int:
        """Channels of all key/value heads."""
        return self.kv_heads * self.head_size

    def has_value_embedding(self, block: int) -> bool:
        """Every other block, the last one always, where the model has any."""
        return self.value_embeddings and block % 2 == (self.depth - 1) % 2


def saved_dimensions(model: dict) -> Dimensions:
    """The sizes in a checkpoint's facts; what older ones do not name is nanochat's. Raises UserError for keys that are missing or unknown."""
    known = {field.name for field in fields(Dimensions)}
    if unknown := sorted(set(model) - known):
        raise UserError(f"the checkpoint's model has {unknown[0]}, which this version does not know: update megachat")
    try:
        return Dimensions(**(model | {"windows": tuple(model["windows"])}))
    except (TypeError, KeyError) as error:
        raise UserError(f"the checkpoint does not tell its model's sizes ({error}): give another one") from None


def window_sizes(pattern: str, depth: int, sequence_len: int) -> tuple[int, ...]:
    """The pattern's letters tiled over the blocks: L the whole row, S a quarter of it in whole tiles; the last block is always L."""
    short = up_to_multiple(-(-sequence_len // 4), WINDOW_TILE)
    sizes = [{"L": sequence_len, "S": short}[pattern[block % len(pattern)]] for block in range(depth)]
    return (*sizes[:-1], sequence_len)


def parameter_counts(dims: Dimensions) -> dict[str, int]:
    """Elements by kind: wte, value_embeds, lm_head, matrices (Muon's), scalars, total."""
    value_blocks = sum(dims.has_value_embedding(block) for block in range(dims.depth))
    attention = 2 * dims.width * dims.heads * dims.head_size + 2 * dims.width * dims.kv_width
    counts = {
        "wte": dims.padded_vocab * dims.width,
        "value_embeds": value_blocks * dims.padded_vocab * dims.kv_width,
        "lm_head": dims.padded_vocab * dims.width,
        "matrices": dims.depth * (attention + 2 * MLP_RATIO * dims.width**2)
        + value_blocks * GATE_CHANNELS * dims.kv_heads,
        "scalars": 2 * dims.depth + SMEAR_CHANNELS + 2,
    }
    return counts | {"total": sum(counts.values())}


def layer_costs(dims: Dimensions) -> list[tuple[int, int]]:
    """(parameters, training FLOPs a token) of what each layer really holds: the embedding, every block with its value embedding, the head."""
    table = dims.padded_vocab * dims.width
    costs = [(table + SMEAR_CHANNELS + 1, 6 * SMEAR_CHANNELS)]
    for block, window in enumerate(dims.windows):
        matrices = (
            2 * dims.width * dims.heads * dims.head_size
            + 2 * dims.width * dims.kv_width
            + 2 * MLP_RATIO * dims.width**2
        )
        parameters = matrices + 2
        if dims.has_value_embedding(block):
            matrices += GATE_CHANNELS * dims.kv_heads
            parameters += GATE_CHANNELS * dims.kv_heads + dims.padded_vocab * dims.kv_width
        costs.append((parameters, 6 * matrices + 12 * dims.heads * dims.head_size * min(window, dims.sequence_len)))
    return [*costs, (table + 1, 6 * table)]


def scaling_parameters(dims: Dimensions) -> int:
    """Block matrices and lm_head: the count that gives nanochat its cleanest scaling laws."""
    counts = parameter_counts(dims)
    return counts["matrices"] + counts["lm_head"]


def flops_per_token(dims: Dimensions) -> int:
    """Training FLOPs: 6 a matmul parameter, and 12 x heads x head_size x visible keys a block for attention (PaLM, arXiv 2204.02311)."""
    matmul = scaling_parameters(dims) + SMEAR_CHANNELS
    return 6 * matmul + sum(
        12 * dims.heads * dims.head_size * min(window, dims.sequence_len) for window in dims.windows
    )


def fits_fp8(rows: int, columns: int, recipe: str) -> bool:
    """Whether a weight [rows, columns], as a rank holds it, can be multiplied in FP8; the others stay in the compute dtype."""
    return min(rows, columns) >= FP8_LEAST_SIDE and not (rows % FP8_TILES[recipe] or columns % FP8_TILES[recipe])


def check_fp8_multiples(tokens: int, weight: tuple[int, ...], tile: int) -> None:
    """Raises ValueError unless the tokens and both sides of the weight are multiples of the tile."""
    if any(size % tile for size in (tokens, *weight)):
        raise ValueError(f"FP8 needs multiples of {tile}: {tokens} tokens, weight {tuple(weight)}")


def linear_shapes(dims: Dimensions, tensor: int = 1) -> dict[str, tuple[int, int]]:
    """The weights [rows, columns] of a block's linears but the gate, as each of `tensor` ranks of the tensor axis holds them."""
    inner, hidden = dims.heads * dims.head_size // tensor, MLP_RATIO * dims.width // tensor
    shapes = {
        "attn.c_q": (inner, dims.width),
        "attn.c_k": (dims.kv_width // tensor, dims.width),
        "attn.c_v": (dims.kv_width // tensor, dims.width),
    }
    return shapes | {
        "attn.c_proj": (dims.width, inner),
        "mlp.c_fc": (hidden, dims.width),
        "mlp.c_proj": (dims.width, hidden),
    }


def head_fits_fp8(dims: Dimensions, tensor: int, recipe: str) -> bool:
    """Whether every rank's rows of lm_head, padding left out, can be multiplied in FP8."""
    tile = FP8_TILES[recipe]
    return fits_fp8(dims.padded_vocab // tensor, dims.width, recipe) and not (
        dims.padded_vocab % (tile * tensor) or dims.vocab_size % tile
    )
