"""Continue prompts with a checkpoint of any layout or format, in one process.

    megachat generate --checkpoint runs/demo --prompt "The capital of France is"

Without --prompt and --prompts, prompts are read from standard input, one per line; on a terminal, after "> ". A single
text is shown as it grows; several are computed together and shown in their order. A continuation ends after --tokens,
at a --stop, where the model starts another document, or where the model's sequence length is full. The last is reported
on standard error. --slide continues with the last tokens only, which are then computed again for every token. The same
seed gives the same tokens.
"""

import argparse
import sys
from pathlib import Path

from megachat.commands.options import Parser, importing, require_minimum


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat generate`."""
    add = parser.add_argument
    checkpoint = "a run folder (its newest checkpoint), a step folder, or a folder of another format"
    add("--checkpoint", type=Path, required=True, help=checkpoint)
    add("--tokenizer", type=Path, help="the checkpoint's tokenizer folder, if it is not where the config says")
    add("--prompt", action="append", default=[], help="text to continue; repeatable")
    add("--prompts", metavar="FILE", help="prompts to continue, one per line; - is standard input")
    add("--temperature", type=float, default=0.8, help="0 takes the most likely token (default 0.8)")
    add("--top-k", type=int, default=0, help="choose among this many most likely tokens (default 0: all)")
    top_p = "choose among the fewest tokens that together have this probability (default 1)"
    add("--top-p", type=float, default=1.0, help=top_p)
    add("--seed", type=int, default=0, help="of the random choices (default 0)")
    add("--tokens", type=int, default=128, help="new tokens at most (default 128)")
    stop = "text, or a special token's name, before which the continuation ends; repeatable"
    add("--stop", action="append", default=[], help=stop)
    add("--slide", action="store_true", help="continue beyond the model's sequence length")
    add("--batch", type=int, default=8, help="prompts computed together (default 8)")
    add("--json", action="store_true", help="print one line of JSON per prompt: prompt, text, tokens, why it ended")
    dtypes = ("auto", "float32", "bfloat16")
    add("--dtype", choices=dtypes, default="auto", help="compute dtype (default auto: by device)")


def run(options: argparse.Namespace) -> None:
    """Continues the prompts."""
    require_minimum(options, tokens=1, batch=1)
    with importing():
        from megachat.convert.formats import open_checkpoint
        from megachat.convert.tokenizers import load_tokenizer_of
        from megachat.evals.growing_text import parse_stops
        from megachat.evals.sampling import Sampling
        from megachat.programs.generate import PromptContinuer, load_model, read_prompts

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    reader = open_checkpoint(options.checkpoint)
    tokenizer, _ = load_tokenizer_of(reader, options.tokenizer)
    stop = parse_stops(options.stop, tokenizer)
    prompts = options.prompt + (read_prompts(options.prompts) if options.prompts else [])
    if not prompts and (options.json or not sys.stdin.isatty()):
        prompts = read_prompts("-")
    model = load_model(reader, options.dtype)
    continuer = PromptContinuer(model, tokenizer, sampling, stop, options.tokens, options.slide)
    if prompts:
        continuer.run_batches(prompts, options.batch, as_json=options.json)
    else:
        continuer.run_interactively()
