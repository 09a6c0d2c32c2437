"""Decisions for MiniMax-M2 that belong where the engine reads the server's arguments."""

from __future__ import annotations

ADJUSTMENTS: list = []
