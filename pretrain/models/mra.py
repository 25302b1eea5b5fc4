"""MRA: attention exact in the blocks that matter and by block means elsewhere (MRA-2, arXiv 2207.10284)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...kernels.mra import BLOCK, block_budget, mra_attention
from ...parallel.mesh import Mesh
from .approximate import FIRST_POSITION, ApproximateAttention, ApproximateConfig, ApproximateModel, encoder_code
from .config import ModelConfig
from .transformer import transformer_flops_per_row

KERNEL_HEAD_SIZE = 64  # of whose multiples the released CUDA kernel computes the right numbers


class MraConfig(ApproximateConfig):
    """Fields and defaults of Hugging Face's MraConfig."""

    model_type: str = ModelConfig.with_default("model_type", "mra")
    type_vocab_size: int = ModelConfig.with_default("type_vocab_size", 1)
    block_per_row: int = Field(
        4, gt=0, description=f"blocks of {BLOCK} × {BLOCK} computed exactly, on average for {BLOCK} queries"
    )
    approx_mode: Literal["full", "sparse"] = Field(
        "full", description="the other blocks: by their means (MRA-2), or left out (MRA-2-s)"
    )
    initial_prior_first_n_blocks: int = Field(
        0, ge=0, description="the first rows and columns of blocks that are computed exactly before others"
    )
    initial_prior_diagonal_n_blocks: int = Field(
        0, ge=0, description="the width in blocks of the band on the diagonal that is computed exactly before others"
    )


class MraAttention(ApproximateAttention):
    multiple = BLOCK

    def __init__(self, config: MraConfig, mesh: Mesh, index: int) -> None:
        super().__init__(config, mesh, index)
        self.config = config

    def attend_parts(self, parts: list[tuple[Tensor, Tensor, Tensor, Tensor | None]]) -> list[Tensor]:
        c = self.config
        return [
            mra_attention(
                q, k, v, mask=mask, budget=block_budget(q.shape[2], c.block_per_row), sparse=c.approx_mode == "sparse",
                first_blocks=c.initial_prior_first_n_blocks, diagonal_blocks=c.initial_prior_diagonal_n_blocks,
            )
            for q, k, v, mask in parts
        ]  # fmt: skip


class Mra(ApproximateModel):
    name = "mra"
    config_class = MraConfig
    own_code = encoder_code("mra", needed=True)
    operations = (*ApproximateModel.operations, "mra")
    config: MraConfig

    def make_attention(self, index: int) -> MraAttention:
        return MraAttention(self.config, self.mesh, index)

    @classmethod
    def huggingface_constants(cls, config: ModelConfig, heads: tuple[str, ...]) -> dict[str, Tensor]:
        """The released model registers the rows of its position table."""
        assert isinstance(config, MraConfig)
        rows = torch.arange(FIRST_POSITION, config.position_rows).unsqueeze(0)
        return {f"{cls.name}.embeddings.position_ids" if heads else "embeddings.position_ids": rows}

    @classmethod
    def stock_difference(cls, config: ModelConfig) -> str | None:
        assert isinstance(config, MraConfig)
        if not config.padding_counts:
            return "in their padded rows padding fills blocks, and is counted in the number of exact ones"
        if (size := config.hidden_size // config.num_attention_heads) % KERNEL_HEAD_SIZE:
            return f"their kernel is wrong for head sizes such as {size}, no multiple of {KERNEL_HEAD_SIZE}"
        return None

    @classmethod
    def stock_note(cls, config: ModelConfig) -> str:
        return (
            "the stock mra classes need their CUDA kernel (without it their attention is zero), rows of "
            "max_position_embeddings tokens, and the same padding in all rows of a batch; an export without --stock "
            "needs none of these"
        )

    @classmethod
    def flops_per_row(cls, config: ModelConfig, length: float, predictions: float) -> float:
        """The exact blocks, and the products of block means."""
        assert isinstance(config, MraConfig)
        h, blocks = config.hidden_size, -(-length // BLOCK)
        selected = min(blocks * config.block_per_row, blocks**2)
        if selected == blocks**2:
            attention = 4 * length * length * h
        else:
            attention = 4 * selected * BLOCK**2 * h
            # The sparse mode's means only choose: no gradient goes through them.
            attention += 4 * blocks**2 * h if config.approx_mode == "full" else 2 / 3 * blocks**2 * h
        return transformer_flops_per_row(config, length, predictions, attention=attention)
