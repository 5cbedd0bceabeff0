"""The report of the GPU matrix, which is measured where there is a GPU; here its cases, table and refusals."""

import argparse
import json

import pytest
import torch

from megachat.errors import UserError
from megachat.plan import resolve
from tools.bench_gpu import BEGIN, END, VOCAB, bench_gpu, case_config, cases, label, table, write_report

WHERE = {"commit": "0123456789", "uncommitted_changes": False, "device": "H200", "packages": {"torch": "2.11.0", "transformer-engine": None}}
NUMBERS = {"peak_memory_bytes": 2**34, "mfu": 0.55, "optimizer_share_at_reference_batch": 0.021, "chosen": ["attention te (auto: why)"]}


def test_every_case_is_a_run_that_fits():
    named = cases("clone")
    assert len({label(case) for case in named}) == len(named)
    for case in named:
        if "path" not in case:
            plan = resolve(case_config(case), 1, VOCAB)
            assert plan.tokens_per_step == (2**14 if "micro_rows" in case else 2**16)
    assert {case["linears"] for case in named} - {case["linears"] for case in cases(None)} == {"nanochat", "nanochat fp8"}


def test_the_table_stands_between_the_markers_and_the_numbers_beside_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    one, two, three = cases(None)[:3]
    found = [
        {"case": one, "tokens_per_sec": 100_000.0} | NUMBERS,
        {"case": two, "tokens_per_sec": 120_000.0} | NUMBERS,
        {"case": three, "failed": "no"},
    ]
    write_report(page, table(found, WHERE, [{}]), {"found": found})
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\nCommit 0123456, H200, torch 2.11.0; ") and text.endswith(f"{END}\nafter\n") and "old" not in text
    assert "| d24 | te tensorwise | te | 120,000 | 1.20 | 55.0% | 16.0 GiB | 2.1% |" in text
    assert "| d24 | torch tensorwise | auto | no | | | | |" in text
    assert json.loads((tmp_path / "page_gpu.json").read_text()) == {"found": found}
    page.write_text("no markers")
    with pytest.raises(UserError, match="lacks the lines"):
        write_report(page, "", {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(UserError, match="this machine has no CUDA device"):
        bench_gpu(argparse.Namespace())
