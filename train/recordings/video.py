"""H.264 and H.265 video: foxglove's CompressedVideo, FFMPEGPacket, and CompressedImage with such bytes, decoded by PyAV.

A message holds one picture as NAL units in Annex B's form (ITU-T H.264 and H.265). It needs the messages before it, back to a
key frame: what is before the first one is left out, and a lost message is a fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from faults import Fault

VIDEO, PACKET = "foxglove_msgs/msg/CompressedVideo", "ffmpeg_image_transport_msgs/msg/FFMPEGPacket"
CODECS = {"hevc": ("H.265", "265", "hevc"), "h264": ("H.264", "264", "avc")}  # decoder: its name, words in `format`
START = b"\0\0\1"  # of a NAL unit
# kinds of NAL units, H.264 7.4.1 and H.265 7.4.2
SLICES, IDR, SPS = (1, 2, 5), 5, 7
IRAP, CRA, RASL, SPS_H265 = range(16, 24), 21, (8, 9), 33


def codec(content: Any) -> str | None:
    """The decoder of a camera's message; None for a picture by itself. Raises Fault for video that is not read."""
    kind: str = content.__msgtype__
    told: str = content.encoding if kind == PACKET else getattr(content, "format", "")
    is_image = kind not in (VIDEO, PACKET)
    if is_image and (not hasattr(content, "format") or START not in content.data[:4].tobytes()):
        return None
    for name, (_, *words) in CODECS.items():
        if any(word in told.lower() for word in words):
            return name
    if not is_image:
        raise Fault(f"is {told!r} video, which is not read; expected H.264 or H.265: record that, or JPEG")
    return "h264"


def rgb(frame: Any) -> np.ndarray:
    """A decoded picture (H, W, 3) uint8 RGB."""
    return frame.to_ndarray(format="rgb24")


class Video:
    """The stream of one topic, message after message."""

    def __init__(self, codec: str) -> None:
        self.codec, self.name = codec, CODECS[codec][0]
        self.has_parameters = self.starts_open = False
        self.is_early = True  # before the first key frame
        self.key_frames = 0
        self.decoder: Any = None

    def holds_picture(self, data: bytes) -> bool:
        """Whether the next message holds a picture, and a key frame is at or before it. Raises Fault."""
        if START not in data:
            raise Fault(
                f"is no {self.name} video that is read: {len(data)} bytes without a start code; expected Annex B"
            )
        is_key = is_picture = False
        for unit in data.split(START)[1:]:
            if self.codec == "h264":
                kind = unit[0] & 31 if unit else 0
                is_picture |= kind in SLICES
                is_key |= kind in (IDR, SPS)  # streams without IDR send parameters where one can join
                self.has_parameters |= kind == SPS
            else:
                kind = unit[0] >> 1 & 63 if unit else 63
                is_key |= kind in IRAP
                self.has_parameters |= kind == SPS_H265
                self.starts_open |= kind == CRA and not self.key_frames
                # leading pictures of a first CRA refer to what is before it
                is_picture |= kind < 32 and not (kind in RASL and self.starts_open and self.key_frames == 1)
        self.key_frames += is_key and is_picture and self.has_parameters
        self.is_early = is_picture and not self.key_frames
        return is_picture and not self.is_early

    def decode(self, number: int, data: bytes | None) -> Iterator[tuple[int, Any]]:
        """The frames that are complete with the next message, with their messages' numbers; without `data` the last ones.

        Raises Fault.
        """
        if not (self.decoder if data is None else self.holds_picture(data) or not self.is_early):
            return
        try:
            import av
            from av import logging
        except ImportError:
            raise Fault(f"is {self.name} video; to read it install PyAV: pip install av") from None
        if self.decoder is None:
            logging.set_level(logging.DEBUG)  # for Capture below; nothing is printed
            self.decoder = av.CodecContext.create(self.codec, "r")
            self.decoder.thread_type = "SLICE"  # threads by frame would tell of a fault messages later
            self.decoder.options = {"err_detect": "explode"}  # H.265: a missing picture that others refer to
        packet = None if data is None else av.Packet(data)
        if packet:
            packet.pts = number
        try:
            with logging.Capture() as said:
                frames = self.decoder.decode(packet)
        except (av.FFmpegError, ValueError) as error:
            found = (
                f"is damaged {self.name} video, or messages before it are lost ({getattr(error, 'strerror', error)})"
            )
            raise Fault(f"{found}; cut the recording there") from None
        if any("Frame num gap" in text for _, _, text in said):  # H.264's only sign of it
            raise Fault(f"messages of {self.name} video before it are lost; cut the recording there")
        yield from ((frame.pts, frame) for frame in frames)
