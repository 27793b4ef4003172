"""TensorBoard's event files, written with its own package alone: neither TensorFlow nor torch is needed.

A figure is a `simple_value`, as torch writes it; a table is a Markdown text of the text plugin.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from ..recipe.monitor import TensorBoard
from .base import Ending, Monitor, MonitoredRun, Started


class TensorBoardMonitor(Monitor):
    """Writes one more event file into the folder each time the run is trained."""

    name = "tensorboard"

    def __init__(self, options: TensorBoard) -> None:
        self._options = options

    def start(self, run: MonitoredRun) -> Started:
        folder = run.folder / "tensorboard" if self._options.folder is None else Path(self._options.folder) / run.name
        self._writer = EventFileWriter(str(folder))
        self._text(0, "recipe", "```yaml\n" + run.recipe.to_yaml() + "```")
        return Started(shown=f"tensorboard --logdir {folder}")

    def go_on(self, step: int) -> None:
        """A session that starts at a step makes TensorBoard forget what an earlier one showed from there on."""
        if step:
            started = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=started))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add(step, [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()])

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        lines = [columns, ["---"] * len(columns), *([_cell(text) for text in row] for row in rows)]
        self._text(step, name, "\n".join(f"| {' | '.join(line)} |" for line in lines))

    def image(self, step: int, name: str, path: Path) -> None:
        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])  # a PNG's first chunk begins with them
        image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=data)
        self._add(step, [Summary.Value(tag=name, image=image)])

    def finish(self, ending: Ending) -> None:
        self._writer.close()

    def _text(self, step: int, name: str, text: str) -> None:
        tensor = TensorProto(
            dtype=DT_STRING,
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
            string_val=[text.encode("utf-8", "backslashreplace")],
        )
        metadata = create_summary_metadata(display_name=name, description="")
        self._add(step, [Summary.Value(tag=f"{name}/text_summary", metadata=metadata, tensor=tensor)])

    def _add(self, step: int, values: Sequence[Summary.Value]) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()


def _cell(text: str) -> str:
    """`text` as one cell of a Markdown table: no code fence, bar or line end of its own."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "\\`")
    return escaped.replace("\n", "<br>")
