from typing import get_args

import numpy as np
import pytest

from megachat.commands.lookup import add_arguments
from megachat.commands.options import Parser
from megachat.data.tokenizer import save_tokenizer
from megachat.prepare.lookup_allocation import load_allocation
from megachat.settings.model import AllocationMethod
from tests.unit.data.corpus import byte_tokenizer, write_folder
from tools.allocate_lookup import main


@pytest.fixture
def arguments(tmp_path):
    save_tokenizer(tmp_path / "tokenizer", byte_tokenizer(), {})
    write_folder(tmp_path / "data", [["the house and the house", "the house"] * 20, ["validation"]])
    return ["--data", str(tmp_path / "data"), "--tokenizer", str(tmp_path / "tokenizer")]


def test_shows_and_writes_an_allocation(arguments, tmp_path, capsys):
    out, tokenizer = tmp_path / "lookup.json", byte_tokenizer()
    assert not main([*arguments, "--rows", "600", "--words", "--out", str(out)])
    shown, allocation = capsys.readouterr().out, load_allocation(out, tokenizer)
    assert allocation.rows == 600 and allocation.hash in shown and f"{allocation.mean_rows:.1f} rows" in shown
    for least in (1, 2, 4):
        members = (allocation.rows_per_token >= least) & (allocation.rows_per_token < 2 * least)
        assert f"{members.sum():,}" in shown
    assert "the house" in shown  # a long word
    assert np.argmax(allocation.rows_per_token) in tokenizer.encode("the house")


def test_the_methods_are_those_of_the_setting():
    """The command has a list of its own, because its help imports no settings."""
    add_arguments(parser := Parser())
    (method,) = [action for action in parser._actions if action.dest == "method"]
    assert method.choices == get_args(AllocationMethod)


def test_default_rows(arguments, capsys):
    main(arguments)
    assert f"{4 * byte_tokenizer().vocab_size:,} rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (["--rows", "0"], "--rows is 0"),
        (["--max-rows-per-token", "-1"], "--max-rows-per-token is -1"),
        (["--sample-tokens", "0"], "--sample-tokens is 0"),
        (["--rows", "10"], "10 rows"),
        (["--data", "missing"], "missing"),
    ],
)
def test_bad_input_is_one_sentence(arguments, capsys, options, fact):
    with pytest.raises(SystemExit) as end:
        main([*arguments, *options])
    error = capsys.readouterr().err
    assert end.value.code == 2 and fact in error and error.count("\n") == 1
