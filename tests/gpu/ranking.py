"""Full ranking and search of the best items, against their bare product."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from retrieval.blocks import strict_fp32
from retrieval.ranking import rank
from retrieval.registry import make_index
from retrieval.seen_items import SeenItems
from tests.gpu.parts import Report, Setup
from tests.gpu.timing import best_seconds, peak_bytes, rounded

_BLOCK = 512  # users of a block of the bare product
_COLUMNS = 65_536
_SEEN, _BEST = 10, 50


def run(setup: Setup, report: Report) -> None:
    """Report the seconds of ranking and of search, for random and for nearly perfect queries."""
    users, items, dim = setup.size(4096, 20), setup.size(1_000_000, 300), setup.size(512, 8)
    report("sizes", {"users": users, "items": items, "width": dim})
    generator = torch.Generator(setup.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=setup.device, generator=generator)

    item_ND = torch.nn.functional.normalize(normal(items, dim), dim=1)
    draw = np.random.default_rng(0)
    target_U = draw.integers(0, items, users)
    seen = SeenItems(
        items=draw.integers(0, items, users * _SEEN),
        offsets=np.arange(users + 1, dtype=np.int64) * _SEEN,
    )
    near_UD = item_ND[torch.from_numpy(target_U).to(setup.device)] + 0.01 * normal(users, dim)

    bare = best_seconds(setup, lambda: _product(near_UD, item_ND))
    report("bare product, seconds", rounded(bare))
    indexes = {"torch": make_index("torch", item_ND)}
    if setup.device == "cuda":
        try:
            indexes["faiss:gpu"] = make_index("faiss:gpu", item_ND)
        except (ImportError, ValueError) as error:
            report("faiss:gpu", f"not measured: {error}")
    else:
        report("faiss:gpu", "not measured: no GPU")
    for what, query_UD in (("random", normal(users, dim)), ("nearly perfect", near_UD)):
        ways = {"rank": partial(rank, query_UD, item_ND, target_U, seen)} | {
            f"best {_BEST}, {name}": partial(index.search, query_UD, _BEST, seen)
            for name, index in indexes.items()
        }
        for way, work in ways.items():
            peak = peak_bytes(setup.device, work)
            seconds = best_seconds(setup, work)
            figures = {"seconds": rounded(seconds), "over product": rounded(seconds / bare)}
            figures["users a second"] = rounded(users / seconds)
            if peak is not None:
                figures["GiB"] = rounded(peak / 2**30)
            report(f"{way}, {what} queries", figures)


def _product(query_UD: Tensor, item_ND: Tensor) -> None:
    """Compute all scores in float32, block by block, and nothing else."""
    with strict_fp32(query_UD.device):
        for query_BD in query_UD.split(_BLOCK):
            for item_CD in item_ND.split(_COLUMNS):
                torch.mm(query_BD, item_CD.T)
