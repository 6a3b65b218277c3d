"""Read the pooling configuration of a text encoder in the format of sentence-transformers.

Legend: B texts of a batch, T tokens, D width of the embedding.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from features.checkpoint_paths import named_path
from features.errors import UserError

_MODULES = ("Transformer", "Pooling", "Normalize")
_MODES = ("cls", "mean", "max", "lasttoken")
_FLAGS = {  # of older configurations
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolingConfig:
    """Configuration of a text encoder: the pooling of tokens, and the preparation of texts."""

    mode: str = "mean"
    """``cls``, ``mean``, ``max``, ``lasttoken``, or ``own``: the model's own pooler."""
    normalize: bool = False
    """True if the last step of the encoder scales the vector to unit length."""
    max_tokens: int | None = None
    """Number of tokens to which texts are truncated; None if the checkpoint has no limit."""
    lower: bool = False
    """True if texts are lower-cased first."""
    prompt: str = ""
    """Text that is put before every text."""
    folder: str = ""
    """Folder of the transformer, relative to the checkpoint's folder."""
    origin: str = "the default"
    """Origin of the mode, for the provenance of a table."""

    def describe(self) -> str:
        """Describe the pooling for the provenance of a table."""
        if self.mode == "own":
            pooling = "the model's own pooler"
        else:
            pooling = f"{self.mode} of the last layer's tokens"
        return f"{pooling}{', unit length' if self.normalize else ''} ({self.origin})"

    def pool(self, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """Pool the last layer's states to (B, D).

        Args:
            hidden_BTD: Hidden states.
            mask_BT: 1 for tokens, 0 for padding.
        """
        hidden_BTD = hidden_BTD.float()
        mask_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
        if self.mode == "cls":
            pooled_BD = hidden_BTD[:, 0]
        elif self.mode == "mean":
            pooled_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1e-9)
        elif self.mode == "max":
            pooled_BD = hidden_BTD.masked_fill(mask_BT1 == 0, -1e9).amax(1)
        else:
            last_B = mask_BT.sum(1) - 1
            pooled_BD = hidden_BTD[torch.arange(len(hidden_BTD)), last_B]
        return torch.nn.functional.normalize(pooled_BD, dim=-1) if self.normalize else pooled_BD


def read_pooling(name: str, folder: Path, pooling: str | None = None) -> PoolingConfig:
    """Read the pooling configuration of a checkpoint; without one, the mode is the mean.

    Args:
        name: Name of the backbone, for messages.
        folder: Folder of the checkpoint.
        pooling: ``cls`` or ``mean`` replaces the mode that the folder gives; ``own`` takes the
            mode that the folder gives, else the model's pooler.

    Raises:
        UserError: The configuration asks for a step that is not supported, such as a dense layer,
            or names a folder outside the checkpoint's.
    """
    modules = _json(folder / "modules.json")
    if not modules:
        return PoolingConfig(mode=pooling, origin="as asked for") if pooling else PoolingConfig()
    kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
    for kind in kinds:
        if kind not in _MODULES:
            raise UserError(
                f"backbone {name!r}: its modules.json asks for a {kind} layer, which is not"
                f" supported; take an encoder of {', '.join(_MODULES)} only"
            )
    for path in kinds.values():
        named_path(folder, "modules.json", path)
    base = folder / kinds.get("Transformer", "")
    sizes = _json(base / "sentence_bert_config.json") or {}
    limit = sizes.get("max_seq_length")
    asked = pooling if pooling != "own" else None
    config = _json(folder / kinds.get("Pooling", "1_Pooling") / "config.json") or {}
    prompts = _json(folder / "config_sentence_transformers.json") or {}
    prompt = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name")) or ""
    if prompt and not config.get("include_prompt", True):
        raise UserError(
            f"backbone {name!r}: it leaves its prompt {prompt!r} out of the pooling, which is not"
            " supported; take an encoder that pools it"
        )
    return PoolingConfig(
        mode=asked or _mode(name, config),
        normalize="Normalize" in kinds,
        max_tokens=int(limit) if limit else None,
        lower=bool(sizes.get("do_lower_case")),
        prompt=prompt,
        folder=kinds.get("Transformer", ""),
        origin="as asked for" if asked else "as the checkpoint says",
    )


def _mode(name: str, config: dict[str, Any]) -> str:
    flagged = [mode for flag, mode in _FLAGS.items() if config.get(flag)]
    stored = config.get("pooling_mode") or flagged or "mean"
    modes = [stored] if isinstance(stored, str) else list(stored)
    if len(modes) != 1 or modes[0] not in _MODES:
        raise UserError(
            f"backbone {name!r}: its pooling is {' and '.join(modes)}; only one of"
            f" {', '.join(_MODES)} is supported"
        )
    return str(modes[0])


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
