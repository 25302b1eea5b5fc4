"""Which positions the kernel's blocks work on (slab.cuh): chunks of 64 positions of one document, in segments.

A segment is what a block holds in shared memory.  Several short documents share one, so that tensor cores have full
tiles of 16 chunks; one too long for a segment has several by itself, and ``split`` is set.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref

import torch
from torch import Tensor

from ..documents import Documents

POSITIONS, TILE = 64, 16  # of a chunk, chunks of a tile
# Flags of slab.cuh.
FRESH_LEFT, FRESH_RIGHT, PADDING, BEGINS, ENDS = 1, 2, 4, 8, 16
# Blocks that give each multiprocessor of a large GPU two.
BLOCKS = 264


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    chunks: Tensor  # [chunks, 4] int32: first position, row, positions, flags
    segments: Tensor  # [segments + 1] int32: the first chunk of each, and the number of all
    tiles: int  # of the largest segment
    split: bool

    def to(self, device: torch.device) -> Layout:
        def moved(x: Tensor) -> Tensor:
            if device.type == "cuda":
                x = x.pin_memory()  # so that copying waits for nothing
            return x.to(device, non_blocking=True)

        return dataclasses.replace(self, chunks=moved(self.chunks), segments=moved(self.segments))


@functools.lru_cache(maxsize=64)
def of_rows(s: int, b: int, groups: int, tiles: int, states: bool, device: torch.device) -> Layout:
    """Every row is a document; groups: of features, each a block of a segment; tiles: the most in a segment; states:
    something comes from before rows or goes on after them, so that no two share a segment."""
    starts = torch.arange(b) * s
    return _layout(starts, torch.full((b,), s), torch.zeros(b, dtype=torch.bool), s, groups, tiles, states).to(device)


# Made once per microbatch, used by every layer.
_of_documents: weakref.WeakKeyDictionary[Documents, dict[tuple[int, int], Layout]] = weakref.WeakKeyDictionary()


def of_documents(documents: Documents, groups: int, tiles: int) -> Layout:
    """Each document of packed rows; padding is written as zeros."""
    known = _of_documents.setdefault(documents, {})
    if (groups, tiles) not in known:
        assert documents.stretches is not None
        b, s = documents.document_ids.shape
        starts, lengths = documents.stretches.starts, documents.stretches.lengths
        # What is between them, in pieces that end with their row.
        real = torch.zeros(b * s + 1, dtype=torch.int32)
        real[starts] += 1
        real[starts + lengths] -= 1
        empty = (real[:-1].cumsum(0) == 0).view(b, s)
        first = empty.clone()
        first[:, 1:] &= ~empty[:, :-1]
        last = empty.clone()
        last[:, :-1] &= ~empty[:, 1:]
        gaps = first.flatten().nonzero().squeeze(1)
        of_gaps = last.flatten().nonzero().squeeze(1) + 1 - gaps
        order = torch.cat((starts, gaps)).argsort()
        padding = torch.arange(len(order)) >= len(starts)
        starts, lengths = torch.cat((starts, gaps)), torch.cat((lengths, of_gaps))
        made = _layout(starts[order], lengths[order], padding[order], s, groups, tiles, states=False)
        known[groups, tiles] = made.to(documents.document_ids.device)
    return known[groups, tiles]


def _layout(starts: Tensor, lengths: Tensor, padding: Tensor, s: int, groups: int, tiles: int, states: bool) -> Layout:
    """starts: [stretches] row · s + position; a stretch is a document or padding."""
    counts = -(-lengths // POSITIONS)
    first = counts.cumsum(0) - counts
    stretch = torch.arange(len(counts)).repeat_interleave(counts)
    number = torch.arange(len(stretch)) - first[stretch]
    flags = torch.zeros(len(stretch), dtype=torch.int64)
    fresh_left, fresh_right = (0, 0) if states else (FRESH_LEFT, FRESH_RIGHT)
    flags[number == 0] |= BEGINS | fresh_left
    flags[number == counts[stretch] - 1] |= ENDS | fresh_right
    flags[padding[stretch]] |= PADDING
    offset = number * POSITIONS
    position, row = starts[stretch] % s + offset, starts[stretch] // s
    chunks = torch.stack((position, row, (lengths[stretch] - offset).clamp(max=POSITIONS), flags), 1)

    most = tiles * TILE
    while most > TILE and -(-len(chunks) // most) * groups < BLOCKS:
        most -= TILE
    segments, split = _segments(counts.tolist(), most, tiles * TILE, states)
    largest = max((after - before for before, after in itertools.pairwise(segments)), default=1)
    return Layout(chunks.int(), torch.tensor(segments, dtype=torch.int32), -(-largest // TILE), split)


def _segments(counts: list[int], wanted: int, most: int, alone: bool) -> tuple[list[int], bool]:
    """Where segments begin, for stretches of so many chunks, and whether some stretch has several."""
    segments, chunks, split = [0], 0, False

    def end() -> None:
        if chunks > segments[-1]:
            segments.append(chunks)

    for count in counts:
        if alone or chunks + count - segments[-1] > wanted:
            end()
        if count > most:
            end()
            split, pieces = True, -(-count // most)
            segments += [chunks + count * i // pieces for i in range(1, pieces)]
        chunks += count
        if count > most:
            end()
    end()
    return segments, split
