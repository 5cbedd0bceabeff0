import json
import math

import pytest

from megachat.data.tokenizer import save_tokenizer
from tests.unit.data.corpus import byte_tokenizer, write_folder
from tools.unigram import main


@pytest.fixture
def arguments(tmp_path):
    save_tokenizer(tmp_path / "tokenizer", byte_tokenizer(), {})
    write_folder(tmp_path / "data", [["a"], ["aabb", "cd"]])
    return ["--data", str(tmp_path / "data"), "--tokenizer", str(tmp_path / "tokenizer")]


def run_with(folder, *lines):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return ["--run", str(folder)]


def test_entropy_of_the_validation_text(arguments, tmp_path, capsys):
    bits = -(2 * (1 / 3) * math.log2(1 / 3) + 2 * (1 / 6) * math.log2(1 / 6))
    main(arguments)
    out = capsys.readouterr().out
    assert f"{bits * math.log(2):.4f} nats per token" in out and f"{bits:.4f} bits per byte" in out
    main([*arguments, *run_with(tmp_path / "better", json.dumps({"val/bpb": 3.0}), '{"val/bpb": 1.5}')])
    assert f"1.5000 bits per byte, {1.5 / bits:.3f} of" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main([*arguments, *run_with(tmp_path / "worse", '{"val/bpb": 2.5}')])
    assert caught.value.code == 1
    with pytest.raises(SystemExit):
        main([*arguments, "--run", str(tmp_path / "worse"), "--json", "--quiet"])
    document = json.loads(capsys.readouterr().out.split("entropy\n")[-1])
    assert document["bits_per_byte"] == pytest.approx(bits) and document["run_bits_per_byte"] == 2.5
    assert document["below"] is False
    main([*arguments, "--json"])
    assert json.loads(capsys.readouterr().out)["below"] is None


def test_bad_input(arguments, tmp_path, capsys):
    empty = write_folder(tmp_path / "empty", [["a"], []])
    for bad, words in (
        ([*arguments, "--run", str(tmp_path / "nowhere")], "nowhere has no metrics.jsonl"),
        ([*arguments, *run_with(tmp_path / "damaged", "{")], "metrics.jsonl line 1 is damaged"),
        ([*arguments, *run_with(tmp_path / "young", '{"step": 1}')], "no validation yet"),
        (["--data", str(empty), *arguments[2:]], "no validation text"),
        (["--data", str(tmp_path / "none"), *arguments[2:]], "does not exist"),
        ([*arguments[:3], str(tmp_path / "none")], "no tokenizer at"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(bad)
        message = capsys.readouterr().err
        assert caught.value.code == 2 and words in message and message.count("\n") == 1
