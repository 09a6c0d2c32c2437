"""Weights that are replaced from a folder while a server runs: one with damaged files is refused before any is loaded.

The engine passes over a file that is not there, and answers that it succeeded with the weights of the others. A file
that is cut off ends its load in the middle, and with it the server, whose own folder it then takes the same name for.
"""

from __future__ import annotations

import functools
from typing import Any

from sglang_minimax.adjustments import EngineModule, EngineObject
from sglang_minimax.server_arguments import is_minimax


def check_updates(module: EngineModule) -> None:
    """Looks at the files first, on all ranks of a pipeline stage: either all replace their weights, or none does."""
    update = module.ModelRunner.update_weights_from_disk

    @functools.wraps(update)
    def checked(self: EngineObject, model_path: str, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        if is_minimax(self.model_config) and (damage := _damage_on_any_rank(self, model_path)):
            return False, f"No weights were replaced. {model_path} is damaged:\n{damage}"
        replaced: tuple[bool, str] = update(self, model_path, *args, **kwargs)
        return replaced

    module.ModelRunner.update_weights_from_disk = checked


def _damage_on_any_rank(runner: EngineObject, model_path: str) -> str:
    # Not over all stages: each gets the request from the one before it, which has then done with it.
    from sglang.srt.distributed import get_tp_group
    from sglang.srt.models.minimax_m2_files import damaged_files, folder_of

    found = damaged_files(folder_of(model_path, None, runner.server_args.download_dir))
    return "\n".join(dict.fromkeys(fault for own in get_tp_group().all_gather_object(found) for fault in own))


ADJUSTMENTS = [("sglang.srt.model_executor.model_runner", check_updates)]
