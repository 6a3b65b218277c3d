"""Small square images of the items of a prepared dataset, for pages."""

from PIL import Image

from features.dataset import load_items
from features.warehouse import Warehouse
from pipeline.media.errors import MediaError
from pipeline.media.images import decode_image, quiet_decoders
from pipeline.media.raw_storage import raw_folder
from pipeline.media.reader import MediaReader
from pipeline.media.video import sample_frames

_WHITE = (255, 255, 255)


class Thumbnails:
    """The images of a dataset's items; of an item without a readable image, a frame of its video.

    Args:
        warehouse: The warehouse.
        dataset: Name of a prepared dataset.

    Raises:
        UserError: The dataset is not prepared, or its tables contradict each other.
    """

    def __init__(self, warehouse: Warehouse, dataset: str) -> None:
        table = load_items(warehouse, dataset, ["image", "video"])
        self._images, self._videos = table["image"], table["video"]
        raw = raw_folder(warehouse, warehouse.info(dataset).raw)
        self._media = MediaReader(raw, warehouse.dataset_dir(dataset))

    def close(self) -> None:
        """Close the files of images."""
        self._media.close()

    def read(self, item: int, side: int) -> Image.Image | None:
        """Return the image of an item in the middle of a white square.

        Args:
            item: Number of the item.
            side: Side of the square in pixels.

        Returns:
            The image, or ``None`` if the item has no image and no video that can be read.
        """
        for column, decode in ((self._images, self._image), (self._videos, self._frame)):
            reference = column[item].as_py()
            if reference is None:
                continue
            try:
                with quiet_decoders():
                    return _square(decode(reference, side), side)
            except MediaError:
                continue
        return None

    def _image(self, reference: str, side: int) -> Image.Image:
        return decode_image(self._media.read(reference), draft=side)

    def _frame(self, reference: str, side: int) -> Image.Image:
        with self._media.open(reference) as stream:
            frames, _ = sample_frames(stream, lambda frame: frame, count=1)
        frame: Image.Image = frames[0]
        return frame


def _square(image: Image.Image, side: int) -> Image.Image:
    """Scale an image until its longer side fits, and paste it into the middle of a square."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    square = Image.new("RGB", (side, side), _WHITE)
    scaled = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2)
    square.paste(scaled, ((side - width) // 2, (side - height) // 2))
    return square
