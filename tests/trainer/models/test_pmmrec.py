"""PMMRec in all its parts; what every recommender promises is tested in test_recommenders."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from features.errors import UserError
from tests.trainer import worlds
from trainer.data.batches import Batch, ItemFeatures, Sequences, TrainSet
from trainer.finetune.upper_blocks import item_tokens
from trainer.losses.pmmrec import ALIGNMENTS, corrupt
from trainer.models import causal, pmmrec
from trainer.models.base import Catalogue
from trainer.models.pmmrec import PMMRec, PMMRecConfig
from trainer.modules.transformer import initialise

N = 12
SMALL: dict[str, Any] = {"dim": 8, "heads": 2, "hidden": 16, "length": 6, "fusion_heads": 2}
PRETRAIN: dict[str, Any] = {"align": "nicl", "nid": True, "rcl": True}  # Eq. 12
ROWS = [[0, 1, 2, 3, 4, 11], [5, 6], [7, 8, 9, 10]]


def only(name: str) -> ItemFeatures:
    both = worlds.features(N)
    return replace(both, vectors={name: both.vectors[name]}, present={name: both.present[name]})


def build(features: ItemFeatures, std: float = 0.3, **settings: Any) -> PMMRec:
    torch.manual_seed(0)
    catalogue = Catalogue(n_items=features.n_items, n_users=1, widths=features.widths)
    model = PMMRec(PMMRecConfig(**{**SMALL, **settings}), catalogue).eval()
    initialise(model, std=std)
    return model


def batch(features: ItemFeatures, padding: int = 0) -> Batch:
    return worlds.batch(worlds.sequences(ROWS, padding), features, torch.Generator().manual_seed(2))


@pytest.mark.parametrize("made", [worlds.features, worlds.token_features], ids=["pooled", "tokens"])
@pytest.mark.parametrize("settings", [*({"align": kind} for kind in ALIGNMENTS), PRETRAIN])
def test_every_objective_reaches_its_parameters(made: Any, settings: dict[str, Any]) -> None:
    features = made(N)
    model = build(features, **settings)
    losses = model.loss(batch(features))
    names = {"dap", settings["align"], *(name for name in ("nid", "rcl") if name in settings)}
    assert set(losses) == {"loss", *names}
    torch.testing.assert_close(losses["loss"], torch.stack([losses[n] for n in names]).sum())
    losses["loss"].backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []
    others = model.loss(batch(features, padding=9))
    assert {name: value.item() for name, value in others.items()} == {
        name: value.item() for name, value in losses.items()
    }


LITERAL: dict[str, Any] = {
    "align_literal": True, "nid_relu": True, "rcl_cosine": False, "rcl_pool": "last",
    "debias": False, "score": "cosine",
}  # fmt: skip


@pytest.mark.parametrize("settings", [{"score": "dot"}, LITERAL], ids=["sound", "literal"])
def test_the_whole_loss_by_its_formulas(settings: dict[str, Any]) -> None:
    """Position by position; two rows are windows of one user."""
    features = worlds.features(N)
    given = {"temperature": 0.5, "align_temperature": 0.25, "rcl_temperature": 0.2, "shuffle": 0.5}
    model = build(features, **PRETRAIN, **given, **settings)
    users = [0, 1, 0]
    own = {0: {*ROWS[0], *ROWS[2]}, 1: {*ROWS[1], 9}}  # one of the second is in no window
    train = TrainSet(
        counts_N=torch.arange(1, N + 1),
        keys_J=torch.tensor(sorted(u * N + i for u, items in own.items() for i in items)),
    )
    losses = model.loss(replace(batch(features), users_B=torch.tensor(users), train=train))

    def unit(x: Tensor) -> Tensor:
        return functional.normalize(x, dim=-1)

    def scored(x: Tensor) -> Tensor:
        return unit(x) if settings.get("score") == "cosine" else x

    item_ND = model.encode_items(features)
    sides = []
    for index, name in enumerate(("image", "text")):
        there_N = features.present[name]
        own_ND = model.item_encoder.inputs[name](features.vectors[name])
        absent_D = model.item_encoder.absent[index]
        sides.append((unit(torch.where(there_N[:, None], own_ND, absent_D)), there_N))
    popularity_N = (train.counts_N / train.counts_N.sum()).log() * settings.get("debias", 1)
    slots = [item for row in ROWS for item in row]
    valid_BL = worlds.sequences(ROWS).mask_BL
    items_BL = torch.where(valid_BL, worlds.sequences(ROWS).items_BL, ROWS[0][0])
    item_K, place_BL = items_BL.unique(return_inverse=True)
    lengths_B = torch.tensor([len(row) - 1 for row in ROWS])
    noisy_BL, label_BL = corrupt(
        place_BL[:, :-1], lengths_B, torch.Generator().manual_seed(2), shuffle=0.5
    )
    terms: dict[str, list[Tensor]] = {name: [] for name in ("dap", "nid", "image", "text")}
    clean, noisy = [], []
    for r, row in enumerate(ROWS):
        negatives = [item for item in slots if item not in own[users[r]]]
        length = lengths_B[r : r + 1]
        state_LD = model.sequence_encoder(item_ND[row[:-1]][None], length)[0]
        shown = item_K[noisy_BL[r, : len(row) - 1]]
        other_LD = model.sequence_encoder(item_ND[shown][None], length)[0]
        pooled = [x[-1] if "rcl_pool" in settings else x.mean(0) for x in (state_LD, other_LD)]
        clean.append(unit(pooled[0]) if "rcl_cosine" not in settings else pooled[0])
        noisy.append(unit(pooled[1]) if "rcl_cosine" not in settings else pooled[1])
        logits_L3 = model.nid(other_LD)
        logits_L3 = logits_L3.relu() if "nid_relu" in settings else logits_L3
        for at, (item, following) in enumerate(itertools.pairwise(row)):
            score_N = item_ND @ scored(state_LD[at]) / 0.5 - popularity_N
            column = score_N[[following, *negatives]]
            terms["dap"].append(-column.log_softmax(0)[0])
            terms["nid"].append(-logits_L3[at].log_softmax(0)[label_BL[r, at]])
            for name, a, b in (("image", 0, 1), ("text", 1, 0)):
                (x_ND, has_N), (y_ND, does_N) = sides[a], sides[b]
                if has_N[item] and does_N[item]:
                    inter, intra = ((x_ND[item] @ z.T / 0.25).exp() for z in (y_ND, x_ND))
                    inter, intra = inter * does_N, intra * has_N
                    above = inter[item] + inter[following] + intra[following]
                    below = inter[item] if "align_literal" in settings else above
                    below = below + inter[negatives].sum() + intra[negatives].sum()
                    terms[name].append(-(above / below).log())
    expected = {name: torch.stack(values).mean() for name, values in terms.items()}
    expected["nicl"] = (expected.pop("image") + expected.pop("text")) / 2
    robust = []
    for b in range(3):
        keys = [noisy[b], *(noisy[k] for k in range(3) if users[k] != users[b])]
        robust.append(-(torch.stack(keys) @ clean[b] / 0.2).log_softmax(0)[0])
    expected["rcl"] = torch.stack(robust).mean()
    expected["loss"] = torch.stack(list(expected.values())).sum()
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_pretraining_is_equation_12() -> None:
    pretrain = PMMRec.pretraining
    assert pretrain is not None
    assert dict(pretrain.settings) == PRETRAIN


def test_fine_tuning_is_the_next_item_alone() -> None:
    features = worlds.features(N)
    losses = build(features).loss(batch(features))
    assert set(losses) == {"loss", "dap"}


@pytest.mark.parametrize("settings", [{"nid": True}, {"rcl": True}, {"align": "vcl"}])
def test_an_objective_alone(settings: dict[str, Any]) -> None:
    features = worlds.features(N)
    model = build(features, dap=False, **settings)
    losses = model.loss(batch(features))
    assert len(losses) == 2
    losses["loss"].backward()
    # What is trained has a gradient, or a checkpoint would miss its moments.
    trained = {
        key: parameter.grad
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert [key for key, grad in trained.items() if grad is None] == []
    assert any(key.startswith("sequence_encoder.") for key in trained) == ("align" not in settings)


@pytest.mark.parametrize("settings", [{}, {"score": "cosine"}, {"pool": "cls"}])
def test_a_later_item_never_changes_an_earlier_prediction(settings: dict[str, Any]) -> None:
    features = worlds.features(N)
    model = build(features, **settings)
    seen: list[Tensor] = []
    encode = model.sequence_encoder.forward

    def spy(x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        seen.append(encode(x_BLD, lengths_B))
        return seen[-1]

    model.sequence_encoder.forward = spy  # type: ignore[method-assign]
    for third in (3, 9):
        model.loss(worlds.batch(worlds.sequences([[1, 2, third, 4]]), features, torch.Generator()))
    states, changed = seen
    torch.testing.assert_close(states[:, :2], changed[:, :2])
    assert not torch.allclose(states[:, 2], changed[:, 2], atol=1e-3)


def test_the_target_itself_is_not_among_what_is_read() -> None:
    features = worlds.features(N, missing=False)
    model = build(features)
    widths: list[int] = []
    encode = model.sequence_encoder.forward

    def spy(x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        widths.extend(lengths_B.tolist())
        return encode(x_BLD, lengths_B)

    model.sequence_encoder.forward = spy  # type: ignore[method-assign]
    model.loss(batch(features))
    assert widths == [len(row) - 1 for row in ROWS]


def test_each_item_of_a_batch_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features = worlds.features(N)
    model = build(features, **PRETRAIN)
    asked: list[list[int]] = []
    gather = item_tokens

    def spy(item_K: Tensor, *arguments: Any) -> Any:
        asked.append(item_K.tolist())
        return gather(item_K, *arguments)

    monkeypatch.setattr(pmmrec, "item_tokens", spy)
    doubled = worlds.sequences([[3, 5, 3, 5], [5, 7]], padding=11)
    model.loss(worlds.batch(doubled, features, torch.Generator()))
    assert asked == [[3, 5, 7]]


@pytest.mark.parametrize("settings", [{}, PRETRAIN, {"pool": "cls"}])
def test_a_missing_modality_is_not_read(settings: dict[str, Any]) -> None:
    features = worlds.features(N)
    model = build(features, **settings)
    garbage = {
        key: torch.where(features.present[key][:, None], value, torch.full_like(value, 99.0))
        for key, value in features.vectors.items()
    }
    other = replace(features, vectors=garbage)
    torch.testing.assert_close(model.encode_items(features), model.encode_items(other))
    loss, other_loss = (model.loss(batch(given))["loss"] for given in (features, other))
    torch.testing.assert_close(loss, other_loss)


def test_one_modality_has_nothing_to_fuse() -> None:
    """Its item is the projected vector, so that weights of two modalities fit a model of one."""
    features = only("text")
    model = build(features, score="dot")
    keys = set(model.state_dict())
    assert not {key for key in keys if "fusion" in key or "image" in key}
    assert keys <= set(build(worlds.features(N)).state_dict())
    item_ND = model.encode_items(features)
    present = features.present["text"]
    expected = model.item_encoder.inputs["text"](features.vectors["text"])
    torch.testing.assert_close(item_ND[present], expected[present])
    torch.testing.assert_close(item_ND[~present], model.item_encoder.absent.expand(3 + 1, -1))
    model.loss(batch(features))["loss"].backward()


def test_cls_takes_the_first_token_of_a_modality() -> None:
    """With one modality it is the item's vector, and in the alignment it is the modality's."""
    texts = worlds.token_features(N)
    alone = replace(texts, vectors={}, present={"text": texts.present["text"]})
    model = build(alone, align_pool="cls", score="dot")
    assert texts.tokens["text"].present_N.any()
    for item in range(N):
        x_KTD, _ = texts.tokens["text"].gather(torch.tensor([item]))
        expected = model.item_encoder.inputs["text"](x_KTD[0, 0])
        if not texts.present["text"][item]:
            expected = model.item_encoder.absent[0]
        torch.testing.assert_close(model.encode_items(alone)[item], expected)
    items = item_tokens(torch.arange(N), texts, torch.nn.ModuleDict())
    both = build(texts, align_pool="cls").item_encoder
    (_, _), (text_KD, _) = both(items).modality_vectors()
    first_KD = both.inputs["text"](items["text"][0][:, 0])
    has_text = texts.present["text"]
    torch.testing.assert_close(text_KD[has_text], first_KD[has_text])


def test_transfers_name_parameters() -> None:
    keys = list(build(worlds.features(N), **PRETRAIN).state_dict())
    for name in ("items", "users", "text", "image"):
        for prefix in PMMRec.transfer_groups[name]:
            if prefix.startswith("backbones."):
                continue  # see test_blocks.py
            assert any(key.startswith(prefix) for key in keys), prefix
    assert {*PMMRec.modality_tables, *PMMRec.reverse_positions} <= set(keys)


def test_the_catalogue_in_pieces_is_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    features = worlds.token_features(N)
    model = build(features)
    with torch.no_grad():
        whole = model.encode_items(features)
        monkeypatch.setattr(causal, "_TOKENS_PER_CHUNK", 15)
        pieces = model.encode_items(features)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)


def test_popular_items_are_corrected_for() -> None:
    features = worlds.features(N)
    made = batch(features)
    made = replace(made, train=replace(made.train, counts_N=torch.arange(1, N + 1)))
    corrected, plain = (build(features, debias=on).loss(made)["dap"] for on in (True, False))
    assert not torch.isclose(corrected, plain, rtol=1e-4)


def test_all_of_pretraining_gives_the_same_gradients_every_time() -> None:
    features = worlds.features(200)
    model = build(features, dropout=0.1, **PRETRAIN).train()
    generator = torch.Generator().manual_seed(1)
    many = Sequences(
        items_BL=torch.randint(200, (512, 6), generator=generator),
        lengths_B=torch.full((512,), 6),
    )

    def gradients() -> list[Tensor]:
        torch.manual_seed(2)
        model.zero_grad(set_to_none=True)
        made = worlds.batch(many, features, torch.Generator().manual_seed(3))
        model.loss(made)["loss"].backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match=r"pmmrec .*mmrec extract"):
        PMMRec(PMMRecConfig(), Catalogue(n_items=3, n_users=1, widths={}))
    with pytest.raises(UserError, match=r"align='nicl'.*text; set align=none"):
        PMMRec(PMMRecConfig(align="nicl"), Catalogue(n_items=3, n_users=1, widths={"text": 4}))
    with pytest.raises(UserError, match=r"nothing to learn"):
        PMMRecConfig(dap=False)
    with pytest.raises(UserError, match=r"align 'clip'.*known: "):
        PMMRecConfig(align="clip")
    with pytest.raises(UserError, match=r"dim=10 .* fusion_heads=4"):
        PMMRecConfig(dim=10)
