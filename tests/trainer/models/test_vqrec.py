"""VQ-Rec: codes against FAISS's own index, vectors and the contrast against their equations."""

import math
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.trainer import worlds
from trainer.data.batches import ItemFeatures, Sequences, TrainSet
from trainer.losses.base import ItemVectors, Targets
from trainer.models.text_transfer import TargetColumns
from trainer.models.vqrec import contrast_with_synthetic
from trainer.modules.product_codes import CodeEmbedding, code_vectors, fit_quantiser, sinkhorn

N = 12


def test_codes_are_those_of_the_index_of_the_released_code() -> None:
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    codes = code_vectors(x, *fit_quantiser(x[:500], count=2, bits=8))
    index: Any = faiss.index_factory(8, "OPQ2,PQ2x8np")
    index.train(x[:500].numpy())
    rotation = faiss.downcast_VectorTransform(index.chain.at(0))
    flat: Any = faiss.downcast_index(index.index)
    quantiser = flat.pq
    assert np.array_equal(codes.numpy(), quantiser.compute_codes(rotation.apply(x.numpy())))


@pytest.mark.parametrize(
    ("count", "bits", "rows"), [(3, 3, 200), (4, 2, 200), (2, 8, 20), (2, 4, 1)]
)
def test_codes_of_clusters_tell_the_clusters_apart(count: int, bits: int, rows: int) -> None:
    """Few vectors give fewer values; elements that the number of codes does not divide are left."""
    centre = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)) * 10
    label = torch.arange(rows) % 4
    x = centre[label] + 0.01 * torch.randn(rows, 7, generator=torch.Generator().manual_seed(1))
    codes = code_vectors(x, *fit_quantiser(x, count=count, bits=bits))
    assert codes.shape == (rows, count)
    assert 0 <= int(codes.min()) <= int(codes.max()) < min(2**bits, max(rows, 2))
    assert torch.equal(codes, code_vectors(x, *fit_quantiser(x, count=count, bits=bits)))
    clusters = [{tuple(row) for row in codes[label == k].tolist()} for k in range(4)]
    if rows > 1:
        assert sum(map(len, clusters)) == len(set().union(*clusters))


def test_the_quantiser_is_fitted_on_items_with_training_interactions_alone() -> None:
    features = worlds.features(60, missing=False)
    counts = torch.ones(60, dtype=torch.int64)
    counts[7] = 0
    other = {name: x.clone() for name, x in features.vectors.items()}
    for x in other.values():
        x[7] = 100.0
    codes = []
    for vectors in (features.vectors, other):
        model: Any = worlds.build("vqrec", features)
        given = ItemFeatures(n_items=60, vectors=vectors, present=features.present)
        model.fit_buffers(given, TrainSet(counts_N=counts, keys_J=torch.arange(60)))
        codes.append(torch.cat([part.codes_NC for part in model.item_encoder.values()], dim=1))
    known = torch.arange(60) != 7
    assert torch.equal(codes[0][known], codes[1][known])
    assert len(codes[0].unique(dim=0)) > 10


@pytest.mark.parametrize("permute", [False, True])
def test_item_vectors_are_means_over_the_codes(permute: bool) -> None:
    features = worlds.features(N)
    model: Any = worlds.build("vqrec", features, permute=permute).double()
    model.fit_buffers(features, TrainSet(counts_N=torch.ones(N), keys_J=torch.arange(N)))
    raw = model.encode_some(torch.arange(N), features)
    for item in range(N):
        vectors = []
        for name, part in model.item_encoder.items():
            if not features.present[name][item]:
                assert part.codes_NC[item].tolist() == [part.size] * part.codes
            for code, value in enumerate(part.codes_NC[item].tolist()):
                rows = part.table.weight[code * (part.size + 1) : (code + 1) * (part.size + 1)]
                if permute and value < part.size:
                    shares = sinkhorn(part.permutation_CSS / 0.7, 3)[code, value]
                    vectors.append(shares @ rows[:-1])
                else:
                    vectors.append(rows[value])
        torch.testing.assert_close(raw[item], torch.stack(vectors).mean(0))


def test_the_map_of_values_is_nearly_doubly_stochastic_and_is_trained() -> None:
    part = CodeEmbedding(N, 4, 3, codes=2, bits=3, permute=True)
    shares = sinkhorn(part.permutation_CSS / 0.7, 3)
    torch.testing.assert_close(shares.diagonal(dim1=1, dim2=2), torch.full((2, 8), 0.9))
    torch.nn.init.normal_(part.permutation_CSS)
    shares = sinkhorn(part.permutation_CSS / 0.7, 50)
    for axis in (1, 2):
        torch.testing.assert_close(shares.sum(axis), torch.ones(2, 8))
    part(part.codes_NC).square().sum().backward()
    assert part.permutation_CSS.grad is not None
    assert part.permutation_CSS.grad.abs().max() > 1e-6


def test_the_contrast_equals_its_equation() -> None:
    target, scale = torch.tensor([3, 7, 3, 5, 7]), 1 / 0.07
    table = functional.normalize(torch.randn(N, 4, dtype=torch.float64), dim=1)
    query, synthetic = functional.normalize(torch.randn(2, 5, 4, dtype=torch.float64), dim=2)
    targets = Targets(item_M=target, row_M=torch.arange(5))
    columns = TargetColumns.of(ItemVectors(vectors_KD=table), targets)
    total = 0.0
    for row in range(5):
        scores = [math.exp(scale * float(query[row] @ table[item])) for item in target]
        negatives = sum(scores[j] for j in range(5) if target[j] != target[row])
        negatives += math.exp(scale * float(query[row] @ synthetic[row]))
        total -= math.log(scores[row] / (scores[row] + negatives))
    loss = contrast_with_synthetic(query, columns, targets, synthetic, scale)
    assert loss.item() == pytest.approx(total / 5)


def test_a_share_of_the_codes_of_a_synthetic_item_is_replaced() -> None:
    features = worlds.features(200, missing=False)
    model: Any = worlds.build("vqrec", features, code_bits=8)
    targets = Targets(item_M=torch.arange(200).repeat(20), row_M=torch.arange(4000))
    codes = model._synthetic_codes(targets, torch.Generator().manual_seed(5))
    for name, part in model.item_encoder.items():
        kept = (codes[name] == part.codes_NC[targets.item_M]).double().mean()
        assert float(kept) == pytest.approx(0.25 + 0.75 / 256, abs=0.02)


def test_pre_training_reaches_every_parameter() -> None:
    features = worlds.features(N)
    model: Any = worlds.build("vqrec", features, objective="contrast", permute=True)
    rows = Sequences(
        items_BL=torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]]), lengths_B=torch.tensor([4, 3])
    )
    model.loss(worlds.batch(rows, features, torch.Generator()))["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
