"""The folder of one run: its configuration, its log, its pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irgrow.ir.errors import BadFile


class RunFolder:
    """`config.json` and `log.jsonl` (one object per line, written as events happen) in a folder of their own."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
            self._log = (path / "log.jsonl").open("w")
        except OSError as error:
            raise BadFile(f"run folder {path}", str(error), "a folder that can be written to") from None

    def event(self, event: Mapping[str, Any]) -> None:
        """Appends one line to the log."""
        self._log.write(json.dumps(dict(event)) + "\n")
        self._log.flush()

    def close(self) -> None:
        self._log.close()
