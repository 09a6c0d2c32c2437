"""What the engine lacks on a host without a GPU: one function a gap."""

from __future__ import annotations

ADJUSTMENTS: list = []


def has_no_accelerator() -> bool:
    return False


def prepare_environment() -> None:
    pass
