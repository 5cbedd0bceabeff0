"""The list of certificates is made in pieces: what is in the file is compared again, not walked again."""

import json

import pytest

from megachat.errors import UserError
from megachat.planning import plan
from megachat.programs import verify_dry as dry
from tools.bench import certificates


def test_every_line_of_the_configs_is_a_certificate():
    lines = certificates.variants(None)
    assert ("d24_fp8", []) in lines and ("d12", ["parallel.pipeline=2", "batch.micro_rows=8"]) in lines
    assert len({(name, *settings) for name, settings in lines}) == len(lines) > 25
    assert [name for name, _ in certificates.variants(["demo", "d2_cpu"])] == ["demo", "d2_cpu"]
    with pytest.raises(UserError, match="--only d3: configs/README.md has d12, "):
        certificates.variants(["d3"])


def test_another_call_goes_on_and_compares_with_the_plan_of_now(monkeypatch, tmp_path, capsys):
    walked = []

    def walk_as_planned(config, layout, vocab_size, *, every_rank):
        config, made = dry.setup(config, layout, vocab_size)
        walked.append(made.layout)
        rows = [
            {"stage": 0, "what": what, "planned": size, "least": size, "most": size, "rank": 0}
            for what, size in dry.planned_of_stage(config, made, 0).items()
        ]
        facts = {"problems": [], "walked": [0, 1], "compared": rows, "calls": {0: [["data", "all_reduce", 2, 8]]}}
        return facts | {"layout": layout}

    monkeypatch.setattr(certificates, "verify_dry", walk_as_planned)
    out = tmp_path / "certificates.json"
    call = ["certificates.py", "--out", str(out), "--only", "d2_cpu", "--ranks"]
    monkeypatch.setattr("sys.argv", [*call, "4"])
    assert certificates.main() == 0 and walked == [plan.Layout(4, 1, 1)]
    assert "| d2_cpu | dp=4,tp=1,pp=1 | 4 | 8 x 1 | 2 | 2 | 0.00 % |" in out.with_suffix(".md").read_text()

    real = dry.planned_memory
    monkeypatch.setattr(dry, "planned_memory", lambda *args: real(*args) | {"gradients": 9.9e9})
    monkeypatch.setattr("sys.argv", [*call, "4", "8"])
    assert certificates.main() == 1 and [layout.data for layout in walked] == [4, 8]
    first, second = json.loads(out.read_text())
    assert first["ranks"] == 4 and second["problems"] == []
    assert first["compared"][0]["allowed"] and "allowed" not in second["compared"][0], "added to what was walked before"
    assert [problem.split(",")[1] for problem in first["problems"]] == [" memory: gradients: planned 9.900 GB"]
