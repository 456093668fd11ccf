"""SGLang's "Decode batch, ..." line: what we did stands at its end.

Why: an operator who watches that line sees whether batches are packed without asking the server.
Releases: 0.5.17 to 0.5.23; one message of the logger of ``metrics_reporter``, every
``--decode-log-interval`` steps.
When it is gone: the line stays as SGLang writes it; the counters are in ``/server_info`` as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

__all__ = ["append_with"]

_LOGGER = "sglang.srt.managers.scheduler_components.metrics_reporter"
_BEGINNING = "Decode batch"


class _Appender(logging.Filter):
    """Lets every record pass, and lengthens the ones that it knows."""

    def __init__(self, text: Callable[[], str]) -> None:
        super().__init__()
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        """See :class:`logging.Filter`."""
        if isinstance(record.msg, str) and record.msg.startswith(_BEGINNING):
            record.msg = f"{record.msg.rstrip(', ')}, {self._text()}"
        return True


def append_with(text: Callable[[], str]) -> None:
    """Append what ``text`` returns to each of the lines of this process."""
    logging.getLogger(_LOGGER).addFilter(_Appender(text))
