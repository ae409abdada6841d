"""Small videos that tests write for themselves, and what PyAV decodes of a video from its start."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

# Suffix -> codec: containers whose clocks, indexes and reordering differ.
CODECS = {
    "mp4": "libx264",
    "mov": "mpeg4",
    "mkv": "libx264",
    "avi": "mpeg4",
    "webm": "libvpx-vp9",
    "m4v": "mpeg4",
    "mpg": "mpeg2video",
}


def picture(number: int, width: int = 96, height: int = 64) -> Pixels:
    """A frame that differs from every other, from its neighbours by little, and from its mirror images by much."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 3] = (200, 40, number % 256)
    pixels[: height // 4] = (20, number * 3 % 256, 180)
    at = number * 2 % (width - 8)
    pixels[height // 2 : height // 2 + 8, at : at + 8] = 255
    return pixels


def clip(
    path: Path,
    frames: int = 40,
    *,
    codec: str = "",
    fps: int = 25,
    times: Sequence[int] = (),
    tick_s: Fraction | None = None,
    size: tuple[int, int] = (96, 64),
    gop: int = 10,
    b_frames: int = 2,
    degrees: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    """Encode a video.

    Args:
        times: pts of the frames, in ticks of tick_s seconds; empty for a steady rate.
        gop: frames from one keyframe to the next.
        degrees: turn, counterclockwise, that the display matrix asks for.
    """
    codec = codec or CODECS[path.suffix[1:]]
    tick_s = tick_s or Fraction(1, fps)
    with av.open(str(path), "w", options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = tick_s
        if codec != "libvpx-vp9":
            stream.codec_context.max_b_frames = b_frames
        if degrees:
            stream.set_display_rotation(degrees)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            frame.pts, frame.time_base = times[number] if times else number, tick_s
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decoded(path: Path) -> dict[int, Pixels]:
    """pts -> (height, width, 3) RGB of each frame, as PyAV decodes them one after the other."""
    with av.open(str(path)) as container:
        return {frame.pts: frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)}  # type: ignore[misc]
