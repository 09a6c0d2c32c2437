"""Whether somebody looks at what the engine's modules take and return, which kernels in their place would not show."""

from __future__ import annotations

from typing import Any

WATCHERS = ("forward_hooks", "debug_tensor_dump_output_folder")  # fields of ServerArgs


def reason_of_watchers(args: Any) -> str | None:
    """Why no module is to be passed by, as a clause, or None: no flag of these ``ServerArgs`` looks at them."""
    flag = next((name for name in WATCHERS if getattr(args, name, None)), None)
    return flag and f"--{flag.replace('_', '-')} looks at modules that a kernel of ours would pass by"
