"""Configuration of Nyströmformer (arXiv 2102.03902) for Hugging Face transformers.

This file, `modeling_encoder.py` and `modeling_nystromformer.py` beside it travel with the weights and need only torch
and transformers (4.37 and later, 5 included). Load the folder with
`AutoModel….from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

from typing import Any

from .modeling_encoder import EncoderConfig


class NystromformerConfig(EncoderConfig):
    """Shape and options of a Nyströmformer model; names and defaults are those of transformers' `NystromformerConfig`.

    Args:
        num_landmarks: the most landmarks of a row, each the mean of a segment of its tokens. Rows of no more tokens
            than that have exact softmax attention.
        segment_means_seq_len: the length of rows that the model was made for. Rows may have any length; where this is
            equal to `num_landmarks`, attention is exact at any length.
        conv_kernel_size: places that the convolution of values reaches over, an odd number; None: no convolution.
        inv_coeff_init_option: whether the pseudo-inverse of each matrix starts from that matrix alone. If not, from
            the largest column sum in all rows and heads, as transformers' classes have it: a row's result then depends
            a little on the rows beside it.
        padding_counts: padding belongs to segments and to what the convolution sees, but is no key. If not, the real
            tokens of each row are moved together first.
        Others: `EncoderConfig`.

    Raises:
        ValueError: a value that no model can have, in one line.
    """

    model_type = "farspan_nystromformer"
    flags = [*EncoderConfig.flags, "inv_coeff_init_option"]  # noqa: RUF012
    least = {**EncoderConfig.least, "num_landmarks": 1, "segment_means_seq_len": 1}  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 30000,
        hidden_act: str = "gelu_new",
        max_position_embeddings: int = 510,
        type_vocab_size: int = 2,
        segment_means_seq_len: int = 64,
        num_landmarks: int = 64,
        conv_kernel_size: int | None = 65,
        inv_coeff_init_option: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            hidden_act=hidden_act,
            max_position_embeddings=max_position_embeddings,
            type_vocab_size=type_vocab_size,
            **kwargs,
        )
        self.segment_means_seq_len = segment_means_seq_len
        self.num_landmarks = num_landmarks
        self.conv_kernel_size = conv_kernel_size
        self.inv_coeff_init_option = inv_coeff_init_option
        self.check()

    def check(self) -> None:
        """Refuses, in one line, what no model can be."""
        super().check()
        if self.num_landmarks > self.segment_means_seq_len:
            raise ValueError(
                f"num_landmarks is {self.num_landmarks} and segment_means_seq_len {self.segment_means_seq_len}: a row "
                "cannot have more landmarks than tokens; the two are probably swapped, set them the other way round"
            )
        size = self.conv_kernel_size
        if size is not None and (not isinstance(size, int) or size < 1 or size % 2 == 0):
            raise ValueError(f"conv_kernel_size is {size!r}: it must be an odd number, or None for no convolution")
