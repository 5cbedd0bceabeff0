"""The tokenizer for transformers: tokenizer.json of the tokenizers library, with the ids of megachat's tokenizer."""

from pathlib import Path

from megachat.data.tokenizer import BOS, Tokenizer
from megachat.errors import UserError
from megachat.files import write_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
# Where two implementations of the split pattern, of merging or of UTF-8 could differ; then runs and periods
_ODD_TEXTS = (
    *("", " ", "\n", "\r\n", " \n \t\r\n\n", "a  b   c    d", "\u00a0\u2003\u3000\u0085x", "a\x00b\x1c\x1d\x1e\x1f c"),
    *(
        "I'll I'LL we've They'Re don't 'S it\u2019s o'clock '\u017f 'd'm",
        "1 12 123 1234567 1,000.25 \u0663\u0664\u0665",
    ),
    *(
        "caf\u00e9 cafe\u0301 \u00df \ufb01 \u4e2d\u6587\u5b57 \u0939\u093f\u0928\u094d\u0926\u0940 \u0627\u0644\u0639",
        "\ufeffx \ufffd\ufffe \U0010ffff",
    ),
    *(
        "\U0001f469\u200d\U0001f4bb\U0001f1e9\U0001f1ea",
        "!!!???...  --- -> => #!/bin/sh {[()]}\n\n\nx \u00bd\u2167 x2y",
    ),
    "<|bos|> and <|user_start|>hello<|user_end|> <|endoftext|>",
    *(f"{unit * n}.{unit * n}" for unit in ("a", " ", "-", "ab", "\n", "1", " a", "\u00e9") for n in (2, 3, 7, 40)),
)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, longest: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json, and compares what they give.

    longest: tokens of a training row. Raises UserError if a text gets other ids than from megachat's tokenizer, or
    comes back as another text. Needs transformers, which needs tokenizers.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as FastTokenizer

    ranks = tokenizer.ranks
    letters = _letters_of_bytes()
    vocabulary = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    fast = FastTokenizer(models.BPE(vocabulary, _merges(ranks, letters), ignore_merges=True))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokenizer.special_tokens])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.bos)]
    )
    fast.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": BOS,
            "pad_token": BOS,
            "padding_side": "left",
            "model_max_length": longest,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # their names in a text are text, as in training
        },
    )
    tokens = {f"{name}_token_id": tokenizer.bos for name in ("bos", "eos", "pad")}
    write_json(folder / "generation_config.json", tokens)
    _compare(folder, tokenizer)


def _letters_of_bytes() -> list[str]:
    """Returns the printable character by which a byte-level BPE file shows each byte (GPT-2, encoder.py)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def _merges(ranks: dict[bytes, int], letters: list[str]) -> list[tuple[str, str]]:
    """Returns the pairs of tokens that give a token, by its rank: tiktoken merges any of them, not only one pair."""
    pairs = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs += sorted((pair for pair in cuts if pair[0] in ranks and pair[1] in ranks), key=lambda x: ranks[x[0]])
    return [tuple("".join(letters[byte] for byte in part) for part in pair) for pair in pairs]  # type: ignore[misc]


def _compare(folder: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
    words = [token.decode(errors="replace") for token in tokenizer.ranks]
    characters = [chr(code) for code in (*range(0x3400), *range(0x3400, 0xD800, 64), *range(0xE000, 0x110000, 64))]
    for text in (*_ODD_TEXTS, *("".join(words), " ".join(words)), *("".join(characters), "'".join(characters))):
        ids = tokenizer.encode(text, bos=True).tolist()
        if theirs(text, verbose=False)["input_ids"] != ids or theirs.decode(ids) != tokenizer.decode(ids):
            raise UserError(
                f"tokenizer.json would not give the ids of tokenizer {tokenizer.name} for a text that begins with "
                f"{text[:20]!r}: use a tokenizer with megachat's split pattern"
            )
