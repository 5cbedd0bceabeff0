"""lm-evaluation-harness on a folder that `convert to-hf` wrote gives the answers of megachat's evaluation."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import megachat
from megachat.convert.conversion import export_checkpoint, import_checkpoint
from megachat.evals.core_bundle import open_bundle
from megachat.evals.core_prompts import shuffle_examples
from tests.limits import limit_s
from tests.reference import FOLDER, needs_reference

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'transformers>=5'")
pytestmark = [
    needs_reference,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None,
        reason="lm-eval is not installed: pip install 'lm-eval[hf]==0.4.13'",
    ),
]
DATA = FOLDER.parents[1] / "eval_bundle" / "eval_data"
EXAMPLES = 24


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def choices_of_equal_length(model) -> list[dict]:
    """lm-eval sums an answer's log-probabilities and megachat takes their mean: the same for as many tokens."""

    def length(choice: str) -> int:
        return len(model.tokenizer.encode(f" {choice}"))

    names = ("world_knowledge/arc_easy", "commonsense_reasoning/openbook_qa", "commonsense_reasoning/commonsense_qa")
    examples = [example for name in names for example in read(f"{name}.jsonl")]
    equal = [each for each in examples if len({length(choice) for choice in each["choices"]}) == 1]
    return equal[:EXAMPLES]


def endings(model) -> list[dict]:
    """Passages with their true last word, or in every second one what the model would write, so that it is right."""
    examples = []
    for number, example in enumerate(read("language_understanding/lambada_openai.jsonl")):
        likely = model.tokenizer.decode([model.logits(example["context"].strip())[-1].argmax().item()])
        if number % 2 == 0 and (not likely.startswith(" ") or not likely.strip().isalpha()):
            continue
        examples.append(example | ({"continuation": likely.strip()} if number % 2 == 0 else {}))
        if len(examples) == EXAMPLES:
            break
    return examples


def write_tasks(bundle: Path, tasks: Path, examples: dict[str, list[dict]]) -> None:
    """Writes the examples as a bundle of CORE's kind and as tasks of lm-eval, as docs/evaluation.md describes them."""
    kinds = {"openbook_qa": "multiple_choice", "lambada_openai": "language_modeling"}
    (bundle / "eval_data").mkdir(parents=True)
    tasks.mkdir()
    entries = []
    for label, kind in kinds.items():
        path = bundle / "eval_data" / f"{label}.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in examples[label]))
        entries.append({"label": label, "dataset_uri": path.name, "num_fewshot": [0], "icl_task_type": kind})
        task = {
            "task": f"local_{label}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test",
            "output_type": "multiple_choice" if kind == "multiple_choice" else "loglikelihood",
            "metric_list": [{"metric": "acc"}],
        }
        if kind == "multiple_choice":
            task |= {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
        else:
            task |= {"doc_to_text": "{{context.strip()}}", "doc_to_target": " {{continuation}}"}
        (tasks / f"{label}.yaml").write_text(yaml.safe_dump(task))
    (bundle / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    rows = ["Eval Task,Task Type,#shots,Random baseline", "openbook_qa,multiple choice,0,25", "lambada_openai,lm,0,0"]
    (bundle / "eval_meta_data.csv").write_text("\n".join(rows) + "\n")


def test_each_answer_is_megachats(tmp_path):
    """Trained by nanochat, with windows, value embeddings and smear; the command of docs/evaluation.md, offline."""
    import_checkpoint("nanochat", FOLDER, tmp_path / "run", tokenizer=FOLDER / "tokenizer")
    export_checkpoint("hf", tmp_path / "run", tmp_path / "hf")
    model = megachat.load(tmp_path / "run", dtype="float32", device="cpu")
    examples = {"openbook_qa": choices_of_equal_length(model), "lambada_openai": endings(model)}
    write_tasks(tmp_path / "bundle", tmp_path / "tasks", examples)
    ours = megachat.evaluate_core(model, tmp_path / "bundle")["tasks"]
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"]
    command += ["--model_args", f"pretrained={tmp_path / 'hf'},trust_remote_code=True,dtype=float32"]
    command += ["--tasks", ",".join(f"local_{label}" for label in examples), "--include_path", str(tmp_path / "tasks")]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_DATASETS_OFFLINE": "1", "PYTHONPATH": "", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=limit_s())
    assert done.returncode == 0, done.stderr[-3000:]
    for task in open_bundle(tmp_path / "bundle").tasks:
        (samples,) = (tmp_path / "out").rglob(f"samples_local_{task.label}_*.jsonl")
        theirs = {json.dumps(each["doc"], sort_keys=True): each["acc"] for each in map(json.loads, samples.open())}
        order = [json.dumps(example, sort_keys=True) for example in shuffle_examples(task, -1)]
        assert len(order) == EXAMPLES == len(theirs)
        assert [bool(theirs[example]) for example in order] == [right == "1" for right in ours[task.label]["right"]]
        assert 0 < sum(theirs.values()) < EXAMPLES, task.label
