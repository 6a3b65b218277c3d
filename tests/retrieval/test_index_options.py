import re

import numpy as np
import pytest

from retrieval.index_options import PARAMETERS, IndexNameError
from retrieval.registry import make_index, parse_index


@pytest.mark.parametrize(
    ("name", "kind", "given"),
    [
        ("torch", "torch", {}),
        ("faiss", "faiss", {}),
        ("faiss:flat", "faiss:flat", {}),
        ("faiss:ivf,nlist=4096,nprobe=32", "faiss:ivf", {"nlist": 4096, "nprobe": 32}),
        ("faiss:ivfpq, M=8, k_factor=2", "faiss:ivfpq", {"M": 8, "k_factor": 2}),
        ("faiss:hnsw,efSearch=16", "faiss:hnsw", {"efSearch": 16}),
    ],
)
def test_a_name_has_a_kind_and_parameters(name: str, kind: str, given: dict[str, int]) -> None:
    options = parse_index(name)
    assert (options.kind, options.given) == (kind, given)
    assert options.is_exact == (kind not in PARAMETERS)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("annoy", "annoy", "known: faiss, "),
        ("faiss:IVF", "faiss:IVF", "faiss:ivf"),
        ("", "''", "known"),
        ("faiss:ivf,nprob=3", "nprob", "known: nlist, nprobe"),
        ("faiss:ivf,", "''", "known: nlist, nprobe"),
        ("faiss:flat,nprobe=3", "nprobe", "it has none"),
        ("torch,x", "x", "it has none"),
        ("faiss:ivf,nprobe", "nprobe=''", "whole number"),
        ("faiss:ivf,nprobe=0", "nprobe='0'", "from 1"),
        ("faiss:ivf,nprobe=-1", "nprobe='-1'", "from 1"),
        ("faiss:ivf,nprobe=1.5", "nprobe='1.5'", "whole number"),
        ("faiss:hnsw,M=" + "9" * 5000, "M='999", "from 2 to 512"),
        ("faiss:hnsw,M=1", "M='1'", "from 2"),
        ("faiss:ivfpq,nbits=13", "nbits='13'", "from 1 to 12"),
        ("faiss:ivf,nlist=4,nlist=5", "nlist", "once"),
        ("faiss:ivf,nlist=4,nprobe=5", "nprobe=5", "at most"),
        ("faiss:ivf,nlist=٣", "nlist", "whole number"),
    ],
)
def test_an_unusable_name_is_one_line_with_the_remedy(name: str, value: str, remedy: str) -> None:
    with pytest.raises(IndexNameError) as error:
        parse_index(name)
    assert value in str(error.value)
    assert remedy in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("name", "items", "value", "remedy"),
    [
        ("faiss:ivf,nlist=31", 30, "nlist=31", "at most 30"),
        ("faiss:ivf,nprobe=9", 300, "nprobe=9", "at most 7"),
        ("faiss:ivfpq,M=5", 300, "M=5", "divisor of 8"),
        ("faiss:ivfpq,nbits=8", 100, "nbits=8", "at most 6"),
        ("faiss:ivfpq", 1, "1 item", "--index faiss"),
    ],
)
def test_parameters_that_do_not_fit_the_catalogue_are_refused(
    name: str, items: int, value: str, remedy: str
) -> None:
    vectors = np.random.default_rng(0).standard_normal((items, 8)).astype(np.float32)
    with pytest.raises(IndexNameError, match=re.escape(remedy)) as error:
        make_index(name, vectors)
    assert value in str(error.value)


@pytest.mark.parametrize("package", ["faiss-cpu", "faiss-gpu"])
def test_an_index_on_a_gpu_needs_one(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    import faiss

    if package == "faiss-cpu":
        monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)
    else:
        monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    with pytest.raises(IndexNameError, match=r"faiss:gpu.*--index faiss"):
        parse_index("faiss:gpu")


@pytest.mark.parametrize("kind", list(PARAMETERS))
@pytest.mark.parametrize("items", [2, 12, 192, 5000, 1_000_000])
@pytest.mark.parametrize("dim", [1, 7, 64])
def test_defaults_fit_every_catalogue(kind: str, items: int, dim: int) -> None:
    values = parse_index(kind).values(items, dim)
    assert values.keys() == PARAMETERS[kind].keys()
    assert min(values.values()) >= 1
    assert values.get("nprobe", 1) <= values.get("nlist", 1) <= items
