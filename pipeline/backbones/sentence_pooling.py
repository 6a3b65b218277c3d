"""What the folder of a sentence encoder says about itself, and the pooling that follows from it.

Legend: B texts of a batch, T tokens, D width of the embedding.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from features.errors import UserError

_MODULES = ("Transformer", "Pooling", "Normalize")
_MODES = ("cls", "mean", "max", "lasttoken")
_OLD = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolingConfig:
    """How one vector is made of a text's tokens."""

    mode: str = "mean"
    """``cls``, ``mean``, ``max`` or ``lasttoken``; ``own``: the model's own pooler."""
    normalize: bool = False
    """Whether the encoder's own last step scales the vector to unit length."""
    max_tokens: int | None = None
    lower: bool = False
    prompt: str = ""
    """What the checkpoint puts before every text."""
    folder: str = ""
    """Where below the checkpoint's folder the transformer itself is."""
    by: str = "the default"
    """Who says so."""

    def describe(self) -> str:
        """Name it for the table's provenance."""
        what = (
            "the model's own pooler"
            if self.mode == "own"
            else f"{self.mode} of the last layer's tokens"
        )
        return f"{what}{', unit length' if self.normalize else ''} ({self.by})"

    def pool(self, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """Make (B, D) of the last layer's states and the mask of what is no padding."""
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


def recipe(name: str, folder: Path, pooling: str | None = None) -> PoolingConfig:
    """Read the recipe of a checkpoint's folder; the mean, unless the folder says otherwise.

    Args:
        name: Of the backbone, for messages.
        folder: Of the checkpoint.
        pooling: ``cls`` or ``mean`` in place of what the folder says; ``own``: what the folder
            says, or else the model's pooler.

    Raises:
        UserError: It asks for something that is not done here, such as a dense layer on top.
    """
    modules = _json(folder / "modules.json")
    if not modules:
        return PoolingConfig(mode=pooling, by="as asked for") if pooling else PoolingConfig()
    kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
    for kind in kinds:
        if kind not in _MODULES:
            raise UserError(
                f"backbone {name!r}: its modules.json asks for a {kind} layer, which is not applied"
                f" here; take an encoder of {', '.join(_MODULES)} only"
            )
    base = folder / kinds.get("Transformer", "")
    sizes = _json(base / "sentence_bert_config.json") or {}
    limit = sizes.get("max_seq_length")
    asked = pooling if pooling != "own" else None
    config = _json(folder / kinds.get("Pooling", "1_Pooling") / "config.json") or {}
    about = _json(folder / "config_sentence_transformers.json") or {}
    prompt = (about.get("prompts") or {}).get(about.get("default_prompt_name")) or ""
    if prompt and not config.get("include_prompt", True):
        raise UserError(
            f"backbone {name!r}: it leaves its prompt {prompt!r} out of the pooling, which is not"
            " done here; take an encoder that does not"
        )
    return PoolingConfig(
        mode=asked or _mode(name, config),
        normalize="Normalize" in kinds,
        max_tokens=int(limit) if limit else None,
        lower=bool(sizes.get("do_lower_case")),
        prompt=prompt,
        folder=kinds.get("Transformer", ""),
        by="as asked for" if asked else "as the checkpoint says",
    )


def _mode(name: str, config: dict[str, Any]) -> str:
    given = config.get("pooling_mode") or [_OLD[key] for key in _OLD if config.get(key)] or "mean"
    modes = [given] if isinstance(given, str) else list(given)
    if len(modes) != 1 or modes[0] not in _MODES:
        raise UserError(
            f"backbone {name!r}: its pooling is {' and '.join(modes)}; only one of"
            f" {', '.join(_MODES)} is done here"
        )
    return str(modes[0])


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
