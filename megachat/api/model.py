"""Uses a trained model from Python, in one process and without torch.distributed: logits, text, evaluations."""

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from megachat.config import Config
from megachat.convert.architecture import build_model
from megachat.convert.saved_model import SavedModel, open_saved_model
from megachat.data.tokenizer import Tokenizer
from megachat.device import choose_compute_dtype, dtype_name, this_device
from megachat.errors import UserError
from megachat.evals.bpb import bits_per_byte
from megachat.evals.core import Evaluator, evaluate_bundle
from megachat.evals.core_bundle import Bundle, check_max_per_task, open_bundle
from megachat.evals.core_prompts import check_questions, row_limit
from megachat.evals.generation import LocalModel, check_prompt, generate, generate_tokens
from megachat.evals.growing_text import GrowingText, parse_stops
from megachat.evals.local_engine import LocalEngine
from megachat.evals.sampling import Sampling
from megachat.evals.sources import TextRows, read_tokens
from megachat.model.gpt import Loss, ModelOptions, logits, run_layers
from megachat.parallel.mesh import local_mesh
from megachat.planning.dimensions import Dimensions
from megachat.planning.plan import Plan

_DTYPES = ("auto", "float32", "bfloat16", "float16")
Ids = Sequence[int] | np.ndarray | torch.Tensor


class GPT(nn.Module):
    """The network: ids [tokens] or [rows, tokens] int64 -> logits [tokens or rows, tokens, vocab_size] float32.

    layers: the embedding, the blocks and the head, as modules of megachat/model/gpt.py. It is in evaluation mode, and
    its parameters require no gradients.
    """

    def __init__(self, layers: nn.ModuleList, dims: Dimensions):
        super().__init__()
        self.layers, self.dims = layers, dims

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = logits(run_layers(self.layers, ids if ids.ndim > 1 else ids[None]), self.dims)
        return rows if ids.ndim > 1 else rows[0]


class Model:
    """A trained model, from `megachat.load`.

    module: the network (GPT). tokenizer: its tokenizer. config: the run's settings. plan: what follows from them, such
    as the model's sizes in plan.dims. step: of the checkpoint. folder: the checkpoint's. device, dtype: of its
    computation.
    """

    def __init__(self, saved: SavedModel, layers: nn.ModuleList, dtype: torch.dtype):
        self.tokenizer: Tokenizer = saved.tokenizer
        self.config: Config = saved.config
        self.plan: Plan = saved.training
        self.step, self.folder = saved.step, saved.reader.folder
        self.module, self.dtype = GPT(layers, saved.reader.dims), dtype
        self.device = next(layers.parameters()).device

    def __repr__(self) -> str:
        dims, dtype = self.plan.dims, dtype_name(self.dtype)
        return f"<megachat.Model {self.folder}: depth {dims.depth}, width {dims.width}, {dtype} on {self.device}>"

    @torch.no_grad()
    def logits(self, text: str | Ids) -> torch.Tensor:
        """Returns the logits [tokens, vocab_size] float32 at every position of a text or of token ids, on the device.

        A text's first token is BOS, as in training; ids are used as they are. Up to ten times the model's sequence_len
        is computed, but positions beyond sequence_len were not trained.

        Raises TypeError for another type than text or integers, ValueError for no or too many tokens, or ids outside of
        the vocabulary.
        """
        ids = self._ids(text)
        if not 1 <= len(ids) <= self.plan.dims.longest_row:
            raise ValueError(f"the text has {len(ids)} tokens: give 1 to {self.plan.dims.longest_row}")
        return self.module(torch.from_numpy(ids).to(self.device))

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Collection[str] = (),
        slide: bool = False,
        stream: bool = False,
    ) -> Any:
        """Continues a prompt, or several at once, as tools/generate.py does; the same seed gives the same text.

        Returns the continuation without the prompt as a str; for a list of prompts, a list of str. stream: returns an
        iterator over the parts of one continuation instead, while they are generated. tokens: new tokens at most.
        temperature: 0 takes the most likely token. top_k: choose among this many most likely tokens, 0 for all. top_p:
        of these, among the fewest that together have this probability. stop: texts, or names of special tokens, before
        which a continuation ends. It also ends where the model starts another document, and at the model's sequence_len
        unless slide is true: then the model sees the last sequence_len tokens.

        Raises TypeError and ValueError for a prompt or setting of another type or out of range.
        """
        prompts = _texts("prompt", prompt)
        _require_count("tokens", tokens)
        if stream and not isinstance(prompt, str):
            raise TypeError(f"stream=True takes one prompt as a str, not {len(prompts)} prompts")
        with _as_value_errors():
            sampling = Sampling(temperature, top_k, top_p, seed)
            stops = parse_stops(tuple(_texts("stop", stop)), self.tokenizer)
            ids = [self.tokenizer.encode(text, bos=True) for text in prompts]
            for number, row in enumerate(ids):
                check_prompt(row, number, self.plan.dims.sequence_len, slide=slide)
        texts = [GrowingText(self.tokenizer, stops) for _ in prompts]

        def ended(number: int, new: list[int]) -> bool:
            texts[number].add(new[-1])
            return texts[number].ended

        model = LocalModel(self.module.layers, self.plan.dims)
        settings: dict[str, Any] = {"tokens": tokens, "sampling": sampling, "stop": ended, "slide": slide}
        if stream:
            events = generate_tokens(model, ids, **settings)
            return (part for _, _, why in events if (part := texts[0].next_shown(last=bool(why))))
        generate(model, ids, **settings)
        return texts[0].text if isinstance(prompt, str) else [text.text for text in texts]

    def bits_per_byte(self, texts: str | Sequence[str]) -> float:
        """Returns the mean bits per byte of UTF-8 that the model needs for the texts, comparable between tokenizers.

        The texts follow each other uncropped, each after a BOS, and are cut into rows of sequence_len tokens, as in
        launch/evaluate.py for each source of a data folder.

        Raises TypeError for other values than texts, ValueError if all are empty.
        """
        tokens = read_tokens([[text for text in _texts("texts", texts) if text]], self.tokenizer)
        if not len(tokens):
            raise ValueError(f"texts is {texts!r}: give at least one text that is not empty")
        mesh, row = local_mesh(self.device), min(self.plan.dims.sequence_len, len(tokens) - 1)
        rows = TextRows(
            tokens, tokens=row, micro_rows=min(self.plan.micro_rows, -(-(len(tokens) - 1) // row)), mesh=mesh
        )
        return bits_per_byte(self._engine(), rows, mesh)

    def _engine(self) -> LocalEngine:
        token_bytes = torch.from_numpy(self.tokenizer.token_bytes())
        return LocalEngine(self.module.layers, Loss(self.plan.dims, token_bytes))

    def _ids(self, text: str | Ids) -> np.ndarray:
        """Returns the ids of a text, or the given ones, int64 [tokens]."""
        if isinstance(text, str):
            return self.tokenizer.encode(text, bos=True).astype(np.int64)
        ids = np.asarray(text.cpu() if isinstance(text, torch.Tensor) else text)
        if ids.ndim == 1 and not len(ids):
            return ids.astype(np.int64)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise TypeError(f"give a text or a sequence of token ids, not {type(text).__name__} {_argument_text(text)}")
        low, high, size = int(ids.min()), int(ids.max()), self.plan.dims.vocab_size
        if low < 0 or high >= size:
            raise ValueError(f"the ids have {low if low < 0 else high}: give ids from 0 to {size - 1}")
        return ids.astype(np.int64)


def load(
    path: str | os.PathLike,
    *,
    step: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    tokenizer: str | os.PathLike | None = None,
) -> Model:
    """Loads a model, whatever layout or program wrote it.

    path: a run folder, a step folder, or a folder of nanochat, of safetensors or of transformers. step: which one of a
    folder that has several, None for the newest. device: "auto" is a GPU if there is one, else the CPU. dtype: of the
    computation, "float32", "bfloat16", "float16", or "auto" by device. tokenizer: its folder, if it is not where the
    checkpoint says.

    Raises megachat.UserError if there is no such checkpoint or tokenizer, ValueError for another device or dtype.
    """
    where = _device(device)
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}: give {', '.join(_DTYPES)}")
    compute_dtype = choose_compute_dtype(name, where)[0]
    if step is not None and type(step) is not int:
        raise TypeError(f"step is {type(step).__name__} {_argument_text(step)}: give an int")
    saved = open_saved_model(Path(path), [], None if tokenizer is None else Path(tokenizer), step)
    layers = build_model(saved.reader, ModelOptions(compute_dtype=compute_dtype))
    return Model(saved, layers.to(where), compute_dtype)


def evaluate_core(
    model: Model,
    bundle: str | os.PathLike | Bundle | None = None,
    *,
    tasks: Collection[str] | None = None,
    max_per_task: int = -1,
    crop: bool = False,
    unfit: Literal["refuse", "leave_out"] = "refuse",
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict:
    """Evaluates the CORE metric, see docs/evaluation.md. Returns what launch/evaluate.py writes as "core".

    bundle: a folder or zip file; None downloads nanochat's once into data/. tasks: labels, None for all. max_per_task:
    -1 for all examples. crop: crop prompts to the model's sequence_len. unfit: "refuse" or "leave_out" questions that
    do not fit the model. on_progress: called with (examples done, all examples).

    core_metric is None if one of CORE's tasks is missing; mean_centered is then the mean of those evaluated.

    Raises megachat.UserError for a bundle that is damaged or does not fit the model.
    """
    if unfit not in ("refuse", "leave_out"):
        raise ValueError(f"unfit is {unfit!r}: give 'refuse' or 'leave_out'")
    if not isinstance(bundle, Bundle):
        labels = None if tasks is None else tuple(_texts("tasks", tasks))
        bundle = open_bundle(None if bundle is None else Path(bundle), labels)
    with _as_value_errors():
        check_max_per_task(bundle, max_per_task, "max_per_task")
    settings = model.config.evaluate.model_copy(update={"core_crop": crop, "core_unfit": unfit})
    limit = row_limit(model.plan.dims, settings)
    check_questions(bundle, model.tokenizer, limit, max_per_task)
    evaluator = Evaluator(model._engine(), model.plan.dims, local_mesh(model.device), limit)
    section = evaluate_bundle(evaluator, bundle, model.tokenizer, max_per_task=max_per_task, on_progress=on_progress)
    assert section is not None  # no stop was given
    return section


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return this_device()
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}: give 'auto', 'cpu', 'cuda' or a GPU such as 'cuda:1'") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}, but torch has {torch.cuda.device_count()} GPUs: give another device")
    return chosen


@contextlib.contextmanager
def _as_value_errors() -> Iterator[None]:
    """Turns a program's complaint about an option into the complaint about an argument."""
    try:
        yield
    except UserError as error:
        raise ValueError(str(error)) from None


def _texts(name: str, value: str | Collection[str]) -> list[str]:
    """Returns one text or several as a list. Raises TypeError if the value is something else."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Collection) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} is {type(value).__name__} {_argument_text(value)}: give a str, or a list of str")
    return list(texts)


def _require_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {type(value).__name__} {_argument_text(value)}: give an int")
    if value < 1:
        raise ValueError(f"{name} is {value}: give 1 or more")


def _argument_text(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
