"""Small whole checkpoints with random values, as training would leave them, and the tool's command line."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from megachat.checkpoint.save import save_checkpoint
from megachat.config import Config
from megachat.convert.architecture import state_shapes
from megachat.convert.differences import CheckpointDifference, compare_checkpoints
from megachat.convert.formats import open_checkpoint
from megachat.convert.nanochat_settings import EMBEDDED
from megachat.data.loader_state import combined_ledger, save_loader_state
from megachat.data.packing import EMPTY_STREAM
from megachat.data.tokenizer import Tokenizer, save_tokenizer
from megachat.parallel.mesh import Axis
from megachat.planning.plan import resolve_without_text
from tools.convert_checkpoint import main

VOCAB_SIZE = 330  # tables of 384 rows: padded, and shared evenly by 2 and 3 ranks
STEP = 7
# Muon's matrices: one alone in its shape, two, three and more; the AdamW tensors: some whole on every rank, some cut
MODEL = {"depth": 3, "aspect_ratio": 16, "head_size": 16, "kv_heads": 1, "sequence_len": 160, "window_pattern": "SL"}
HUGGINGFACE = {
    "rotary_base": 5000.0,
    "qk_scale": 1.0,
    "norm_epsilon": 1e-5,
    "value_embeddings": False,
    "lambdas": "neutral",
    "window_pattern": "L",
}
NEUTRAL = {"resid_lambdas": 1.0, "x0_lambdas": 0.0, "smear_lambda": 0.0, "backout_lambda": 0.0}


def tokenizer(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    pairs = [bytes([97 + i // 26, 97 + i % 26]) for i in range(vocab_size - 256 - 9)]
    return Tokenizer({bytes([byte]): byte for byte in range(256)} | {pair: 256 + i for i, pair in enumerate(pairs)})


def values(dims, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in state_shapes(dims).items():
        tensors[name] = 0.2 * torch.randn(shape, generator=generator)
        if name.endswith(("_sq", "second_moment")):
            tensors[name].square_()
        if dims.lambdas == "neutral" and name.removeprefix("model/") in NEUTRAL:
            tensors[name].fill_(NEUTRAL[name.removeprefix("model/")])
    return tensors


def rectangles(tensor: torch.Tensor, parts: int) -> list:
    """The tensor in parts of dim 0, as ranks would hold it."""
    rows, begin = [], 0
    for part in tensor.tensor_split(parts):
        if len(part):
            rows.append(((begin, *(0,) * (tensor.ndim - 1)), tuple(part.shape), part))
        begin += len(part)
    return rows


def make_run(
    folder: Path,
    *,
    parts: int = 1,
    change=lambda tensors: None,
    facts=None,
    model=None,
    optimizer=None,
    batch=None,
    ngram=None,
    lookup=None,
) -> Path:
    """A run folder with the checkpoint of STEP, its tokenizer and its config; `change` works on the tensors."""
    run = {"name": folder.name, "folder": str(folder.parent)}
    sections = {
        "run": run,
        "ngram": ngram or {},
        "lookup": lookup or {},
        "model": MODEL | (model or {}),
        "data": {"tokenizer": str(folder / "tokenizer"), "streams": 2},
    }
    sections |= {
        "batch": batch or {"tokens": 640, "micro_rows": 2},
        "horizon": {"steps": 20},
        "optimizer": {"warmup_steps": 3} | (optimizer or {}),
    }
    config = Config.model_validate_json(json.dumps(sections))
    dims = resolve_without_text(config, 1, VOCAB_SIZE).dims
    tensors = values(dims)
    change(tensors)
    save_tokenizer(folder / "tokenizer", tokenizer(), {"source": "tests"})
    (folder / "config.json").write_text(json.dumps(sections))

    def write_rank_files(step_folder: Path) -> None:
        (step_folder / "random").mkdir()
        np.savez(step_folder / "random" / "rank_00000.npz", cpu=np.arange(5, dtype=np.uint8))
        header = {"step": 0, "rows": 4, "streams": 2, "row_tokens": 161}
        empty = {"sequence": [], "documents": [], "lengths": []}
        arrays = {key: np.array(value, np.int64) for key, value in empty.items()} | {"tokens": np.empty(0, np.uint16)}
        arrays |= {"counters": np.arange(5), "ledger": np.frombuffer(EMPTY_STREAM.ledger, np.uint8)}
        save_loader_state(step_folder / "loader", {"header": header, "streams": [arrays, arrays]}, [0, 1])

    saved_facts = {
        "model": asdict(dims),
        "tokenizer": {"fingerprint": tokenizer().fingerprint, "vocab_size": VOCAB_SIZE},
        "loop": {"step": STEP, "training_s": 1.5, "skipped_steps": 0, "val_bpb": 2.5, "min_val_bpb": 2.25},
        "adamw_steps": STEP,
        "loss_scaler": {"cur_scale": 1.0},
        "config": config.model_dump(mode="json", exclude_defaults=True),
        "layout": {"data": parts, "tensor": 1, "pipeline": 1},
        "ledger": combined_ledger({0: EMPTY_STREAM.ledger, 1: EMPTY_STREAM.ledger}),
    }
    pieces = {name: (tuple(tensor.shape), rectangles(tensor, parts)) for name, tensor in tensors.items()}
    save_checkpoint(
        folder / "checkpoints",
        STEP,
        pieces,
        saved_facts | (facts or {}),
        write_rank_files,
        Axis("world", 1, 0, None, (0,)),
    )
    return folder


def step_folder(run: Path) -> Path:
    return run / "checkpoints" / f"step_{STEP:06d}"


def pointer(path: Path) -> None:
    """Replaces a file by the Git LFS pointer that stands for it."""
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n")


def tool(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of tools/convert_checkpoint.py."""
    monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *map(str, arguments)])
    try:
        status = main() or 0
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr()
    return status, said.out, said.err


def differences_between(left: Path, right: Path) -> list[CheckpointDifference]:
    """What compare_checkpoints finds in two folders of any format."""
    return compare_checkpoints(open_checkpoint(left), open_checkpoint(right))


def left_in(folder: Path) -> list[str]:
    """Names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


def assert_same(actual, wanted, where: str = "") -> None:
    """Equal in structure, types, dtypes and every value."""
    assert type(actual) is type(wanted), f"{where}: {type(actual)} and {type(wanted)}"
    if isinstance(wanted, torch.Tensor):
        assert actual.dtype == wanted.dtype and torch.equal(actual, wanted), where
    elif isinstance(wanted, dict):
        assert list(actual) == list(wanted), where
        for key in wanted:
            assert_same(actual[key], wanted[key], f"{where}/{key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(actual) == len(wanted), where
        for index, pair in enumerate(zip(actual, wanted, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    else:
        assert actual == wanted, where


def loaded(path):
    return torch.load(path, weights_only=True)


def edit_meta(folder, change):
    path = folder / f"meta_{STEP:06d}.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def edit_optimizer(folder, rank, change):
    path = folder / f"optim_{STEP:06d}_rank{rank}.pt"
    saved = loaded(path)
    change(saved)
    torch.save(saved, path)


def as_version(folder, version, *, pattern="L", vocab_size=VOCAB_SIZE):
    """Makes an export what an older nanochat would have written of such a model."""
    path = folder / f"model_{STEP:06d}.pt"
    model = {name: tensor for name, tensor in loaded(path).items() if name not in version.absent}
    if not version.constants.get("value_embeddings", True):
        model = {name: tensor for name, tensor in model.items() if "ve_gate" not in name and "value_embeds" not in name}
        for name in ("transformer.wte.weight", "lm_head.weight"):
            model[name] = model[name][:vocab_size]
    torch.save(model, path)
    edit_meta(folder, lambda meta: (meta.pop(EMBEDDED, None), meta["model_config"].update(window_pattern=pattern)))
    return model
