"""Buckets of matrices that Muon updates at one time; imports no torch, because the planner counts their memory too."""

from __future__ import annotations

from collections.abc import Iterator

BUCKET_ELEMENTS = 1 << 25
"""Elements of a rank's matrices in a bucket, or those of one matrix where it is larger. It bounds the memory of a step
(`BUCKET_BYTES`), and is large enough that a bucket over many ranks has matrices for all of them."""
BUCKET_BYTES = 16
"""Bytes per bucket element at the peak, in bf16 Newton-Schulz of square matrices: the update, the batch of one shape,
the iterate before and after a product, its Gram matrix, that one's polynomial, and the matrices that are done."""


def fill_buckets(sizes: list[int], limit: int) -> Iterator[slice]:
    """Slices of consecutive items whose sizes add up to at most `limit`, or of single larger ones."""
    first, total = 0, 0
    for index, size in enumerate(sizes):
        if index > first and total + size > limit:
            yield slice(first, index)
            first, total = index, 0
        total += size
    if first < len(sizes):
        yield slice(first, len(sizes))
