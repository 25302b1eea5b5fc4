"""Hands out the variables of a TensorFlow checkpoint.  tensorflow.py starts it, as a process of its own, with whichever
interpreter has TensorFlow; it needs nothing else.

    python tensorflow_reader.py PREFIX

Writes a JSON line when TensorFlow is there and one that describes the variables; then for each line that it reads, a
variable's name as JSON, a JSON line with the bytes that follow, and these.  A line {"error": …} takes the place of any
of them.  Ends when its input does.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import IO, Any


def main() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no reply
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]  # nor is the file beside TensorFlow
    try:
        import tensorflow
    except Exception as error:
        return say(replies, {"error": str(error), "missing": isinstance(error, ModuleNotFoundError)})
    say(replies, {"version": tensorflow.__version__})
    try:
        reader = tensorflow.compat.v1.train.NewCheckpointReader(sys.argv[1])
        dtypes = reader.get_variable_to_dtype_map()
        shapes = reader.get_variable_to_shape_map()
    except Exception as error:
        return say(replies, {"error": str(error)})
    say(replies, {"variables": {name: [dtypes[name].name, shape] for name, shape in shapes.items()}})
    for line in sys.stdin.buffer:
        try:
            value = reader.get_tensor(json.loads(line)).reshape(-1).view("uint8")
        except Exception as error:
            say(replies, {"error": str(error)})
            continue
        say(replies, {"bytes": value.nbytes})
        replies.write(memoryview(value))
        replies.flush()
    return None


def say(replies: IO[bytes], value: dict[str, Any]) -> None:
    replies.write(json.dumps(value).encode() + b"\n")
    replies.flush()


if __name__ == "__main__":
    main()
