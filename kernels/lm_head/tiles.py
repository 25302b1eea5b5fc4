"""How the logits [rows, entries of the vocabulary] are cut into tiles, and what memory they take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

# On a device: small enough for most of a tile to stay in the L2 cache between the product that makes it and what reads
# it, large enough for that product to fill the device.
TILE_BYTES = 32 << 20
TILE_ROWS = 8192
# On a CPU, where the two come from measurements.  Products of a tile are faster there than one over the vocabulary.
CPU_COLUMNS = 2048
CPU_ROWS = 2048
# Logits up to this size are kept for the backward pass, which must compute others again: on a device what is a tile
# anyway; on a CPU, where memory is plentiful and products are slow, a third of what whole logits took with their
# gradient and softmax.
KEPT_BYTES = TILE_BYTES
CPU_KEPT_BYTES = 1 << 30

VECTOR = 8  # numbers: rows of a tile begin at multiples of it, 16 bytes of bfloat16
ALIGNMENT = 128  # numbers: what the width of a tile is a multiple of


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows and columns (entries of this shard's vocabulary) of a tile.  ``last_column`` may be beyond the vocabulary,
    in the weight's padding: ``real`` columns are not."""

    first_row: int
    last_row: int
    first_column: int
    last_column: int
    real: int

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.last_row)

    @property
    def columns(self) -> slice:
        return slice(self.first_column, self.last_column)

    @property
    def width(self) -> int:
        return self.last_column - self.first_column

    @property
    def stride(self) -> int:
        return round_up(self.width, VECTOR)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """``entries``: of the vocabulary in this shard; ``available``: rows of its weight, padding included."""

    rows: int
    entries: int
    available: int
    tile_rows: int
    tile_columns: int

    @staticmethod
    def of(rows: int, entries: int, available: int, dtype: torch.dtype, device: torch.device) -> Tiling:
        on_cpu = device.type == "cpu"
        tile_rows = even_part(rows, CPU_ROWS if on_cpu else TILE_ROWS, VECTOR)
        widest = CPU_COLUMNS if on_cpu else max(TILE_BYTES // (tile_rows * dtype.itemsize), ALIGNMENT)
        return Tiling(rows, entries, available, tile_rows, even_part(entries, widest, ALIGNMENT))

    def column_tiles(self) -> Iterator[list[Tile]]:
        """Tiles of the same columns, of all rows, after each other."""
        for column in range(0, self.entries, self.tile_columns):
            real = min(self.tile_columns, self.entries - column)
            last = min(column + round_up(real, VECTOR), self.available)
            yield [
                Tile(row, min(row + self.tile_rows, self.rows), column, last, real)
                for row in range(0, self.rows, self.tile_rows)
            ]

    def part_of(self, logits: Tensor, tile: Tile) -> Tensor:
        """Where the logits of a tile are kept among all of them, [rows, stride]."""
        start = self.rows * tile.first_column + tile.first_row * tile.stride
        return _matrix(logits[start:], tile)

    def buffer(self, like: Tensor) -> Tensor:
        """For the logits of any one tile: see ``start_of``."""
        return like.new_empty(self.tile_rows * self.tile_columns)


def start_of(buffer: Tensor, tile: Tile) -> Tensor:
    """[rows, stride] of a tile at the beginning of a buffer."""
    return _matrix(buffer, tile)


def _matrix(numbers: Tensor, tile: Tile) -> Tensor:
    rows = tile.last_row - tile.first_row
    return numbers[: rows * tile.stride].view(rows, tile.stride)


def kept_numbers(rows: int, entries: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many numbers of logits are kept for the backward pass: all, or none."""
    numbers = rows * round_up(entries, VECTOR)
    return numbers if numbers * dtype.itemsize <= (CPU_KEPT_BYTES if device.type == "cpu" else KEPT_BYTES) else 0


def round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def even_part(length: int, most: int, multiple: int) -> int:
    """The size of the fewest parts of about one size, at most ``most`` long, rounded up to a multiple."""
    most = max(most // multiple * multiple, multiple)
    parts = max((length + most - 1) // most, 1)
    return max(round_up((length + parts - 1) // parts, multiple), multiple)
