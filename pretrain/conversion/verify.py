"""Does an export compute what the trainer's model does?  It is loaded by transformers in a process of its own, and the
outputs of all heads are compared, on real text, in rows of several lengths with padding.

Both compute in float64 with the same weights: those of the checkpoint, rounded as the export's are.  So one tolerance
serves every dtype, and it need not leave room for the rounding of bfloat16, in which most mistakes would hide.  What
differs is what a library computes in float32 all the same, tables of rotary positions for one: a few 1e-7 of the
largest value.  ``TOLERANCE`` leaves a factor of ten and more for that.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from .. import checkpoint as ckpt
from ..data.store import TokenStore
from ..data.tokenizer import TOKENIZER_FILE
from ..files import read_mapping
from ..load import load
from ..models.config import ModelConfig
from .imported import logical_shapes
from .model import model_of
from .model_card import auto_class
from .to_huggingface import DTYPES

TOLERANCE = 1e-5  # of the largest value of an output
LONGEST = 512  # tokens of a row
_ENCODER = 16  # hidden states, for models that attend to an encoder
_CHILD = Path(__file__).with_name("load_export.py")
# Where a checkpoint's data is not there and no text is given.
_TEXT = """\
A language model is trained on text, and text is what it should be tried on: words that follow one another as words do,
with names such as Marie Curie or Lake Geneva, numbers such as 1,024 and 3.14159, and punctuation - brackets (like
these), quotes "like those", a question? An exclamation! It was late in the evening when the rain stopped, and the two
travellers, who had not spoken since the last village, looked at the mountains and began to laugh.
"""


@dataclasses.dataclass(frozen=True)
class Verified:
    """``difference``: the largest of any output, relative to its largest value; ``absolute``: as it is."""

    difference: float
    absolute: float
    outputs: tuple[str, ...]
    tokens: int
    text: str
    transformers: str

    def __str__(self) -> str:
        return (
            f"{' and '.join(self.outputs)} in transformers {self.transformers} differ from the trainer's by at most "
            f"{self.absolute:.1e}, {self.difference:.1e} of the largest ({self.tokens} tokens of {self.text})"
        )


class Verification:
    """A ``check`` for ``to_huggingface``: called with the export, it raises ValueError where that computes something
    else than the checkpoint, or cannot be loaded; afterwards ``result`` says how close it is.

    ``dtype``: what the export was asked to be rounded to.  ``text``: a file to take text from; by default the run's
    validation data, where that is not there a few sentences of ours, without a tokenizer ids from all over the
    vocabulary.  ``python``: an interpreter that has transformers; by default this one.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        dtype: str | None = None,
        *,
        text: str | Path | None = None,
        python: str | Path | None = None,
    ) -> None:
        self.folder = ckpt.find(Path(checkpoint))
        self.dtype = DTYPES.get(dtype or "")
        self.python = str(python or sys.executable)
        self.manifest = ckpt.Manifest.read(self.folder)
        self.cls, self.config, self.heads = model_of(self.manifest, self.folder)
        self.ids, self.text = self._token_ids(None if text is None else Path(text))
        self.result: Verified | None = None

    def __call__(self, export: Path) -> None:
        types = "embeddings.types.weight" in logical_shapes(self.cls, self.config, self.heads)
        batches = make_batches(self.ids, self.config, types=types)
        theirs, version = self._theirs(export, batches)
        ours = self._ours(batches)
        largest, absolute = 0.0, 0.0
        for key, value in ours.items():
            if key not in theirs or theirs[key].shape != value.shape:
                found = "nothing" if key not in theirs else f"a shape of {tuple(theirs[key].shape)}"
                raise ValueError(f"the export gives {found} where the trainer's model gives {key}: it was not kept")
            difference = (theirs[key] - value).abs().max().item()
            scale = value.abs().max().item()
            relative = difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)
            if not relative <= TOLERANCE:
                note = self.cls.stock_note(self.config)
                raise ValueError(
                    f"the export is not what was trained: its {key.split('.')[1]} in transformers {version} differ by "
                    f"{relative:.1e} of the largest, at most {TOLERANCE:.0e} is rounding: it was not kept"
                    + (f" (known of stock classes: {note})" if note else "")
                )
            largest, absolute = max(largest, relative), max(absolute, difference)
        outputs = tuple(dict.fromkeys(key.split(".")[1] for key in ours))
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        self.result = Verified(largest, absolute, outputs, tokens, self.text, version)

    @torch.no_grad()
    def _ours(self, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The outputs of the trainer's model, of real tokens alone."""
        model = load(self.folder)
        for parameter in model.parameters():
            if self.dtype is not None:
                parameter.copy_(parameter.to(self.dtype))
        model.double()
        found: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            output = model(**{name: x.double() if x.is_floating_point() else x for name, x in batch.items()})
            real = batch["attention_mask"] == 1
            if output.logits is not None:
                found[f"{number}.logits"] = output.logits[real]
            if output.seq_relationship_logits is not None:
                found[f"{number}.seq_relationship_logits"] = output.seq_relationship_logits
            if not self.heads:
                found[f"{number}.last_hidden_state"] = output.last_hidden_state[real]
        return found

    def _theirs(self, export: Path, batches: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], str]:
        """What transformers gives of the same, and its version."""
        trusted = "auto_map" in read_mapping(export / "config.json", "an export")
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            # transformers 4 makes a module of the folder's name, which must not begin with a dot.
            (scratch / "export").symlink_to(export.resolve())
            inputs = {f"{number}.{key}": value for number, batch in enumerate(batches) for key, value in batch.items()}
            save_file(inputs, scratch / "inputs")
            arguments = [
                scratch / "export",
                auto_class(self.config, self.heads),
                scratch / "inputs",
                scratch / "outputs",
            ]
            command = [self.python, "-P", _CHILD, *arguments, "trusted" if trusted else "untrusted"]
            said = self._run(list(map(str, command)), scratch)
            outputs = load_file(scratch / "outputs")
        if "nsp" in self.heads and "lm" not in self.heads:
            outputs = {key.replace(".logits", ".seq_relationship_logits"): value for key, value in outputs.items()}
        real = [batch["attention_mask"] == 1 for batch in batches]
        found = {
            key: value if "seq_relationship" in key else value[real[int(key.split(".")[0])]]
            for key, value in outputs.items()
        }
        return found, str(said["transformers"])

    def _run(self, command: Sequence[str], scratch: Path) -> dict[str, Any]:
        """A clean process: no Farspan, no network, no GPU, nothing written but here."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FARSPAN"))}
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment = kept | offline | {"HF_MODULES_CACHE": str(scratch / "modules"), "CUDA_VISIBLE_DEVICES": ""}
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch, check=False)
        except OSError as error:
            raise ValueError(
                f"{self.python} cannot be started ({error.strerror}): give --python one that can"
            ) from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1].strip()
            if reason.endswith("'transformers'"):
                raise ValueError(
                    f"{self.python} has no transformers to verify the export with: install it, or give --python an "
                    "interpreter that has it"
                )
            raise ValueError(f"transformers cannot load or run the export, which was not kept: {reason}")
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    def _token_ids(self, text: Path | None) -> tuple[Tensor, str]:
        """Ids to make rows of, and where they come from, in words."""
        tokenizer, size = self.folder / "tokenizer" / TOKENIZER_FILE, self.config.vocab_size
        if text is None and (store := self._validation_data()) is not None:
            documents = 0
            ids: list[int] = []
            while documents < store.documents and len(ids) < 4 * LONGEST:
                ids += store.document(documents).tolist()
                documents += 1
            return _checked(ids, size, str(store.folder)), "validation data"
        if tokenizer.is_file():
            try:
                content = _TEXT if text is None else text.read_text(encoding="utf-8")[: 64 * LONGEST]
            except UnicodeDecodeError:
                raise ValueError(f"{text} is no text in UTF-8: give another --text") from None
            ids = Tokenizer.from_file(str(tokenizer)).encode(content).ids
            return _checked(ids, size, str(text or tokenizer)), "text" if text is None else str(text)
        if text is not None:
            raise ValueError(f"{self.folder} has no {TOKENIZER_FILE} to read --text with: leave it out")
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, size, (4 * LONGEST,), generator=generator), "ids from all over the vocabulary"

    def _validation_data(self) -> TokenStore | None:
        folder = self.manifest.config.get("data", {}).get("folder")
        try:
            return None if folder is None else TokenStore(folder, "validation")
        except (ValueError, OSError):
            return None


def make_batches(ids: Tensor, config: ModelConfig, *, types: bool) -> list[dict[str, Tensor]]:
    """A row as long as the model takes (at most ``LONGEST``) by itself, and three shorter ones, padded on the right.

    ``types``: whether the model has token types.
    """
    width = min(config.longest_sequence or LONGEST, LONGEST)
    if config.attention_chunk is not None:  # whole chunks, as stock classes need them
        width = max(width // config.attention_chunk, 1) * config.attention_chunk
    lengths = [width, max(width * 3 // 4, 1), max(width // 3, 1), min(5, width)]
    padding = config.pad_token_id or 0
    ordinary = ids[ids != config.pad_token_id]
    stream = ordinary.repeat(-(-sum(lengths) // len(ordinary)))
    rows = torch.full((4, width), padding)
    mask = torch.zeros(4, width, dtype=torch.int64)
    for row, (length, values) in enumerate(zip(lengths, stream[: sum(lengths)].split(lengths), strict=True)):
        rows[row, :length], mask[row, :length] = values, 1
    batches = [{"input_ids": rows[some], "attention_mask": mask[some]} for some in (slice(0, 1), slice(1, 4))]
    generator = torch.Generator().manual_seed(2)
    for batch in batches:
        if types:
            count = len(batch["input_ids"])
            second = torch.arange(width) >= width // 4
            batch["token_type_ids"] = (second.long() * (config.type_vocab_size > 1)).repeat(count, 1)
        if config.needs_encoder:
            count = len(batch["input_ids"])
            batch["encoder_hidden_states"] = torch.randn(count, _ENCODER, config.hidden_size, generator=generator)
            batch["encoder_attention_mask"] = (torch.arange(_ENCODER) < _ENCODER - 3).long().repeat(count, 1)
    return batches


def _checked(ids: Sequence[int], size: int, where: str) -> Tensor:
    """ValueError where there are none, or some that the model does not have."""
    if not ids or max(ids) >= size:
        problem = "no tokens" if not ids else f"token {max(ids)}, the model has {size}"
        raise ValueError(f"{where} has {problem}: give another --text")
    return torch.tensor(ids)
