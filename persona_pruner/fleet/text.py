"""From tokens to text, one token at a time."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of an answer as it grows: whole characters only, and nothing of a stop string.

    Text that may be the beginning of a stop string is held back until it is clear whether it is one.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = (), context: Sequence[int] = ()):
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(list(context), skip_special_tokens=True)
        self._stop, self._held = tuple(stop), ""

    def add(self, token: int) -> tuple[str, bool]:
        """(new text, whether a stop string has been reached)."""
        self._held += self._decoder.step(self._tokenizer, token) or ""
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            return self._held[: min(found)], True
        hold = max((n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        ready = len(self._held) - hold
        text, self._held = self._held[:ready], self._held[ready:]
        return text, False

    def rest(self) -> str:
        """What is still held back, when the answer ends without a stop string."""
        text, self._held = self._held, ""
        return text
