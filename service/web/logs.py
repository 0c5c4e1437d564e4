"""JSON logs on stderr, one object a line, each with the ids of its request and trace."""

from __future__ import annotations

import datetime
import json
import logging
import sys

from service.web.exchange import request_id_var, trace_id_var


class JsonFormatter(logging.Formatter):
    """``{"time", "level", "logger", "message", "request_id", "trace_id", …fields, "exception"}``.

    Ids stand where there are such. No line has a prompt.
    """

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        entry = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id_var.get(),
        }
        if trace_id := trace_id_var.get():
            entry["trace_id"] = trace_id
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure_logs(level: str) -> None:
    """Send the ``fourstep`` loggers to stderr as JSON. Safe to call again."""
    logger = logging.getLogger("fourstep")
    # Ray Serve replaces sys.stderr in its replicas and would hold the lines back in a buffer.
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(JsonFormatter())
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
