"""Text encoders of sentence-transformers, run by the library's own modules.

``hf:ORG/NAME`` runs the same checkpoints in transformers, if their modules are a transformer, a
pooling and a normalization. This backbone runs all modules that follow a transformer, dense layers
included.

Legend: B texts of a batch, T tokens, D width of the embedding.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentence_transformers
import torch

from features.checkpoint_fingerprint import fingerprint, stored_config
from features.checkpoint_paths import check_shards, named_path
from features.errors import UserError
from pipeline.backbones import torch_utils
from pipeline.backbones.base import InputBatch, TokenIds, folder_files, split_pooling
from pipeline.backbones.hidden_states import of_transformers
from pipeline.backbones.torch_backbone import TorchBackbone
from pipeline.backbones.transformers_loading import libraries, loading

_LIBRARY = "sentence_transformers"
_MODULES = "modules.json"


class SentenceTransformersBackbone(TorchBackbone):
    """A sentence-transformers model in a folder of the library's own format.

    Args:
        name: Name of the backbone.
        folder: Folder of the checkpoint.
        device: Device to run on; None chooses one.
        compute: ``float32`` or ``bfloat16``.

    Raises:
        UserError: The folder cannot be loaded, names paths out of the folder or modules of other
            libraries, begins with a module other than a transformer, or the name asks for a
            pooling.
    """

    modalities = ("text",)

    def __init__(self, name: str, folder: Path, device: str | None, compute: str) -> None:
        super().__init__(name, device, compute)
        if split_pooling(name)[1] not in (None, "own"):
            raise UserError(
                f"backbone {name!r}: its folder gives the pooling; after the @ give own, leave it"
                " out, or take the checkpoint by hf:ORG/NAME"
            )
        self.libraries = {
            "sentence-transformers": sentence_transformers.__version__, **libraries()
        }  # fmt: skip
        with loading(name, folder, library="sentence-transformers"):
            base = _check_modules(name, folder)
            model = sentence_transformers.SentenceTransformer(
                str(folder),
                device=str(self._device),
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"dtype": torch.float32},
            )
            torch_utils.freeze(model, self._device)
            config = {"modules": repr(model), "transformer": stored_config(base)}
            self.checkpoint = fingerprint(model.state_dict(), config)
            self.source = {"library": "sentence-transformers", "folder": str(folder.absolute())}
            self.weight_files = folder_files(folder)
            self._model: Any = model
            self._prompt = model.prompts.get(model.default_prompt_name or "") or None
            self._add_encoder(model[0])
        self.blocks = self._deepest()

    def _add_encoder(self, transformer: Any) -> None:
        self._pad = int(transformer.tokenizer.pad_token_id or 0)
        self.token_limit = int(self._model.max_seq_length or transformer.tokenizer.model_max_length)
        self._extras = {
            key: value
            for key, value in self._model.preprocess(["a"], prompt=self._prompt).items()
            if key == "prompt_length"
        }
        probe = InputBatch(texts=self.texts(["a"]))
        encoder, inputs = transformer.auto_model, self._inputs(probe)
        depth = int(getattr(encoder.config, "num_hidden_layers", 0))
        self._encoders["text"] = of_transformers(encoder, depth, encoder, inputs)
        self.dim = int(self.embed(probe).shape[1])

    # -- the interface --------------------------------------------------------------------------

    def text_preprocessing(self) -> str:
        """Describe the library's preprocessing."""
        transformer = self._model[0]
        probe = self.texts([torch_utils.PROBE])[0]
        steps = f"prompt {self._prompt!r}, " if self._prompt else ""
        kind = type(transformer.tokenizer).__name__
        digest = torch_utils.short_hash(transformer.tokenizer.get_vocab(), probe.tolist())
        return f"{steps}{kind} {digest}, at most {self._model.max_seq_length} tokens"

    def limit_tokens(self, max_tokens: int) -> None:
        """Truncate texts to fewer tokens; the library's preprocessing does so."""
        super().limit_tokens(max_tokens)
        self._model.max_seq_length = max_tokens

    def texts(self, texts: Sequence[str]) -> list[TokenIds]:
        """Run the library's preprocessing, and cut the padding off."""
        inputs = self._model.preprocess(list(texts), prompt=self._prompt)
        pairs = zip(inputs["input_ids"].numpy(), inputs["attention_mask"].numpy(), strict=True)
        return [ids_T[mask_T > 0] for ids_T, mask_T in pairs]

    # -- the forward pass -----------------------------------------------------------------------

    def _describe_pooling(self, modality: str) -> str:
        modules = [type(module).__name__ for module in self._model]
        mode = next(
            (module.pooling_mode for module in self._model if hasattr(module, "pooling_mode")), None
        )
        return f"{', '.join(modules)} of sentence-transformers{f' ({mode})' if mode else ''}"

    def _inputs(self, batch: InputBatch) -> dict[str, Any]:
        ids_BT = torch_utils.pad(batch.texts, self._pad, self._device)
        lengths_B1 = torch.tensor([[len(ids)] for ids in batch.texts])
        mask_BT = (torch.arange(ids_BT.shape[1]) < lengths_B1).long()
        return {"input_ids": ids_BT, "attention_mask": torch_utils.send(mask_BT, self._device)}

    def _lengths(self, batch: InputBatch) -> list[int]:
        return [len(ids) for ids in batch.texts]

    def _text_vectors(self, texts: Sequence[TokenIds]) -> torch.Tensor:
        features = {**self._inputs(InputBatch(texts=texts)), **self._extras}
        vectors_BD: torch.Tensor = self._model(features)["sentence_embedding"]
        return vectors_BD


def _check_modules(name: str, folder: Path) -> Path:
    """Check the modules of a folder before the library imports them.

    Returns:
        Folder of the transformer.

    Raises:
        UserError: A module is not the library's, or its path leads out of the folder; the first
            module is not a transformer.
    """
    check_shards(folder)
    if not (folder / _MODULES).is_file():
        return folder
    modules = json.loads((folder / _MODULES).read_text(encoding="utf-8"))
    for module in modules:
        named_path(folder, _MODULES, str(module["path"]))
        if not str(module["type"]).startswith(f"{_LIBRARY}."):
            raise UserError(
                f"backbone {name!r}: {folder / _MODULES} names the module {module['type']!r}, which"
                " is not one of sentence-transformers; take an encoder of the library's modules"
            )
    first = str(modules[0]["type"]).rpartition(".")[2]
    if first != "Transformer":
        raise UserError(
            f"backbone {name!r}: its first module is {first}, which is not supported; take an"
            " encoder that begins with a Transformer"
        )
    base = folder / str(modules[0]["path"])
    check_shards(base)
    return base
