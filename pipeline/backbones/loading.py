"""From the name of a backbone, as a user types it, to the loaded backbone. Nothing imports torch.

A name is a short name of the registry, ``open_clip:ARCH/TAG``, ``timm:NAME``, ``hf:ORG/NAME``,
``sentence-transformers:NAME`` or a local folder.
``@cls``, ``@mean`` or ``@own`` after it chooses how one vector is made of the tokens. ``@30`` at
the end truncates texts to 30 tokens, and ``@mask-75`` masks 75% of the patches of a masked
autoencoder.
"""

from pathlib import Path

from features.errors import UserError, shorten
from features.registry import OWN
from pipeline.backbones.base import POOLINGS, Backbone, split_mask, split_max_tokens, split_pooling
from pipeline.backbones.entries import hf, open_clip
from pipeline.backbones.packages import require_library
from pipeline.backbones.registry import BACKBONES

OTHER_NAMES = (
    "open_clip:ARCH/TAG, timm:NAME, hf:ORG/NAME, sentence-transformers:NAME, or a local folder"
)
_LONGEST_NAME = 400  # characters of an unknown name that a message repeats


def load_backbone(name: str, *, device: str | None = None, compute: str = "float32") -> Backbone:
    """Load the backbone of a name, with its weights on the device.

    Args:
        name: A short name, ``open_clip:ARCH/TAG``, ``timm:NAME``, ``hf:ORG/NAME``,
            ``sentence-transformers:NAME`` or a local folder; after it ``@cls``, ``@mean`` or
            ``@own`` may choose the pooling. ``@N`` at the end truncates texts to N tokens, and
            ``@mask-N`` masks N% of the patches.
        device: Device to run on; None chooses a CUDA device if there is one, else the CPU.
        compute: Arithmetic of the forward pass: ``float32`` or ``bfloat16``.

    Raises:
        UserError: The name is unknown, or its weights cannot be used.
        UnavailableError: The weights are not on this machine and cannot be downloaded.

    Examples:
        >>> load_backbone("hashed").dim
        128
    """
    if not name.strip():
        raise UserError(
            f"the name of a backbone is empty; known: {', '.join(BACKBONES)}; or give {OTHER_NAMES}"
        )
    name, max_tokens = name_and_max_tokens(name)
    name, percent = name_and_mask(with_mask(*name_and_mask(name)))
    backbone = _load_named(name, device, compute)
    if percent is not None:
        backbone.mask_patches(percent)
    if max_tokens is not None:
        backbone.limit_tokens(max_tokens)
    return backbone


def name_and_max_tokens(name: str) -> tuple[str, int | None]:
    """Split ``NAME@30`` into the name and 30, unless the whole is the path of a folder.

    The number is None if the name has none.
    """
    if _is_folder(Path(name).expanduser()):
        return name, None
    return split_max_tokens(name)


def name_and_mask(name: str) -> tuple[str, int | None]:
    """Split ``NAME@mask-75`` into the name and 75, unless the whole is the path of a folder.

    The percentage is None if the name has none.
    """
    if _is_folder(Path(name).expanduser()):
        return name, None
    return split_mask(name)


def with_mask(name: str, percent: int | None) -> str:
    """Return the name of a backbone that masks a percentage of the patches; None masks none.

    It is the short name of the registry, such as ``mae-b-mask-75``, if there is one.
    """
    if percent is None:
        return name
    short = f"{name}-mask-{percent}"
    return short if short in BACKBONES else f"{name}@mask-{percent}"


def _load_named(name: str, device: str | None, compute: str) -> Backbone:
    """Load a backbone whose name has no number of tokens."""
    base, pooling = split_pooling(name)
    if base in BACKBONES or base in BACKBONES.broken:
        return _load_entry(base, name, device, compute)
    kind, _, rest = base.partition(":")
    if kind == "hf" and rest:
        return hf(rest, "", (), 0).make(name, device, compute)
    if kind == "open_clip" and rest:
        return _load_open_clip(name, rest, pooling, device, compute)
    if kind == "timm" and rest:
        return _load_timm(name, rest, pooling, device, compute)
    if kind == "sentence-transformers" and rest:
        return _load_sentence_transformers(name, rest, pooling, device, compute)
    folder = Path(base).expanduser()
    if _is_folder(Path(name).expanduser()):  # the @ belongs to the folder's name
        folder, pooling = Path(name).expanduser(), None
    if _is_folder(folder):
        from pipeline.backbones.local_folder import open_folder

        return open_folder(folder.resolve(), pooling, device, compute)
    if name.partition("@")[0] in BACKBONES:
        raise UserError(
            f"backbone {name!r}: after the @ give one of {', '.join(POOLINGS)}, or at the end a"
            " number of tokens or mask-75"
        )
    raise UserError(
        f"unknown backbone {shorten(name, _LONGEST_NAME)!r}; known: {', '.join(BACKBONES)};"
        f" or give {OTHER_NAMES}"
    )


def _is_folder(path: Path) -> bool:
    """Return True for a folder, False also for a path that is too long to be one."""
    try:
        return path.is_dir()
    except OSError:
        return False


def with_pooling(name: str, pooling: str | None) -> str:
    """Return ``NAME@POOLING``, or the name alone if there is no pooling."""
    return f"{name}@{pooling}" if pooling else name


def _load_entry(base: str, name: str, device: str | None, compute: str) -> Backbone:
    """Load an entry of the registry; an error of an installed package becomes one line."""
    entry, origin = BACKBONES.find(base), BACKBONES.origin(base)
    if origin == OWN:
        return entry.make(name, device, compute)
    try:
        return entry.make(name, device, compute)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"backbone {name!r} of {origin} cannot be loaded ({reason}); ask the package's authors"
        ) from error


def _load_open_clip(
    name: str, checkpoint: str, pooling: str | None, device: str | None, compute: str
) -> Backbone:
    arch, _, tag = checkpoint.partition("/")
    if not tag:
        raise UserError(
            f"backbone {name!r} names no weights; give open_clip:ARCH/TAG,"
            " where TAG is one of open_clip's or a file"
        )
    file = Path(tag).expanduser()
    tag_name = file.stem if file.is_file() else tag
    name = with_pooling(f"open_clip:{arch}/{tag_name}", pooling)
    return open_clip(arch, tag, 0, "").make(name, device, compute)


def _load_timm(
    name: str, model: str, pooling: str | None, device: str | None, compute: str
) -> Backbone:
    """Load ``ARCH``, ``ARCH.TAG``, ``ARCH/FILE`` or a folder; a path is no part of the name."""
    require_library(name, "timm", "timm")
    from pipeline.backbones.timm import from_folder, from_name

    path = Path(model).expanduser()
    if path.is_dir():
        name = with_pooling(f"timm:{path.resolve().name}", pooling)
        return from_folder(name, path.resolve(), device, compute)
    arch, _, file = model.partition("/")
    if file and Path(file).expanduser().is_file():
        name = with_pooling(f"timm:{arch}/{Path(file).stem}", pooling)
    return from_name(name, model, device, compute)


def _load_sentence_transformers(
    name: str, model: str, pooling: str | None, device: str | None, compute: str
) -> Backbone:
    """Load a folder, or a repository of the hub; a name without ``ORG/`` is the library's own."""
    require_library(name, "sentence_transformers", "sentence-transformers")
    folder = Path(model).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        name = with_pooling(f"sentence-transformers:{folder.name}", pooling)
    else:
        from pipeline.backbones import hub

        folder = hub.folder(name, model if "/" in model else f"sentence-transformers/{model}")
    from pipeline.backbones.sentence_transformers import SentenceTransformersBackbone

    return SentenceTransformersBackbone(name, folder, device, compute)


def check_modality(name: str, modality: str) -> None:
    """Check that a backbone takes a modality, if its name is in the registry.

    The check needs no weights. Other names are checked once the backbone is loaded.

    Raises:
        UserError: The backbone does not take the modality, such as a text model for images.
    """
    base = name_and_mask(name_and_max_tokens(name)[0])[0]
    entry = BACKBONES.get(split_pooling(base)[0])
    if entry is not None and modality not in entry.modalities:
        raise wrong_modality(name, entry.modalities, modality)


def wrong_modality(name: str, modalities: tuple[str, ...], modality: str) -> UserError:
    """Return the error for a backbone that does not take a modality.

    Args:
        name: Name of the backbone.
        modalities: Modalities that it takes.
        modality: Modality that it should take.
    """
    fitting = [known for known, entry in BACKBONES.items() if modality in entry.modalities]
    return UserError(
        f"backbone {name!r} takes {' and '.join(modalities)}, not {modality};"
        f" for --{modality} give one of {', '.join(fitting)}"
    )
