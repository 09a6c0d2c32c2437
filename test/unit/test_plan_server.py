"""The planner against the server: the same command lines, as the engine reads them and as we check them there."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
from types import SimpleNamespace

import pytest
from sglang.srt import server_args as engine
from sglang.srt.entrypoints.engine import _compute_parallelism_ranks
from sglang.srt.layers.moe.utils import MoeA2ABackend, MoeRunnerBackend
from sglang.srt.models import minimax_m2_moe
from unit.plans import B200, H200, M25

from sglang_minimax import cli, cpu_host
from sglang_minimax.plan import layout as layouts
from sglang_minimax.plan import memory, paths, report
from sglang_minimax.plan.hardware import GPUS, Gpu
from sglang_minimax.plan.layout import Flags, settle
from sglang_minimax.plan.shape import PUBLISHED_CONFIG, Quantisation, read_model

MI300X = GPUS["mi300x"]
IN_NVFP4 = read_model("m2.5", "modelopt_fp4")
UNQUANTISED = layouts.replace(M25, quantisation=Quantisation(), expert_block=1)

# ------------------------------------------------------------------ command lines

NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head", "*self_attn*"]}
OTHER_SIZES = {
    "num_hidden_layers": 10,
    "num_attention_heads": 36,
    "num_key_value_heads": 6,
    "num_local_experts": 60,
    "intermediate_size": 1152,
    "vocab_size": 1000,
}
MODELS = {  # by the engine's name of the quantisation
    "fp8": {},
    "modelopt_fp4": {"quantization_config": NVFP4},
    None: {"quantization_config": None, **OTHER_SIZES},
}

ONLY_PLANNED = (
    # Hardware, of which the arguments do not tell, or of which the engine asks later.
    "and a node has 8",
    "NVFP4 weights need a Blackwell GPU",
    "has no kernels for NVIDIA",
    "FlashInfer has no kernel for it in trtllm_mha",
    # Stages without layers, nodes without ranks, and what has no kernels, found while loading or in the first batch.
    "is more than the",
    "and --nnodes",
    "is planned for FP8 experts",
    "needs NVFP4 experts and --moe-runner-backend",
    # What nobody knows here.
    "is not planned",
)
"""Words of the rules for which the server does not end, or later than with its arguments."""


def some_flags(draw: random.Random, method: str | None) -> Flags:
    """Mostly few flags at once, of which some cannot work."""

    def rarely(default, *others):
        return draw.choice(others) if draw.random() < 0.25 else default

    runner, more = rarely("auto", *layouts.MOE_RUNNER_BACKENDS), {}
    if draw.random() < 0.5:
        more = {
            "moe_a2a_backend": rarely("none", *engine.MOE_A2A_BACKEND_CHOICES),
            "attn_cp_size": rarely(1, 2, 3, 4),
            "moe_dp_size": rarely(1, 2, 3, 4),
        }
        runner = "flashinfer_cutlass" if more["moe_a2a_backend"] == "flashinfer" else runner  # it takes no other
    return Flags(
        tp=draw.choice((1, 2, 3, 4, 4, 5, 6, 8, 8, 8, 12, 16, 24, 32, 48)),
        dp=rarely(1, 2, 3, 4, 6, 8, 16),
        enable_dp_attention=draw.random() < 0.5,
        ep=rarely(None, 1, 2, 3, 4, 6, 8, 16, 32),
        pp=rarely(1, 2, 3, 4, 8, 63),
        nnodes=rarely(1, 2, 3, 4, 8),
        kv_cache_dtype=rarely("auto", *layouts.KV_CACHE_DTYPES),
        mem_fraction_static=rarely(None, 0.5, 0.9),
        context_length=rarely(None, 8192, 196608, 196609),
        quantization=rarely(None, method),
        moe_runner_backend=runner,
        attention_backend=rarely(None, *engine.ATTENTION_BACKEND_CHOICES),
        **more,
    )


@pytest.fixture
def server(monkeypatch, tmp_path):
    """``on(gpu)`` says what GPUs a server finds. ``read(method, flags)`` reads a command line as the engine does, and
    checks what the model checks before it allocates its experts: the arguments, or the error that ends the server.
    ``model(method)`` is the planner's shape of the same checkpoint."""
    monkeypatch.setattr(cpu_host, "fill_in_server_defaults", lambda args: None)
    monkeypatch.setattr(engine, "is_cpu", lambda: False)
    monkeypatch.setattr(engine, "is_flashinfer_available", lambda: True)
    monkeypatch.setenv("SGLANG_MOE_NVFP4_DISPATCH", "1")  # or the engine sets it, for all tests after these
    parser = argparse.ArgumentParser()
    engine.ServerArgs.add_cli_args(parser)
    configs = {method: {**PUBLISHED_CONFIG, **change} for method, change in MODELS.items()}
    for method, config in configs.items():
        (tmp_path / str(method)).mkdir()
        in_file = {**config, "model_type": "minimax_m2", "rms_norm_eps": 1e-6, "rope_theta": 5e6}
        if config["quantization_config"] is None:
            del in_file["quantization_config"]
        (tmp_path / str(method) / "config.json").write_text(json.dumps(in_file))

    def on(gpu: Gpu) -> None:
        is_blackwell = gpu.architecture == "blackwell"
        for name in ("is_sm90_supported", "is_hopper_with_cuda_12_3"):
            monkeypatch.setattr(engine, name, lambda: not is_blackwell)
        for module, name in ((engine, "is_sm100_supported"), (minimax_m2_moe, "is_blackwell_supported")):
            monkeypatch.setattr(module, name, lambda: is_blackwell)
        monkeypatch.setattr(engine, "get_device_name", lambda: gpu.name)
        monkeypatch.setattr(engine, "get_device_memory_capacity", lambda device: gpu.memory_mib)

    def read(method: str | None, flags: Flags):
        words = ["--model-path", str(tmp_path / str(method)), "--device", "cuda", *flags.words()]
        words += ["--dist-init-addr", "127.0.0.1:5000"] if flags.nnodes > 1 else []
        args = engine.ServerArgs.from_cli_args(parser.parse_args(words))
        args.check_server_args()
        for name, value in {
            "get_global_server_args": args,
            "get_tensor_model_parallel_world_size": args.tp_size,
            "get_moe_runner_backend": MoeRunnerBackend(args.moe_runner_backend),
            "get_moe_a2a_backend": MoeA2ABackend(args.moe_a2a_backend),
        }.items():
            monkeypatch.setattr(minimax_m2_moe, name, lambda value=value: value)
        minimax_m2_moe.check_routing_stays_here()
        minimax_m2_moe.check_experts(SimpleNamespace(**configs[method]), method)
        return args

    return SimpleNamespace(on=on, read=read, model=lambda method: read_model(str(tmp_path / str(method))))


@pytest.mark.parametrize("gpu", [H200, B200], ids=["h200", "b200"])
def test_what_the_plan_calls_valid_the_server_takes_and_what_it_refuses_the_server_refuses(server, gpu):
    server.on(gpu)
    draw, met = random.Random(gpu.name), {"valid": 0, "refused": 0}
    for method in MODELS:
        model = server.model(method)
        for _ in range(700):
            flags = some_flags(draw, method)
            line = f"{method}: {' '.join(flags.words())}"
            try:
                layout, rule = settle(flags, model, gpu), None
            except ValueError as error:
                layout, rule = None, str(error)
            try:
                args = server.read(method, flags)
            except (AssertionError, ValueError) as error:
                assert layout is None, f"valid, they say, and the server ends: {line}: {error}"
                met["refused"] += 1
                continue
            if layout is None:
                assert any(words in rule for words in ONLY_PLANNED), f"the server takes {line}: {rule}"
                continue
            met["valid"] += 1
            assert (args.ep_size, args.attention_backend) == (layout.ep, layouts.attention_backend(flags, gpu)), line
            assert args.mem_fraction_static == memory.static_fraction(gpu, layout)[0], line
    assert min(met.values()) > 100, met


# ------------------------------------------------------------------ what is nearest


def given_up(flags: Flags, other: Flags) -> int:
    """How many of the flags that somebody gave another layout lacks."""
    default = vars(Flags())
    return sum(value not in (default[name], getattr(other, name)) for name, value in vars(flags).items())


def works(flags: Flags) -> bool:
    try:
        memory.plan_memory(M25, settle(flags, M25, H200), H200)
    except ValueError:
        return False
    return True


def others_of(flags: Flags) -> list[Flags]:
    """Without any idea of an order: sizes up to 16, and each of the rest as it was given or left out."""
    sizes = [1, 2, 3, 4, 6, 8, 12, 16]
    found: list[Flags] = []
    for tp, dp, pp in itertools.product(sizes, sizes, (1, 2, 4, flags.pp)):
        left_out = {
            "enable_dp_attention": dp > 1,
            "ep": None,
            "moe_runner_backend": "auto",
            "attention_backend": None,
            "attn_cp_size": 1,
            "nnodes": -(-tp * pp // 8),
        }
        choices = [[(name, plain), (name, getattr(flags, name))] for name, plain in left_out.items()]
        found += [layouts.replace(flags, tp=tp, dp=dp, pp=pp, **dict(choice)) for choice in itertools.product(*choices)]
    return found


@pytest.mark.parametrize(
    "flags",
    [
        Flags(dp=8),
        Flags(tp=8, dp=3, enable_dp_attention=True),
        Flags(tp=16, ep=2),
        Flags(tp=8, dp=2, enable_dp_attention=True, attn_cp_size=2),
        Flags(tp=16, moe_runner_backend="flashinfer_cutedsl", attention_backend="trtllm_mha"),
        Flags(nnodes=3, ep=2),
        Flags(tp=12, pp=3),
    ],
    ids=lambda flags: " ".join(flags.words()),
)
def test_no_layout_that_works_keeps_more_of_what_was_asked_for_than_the_nearest(flags):
    nearest = report.make_report(M25, flags, H200).nearest
    kept = [given_up(flags, other) for other in nearest]
    assert kept == sorted(kept) and len(nearest) == report.NUM_NEAREST
    fewer = (other for other in others_of(flags) if given_up(flags, other) < kept[0])
    assert not [other for other in fewer if works(other)]


def test_who_asks_for_eight_dp_ranks_alone_is_shown_them_first():
    nearest = report.make_report(M25, Flags(dp=8), H200).nearest
    assert " ".join(nearest[0].words()) == "--tp 8 --dp 8 --enable-dp-attention"
    assert all(flags.dp == 8 for flags in nearest)


# ------------------------------------------------------------------ what the flags mean


@pytest.mark.parametrize(
    "flags",
    [
        Flags(tp=8, attn_cp_size=2),
        Flags(tp=8, attn_cp_size=4, moe_dp_size=2),
        Flags(tp=16, moe_dp_size=2, ep=8, nnodes=2),
        Flags(tp=8, moe_a2a_backend="deepep"),
    ],
    ids=lambda flags: " ".join(flags.words()),
)
def test_ranks_hold_what_their_places_in_the_engines_groups_say(flags):
    layout = settle(flags, M25, H200)
    arguments = SimpleNamespace(enable_dp_attention=False, dp_size=1, tp_size=flags.tp, ep_size=layout.ep)
    arguments.attn_cp_size, arguments.moe_dp_size = flags.attn_cp_size, flags.moe_dp_size
    heads: dict[int, set[int]] = {}
    experts: dict[int, set[tuple[int, int]]] = {}
    for holds in report.rank_holds(M25, layout):
        cp_rank, moe_dp_rank, ep_rank = _compute_parallelism_ranks(arguments, holds.rank)
        heads.setdefault(cp_rank, set()).update(range(holds.q_heads[0], holds.q_heads[1] + 1))
        assert holds.experts[0] == ep_rank * (256 // layout.ep)
        parts = itertools.product(range(holds.experts[0], holds.experts[1] + 1), range(0, 1536, 96))
        first, last = holds.expert_columns
        experts.setdefault(moe_dp_rank, set()).update(part for part in parts if first <= part[1] <= last)
    # Each context-parallel rank has all heads, and each copy of the experts all columns of all of them.
    assert set(heads) == set(range(flags.attn_cp_size)) and all(held == set(range(48)) for held in heads.values())
    assert set(experts) == set(range(flags.moe_dp_size)) and all(len(held) == 256 * 16 for held in experts.values())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            Flags(tp=8, moe_a2a_backend="deepep"),
            {"sum over experts": "the dispatcher's combine", "fused all-reduce + norm": "off", "a2a backend": "deepep"},
        ),
        (
            Flags(tp=8, moe_dp_size=2),
            {"sum over experts": "the model's all-reduce over 4 ranks", "fused all-reduce + norm": "off"},
        ),
        (
            Flags(tp=8, dp=2, enable_dp_attention=True, moe_dp_size=2),
            {"sum over experts": "the model's all-reduce over 4 ranks"},
        ),
        (Flags(tp=4, moe_dp_size=4), {"sum over experts": "none"}),
        (
            Flags(tp=8, attn_cp_size=2),
            {
                "QK norm": "one kernel with RoPE, over 4 ranks",
                "sum over experts": "the model's all-reduce over 8 ranks",
                "fused all-reduce + norm": "off",
            },
        ),
        (Flags(tp=8, attention_backend="flashinfer"), {"attention backend": "flashinfer", "a2a backend": "none"}),
        (
            Flags(tp=8, attention_backend="fa3", kv_cache_dtype="fp8_e5m2"),
            {"attention backend": "triton", "QK norm": "one kernel with RoPE, over 8 ranks"},
        ),
    ],
)
def test_paths_of_what_divides_or_carries_work_beside_tp(flags, expected):
    taken = {path.name: path.taken for path in paths.paths(M25, settle(flags, M25, H200), H200)}
    assert {name: taken[name] for name in expected} == expected


def test_an_a2a_backend_takes_all_ranks_for_ep_and_the_plan_says_why():
    layout = settle(Flags(tp=8, ep=2, moe_a2a_backend="deepep"), M25, H200)
    assert layout.ep == 8 and layout.ep_chosen_because == "--moe-a2a-backend deepep takes all ranks for EP"


@pytest.mark.parametrize(
    ("model", "gpu", "flags", "rule"),
    [
        (M25, B200, Flags(tp=8, moe_runner_backend="flashinfer_trtllm_routed"), None),
        (UNQUANTISED, B200, Flags(tp=4, moe_runner_backend="flashinfer_trtllm_routed"), None),
        (
            UNQUANTISED, B200, Flags(tp=8, moe_runner_backend="flashinfer_trtllm_routed"),
            "pads the expert width a rank, 192, to a multiple of 128",
        ),
        (IN_NVFP4, B200, Flags(tp=4, moe_runner_backend="flashinfer_trtllm_routed"), "not for NVFP4"),
        (IN_NVFP4, B200, Flags(tp=4, moe_a2a_backend="flashinfer", moe_runner_backend="flashinfer_cutlass"), None),
        (M25, MI300X, Flags(tp=4, moe_runner_backend="cutlass"), "cutlass is for NVIDIA GPUs"),
        (UNQUANTISED, MI300X, Flags(tp=4, moe_runner_backend="cutlass"), None),  # Triton's run
        (M25, MI300X, Flags(tp=4, moe_a2a_backend="deepep"), "deepep is planned for FP8 experts on NVIDIA GPUs"),
        (M25, B200, Flags(tp=6, dp=6, enable_dp_attention=True), "--dp 6 makes 2730 tokens a chunk of 16384"),
        (M25, B200, Flags(tp=6, dp=6, enable_dp_attention=True, attention_backend="flashinfer"), None),
    ],
)  # fmt: skip
def test_what_kernels_and_gpus_go_together(model, gpu, flags, rule):
    with pytest.raises(ValueError, match=rule) if rule else contextlib.nullcontext():
        settle(flags, model, gpu)


def test_amds_attention_takes_less_of_the_memory_only_where_it_runs():
    layout_of = {name: settle(Flags(tp=8, attention_backend=name), M25, MI300X) for name in ("aiter", "triton")}
    aiter, triton = (memory.static_fraction(MI300X, layout)[0] for layout in layout_of.values())
    assert aiter == pytest.approx(0.85 * triton)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--moe-a2a-backend", "deepep"], "--moe-a2a-backend with --search, whose model of the step"),
        (["--attn-cp-size", "2", "--moe-dp-size", "2"], "--attn-cp-size, --moe-dp-size with --search"),
    ],
)
def test_a_search_has_no_model_of_a_step_for_them(capsys, arguments, said):
    assert cli.main(["plan", "m2.5", "--search", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_attention_backends_are_some_of_the_engines():
    assert set(layouts.ATTENTION_BACKENDS) < set(engine.ATTENTION_BACKEND_CHOICES)
    assert {*layouts.A2A_OF_DEEP_GEMM, "flashinfer"} < set(engine.MOE_A2A_BACKEND_CHOICES)
