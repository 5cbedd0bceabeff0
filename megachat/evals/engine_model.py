"""Passes over a KV cache and generation through the engine, on any layout."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from megachat.config import Config
from megachat.data.tokenizer import Tokenizer
from megachat.evals.generation import Choose, Passes, generate
from megachat.evals.local_engine import EvaluationEngine
from megachat.kernels.uncompiled import compiles_nothing
from megachat.model.cache import Chunk, set_past
from megachat.model.gpt import last_logits
from megachat.parallel.collectives import all_reduce
from megachat.parallel.mesh import Mesh
from megachat.parallel.tensor import vocabulary_part
from megachat.planning.dimensions import Dimensions
from megachat.planning.plan import Plan


def evaluate_chunks(
    engine: EvaluationEngine,
    micro_batches: Sequence[tuple],
    chunks: Sequence[Chunk | None],
    measure: nn.Module | None = None,
) -> list[torch.Tensor]:
    """Calls `engine.evaluate` with chunks[i] as the cached past of micro-batch i. All ranks call it alike.

    The ids [rows, tokens] of all micro-batches have one shape. `rows` is the chunk's; `tokens` is at least the longest
    of the chunks' lengths, and a multiple of the tensor axis's size under parallel.sequence. Each rank caches what its
    stage and its heads compute.
    """
    try:
        with compiles_nothing():  # otherwise every new shape would be compiled
            return engine.evaluate(
                list(micro_batches), measure, before_forward=lambda number: set_past(engine.module, chunks[number])
            )
    finally:
        set_past(engine.module, None)


class EngineModel:
    """The model under its engine, on any layout. All ranks call `generate` with it, those of the data axis redundantly.

    multiple: the tokens per row of a pass must be a multiple of it; the tensor axis's size under parallel.sequence.
    """

    def __init__(self, engine: EvaluationEngine, mesh: Mesh, dims: Dimensions, *, multiple: int = 1):
        self.engine, self.mesh, self.dims, self.multiple = engine, mesh, dims, multiple
        self.parts = mesh.pipeline.size  # one micro-batch per stage keeps all stages busy

    def next_tokens(self, passes: Passes, chunks: Sequence[Chunk], choose: Choose) -> list[int]:
        """Returns the chosen token of every row of all passes, the same on every rank."""
        chosen = evaluate_chunks(self.engine, passes, chunks, _TokenChoice(self.mesh, self.dims, choose))
        tokens = torch.zeros(sum(len(ids) for ids, _ in passes), dtype=torch.int64, device=self.mesh.device)
        if chosen:
            tokens += torch.cat(chosen)
        all_reduce(tokens, self.mesh.world, name="chosen tokens")  # all ranks but one contribute zeros
        return tokens.tolist()


class _TokenChoice(nn.Module):
    """Maps the head's output and labels to tokens [rows], on the last stage: its first rank's choice, else zeros."""

    def __init__(self, mesh: Mesh, dims: Dimensions, choose: Choose):
        super().__init__()
        self.mesh, self.dims, self.choose = mesh, dims, choose

    def forward(self, output: tuple[torch.Tensor, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        part = vocabulary_part(self.dims.padded_vocab, self.mesh.tensor)
        logits = last_logits(output, labels[:, 0], self.dims, part)
        if self.mesh.stage.rank:
            return torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
        return self.choose(logits, labels[:, 1]).to(labels.device)


def sample_prompts(
    config: Config, plan: Plan, mesh: Mesh, engine: EvaluationEngine, tokenizer: Tokenizer
) -> dict[str, str]:
    """Continues the configured prompts greedily. Returns prompt -> full text; all ranks call it and get the same."""
    prompts = config.evaluate.prompts
    if not prompts:
        return {}
    ids = [np.concatenate(([tokenizer.bos], tokenizer.encode(prompt))) for prompt in prompts]
    model = EngineModel(engine, mesh, plan.dims, multiple=mesh.tensor.size if config.parallel.sequence else 1)
    continuations = generate(model, ids, tokens=config.evaluate.sample_tokens, slide=True)
    return {
        prompt: tokenizer.decode([*prompt_ids[1:], *continuation.tokens])
        for prompt, prompt_ids, continuation in zip(prompts, ids, continuations, strict=True)
    }
