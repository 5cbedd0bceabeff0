"""Greedy continuations of the configured prompts, by all ranks of a run in training or of an evaluation."""

import numpy as np

from megachat.config import Config
from megachat.data.tokenizer import Tokenizer
from megachat.evals.cached import OnRanks
from megachat.evals.generation import generate
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import Mesh
from megachat.planning.plan import Plan


def sampled(config: Config, plan: Plan, mesh: Mesh, engine: Engine, tokenizer: Tokenizer) -> dict[str, str]:
    """Prompt -> the prompt and what follows, the same on every rank; all call it."""
    prompts, asked = config.evaluate.prompts, config.evaluate
    if not prompts:
        return {}
    ids = [np.concatenate(([tokenizer.bos], tokenizer.encode(prompt))) for prompt in prompts]
    model = OnRanks(engine, mesh, plan.dims, multiple=mesh.tensor.size if config.parallel.sequence else 1)
    found = generate(model, ids, tokens=asked.sample_tokens, slide=True)
    return {
        prompt: tokenizer.decode([*own[1:], *more.new]) for prompt, own, more in zip(prompts, ids, found, strict=True)
    }
