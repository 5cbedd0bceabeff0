"""nanochat's GPT (github.com/karpathy/nanochat, nanochat/gpt.py) as layers that can run separately.

The stream between layers is a tuple: x and x0 [batch, tokens, width] in the compute dtype, after the middle block also
x_backout of that shape, and last ids [batch, tokens] int64. The last block drops x0, which the head does not use.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megachat.kernels.attention import Attend, attention
from megachat.kernels.channel_norm import norm
from megachat.kernels.cross_entropy import (
    WHOLE,
    PlainProducts,
    VocabularyPart,
    capped_cross_entropy,
    capped_logits,
    token_nats,
)
from megachat.kernels.linear import Linear, Table
from megachat.kernels.squared_relu import squared_relu
from megachat.model.lookup import Lookup
from megachat.model.ngram import NgramHashes, NgramValues
from megachat.model.parameters import declare, initialize
from megachat.place import Place, set_place
from megachat.planning.dimensions import (
    GATE_CHANNELS,
    MLP_RATIO,
    SMEAR_CHANNELS,
    Dimensions,
    Norm,
    norm_scale_shape,
)

if TYPE_CHECKING:
    from megachat.model.cache import Chunk

LOGIT_CAP = 15.0
Stream = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class ModelOptions:
    """How the model is computed, which does not change the results.

    compute_dtype: of activations. rotary: "slices" or "chunk". attend: the attention kernel. recompute: what blocks
    compute again in the backward pass: "none", "selective" or "block" (see Block). holds_ngrams: whether the model
    holds its n-gram tables; else NgramTable.attach must connect them.
    """

    compute_dtype: torch.dtype = torch.float32
    rotary: str = "slices"
    attend: Attend = attention
    recompute: str = "none"
    holds_ngrams: bool = True

    @property
    def table_dtype(self) -> torch.dtype:
        """Returns the dtype of tables: the compute dtype, but float32 under fp16, whose gradients need unscaling."""
        return torch.float32 if self.compute_dtype == torch.float16 else self.compute_dtype


def _recomputed(function: Callable, *inputs):
    """Calls the function, keeping only its inputs for the backward pass, which calls it again.

    It must not draw random numbers.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def norm_scale(dims: Dimensions, which: Norm, block: int, prefix: str = "") -> nn.Parameter | None:
    """Returns the learned scale of a norm, None if the model has none there. block: as in Place. prefix: of its name.

    Those of queries and keys have a number per channel of each head. The tensor axis cuts them with the heads.
    """
    if which not in dims.norm_scales:
        return None
    scale = nn.Parameter(torch.empty(norm_scale_shape(dims, which)))
    declare(scale, f"{prefix}{which}_scale", block, ("constant", 1.0), "heads" if scale.ndim == 2 else "whole")
    return scale


class Rotary(nn.Module):
    """Rotary positions (RoFormer, arXiv 2104.09864), shared by the blocks: tables cos and sin [1, longest_row, 1,
    head_size / 2].
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, dims: Dimensions, options: ModelOptions):
        super().__init__()
        # computed on the CPU: on the meta device torch would import torch._dynamo for these operations
        cpu = torch.device("cpu")
        # 1 / x, not a negative power, which is rounded differently: nanochat's tables to the bit
        frequencies = 1 / dims.rotary_base ** (
            torch.arange(0, dims.head_size, 2, dtype=torch.float32, device=cpu) / dims.head_size
        )
        angles = torch.outer(torch.arange(dims.longest_row, dtype=torch.float32, device=cpu), frequencies)[
            None, :, None, :
        ]
        self.chunk, device = options.rotary == "chunk", torch.get_default_device()
        self.register_buffer("cos", angles.cos().to(device, options.compute_dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(device, options.compute_dtype), persistent=False)

    def forward(self, x: torch.Tensor, past: "Chunk | None" = None) -> torch.Tensor:
        """Rotates heads x [batch, tokens, heads, head_size] by minus their position's angles, as nanochat does."""
        if past is None:
            cos, sin = self.cos[:, : x.size(1)], self.sin[:, : x.size(1)]
        else:
            at = past.positions(x.size(1), x.device)
            cos, sin = (table[:, at] if isinstance(at, slice) else table[0, at] for table in (self.cos, self.sin))
        half = x.size(-1) // 2
        x1, x2 = x.chunk(2, dim=-1) if self.chunk else (x[..., :half], x[..., half:])
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class Embed(nn.Module):
    """ids -> stream: token embedding, norm, and the smear of the previous token's embedding.

    past: see megachat.model.cache.
    """

    def __init__(self, dims: Dimensions, options: ModelOptions):
        super().__init__()
        self.compute_dtype, self.norm_epsilon = options.compute_dtype, dims.norm_epsilon
        self.past: Chunk | None = None
        self.embedding_scale = norm_scale(dims, "embedding", -1)
        self.wte = Table(dims.padded_vocab, dims.width, options.table_dtype)
        self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        declare(self.wte.weight, "transformer.wte.weight", -1, ("normal", 0.8), "vocabulary")
        declare(self.smear_gate.weight, "smear_gate.weight", -1, ("uniform", 0.0, 0.02))
        declare(self.smear_lambda, "smear_lambda", -1, ("constant", 0.0))

    def forward(self, ids: torch.Tensor) -> Stream:
        x = norm(self.wte(ids).to(self.compute_dtype), self.norm_epsilon, self.embedding_scale)
        first = 1 if self.past is None else 0  # a text's first token has no previous one
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[:, first:, :SMEAR_CHANNELS]))
        if self.past is None:
            x = torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), dim=1)
        else:
            x = x + gate * self.past.previous_embeddings(x)
        return x, x, ids


class Attention(nn.Module):
    """Causal self-attention with rotary positions, normed queries and keys. On some blocks a gated value embedding and
    gated n-gram values are added to the values.

    past: see megachat.model.cache.
    """

    def __init__(self, dims: Dimensions, options: ModelOptions, rotary: Rotary, block: int):
        super().__init__()
        self.dims, self.block, self.window, self.rotary = dims, block, dims.windows[block], rotary
        self.attend = options.attend
        self.past: Chunk | None = None
        self.c_q = Linear(dims.width, dims.heads * dims.head_size)
        self.c_k = Linear(dims.width, dims.kv_width)
        self.c_v = Linear(dims.width, dims.kv_width)
        self.c_proj = Linear(dims.heads * dims.head_size, dims.width)
        prefix, bound = f"transformer.h.{block}.attn", (3 / dims.width) ** 0.5
        for name, linear in (("c_q", self.c_q), ("c_k", self.c_k), ("c_v", self.c_v)):
            declare(linear.weight, f"{prefix}.{name}.weight", block, ("uniform", -bound, bound), "column")
        declare(self.c_proj.weight, f"{prefix}.c_proj.weight", block, ("constant", 0.0), "row")
        self.ve_gate = None
        if dims.has_value_embedding(block):
            self.ve_gate = Linear(GATE_CHANNELS, dims.kv_heads)
            declare(self.ve_gate.weight, f"{prefix}.ve_gate.weight", block, ("uniform", 0.0, 0.02), "column")
        self.query_scale = norm_scale(dims, "query", block, f"{prefix}.")
        self.key_scale = norm_scale(dims, "key", block, f"{prefix}.")
        self.ngram_gates = nn.ModuleDict()
        for order in dims.ngram.orders if dims.ngram and dims.has_ngram(block) else ():
            gate = self.ngram_gates[str(order)] = Linear(GATE_CHANNELS, dims.kv_heads)
            declare(gate.weight, f"{prefix}.ngram_gate_{order}.weight", block, ("uniform", 0.0, 0.02), "column")

    def forward(
        self, x: torch.Tensor, value_embedding: torch.Tensor | None, ngrams: tuple[torch.Tensor, ...] = ()
    ) -> torch.Tensor:
        """x [batch, tokens, width]; value_embedding [batch, tokens, kv_width] or None; ngrams: such values by order."""
        heads = (*x.shape[:2], -1, self.dims.head_size)
        q, k, v = self.c_q(x).view(heads), self.c_k(x).view(heads), self.c_v(x).view(heads)
        gated = [(self.ve_gate, value_embedding), *zip(self.ngram_gates.values(), ngrams, strict=True)]
        for linear, values in gated:
            if linear is not None and values is not None:
                gate = 3 * torch.sigmoid(linear(x[..., :GATE_CHANNELS]))
                v = v + gate.unsqueeze(-1) * values.view(heads)
        scaled, epsilon = ((q, self.query_scale), (k, self.key_scale)), self.dims.norm_epsilon
        q, k = (norm(self.rotary(x, self.past), epsilon, scale) * self.dims.qk_scale for x, scale in scaled)
        if self.past is None:
            y = self.attend(q, k, v, self.window)
        else:
            y = self.past.attend(self.block, q, k, v, self.window)
        return self.c_proj(y.flatten(2))


class MLP(nn.Module):
    """Two linears with a squared ReLU between them."""

    def __init__(self, dims: Dimensions, block: int):
        super().__init__()
        self.c_fc = Linear(dims.width, MLP_RATIO * dims.width)
        self.c_proj = Linear(MLP_RATIO * dims.width, dims.width)
        prefix, bound = f"transformer.h.{block}.mlp", 0.4 * (3 / dims.width) ** 0.5
        declare(self.c_fc.weight, f"{prefix}.c_fc.weight", block, ("uniform", -bound, bound), "column")
        declare(self.c_proj.weight, f"{prefix}.c_proj.weight", block, ("constant", 0.0), "row")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(squared_relu(self.c_fc(x)))


class Block(nn.Module):
    """stream -> stream: the residual mix, attention, MLP, on some blocks a lookup layer; the middle block adds
    x_backout.

    recompute: "block" keeps only the stream and n-gram values for the backward pass, which computes the block again
    (arXiv 1604.06174). "selective" keeps what attention needs and computes the inside of the MLP again, the largest
    part of a block for the least work (after arXiv 2205.05198). The same operations run in the same order, so gradients
    are equal to the bit.
    """

    def __init__(
        self, dims: Dimensions, options: ModelOptions, rotary: Rotary, block: int, hashes: NgramHashes | None = None
    ):
        super().__init__()
        self.keeps_backout, self.is_last = block == dims.depth // 2, block == dims.depth - 1
        self.norm_epsilon, self.recompute = dims.norm_epsilon, options.recompute
        self.attn, self.mlp = Attention(dims, options, rotary, block), MLP(dims, block)
        self.attention_scale = norm_scale(dims, "attention", block, f"transformer.h.{block}.")
        self.mlp_scale = norm_scale(dims, "mlp", block, f"transformer.h.{block}.")
        self.resid_lambda, self.x0_lambda = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))
        along = block / max(dims.depth - 1, 1)
        resid, x0 = (1.0, 0.0) if dims.lambdas == "neutral" else (1.15 - 0.10 * along, 0.20 - 0.15 * along)
        for name, parameter, value in (("resid", self.resid_lambda, resid), ("x0", self.x0_lambda, x0)):
            place = Place(f"{name}_lambdas", (dims.depth,), block, ("constant", value), offset=(block,))
            set_place(parameter, place)
        self.value_embed = None
        if dims.has_value_embedding(block):
            bound = (3 / dims.width) ** 0.5
            self.value_embed = Table(dims.padded_vocab, dims.kv_width, options.table_dtype)
            start = "uniform", -bound, bound
            declare(self.value_embed.weight, f"value_embeds.{block}.weight", block, start, "feature")
        self.lookup = None
        if dims.lookup and dims.has_lookup(block):
            self.lookup = Lookup(dims, dims.lookup, options.table_dtype, block)
        self.ngram = None
        if hashes and dims.has_ngram(block):
            dtypes = options.compute_dtype, options.table_dtype if options.holds_ngrams else None
            self.ngram = NgramValues(dims, hashes, block, dtypes)

    def forward(self, stream: Stream) -> Stream:
        recompute = self.recompute if self.training and torch.is_grad_enabled() else "none"
        ngrams = () if self.ngram is None else self.ngram(stream[-1])
        if recompute == "block":
            return _recomputed(self.whole, stream, ngrams)
        return self.whole(stream, ngrams, recompute)

    def whole(self, stream: Stream, ngrams: tuple[torch.Tensor, ...] = (), recompute: str = "none") -> Stream:
        """Computes the block. ngrams: see Attention. recompute: "selective" as above."""
        x, x0, *backout, ids = stream
        x = self.mix_and_attend(x, x0, ids, ngrams)
        x = _recomputed(self.add_mlp, x) if recompute == "selective" else self.add_mlp(x)
        if self.lookup is not None:
            x = self.lookup(x, ids)
        if self.keeps_backout:
            backout = [x]
        return (x, *backout, ids) if self.is_last else (x, x0, *backout, ids)

    def mix_and_attend(
        self, x: torch.Tensor, x0: torch.Tensor, ids: torch.Tensor, ngrams: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Mixes x and x0 [batch, tokens, width] and adds attention; ids [batch, tokens]; ngrams: see Attention."""
        # 0-dim factors: a one-element float32 vector would promote bf16 activations to float32
        x = self.resid_lambda[0] * x + self.x0_lambda[0] * x0
        value_embedding = None if self.value_embed is None else self.value_embed(ids).to(x.dtype)
        return x + self.attn(norm(x, self.norm_epsilon, self.attention_scale), value_embedding, ngrams)

    def add_mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Adds the MLP's output to x [batch, tokens, width]."""
        return x + self.mlp(norm(x, self.norm_epsilon, self.mlp_scale))


class Head(nn.Module):
    """stream -> (hidden [batch, tokens, width] in the compute dtype, lm_head's weight), for loss and logits."""

    def __init__(self, dims: Dimensions):
        super().__init__()
        self.norm_epsilon, backout = dims.norm_epsilon, 0.0 if dims.lambdas == "neutral" else 0.2
        self.backout_lambda = nn.Parameter(torch.empty(1))
        self.final_scale = norm_scale(dims, "final", dims.depth)
        self.lm_head = Linear(dims.width, dims.padded_vocab)
        declare(self.backout_lambda, "backout_lambda", dims.depth, ("constant", backout))
        declare(self.lm_head.weight, "lm_head.weight", dims.depth, ("normal", 0.001), "vocabulary")

    def forward(self, stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
        x, x_backout, _ = stream
        x = x - self.backout_lambda.to(x.dtype) * x_backout
        return norm(x, self.norm_epsilon, self.final_scale), self.lm_head.weight


class Loss(nn.Module):
    """Computes the loss of the head's output for targets [batch, tokens]; a target of -1 is not counted.

    In training: the mean cross entropy in nats, 0-dim float32. In evaluation: [nats, bytes] float64, summed over the
    targets that have bytes (special tokens have none). part: the local rows of lm_head. products: the matrix products
    of training. z_loss: see capped_cross_entropy; it changes gradients only.
    """

    token_bytes: torch.Tensor

    def __init__(
        self,
        dims: Dimensions,
        token_bytes: torch.Tensor,
        part: VocabularyPart = WHOLE,
        products: type[PlainProducts] = PlainProducts,
        z_loss: float = 0.0,
    ):
        super().__init__()
        self.vocab_size, self.part, self.products, self.z_loss = dims.vocab_size, part, products, z_loss
        self.register_buffer("token_bytes", token_bytes.to(torch.int64), persistent=False)

    def forward(self, output: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        hidden, weight = output
        if self.training:
            how = self.part, self.products, self.z_loss
            return capped_cross_entropy(hidden, weight, targets, self.vocab_size, LOGIT_CAP, *how)
        nats = token_nats(hidden, weight, targets, self.vocab_size, LOGIT_CAP, self.part).double()
        flat = targets.flatten()
        size = torch.where(flat >= 0, self.token_bytes[flat.clamp_min(0)], 0)
        return torch.stack(((nats * (size > 0)).sum(), size.sum().double()))


def logits(output: tuple[torch.Tensor, torch.Tensor], dims: Dimensions, part: VocabularyPart = WHOLE) -> torch.Tensor:
    """Returns the capped logits [batch, tokens, vocab_size] float32 of the head's output."""
    return capped_logits(*output, dims.vocab_size, LOGIT_CAP, part)


def last_logits(
    output: tuple[torch.Tensor, torch.Tensor], positions: torch.Tensor, dims: Dimensions, part: VocabularyPart = WHOLE
) -> torch.Tensor:
    """Returns the logits [batch, vocab_size] float32 of the head's output at one position per row; positions [batch]
    int64.
    """
    hidden, weight = output
    return logits((hidden[torch.arange(len(positions), device=hidden.device), positions], weight), dims, part)


def layer_builders(dims: Dimensions, options: ModelOptions) -> list[Callable[[], nn.Module]]:
    """Returns functions that build embed, each block and head, in order; a pipeline stage calls only those of its
    layers.
    """
    rotary, hashes = Rotary(dims, options), NgramHashes(dims.ngram) if dims.ngram else None
    blocks = [lambda block=block: Block(dims, options, rotary, block, hashes) for block in range(dims.depth)]
    return [lambda: Embed(dims, options), *blocks, lambda: Head(dims)]


def build_layers(dims: Dimensions, options: ModelOptions, seed: int | None = None) -> nn.ModuleList:
    """Builds the whole model on one process, with initial values if a seed is given."""
    layers = nn.ModuleList(build() for build in layer_builders(dims, options))
    if seed is not None:
        initialize(layers, seed)
    return layers


def run_layers(layers: Iterable[nn.Module], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs ids [batch, tokens] int64 through all layers and returns the head's output."""
    stream: Any = ids
    for layer in layers:
        stream = layer(stream)
    return stream
