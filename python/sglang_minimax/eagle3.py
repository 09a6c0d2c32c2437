"""EAGLE3's hidden states are those of the layers that the draft model names, in CUDA graphs too.

The engine captures its graphs first, with the default layers, and tells the model the draft's layers after that. A
draft that names others would get the right states in prefill, and those of the default layers in every replayed
verification: the answers stay right, and few drafted tokens are accepted.
"""

from __future__ import annotations

import functools

from sglang_minimax.adjustments import EngineModule, EngineObject
from sglang_minimax.server_arguments import is_minimax


def capture_the_drafts_layers(module: EngineModule) -> None:
    """Tells the model the draft's layers before graphs are captured; the engine's default then leaves them."""
    init_device_graphs = module.ModelRunner.init_device_graphs

    @functools.wraps(init_device_graphs)
    def with_layers(self: EngineObject) -> None:
        if self.eagle_use_aux_hidden_state and is_minimax(self.model_config):
            self.model.set_eagle3_layers_to_capture(self.eagle_aux_hidden_state_layer_ids)
        init_device_graphs(self)

    module.ModelRunner.init_device_graphs = with_layers


ADJUSTMENTS = [("sglang.srt.model_executor.model_runner", capture_the_drafts_layers)]
