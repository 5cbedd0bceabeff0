"""megachat's GPT for transformers, in one file that needs only torch and transformers.

`megachat convert to-hf` copies this file into its folder, where `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)` runs it, so it imports nothing of megachat. The model is nanochat's GPT (nanochat/gpt.py) with
megachat's lookup layers (arXiv 2601.21461), n-gram values (arXiv 2601.07372) and norm scales; see megachat/model/.
Left padding is supported with an `attention_mask` [batch, tokens], and every cache of transformers that grows.
"""

from dataclasses import fields
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

LOGIT_CAP = 15.0
MLP_RATIO, SMEAR_CHANNELS, GATE_CHANNELS, VOCAB_MULTIPLE = 4, 24, 12, 64
LOOKUP_ELEMENTS = 1 << 24  # of table rows that are gathered at once
# transformers has renamed past_key_values to cache
_CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
_GOLDEN = 0x9E3779B97F4A7C15  # increment of SplitMix64


class MegachatConfig(PretrainedConfig):
    """The model's sizes, with megachat's names (megachat/planning/dimensions.py); transformers' names are aliases."""

    model_type = "megachat"
    attribute_map = {
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "head_dim": "head_size",
        "max_position_embeddings": "sequence_len",
    }
    sizes = {
        **dict.fromkeys(("depth", "width", "heads", "kv_heads", "head_size", "sequence_len", "vocab_size"), 0),
        **dict.fromkeys(("windows", "norm_scales"), ()),
        "rotary_base": 100_000.0,
        "qk_scale": 1.2,
        "norm_epsilon": 1.1920929e-07,
        "value_embeddings": True,
        "lambdas": "learned",
        **dict.fromkeys(("lookup", "ngram")),
    }

    def __init__(self, **kwargs):
        for name, default in self.sizes.items():
            setattr(self, name, kwargs.pop(name, default))
        self.use_cache = kwargs.pop("use_cache", True)
        super().__init__(**({"tie_word_embeddings": False} | kwargs))


class Pass:
    """What the blocks share while new tokens pass through the model.

    padding: boolean [batch, seen + tokens], false for padding, or None. positions: int64 [batch or 1, tokens].
    """

    def __init__(self, config, ids, attention_mask, positions, cache, dtype):
        self.cache, self.seen, self.tokens = cache, cache.get_seq_length() if cache is not None else 0, ids.size(1)
        self.length, self.device = self.seen + self.tokens, ids.device
        padded = attention_mask is not None and not bool(attention_mask.all())
        self.padding = attention_mask.bool() if padded else None
        if positions is None:
            counted = torch.arange(self.length, device=self.device)[None]
            if self.padding is not None:
                counted = (self.padding.long().cumsum(1) - 1).clamp_min(0)
            positions = counted[:, self.seen :]
        exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=self.device) / config.head_size
        angles = positions[..., None].float() * (1 / config.rotary_base**exponents)
        self.cos, self.sin = angles.cos().to(dtype)[:, :, None], angles.sin().to(dtype)[:, :, None]
        self._visible: dict[int, torch.Tensor] = {}

    def rotate(self, x):
        """Rotates heads x [batch, tokens, heads, head_size] by minus their position's angles, as nanochat does."""
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * self.cos + x2 * self.sin, x2 * self.cos - x1 * self.sin), dim=-1)

    def remember(self, x, ids, layer):
        """Returns the embedding before each new token and the ids of the whole text, -1 for padding.

        x [batch, tokens, width]. Both are kept in one more layer of the cache, as keys and values, so that whatever
        reorders or crops the cache does the same to them.
        """
        if self.cache is not None:
            while len(self.cache.layers) <= layer:
                self.cache.layers.append(DynamicLayer())
            state, x, ids = self.cache.layers[layer], x[:, None], ids[:, None, :, None]
            if state.is_initialized:
                x, ids = state.update(x, ids)
            else:  # not by `update`, which before transformers 5.24 gives the values the dtype of the keys
                state.keys, state.values, state.is_initialized = x, ids, True
                state.device = x.device
            x, ids = x[:, 0], ids[:, 0, :, 0]
        previous = F.pad(x, (0, 0, 1, 0))[:, self.seen : -1]
        if self.padding is not None:
            ids = ids.masked_fill(~self.padding, -1)
            previous = previous * F.pad(self.padding, (1, 0))[:, self.seen : -1, None]
        return previous, ids

    def attend(self, block, q, k, v, window):
        """Causal attention in which a query sees itself and `window` tokens before it.

        q [batch, tokens, heads, head_size]; k, v [batch, tokens, kv_heads, head_size].
        """
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.cache is not None:
            k, v = self.cache.update(k, v, block)
        whole = self.padding is None and window >= self.length - 1 and self.tokens in (1, self.length)
        mask: dict[str, Any] = {"is_causal": self.tokens > 1} if whole else {"attn_mask": self.visible(window)}
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.size(1) != k.size(1), **mask)
        return y.transpose(1, 2).flatten(2)

    def visible(self, window):
        """Returns boolean [batch or 1, 1, tokens, seen + tokens]: which keys a query sees, at least its own."""
        if window not in self._visible:
            at = torch.arange(self.length, device=self.device)
            behind = at[self.seen :, None] - at
            visible = ((behind >= 0) & (behind <= window))[None, None]
            if self.padding is not None:
                visible = visible & self.padding[:, None, None, :] | (behind == 0)
            self._visible[window] = visible
        return self._visible[window]


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normed queries and keys; gated values may be added to its own."""

    def __init__(self, config, block):
        super().__init__()
        self.config, self.block, kv_width = config, block, config.kv_heads * config.head_size
        self.c_q = nn.Linear(config.width, config.heads * config.head_size, bias=False)
        self.c_k = nn.Linear(config.width, kv_width, bias=False)
        self.c_v = nn.Linear(config.width, kv_width, bias=False)
        self.c_proj = nn.Linear(config.heads * config.head_size, config.width, bias=False)
        add_norm_scales(self, config, query=(config.heads, config.head_size), key=(config.kv_heads, config.head_size))
        if has_value_embedding(config, block):
            self.ve_gate = nn.Linear(GATE_CHANNELS, config.kv_heads, bias=False)
        for order in config.ngram["orders"] if has(config.ngram, block) else ():
            self.add_module(f"ngram_gate_{order}", nn.Linear(GATE_CHANNELS, config.kv_heads, bias=False))

    def forward(self, x, added, now):
        """x [batch, tokens, width]; added: name of a gate -> values [batch, tokens, kv_width]."""
        heads = (*x.shape[:2], -1, self.config.head_size)
        q, k, v = self.c_q(x).view(heads), self.c_k(x).view(heads), self.c_v(x).view(heads)
        for name, values in added.items():
            gate = 3 * torch.sigmoid(getattr(self, name)(x[..., :GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * values.view(heads)
        q, k = norm(now.rotate(q), self.config, self.query_scale), norm(now.rotate(k), self.config, self.key_scale)
        q, k = q * self.config.qk_scale, k * self.config.qk_scale
        return self.c_proj(now.attend(self.block, q, k, v, self.config.windows[self.block]))


class MLP(nn.Module):
    """Two linears with a squared ReLU between them."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.width, MLP_RATIO * config.width, bias=False)
        self.c_proj = nn.Linear(MLP_RATIO * config.width, config.width, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Attention and MLP, each added to x after a norm."""

    def __init__(self, config, block):
        super().__init__()
        self.config, self.attn, self.mlp = config, Attention(config, block), MLP(config)
        add_norm_scales(self, config, attention=config.width, mlp=config.width)

    def forward(self, x, added, now):
        x = x + self.attn(norm(x, self.config, self.attention_scale), added, now)
        return x + self.mlp(norm(x, self.config, self.mlp_scale))


class Lookup(nn.Module):
    """A lookup layer: x + W_mix [norm(W_up read); x], where norm(x) reads the table rows of the token's id."""

    def __init__(self, config):
        super().__init__()
        lookup = config.lookup
        self.config, self.scale = config, config.width**-0.5 if lookup["score_scale"] == "sqrt" else 1.0
        self.keys = nn.Embedding(lookup["rows"], config.width)
        self.values = None if lookup["tied"] else nn.Embedding(lookup["rows"], config.width)
        self.w_up = nn.Linear(config.width, lookup["up_width"], bias=False)
        self.w_mix_up = nn.Linear(lookup["up_width"], config.width, bias=False)
        self.w_mix_x = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x, ids, first):
        """x [batch, tokens, width]; ids [batch, tokens]; token t has the rows first[t] to first[t + 1] - 1."""
        query = norm(x, self.config).flatten(0, 1)
        begin, ids = first[ids.flatten()], ids.flatten()
        count = first[ids + 1] - begin
        size = max(1, LOOKUP_ELEMENTS // (int(count.max()) * x.size(-1)))
        parts = zip(query.split(size), begin.split(size), count.split(size), strict=True)
        read = torch.cat([self.read(*part) for part in parts]).view(x.shape)
        return x + (self.w_mix_up(norm(self.w_up(read), self.config)) + self.w_mix_x(x))

    def read(self, query, begin, count):
        """query [tokens, width]; begin, count [tokens]: the rows of each. Products and softmax are float32."""
        offset = torch.arange(int(count.max()), device=query.device)
        missing = offset >= count[:, None]
        rows = (begin[:, None] + offset).masked_fill(missing, 0)
        keys = self.keys(rows).float()
        values = keys if self.values is None else self.values(rows).float()
        scores = (keys @ query.float().unsqueeze(2)).squeeze(2) * self.scale
        weights = scores.masked_fill(missing, -torch.inf).softmax(dim=1)
        return (weights.unsqueeze(1) @ values).squeeze(1).to(query.dtype)


class NgramTable(nn.Module):
    """The table [rows, width] of one order in one block, projected up if it is narrower than the values."""

    def __init__(self, config):
        super().__init__()
        ngram, kv_width = config.ngram, config.kv_heads * config.head_size
        self.weight = nn.Parameter(torch.zeros(ngram["rows"], ngram["width"]))
        self.up = nn.Linear(ngram["width"], kv_width, bias=False) if ngram["width"] < kv_width else None

    def forward(self, rows, pattern):
        """rows [batch, tokens], -1: none; pattern: signs [batch, tokens, width] or None."""
        values = F.embedding(rows.clamp_min(0), self.weight) * (rows >= 0).unsqueeze(-1)
        values = values if pattern is None else values * pattern
        return values if self.up is None else self.up(values)


class MegachatForCausalLM(PreTrainedModel, GenerationMixin):
    """The whole model: ids -> logits float32 [batch, tokens, vocab_size]."""

    config_class = MegachatConfig
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"]

    def __init__(self, config):
        super().__init__(config)
        rows = -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(rows, config.width)})
        self.transformer["h"] = nn.ModuleList(Block(config, block) for block in range(config.depth))
        self.smear_gate, self.smear_lambda = nn.Linear(SMEAR_CHANNELS, 1, bias=False), nn.Parameter(torch.zeros(1))
        self.resid_lambdas, self.x0_lambdas = (nn.Parameter(x * torch.ones(config.depth)) for x in (1, 0))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.value_embeds, self.lookup, self.ngram = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for block in range(config.depth):
            if has_value_embedding(config, block):
                self.value_embeds[str(block)] = nn.Embedding(rows, config.kv_heads * config.head_size)
            if has(config.lookup, block):
                self.lookup[str(block)] = Lookup(config)
            if has(config.ngram, block):
                tables = {str(order): NgramTable(config) for order in config.ngram["orders"]}
                self.ngram[str(block)] = nn.ModuleDict(tables)
        self.lm_head = nn.Linear(config.width, rows, bias=False)
        add_norm_scales(self, config, embedding=config.width, final=config.width)
        self._first_rows: torch.Tensor | None = None
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer["wte"]

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """input_ids [batch, tokens]; attention_mask [batch, tokens seen and new], 0 for padding on either side."""
        cache = past_key_values if cache is None else cache
        if input_ids is None:
            raise ValueError("megachat's model needs input_ids, because its tables are read by token")
        if getattr(cache, "is_compileable", False) or (attention_mask is not None and attention_mask.dim() != 2):
            message = "megachat's model takes attention_mask [batch, tokens]: leave cache_implementation at its default"
            raise ValueError(message)
        if cache is None and (self.config.use_cache and not self.training if use_cache is None else use_cache):
            cache = DynamicCache()
        hidden = self.hidden_states(input_ids, attention_mask, position_ids, cache)
        hidden = hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        products = F.linear(hidden, self.lm_head.weight[: self.config.vocab_size]).float()
        logits = LOGIT_CAP * torch.tanh(products / LOGIT_CAP)
        sizes = {"vocab_size": self.config.vocab_size} | kwargs
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, **sizes)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE: cache})

    def hidden_states(self, ids, attention_mask, positions, cache):
        """Returns the input of lm_head [batch, tokens, width]."""
        config = self.config
        x = norm(self.transformer["wte"](ids), config, self.embedding_scale)
        now = Pass(config, ids, attention_mask, positions, cache, x.dtype)
        previous, text = now.remember(x, ids, config.depth)
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        x = x0 = backout = x + gate * previous
        orders = config.ngram["orders"] if config.ngram else ()
        hashes = {str(order): ngram_hashes(text, order, config.ngram, ids.size(1)) for order in orders}
        blocks: Any = self.transformer["h"]
        for number, block in enumerate(blocks):
            name = str(number)
            x = self.resid_lambdas[number] * x + self.x0_lambdas[number] * x0
            added = {"ve_gate": self.value_embeds[name](ids)} if name in self.value_embeds else {}
            for order, table in self.ngram[name].named_children() if name in self.ngram else ():
                added[f"ngram_gate_{order}"] = table(*hashes[order])
            x = block(x, added, now)
            if name in self.lookup:
                x = self.lookup[name](x, ids, self.first_rows(ids.device))
            if number == config.depth // 2:
                backout = x
        return norm(x - self.backout_lambda.to(x.dtype) * backout, config, self.final_scale)

    def first_rows(self, device):
        """Returns int64 [vocab_size + 1]: the first row of each token in the tables of lookup layers."""
        if self._first_rows is None or self._first_rows.device != device:
            rows = map(int, self.config.lookup["rows_per_token"].split())
            self._first_rows = torch.tensor([0, *accumulate(rows)], device=device)
        return self._first_rows


def norm(x, config, scale=None):
    """Applies the root-mean-square norm over the last dim, then multiplies by `scale`, if there is one."""
    x = F.rms_norm(x, (x.size(-1),), eps=config.norm_epsilon)
    return x if scale is None else x * scale.to(x.dtype)


def add_norm_scales(module, config, **shapes):
    """Registers the learned scales of norms, None for those that the model lacks. shapes: by name."""
    for name, shape in shapes.items():
        scale = nn.Parameter(torch.ones(shape)) if name in config.norm_scales else None
        module.register_parameter(f"{name}_scale", scale)


def has(part, block):
    """Whether lookup layers or n-gram values, a dict of their sizes or None, are in the block."""
    return part is not None and block in part["blocks"]


def has_value_embedding(config, block):
    """Whether the block has a value embedding: every other block and always the last, if the model has any."""
    return config.value_embeddings and block % 2 == (config.depth - 1) % 2


def ngram_hashes(text, order, ngram, tokens):
    """Returns table rows [batch, tokens], -1 for none, and signs [batch, tokens, width] or None of the last tokens.

    text: ids int64 [batch, seen + tokens], -1 for padding. See megachat/kernels/ngram.py.
    """
    text = F.pad(text, (order - 1, 0), value=-1)
    end = text.size(1)
    windows = [text[:, end - tokens - distance : end - distance] for distance in range(order)]
    row = (_shifted(_hash(windows, ngram["seed"], 0), 32) * ngram["rows"]) >> 32
    inside = windows[-1] >= 0
    for window in windows[:-1]:
        inside = inside & (window != ngram["bos"])
    row = torch.where(inside, row, -1)
    if not ngram["sign_trick"]:
        return row, None
    counter = torch.arange(1, -(-ngram["width"] // 64) + 1, device=text.device) * _signed(_GOLDEN)
    words = _finalize(_hash(windows, ngram["seed"], 1).unsqueeze(-1) + counter)
    bits = (words.unsqueeze(-1) >> torch.arange(64, device=text.device)) & 1
    return row, (1 - 2 * bits.to(torch.int8)).flatten(2)[..., : ngram["width"]]


def _hash(windows, seed, purpose):
    start, hashed = _split_mix(_split_mix(seed) + 2 * len(windows) + purpose), 0
    for index, window in enumerate(windows):
        hashed = hashed ^ ((window + 1) * _signed(_split_mix(start + index * _GOLDEN) | 1))
    return _finalize(hashed)


def _finalize(value):
    """MurmurHash3's 64-bit finalizer."""
    value = (value ^ _shifted(value, 33)) * _signed(0xFF51AFD7ED558CCD)
    value = (value ^ _shifted(value, 33)) * _signed(0xC4CEB9FE1A85EC53)
    return value ^ _shifted(value, 33)


def _shifted(value, by):
    """Shifts right with zeros; torch's shift of int64 repeats the sign."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def _signed(value):
    return value - (1 << 64) if value >> 63 else value


def _split_mix(value):
    """Returns SplitMix64's output, unsigned."""
    value = (value + _GOLDEN) & ((1 << 64) - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return value ^ (value >> 31)
