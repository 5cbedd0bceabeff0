import io
import sys

import pytest

from megachat.errors import UserError
from megachat.programs.generate import read_prompts


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\ntwo", ["one", "two"]),
        (b"\xef\xbb\xbfone\n\ntwo \n", ["one", "", "two "]),
        ("a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\rh\n".encode(), ["a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\rh"]),
        (b"\n", [""]),
    ],
)
def test_prompts_are_lines_without_a_byte_order_mark(tmp_path, monkeypatch, content, prompts):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert read_prompts(str(path)) == prompts
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert read_prompts("-") == prompts


def test_files_without_prompts_are_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    for content in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="prompts.txt has no prompt"):
            read_prompts(str(path))
    path.write_bytes("f\xfcr".encode("latin-1"))
    with pytest.raises(UserError, match="cannot read prompts from .*prompts.txt"):
        read_prompts(str(path))
