"""Checkpoints that do not depend on the layout: logical tensors in sharded, checksummed safetensors files."""

from .folders import Retention, candidates, find, latest, step_of, steps, undo
from .manifest import MANIFEST, TOKENIZER, Entry, Manifest, Shard
from .reader import Reader, load_weights
from .saver import Saved, Saver
from .tensor_file import copy_checked, open_tensors, write_stream, write_tensors

__all__ = [
    "MANIFEST",
    "TOKENIZER",
    "Entry",
    "Manifest",
    "Reader",
    "Retention",
    "Saved",
    "Saver",
    "Shard",
    "candidates",
    "copy_checked",
    "find",
    "latest",
    "load_weights",
    "open_tensors",
    "step_of",
    "steps",
    "undo",
    "write_stream",
    "write_tensors",
]
