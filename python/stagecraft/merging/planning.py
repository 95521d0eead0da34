"""Base and adapters -> the plan: names found, shapes compared, ties settled, every adapter tensor used exactly once."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from stagecraft.errors import UserError, first_faults
from stagecraft.merging.adapter import EMBEDDINGS, HEADS, Adapter
from stagecraft.merging.plan import Base, Output, Plan
from stagecraft.merging.tensors import ITEM_SIZE, SAFE_NAME, SINGLE, TORCH_NAME, Reader, Tensor, same_content

# What a checkpoint's names may have before them or lack, compared with those of the model that the adapter saw.
_WRAPPERS = {"model", "transformer", "language_model", "base_model", "backbone"}


def make_plan(base: Base, adapters: list[Adapter], weights: list[float], dtype: str) -> Plan:
    """What the complete model consists of. `dtype`: torch's name, or auto. Raises UserError with all faults."""
    return _Planner(base, adapters, weights, dtype).plan()


class _Planner:
    """One planning: outputs by name, what was used of the adapters, and the faults found on the way."""

    def __init__(self, base: Base, adapters: list[Adapter], weights: list[float], dtype: str) -> None:
        self.base, self.adapters, self.weights = base, adapters, weights
        self.faults: list[str] = []
        self.misfits: dict[Path, list[str]] = {}  # adapter -> modules that the base does not have so
        self.used: Counter[tuple[Path, str]] = Counter()
        sizes: Counter[str] = Counter()
        for tensor in base.tensors.values():
            sizes[tensor.dtype] += tensor.size if tensor.dtype in TORCH_NAME else 0
        self.main_dtype = SAFE_NAME.get(dtype) or max(sizes, key=lambda code: sizes[code])
        self.cast = dtype != "auto"
        self.outputs = {
            name: Output(name, self._dtype_of(tensor), tensor.shape, tensor)
            for name, tensor in base.tensors.items()
        }
        self.embedding, self.head = self._find(EMBEDDINGS), self._find(HEADS)
        self.reward = any(adapter.reward for adapter in adapters)
        self.tied = not self.reward and base.tied(self.embedding, self.head)
        self.head_name = self.head or "lm_head.weight"
        self.untied = False

    def plan(self) -> Plan:
        """Take in every adapter, then settle ties and what is left over."""
        if len(self.adapters) > 1 or self.weights != [1.0]:
            self._check_weighable()
        vocabulary = self.outputs[self.embedding].shape[0] if self.embedding else None
        if self.tied:  # the head as an output of its own, until _settle_ties decides whether it stays one
            embedding = self.outputs[self.embedding]
            self.outputs[self.head_name] = replace(embedding, name=self.head_name, loras=[], added=[])
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            self._take_in(adapter, weight)
        for adapter in self.adapters:
            found = self.misfits.get(adapter.folder, [])
            if found:
                more = f" ({len(found)} modules do not fit)" if len(found) > 1 else ""
                self._fault(adapter, f"{found[0]}{more}")
        if not self.faults:
            self._settle_ties()
            self._check_vocabulary()
            self._check_all_used()
        if self.faults:
            raise UserError(*first_faults(self.faults, len(self.faults)))
        dropped = [self.head] if self.reward and self.head in self.outputs else []
        for name in dropped:
            del self.outputs[name]
        now = self.outputs[self.embedding].shape[0] if self.embedding else None
        scores = [o for o in self.outputs.values() if o.name not in self.base.tensors and self.reward]
        return Plan(
            base=self.base,
            adapters=self.adapters,
            weights=self.weights,
            files=self._files(),
            dtype=TORCH_NAME[self.main_dtype],
            head_rows=scores[0].shape[0] if scores else None,
            vocabulary=now if now != vocabulary else None,
            untied=self.untied,
            dropped=dropped,
        )

    def _dtype_of(self, tensor: Tensor) -> str:
        return self.main_dtype if self.cast and tensor.dtype in TORCH_NAME else tensor.dtype

    def _find(self, leaves: set[str]) -> str | None:
        """The base's one tensor whose module is called like one of `leaves`."""
        found = [name for name in self.base.tensors if len(p := name.split(".")) > 1 and p[-2] in leaves]
        found = [name for name in found if name.endswith(".weight")]
        return found[0] if len(found) == 1 else None

    def _fault(self, adapter: Adapter, text: str) -> None:
        self.faults.append(
            f"--lora_model {adapter.folder}: does not fit --base_model {self.base.folder}: {text}"
        )

    def _misfit(self, adapter: Adapter, text: str) -> None:
        self.misfits.setdefault(adapter.folder, []).append(text)

    def _check_weighable(self) -> None:
        for adapter in self.adapters:
            whole = [*adapter.whole, *(m for m, lora in adapter.loras.items() if lora.magnitude)]
            if whole:
                self.faults.append(
                    f"--lora_model {adapter.folder}: replaces {whole[0]} (modules_to_save, bias or DoRA), which can't be "
                    "weighed against another value; only plain LoRA can be merged with --weights or with others"
                )

    def _name_in_base(self, name: str) -> str | None:
        """The base's spelling of an adapter's parameter name, if there is exactly one."""
        if name in self.outputs:
            return name
        parts = name.split(".")
        shorter = [".".join(parts[k:]) for k in (1, 2) if set(parts[:k]) <= _WRAPPERS]
        longer = [
            n
            for n in self.outputs
            if n.endswith(f".{name}") and set(n[: -len(name) - 1].split(".")) <= _WRAPPERS
        ]
        found = [n for n in shorter if n in self.outputs] or longer
        return found[0] if len(found) == 1 else None

    def _take_in(self, adapter: Adapter, weight: float) -> None:
        for name, tensor in adapter.embeddings.items():
            self._set_embedding(adapter, name, tensor)
        for name, tensor in adapter.whole.items():
            self._replace(adapter, name, tensor)
        turned_kinds = self._orientations(adapter)
        for module, lora in adapter.loras.items():
            name = self._name_in_base(f"{module}.weight")
            if name is None:
                self._misfit(adapter, f"the base has no {module}.weight")
                continue
            output = self.outputs[name]
            wanted = (lora.b.shape[0], lora.a.shape[1])
            turned = lora.transposed
            if turned is None and wanted[0] != wanted[1]:
                turned = output.shape == wanted[::-1]
            elif turned is None:
                turned = turned_kinds.get(_kind(module), turned_kinds[""])
            if output.shape != (wanted[::-1] if turned else wanted):
                self._misfit(
                    adapter, f"{module}.weight is {list(output.shape)}, the adapter is for {list(wanted)}"
                )
            elif output.source.dtype not in TORCH_NAME:
                self._fault(adapter, f"{module}.weight is {output.source.dtype}: its weights are quantised")
            else:
                output.loras.append(replace(lora, scale=lora.scale * weight, transposed=turned))
                self._use(lora.a, lora.b, *([lora.magnitude] if lora.magnitude else []))
        for name, (tensor, scale) in adapter.added.items():
            found = self._name_in_base(name)
            if found is None or self.outputs[found].shape != tensor.shape:
                self._fault(
                    adapter, f"the base has no {name} of {tensor.numel} numbers (lora_bias wants one)"
                )
                continue
            self.outputs[found].added.append((tensor, scale * weight))
            self._use(tensor)
        self._check_layers(adapter)

    def _orientations(self, adapter: Adapter) -> dict[str, bool]:
        """Kind of module -> whether its weights are kept as [in, out], where shapes tell; "" for all other kinds.

        A square weight does not tell. It is kept as those of its own name (GPT-2 has two c_proj), as all the others of
        the adapter, or as the configuration says, in this order.
        """
        found: dict[str, bool] = {}
        for module, lora in adapter.loras.items():
            name = self._name_in_base(f"{module}.weight")
            wanted = (lora.b.shape[0], lora.a.shape[1])
            if name and lora.transposed is None and wanted[0] != wanted[1]:
                found[_kind(module)] = self.outputs[name].shape == wanted[::-1]
        others = {turned for kind, turned in found.items() if kind not in EMBEDDINGS | HEADS}
        found[""] = others.pop() if len(others) == 1 else bool(adapter.config.get("fan_in_fan_out"))
        return found

    def _set_embedding(self, adapter: Adapter, name: str, tensor: Tensor) -> None:
        """An embedding or head that PEFT saved beside the adapter: the same as the base's, or resized."""
        found = self._name_in_base(name)
        if found is None or self.outputs[found].shape[1:] != tensor.shape[1:]:
            self._fault(adapter, f"the base has no {name} of width {tensor.shape[-1]}")
            return
        self._use(tensor)
        if same_content(self.outputs[found].source, tensor):
            return
        if len(self.adapters) > 1:
            self._fault(adapter, f"it has a {name} of its own; merge it alone")
            return
        self._put(found, tensor)
        # One parameter before the training, so the other side of a tie followed (and may have an entry of its own).
        other = self.head_name if found == self.embedding else self.embedding
        if self.tied and other not in adapter.embeddings:
            self._put(other, tensor)

    def _replace(self, adapter: Adapter, name: str, tensor: Tensor) -> None:
        """A tensor that was trained in full."""
        self._use(tensor)
        found = self._name_in_base(name)
        if found is None and adapter.reward and len(tensor.shape) <= 2:
            self.outputs[name] = Output(name, self.main_dtype, tensor.shape, tensor)
            return
        if found is None:
            self._fault(adapter, f"the base has no {name}")
        elif self.outputs[found].shape != tensor.shape and not (
            found in (self.embedding, self.head_name) and self.outputs[found].shape[1:] == tensor.shape[1:]
        ):
            self._fault(
                adapter, f"{name} is {list(self.outputs[found].shape)}, the adapter's is {list(tensor.shape)}"
            )
        else:
            self._put(found, tensor)
            if self.tied and adapter.config.get("ensure_weight_tying"):
                other = self.head_name if found == self.embedding else self.embedding
                if found in (self.embedding, self.head_name) and other not in adapter.whole:
                    self._put(other, tensor)

    def _put(self, name: str, tensor: Tensor) -> None:
        output = self.outputs[name]
        self.outputs[name] = replace(output, source=tensor, shape=tensor.shape)

    def _use(self, *tensors: Tensor) -> None:
        self.used.update((tensor.file, tensor.name) for tensor in tensors)

    def _check_layers(self, adapter: Adapter) -> None:
        """Each kind of module is adapted in every layer of the base or in none, unless the adapter chose layers."""
        config = adapter.config
        targets = config.get("target_modules")
        if config.get("layers_to_transform") or config.get("exclude_modules"):
            return
        if (
            isinstance(targets, str)
            and targets != "all-linear"
            or any(re.search(r"\d", t) for t in targets or [])
        ):
            return
        adapted = {self._name_in_base(f"{module}.weight") or "" for module in adapter.loras}
        kinds = {re.sub(r"\.\d+\.", ".*.", name) for name in adapted}
        for name in self.base.tensors:
            if (
                re.search(r"\.\d+\.", name)
                and name not in adapted
                and re.sub(r"\.\d+\.", ".*.", name) in kinds
            ):
                self._fault(adapter, f"the adapter has nothing for {name.removesuffix('.weight')}")
                return

    def _settle_ties(self) -> None:
        """A head that is still the embedding stays out of the files (or as it was); one that is not is written."""
        if not self.tied:
            return
        embedding, head = self.outputs[self.embedding], self.outputs[self.head_name]
        if same_value(embedding, head):
            if self.head is None:
                del self.outputs[self.head_name]
        else:
            self.untied = True

    def _check_vocabulary(self) -> None:
        """Embedding and head know the same words; PEFT saves only the one of a resized pair that it targets."""
        sides = [name for name in (self.embedding, self.head) if name in self.outputs]
        rows = [self.outputs[name].shape[0] for name in sides]
        if len(set(rows)) == 2 and not self.reward:
            small = sides[rows.index(min(rows))]
            self._fault(
                self.adapters[0],
                f"it brings a vocabulary of {max(rows):,} words, but no {small} of that size: the training had one and "
                "did not save it (modules_to_save would have)",
            )

    def _check_all_used(self) -> None:
        """Every tensor of every adapter was used exactly once."""
        for adapter in self.adapters:
            placed = [t for lora in adapter.loras.values() for t in (lora.a, lora.b, lora.magnitude) if t]
            placed += [*adapter.whole.values(), *adapter.embeddings.values()]
            placed += [tensor for tensor, _ in adapter.added.values()]
            for tensor in placed:
                if self.used[tensor.file, tensor.name] != 1:
                    times = self.used[tensor.file, tensor.name]
                    self._fault(adapter, f"{tensor.name} was used {times} times instead of once")

    def _files(self) -> dict[str, list[Output]]:
        """Outputs by file: those of the base where they were, new ones in the last file."""
        names = list(dict.fromkeys(tensor.file.name for tensor in self.base.tensors.values()))
        renamed = {names[0]: SINGLE} if len(names) == 1 else {name: name for name in names}
        files: dict[str, list[Output]] = {renamed[name]: [] for name in names}
        for name, output in self.outputs.items():
            origin = self.base.tensors.get(name)
            files[renamed[origin.file.name if origin else names[-1]]].append(output)
        # The widest elements first, so that each tensor begins on a multiple of its element.
        return {
            name: sorted(outputs, key=lambda o: -ITEM_SIZE[o.dtype])
            for name, outputs in files.items()
            if outputs
        }


def _kind(module: str) -> str:
    """The last part of a module's name: q_proj"""
    return module.rpartition(".")[2]


def same_value(embedding: Output, head: Output) -> bool:
    """Whether a head [words, width] comes out as the embedding does: the same source and the same change."""
    if len(embedding.loras) != len(head.loras) or not same_content(embedding.source, head.source):
        return False
    with Reader() as reader:
        for mine, its in zip(embedding.loras, head.loras, strict=True):
            a, b = (mine.b, mine.a) if mine.transposed != its.transposed else (mine.a, mine.b)
            turned = mine.transposed != its.transposed
            if mine.scale != its.scale or mine.magnitude or its.magnitude:
                return False
            left = [reader.rows(tensor) for tensor in (a, b)]
            right = [reader.rows(tensor) for tensor in (its.a, its.b)]
            for one, other in zip(left, right, strict=True):
                one = one.T if turned else one
                if one.shape != other.shape or not bool((one == other).all()):
                    return False
    return True
