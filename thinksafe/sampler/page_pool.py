"""The pool of cache pages: who owns which, and which full prompt pages can be shared.

A page that holds a full stretch of prompt is registered under a digest of everything up to its end. Another prompt
that begins alike takes the same page. A page nobody owns keeps its contents until the space is needed, oldest first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


def prefix_digests(tokens: Sequence[int], page_size: int) -> list[bytes]:
    """One digest a full page, each over all tokens up to the page's end."""
    chain = hashlib.blake2b(digest_size=16)
    digests = []
    ids = np.asarray(tokens, dtype=np.int64)
    for start in range(0, len(ids) - page_size + 1, page_size):
        chain.update(ids[start : start + page_size].tobytes())
        digests.append(chain.copy().digest())
    return digests


class PagePool:
    """Reference counts and the prefix cache. Page numbers index the key-value cache's first dimension."""

    def __init__(self, num_pages: int):
        self.owners = np.zeros(num_pages, dtype=np.int32)
        self._blank = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, bytes] = OrderedDict()  # registered, without an owner, oldest first
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that `allocate` can still give."""
        return len(self._blank) + len(self._idle)

    def allocate(self) -> int:
        """A page with one owner and unknown contents.

        Raises:
            IndexError: none is available.
        """
        if self._blank:
            page = self._blank.pop()
        elif self._idle:
            page, digest = self._idle.popitem(last=False)
            del self._page_of[digest], self._digest_of[page]
        else:
            raise IndexError("no page is available")
        self.owners[page] = 1
        return page

    def shared_prefix(self, digests: Sequence[bytes]) -> list[int]:
        """Pages of the longest registered prefix. They are not taken yet: `take` them before the next `allocate`."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def take(self, page: int) -> None:
        """Become one more owner of a registered page."""
        self.owners[page] += 1
        self._idle.pop(page, None)

    def register(self, page: int, digest: bytes) -> None:
        """Offer a full page to later prompts. The first page under a digest stays."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def forget(self, page: int) -> None:
        """Offer an owned page no longer."""
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]

    def release(self, page: int) -> None:
        """Give up one ownership."""
        self.owners[page] -= 1
        if self.owners[page] == 0:
            digest = self._digest_of.get(page)
            if digest is None:
                self._blank.append(page)
            else:
                self._idle[page] = digest
