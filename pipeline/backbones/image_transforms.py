"""From a picture to a model's input: 8-bit pixels in threads, floats in batches on the device.

Image processors turn each picture into floats of four times the bytes, one by one. What follows
resizing and cropping is linear and the same for all pictures, so it waits until they are together:
the result is the library's own, to rounding.

Legend: B pictures of a batch, H and W sides of the model's input, HWC a picture's sides and
channels, CHW its planes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from PIL.Image import Resampling

from pipeline.media.images import DRAFTED

Pixels8 = npt.NDArray[np.uint8]
TOLERANCE = 1e-6  # of normalised values, which are about 1
_PROBES = ((97, 61), (64, 131), (40, 40), (300, 200))  # width, height


class Pixels:
    """The way of pictures into a model.

    Args:
        resize: What makes (H, W, 3) contiguous 8-bit pixels of an RGB picture.
        mean: Of each channel on the scale 0..1, taken off.
        std: Of each channel, divided by.
        device: Where batches go.
    """

    def __init__(
        self,
        resize: Callable[[Image.Image], Pixels8],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ) -> None:
        self.prepare = resize
        self._device = device
        scale, shift = 1 / (255 * np.asarray(std)), -np.asarray(mean) / np.asarray(std)
        self._scale = torch.tensor(scale, dtype=torch.float32, device=device).view(-1, 1, 1)
        self._shift = torch.tensor(shift, dtype=torch.float32, device=device).view(-1, 1, 1)

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
        # Copied as bytes out of pinned memory, the forward pass being queued meanwhile; what
        # comes out has its channels last, as convolutions there want it.
        pinned = self._device.type == "cuda"
        shape = (len(pictures), high, wide, channels)
        pixels_BHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        np.stack(pictures, out=pixels_BHWC.numpy())
        x_BCHW = pixels_BHWC.to(self._device, non_blocking=pinned).permute(0, 3, 1, 2).float()
        return x_BCHW.mul_(self._scale).add_(self._shift)


def of_open_clip(cfg: Any, device: torch.device) -> Pixels:
    """Do what open_clip's ``image_transform_v2(cfg)`` does, by its own steps on pictures.

    Those of which decoding gave a draft are resized by torchvision's kernels on 8 bits, in less
    than half the time: values may differ by 1 of 255, on noise by 2.
    """
    from open_clip.transform import image_transform_v2

    *steps, _, normalize = image_transform_v2(cfg, is_train=False).transforms
    drafts = _on_bytes(steps)

    def resize(picture: Image.Image) -> Pixels8:
        if drafts is not None and picture.info.get(DRAFTED):
            return drafts(picture)
        for step in steps:
            picture = step(picture)
        return np.array(picture)

    return Pixels(resize, mean=normalize.mean, std=normalize.std, device=device)


def _on_bytes(steps: Sequence[Any]) -> Callable[[Image.Image], Pixels8] | None:
    """Do the steps before a tensor on 8-bit pixels; nothing where there are any but two."""
    from open_clip.transform import MaybeConvertMode
    from torchvision.transforms import CenterCrop, Resize
    from torchvision.transforms.v2 import functional as tvf

    first, *rest = [step for step in steps if not isinstance(step, MaybeConvertMode)]
    if not isinstance(first, Resize) or not all(isinstance(step, CenterCrop) for step in rest):
        return None

    def resize(picture: Image.Image) -> Pixels8:
        x_CHW = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        x_CHW = tvf.resize(x_CHW, first.size, first.interpolation, antialias=True)
        for crop in rest:
            x_CHW = tvf.center_crop(x_CHW, crop.size)
        return np.ascontiguousarray(x_CHW.permute(1, 2, 0).numpy())

    return resize


def of_processor(processor: Any, device: torch.device) -> Pixels | None:
    """Do what an image processor of transformers does; nothing where it does more than we know.

    Those of its torchvision backend are known that resize (one side, or both), may crop in the
    middle, rescale and normalise, each to ``TOLERANCE`` on some pictures.
    """
    needed = ("do_resize", "do_rescale", "do_normalize")
    if getattr(processor, "backend", "") != "torchvision":
        return None
    resample = getattr(processor, "resample", None)
    if not isinstance(resample, int):
        return None
    if not all(getattr(processor, name, False) for name in needed):
        return None
    size, crop = (dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size"))
    size = {key: value for key, value in size.items() if value is not None}
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        return None
    short = size.get("shortest_edge")
    cut = None
    if getattr(processor, "do_center_crop", False):
        cut = crop["height"], crop["width"]
        if cut[0] > (short or size["height"]) or cut[1] > (short or size["width"]):
            return None  # it pads
    sides = short or (size["height"], size["width"])
    factor = 255 * processor.rescale_factor
    found = Pixels(
        _resizer(sides, cut, Resampling(resample)),
        mean=[value / factor for value in processor.image_mean],
        std=[value / factor for value in processor.image_std],
        device=device,
    )
    for picture in _probes():
        theirs_CHW = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        ours_CHW = found.batch([found.prepare(picture)]).cpu()[0]
        if ours_CHW.shape != theirs_CHW.shape:
            return None
        if float((ours_CHW - theirs_CHW).abs().max()) > TOLERANCE:
            return None
    return found


def _resizer(
    size: int | tuple[int, int], crop: tuple[int, int] | None, resample: Resampling
) -> Callable[[Image.Image], Pixels8]:
    """Resize with torchvision's kernels on 8-bit pixels, and crop, as transformers does.

    Args:
        size: Of the shorter side, the other one following; or height and width.
        crop: Height and width that are cut out of the middle.
        resample: The filter.
    """
    from torchvision.transforms.v2 import functional as tvf
    from transformers.image_utils import pil_torch_interpolation_mapping

    mode = pil_torch_interpolation_mapping[resample]

    def resize(picture: Image.Image) -> Pixels8:
        wide, high = picture.size
        if not isinstance(size, int):
            high, wide = size
        elif high <= wide:
            high, wide = size, int(size * wide / high)
        else:
            high, wide = int(size * high / wide), size
        # Channels last, as they come: planes would be copied there and back.
        x_CHW = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        x_CHW = tvf.resize(x_CHW, [high, wide], interpolation=mode, antialias=True)
        if crop is not None:
            top, left = int((high - crop[0]) / 2), int((wide - crop[1]) / 2)
            x_CHW = x_CHW[:, top : top + crop[0], left : left + crop[1]]
        return np.ascontiguousarray(x_CHW.permute(1, 2, 0).numpy())

    return resize


def _probes() -> list[Image.Image]:
    random = np.random.RandomState(0)
    return [
        Image.fromarray(random.randint(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in _PROBES
    ]
