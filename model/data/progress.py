"""How far a preparation is, or another reading of documents, while it lasts."""

import sys
import time


class Progress:
    """A bar on a terminal, elsewhere a line every half minute: documents, MB/s, tokens/s, time left."""

    EVERY = 30  # seconds

    def __init__(
        self, total_bytes: int | None, bytes_before: int = 0, tokens_before: int = 0, name: str = "prepare_data"
    ):
        """What an earlier process did counts as done, but not as our speed."""
        self.total, self.done, self.began = total_bytes, bytes_before, time.monotonic()
        self.said, self.bytes_before, self.tokens_before = self.began, bytes_before, tokens_before
        self.name = name

    def __enter__(self) -> "Progress":
        from tqdm import tqdm

        off = self.total is None or not sys.stderr.isatty()
        self.bar = tqdm(total=self.total, initial=self.done, unit="B", unit_scale=True, disable=off, desc=self.name)
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()

    def update(self, size: int, n_documents: int, n_tokens: int | None = None) -> None:
        self.done += size
        self.bar.update(size)
        now = time.monotonic()
        tokens = ""
        if n_tokens is not None:
            tokens = f", {(n_tokens - self.tokens_before) / max(now - self.began, 1e-9):,.0f} tokens/s"
        if not self.bar.disable:
            self.bar.set_postfix_str(f"{n_documents:,} documents{tokens}", refresh=False)
        elif self.total is not None and now - self.said > self.EVERY and (done := self.done - self.bytes_before):
            self.said, passed = now, now - self.began
            print(
                f"{self.name}: {self.done / self.total:.0%}, {n_documents:,} documents, "
                f"{done / passed / 1e6:.1f} MB/s{tokens}, "
                f"{passed * (self.total - self.done) / done:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )
