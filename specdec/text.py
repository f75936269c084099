"""Text from tokens as they arrive: whole characters only, and stop strings held back until they are certain."""

from __future__ import annotations

import weakref
from collections.abc import Sequence as Seq

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
# Every token is decoded alone once it is settled, and again with the next one.
_alone: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[int, str]] = weakref.WeakKeyDictionary()


class TextStream:
    """The text of one sequence, token by token; special tokens are skipped.

    A character that needs more tokens is held back, and so is text that may be the beginning of a stop string. `stopped`
    is set by the token that completes a stop string, and the text ends before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Seq[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, list(stop)
        self._tokens: list[int] = []
        self._alone = _alone.setdefault(tokenizer, {})
        # Tokens before `_settled` are decoded for good; those from `_context` on are decoded again with what follows, for
        # a tokenizer may join a token to its neighbour.
        self._context = self._settled = 0
        self._decoded = ""
        self._shown = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text so far, held-back text included, cut before a stop string."""
        return self._decoded

    def push(self, token: int) -> str:
        """The text that is certain with this token."""
        self._tokens.append(token)
        before = self._decode(self._context, self._settled)
        after = self._decode(self._context, len(self._tokens))
        if len(after) > len(before) and not after.endswith(_INCOMPLETE):
            new = after[len(before) :]
            self._context, self._settled = self._settled, len(self._tokens)
            self._append(new)
        return self._release(0 if self.stopped else self._held())

    def finish(self) -> str:
        """What was held back, at the end of the sequence."""
        if not self.stopped:
            before = self._decode(self._context, self._settled)
            self._append(self._decode(self._context, len(self._tokens))[len(before) :])
        return self._release(0)

    def _decode(self, start: int, end: int) -> str:
        if end - start > 1:
            return self._text_of(self._tokens[start:end])
        if end == start:
            return ""
        token = self._tokens[start]
        if token not in self._alone:
            self._alone[token] = self._text_of([token])
        return self._alone[token]

    def _text_of(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _append(self, new: str) -> None:
        start = max(0, len(self._decoded) - max((len(stop) for stop in self._stop), default=0))
        self._decoded += new
        found = [at for stop in self._stop if (at := self._decoded.find(stop, start)) >= 0]
        if found:
            self.stopped = True
            self._decoded = self._decoded[: min(found)]

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, len(self._decoded)), 0, -1):
            if any(stop.startswith(self._decoded[-size:]) for stop in self._stop):
                return size
        return 0

    def _release(self, held: int) -> str:
        end = max(self._shown, len(self._decoded) - held)
        new, self._shown = self._decoded[self._shown : end], end
        return new
