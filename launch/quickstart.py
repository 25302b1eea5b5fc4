"""The last part of the quickstart: is what came out right, and what does it know?

    python launch/quickstart.py RUN HUGGING_FACE_FOLDER

Exits with 1 where the validation loss did not get below the unigram entropy by 0.3 nat, or where transformers' logits
differ from the trainer's by more than 1e-4.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import farspan
from farspan.pretrain.config_file import load_config
from farspan.pretrain.data.store import TokenStore
from farspan.pretrain.metrics import read_metrics

MARGIN, TOLERANCE = 0.3, 1e-4
BLANKS = (
    "The state of the Union is{mask}.",
    "I ask the{mask} to pass this bill.",
    "We must work together for peace and{mask}.",
    "My fellow{mask}, thank you and God bless America.",
)


def main(run: Path, folder: Path) -> int:
    store = TokenStore(load_config(run / "config.yaml").data.folder, "validation")
    learned = check_loss(run, store)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    same = check_logits(run, model, tokenizer, store)
    for sentence in BLANKS:
        print(f"  {sentence.format(mask=' ___')}  {fill(sentence, model, tokenizer)}")
    return 0 if learned and same else 1


def check_loss(run: Path, store: TokenStore) -> bool:
    """The last validation loss against what guessing by frequency alone would give."""
    loss = [line["validation_loss"] for line in read_metrics(run / "metrics.jsonl") if "validation_loss" in line][-1]
    entropy = store.unigram_entropy()
    print(f"validation loss {loss:.4f} nat, unigram entropy {entropy:.4f} nat: {entropy - loss:.4f} below")
    return loss <= entropy - MARGIN


@torch.no_grad()
def check_logits(run: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, store: TokenStore) -> bool:
    """The exported model in transformers against the trainer's own, on validation text, padded rows too."""
    texts = [tokenizer.decode(store.document(i)[:length]) for i, length in enumerate((20, 12, 8, 16))]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=24)
    ours = farspan.load(run)(inputs["input_ids"], inputs["attention_mask"]).logits
    theirs = model(**inputs).logits
    assert ours is not None
    worst = (ours - theirs)[inputs["attention_mask"].bool()].abs().max().item()
    print(f"logits in transformers differ from the trainer's by at most {worst:.1e}")
    return worst <= TOLERANCE


@torch.no_grad()
def fill(sentence: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, guesses: int = 4) -> str:
    """The likeliest tokens in place of the blank, with their probabilities."""
    inputs = tokenizer(sentence.format(mask=tokenizer.mask_token), return_tensors="pt")
    blank = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
    best = model(**inputs).logits[0, blank].softmax(-1).topk(guesses)
    words = (tokenizer.decode([token]).strip() for token in best.indices.tolist())
    return ", ".join(f"{word} {p:.0%}" for word, p in zip(words, best.values.tolist(), strict=True))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
