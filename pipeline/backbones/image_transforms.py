"""Images to the input of a model: 8-bit pixels in threads, floats in batches on the device.

Image processors turn each image into floats, of four times the bytes. The steps after resizing and
cropping are linear and the same for all images, so they are applied to a whole batch: the result
equals the library's own up to rounding.

Legend: B images of a batch, H and W sides of the model's input, HWC the sides and channels of an
image, CHW its planes.
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
"""(H, W, 3)."""
TOLERANCE = 1e-6
"""Largest difference from the library's processor, in normalized values, which are about 1."""
_CONVERSION = "MaybeConvertMode"  # open_clip's step that makes an image RGB
_PROBES = ((97, 61), (64, 131), (40, 40), (300, 200))  # width, height


class ImageTransform:
    """Resizing of single images, and normalization of batches.

    Args:
        resize: Function of an RGB image that returns (H, W, 3) contiguous 8-bit pixels.
        mean: Mean of each channel, on the scale 0 to 1; it is subtracted.
        std: Standard deviation of each channel; the difference is divided by it.
        device: Device to which batches are copied.
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

    def batch(self, images: Sequence[Pixels8]) -> torch.Tensor:
        """Stack and normalize prepared images: (B, 3, H, W) float32 on the device."""
        height, width, channels = images[0].shape
        if self._device.type == "cpu":
            # One by one: an image fits the cache, a batch does not.
            x_BCHW = torch.empty((len(images), channels, height, width))
            for x_CHW, pixels_HWC in zip(x_BCHW, images, strict=True):
                x_CHW.copy_(torch.from_numpy(pixels_HWC).permute(2, 0, 1))
                x_CHW.mul_(self._scale).add_(self._shift)
            return x_BCHW
        # Bytes are copied from pinned memory while the forward pass is queued. The channels come
        # last, which suits convolutions on a GPU.
        is_pinned = self._device.type == "cuda"
        shape = (len(images), height, width, channels)
        pixels_BHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=is_pinned)
        np.stack(images, out=pixels_BHWC.numpy())
        x_BCHW = pixels_BHWC.to(self._device, non_blocking=is_pinned).permute(0, 3, 1, 2).float()
        return x_BCHW.mul_(self._scale).add_(self._shift)


def of_open_clip(cfg: Any, device: torch.device) -> ImageTransform:
    """Return the transform that equals open_clip's ``image_transform_v2(cfg)``.

    Args:
        cfg: open_clip's ``PreprocessCfg``.
        device: Device to which batches are copied.
    """
    from open_clip.transform import image_transform_v2

    return of_compose(image_transform_v2(cfg, is_train=False), device)


def of_compose(compose: Any, device: torch.device) -> ImageTransform:
    """Return the transform that equals torchvision's ``Compose`` of a library.

    Images that were decoded as a draft are resized by torchvision's kernels on 8 bits, which takes
    less than half the time: values may differ by 1 of 255, on noise by 2.

    Args:
        compose: Steps on a PIL image, then the conversion to a tensor, then ``Normalize``.
        device: Device to which batches are copied.

    Raises:
        ValueError: The last step is not ``Normalize``.
    """
    *steps, _, normalize = compose.transforms
    if not hasattr(normalize, "mean") or not hasattr(normalize, "std"):
        raise ValueError(f"its transform ends in {type(normalize).__name__}, not in Normalize")
    resize_draft = _on_bytes(steps)

    def resize(image: Image.Image) -> Pixels8:
        if resize_draft is not None and image.info.get(DRAFTED):
            return resize_draft(image)
        for step in steps:
            image = step(image)
        return np.array(image)

    return ImageTransform(
        resize, mean=_numbers(normalize.mean), std=_numbers(normalize.std), device=device
    )


def _numbers(values: Any) -> list[float]:
    """Return the numbers of a sequence or a tensor."""
    return [float(value) for value in values]


def _on_bytes(steps: Sequence[Any]) -> Callable[[Image.Image], Pixels8] | None:
    """Return the steps before ``ToTensor`` on 8-bit pixels; None unless they resize and crop."""
    from torchvision.transforms import CenterCrop, Resize
    from torchvision.transforms.v2 import functional as tvf

    first, *rest = [step for step in steps if type(step).__name__ != _CONVERSION]
    if not isinstance(first, Resize) or not all(isinstance(step, CenterCrop) for step in rest):
        return None

    def resize(image: Image.Image) -> Pixels8:
        x_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        x_CHW = tvf.resize(x_CHW, first.size, first.interpolation, antialias=True)
        for crop in rest:
            x_CHW = tvf.center_crop(x_CHW, crop.size)
        return np.ascontiguousarray(x_CHW.permute(1, 2, 0).numpy())

    return resize


def of_processor(processor: Any, device: torch.device) -> ImageTransform | None:
    """Return the transform that equals an image processor of transformers.

    Processors of the torchvision backend are supported that resize (one side, or both), may crop
    the centre, rescale and normalize. The transform is compared with the processor on some images.

    Args:
        processor: The processor.
        device: Device to which batches are copied.

    Returns:
        None if the processor takes other steps, or differs by more than :data:`TOLERANCE`.
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
    cropped = None
    if getattr(processor, "do_center_crop", False):
        cropped = crop["height"], crop["width"]
        if cropped[0] > (short or size["height"]) or cropped[1] > (short or size["width"]):
            return None  # it pads
    sides = short or (size["height"], size["width"])
    factor = 255 * processor.rescale_factor
    transform = ImageTransform(
        _resizer(sides, cropped, Resampling(resample)),
        mean=[value / factor for value in processor.image_mean],
        std=[value / factor for value in processor.image_std],
        device=device,
    )
    return transform if _equals(transform, processor) else None


def _equals(transform: ImageTransform, processor: Any) -> bool:
    """Return whether a transform equals a processor on some images, up to :data:`TOLERANCE`."""
    for image in _probes():
        theirs_CHW = processor(images=image, return_tensors="pt")["pixel_values"][0]
        ours_CHW = transform.batch([transform.prepare(image)]).cpu()[0]
        if ours_CHW.shape != theirs_CHW.shape:
            return False
        if float((ours_CHW - theirs_CHW).abs().max()) > TOLERANCE:
            return False
    return True


def _resizer(
    size: int | tuple[int, int], crop: tuple[int, int] | None, resample: Resampling
) -> Callable[[Image.Image], Pixels8]:
    """Return a function that resizes and crops 8-bit pixels like transformers.

    Args:
        size: Pixels of the shorter side, with the aspect ratio kept; or height and width.
        crop: Height and width of the centre crop.
        resample: Resampling filter.
    """
    from torchvision.transforms.v2 import functional as tvf
    from transformers.image_utils import pil_torch_interpolation_mapping

    mode = pil_torch_interpolation_mapping[resample]

    def resize(image: Image.Image) -> Pixels8:
        width, height = image.size
        if not isinstance(size, int):
            height, width = size
        elif height <= width:
            height, width = size, int(size * width / height)
        else:
            height, width = int(size * height / width), size
        # The channels stay last: separate planes would be copied there and back.
        x_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        x_CHW = tvf.resize(x_CHW, [height, width], interpolation=mode, antialias=True)
        if crop is not None:
            top, left = int((height - crop[0]) / 2), int((width - crop[1]) / 2)
            x_CHW = x_CHW[:, top : top + crop[0], left : left + crop[1]]
        return np.ascontiguousarray(x_CHW.permute(1, 2, 0).numpy())

    return resize


def _probes() -> list[Image.Image]:
    random = np.random.RandomState(0)
    return [
        Image.fromarray(random.randint(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in _PROBES
    ]
