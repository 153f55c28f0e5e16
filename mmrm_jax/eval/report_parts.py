"""The parts that the report pages are made of: escaped text, sections, tables, figures, example images.

Texts and images are untrusted: all text is escaped, images are decoded and encoded anew.
"""

from __future__ import annotations

import base64
import html
import io
import warnings
from collections.abc import Iterable, Sequence

from PIL import Image, ImageOps

from mmrm_jax.data.images import DECODE_ERRORS, FORMATS, MAX_PIXELS

_IMAGE_SIDE = 480  # longest side of an example image in the report
_TINY_SIDE = 96  # images up to this side are enlarged without smoothing


def escaped(value: object) -> str:
    """Text for a page: nothing of it is markup."""
    return html.escape(str(value), quote=True)


def html_section(title: str, lead: str, content: str) -> str:
    """A section of the page; the content is HTML already."""
    return f"<section><h2>{escaped(title)}</h2><p class='lead'>{escaped(lead)}</p>{content}</section>"


def html_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A scrolling table; the cells are HTML already."""
    head = "".join(f"<th scope='col'>{escaped(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def png_figure(png: bytes, caption: str, alt: str) -> str:
    """A drawing with its caption, and what it shows in words."""
    source = base64.b64encode(png).decode("ascii")
    image = f"<img src='data:image/png;base64,{source}' alt='{escaped(alt)}'>"
    return f"<figure><figcaption>{escaped(caption)}</figcaption>{image}</figure>"


def images_html(images: Sequence[bytes], prompt: str) -> str:
    """An example's images, in order."""
    return "".join(_image_html(image, prompt) for image in images) or "<p class='noimage'>no image</p>"


def _image_html(image: bytes, prompt: str) -> str:
    """An image made small and encoded anew, or why it cannot be shown."""
    try:
        encoded, mime, tiny = _reencode(image)
    except (*DECODE_ERRORS, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return f"<p class='noimage'>image cannot be shown: {escaped(error)}</p>"
    source = f"data:{mime};base64,{base64.b64encode(encoded).decode('ascii')}"
    return (
        f"<img class='{'tiny' if tiny else 'photo'}' src='{source}' alt='Image of the prompt: {escaped(prompt[:120])}'>"
    )


def _reencode(image: bytes) -> tuple[bytes, str, bool]:
    """The image made small enough for a page: (encoded bytes, MIME type, whether it is tiny)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        opened = Image.open(io.BytesIO(image), formats=FORMATS)
    if opened.width * opened.height > MAX_PIXELS:
        raise ValueError(f"{opened.width} x {opened.height} pixels are too many")
    upright = ImageOps.exif_transpose(opened)
    tiny = max(upright.size) <= _TINY_SIDE
    upright.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    buffer = io.BytesIO()
    if tiny:
        upright.convert("RGBA").save(buffer, "PNG")
        return buffer.getvalue(), "image/png", True
    flat = Image.new("RGB", upright.size, "white")
    flat.paste(upright.convert("RGB"), mask=upright.convert("RGBA").getchannel("A"))
    flat.save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), "image/jpeg", False
