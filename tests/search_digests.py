"""Digests of exact searches in hard galleries: python search_digests.py prints them as JSON.

It prints no digests if the machine lacks the level that SIMPLEXFIX_ISA names.

test_instruction_sets.py runs this at every level; test_exact_search.py compares the same searches with the definition.
"""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import torch
from exact_search import GALLERIES, SIZES, hard_gallery, queries_for

import simplexfix.functional as SF
from simplexfix import CosineIndex


def topk_digest(kind: str, d: int, n: int) -> str:
    """Returns the digest of searches with codes for several k, without codes, and on three threads."""
    rng = np.random.default_rng(d)
    gallery = hard_gallery(kind, n, d, rng)
    query, rows = torch.from_numpy(queries_for(gallery, 30, rng)), torch.from_numpy(gallery)
    found = [SF.cosine_topk(query, rows, k) for k in (1, 10, 100, n // 5)]
    found.append(SF.cosine_topk(query[:5], rows, 10))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    found.append(SF.cosine_topk(query, rows, 10))
    torch.set_num_threads(threads)
    return digest([part.numpy() for pair in found for part in pair])


def index_digest(kind: str, dtype: str) -> str:
    """Returns the digest of searches in an index that was filled in pieces, with shuffled ids."""
    rng = np.random.default_rng(1)
    n, d = 3000, 37
    vectors = hard_gallery(kind, n, d, rng)
    query, ids = queries_for(vectors, 15, rng), rng.permutation(n)
    index = CosineIndex(d, dtype=dtype, threads=2)
    for part in (slice(0, 1), slice(1, 64), slice(64, 1000), slice(1000, n)):
        index.add(vectors[part], ids[part])
    return digest([part for k in (1, 10, 700) for part in index.search(query, k)])


def digest(arrays: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def digests() -> dict[str, str]:
    found = {f"{kind}, d = {d}, n = {n}": topk_digest(kind, d, n) for kind in GALLERIES for d, n in SIZES}
    return found | {
        f"{kind}, {dtype}": index_digest(kind, dtype) for kind in GALLERIES for dtype in ("float32", "bfloat16")
    }


if __name__ == "__main__":
    from simplexfix import _native

    level = _native.build_info()["cpu_isa"]
    lacking = os.environ.get("SIMPLEXFIX_ISA", level) != level
    print(json.dumps({"level": level, "digests": {} if lacking else digests()}))
