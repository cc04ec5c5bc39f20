"""One camera message as RGB pixels at the network's size: the same code in training and on the robot.

sensor_msgs/Image is converted by its encoding; sensor_msgs/CompressedImage by its bytes. A JPEG of exactly 2, 4 or 8 times
the size is decoded at that fraction: libjpeg then leaves out what resizing would average away. The mean difference is 0.2
to 0.6 of 255, as from saving a JPEG again at quality 95.
"""

from __future__ import annotations

import struct
from typing import Any

import cv2
import numpy as np

from config import WHOLE, Part
from faults import Fault

CHANNELS = {"rgb8": 3, "bgr8": 3, "8UC3": 3, "rgba8": 4, "bgra8": 4, "mono8": 1, "8UC1": 1}
CHANNELS |= {f"bayer_{pattern}8": 1 for pattern in ("rggb", "bggr", "gbrg", "grbg")}
CHANNELS |= dict.fromkeys(("yuv422", "uyvy", "yuv422_yuy2", "yuyv"), 2)
TO_RGB = {
    "bgr8": cv2.COLOR_BGR2RGB,
    "8UC3": cv2.COLOR_BGR2RGB,  # as OpenCV's users publish
    "rgba8": cv2.COLOR_RGBA2RGB,
    "bgra8": cv2.COLOR_BGRA2RGB,
    "mono8": cv2.COLOR_GRAY2RGB,
    "8UC1": cv2.COLOR_GRAY2RGB,
    # OpenCV names a Bayer pattern by its second row, ROS by its first
    "bayer_rggb8": cv2.COLOR_BayerBG2RGB,
    "bayer_bggr8": cv2.COLOR_BayerRG2RGB,
    "bayer_gbrg8": cv2.COLOR_BayerGR2RGB,
    "bayer_grbg8": cv2.COLOR_BayerGB2RGB,
    "yuv422": cv2.COLOR_YUV2RGB_UYVY,
    "uyvy": cv2.COLOR_YUV2RGB_UYVY,
    "yuv422_yuy2": cv2.COLOR_YUV2RGB_YUY2,
    "yuyv": cv2.COLOR_YUV2RGB_YUY2,
}
JPEG_BEGIN, JPEG_END = b"\xff\xd8", b"\xff\xd9"
FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# an orientation tag must not turn the picture: the robot's node ignores it
AS_IT_IS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
# used for their bit; AS_IT_IS gives the color
REDUCED = {8: cv2.IMREAD_REDUCED_GRAYSCALE_8, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2}
DEPTH = ("16UC1", "32FC1", "mono16", "compressedDepth", "rvl")
QUALITY = 95  # of the cache's pictures
PNG, BIT_DEPTH = b"\x89PNG\r\n\x1a\n", 24  # the byte of a PNG with its bits per channel


def jpeg_at_size(message: Any, size: tuple[int, int], part: Part = WHOLE) -> tuple[bytes, tuple[int, int]]:
    """A part of an Image or CompressedImage message as a JPEG of a size; the message's height and width. Raises Fault.

    A whole JPEG that has the size stays as it is.
    """
    pixels, native = at_size(message, size, part)
    if (
        native == size
        and part == WHOLE
        and not hasattr(message, "encoding")
        and message.data[:2].tobytes() == JPEG_BEGIN
    ):
        return message.data.tobytes(), native
    return encode(pixels), native


def at_size(message: Any, size: tuple[int, int], part: Part = WHOLE) -> tuple[np.ndarray, tuple[int, int]]:
    """A part of an Image or CompressedImage message as (*size, 3) uint8 RGB; the message's height and width. Raises Fault."""
    if hasattr(message, "encoding") or message.data[:2].tobytes() != JPEG_BEGIN:
        pixels = to_rgb(message)
        return view(pixels, size, part), (pixels.shape[0], pixels.shape[1])
    native = _jpeg_size(message.data.data)
    exact = [by for by in REDUCED if native and _shrinks_exactly(native, size, part, by)]
    pixels = to_rgb(message, exact[0] if exact else 1)
    return view(pixels, size, part), native or (pixels.shape[0], pixels.shape[1])


def _shrinks_exactly(native: tuple[int, int], size: tuple[int, int], part: Part, by: int) -> bool:
    """Whether a part of a picture has `by` times the size, and begins and ends between blocks of `by` pixels."""
    rows, columns = edges(native, part)
    whole = [*native, *rows, *columns]
    return (rows[1] - rows[0], columns[1] - columns[0]) == (size[0] * by, size[1] * by) and not any(
        edge % by for edge in whole
    )


def encode(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB as a JPEG of QUALITY, color at half the resolution."""
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


def decode(jpeg: bytes) -> np.ndarray | None:
    """A JPEG as (H, W, 3) uint8 RGB; None if it is damaged."""
    return cv2.imdecode(np.frombuffer(jpeg, np.uint8), AS_IT_IS)


def to_rgb(message: Any, reduced: int = 1) -> np.ndarray:
    """The picture (H, W, 3) uint8 RGB of an Image or CompressedImage message; a JPEG reduced by 2, 4 or 8. Raises Fault."""
    if is_depth(message):
        told = getattr(message, "encoding", "") or message.format
        raise Fault(f"a depth or 16-bit picture ({told}); expected color or 8-bit grey; give a color camera's topic")
    if not hasattr(message, "encoding"):
        return _decompress(message.data, message.format, reduced)
    kind: str = message.encoding
    if kind not in CHANNELS:
        raise Fault(f"unknown encoding {kind!r}; expected one of {', '.join(CHANNELS)}")
    height, width, step, row = message.height, message.width, message.step, message.width * CHANNELS[kind]
    if not row or not height or step < row or len(message.data) != step * height:
        raise Fault(
            f"{width}x{height} {kind} with step {step} has {len(message.data)} bytes; expected a step of at least {row} and "
            f"{step * height} bytes; check the driver, or remove the recording"
        )
    pixels = np.asarray(message.data).reshape(height, step)[:, :row].reshape(height, width, CHANNELS[kind])
    pixels = np.ascontiguousarray(pixels)
    try:
        return cv2.cvtColor(pixels, TO_RGB[kind]) if kind in TO_RGB else pixels
    except cv2.error as error:  # an odd width of an encoding that stores pairs of pixels
        raise Fault(f"cannot convert {width}x{height} {kind} ({error.err}); remove the recording") from None


def is_depth(message: Any) -> bool:
    """Whether a picture has more than 8 bits per channel, by its encoding or, compressed, by its bytes and not its `format`."""
    if hasattr(message, "encoding"):
        return message.encoding in DEPTH
    begin = message.data[: BIT_DEPTH + 1].tobytes()
    if begin.startswith(JPEG_BEGIN):
        return False
    if begin.startswith(PNG):
        return len(begin) > BIT_DEPTH and begin[BIT_DEPTH] > 8
    try:
        pixels = cv2.imdecode(np.asarray(message.data), cv2.IMREAD_UNCHANGED)  # TIFF, EXR, PGM
    except cv2.error:  # an empty buffer
        pixels = None
    return pixels.dtype != np.uint8 if pixels is not None else any(word in message.format for word in DEPTH)


def _decompress(data: np.ndarray, kind: str, reduced: int) -> np.ndarray:
    try:
        pixels = None if is_truncated(data) else cv2.imdecode(np.asarray(data), REDUCED.get(reduced, 0) | AS_IT_IS)
    except cv2.error:  # an empty buffer
        pixels = None
    if pixels is None:
        raise no_picture(data, kind)
    return pixels


def is_truncated(data: np.ndarray) -> bool:
    """Whether a JPEG has no end; some decoders fill the rest with grey."""
    return data[:2].tobytes() == JPEG_BEGIN and data.tobytes().rfind(JPEG_END) < 0


def no_picture(data: np.ndarray, kind: str) -> Fault:
    """The fault of a compressed picture that does not decode."""
    return Fault(f"{len(data)} bytes of format {kind!r} do not decode as a picture; remove the recording")


def _jpeg_size(data: memoryview) -> tuple[int, int] | None:
    """Height and width by a JPEG's frame header (ITU-T T.81, B.2.2), if it is where it should be."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        if data[at + 1] in FRAME_HEADERS:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return height, width
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def edges(shape: tuple[int, int], part: Part) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows (first, end) and the columns (first, end) of a part of a picture of a height and width."""
    top, left, height, width = part

    def pixels(begin: float, share: float, total: int) -> tuple[int, int]:
        first = min(round(begin * total), total - 1)
        return first, max(first + 1, round((begin + share) * total))

    return pixels(top, height, shape[0]), pixels(left, width, shape[1])


def view(pixels: np.ndarray, size: tuple[int, int], part: Part = WHOLE) -> np.ndarray:
    """What the network sees of a picture (H, W, 3) uint8: a part of it, as (*size, 3)."""
    rows, columns = edges((pixels.shape[0], pixels.shape[1]), part)
    return resize(pixels[slice(*rows), slice(*columns)], size)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 as (*size, 3); shrinking averages areas, so nothing aliases."""
    height, width = size
    if pixels.shape[:2] == (height, width):
        return pixels
    shrinks = pixels.shape[0] >= height and pixels.shape[1] >= width
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
