"""What of the log a person at a console wants to read."""

from __future__ import annotations

import logging
from typing import Any

from mmengine.logging import MMLogger
from mmengine.runner import Runner

from mmmilan.registry import RUNNERS

LONG = 5  # lines


@RUNNERS.register_module()
class ConsoleRunner(Runner):
    """MMEngine's runner; machine, config, hooks and the options of each parameter go to the log file alone."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.addFilter(is_for_people)
        return logger


def is_for_people(record: logging.LogRecord) -> bool:
    """Whether a record is a warning, or a few lines and none of the many on parameters."""
    message = record.getMessage()
    return record.levelno > logging.INFO or (message.count('\n') < LONG and not message.startswith('paramwise_options'))
