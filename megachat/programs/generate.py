"""Continues prompts with a checkpoint in one process, and shows the texts while they grow."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megachat.activity import announced, log_line
from megachat.convert.architecture import build_model
from megachat.convert.reader import CheckpointReader
from megachat.data.tokenizer import Tokenizer
from megachat.device import choose_compute_dtype, slow_dtype_warning
from megachat.errors import UserError, raise_if_unreadable
from megachat.evals.generation import LocalModel, check_prompt, generate
from megachat.evals.growing_text import GrowingText
from megachat.evals.sampling import Sampling
from megachat.files import lfs_problem
from megachat.job.launch import bootstrap_environment, choose_device
from megachat.model.gpt import ModelOptions


def load_model(reader: CheckpointReader, dtype: str) -> LocalModel:
    """Loads a checkpoint's model onto this process's device. dtype: "auto", "float32" or "bfloat16"."""
    device = choose_device(bootstrap_environment())
    if warning := slow_dtype_warning(dtype, device):
        log_line(warning)
    options = ModelOptions(compute_dtype=choose_compute_dtype(dtype, device)[0])
    with announced(f"loading {reader.folder}", write=log_line):
        return LocalModel(build_model(reader, options).to(device), reader.dims)


def read_prompts(path: str) -> list[str]:
    """Returns the lines of a file, or of standard input for "-". Raises UserError if it cannot be read or is empty.

    Lines end with \\n or \\r\\n only, unlike those of str.splitlines(). A byte order mark is not part of a prompt.
    """
    name = "standard input" if path == "-" else path
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise_if_unreadable(f"the file of prompts {name}", error)
        raise UserError(f"cannot read prompts from {name} ({error}): give UTF-8 text, one prompt per line") from None
    if pointer := lfs_problem(content):
        raise UserError(f"the file of prompts {name} {pointer}")
    if not text:
        raise UserError(f"{name} has no prompt: give one per line, or use --prompt")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


@dataclass(frozen=True)
class PromptContinuer:
    """A model and the settings of the command line. stop: from growing_text.parse_stops. tokens: new tokens at most."""

    model: LocalModel
    tokenizer: Tokenizer
    sampling: Sampling
    stop: tuple
    tokens: int
    slide: bool

    def run_batches(self, prompts: Sequence[str], batch: int, *, as_json: bool) -> None:
        """Continues all prompts, `batch` at a time, and shows the texts or prints one line of JSON per prompt."""
        for number, prompt in enumerate(prompts):
            self._encode(prompt, number)  # reports a bad prompt before anything is computed
        for first in range(0, len(prompts), batch):
            if first and not as_json:
                print()
            for result in self.continue_prompts(prompts[first : first + batch], first, show=not as_json):
                if as_json:
                    print(json.dumps(result, ensure_ascii=False), flush=True)

    def run_interactively(self) -> None:
        """Reads and continues one prompt at a time until the end of input. A bad prompt is reported and skipped."""
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
                self.continue_prompts([prompt], number, show=True)
            except UserError as error:
                log_line(f"error: {error}")
            number += 1

    def continue_prompts(self, prompts: Sequence[str], first: int, *, show: bool) -> list[dict]:
        """Returns continuations as JSON values. first: number of the first prompt. show: prints texts as they grow."""
        ids = [self._encode(prompt, number) for number, prompt in enumerate(prompts, first)]
        texts = [GrowingText(self.tokenizer, self.stop) for _ in prompts]
        display = _Display(prompts, texts) if show else None

        def stop(number: int, new: list[int]) -> bool:
            texts[number - first].add(new[-1])
            return texts[number - first].ended

        def on_token(number: int, token: int, end_reason: str) -> None:
            if display:
                display.update(number - first, ended=bool(end_reason))

        continuations = generate(
            self.model,
            ids,
            tokens=self.tokens,
            sampling=self.sampling,
            slide=self.slide,
            first=first,
            stop=stop,
            on_token=on_token,
        )
        results = []
        for number, (prompt, text, row) in enumerate(zip(prompts, texts, continuations, strict=True), first + 1):
            if row.end_reason == "length":
                limit = f"the model's {self.model.dims.sequence_len} tokens"
                remark = f"remark: prompt {number} and its continuation fill {limit}; the text ends there"
                log_line(remark)
            results.append({"prompt": prompt, "text": text.text, "tokens": row.tokens, "why": row.end_reason})
        return results

    def _encode(self, prompt: str, number: int) -> list[int]:
        ids = self.tokenizer.encode(prompt, bos=True).tolist()
        check_prompt(ids, number, self.model.dims.sequence_len, slide=self.slide)
        return ids


class _Display:
    """Prints texts in order, each after its prompt. Of the unfinished texts, only the first one is shown."""

    def __init__(self, prompts: Sequence[str], texts: Sequence[GrowingText]):
        self.prompts, self.texts, self.ended, self.current = prompts, texts, [False] * len(texts), 0
        print(prompts[0], end="", flush=True)

    def update(self, index: int, *, ended: bool) -> None:
        """Prints what a text that has grown or ended allows to print."""
        self.ended[index] = ended
        while self.current < len(self.texts):
            ended = self.ended[self.current]
            print(self.texts[self.current].next_shown(last=ended), end="\n" if ended else "", flush=True)
            if not ended:
                break
            self.current += 1
            if self.current < len(self.texts):
                print(f"\n{self.prompts[self.current]}", end="", flush=True)
