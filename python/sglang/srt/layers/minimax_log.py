"""How the layers say which way they took: what all of them say is one line of the log."""

from __future__ import annotations

import functools
import logging

from sglang.srt.utils import log_info_on_rank0

logger = logging.getLogger(__name__)


@functools.cache
def log_once(message: str) -> None:
    """Says it once and not for every layer, on the first rank only."""
    log_info_on_rank0(logger, message)
