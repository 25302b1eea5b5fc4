"""Queries, keys and values of a model that was never trained but has what makes attention of trained ones hard to
approximate: neighbours attend to each other, tokens of one topic too wherever they stand, and tokens differ.

For token t of head a, of topic z(t), with d features:

    q_t = τ_a · (TOPIC · T_a[z(t)] + POSITION · φ_a(t) + QUERY_NOISE · ε),
    k_t =        TOPIC · T_a[z(t)] + POSITION · φ_a(t) + KEY_NOISE · ε′,
    v_t =        VALUE_TOPIC · U_a[z(t)] + VALUE_POSITION · ψ_a(t) + VALUE_MEAN · m_a + ε″.

z(t): the text is cut at random, with 1/SEGMENT before each token, and each segment has one of TOPICS topics, all alike.
T, U, m, ε: independent standard normal numbers in every feature, ε one for each token.
φ, ψ: √2 cos(ω t + θ) in every feature, ω normal with deviation 1/WIDTH, θ uniform on the circle: φ(t)·φ(u) is about
d exp(−(t − u)² / (2 WIDTH²)) (random Fourier features, Rahimi and Recht 2007), smooth in t.
τ: exp(SHARPNESS · x) with x the middle quantiles of the normal distribution: some heads sharp, some diffuse.

The numbers below were searched for such that 12 heads of 64 features at 512 tokens have about the errors of the MRA
authors' own profile (``methods.AUTHORS``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SEGMENT, TOPICS, WIDTH = 3, 128, 80
TOPIC, POSITION, QUERY_NOISE, KEY_NOISE, SHARPNESS = 0.7, 0.6, 1.05, 1.05, 0.7
VALUE_TOPIC, VALUE_POSITION, VALUE_MEAN = 0.9, 0.25, 0.1


def synthetic_qkv(rows: int, heads: int, length: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [rows, heads, length, size] float32.  A shorter input is the beginning of a longer one."""

    def generator(purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed * 100 + purpose)

    def noise(purpose: int) -> Tensor:
        return torch.randn(length, rows, heads, size, generator=generator(purpose)).permute(1, 2, 0, 3)

    def smooth(purpose: int) -> Tensor:
        numbers = generator(purpose)
        frequency = torch.randn(heads, 1, size, generator=numbers) / WIDTH
        phase = 2 * math.pi * torch.rand(heads, 1, size, generator=numbers)
        return math.sqrt(2) * torch.cos(torch.arange(length).view(-1, 1) * frequency + phase)

    topics = _topics(rows, length, generator(0))
    of_keys, of_values = (torch.randn(heads, TOPICS, size, generator=generator(purpose)) for purpose in (1, 2))
    shared = TOPIC * of_keys[:, topics].transpose(0, 1) + POSITION * smooth(3)
    quantiles = torch.special.ndtri((torch.arange(heads) + 0.5) / heads)
    q = (shared + QUERY_NOISE * noise(4)) * (SHARPNESS * quantiles).exp().view(-1, 1, 1)
    k = shared + KEY_NOISE * noise(5)
    mean = VALUE_MEAN * torch.randn(heads, 1, size, generator=generator(7))
    v = VALUE_TOPIC * of_values[:, topics].transpose(0, 1) + VALUE_POSITION * smooth(6) + mean + noise(8)
    return q.contiguous(), k.contiguous(), v.contiguous()


def _topics(rows: int, length: int, numbers: torch.Generator) -> Tensor:
    """[rows, length] the topic of each token."""
    drawn = torch.rand(length, 2, rows, generator=numbers)
    begins = drawn[:, 0] < 1 / SEGMENT
    begin = torch.where(begins, torch.arange(length).view(-1, 1), 0).cummax(0).values
    return (drawn[:, 1] * TOPICS).long().gather(0, begin).T
