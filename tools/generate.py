"""Continue prompts with a checkpoint of any layout or format, in one process: `python tools/generate.py --checkpoint runs/demo --prompt "The"`.

Without --prompt and --prompts, prompts are asked for on a terminal, and read from standard input, one a line, where it is none. One text appears
as it grows; several are computed together and appear in their order. A continuation ends after --tokens, at a --stop, where the model begins another
document, or where prompt and continuation fill the model's sequence length (a remark on standard error says so; --slide goes on, seeing the
last tokens only, and computes them anew for each). The same seed gives the same tokens; --temperature 0 takes the most likely ones.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.convert.architecture import build_model  # noqa: E402
from megachat.convert.formats import open_checkpoint  # noqa: E402
from megachat.convert.tokenizers import load_tokenizer_of  # noqa: E402
from megachat.data.tokenizer import Tokenizer  # noqa: E402
from megachat.device import choose_compute_dtype  # noqa: E402
from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402
from megachat.evals.generation import LocalModel, check_prompt, generate  # noqa: E402
from megachat.evals.growing_text import GrowingText, parse_stops  # noqa: E402
from megachat.evals.sampling import Sampling  # noqa: E402
from megachat.job.launch import bootstrap_environment, choose_device  # noqa: E402
from megachat.model.gpt import ModelOptions  # noqa: E402


@dataclass(frozen=True)
class Continuing:
    """What continues prompts, as asked for on the command line."""

    model: LocalModel
    tokenizer: Tokenizer
    sampling: Sampling
    stop: tuple
    tokens: int
    slide: bool

    def ids(self, prompt: str, number: int) -> list[int]:
        """Raises UserError when it is too long."""
        ids = self.tokenizer.encode(prompt, bos=True).tolist()
        check_prompt(ids, number, self.model.dims.sequence_len, slide=self.slide)
        return ids


class Screen:
    """Texts on standard output in their order, each begun with its prompt: the first that goes on as it grows, later ones once it is their turn."""

    def __init__(self, prompts: list[str], texts: list[GrowingText]):
        self.prompts, self.texts, self.ended, self.current = prompts, texts, [False] * len(texts), 0
        print(prompts[0], end="", flush=True)

    def show(self, place: int, ended: bool) -> None:
        """A text has grown, or ended."""
        self.ended[place] = ended
        while self.current < len(self.texts):
            ended = self.ended[self.current]
            print(self.texts[self.current].next_shown(last=ended), end="\n" if ended else "", flush=True)
            if not ended:
                break
            self.current += 1
            if self.current < len(self.texts):
                print(f"\n{self.prompts[self.current]}", end="", flush=True)


def continued(by: Continuing, prompts: list[str], first: int, screen=Screen) -> list[dict]:
    """The continuations of prompts, of which the first has the number `first`. screen: what shows them on the way; None: nothing."""
    ids = [by.ids(prompt, first + place) for place, prompt in enumerate(prompts)]
    texts = [GrowingText(by.tokenizer, by.stop) for _ in prompts]
    shows = screen(prompts, texts) if screen else None

    def ends(number: int, new: list[int]) -> bool:
        texts[number - first].add(new[-1])
        return texts[number - first].ended

    def told(number: int, token: int, why: str) -> None:
        if shows:
            shows.show(number - first, bool(why))

    found = generate(
        by.model, ids, tokens=by.tokens, sampling=by.sampling, stop=ends, on_token=told, slide=by.slide, first=first
    )
    for number, row in enumerate(found, first + 1):
        if row.end_reason == "length":
            remark = f"remark: prompt {number} and its continuation fill the model's {by.model.dims.sequence_len} tokens, where it ended"
            print(remark, file=sys.stderr, flush=True)
    told_of = zip(prompts, texts, found, strict=True)
    return [
        {"prompt": prompt, "text": text.text, "tokens": row.tokens, "why": row.end_reason}
        for prompt, text, row in told_of
    ]


def batches(by: Continuing, prompts: list[str], rows: int, *, as_json: bool) -> None:
    """All prompts, `rows` at a time; with as_json a line of JSON each."""
    for number, prompt in enumerate(prompts):
        by.ids(prompt, number)  # what is wrong with one is told before anything is computed
    for first in range(0, len(prompts), rows):
        if first and not as_json:
            print()
        for line in continued(by, prompts[first : first + rows], first, None if as_json else Screen):
            if as_json:
                print(json.dumps(line, ensure_ascii=False), flush=True)


def interactive(by: Continuing) -> None:
    """A prompt a line until the end of input; one that cannot be continued is told and asked for again."""
    number = 0
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        if not prompt:
            continue
        try:
            continued(by, [prompt], number)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        number += 1


def lines_of(path: str) -> list[str]:
    """The lines of a file, or of standard input for "-". Raises UserError when they cannot be read or there are none."""
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        lines = content.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompts cannot be read from {'standard input' if path == '-' else path} ({error}): give UTF-8 text, one a line"
        ) from None
    if not lines:
        raise UserError(
            f"{'standard input' if path == '-' else path} holds no prompt: give one a line, or use --prompt"
        )
    return lines


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="a run's folder (its newest checkpoint), a step's, or one of another format",
    )
    parser.add_argument("--tokenizer", type=Path, help="its folder, where it is not found by itself")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="prompts to continue, one a line; - is standard input")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="choose from so many most likely tokens (default 0: all)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="choose from the fewest tokens that have this probability together (default 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default 0)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens at most (default 128)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help="text, or a special token's name, at which to end; may be given several times",
    )
    parser.add_argument("--slide", action="store_true", help="go on beyond the model's sequence length")
    parser.add_argument("--batch", type=int, default=8, help="prompts computed together (default 8)")
    parser.add_argument(
        "--json", action="store_true", help="a line of JSON a prompt: prompt, text, tokens, why it ended"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="to compute in (default auto: by the device)",
    )
    return parser


@user_errors_end_the_program
def main(arguments: list[str] | None = None) -> None:
    asked = build_parser().parse_args(arguments)
    sampling = Sampling(asked.temperature, asked.top_k, asked.top_p, asked.seed)
    for option in ("tokens", "batch"):
        if getattr(asked, option) < 1:
            raise UserError(f"--{option} is {getattr(asked, option)}: give 1 or more")
    opened = open_checkpoint(asked.checkpoint)
    tokenizer, _ = load_tokenizer_of(opened, asked.tokenizer)
    stop, device = parse_stops(asked.stop, tokenizer), choose_device(bootstrap_environment())
    prompts = asked.prompt + (lines_of(asked.prompts) if asked.prompts else [])
    if not prompts and (asked.json or not sys.stdin.isatty()):
        prompts = lines_of("-")
    options = ModelOptions(compute_dtype=choose_compute_dtype(asked.dtype, device)[0])
    model = LocalModel(build_model(opened, options).to(device), opened.dims)
    by = Continuing(model, tokenizer, sampling, stop, asked.tokens, asked.slide)
    batches(by, prompts, asked.batch, as_json=asked.json) if prompts else interactive(by)


if __name__ == "__main__":
    main()
