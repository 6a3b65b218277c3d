"""Run the forward pass of a backbone within the memory of its device.

Legend: B inputs of a batch, T tokens of an input, D width of the embedding.
"""

import math
from collections.abc import Callable, Sequence

from PIL import Image

from features.errors import OutOfMemoryError
from features.memory import free_memory, is_out_of_memory
from pipeline.backbones.base import POOLED, Backbone, InputBatch, Vectors
from pipeline.media.errors import MediaError, one_line

_GREY = Image.new("RGB", (64, 64), "grey")


class ForwardPass:
    """Encode batches; divide a batch that does not fit into the memory of the device.

    Later batches are divided to the size that fitted.

    Args:
        backbone: The backbone.
        level: ``pooled``, ``tokens`` or ``layer-K``.
        notify: Called with a message when a batch is divided.
    """

    def __init__(self, backbone: Backbone, level: str, notify: Callable[[str], None]) -> None:
        self._backbone = backbone
        self._level = level
        self._notify = notify
        self._max_cost = math.inf  # inputs, times tokens of the longest text

    def __call__(self, batch: InputBatch) -> Sequence[Vectors | MediaError]:
        """Return one vector (D,) for each input, or its tokens (T, D), or the reason of a failure.

        An input that the backbone cannot encode does not affect the others of its batch.

        Raises:
            OutOfMemoryError: A single input does not fit into the memory of the device.
        """
        size = max(len(batch.images), len(batch.texts))
        half = size // 2
        cost = size * max(map(len, batch.texts), default=1)
        if size < 2 or cost <= self._max_cost:
            try:
                return self._run(batch, size)
            except Exception as error:
                reason = one_line(error)
                if not is_out_of_memory(error):
                    if size < 2 and not self._encodes_probe(batch.modality):
                        raise  # the backbone is at fault, not the input
                    if size < 2:
                        return [MediaError("encode", reason)]
                    return self._halves(batch, half)
            if size < 2:
                raise OutOfMemoryError(
                    f"out of memory with a single input ({reason}); give --device cpu, --compute"
                    " bfloat16 or a smaller backbone (encoded items are kept)"
                )
            self._max_cost = cost // 2
            self._notify(f"out of memory with {size} inputs ({reason}); continuing with {half}")
            free_memory()
        return self._halves(batch, half)

    def _halves(self, batch: InputBatch, half: int) -> Sequence[Vectors | MediaError]:
        parts = [
            InputBatch(images=batch.images[start:end], texts=batch.texts[start:end])
            for start, end in ((0, half), (half, None))
        ]
        return [vector for part in parts for vector in self(part)]

    def _encodes_probe(self, modality: str) -> bool:
        """Return True if the backbone encodes a grey image, a letter, or both."""
        images = [] if modality == "text" else [self._backbone.image(_GREY)]
        texts = [] if modality == "image" else self._backbone.texts(["a"])
        try:
            self._run(InputBatch(images=images, texts=texts), 1)
        except Exception:  # the error of the input is raised, not this one
            return False
        return True

    def _run(self, batch: InputBatch, size: int) -> Sequence[Vectors]:
        if self._level != POOLED:
            return self._backbone.tokens(batch, self._level)
        vectors_BD = self._backbone.embed(batch)
        assert vectors_BD.shape == (size, self._backbone.dim)
        return list(vectors_BD)
