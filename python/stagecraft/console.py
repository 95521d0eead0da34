"""How libraries behave in our processes: threads that yield, and no chatter that buries what the kit says."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def settle_libraries() -> None:
    """Call before importing torch. Progress bars stay on a terminal; errors always stay."""
    # Threads that wait: asleep at once, 60 steps of tiny take 8.0 s; spinning for ever 5.2 s, but minutes beside one
    # busy neighbour; spinning 2,000 turns first 4.8 s, and 12 s beside that neighbour (two cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not os.path.exists("/dev/nvidiactl"):
        # DeepSpeed otherwise warns at every import that it guessed.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        _no_weight_bars()
    # bitsandbytes says at every import that an optional package with faster CPU kernels is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # A smaller micro-batch after an out-of-memory stop is ours, and said in our words.
    logging.getLogger("transformers.trainer_utils").addFilter(
        lambda record: "do not match the ones in the `trainer_state.json`" not in record.getMessage()
    )
    # DeepSpeed calls collectives by their old names, once a step and rank.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated.*", category=FutureWarning)


def _no_weight_bars() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
