"""``farspan`` whose steps take FARSPAN_TEST_STEP_SECONDS longer, so that something can happen in them."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from farspan.launch.cli import main


def slow_down(seconds: float) -> None:
    from farspan.pretrain.metrics import MetricsWriter

    write = MetricsWriter.train

    def wait_and_write(self: MetricsWriter, *args: Any) -> None:
        time.sleep(seconds)
        write(self, *args)

    MetricsWriter.train = wait_and_write  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        slow_down(float(os.environ.get("FARSPAN_TEST_STEP_SECONDS", "0")))
    sys.exit(main())
