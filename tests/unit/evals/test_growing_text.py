"""Growing text: nothing uncertain is shown, and everything is shown in the end."""

import pytest

from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.evals.growing_text import GrowingText, parse_stops

BYTES = Tokenizer({bytes([byte]): byte for byte in range(256)})


def grown(content: bytes, *stops: str):
    """Returns the text, what was shown after each token, and the number of tokens until it ended."""
    text, shown = GrowingText(BYTES, parse_stops(stops, BYTES)), []
    for count, token in enumerate(content, 1):
        text.add(token)
        shown.append(text.next_shown(last=count == len(content)))
        if text.ended:
            break
    assert "".join(shown) == text.text
    return text.text, shown, len(text.ids)


def test_a_character_appears_once_it_is_whole():
    assert grown("né→x".encode())[1] == ["n", "", "é", "", "", "→", "x"]
    assert grown(b"a\xc3") == ("a\ufffd", ["a", "\ufffd"], 2)
    assert grown(b"a\xc3b")[1] == ["a", "", "\ufffdb"]


def test_it_ends_before_a_stop_text_and_shows_no_part_of_it():
    assert grown(b"one, two\n\nthree", "\n\n", "zzz") == ("one, two", [*"one, two", "", ""], 10)
    assert grown(b"a\nb", "\n\n")[1] == ["a", "", "\nb"]
    assert grown(b"ababac", "abac") == ("ab", ["", "", "", "ab", "", ""], 6)
    assert grown(b"xaab", "aab") == ("x", ["x", "", "", ""], 4)
    assert grown(b"ab", "abc") == ("ab", ["", "ab"], 2)


def test_it_ends_at_bos_and_at_special_tokens_by_name():
    end = BYTES.special_tokens["<|assistant_end|>"]
    for stops, token, ends in (((), BYTES.bos, True), (("<|assistant_end|>",), end, True), ((), end, False)):
        text = GrowingText(BYTES, parse_stops(stops, BYTES))
        for each in (*b"so", token):
            text.add(each)
        assert text.ended == ends and text.text == ("so" if ends else "so<|assistant_end|>")
    with pytest.raises(UserError, match="a stop text is empty"):
        parse_stops(["."], BYTES) and parse_stops([".", ""], BYTES)
