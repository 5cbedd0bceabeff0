"""Passes over a KV cache, and generation with one, through the engine and so on every layout."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from megachat.config import Config
from megachat.data.tokenizer import Tokenizer
from megachat.evals.generation import Choose, Passes, generate
from megachat.model.cache import Chunk, set_past
from megachat.model.gpt import last_logits
from megachat.parallel.collectives import all_reduce
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import Mesh
from megachat.parallel.tensor import vocabulary_part
from megachat.planning.dimensions import Dimensions
from megachat.planning.plan import Plan


def evaluate_chunks(
    engine: Engine, micro_batches: Sequence[tuple], chunks: Sequence[Chunk], measure: nn.Module | None = None
) -> list[torch.Tensor]:
    """`engine.evaluate`, where micro-batch i is the pass of chunks[i]; all ranks call it alike.

    The ids [rows, tokens] of all micro-batches have one shape: `tokens` is a multiple of the tensor axis under parallel.sequence, and at least
    every chunk's lengths; rows are those of the chunk. Each rank keeps what its own stage and heads compute.
    """
    try:
        with torch.compiler.set_stance("force_eager"):  # each shape would be compiled anew
            return engine.evaluate(
                micro_batches, measure, before_forward=lambda number: set_past(engine.module, chunks[number])
            )
    finally:
        set_past(engine.module, None)


class EngineModel:
    """The model under its engine, on any layout: all ranks call `generate` with it. The ranks of the data axis do the same.

    multiple: of which the tokens of a pass must be one; the tensor axis's size under parallel.sequence.
    """

    def __init__(self, engine: Engine, mesh: Mesh, dims: Dimensions, *, multiple: int = 1):
        self.engine, self.mesh, self.dims, self.multiple = engine, mesh, dims, multiple
        self.parts = mesh.pipeline.size  # so that no stage waits while another works

    def next_tokens(self, passes: Passes, chunks: Sequence[Chunk], choose: Choose) -> list[int]:
        """The chosen tokens of all passes' rows, on every rank."""
        chosen = evaluate_chunks(self.engine, passes, chunks, _Chosen(self.mesh, self.dims, choose))
        found = torch.zeros(sum(len(ids) for ids, _ in passes), dtype=torch.int64, device=self.mesh.device)
        if chosen:
            found += torch.cat(chosen)
        all_reduce(found, self.mesh.world, name="chosen tokens")  # all ranks but one add zeros
        return found.tolist()


class _Chosen(nn.Module):
    """The head's output and a pass's labels -> its tokens [rows] on the rank that chooses, zeros on the others of the last stage."""

    def __init__(self, mesh: Mesh, dims: Dimensions, choose: Choose):
        super().__init__()
        self.mesh, self.dims, self.choose = mesh, dims, choose

    def forward(self, output: tuple[torch.Tensor, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        found = last_logits(output, labels[:, 0], self.dims, vocabulary_part(self.dims.padded_vocab, self.mesh.tensor))
        if self.mesh.stage.rank:
            return torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
        return self.choose(found, labels[:, 1]).to(labels.device)


def sample_prompts(config: Config, plan: Plan, mesh: Mesh, engine: Engine, tokenizer: Tokenizer) -> dict[str, str]:
    """Prompt -> the prompt and what follows, the same on every rank; all call it."""
    prompts, asked = config.evaluate.prompts, config.evaluate
    if not prompts:
        return {}
    ids = [np.concatenate(([tokenizer.bos], tokenizer.encode(prompt))) for prompt in prompts]
    model = EngineModel(engine, mesh, plan.dims, multiple=mesh.tensor.size if config.parallel.sequence else 1)
    found = generate(model, ids, tokens=asked.sample_tokens, slide=True)
    return {
        prompt: tokenizer.decode([*own[1:], *more.new]) for prompt, own, more in zip(prompts, ids, found, strict=True)
    }
