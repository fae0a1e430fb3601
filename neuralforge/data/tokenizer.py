"""A byte-level BPE tokenizer (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; on bytes: GPT-2).

Any text, and any bytes at all, encode and come back unchanged: the 256 bytes are tokens themselves.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, DataError
from ..files import write_atomic
from .readers import readable

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
# GPT-4's way to split words, digits and punctuation, but a run of blank lines and indentation stays together: 5 % fewer
# tokens than GPT-2's expression on Python code.
WORDS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
NOT_UTF8 = re.compile("([\udc80-\udcff]+)")  # how Python's surrogateescape stands for bytes that are no UTF-8


class Tokenizer:
    """Text to token ids and back. `end_of_text` is the id that ends every document."""

    def __init__(self, serialised: bytes, origin: str = "this tokenizer"):
        """`serialised`: the bytes of a tokenizer.json. Raises DataError if it is no byte-level BPE."""
        import tokenizers

        try:
            self.inner: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(serialised.decode())
        except Exception as e:  # the library raises plain Exception
            raise DataError(f"{origin} is not a sound tokenizer.json: {e}. Write or download it again.") from e
        self.inner.encode_special_tokens = True  # "<|endoftext|>" in a document is text, not the end of it
        self.serialised = serialised
        end = self.inner.token_to_id(END_OF_TEXT)
        if end is None:
            raise DataError(
                f"{origin} has no token {END_OF_TEXT!r}, which ends a document. Add it, or let neuralforge train a "
                "tokenizer."
            )
        self.end_of_text: int = end
        missing = [letter for letter in byte_letters() if self.inner.token_to_id(letter) is None]
        if missing:
            raise DataError(
                f"{origin} is no byte-level BPE: {len(missing)} of the 256 bytes are no tokens. Use a byte-level one "
                "(GPT-2's kind), or let neuralforge train a tokenizer."
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn at most `vocab_size` tokens (fewer if the text has no more pairs that occur twice). The same texts give the
        same tokenizer. Raises ConfigError below 257."""
        from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Inner

        if vocab_size < 257:
            raise ConfigError(
                f"A vocabulary of {vocab_size} is too small: the 256 bytes and {END_OF_TEXT} need 257. Choose 257 or "
                "more; 8192 suits a small model."
            )
        inner = Inner(models.BPE())
        words = pre_tokenizers.Split(Regex(WORDS), "isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(byte_letters()),
        )  # fmt: skip
        inner.train_from_iterator(texts, trainer)
        return cls(inner.to_str(pretty=True).encode())

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Raises DataError if there is none at `path`, or no byte-level BPE with an end-of-text token."""
        with readable(path):
            return cls(path.read_bytes(), str(path))

    def save(self, path: Path) -> None:
        """Writes tokenizer.json, all or nothing."""
        write_atomic(path, self.serialised)

    @property
    def vocab_size(self) -> int:
        return self.inner.get_vocab_size()

    @cached_property
    def sha256(self) -> str:
        """Of tokenizer.json; token files carry it."""
        return hashlib.sha256(self.serialised).hexdigest()

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for."""
        byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
        added = self.inner.get_added_tokens_decoder()
        return [
            token.encode() if i in added else bytes(byte_of[letter] for letter in token)
            for i, token in ((i, self.inner.id_to_token(i) or "") for i in range(self.vocab_size))
        ]

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text, or of any bytes; never the end-of-text id."""
        if isinstance(text, bytes):
            text = text.decode(errors="surrogateescape")
        letters, ids = byte_letters(), []
        for i, part in enumerate(NOT_UTF8.split(text)):
            if i % 2:  # bytes that are no UTF-8: a token each
                ids += [self.inner.token_to_id(letters[ord(letter) - 0xDC00]) for letter in part]
            elif part:
                ids += self.inner.encode(part).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        return [encoding.ids for encoding in self.inner.encode_batch_fast(list(texts))]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; exactly what was encoded."""
        return b"".join(self.token_bytes[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """As text; bytes that are no UTF-8 (half a character, say) show as U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")


def byte_letters() -> list[str]:
    """The letter by which GPT-2's alphabet writes each byte: itself if visible, else one from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]
