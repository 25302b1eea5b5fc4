"""Configuration of MRA (multi resolution analysis attention, arXiv 2207.10284) for Hugging Face transformers.

This file, `modeling_encoder.py` and `modeling_mra.py` beside it travel with the weights and need only torch and
transformers (4.37 and later, 5 included). Load the folder with
`AutoModel….from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

from typing import Any

from .modeling_encoder import EncoderConfig

MODES = ("full", "sparse")


class MraConfig(EncoderConfig):
    """Shape and options of an MRA model; names and defaults are those of transformers' `MraConfig`.

    Args:
        block_per_row: how many blocks of 32 queries and 32 keys are computed exactly, for each block of queries in the
            row on average: the best of the whole matrix are taken.
        approx_mode: what becomes of the other blocks: "full" approximates them by their means, "sparse" drops them.
        initial_prior_first_n_blocks: so many first rows and columns of blocks come before others in the choice.
        initial_prior_diagonal_n_blocks: and so wide a band along the diagonal.
        padding_counts: rows stay as they are, and padding fills blocks: their number, and so the number of those
            computed exactly, is the padded row's. If not, the real tokens of each row are moved together first.
        Others: `EncoderConfig`.

    Raises:
        ValueError: a value that no model can have, in one line.
    """

    model_type = "farspan_mra"
    least = {  # noqa: RUF012
        **EncoderConfig.least,
        "block_per_row": 1,
        "initial_prior_first_n_blocks": 0,
        "initial_prior_diagonal_n_blocks": 0,
    }

    def __init__(
        self,
        vocab_size: int = 50265,
        hidden_act: str = "gelu",
        max_position_embeddings: int = 512,
        type_vocab_size: int = 1,
        block_per_row: int = 4,
        approx_mode: str = "full",
        initial_prior_first_n_blocks: int = 0,
        initial_prior_diagonal_n_blocks: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            hidden_act=hidden_act,
            max_position_embeddings=max_position_embeddings,
            type_vocab_size=type_vocab_size,
            **kwargs,
        )
        self.block_per_row = block_per_row
        self.approx_mode = approx_mode
        self.initial_prior_first_n_blocks = initial_prior_first_n_blocks
        self.initial_prior_diagonal_n_blocks = initial_prior_diagonal_n_blocks
        self.check()

    def check(self) -> None:
        """Refuses, in one line, what no model can be."""
        super().check()
        if self.approx_mode not in MODES:
            raise ValueError(f"approx_mode is {self.approx_mode!r}: it must be one of {', '.join(MODES)}")
