"""The Python API as its documents use it: the code of docs/python_api.md and the example notebook, after a training."""

import json
import re
import shutil

import pytest

import megachat
from tests.runs.forked import ROOT, run_forked
from tests.runs.job import CONFIG, STEPS
from tests.unit.evals.bundle import write_bundle

# matplotlib is not among the packages for tests: without it the plots are calls of a mock
PLOTS = """
try:
    import matplotlib
    matplotlib.use("Agg")
except ImportError:
    import sys
    from unittest.mock import MagicMock
    pyplot = MagicMock()
    def subplots(rows=None, columns=1, squeeze=True, **_):
        axes = [MagicMock() for _ in range(columns)]
        return MagicMock(), MagicMock() if rows is None else axes if squeeze else [axes]
    pyplot.subplots = subplots
    sys.modules |= {"matplotlib": MagicMock(pyplot=pyplot), "matplotlib.pyplot": pyplot}
"""


# a model with a lookup layer, whose allocation is in the checkpoint; with a cache it chooses the same tokens as without
LOOKUP = """
settings = ["run.name=lookup", "horizon.steps=2", "lookup.after_blocks=[0]", "lookup.rows=300", "lookup.up_width=64"]
model = megachat.load(megachat.pretrain("configs/demo.json", settings), dtype="float32")
assert model.plan.dims.lookup is not None
prompts = ["the old", "small boats past", "rain", "q", "bread and winter"]
for prompt, text in zip(prompts, model.generate(prompts, tokens=6, temperature=0)):
    ids = model.tokenizer.encode(prompt, bos=True).tolist()
    start = len(ids)
    while len(ids) < start + 6 and (token := int(model.logits(ids)[-1].argmax())) != model.tokenizer.bos:
        ids.append(token)
    print("text:", text)
    assert text == model.tokenizer.decode(ids[start:])
"""


def executed(folder, code: str) -> str:
    """Runs Python code with `folder` as the working folder, in one process; returns what it printed."""
    script = folder / "script.py"
    script.write_text(f"import os\nos.chdir({str(folder)!r})\n{code}")
    done = run_forked([script])
    assert done.status == 0, f"{done.out}\n{done.err}"
    return done.out


@pytest.fixture(scope="module")
def demo(shared_place, tmp_path_factory):
    """A folder like the repository's, with a small run in place of the demo's."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "d24.json", folder / "configs")
    data = {"folder": str(shared_place.data), "tokenizer": str(shared_place.tokenizer), "streams": 4}
    (folder / "configs" / "demo.json").write_text(json.dumps(CONFIG | {"data": data}))
    write_bundle(folder / "eval_bundle")
    code = "before = dict(os.environ), [signal.getsignal(number) for number in signal.valid_signals()]\n"
    code += "print('run:', megachat.pretrain('configs/demo.json'))\n"
    code += "assert before == (dict(os.environ), [signal.getsignal(number) for number in signal.valid_signals()])\n"
    out = executed(folder, f"import signal\nimport megachat\n{code}")
    assert "run: runs/demo\n" in out and f"finished step {STEPS}" in out
    return folder


def test_the_code_of_the_page(demo):
    page = (ROOT / "docs" / "python_api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == page.count("```") // 2 > 5
    assert all(f"megachat.{name}" in page for name in megachat.__all__ if name != "Model")
    checks = (
        "assert trained.step == 4 and len(curve) == 3 and 0 < bits < 10 and len(texts) == 2\n"
        "assert set(core['tasks']) == {'winograd', 'arc_easy'}\n"
        "again = megachat.pretrain(trained.config, ['horizon.steps=5'], resume='auto')\n"  # twice in one process
        "assert again == run and megachat.load(again).step == 5\n"
        "try:\n"
        "    megachat.pretrain('configs/demo.json', ['parallel.tensor=3'])\n"
        "    raise SystemExit('not refused')\n"
        "except megachat.UserError as error:\n"
        "    assert 'parallel.tensor 3' in str(error), error\n"
    )
    executed(demo, "\n".join([*blocks, checks, LOOKUP]))


def test_the_notebook(demo):
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5 and not any(cell.get("outputs") for cell in notebook["cells"])
    checks = (
        f"assert [step for step, _ in validation] == [0, 3, {STEPS}] and len(training) == {STEPS}\n"
        "assert max(effect[:3]) == 0 < min(effect[3:6]) and set(bits) == {'python', 'noise'}\n"
    )
    out = executed(demo, "\n".join([PLOTS, *cells, checks]))
    assert out.startswith("import os\nimport ")
