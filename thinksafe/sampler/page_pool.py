"""The pool of cache pages: how many owners each page has, and which full prompt pages can be shared.

A page that is full of prompt tokens is registered under a digest of all tokens up to its end. Another prompt with the
same beginning then uses the same page. A page without an owner keeps its contents until its memory is needed; the page
that lost its owner first is reused first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


def prefix_digests(tokens: Sequence[int], page_size: int) -> list[bytes]:
    """Return one digest per full page, each over all tokens up to the end of the page."""
    chain = hashlib.blake2b(digest_size=16)
    digests = []
    ids = np.asarray(tokens, dtype=np.int64)
    for start in range(0, len(ids) - page_size + 1, page_size):
        chain.update(ids[start : start + page_size].tobytes())
        digests.append(chain.copy().digest())
    return digests


class PagePool:
    """Reference counts and the prefix cache. Page numbers index the first dimension of a layer's keys and values."""

    def __init__(self, num_pages: int):
        self.ref_count = np.zeros(num_pages, dtype=np.int32)
        self._free = list(range(num_pages - 1, -1, -1))
        self._evictable: OrderedDict[int, bytes] = OrderedDict()  # registered pages without an owner, oldest first
        self._page_by_digest: dict[bytes, int] = {}
        self._digest_by_page: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Number of pages that `allocate` can still return."""
        return len(self._free) + len(self._evictable)

    def allocate(self) -> int:
        """Return a page with one owner and unknown contents.

        Raises:
            IndexError: no page is available.
        """
        if self._free:
            page = self._free.pop()
        elif self._evictable:
            page, digest = self._evictable.popitem(last=False)
            del self._page_by_digest[digest], self._digest_by_page[page]
        else:
            raise IndexError("no page is available")
        self.ref_count[page] = 1
        return page

    def match_prefix(self, digests: Sequence[bytes]) -> list[int]:
        """Return the pages of the longest registered prefix. Call `acquire` on them before the next `allocate`, which
        might otherwise return one of them."""
        pages = []
        for digest in digests:
            page = self._page_by_digest.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def acquire(self, page: int) -> None:
        """Add one owner to a registered page."""
        self.ref_count[page] += 1
        self._evictable.pop(page, None)

    def register(self, page: int, digest: bytes) -> None:
        """Share a full page with later prompts. A page that is already registered under the digest stays there."""
        if digest not in self._page_by_digest and page not in self._digest_by_page:
            self._page_by_digest[digest] = page
            self._digest_by_page[page] = digest

    def unregister(self, page: int) -> None:
        """Stop sharing an owned page with later prompts."""
        digest = self._digest_by_page.pop(page, None)
        if digest is not None:
            del self._page_by_digest[digest]

    def release(self, page: int) -> None:
        """Remove one owner from a page."""
        self.ref_count[page] -= 1
        if self.ref_count[page] == 0:
            digest = self._digest_by_page.get(page)
            if digest is None:
                self._free.append(page)
            else:
                self._evictable[page] = digest
