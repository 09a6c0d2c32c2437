"""Rows that are not summed yet.

Where the inputs of a product are divided over CTAs, and where a token has several experts, kernels leave float32 parts
of a row, which another launch adds up. If the launch behind that one reads each row once, it may as well read the
parts: see :mod:`minimax_all_reduce_norm`. The sum has the same bits either way, and one launch is saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Parts:
    """Stands for [tokens, width]: the sum of its parts, in their order, in float32, rounded once.

    Attributes:
        values: [parts, tokens, width] float32, each row contiguous, the others at any stride.
        ids: [tokens, parts] int32, contiguous, the expert that each part is of; None: all parts were written. Parts of
            other ranks' experts were not written, and count nothing.
        first_expert, experts: this rank's experts, if there are ``ids``.
        dtype: of what it stands for; the kernels' is bfloat16.
    """

    values: torch.Tensor
    ids: torch.Tensor | None = None
    first_expert: int = 0
    experts: int = 0
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> torch.Size:
        """Of what it stands for."""
        return self.values.shape[1:]

    def summed(self) -> torch.Tensor:
        """[tokens, width], in plain torch."""
        values = self.values
        if self.ids is not None:
            expert = (self.ids - self.first_expert).T.unsqueeze(-1)
            values = torch.where((expert >= 0) & (expert < self.experts), values, 0.0)
        total = values[0].clone()
        for part in values[1:]:
            total += part
        return total.to(self.dtype)
