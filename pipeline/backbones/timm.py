"""Models of timm: pretrained names, files of weights, and folders that timm has saved.

A vector is what timm's model returns without its classifier. The tokens of the last layer are those
of ``forward_features``: the cells of a grid, or the tokens of a transformer. The states of
``layer-K`` are the K-th features of the model's ``feature_info``: those of a block of a
transformer, or of a stage of a convolutional model. ``layer-0`` is what the first of them takes.

Legend: B inputs of a batch, HWC the sides and channels of an image, CHW its planes, D width of a
token or vector.
"""

import difflib
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import timm.data
import torch
from PIL import Image

from features.checkpoint_fingerprint import fingerprint
from features.encoder_blocks import recorded_inputs, recorded_states
from features.errors import UserError
from pipeline.backbones import hub, torch_utils
from pipeline.backbones.base import TOKENS, InputBatch, Vectors, folder_files, split_pooling
from pipeline.backbones.hidden_states import HiddenStates
from pipeline.backbones.image_transforms import of_compose
from pipeline.backbones.torch_backbone import TorchBackbone

_DATA: Any = timm.data
_FILES = ("model.safetensors", "pytorch_model.bin")  # of a repository, in timm's order


class TimmBackbone(TorchBackbone):
    """One timm model that encodes images.

    Args:
        name: Name of the backbone.
        model: The model, with its weights and with or without its classifier.
        device: Device to run on; None chooses one.
        compute: ``float32`` or ``bfloat16``.

    Raises:
        UserError: The name asks for a pooling other than the model's own.
        ValueError: The model gives no single vector of an image.
    """

    modalities = ("image", "video")

    def __init__(self, name: str, model: Any, device: str | None, compute: str) -> None:
        super().__init__(name, device, compute)
        if split_pooling(name)[1] not in (None, "own"):
            raise UserError(
                f"backbone {name!r}: a model of timm has a pooling of its own; after the @ give"
                " own, or leave it out"
            )
        self.libraries = {"timm": timm.__version__, "torch": torch.__version__}
        architecture = str(model.pretrained_cfg["architecture"])
        model.reset_classifier(0)
        self.checkpoint = fingerprint(model.state_dict(), {"architecture": architecture})
        self.source = {"library": "timm", "model": architecture}
        torch_utils.freeze(model, self._device)
        self._model = model
        self._config = _DATA.resolve_model_data_config(model)
        self._transform = of_compose(_DATA.create_transform(**self._config), self._device)
        side = max(self._config["input_size"][1:])
        self.input_size = math.floor(side / self._config["crop_pct"])
        probe = self._inputs(InputBatch(images=[self.image(Image.new("RGB", (64, 64), "grey"))]))
        with torch.inference_mode():
            vectors_BD = model(**probe)
            if vectors_BD.ndim != 2:
                raise ValueError(f"timm's {architecture} gives no single vector of an image")
            self._encoders["image"] = self._find_states(probe)
        self.dim = int(vectors_BD.shape[1])
        self.blocks = self._deepest()

    def _find_states(self, probe: dict[str, Any]) -> HiddenStates:
        """Return the features that the model lists, if they have the widths of the list."""
        listed: Any = getattr(self._model, "feature_info", None) or []
        rows = [dict(row) for row in getattr(listed, "info", listed)]
        known = dict(self._model.named_modules())
        modules = tuple(known[row["module"]] for row in rows if row.get("module") in known)
        with ExitStack() as stack:
            records = [stack.enter_context(recorded_states(module)) for module in modules]
            firsts = [stack.enter_context(recorded_inputs(module)) for module in modules[:1]]
            last = self._run(**probe).last_hidden_state
        widths = [self._width(record[0]) if len(record) == 1 else 0 for record in records]
        if widths != [row.get("num_chs") for row in rows]:
            modules = ()
        dims = {TOKENS: self._width(last)}
        if modules:
            dims["layer-0"] = self._width(firsts[0][0])
        dims |= {f"layer-{k}": widths[k - 1] for k in range(1, len(modules))}
        return HiddenStates(run=self._run, blocks=modules, dims=dims)

    def _run(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self._model.forward_features(x))

    def _width(self, hidden: torch.Tensor) -> int:
        hidden = self._channels_first(hidden)
        return int(hidden.shape[1 if hidden.ndim == 4 else -1])

    def _channels_first(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return a grid as (B, D, rows, columns); some transformers have the channels last."""
        has_last = str(getattr(self._model, "output_fmt", "")) in ("NHWC", "Format.NHWC")
        return hidden.permute(0, 3, 1, 2) if has_last and hidden.ndim == 4 else hidden

    # -- the interface --------------------------------------------------------------------------

    def image_preprocessing(self) -> str:
        """Describe timm's transform."""
        return f"timm {json.dumps(self._config, sort_keys=True, default=str)}"

    def image(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Resize and crop to (H, W, 3) 8-bit pixels; they are normalized in the batch."""
        return self._transform.prepare(image)

    # -- the forward pass -----------------------------------------------------------------------

    def _describe_pooling(self, modality: str) -> str:
        pooling = getattr(self._model, "global_pool", "")
        pooling = getattr(pooling, "pool_type", pooling)
        return f"timm's own pooling ({pooling})" if isinstance(pooling, str) else "timm's own"

    def _inputs(self, batch: InputBatch) -> dict[str, Any]:
        return {"x": self._transform.batch(batch.images)}

    def _image_vectors(self, images: Sequence[Any]) -> torch.Tensor:
        vectors_BD: torch.Tensor = self._model(**self._inputs(InputBatch(images=images)))
        return vectors_BD

    def _split(
        self, hidden: torch.Tensor, batch: InputBatch, inputs: dict[str, Any]
    ) -> list[Vectors]:
        return super()._split(self._channels_first(hidden), batch, inputs)


def from_name(name: str, model: str, device: str | None, compute: str) -> TimmBackbone:
    """Load a pretrained model of timm, a file of weights, or a folder.

    Args:
        name: Name of the backbone.
        model: ``ARCH`` or ``ARCH.TAG`` as timm lists them, or ``ARCH/FILE``.
        device: Device to run on; None chooses one.
        compute: ``float32`` or ``bfloat16``.

    Raises:
        UnavailableError: The weights are not in the cache and cannot be downloaded.
        UserError: timm has no such model, or the file cannot be loaded.
    """
    arch, _, file = model.partition("/")
    config = _find_config(name, arch)
    if file:
        path = Path(file).expanduser()
        if not path.is_file():
            raise UserError(f"backbone {name!r}: {file!r} is not a file; give timm:ARCH/FILE")
        return _load(name, arch, path, device, compute)
    repository = str(config.hf_hub_id or "")
    if not repository or config.custom_load:
        raise UserError(
            f"backbone {name!r}: timm has no weights of {arch} on the hub that can be read; give"
            " timm:ARCH/FILE"
        )
    files = (config.hf_hub_filename,) if config.hf_hub_filename else _FILES
    path = hub.file(name, repository, files)
    return _load(name, arch, path, device, compute, classes=int(config.num_classes))


def from_package(
    name: str, arch: str, weights: Path, device: str | None, compute: str
) -> TimmBackbone:
    """Load a model of timm with the weights of an installed package.

    The tensors of such a file may have other names than timm's, but have the same order.

    Raises:
        UserError: The weights do not fit.
    """
    return _load(name, arch, weights, device, compute, by_order=True)


def from_folder(name: str, folder: Path, device: str | None, compute: str) -> TimmBackbone:
    """Load a folder that timm has saved: ``config.json`` and weights.

    Raises:
        UserError: The configuration or the weights are missing or do not fit.
    """
    with torch_utils.loading(name, "timm", folder):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        backbone = TimmBackbone(name, model, device, compute)
    backbone.source["folder"] = str(folder.absolute())
    backbone.weight_files = folder_files(folder)
    return backbone


def _find_config(name: str, arch: str) -> Any:
    """Return timm's configuration of pretrained weights."""
    base, _, tag = arch.partition(".")
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=4)
        examples = f"close: {', '.join(close)}" if close else "timm.list_models() lists them"
        raise UserError(f"backbone {name!r}: timm has no model {base!r} ({examples})")
    tags = [known.partition(".")[2] for known in timm.list_models(f"{base}.*", pretrained=True)]
    if tag and tag not in tags:
        raise UserError(
            f"backbone {name!r}: timm has no tag {tag!r} of {base}; give one of"
            f" {', '.join(tags) or 'none'}"
        )
    return timm.get_pretrained_cfg(arch)


def _load(
    name: str,
    arch: str,
    path: Path,
    device: str | None,
    compute: str,
    *,
    classes: int = 0,
    by_order: bool = False,
) -> TimmBackbone:
    """Build a model with the weights of a file, read as weights only.

    Args:
        name: Name of the backbone.
        arch: Architecture; a tag after it chooses the preprocessing.
        path: File of the weights.
        device: Device to run on; None chooses one.
        compute: ``float32`` or ``bfloat16``.
        classes: Number of classes, if the weights have no classifier of timm's name.
        by_order: Whether the tensors get timm's names in the order of the file.
    """
    with torch_utils.loading(name, "timm", path):
        weights = timm.models.load_state_dict(str(path), weights_only=True)
        if by_order:
            names = list(timm.create_model(arch).state_dict())
            weights = dict(zip(names, weights.values(), strict=True))
        classifier = _find_config(name, arch).classifier
        first = classifier[0] if isinstance(classifier, tuple) else classifier
        head = weights.get(f"{first}.weight")
        classes = classes if head is None else len(head)
        # Equal numbers of classes make timm refuse missing weights and unknown ones.
        overlay = {"state_dict": weights, "num_classes": classes}
        model: Any = timm.create_model(
            arch, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay
        )
        model.pretrained_cfg.pop("state_dict", None)
        backbone = TimmBackbone(name, model, device, compute)
    backbone.weight_files = (path,)
    return backbone
