"""Pictures as text: data URIs, which a page carries inside itself."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deconvnet.voc import palette

__all__ = ["jpeg_uri", "png_uri", "read_uri"]


def png_uri(picture: Tensor, colours: Tensor | None = None) -> str:
    """A picture without loss; a label map in as few bits as it needs.

    Args:
        picture: ``uint8 [3, H, W]`` RGB, or a label map ``uint8 [H, W]``.
        colours: ``uint8 [n, 3]``, the colour of each label; VOC's by default.

    Returns:
        ``data:image/png;base64,...``

    Raises:
        TypeError: If ``picture`` is not ``uint8``.
        ValueError: If it has another shape.
    """
    pixels = _pixels(picture)
    options: dict[str, int] = {}
    if pixels.ndim == 2:
        used, indices = np.unique(pixels, return_inverse=True)
        image = Image.fromarray(indices.reshape(pixels.shape).astype(np.uint8), mode="P")
        colours = palette() if colours is None else colours
        image.putpalette(colours[used.tolist()].numpy().tobytes())
        options["bits"] = next(bits for bits in (1, 2, 4, 8) if len(used) <= 2**bits)
    else:
        image = Image.fromarray(pixels)
    return _uri(image, "png", optimize=True, **options)


def jpeg_uri(image: Tensor, quality: int = 90) -> str:
    """A photograph, in about a tenth of a PNG's length.

    Args:
        image: ``uint8 [3, H, W]`` RGB.
        quality: JPEG quality, 1 to 95.

    Returns:
        ``data:image/jpeg;base64,...``

    Raises:
        TypeError: If ``image`` is not ``uint8``.
        ValueError: If it has another shape, or ``quality`` is out of range.
    """
    pixels = _pixels(image)
    if pixels.ndim == 2:
        raise ValueError("image is a label map: JPEG would mix its labels, use png_uri")
    if not 1 <= quality <= 95:
        raise ValueError(f"quality must be from 1 to 95, got {quality}")
    return _uri(Image.fromarray(pixels), "jpeg", quality=quality, subsampling=0, optimize=True)


def read_uri(uri: str) -> Image.Image:
    """The picture of a data URI.

    Args:
        uri: From :func:`png_uri` or :func:`jpeg_uri`.

    Raises:
        ValueError: If it is not the data URI of a picture.
    """
    head, comma, data = uri.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise ValueError(f"expected data:image/...;base64,..., got {uri[:40]!r}")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def _pixels(picture: Tensor) -> np.ndarray:
    if picture.dtype != torch.uint8:
        raise TypeError(f"picture must be uint8, got {picture.dtype}")
    if picture.ndim != 2 and (picture.ndim != 3 or len(picture) != 3):
        raise ValueError(f"picture must be [3, H, W] or [H, W], got {list(picture.shape)}")
    array = picture.cpu().numpy()
    return array if array.ndim == 2 else np.ascontiguousarray(array.transpose(1, 2, 0))


def _uri(image: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
