"""A continuation as text while it grows: what may be shown already, and where it ends."""

from collections.abc import Collection, Sequence

from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError

_UNKNOWN = "\ufffd"  # what bytes that are not (yet) UTF-8 are decoded to


class GrowingText:
    """Tokens of a continuation, one by one. It ends at one of the tokens or in front of one of the texts of `stop` (see `parse_stops`).

    text: so far, without what it ended at.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[Collection[int], Sequence[str]] = ((), ())):
        self.tokenizer, (self.stop_tokens, self.stop_texts) = tokenizer, stop
        self.ids: list[int] = []
        self.text, self.ended, self._shown = "", False, 0

    def add(self, token: int) -> None:
        """The next token."""
        self.ids.append(token)
        if token in self.stop_tokens:
            self.ended = True
            return
        self.text = self.tokenizer.decode(self.ids)
        found = [at for stop in self.stop_texts if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.ended = self.text[: min(found)], True

    def shown(self, *, last: bool = False) -> str:
        """What can be shown and was not yet: no part of a character, and nothing that may turn out to be where it ends, unless it is the last."""
        end = len(self.text) if last or self.ended else len(self.text.rstrip(_UNKNOWN)) - self._begun()
        new, self._shown = self.text[self._shown : end], max(self._shown, end)
        return new

    def _begun(self) -> int:
        """Characters at the end of what is whole that begin one of the stop texts."""
        whole = self.text.rstrip(_UNKNOWN)
        return max((n for stop in self.stop_texts for n in range(1, len(stop)) if whole.endswith(stop[:n])), default=0)


def parse_stops(stops: Sequence[str], tokenizer: Tokenizer) -> tuple[frozenset[int], tuple[str, ...]]:
    """(tokens, texts) at which continuations end: the names of special tokens mean these, anything else is text; BOS always, where another document
    begins. Raises UserError for an empty one."""
    if "" in stops:
        raise UserError("a stop text is empty: give the text, or a special token's name, at which to stop")
    tokens = {tokenizer.special_tokens[stop] for stop in stops if stop in tokenizer.special_tokens} | {tokenizer.bos}
    return frozenset(tokens), tuple(stop for stop in stops if stop not in tokenizer.special_tokens)
