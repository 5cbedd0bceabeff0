"""What a checkpoint format declares: how it is recognized and opened, and how its contents get there and back."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megachat.convert.reader import CheckpointReader
from megachat.data.tokenizer import Tokenizer

Logits = Callable[[torch.Tensor], torch.Tensor]  # ids [1, tokens] int64 -> [tokens, vocab_size] float32
BuildLogits = Callable[[], Logits]


@dataclass(frozen=True)
class Tolerance:
    """Largest logit difference, largest mean Kullback-Leibler divergence in nats, least share of equal argmax."""

    logit: float = 1e-5
    kl: float = 1e-8
    argmax: float = 1.0


@dataclass(frozen=True)
class Export:
    """How a megachat checkpoint becomes a folder of another format.

    write: fills the folder. read_back: opens it again. expected: the checkpoint as the folder should hold it, if the
    conversion changes something on purpose. target_logits: computes logits with another program's model from the
    folder.
    """

    write: Callable[[Path], None]
    read_back: Callable[[Path], CheckpointReader]
    tolerance: Tolerance = Tolerance()
    expected: CheckpointReader | None = None
    target_logits: Callable[[Path], Logits] | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Import:
    """How a folder of another format becomes a megachat checkpoint: the source's tensors, with these facts (the config
    among them).

    Optimizer state that the source does not have starts at zero. tokenizer, origin: for the run folder. copies: files
    of the source that belong into the checkpoint. source_logits: computes logits with another program's model.
    """

    source: CheckpointReader
    facts: dict
    tokenizer: Tokenizer
    origin: dict
    copies: tuple[str, ...] = ()
    tolerance: Tolerance = Tolerance()
    source_logits: BuildLogits | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """A checkpoint format. command: its name on the command line and in certificates, as in "to-hf".

    marker: the file by which a folder has this format, for errors. recognizes: whether a folder has it. open: (folder,
    step or None for the newest) -> its reader. prepare_export, prepare_import: (source, folder of the requested
    tokenizer or None, options) -> what the conversion does. All raise UserError.
    """

    name: str
    command: str
    marker: str
    recognizes: Callable[[Path], bool]
    open: Callable[[Path, int | None], CheckpointReader]
    prepare_export: Callable[..., Export]
    prepare_import: Callable[..., Import]
