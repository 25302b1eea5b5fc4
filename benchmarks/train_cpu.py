"""Training speed on a CPU: Farspan's step against transformers' (its model, its own loss), side by side.

RoBERTa-PreLayerNorm base, length 128, vocabulary 50265, float32, the same microbatch, fused AdamW and clipping on both
sides, dropout off.  The two sides run in turn and the ratio is the median over the pairs, so that a machine whose
speed drifts does not decide.  Tokens are real ones: padding is not counted.

    python benchmarks/train_cpu.py [--pairs 12] [--out benchmarks/train_cpu]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks"]
warnings.simplefilter("ignore")
os.environ.setdefault("RANK", "0")
os.environ.setdefault("WORLD_SIZE", "1")
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
os.environ.setdefault("MASTER_PORT", "29517")

import torch  # noqa: E402

from farspan.benchmarks.about import about, bullets  # noqa: E402
from farspan.parallel.engine import Engine  # noqa: E402
from farspan.parallel.mesh import Mesh  # noqa: E402
from farspan.pretrain import run  # noqa: E402
from farspan.pretrain.config import Config  # noqa: E402
from farspan.pretrain.config_file import parse_config  # noqa: E402
from farspan.pretrain.data.prepare import prepare  # noqa: E402
from farspan.pretrain.losses import Counts, LossFunction  # noqa: E402
from farspan.pretrain.objectives import Objective  # noqa: E402
from farspan.pretrain.resume import Start  # noqa: E402
from farspan.pretrain.schedule import BatchSizes  # noqa: E402

LENGTH, VOCABULARY, ROWS, PROBABILITY, RATE, CLIP = 128, 50265, 4, 0.15, 1e-4, 1.0
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One line of the table.  Rates are real tokens a second, medians; the ratio is the median over pairs."""

    name: str
    ours: float
    theirs: float
    ratio: float
    lowest: float
    highest: float
    fill: float  # share of their positions that are real tokens


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    mesh = Mesh.create(1, 1, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        documents, sentences = _prepare(Path(folder))
        ours = FarspanSide(_config(documents, "packed"), mesh)
        theirs = TransformersSide()
        comparisons = [
            compare("full rows", ours, ours.batches(), theirs, packed_as_full(ours.objective), arguments.pairs),
            compare(
                "documents of 20 to 1035 words, packed against padded to 128",
                ours,
                ours.batches(),
                theirs,
                padded(documents, longest=True),
                arguments.pairs,
            ),
        ]
        lines = FarspanSide(_config(sentences, "packed"), mesh, share=ours)
        for name, longest in (("padded to 128", True), ("padded to the longest of the batch", False)):
            comparisons.append(
                compare(
                    f"one sentence a row, packed against {name}",
                    lines,
                    lines.batches(),
                    theirs,
                    padded(sentences, longest=longest),
                    arguments.pairs,
                )
            )
        loader = loader_rate(ours.objective)
    report(comparisons, loader, arguments.out)
    mesh.destroy()


class FarspanSide:
    """Farspan's own training step."""

    def __init__(self, config: Config, mesh: Mesh, share: FarspanSide | None = None) -> None:
        self.config, vocabulary = run.with_tokenizer(config)
        self.mesh = mesh
        self.objective = run.objective_of(self.config, vocabulary, "train")
        self.loss = LossFunction(self.config.heads)
        self.engine: Engine = (
            share.engine if share else run.build_engine(self.config, mesh, Start(0, None, False), self.loss)
        )

    def batches(self) -> Iterator[object]:
        with run.loader_of(self.objective, self.mesh, BatchSizes(ROWS), prefetch=4) as loader:
            yield from loader.steps()

    def step(self, batch: object) -> int:
        counts = Counts.of(batch, self.mesh)  # type: ignore[arg-type]
        self.engine.train_batch(
            *run.microbatches_of(self.config, self.mesh, batch, ROWS),  # type: ignore[arg-type]
            run.stage_runner(self.mesh, dropout=(0, 0)),
            lambda outputs, microbatch: self.loss(outputs, microbatch, counts),
            learning_rate=RATE,
        )
        return int(counts.tokens)


class TransformersSide:
    """transformers' model with its own loss (all logits, then the mean over the labels), and a plain loop."""

    def __init__(self) -> None:
        from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormForMaskedLM

        config = RobertaPreLayerNormConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=514,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.model = RobertaPreLayerNormForMaskedLM(config).train()
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def step(self, batch: dict[str, torch.Tensor]) -> int:
        self.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return int(batch["attention_mask"].sum())


def compare(
    name: str,
    ours: FarspanSide,
    our_batches: Iterator[object],
    theirs: TransformersSide,
    their_batches: Iterator[dict[str, torch.Tensor]],
    pairs: int,
) -> Comparison:
    """Two warm-up steps each, then ``pairs`` pairs of steps in turn, the order changing from pair to pair."""
    fills = []

    def ours_once() -> float:
        return _rate(lambda: ours.step(next(our_batches)))

    def theirs_once() -> float:
        batch = next(their_batches)
        fills.append(batch["attention_mask"].float().mean().item())
        return _rate(lambda: theirs.step(batch))

    for _ in range(2):
        ours_once(), theirs_once()
    rates: list[tuple[float, float]] = []
    for pair in range(pairs):
        if pair % 2:
            second, first = theirs_once(), ours_once()
        else:
            first, second = ours_once(), theirs_once()
        rates.append((first, second))
        print(f"  {name}: {first:.0f} against {second:.0f} tokens/s", file=sys.stderr, flush=True)
    our_batches.close()  # type: ignore[attr-defined]
    ratios = [a / b for a, b in rates]
    return Comparison(
        name,
        statistics.median(a for a, _ in rates),
        statistics.median(b for _, b in rates),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        statistics.mean(fills),
    )


def _rate(step: Callable[[], int]) -> float:
    began = time.perf_counter()
    tokens = step()
    return tokens / (time.perf_counter() - began)


def packed_as_full(objective: Objective) -> Iterator[dict[str, torch.Tensor]]:
    """The rows that Farspan trains on, for transformers: all positions real, labels −100 where none is predicted."""
    start = 0
    while True:
        batch = objective.batch(np.arange(start, start + ROWS))
        start += ROWS
        labels = torch.full_like(batch.input_ids, -100)
        assert batch.label_positions is not None
        labels.scatter_(1, batch.label_positions, batch.labels)
        yield {"input_ids": batch.input_ids, "attention_mask": torch.ones_like(batch.input_ids), "labels": labels}


def padded(folder: Path, *, longest: bool) -> Iterator[dict[str, torch.Tensor]]:
    """One document a row, cut at 128 tokens, as transformers' own examples make them: its tokenizer and its masking
    collator, padded to 128 (``longest``) or to the longest row of the batch."""
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    from farspan.pretrain.data.store import TokenStore

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    store = TokenStore(folder, "train")
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=PROBABILITY)
    order = np.random.default_rng(0).permutation(store.documents)
    at = 0
    while True:
        rows = [store.document(int(order[(at + i) % len(order)]))[: LENGTH - 2].tolist() for i in range(ROWS)]
        at += ROWS
        framed = [[tokenizer.cls_token_id, *row, tokenizer.sep_token_id] for row in rows]
        features = tokenizer.pad(
            {"input_ids": framed}, padding="max_length" if longest else True, max_length=LENGTH if longest else None
        )
        examples = [
            {"input_ids": i, "attention_mask": m}
            for i, m in zip(features["input_ids"], features["attention_mask"], strict=True)
        ]
        yield dict(collate(examples))


def loader_rate(objective: Objective, seconds: float = 5.0) -> float:
    """Tokens a second that the data loader alone makes, in one thread, a global batch of 32 rows at a time."""
    objective.batch(np.arange(32))
    began, rows = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        objective.batch(np.arange(rows, rows + 32))
        rows += 32
    return rows * LENGTH / (time.perf_counter() - began)


def _prepare(folder: Path) -> tuple[Path, Path]:
    """The quickstart's text as it is, and cut into one sentence a document; one tokenizer for both."""
    texts = sorted((ROOT / "launch" / "text").glob("*.txt"))
    documents, sentences, lines = folder / "documents", folder / "sentences", folder / "sentences.txt"
    prepare([str(path) for path in texts], documents, vocab_size=8192, validation_fraction=0.01, progress=False)
    with lines.open("w") as file:
        for path in texts:
            for sentence in SENTENCE_END.split(path.read_text().replace("\n", " ")):
                file.write(sentence.strip() + "\n\n")
    prepare([str(lines)], sentences, tokenizer=documents / "tokenizer", validation_fraction=0.01, progress=False)
    return documents, sentences


def _config(folder: Path, rows: str) -> Config:
    return parse_config(
        {
            "run_dir": str(folder / "run"),
            "model": {
                "model_type": "roberta-prelayernorm",
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 514,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
            "data": {"folder": str(folder), "sequence_length": LENGTH, "rows": rows},
            "objective": {"probability": PROBABILITY},
            "training": {"global_batch_size": ROWS, "micro_batch_size": ROWS, "gradient_clipping": CLIP},
        },
        "benchmark",
    )


def report(comparisons: list[Comparison], loader: float, out: str | None) -> None:
    """The table, on the console and as a page with its raw JSON."""
    needed = max(c.ours for c in comparisons)
    table = ["| rows | Farspan, tokens/s | transformers, tokens/s | ratio (lowest, highest) | their fill |"]
    table.append("|---|---|---|---|---|")
    for c in comparisons:
        spread = f"**{c.ratio:.2f}** ({c.lowest:.2f}, {c.highest:.2f})"
        table.append(f"| {c.name} | {c.ours:.0f} | {c.theirs:.0f} | {spread} | {c.fill:.0%} |")
    table.append("")
    table.append(
        f"Data loader alone, one thread: {loader:,.0f} tokens/s, {loader / needed:,.0f} times the fastest step."
    )
    print("\n".join(table))
    if out is None:
        return
    where = about("torch", "transformers")
    page = [
        "# Training on a CPU: RoBERTa-PreLayerNorm base against transformers",
        "",
        f"Length {LENGTH}, vocabulary {VOCABULARY}, microbatch {ROWS} rows, float32, fused AdamW and clipping on both",
        "sides, dropout off. Steps in turn, medians; tokens are real ones, padding is not counted.",
        "`python benchmarks/train_cpu.py`",
        "",
        *bullets(where),
        "",
        *table,
        "",
        "*Full rows*: the same tokens on both sides. *Padded*: one document or sentence of the quickstart's text a",
        "row, cut at 128 tokens, made by transformers' own padding and masking collator; Farspan packs the same text",
        "into full rows, each piece attending within itself.",
        "",
    ]
    Path(f"{out}.md").write_text("\n".join(page))
    raw = {
        "about": where,
        "loader_tokens_per_second": loader,
        "comparisons": [dataclasses.asdict(c) for c in comparisons],
    }
    Path(f"{out}.json").write_text(json.dumps(raw, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12, help="pairs of steps a comparison (default: 12)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--out", metavar="PATH", help="write PATH.md and PATH.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
