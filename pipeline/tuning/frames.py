"""The size of image that a model takes: as its own files say, or the usual one."""

import json
from pathlib import Path
from typing import Any

from pipeline.schema import ModelParams
from pipeline.tasks.models import located
from pipeline.tasks.sources import ZOOS, parse
from pipeline.tuning.pictures import Frame

_USUAL = 224
_BUILTIN = {"resnet-digits": Frame(1, 8, 8)}
_FILES = ("preprocessor_config.json", "config.json")


def frame_of(model: ModelParams, size: int | None) -> Frame:
    """Find the size and channels of the images a model takes.

    Args:
        model: the base.
        size: of a side, where the user asks for one.

    Returns:
        The frame: asked for, else as config.json or preprocessor_config.json say, else 224 x 224 in colour;
        32 x 32 for the builtin networks.
    """
    source = parse(model.source)
    frame = Frame(3, _USUAL, _USUAL)
    if source.kind == "builtin":
        frame = _BUILTIN.get(source.name, Frame(3, 32, 32))
    elif source.kind not in ZOOS and Path(path := located(model)).is_dir():
        for name in _FILES:
            frame = _said(Path(path) / name, frame)
    return frame if size is None else Frame(frame.channels, size, size)


def _said(file: Path, frame: Frame) -> Frame:
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return frame
    channels, size = config.get("num_channels", frame.channels), config.get("image_size")
    size = size or config.get("crop_size") or config.get("size")
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        size = (size.get("height", side), size.get("width", side))
    pair = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        pair = (frame.height, frame.width)
    return Frame(int(channels), *pair)
