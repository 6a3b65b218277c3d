"""From a picture to a model's input: 8-bit pixels in threads, floats in batches on the device.

Image processors turn each picture into floats of four times the bytes, one by one. What follows
resizing and cropping is linear and the same for all pictures, so it waits until they are together:
the result is the library's own, to rounding.

Legend: B pictures of a batch, H and W sides of the model's input, HWC a picture's sides and
channels, CHW its planes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from PIL.Image import Resampling

Pixels8 = npt.NDArray[np.uint8]
_TOLERANCE = 1e-6  # of normalised values, which are about 1
_RESAMPLE = {"bilinear": Resampling.BILINEAR, "bicubic": Resampling.BICUBIC}
_PROBES = ((97, 61), (64, 131), (40, 40), (300, 200))  # width, height


class Pixels:
    """Resize, crop in the middle, scale to 0..1, normalise.

    Args:
        size: Of the shorter side, the other one following; or height and width, whatever they were.
        crop: Height and width that are cut out of the middle; none: all of it.
        mean: Of each channel, taken off.
        std: Of each channel, divided by.
        resample: ``bilinear`` or ``bicubic``.
        engine: Whose arithmetic: ``pillow``'s, as open_clip has it, or ``torch``'s, as the image
            processors of transformers have it; they differ by some levels of 255, and in which
            of two middles a crop takes.
        device: Where :meth:`batch` puts its result.
    """

    def __init__(
        self,
        *,
        size: int | tuple[int, int],
        crop: tuple[int, int] | None,
        mean: Sequence[float],
        std: Sequence[float],
        resample: str,
        engine: Literal["pillow", "torch"] = "pillow",
        device: torch.device | None = None,
    ) -> None:
        self._size = size
        self._crop = crop
        self._resample = _RESAMPLE[resample]
        self._torch = engine == "torch"
        self._device = device or torch.device("cpu")
        scale, shift = 1 / (255 * np.asarray(std)), -np.asarray(mean) / np.asarray(std)
        self._scale = torch.tensor(scale, dtype=torch.float32, device=device).view(-1, 1, 1)
        self._shift = torch.tensor(shift, dtype=torch.float32, device=device).view(-1, 1, 1)

    def prepare(self, picture: Image.Image) -> Pixels8:
        """Resize and crop an RGB picture to (H, W, 3) contiguous 8-bit pixels."""
        height, width = self._sides(picture.height, picture.width)
        box = self._box(height, width)
        if self._torch:
            return _torch_resized(picture, height, width, box, self._resample)
        return np.array(picture.resize((width, height), self._resample).crop(box))

    def batch(self, pictures: Sequence[Pixels8]) -> torch.Tensor:
        """Stack and normalise prepared pictures: (B, 3, H, W) float32 on the device."""
        high, wide, channels = pictures[0].shape
        if self._device.type == "cpu":
            # One after another, as each fits the cache; in planes, as models take them.
            x_BCHW = torch.empty((len(pictures), channels, high, wide))
            for x_CHW, pixels_HWC in zip(x_BCHW, pictures, strict=True):
                x_CHW.copy_(torch.from_numpy(pixels_HWC).permute(2, 0, 1))
                x_CHW.mul_(self._scale).add_(self._shift)
            return x_BCHW
        # Pinned memory is copied while the device still works on the batch before.
        pinned = self._device.type == "cuda"
        shape = (len(pictures), high, wide, channels)
        pixels_BHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        np.stack(pictures, out=pixels_BHWC.numpy())
        x_BCHW = pixels_BHWC.to(self._device, non_blocking=pinned).permute(0, 3, 1, 2).float()
        return x_BCHW.mul_(self._scale).add_(self._shift)

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self._size, int):
            return self._size
        short, long = sorted((height, width))
        other = int(self._size * long / short)
        return (self._size, other) if height <= width else (other, self._size)

    def _box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of what is kept of the resized picture."""
        high, wide = self._crop or (height, width)
        assert high <= height
        assert wide <= width
        middle: Callable[[float], int] = int if self._torch else round  # as the libraries have it
        top, left = middle((height - high) / 2), middle((width - wide) / 2)
        return left, top, left + wide, top + high


def _torch_resized(
    picture: Image.Image,
    height: int,
    width: int,
    box: tuple[int, int, int, int],
    resample: Resampling,
) -> Pixels8:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as tvf

    mode = (
        InterpolationMode.BICUBIC if resample == Resampling.BICUBIC else InterpolationMode.BILINEAR
    )
    # Channels last, as they come: planes would be copied there and back.
    x_CHW = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    x_CHW = tvf.resize(x_CHW, [height, width], interpolation=mode, antialias=True)
    left, top, right, bottom = box
    x_HWC = x_CHW[:, top:bottom, left:right].permute(1, 2, 0)
    return np.ascontiguousarray(x_HWC.numpy())


def of_open_clip(cfg: Any, device: torch.device) -> Pixels | None:
    """Do what open_clip's ``image_transform_v2(cfg)`` does; nothing where it pads."""
    from open_clip.transform import image_transform_v2

    high, wide = cfg.size if isinstance(cfg.size, (tuple, list)) else (cfg.size, cfg.size)
    if cfg.resize_mode == "longest" or (cfg.resize_mode == "shortest" and high != wide):
        return None
    squash = cfg.resize_mode == "squash"
    found = Pixels(
        size=(high, wide) if squash else high,
        crop=None if squash else (high, wide),
        mean=cfg.mean,
        std=cfg.std,
        resample="bilinear" if cfg.interpolation == "bilinear" else "bicubic",
        device=device,
    )
    return _checked(found, image_transform_v2(cfg, is_train=False))


def of_processor(processor: Any, device: torch.device) -> Pixels | None:
    """Do what an image processor of transformers does; nothing where it does more than we know."""
    size, crop = (dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size"))
    size = {key: value for key, value in size.items() if value is not None}
    names = {Resampling.BILINEAR: "bilinear", Resampling.BICUBIC: "bicubic"}
    resample = names.get(getattr(processor, "resample", None))  # type: ignore[arg-type]
    steps = ("do_resize", "do_rescale", "do_normalize")
    if resample is None or not all(getattr(processor, name, False) for name in steps):
        return None
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        return None
    cut = getattr(processor, "do_center_crop", False)
    sides = size.get("shortest_edge") or (size["height"], size["width"])
    crop_sides = (crop["height"], crop["width"]) if cut and crop.get("height") else None
    least = (sides, sides) if isinstance(sides, int) else sides
    if crop_sides and (crop_sides[0] > least[0] or crop_sides[1] > least[1]):
        return None  # it pads
    factor = 255 * processor.rescale_factor
    found = Pixels(
        size=sides,
        crop=crop_sides,
        mean=[value / factor for value in processor.image_mean],
        std=[value / factor for value in processor.image_std],
        resample=resample,
        engine="torch" if getattr(processor, "backend", "") == "torchvision" else "pillow",
        device=device,
    )
    return _checked(
        found, lambda picture: processor(images=picture, return_tensors="pt")["pixel_values"][0]
    )


def _checked(found: Pixels, library: Callable[[Image.Image], Any]) -> Pixels | None:
    """Give ``found`` if it makes the same of some pictures as the library does."""
    random = np.random.RandomState(0)
    for width, height in _PROBES:
        noise = random.randint(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        theirs_CHW = torch.as_tensor(library(picture))
        ours_BCHW = found.batch([found.prepare(picture)]).cpu()
        if ours_BCHW[0].shape != theirs_CHW.shape:
            return None
        if float((ours_BCHW[0] - theirs_CHW).abs().max()) > _TOLERANCE:
            return None
    return found
