"""A continuation as text while it grows: what can be shown already, and where it ends."""

from collections.abc import Collection, Sequence

from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError

_REPLACEMENT = "\ufffd"  # the decoder's output for bytes that are not, or not yet, valid UTF-8


class GrowingText:
    """The text of a continuation, token by token. It ends at a stop token or before a stop text (see `parse_stops`).

    text: the text so far, without the stop. ended: whether a stop was reached.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[Collection[int], Sequence[str]] = ((), ())):
        self.tokenizer, (self.stop_tokens, self.stop_texts) = tokenizer, stop
        self.ids: list[int] = []
        self.text, self.ended, self._shown = "", False, 0

    def add(self, token: int) -> None:
        """Appends the next token."""
        self.ids.append(token)
        if token in self.stop_tokens:
            self.ended = True
            return
        self.text = self.tokenizer.decode(self.ids)
        stops = [start for stop in self.stop_texts if (start := self.text.find(stop)) >= 0]
        if stops:
            self.text, self.ended = self.text[: min(stops)], True

    def next_shown(self, *, last: bool = False) -> str:
        """Returns the text that can be shown now and was not returned before.

        Incomplete characters, and an ending that may become a stop text, are held back unless this is the last call.
        """
        end = len(self.text)
        if not (last or self.ended):
            complete = self.text.rstrip(_REPLACEMENT)
            starts = (n for stop in self.stop_texts for n in range(1, len(stop)) if complete.endswith(stop[:n]))
            end = len(complete) - max(starts, default=0)
        new, self._shown = self.text[self._shown : end], max(self._shown, end)
        return new


def parse_stops(stops: Sequence[str], tokenizer: Tokenizer) -> tuple[frozenset[int], tuple[str, ...]]:
    """Splits stops into (tokens, texts): the name of a special token is that token, anything else is text.

    BOS, which starts another document, is always a stop. Raises UserError if a stop is empty.
    """
    if "" in stops:
        raise UserError("a stop text is empty: give a text, or the name of a special token")
    tokens = {tokenizer.special_tokens[stop] for stop in stops if stop in tokenizer.special_tokens} | {tokenizer.bos}
    return frozenset(tokens), tuple(stop for stop in stops if stop not in tokenizer.special_tokens)
