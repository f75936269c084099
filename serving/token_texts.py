"""What single tokens are called in log-probabilities: a text and its bytes."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

_BYTES = range(256)


class TokenTexts:
    """The bytes that a token stands for and a text for them; without a tokenizer a token's text is `token_id:ID`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int] | None]] = {}
        # Only byte-level vocabularies decode this letter to a space.
        self._is_byte_level = tokenizer is not None and tokenizer.convert_tokens_to_string(["\u0120"]) == " "

    def text(self, token: int) -> str:
        """Its text; where its bytes are no whole characters, `bytes:` and the bytes in hexadecimal, as OpenAI writes them."""
        return self._of(token)[0]

    def byte_values(self, token: int) -> list[int] | None:
        return self._of(token)[1]

    def _of(self, token: int) -> tuple[str, list[int] | None]:
        if token not in self._known:
            raw = self._raw(token)
            if raw is None:
                self._known[token] = (f"token_id:{token}", None)
            else:
                try:
                    text = raw.decode()
                except UnicodeDecodeError:
                    text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
                self._known[token] = (text, list(raw))
        return self._known[token]

    def _raw(self, token: int) -> bytes | None:
        if self._tokenizer is None:
            return None
        piece = self._tokenizer.convert_ids_to_tokens(token)
        # Logits may have more columns than the vocabulary has tokens.
        if not isinstance(piece, str):
            return None
        if token in self._tokenizer.added_tokens_decoder:
            return piece.encode()
        if self._is_byte_level:
            return (
                bytes(_BYTE_OF[char] for char in piece) if all(char in _BYTE_OF for char in piece) else piece.encode()
            )
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet (Radford et al. 2019): printable bytes stand for themselves, the others are numbered from 256 on."""
    others = [byte for byte in _BYTES if not chr(byte).isprintable() or chr(byte) == " "]
    return {chr(byte): byte for byte in _BYTES if byte not in others} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_letters()
