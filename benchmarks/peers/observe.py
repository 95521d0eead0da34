"""Runs a training script under watch: what went through the model, for how long, in how much memory.

    python observe.py REPORT.json SCRIPT.py [ARGUMENT ...]
    python observe.py REPORT.json -m MODULE [ARGUMENT ...]

The same ruler for every contender: all of them train with transformers' Trainer or a subclass, so its train() and
training_step() are wrapped as soon as the script imports it. Nothing heavy is imported before the script does so
itself, because some settings (threads that wait, for one) count only until torch is loaded. Counting costs two sums
over a batch of integers a step. Needs nothing but the script's own environment.
"""

import importlib.abc
import importlib.util
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

WATCHED = "transformers.trainer"


class Observer(importlib.abc.MetaPathFinder):
    """Waits for transformers' Trainer, counts its batches, writes the report when its train() returns."""

    def __init__(self, report: Path) -> None:
        self.report = report
        self.first_forward: float | None = None
        self.through = 0  # tokens that went through the model, padding included
        self.real: Any = (
            0  # those that are not the padding token; tensors are added up without a wait for the device
        )
        self.supervised: Any = 0

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """The module as it is, with the Trainer watched once it is loaded."""
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_watch(module: Any) -> None:
            load(module)
            self.watch(module.Trainer)

        spec.loader.exec_module = load_and_watch
        return spec

    def watch(self, trainer_class: Any) -> None:
        """Put ourselves around train() and training_step(), and wait for the first forward pass of a model."""
        from torch.nn.modules import module

        def note_first(each: Any, inputs: Any) -> None:
            if hasattr(each, "config"):  # a model, no layer
                self.first_forward = time.perf_counter()
                hook.remove()

        hook = module.register_module_forward_pre_hook(note_first)
        train, training_step = trainer_class.train, trainer_class.training_step

        def watched_step(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.count(inputs, trainer.processing_class.pad_token_id)
            return training_step(trainer, model, inputs, *args, **kwargs)

        def watched_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            result = train(trainer, *args, **kwargs)
            self.write(trainer, result.metrics["train_runtime"])
            return result

        trainer_class.train, trainer_class.training_step = watched_train, watched_step

    def count(self, inputs: Any, pad: int) -> None:
        """Add a micro-batch. Padding is told by its token, which no row has: masks are of many forms."""
        for name, ids in inputs.items():
            if name.endswith("input_ids"):
                self.through += ids.numel()
                self.real += (ids != pad).sum()
        if "labels" in inputs:
            self.supervised += (inputs["labels"] != -100).sum()

    def write(self, trainer: Any, loop: float) -> None:
        """The report: `loop` is the training loop; `whole` begins with the first forward pass, a reference's too."""
        import torch

        whole = time.perf_counter() - (self.first_forward or time.perf_counter())
        # Means over as many steps each; some log the very first step by itself, too.
        losses = [
            entry["loss"]
            for entry in trainer.state.log_history
            if "loss" in entry and entry["step"] % trainer.args.logging_steps == 0
        ]
        status = Path("/proc/self/status").read_text()
        cuda = torch.cuda.is_available() and not trainer.args.use_cpu
        found = {
            "steps": trainer.state.global_step,
            "loop": loop,
            "whole": whole,
            "through": self.through,
            "real": int(self.real),
            "supervised": int(self.supervised),
            "first_loss": float(losses[0]) if losses else None,
            "last_loss": sum(map(float, losses[-3:])) / len(losses[-3:]) if losses else None,
            "peak_mb": int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6,
            "gpu_mb": torch.cuda.max_memory_allocated() / 1e6 if cuda else None,
        }
        self.report.write_text(json.dumps(found))


def main() -> None:
    report, script, *arguments = sys.argv[1:]
    sys.meta_path.insert(0, Observer(Path(report).resolve()))
    if script == "-m":
        script, *arguments = arguments
        sys.argv = [script, *arguments]
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [script, *arguments]
        sys.path[0] = str(Path(script).resolve().parent)
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
