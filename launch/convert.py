"""``farspan convert``: checkpoints to Hugging Face folders, and models from elsewhere to checkpoints.

What is slow to import is imported inside the functions that need it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pretrain.conversion.imported import Imported

_RESIZE = """\
Take a model over with another vocabulary or longer positions, for continued pretraining:

  farspan convert resize runs/RUN OUT --positions 2048
  farspan train CONFIG checkpoint.initialize_from=OUT model.max_position_embeddings=2048
"""


def add_arguments(convert: argparse.ArgumentParser) -> None:
    """The directions of ``farspan convert``."""
    raw = argparse.RawDescriptionHelpFormatter
    directions = convert.add_subparsers(title="directions", metavar="DIRECTION", required=True)

    def direction(name: str, run: Callable[[argparse.Namespace], None], text: str, **options: Any) -> Any:
        parser = directions.add_parser(name, help=text, formatter_class=raw, **options)
        parser.set_defaults(run=run, parser=parser)
        return parser

    to_hf = direction("to-hf", _to_hf, "checkpoint -> Hugging Face folder")
    to_hf.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or a run folder (its latest)")
    to_hf.add_argument("out", metavar="OUT", help="new folder for config.json, weights and tokenizer")
    to_hf.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as saved)")
    to_hf.add_argument(
        "--stock",
        action="store_true",
        help="for transformers' own classes: no modelling files; refused where these would compute something else",
    )
    to_hf.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file; larger models come in several"
    )
    verify = to_hf.add_argument_group("verification")
    verify.add_argument(
        "--verify",
        action="store_true",
        help="load the export in transformers and compare all outputs with the trainer's; one that differs is not kept",
    )
    verify.add_argument(
        "--text", type=Path, metavar="FILE", help="text to compare them on (default: the run's validation data)"
    )
    verify.add_argument("--python", metavar="PATH", help="interpreter that has transformers (default: this one)")

    from_hf = direction("from-hf", _from_hf, "Hugging Face folder -> checkpoint")
    from_hf.add_argument("source", metavar="FOLDER", help="folder with config.json and safetensors")

    megatron = direction("from-megatron", _from_megatron, "Megatron-LM BERT checkpoint -> checkpoint (megatron-bert)")
    megatron.add_argument(
        "source", metavar="PATH", help="model_optim_rng.pt, the folder above its parts, or a zip of released weights"
    )
    megatron.add_argument(
        "--original-tokenizer",
        type=Path,
        metavar="DIR",
        help="folder with the vocab.txt or tokenizer.json that it was trained with: goes along, and says how many rows "
        "of the vocabulary are padding",
    )
    megatron.add_argument(
        "--original-vocab-size", type=int, metavar="N", help="the same, without its folder: tokens, padding not counted"
    )
    megatron.add_argument("--num-attention-heads", type=int, metavar="N", help="where the checkpoint does not say it")
    megatron.add_argument("--hidden-act", metavar="NAME", help="where the checkpoint does not say it")

    tensorflow = direction("from-tensorflow", _from_tensorflow, "TensorFlow BERT checkpoint -> checkpoint")
    tensorflow.add_argument(
        "source", metavar="PATH", help="folder with bert_config.json, or a checkpoint's prefix in it"
    )
    tensorflow.add_argument(
        "--warm-start",
        action="store_true",
        help="take an original (post-norm) BERT too, as a start for further pretraining: its logits change",
    )
    tensorflow.add_argument("--config", type=Path, metavar="FILE", help="instead of bert_config.json beside it")
    tensorflow.add_argument("--hidden-act", metavar="NAME", help="instead of the one in bert_config.json")
    tensorflow.add_argument(
        "--lower-case",
        action=argparse.BooleanOptionalAction,
        help="whether its tokenizer makes text lower case (default: where its vocabulary has no capital)",
    )
    tensorflow.add_argument(
        "--python", type=Path, metavar="PATH", help="interpreter that has tensorflow (default: this one)"
    )

    resize = direction(
        "resize", _resize, "checkpoint -> checkpoint of another vocabulary or length", description=_RESIZE
    )
    resize.add_argument("source", metavar="CHECKPOINT", help="checkpoint folder, or a run folder (its latest)")

    for parser in (from_hf, megatron, tensorflow, resize):
        parser.add_argument("out", metavar="OUT", help="new checkpoint folder")
        _add_resize_arguments(parser)


def _add_resize_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("other sizes, for continued pretraining")
    group.add_argument(
        "--vocab-size", type=int, metavar="N", help="rows of the vocabulary; new ones start as in a new run"
    )
    group.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="another tokenizer: tokens of the same text keep their rows"
    )
    group.add_argument("--positions", type=int, metavar="N", help="the longest row in tokens")
    group.add_argument(
        "--position-method",
        default="linear",
        metavar="linear|tile",
        help="how a table of positions grows: interpolated (default), or repeated",
    )
    group.add_argument("--seed", type=int, default=1234, metavar="N", help="of new rows (default: 1234)")


def _to_hf(args: argparse.Namespace) -> None:
    from ..parallel.memory import keep_freed_memory
    from ..pretrain.conversion.to_huggingface import to_huggingface

    keep_freed_memory()  # fresh pages for every tensor took as long as writing it
    verification = None
    if args.verify:
        from ..pretrain.conversion.verify import Verification

        verification = Verification(args.checkpoint, args.dtype, text=args.text, python=args.python)
    elif args.text is not None or args.python is not None:
        raise ValueError("--text and --python are of a verification: give --verify with them")
    note = to_huggingface(
        args.checkpoint,
        args.out,
        args.dtype,
        stock=args.stock,
        max_shard_size=args.max_shard_size,
        check=verification,
    )
    if verification is not None:
        print(f"verified: {verification.result}")
    print(f"wrote {args.out}")
    _say(note)


def _from_hf(args: argparse.Namespace) -> None:
    from ..pretrain.conversion.from_huggingface import read_model

    _import(read_model(Path(args.source)), args)


def _from_megatron(args: argparse.Namespace) -> None:
    from ..pretrain.conversion.megatron_lm import read_model

    model = read_model(
        Path(args.source),
        vocab_size=args.original_vocab_size,
        tokenizer=args.original_tokenizer,
        num_attention_heads=args.num_attention_heads,
        hidden_act=args.hidden_act,
    )
    _import(model, args)


def _from_tensorflow(args: argparse.Namespace) -> None:
    from ..pretrain.conversion.tensorflow import read_model

    model = read_model(
        Path(args.source),
        warm_start=args.warm_start,
        config=args.config,
        hidden_act=args.hidden_act,
        lower_case=args.lower_case,
        python=args.python,
    )
    _import(model, args)


def _resize(args: argparse.Namespace) -> None:
    from ..pretrain.conversion.resize import from_checkpoint

    if args.vocab_size is None and args.tokenizer is None and args.positions is None:
        raise ValueError("nothing is to be resized: give --vocab-size, --tokenizer or --positions")
    _import(from_checkpoint(Path(args.source)), args)


def _import(model: Imported, args: argparse.Namespace) -> None:
    """Write a model from elsewhere as a checkpoint, in the sizes that were asked for."""
    from ..pretrain.conversion.imported import write_imported
    from ..pretrain.conversion.resize import resized

    if args.vocab_size is not None or args.tokenizer is not None or args.positions is not None:
        model = resized(
            model,
            vocab_size=args.vocab_size,
            tokenizer=args.tokenizer,
            positions=args.positions,
            method=args.position_method,
            seed=args.seed,
        )
    write_imported(model, Path(args.out))
    print(f"wrote {args.out}")
    _say(model.note)


def _say(note: str | None) -> None:
    if note:
        print(f"farspan: note: {note}", file=sys.stderr, flush=True)
