"""``sglang-minimax``: what helps a person before the server runs, one subcommand each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sglang_minimax import __version__
from sglang_minimax.bench import command as bench
from sglang_minimax.doctor import command as doctor
from sglang_minimax.plan import command as plan


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code."""
    parser = argparse.ArgumentParser(prog="sglang-minimax", description="MiniMax-M2 models, served right by SGLang")
    parser.add_argument("--version", action="version", version=f"sglang-minimax {__version__}")
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in (("plan", plan), ("doctor", doctor), ("bench", bench)):
        subcommand = subcommands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(subcommand)
        subcommand.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    exit_code: int = arguments.run(arguments)
    return exit_code
