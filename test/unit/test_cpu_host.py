"""What is chosen on a host without an accelerator, what the person's choice wins over, and that errors are clear."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from sglang_minimax import adjustments, cpu_host
from sglang_minimax.checkpoints import SmallModel, write_checkpoint

needs_cpu_host = pytest.mark.skipif(
    not cpu_host.has_no_accelerator(), reason="this host has an accelerator, where none of this is active"
)


@pytest.fixture
def bare_host(monkeypatch):
    """A Linux host on which nothing is found, whatever this one has."""

    def no_library(name, *arguments, **options):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    return monkeypatch


class TestDetection:
    def test_a_bare_host_has_no_accelerator(self, bare_host):
        assert cpu_host.has_no_accelerator()

    def test_an_nvidia_driver_counts(self, bare_host):
        bare_host.setattr(ctypes, "CDLL", lambda name, *arguments, **options: name)
        assert not cpu_host.has_no_accelerator()

    @pytest.mark.parametrize("device", ["/dev/kfd", "/dev/davinci_manager", "/dev/dri/renderD128"])
    def test_another_vendors_device_counts(self, bare_host, device):
        bare_host.setattr(os.path, "exists", lambda path: path == device)
        assert not cpu_host.has_no_accelerator()

    def test_another_vendors_torch_counts(self, bare_host):
        bare_host.setattr(importlib.util, "find_spec", lambda name, package=None: name == "torch_npu" or None)
        assert not cpu_host.has_no_accelerator()

    def test_macos_is_left_to_the_engine(self, bare_host):
        bare_host.setattr(sys, "platform", "darwin")
        assert not cpu_host.has_no_accelerator()

    def test_nothing_of_it_is_active_with_an_accelerator(self, monkeypatch):
        monkeypatch.setattr(cpu_host, "has_no_accelerator", lambda: False)
        monkeypatch.setattr(cpu_host, "prepare_environment", lambda: pytest.fail("the environment was touched"))
        active = list(adjustments.for_this_host())
        assert active and not any(adjustment in active for adjustment in cpu_host.ADJUSTMENTS)

    def test_all_of_it_is_active_without(self, monkeypatch):
        monkeypatch.setattr(cpu_host, "has_no_accelerator", lambda: False)
        everywhere = list(adjustments.for_this_host())
        monkeypatch.setattr(cpu_host, "has_no_accelerator", lambda: True)
        monkeypatch.setattr(cpu_host, "prepare_environment", lambda: None)
        assert list(adjustments.for_this_host()) == [*everywhere, *cpu_host.ADJUSTMENTS]


class TestEnvironment:
    def test_what_must_be_set_is_set(self, monkeypatch):
        monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
        monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
        monkeypatch.delitem(sys.modules, "common_ops", raising=False)
        cpu_host.prepare_environment()
        assert os.environ["SGLANG_USE_CPU_ENGINE"] == os.environ["TORCHDYNAMO_DISABLE"] == "1"
        assert "common_ops" in sys.modules

    def test_what_the_person_set_stays(self, monkeypatch):
        monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "0")
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
        cpu_host.prepare_environment()
        assert os.environ["SGLANG_USE_CPU_ENGINE"] == os.environ["TORCHDYNAMO_DISABLE"] == "0"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SmallModel(num_hidden_layers=1, hidden_size=64))


@pytest.fixture
def environment(monkeypatch):
    """The engine writes to the environment when its arguments are read: what it wrote goes with the test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def server_args(checkpoint, **chosen):
    from sglang.srt.server_args import ServerArgs

    return ServerArgs(model_path=str(checkpoint), device="cpu", skip_tokenizer_init=True, **chosen)


@needs_cpu_host
@pytest.mark.usefixtures("environment")
class TestServerArguments:
    def test_defaults_fit_many_ranks_on_one_host(self, checkpoint):
        args = server_args(checkpoint, tp_size=16)
        assert (args.attention_backend, args.sampling_backend) == ("torch_native", "pytorch")
        assert args.disable_overlap_schedule and args.disable_custom_all_reduce and args.sleep_on_idle
        assert args.max_total_tokens == cpu_host.DEFAULT_KV_CACHE_TOKENS
        assert args.max_running_requests == cpu_host.DEFAULT_RUNNING_REQUESTS

    def test_running_requests_are_counted_for_each_dp_rank(self, checkpoint):
        args = server_args(checkpoint, tp_size=4, dp_size=2, enable_dp_attention=True)
        assert args.max_running_requests == 2 * cpu_host.DEFAULT_RUNNING_REQUESTS

    def test_choices_stay(self, checkpoint):
        chosen = dict(attention_backend="flex_attention", max_total_tokens=100, max_running_requests=7)
        args = server_args(checkpoint, mem_fraction_static=0.25, **chosen)
        assert {name: getattr(args, name) for name in chosen} == chosen
        assert args.mem_fraction_static == 0.25

    def test_a_chosen_memory_share_is_not_capped(self, checkpoint):
        assert server_args(checkpoint, mem_fraction_static=0.25).max_total_tokens is None

    def test_pipeline_parallelism_is_refused_with_a_way_out(self):
        with pytest.raises(ValueError, match=r"--pp-size 2: .* Use --tp-size"):
            cpu_host.refuse_pipeline_parallelism(SimpleNamespace(pp_size=2))
        cpu_host.refuse_pipeline_parallelism(SimpleNamespace(pp_size=1))

    @pytest.mark.parametrize(
        ("stored", "asked", "served"),
        [
            ("float32", "auto", torch.float32),
            ("bfloat16", "auto", torch.bfloat16),
            ("float32", "bfloat16", torch.bfloat16),
            ("float32", "half", torch.float16),
        ],
    )
    def test_a_checkpoint_is_served_in_its_own_dtype(self, stored, asked, served):
        from sglang.srt.configs import model_config

        assert (
            model_config._get_and_verify_dtype(SimpleNamespace(dtype=stored, model_type="minimax_m2"), asked) == served
        )


@pytest.mark.parametrize(
    ("args", "ranks"),
    [
        (dict(tp_size=16), 16),
        (dict(tp_size=16, nnodes=2), 8),
        (dict(tp_size=4, dp_size=2, enable_dp_attention=True), 4),
        (dict(tp_size=2, dp_size=3), 6),
        (dict(tp_size=2, pp_size=2), 4),
    ],
)
def test_ranks_on_this_host(args, ranks):
    one = dict(tp_size=1, pp_size=1, dp_size=1, nnodes=1, enable_dp_attention=False)
    assert cpu_host.ranks_on_this_host(SimpleNamespace(**(one | args))) == ranks


@pytest.mark.parametrize(
    ("attn_tp_size", "num_heads", "num_kv_heads", "shards"),
    [(16, 48, 8, True), (8, 48, 8, True), (4, 16, 2, True), (3, 48, 8, False), (5, 48, 8, False), (64, 48, 8, False)],
)
def test_heads_that_gpus_could_shard_are_not_padded(attn_tp_size, num_heads, num_kv_heads, shards):
    assert cpu_host.can_shard_heads(attn_tp_size, num_heads, num_kv_heads) is shards


def test_ranks_share_the_memory_of_the_host():
    class Mixin:
        server_args = SimpleNamespace(tp_size=16, pp_size=1, dp_size=1, nnodes=1, enable_dp_attention=False)

        def profile_max_num_token(self, pre_model_load_memory):
            return 1600 * pre_model_load_memory

    cpu_host.share_memory(SimpleNamespace(ModelRunnerKVCacheMixin=Mixin))
    assert Mixin().profile_max_num_token(10) == 1000


def test_cores_are_counted_without_lscpu(monkeypatch):
    common = SimpleNamespace(parse_lscpu_topology=lambda: "what lscpu says")
    cpu_host.count_cores_without_lscpu(common)
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    assert common.parse_lscpu_topology() == "what lscpu says"
    monkeypatch.setattr("shutil.which", lambda program: None)
    assert common.parse_lscpu_topology() == [(core, core, 0, 0) for core in sorted(os.sched_getaffinity(0))]


class TestCopyRows:
    @pytest.mark.parametrize("rows", [0, 1, 3])
    def test_into_the_gathered_buffer(self, rows):
        buffer, mine = torch.zeros(8, 2), torch.arange(6.0).view(3, 2)
        cpu_host.copy_rows(buffer, mine, 0, torch.tensor(4), torch.tensor(rows), False)
        assert torch.equal(buffer[4 : 4 + rows], mine[:rows])
        assert buffer[:4].eq(0).all() and buffer[4 + rows :].eq(0).all()

    def test_out_of_the_gathered_buffer(self):
        buffer, mine = torch.arange(16.0).view(8, 2), torch.zeros(3, 2)
        cpu_host.copy_rows(mine, buffer, 0, torch.tensor(2), torch.tensor(2), True)
        assert torch.equal(mine, torch.tensor([[4.0, 5], [6, 7], [0, 0]]))

    def test_no_more_rows_than_the_smaller_tensor_has(self):
        buffer, mine = torch.arange(16.0).view(8, 2), torch.zeros(3, 2)
        cpu_host.copy_rows(mine, buffer, 0, torch.tensor(1), torch.tensor(5), True)
        assert torch.equal(mine, buffer[1:4])


@needs_cpu_host
class TestExperts:
    """Against the sum written out: each token's experts of this rank, weighted."""

    HIDDEN, INNER, EXPERTS, TOPK = 8, 6, 4, 3

    @pytest.fixture(autouse=True)
    def global_arguments(self, monkeypatch):
        from sglang.srt import server_args

        monkeypatch.setattr(server_args, "_global_server_args", SimpleNamespace(rl_on_policy_target=None))

    def run(self, ids, dtype=torch.float32):
        from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        torch.manual_seed(0)
        w13 = torch.randn(self.EXPERTS, 2 * self.INNER, self.HIDDEN, dtype=dtype)
        w2 = torch.randn(self.EXPERTS, self.HIDDEN, self.INNER, dtype=dtype)
        x, weights = torch.randn(len(ids), self.HIDDEN, dtype=dtype), torch.rand(len(ids), self.TOPK)
        layer = SimpleNamespace(w13_weight=w13, w2_weight=w2, num_experts=self.EXPERTS)
        config = SimpleNamespace(apply_router_weight_on_input=False, activation="silu")
        got = moe_forward_native(layer, x, StandardTopKOutput(weights, ids, None), config)
        expected = torch.zeros(len(ids), self.HIDDEN, dtype=torch.float64)
        for token, slot in (ids >= 0).nonzero():
            expert = ids[token, slot]
            gate, up = (w13[expert].double() @ x[token].double()).chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
            expected[token] += weights[token, slot] * (w2[expert].double() @ hidden)
        return got, expected

    def ids(self, *rows):
        return torch.tensor(rows, dtype=torch.int32).view(-1, self.TOPK)

    def test_all_experts_here(self):
        got, expected = self.run(self.ids([0, 1, 2], [3, 2, 0], [1, 3, 2]))
        torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)

    def test_experts_on_other_ranks_add_nothing(self):
        got, expected = self.run(self.ids([0, -1, 2], [-1, -1, -1], [3, -1, -1], [1, 2, 3]))
        torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)
        assert got[1].eq(0).all()

    def test_no_expert_here(self):
        got, _ = self.run(self.ids([-1, -1, -1], [-1, -1, -1]))
        assert got.shape == (2, self.HIDDEN) and got.eq(0).all()

    def test_no_tokens(self):
        got, _ = self.run(self.ids())
        assert got.shape == (0, self.HIDDEN)

    def test_bfloat16(self):
        got, expected = self.run(self.ids([0, -1, 2], [1, 2, 3]), torch.bfloat16)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), expected, atol=0.2, rtol=0.05)


@needs_cpu_host
class TestGpuKernelsAreClearErrors:
    def test_a_triton_kernel_names_itself(self):
        from sglang.srt.layers.dp_attention import memcpy_triton_kernel

        x = torch.zeros(4)
        with pytest.raises(RuntimeError, match=r"dp_attention\.memcpy_triton_kernel was reached.*has no GPU"):
            memcpy_triton_kernel[(1,)](x, x, 0, 4, True, 1, 8192)

    def test_a_missing_kernel_names_itself(self):
        import sgl_kernel

        with pytest.raises(AttributeError, match="moe_sum"):
            sgl_kernel.moe_sum(torch.zeros(2, 2, 8), torch.zeros(2, 8))


@needs_cpu_host
def test_custom_ops_run_on_cpu_tensors():
    from sglang.srt.utils.custom_op import register_custom_op

    def double_in_place(x: torch.Tensor) -> None:
        x.mul_(2)

    register_custom_op(double_in_place, op_name="test_double_in_place", mutates_args=["x"])
    x = torch.ones(3)
    torch.ops.sglang.test_double_in_place(x)
    assert x.eq(2).all()


@needs_cpu_host
def test_token_counts_are_not_pinned():
    from sglang.srt.model_executor import forward_batch_info

    assert forward_batch_info.torch.tensor([1, 2], pin_memory=True).tolist() == [1, 2]
    assert forward_batch_info.torch.empty is torch.empty


@needs_cpu_host
def test_a_padded_sequence_has_one_token():
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    backend = TorchNativeAttnBackend(SimpleNamespace(device="cpu"))
    assert backend.get_cuda_graph_seq_len_fill_value() == 1


@needs_cpu_host
def test_a_grammar_masks_tokens():
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar

    logits, only_token_33 = torch.zeros(1, 64), torch.tensor([[0, 2]], dtype=torch.int32)
    XGrammarGrammar.apply_vocab_mask(None, logits, only_token_33)
    assert logits[0].isfinite().nonzero().flatten().tolist() == [33]


@needs_cpu_host
def test_nccl_is_left_alone():
    from sglang.srt.distributed.device_communicators import pynccl

    with pytest.raises(OSError, match="NCCL is for CUDA devices"):
        pynccl.NCCLLibrary()
