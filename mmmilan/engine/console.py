"""A shorter log on the console than in the log file."""

from __future__ import annotations

import logging
from typing import Any

from mmengine.logging import MMLogger
from mmengine.runner import Runner

from mmmilan.registry import RUNNERS

MAX_LINES = 5


@RUNNERS.register_module()
class ConsoleRunner(Runner):
    """MMEngine's runner; environment, config, hooks and per-parameter options go to the log file only."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.addFilter(is_short)
        return logger


def is_short(record: logging.LogRecord) -> bool:
    """Whether a record is a warning, or a message of few lines that is not about a single parameter's options."""
    message = record.getMessage()
    short = message.count('\n') < MAX_LINES and not message.startswith('paramwise_options')
    return short or record.levelno > logging.INFO
