"""Keeping evaluation prompts out of training data, and telling texts apart."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable


def words_of(text: str) -> list[str]:
    """The words of a text, whatever its case, spacing, punctuation and way of writing accents."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def text_hash(text: str) -> int:
    """63 bits that stand for the words of a text; texts that differ in nothing else count as the same."""
    words = " ".join(words_of(text)) or text.strip()
    return int.from_bytes(hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


class Exclusion:
    """Texts that training data must not hold: `text in exclusion` is true for one that has the same words as an excluded text
    or shares `ngram` words in a row with one (Brown et al. 2020, appendix C, with its 13).

    Excluded texts shorter than `ngram` words are found by all their words alone.
    """

    def __init__(self, texts: Iterable[str] = (), ngram: int = 13) -> None:
        if ngram < 1:
            raise ValueError(f"ngram={ngram} must be >= 1")
        self.ngram = ngram
        self._hashes: set[int] = set()
        self._ngrams: set[tuple[str, ...]] = set()
        for text in texts:
            self._hashes.add(text_hash(text))
            self._ngrams.update(self._ngrams_of(text))

    def __contains__(self, text: str) -> bool:
        if not self._hashes:
            return False
        return text_hash(text) in self._hashes or any(one in self._ngrams for one in self._ngrams_of(text))

    @property
    def fingerprint(self) -> str:
        """Stands for the set of excluded texts."""
        return hashlib.sha256(repr((self.ngram, sorted(self._hashes))).encode()).hexdigest()[:16]

    def _ngrams_of(self, text: str) -> list[tuple[str, ...]]:
        words = words_of(text)
        return [tuple(words[i : i + self.ngram]) for i in range(len(words) - self.ngram + 1)]
