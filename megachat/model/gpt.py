"""nanochat's GPT (github.com/karpathy/nanochat, nanochat/gpt.py) as layers that can run apart.

The stream between layers is a plain tuple: x, x0 [batch, tokens, width] in the compute dtype, after the middle block also x_backout of that
shape, and ids [batch, tokens] int64 last. The last block drops x0, which the head does not use.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from megachat.kernels.attention import attention
from megachat.kernels.cross_entropy import (
    WHOLE,
    PlainProducts,
    VocabularyPart,
    capped_cross_entropy,
    capped_logits,
    token_nats,
)
from megachat.kernels.linear import Linear, Table
from megachat.model.parameters import initialize
from megachat.place import Place, set_place
from megachat.planning.dimensions import GATE_CHANNELS, MLP_RATIO, SMEAR_CHANNELS, Dimensions

LOGIT_CAP = 15.0


@dataclass(frozen=True)
class ModelOptions:
    """How to compute, not what: dtype of activations, rotary "slices" or "chunk", the attention kernel, what blocks compute again in the
    backward pass ("none", "selective" or "block", see Block)."""

    compute_dtype: torch.dtype = torch.float32
    rotary: str = "slices"
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor] = attention
    recompute: str = "none"

    @property
    def table_dtype(self) -> torch.dtype:
        """Storage of wte and value embeddings: the compute dtype, but float32 under fp16, whose gradients need unscaling."""
        return torch.float32 if self.compute_dtype == torch.float16 else self.compute_dtype


def norm(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root-mean-square norm over the last dim, no weight."""
    return F.rms_norm(x, (x.size(-1),), eps=epsilon)


def _computed_again(function: Callable, *inputs):
    """The function's result; of its inside nothing is kept for the backward pass, which computes it again. It draws no random numbers."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Rotary(nn.Module):
    """Tables cos and sin [1, sequence_len, 1, head_size / 2] in the compute dtype (RoFormer, arXiv 2104.09864), shared by the blocks."""

    def __init__(self, dims: Dimensions, options: ModelOptions):
        super().__init__()
        frequencies = dims.rotary_base ** -(torch.arange(0, dims.head_size, 2, dtype=torch.float32) / dims.head_size)
        angles = torch.outer(torch.arange(dims.sequence_len, dtype=torch.float32), frequencies)[None, :, None, :]
        self.chunk = options.rotary == "chunk"
        self.register_buffer("cos", angles.cos().to(options.compute_dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(options.compute_dtype), persistent=False)

    def forward(self, x: torch.Tensor, past=None) -> torch.Tensor:
        """Rotate heads x [batch, tokens, heads, head_size] by minus their position's angles, as nanochat does."""
        if past is None:
            cos, sin = self.cos[:, : x.size(1)], self.sin[:, : x.size(1)]
        else:
            at = past.positions(x.size(1), x.device)
            cos, sin = (table[:, at] if isinstance(at, slice) else table[0, at] for table in (self.cos, self.sin))
        half = x.size(-1) // 2
        x1, x2 = x.chunk(2, dim=-1) if self.chunk else (x[..., :half], x[..., half:])
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class Embed(nn.Module):
    """ids -> stream: token embedding, norm, and the smear of the previous token's embedding. past: see megachat.model.cache."""

    def __init__(self, dims: Dimensions, options: ModelOptions):
        super().__init__()
        self.compute_dtype, self.norm_epsilon, self.past = options.compute_dtype, dims.norm_epsilon, None
        self.wte = Table(dims.padded_vocab, dims.width, options.table_dtype)
        self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        set_place(
            self.wte.weight,
            Place("transformer.wte.weight", (dims.padded_vocab, dims.width), -1, ("normal", 0.8), "vocabulary"),
        )
        set_place(self.smear_gate.weight, Place("smear_gate.weight", (1, SMEAR_CHANNELS), -1, ("uniform", 0.0, 0.02)))
        set_place(self.smear_lambda, Place("smear_lambda", (1,), -1, ("constant", 0.0)))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = norm(self.wte(ids).to(self.compute_dtype), self.norm_epsilon)
        first = 1 if self.past is None else 0  # a text's first token has none before it
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[:, first:, :SMEAR_CHANNELS]))
        if self.past is None:
            x = torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), dim=1)
        else:
            x = x + gate * self.past.before(x)
        return x, x, ids


class Attention(nn.Module):
    """Causal self-attention with rotary positions, normed queries and keys, and a gated value embedding on some blocks. past: see
    megachat.model.cache."""

    def __init__(self, dims: Dimensions, options: ModelOptions, rotary: Rotary, block: int):
        super().__init__()
        self.dims, self.block, self.window, self.rotary, self.past = dims, block, dims.windows[block], rotary, None
        self.attend = options.attend
        self.c_q = Linear(dims.width, dims.heads * dims.head_size)
        self.c_k = Linear(dims.width, dims.kv_width)
        self.c_v = Linear(dims.width, dims.kv_width)
        self.c_proj = Linear(dims.heads * dims.head_size, dims.width)
        bound = (3 / dims.width) ** 0.5
        for name, cut, start in (
            ("c_q", "column", ("uniform", -bound, bound)),
            ("c_k", "column", ("uniform", -bound, bound)),
            ("c_v", "column", ("uniform", -bound, bound)),
            ("c_proj", "row", ("constant", 0.0)),
        ):
            weight = getattr(self, name).weight
            set_place(
                weight, Place(f"transformer.h.{block}.attn.{name}.weight", tuple(weight.shape), block, start, cut)
            )
        self.ve_gate = None
        if dims.has_value_embedding(block):
            self.ve_gate = Linear(GATE_CHANNELS, dims.kv_heads)
            shape = tuple(self.ve_gate.weight.shape)
            set_place(
                self.ve_gate.weight,
                Place(f"transformer.h.{block}.attn.ve_gate.weight", shape, block, ("uniform", 0.0, 0.02), "column"),
            )

    def forward(self, x: torch.Tensor, value_embedding: torch.Tensor | None) -> torch.Tensor:
        """x [batch, tokens, width]; value_embedding [batch, tokens, kv_width] or None."""
        heads = (*x.shape[:2], -1, self.dims.head_size)
        q, k, v = self.c_q(x).view(heads), self.c_k(x).view(heads), self.c_v(x).view(heads)
        if self.ve_gate is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value_embedding.view(heads)
        q, k = (norm(self.rotary(head, self.past), self.dims.norm_epsilon) * self.dims.qk_scale for head in (q, k))
        y = (
            self.attend(q, k, v, self.window)
            if self.past is None
            else self.past.attend(self.block, q, k, v, self.window)
        )
        return self.c_proj(y.flatten(2))


class MLP(nn.Module):
    """Two linears with a squared ReLU between them (Primer, arXiv 2109.08668)."""

    def __init__(self, dims: Dimensions, block: int):
        super().__init__()
        self.c_fc = Linear(dims.width, MLP_RATIO * dims.width)
        self.c_proj = Linear(MLP_RATIO * dims.width, dims.width)
        bound = 0.4 * (3 / dims.width) ** 0.5
        for name, cut, start in (("c_fc", "column", ("uniform", -bound, bound)), ("c_proj", "row", ("constant", 0.0))):
            weight = getattr(self, name).weight
            set_place(weight, Place(f"transformer.h.{block}.mlp.{name}.weight", tuple(weight.shape), block, start, cut))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """stream -> stream: the residual mix, attention, MLP; the middle block adds x_backout.

    recompute: "block" keeps nothing but the stream for the backward pass and computes the block again there (arXiv 1604.06174); "selective" keeps
    what attention needs and computes the MLP's inside again, the largest part of a block for the least work (after arXiv 2205.05198). The same
    operations in the same order: gradients are equal to the bit.
    """

    def __init__(self, dims: Dimensions, options: ModelOptions, rotary: Rotary, block: int):
        super().__init__()
        self.keeps_backout, self.is_last, self.norm_epsilon = (
            block == dims.depth // 2,
            block == dims.depth - 1,
            dims.norm_epsilon,
        )
        self.recompute = options.recompute
        self.attn, self.mlp = Attention(dims, options, rotary, block), MLP(dims, block)
        self.resid_lambda, self.x0_lambda = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))
        along = block / max(dims.depth - 1, 1)
        resid, x0 = (1.0, 0.0) if dims.lambdas == "neutral" else (1.15 - 0.10 * along, 0.20 - 0.15 * along)
        for name, value in (("resid_lambda", resid), ("x0_lambda", x0)):
            where = Place(f"{name}s", (dims.depth,), block, ("constant", value), offset=(block,))
            set_place(getattr(self, name), where)
        self.value_embed = None
        if dims.has_value_embedding(block):
            shape, bound = (dims.padded_vocab, dims.kv_width), (3 / dims.width) ** 0.5
            self.value_embed = Table(*shape, options.table_dtype)
            set_place(
                self.value_embed.weight,
                Place(f"value_embeds.{block}.weight", shape, block, ("uniform", -bound, bound), "feature"),
            )

    def forward(self, stream: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        again = self.recompute if self.training and torch.is_grad_enabled() else "none"
        return _computed_again(self.whole, stream) if again == "block" else self.whole(stream, again)

    def whole(self, stream: tuple[torch.Tensor, ...], recompute: str = "none") -> tuple[torch.Tensor, ...]:
        """The block. recompute: "selective" as above."""
        x, x0, *backout, ids = stream
        x = self.mixed_and_attended(x, x0, ids)
        x = _computed_again(self.through_mlp, x) if recompute == "selective" else self.through_mlp(x)
        if self.keeps_backout:
            backout = [x]
        return (x, *backout, ids) if self.is_last else (x, x0, *backout, ids)

    def mixed_and_attended(self, x: torch.Tensor, x0: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x and x0 [batch, tokens, width], ids [batch, tokens]: the residual mix, and attention added to it."""
        # 0-dim factors: a one-element float32 vector would promote bf16 activations to float32
        x = self.resid_lambda[0] * x + self.x0_lambda[0] * x0
        value_embedding = None if self.value_embed is None else self.value_embed(ids).to(x.dtype)
        return x + self.attn(norm(x, self.norm_epsilon), value_embedding)

    def through_mlp(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, tokens, width] with the MLP's result added."""
        return x + self.mlp(norm(x, self.norm_epsilon))


class Head(nn.Module):
    """stream -> (hidden [batch, tokens, width] in the compute dtype, lm_head's weight): what loss and logits are computed from."""

    def __init__(self, dims: Dimensions):
        super().__init__()
        self.norm_epsilon, backout = dims.norm_epsilon, 0.0 if dims.lambdas == "neutral" else 0.2
        self.backout_lambda = nn.Parameter(torch.empty(1))
        self.lm_head = Linear(dims.width, dims.padded_vocab)
        set_place(self.backout_lambda, Place("backout_lambda", (1,), dims.depth, ("constant", backout)))
        set_place(
            self.lm_head.weight,
            Place("lm_head.weight", (dims.padded_vocab, dims.width), dims.depth, ("normal", 0.001), "vocabulary"),
        )

    def forward(self, stream: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        x, x_backout, _ = stream
        return norm(x - self.backout_lambda.to(x.dtype) * x_backout, self.norm_epsilon), self.lm_head.weight


class Loss(nn.Module):
    """The head's output and targets [batch, tokens] -> in training the mean cross entropy in nats, 0-dim float32; in evaluation
    [nats, bytes] float64 summed over the targets that have bytes (special tokens have none). A target of -1 is not counted.
    part: the rows of lm_head that the output comes with. products: how training multiplies by them."""

    def __init__(
        self,
        dims: Dimensions,
        token_bytes: torch.Tensor,
        part: VocabularyPart = WHOLE,
        products: type[PlainProducts] = PlainProducts,
    ):
        super().__init__()
        self.vocab_size, self.part, self.products = dims.vocab_size, part, products
        self.register_buffer("token_bytes", token_bytes.to(torch.int64), persistent=False)

    def forward(self, output: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        hidden, weight = output
        if self.training:
            return capped_cross_entropy(hidden, weight, targets, self.vocab_size, LOGIT_CAP, self.part, self.products)
        nats = token_nats(hidden, weight, targets, self.vocab_size, LOGIT_CAP, self.part).double()
        flat = targets.flatten()
        size = torch.where(flat >= 0, self.token_bytes[flat.clamp_min(0)], 0)
        return torch.stack(((nats * (size > 0)).sum(), size.sum().double()))


def logits(output: tuple[torch.Tensor, torch.Tensor], dims: Dimensions, part: VocabularyPart = WHOLE) -> torch.Tensor:
    """The head's output -> capped logits [batch, tokens, vocab_size] float32."""
    return capped_logits(*output, dims.vocab_size, LOGIT_CAP, part)


def last_logits(
    output: tuple[torch.Tensor, torch.Tensor], positions: torch.Tensor, dims: Dimensions, part: VocabularyPart = WHOLE
) -> torch.Tensor:
    """The head's output [batch, tokens, ...] and positions [batch] int64 -> the logits after each row's position, [batch, vocab_size] float32."""
    hidden, weight = output
    return logits((hidden[torch.arange(len(positions), device=hidden.device), positions], weight), dims, part)


def layer_builders(dims: Dimensions, options: ModelOptions):
    """Functions that build embed, each block and head, in order; a pipeline stage calls only its own."""
    rotary = Rotary(dims, options)
    blocks = [lambda block=block: Block(dims, options, rotary, block) for block in range(dims.depth)]
    return [lambda: Embed(dims, options), *blocks, lambda: Head(dims)]


def build_layers(dims: Dimensions, options: ModelOptions, seed: int | None = None) -> nn.ModuleList:
    """The whole model on one process, with starting values when a seed is given."""
    layers = nn.ModuleList(build() for build in layer_builders(dims, options))
    if seed is not None:
        initialize(layers, seed)
    return layers


def run_layers(layers, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [batch, tokens] int64 through all layers; returns the head's output."""
    stream = ids
    for layer in layers:
        stream = layer(stream)
    return stream
