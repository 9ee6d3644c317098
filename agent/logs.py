"""Logging for the agent: readable on a terminal, one JSON object a line elsewhere. Messages are constants, facts are fields."""

from __future__ import annotations

import json
import logging
import sys
import time

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One JSON object."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Readable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Time, level, message, key=value."""
        fields = "  ".join(f"{k}={v}" for k, v in _fields(record).items() if v not in ("", None))
        line = f"{time.strftime('%H:%M:%S')} {record.levelname.lower():7} {record.getMessage()}"
        if record.exc_info:
            fields += "\n" + self.formatException(record.exc_info)
        return f"{line}  {fields}" if fields else line


def configure(level: str) -> None:
    """Log to standard error from `level` ("debug", "info", ...) on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Readable() if sys.stderr.isatty() else _Json())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
