from typing import Any

import numpy as np
import pytest
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from pipeline.backbones.image_transforms import ImageTransform, of_open_clip, of_processor
from pipeline.media.images import DRAFTED

CPU = torch.device("cpu")
SIZES = [(640, 480), (480, 640), (31, 500), (500, 31), (224, 224), (100, 224), (224, 300), (1, 1)]


def noise(width: int, height: int) -> Image.Image:
    random = np.random.RandomState(width * 1000 + height)
    return Image.fromarray(random.randint(0, 256, (height, width, 3), dtype=np.uint8))


def difference(found: ImageTransform | None, library: Any, size: tuple[int, int]) -> float:
    assert found is not None
    ours = found.prepare(noise(*size))
    assert ours.dtype == np.uint8
    assert ours.flags.c_contiguous
    batch = found.batch([ours, ours])
    assert batch.dtype == torch.float32
    assert (batch[0] == batch[1]).all()
    theirs = torch.as_tensor(library(noise(*size)))
    assert batch[0].shape == theirs.shape
    return float((batch[0] - theirs).abs().max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("mode", "interpolation"), [("shortest", "bicubic"), ("squash", "bilinear")]
)
def test_it_is_open_clips_transform(size: tuple[int, int], mode: str, interpolation: str) -> None:
    cfg = PreprocessCfg(size=224, resize_mode=mode, interpolation=interpolation)
    transform = image_transform_v2(cfg, is_train=False)
    assert difference(of_open_clip(cfg, CPU), transform, size) <= 1e-6


@pytest.mark.parametrize("size", [size for size in SIZES if size != (1, 1)])
@pytest.mark.parametrize(
    ("mode", "interpolation"), [("shortest", "bicubic"), ("squash", "bilinear")]
)
def test_a_draft_is_resized_on_8_bits(size: tuple[int, int], mode: str, interpolation: str) -> None:
    cfg = PreprocessCfg(size=224, resize_mode=mode, interpolation=interpolation)
    found = of_open_clip(cfg, CPU)
    picture = noise(*size)
    exact = found.prepare(picture)
    picture.info[DRAFTED] = True
    draft = found.prepare(picture)
    assert draft.shape == (224, 224, 3)
    assert draft.flags.c_contiguous
    differ = np.abs(draft.astype(int) - exact).max()
    assert differ <= 2  # on noise; on photographs 1


def test_a_draft_is_resized_by_open_clips_own_steps_where_they_do_more() -> None:
    cfg = PreprocessCfg(size=224, resize_mode="longest")
    transform = image_transform_v2(cfg, is_train=False)
    picture = noise(300, 200)
    picture.info[DRAFTED] = True
    found = of_open_clip(cfg, CPU)
    assert (found.batch([found.prepare(picture)])[0] - transform(picture)).abs().max() <= 1e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "processor",
    [
        transformers.CLIPImageProcessor(),
        transformers.ViTImageProcessor(),
        transformers.SiglipImageProcessor(resample=3),
        transformers.CLIPImageProcessor(
            size={"shortest_edge": 256}, crop_size={"height": 224, "width": 223}, resample=2
        ),
    ],
)
def test_it_is_the_image_processors_of_transformers(size: tuple[int, int], processor: Any) -> None:
    found = of_processor(processor, CPU)
    one = lambda picture: processor(images=picture, return_tensors="pt")["pixel_values"][0]  # noqa: E731
    assert difference(found, one, size) <= 1e-6


@pytest.mark.parametrize(
    "processor",
    [
        transformers.CLIPImageProcessor(crop_size={"height": 256, "width": 256}),  # it pads
        transformers.CLIPImageProcessor(do_resize=False),
        transformers.ViTImageProcessor(do_normalize=False),
        transformers.ViTImageProcessor(size={"longest_edge": 224}),
        transformers.ConvNextImageProcessor(size={"shortest_edge": 224}),  # crops in its own way
    ],
)
def test_what_else_a_processor_does_is_left_to_it(processor: Any) -> None:
    assert of_processor(processor, CPU) is None


def test_a_processor_that_does_otherwise_is_not_replaced() -> None:
    class Brighter(transformers.ViTImageProcessor):
        def rescale_and_normalize(self, *given: Any) -> Any:
            return super().rescale_and_normalize(*given) + 3e-6

    assert of_processor(transformers.ViTImageProcessor(), CPU) is not None
    assert of_processor(Brighter(), CPU) is None
