"""Load models of transformers from a folder: configuration, weights, errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from features.checkpoint_fingerprint import fingerprint, quiet_transformers, stored_config
from features.checkpoint_paths import check_shards
from pipeline.backbones import torch_utils

OWN_CODE: dict[str, Any] = {"trust_remote_code": False}  # without it, transformers asks the user
_HEADS = ("pooler", "mask_token", "position_ids")  # may be missing: no vector depends on them


def libraries() -> dict[str, str]:
    """Return the versions of the libraries that compute the vectors."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def read_config(folder: Path) -> Any:
    """Read a checkpoint's configuration.

    Raises:
        ValueError: The model is an encoder-decoder.
    """
    config = transformers.AutoConfig.from_pretrained(folder, **OWN_CODE)
    if config.is_encoder_decoder:
        raise ValueError("an encoder-decoder gives no single vector")
    return config


def load_model(
    folder: Path, config: Any, device: torch.device
) -> tuple[torch.nn.Module, list[str], str]:
    """Load the weights in float32, frozen, onto the device.

    Args:
        folder: Folder of the checkpoint.
        config: Configuration to build the model with.
        device: Device to run on.

    Returns:
        The model, the names of weights of heads that the checkpoint lacks, and the fingerprint.

    Raises:
        ValueError: Weights on which a vector depends are missing.
        UserError: An index of the weights names a file out of the folder.
    """
    check_shards(folder)
    model, report = transformers.AutoModel.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True, **OWN_CODE
    )
    missing = list(report["missing_keys"])
    needed = [key for key in missing if not any(head in key for head in _HEADS)]
    if needed:
        raise ValueError(f"{len(needed)} weights are missing, such as {min(needed)}")
    checkpoint = fingerprint(model.state_dict(), stored_config(folder), missing)
    torch_utils.freeze(model, device)
    return model, missing, checkpoint


@contextmanager
def loading(name: str, folder: Path, *, library: str = "transformers") -> Iterator[None]:
    """Silence transformers, and turn any error of the library into one line.

    Args:
        name: Name of the backbone, for the message.
        folder: Folder of the checkpoint, for the message.
        library: Name of the library, for the message.

    Raises:
        UserError: The checkpoint cannot be loaded.
    """
    with torch_utils.loading(name, library, folder), quiet_transformers():
        yield
