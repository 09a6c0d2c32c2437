"""What a layer of a decode step launches and how long each launch takes: what stands behind the step model's constant.

One table, for TP4 of the published model in FP8 blocks on H200 at batch 16, dummy weights: 12 q heads, 2 KV heads and
experts of width 384 a rank. A launch that was not measured is None there and makes no part of any sum.
"""

from __future__ import annotations

from dataclasses import dataclass

BATCH, TP = 16, 4
GAP_US = 0.85  # lost between two launches of a CUDA graph; 0.7 to 1.0 was measured

PROFILE = "profile of a stock step, 16 layers, two H200"
QK_NORM = "benchmark/qk_norm_rope.py, one peer instead of three"
ROUTER = "benchmark/router.py"
EXPERT_SUM = "benchmark/expert_sum.py"


@dataclass(frozen=True)
class Measured:
    """Microseconds of each launch, without the gaps between them; or of all together, gaps included."""

    launches_us: tuple[float, ...]
    source: str
    with_gaps: bool = False

    @property
    def layer_us(self) -> float:
        """Of a layer, with a gap behind each launch."""
        return sum(self.launches_us) + (0.0 if self.with_gaps else GAP_US * len(self.launches_us))


@dataclass(frozen=True)
class Purpose:
    """What a layer launches for one purpose, in the stock engine and in ours; None: not measured."""

    what: str
    stock: Measured | None
    ours: Measured | None


def _same(what: str, *launches_us: float) -> Purpose:
    measured = Measured(launches_us, PROFILE)
    return Purpose(what, measured, measured)


def _benchmarked(what: str, stock_us: float, ours_us: float, source: str) -> Purpose:
    return Purpose(what, *(Measured((layer_us,), source, with_gaps=True) for layer_us in (stock_us, ours_us)))


LAYER = (
    _same("two norms, with the residual", 2.33, 2.33),
    _same("FP8 activations of the projections", 1.33, 1.33),
    _same("qkv and output projections, in FP8", 9.8, 9.8),
    _benchmarked("QK norm, RoPE and KV store", 12.28, 2.73, QK_NORM),
    _same("attention", 4.3, 2.7),
    _same("two all-reduces", 4.3, 4.3),
    _benchmarked("the router's logits", 18.75, 5.99, ROUTER),
    _same("the choice of experts", 3.9),
    _same("the order of tokens by expert", 2.6, 1.24),
    _same("FP8 activations of the experts", 1.76, 1.76),
    _same("the experts' two products", 13.3, 13.3),
    _same("the experts' activation", 1.4),
    Purpose("the sum over a token's experts", Measured((4.7,), PROFILE), Measured((1.80,), EXPERT_SUM, with_gaps=True)),
)


def explained_us(ours: bool) -> float:
    """Microseconds of a layer that the table has, memory reads and collectives among them."""
    sides = (purpose.ours if ours else purpose.stock for purpose in LAYER)
    return sum(measured.layer_us for measured in sides if measured is not None)


def unmeasured(ours: bool) -> list[str]:
    """What the sum leaves out."""
    return [purpose.what for purpose in LAYER if (purpose.ours if ours else purpose.stock) is None]
