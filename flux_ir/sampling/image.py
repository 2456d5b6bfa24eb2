"""Finished pictures as JPEG files that say what made them."""

from io import BytesIO

from PIL import ExifTags, Image

from flux_ir.shapes import Pixels

JPEG_QUALITY = 95
MOST_EXIF_BYTES = 60_000
"""The longest prompt that is written into a picture: a JPEG's EXIF data ends at 64 kB."""
# As the published sampler writes them.
SOFTWARE, MAKER = "AI generated;txt2img;flux", "Black Forest Labs"


def jpeg_bytes(pixels: Pixels, index: int = 0, *, model: str | None = None, prompt: str | None = None) -> bytes:
    """Picture `index` of a batch as a JPEG. With `model` it carries EXIF data; `prompt` becomes its description."""
    buffer = BytesIO()
    exif = Image.Exif()
    if model is not None:
        exif[ExifTags.Base.Software] = SOFTWARE
        exif[ExifTags.Base.Make] = MAKER
        exif[ExifTags.Base.Model] = model
    if prompt is not None:
        # As bytes: of a str, Pillow would write every letter but ASCII as a question mark.
        exif[ExifTags.Base.ImageDescription] = prompt.encode()
    picture = Image.fromarray(pixels[index].numpy())
    picture.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0, exif=exif)
    return buffer.getvalue()
