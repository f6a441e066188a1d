"""The pool of cache pages: how many owners each page has, and which full prompt pages can be shared.

A page that is full of prompt tokens is registered under a digest of all tokens up to its end. Another prompt with the
same beginning then uses the same page. A page without an owner keeps its contents until its memory is needed; the page
that lost its owner first is reused first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

import numpy as np


def prefix_digests(tokens: Sequence[int], page_size: int) -> list[bytes]:
    """Return one digest of 16 bytes per full page, each over all tokens up to the end of the page. The tokens after the
    last full page have no digest."""
    chain = hashlib.blake2b(digest_size=16)
    digests = []
    ids = np.asarray(tokens, dtype=np.int64)
    for start in range(0, len(ids) - page_size + 1, page_size):
        chain.update(ids[start : start + page_size].tobytes())
        digests.append(chain.copy().digest())
    return digests


class PagePool:
    """The pages' numbers of owners, and the prefix cache: digests under which full prompt pages are registered.

    Page numbers index the first dimension of a layer's keys and values.

    Attributes:
        ref_count: [num_pages] int32, number of running sequences that use each page.
    """

    def __init__(self, num_pages: int):
        self.ref_count = np.zeros(num_pages, dtype=np.int32)
        self._free = list(range(num_pages - 1, -1, -1))
        self._evictable: OrderedDict[int, bytes] = OrderedDict()  # registered pages without an owner, oldest first
        self._page_by_digest: dict[bytes, int] = {}
        self._digest_by_page: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Number of pages without an owner, which `allocate` can still return."""
        return len(self._free) + len(self._evictable)

    def allocate(self) -> int:
        """Return a page without an owner, now with one owner; its contents are undefined. If only registered pages are
        left, the page that lost its owner first is unregistered and returned; without any, raise an IndexError."""
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
        """Return the registered pages of a prompt's `prefix_digests`, in order, up to the first digest that is not
        registered. Call `acquire` on them before the next `allocate`, which might otherwise return one of them."""
        registered = takewhile(self._page_by_digest.__contains__, digests)
        return [self._page_by_digest[digest] for digest in registered]

    def acquire(self, page: int) -> None:
        """Add one owner to a registered page, which may have owners or none."""
        self.ref_count[page] += 1
        self._evictable.pop(page, None)

    def register(self, page: int, digest: bytes) -> None:
        """Register a full page under its digest, so that later prompts share it. Do nothing if another page is
        registered under this digest, or if the page is registered already."""
        if digest not in self._page_by_digest and page not in self._digest_by_page:
            self._page_by_digest[digest] = page
            self._digest_by_page[page] = digest

    def unregister(self, page: int) -> None:
        """Remove an owned page from the prefix cache, so that no later prompt shares it; its owners keep it. Do nothing
        if it is not registered."""
        self._page_by_digest.pop(self._digest_by_page.pop(page, None), None)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache. No page may have an owner."""
        self._free += self._evictable
        for cache in (self._evictable, self._page_by_digest, self._digest_by_page):
            cache.clear()

    def release(self, page: int) -> None:
        """Remove one owner from a page. A registered page without an owner can still be shared until it is reused."""
        self.ref_count[page] -= 1
        if self.ref_count[page] == 0:
            if page in self._digest_by_page:
                self._evictable[page] = self._digest_by_page[page]
            else:
                self._free.append(page)
