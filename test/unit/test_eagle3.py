"""The layers of which EAGLE3 gets the outputs are the draft model's when CUDA graphs are captured."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
from sglang.srt.model_executor.cuda_graph_runner import CudaGraphRunner
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.models.minimax_m2 import MiniMaxM2ForCausalLM

from sglang_minimax.eagle3 import capture_the_drafts_layers


def runner_of(asked: list[int] | None, architecture: str = "MiniMaxM2ForCausalLM", uses_eagle3: bool = True):
    """The engine's runner as far as it asks for layers and captures: graphs first, with the default, then the draft's.

    ``captured``: the layers whose inputs were in the graphs, and then those of passes without a graph.
    """

    class Runner:
        def __init__(self) -> None:
            self.eagle_use_aux_hidden_state = uses_eagle3
            self.eagle_aux_hidden_state_layer_ids = asked
            self.model_config = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
            self.model = SimpleNamespace(
                pp_group=SimpleNamespace(is_last_rank=True, world_size=1),
                config=SimpleNamespace(num_hidden_layers=62),
                model=SimpleNamespace(layers_to_capture=[]),
            )
            self.model.set_eagle3_layers_to_capture = lambda ids=None: (
                MiniMaxM2ForCausalLM.set_eagle3_layers_to_capture(self.model, ids)
            )
            self.captured = []

        def init_device_graphs(self) -> None:
            if uses_eagle3:
                self.model.set_eagle3_layers_to_capture()
            self.captured.append(self.model.model.layers_to_capture)

        def initialize(self) -> None:
            self.init_device_graphs()
            if uses_eagle3:
                self.model.set_eagle3_layers_to_capture(self.eagle_aux_hidden_state_layer_ids)
            self.captured.append(self.model.model.layers_to_capture)

    capture_the_drafts_layers(SimpleNamespace(ModelRunner=Runner))
    runner = Runner()
    runner.initialize()
    return runner


@pytest.mark.parametrize(("asked", "entering"), [([9, 29, 49], [10, 30, 50]), ([5], [6]), (None, [2, 31, 59])])
def test_graphs_hold_the_drafts_layers(asked, entering):
    assert runner_of(asked).captured == [entering, entering]


def test_other_models_and_servers_without_a_draft_are_left_alone():
    assert runner_of([9, 29, 49], architecture="LlamaForCausalLM").captured == [[2, 31, 59], [10, 30, 50]]
    assert runner_of([9, 29, 49], uses_eagle3=False).captured == [[], []]


def test_the_engines_order_is_still_the_one_that_this_is_for():
    initialize = inspect.getsource(ModelRunner.initialize)
    assert initialize.index("self.init_device_graphs()") < initialize.index("set_eagle3_layers_to_capture(\n")
    assert "set_eagle3_layers_to_capture()" in inspect.getsource(CudaGraphRunner.__init__)
    assert ModelRunner.init_device_graphs.__wrapped__.__module__ == ModelRunner.__module__
