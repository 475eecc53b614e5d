"""PruneCallback: prune while the Trainer of Hugging Face transformers trains.

::

    trainer = Trainer(model, args, ..., callbacks=[PruneCallback("2:4")])
    trainer.train()              # or trainer.train(resume_from_checkpoint=True)
    trainer.save_model("out")    # plain keys, zeros where the mask was: from_pretrained loads it

Whatever the model saves while masks are held has plain keys too: a hook on its ``state_dict`` writes the masked
weight, and one on loading takes it back. So every checkpoint is a model for ``from_pretrained``. The masks themselves
lie beside, in ``masks.safetensors``, a bit per weight, and are held again when training goes on from there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .masks import finalize, hold, masks
from .patterns import Pattern, layers, parse
from .prune import PruneReport, magnitude, prune

try:
    from transformers import TrainerCallback
except ImportError:
    raise ImportError(
        "sparsekern.pruning.hf needs transformers: pip install 'sparsekern[transformers]'"
    ) from None

logger = logging.getLogger(__name__)

OnePattern = str | Pattern | Mapping[str, str | Pattern]
_FILE = "masks.safetensors"


class PruneCallback(TrainerCallback):
    """Prune at a step of training, or by and by, and hold the masks from then on.

    Best checkpoints are those after the last pruning. Under FSDP and DeepSpeed, which cut weights into
    shards, this raises.

    Args:
        pattern: as :func:`sparsekern.pruning.prune` takes it; or a list of them, which are applied at
            equal distances from `start` to `end`: ``["density=0.5", "density=0.25", "density=0.1"]``.
        start: optimizer steps, or epochs, that are trained before the first pruning.
        end: those before the last pruning; with a list alone.
        unit: "steps" or "epochs" (fractions are rounded to a step).
        filter_fn: called with (layer, its name); False leaves the layer dense.
        score: as in :func:`sparsekern.pruning.prune`.
        finish: write the masks into the weights at the end of training. Otherwise they are still held.

    Attributes:
        reports: pairs (step, :class:`sparsekern.pruning.PruneReport`).
    """

    def __init__(
        self,
        pattern: OnePattern | Sequence[OnePattern] = "2:4",
        start: float = 0,
        end: float | None = None,
        unit: str = "steps",
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
        score: Callable[[Tensor, str], Tensor] = magnitude,
        finish: bool = True,
    ):
        single = isinstance(pattern, str | Pattern | Mapping)
        self.patterns = [pattern] if single else list(pattern)
        for one in self.patterns:
            for text in one.values() if isinstance(one, Mapping) else [one]:
                parse(text)
        if unit not in ("steps", "epochs"):
            raise ValueError(f"PruneCallback: unit is {unit!r}; it takes steps or epochs")
        several = len(self.patterns) > 1
        if not self.patterns or several != (end is not None):
            raise ValueError(
                f"PruneCallback: end is {end} with {len(self.patterns)} patterns; two or more take one, one takes none"
            )
        if not 0 <= start <= (start if end is None else end):
            raise ValueError(
                f"PruneCallback: start is {start} and end {end}; it takes 0 <= start <= end"
            )
        self.start, self.end, self.unit = start, start if end is None else end, unit
        self.filter_fn, self.score, self.finish = filter_fn, score, finish
        self.reports: list[tuple[int, PruneReport]] = []
        self._due: list[tuple[int, OnePattern]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    # ---- the Trainer's events ----

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for name in ("fsdp", "deepspeed"):
            if getattr(args, name, None):
                raise ValueError(
                    f"PruneCallback: {name} cuts weights into shards, which cannot be pruned here"
                )
        per_unit = 1 if self.unit == "steps" else state.max_steps / state.num_train_epochs
        spread = np.linspace(self.start, self.end, len(self.patterns)) * per_unit
        at = [round(step) for step in spread.tolist()]
        if at[-1] >= state.max_steps:
            raise ValueError(
                f"PruneCallback: the last pruning comes after step {at[-1]}; training ends at {state.max_steps}"
            )
        self._remove_hooks()
        self._hooks = [
            model.register_state_dict_post_hook(_write_plain),
            model.register_load_state_dict_pre_hook(_read_plain),
        ]
        # A checkpoint of step n was written before the pruning after step n.
        self._due = [
            pair for pair in zip(at, self.patterns, strict=True) if pair[0] >= state.global_step
        ]
        if len(self._due) < len(at) and not any(masks(model)):
            self._restore(args, state.global_step, model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        while self._due and self._due[0][0] <= state.global_step:
            _, pattern = self._due.pop(0)
            report = prune(model, pattern, self.filter_fn, self.score)
            self.reports.append((state.global_step, report))
            logger.info("pruned after step %d\n%s", state.global_step, report)
            # What a denser model scored is no measure for this one.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_save(self, args, state, control, model=None, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir() and any(masks(model)):
            from safetensors.torch import save_file

            packed = {held.name: _pack(held.mask) for held in masks(model)}
            save_file(packed, folder / _FILE)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.finish:
            finalize(model)
            self._remove_hooks()

    # ---- going on from a checkpoint ----

    def _restore(self, args, step: int, model: nn.Module) -> None:
        """Hold the masks of the checkpoint whose plain weights the model has loaded."""
        given = args.resume_from_checkpoint
        folders = [Path(given)] if isinstance(given, str) else []
        folders.append(Path(args.output_dir) / f"checkpoint-{step}")
        found = next((m for folder in folders if (m := _fitting(folder / _FILE, model))), None)
        if found is None:
            logger.warning(
                "no %s of this checkpoint in %s: what is zero in its weights stays pruned",
                _FILE,
                " or ".join(map(str, folders)),
            )
            chosen = layers(model, "density=1", self.filter_fn)
            found = {
                f"{layer.name}.weight": layer.weight != 0 for layer in chosen if not layer.skipped
            }
            found = {name: mask for name, mask in found.items() if not mask.all()}
        for name, mask in found.items():
            path, _, parameter = name.rpartition(".")
            hold(model.get_submodule(path), mask, parameter)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _fitting(file: Path, model: nn.Module) -> dict[str, Tensor] | None:
    """The masks in a file, if it has masks for these very weights: zero wherever they drop one."""
    if not file.exists():
        return None
    from safetensors.torch import load_file

    parameters = dict(model.named_parameters())
    found = {}
    for name, bits in load_file(file).items():
        weight = parameters.get(name)
        if weight is None or bits.numel() != (weight.numel() + 7) // 8:
            return None
        mask = _unpack(bits, weight.shape).to(weight.device)
        if bool((weight.detach()[~mask] != 0).any()):
            return None
        found[name] = mask
    return found


def _pack(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def _unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    flat = np.unpackbits(bits.numpy(), count=shape.numel())
    return torch.from_numpy(flat).bool().view(shape)


# ---- plain keys; functions of the module, so that a copy of the model has them too ----


def _keys(module: nn.Module, prefix: str):
    """Of each held mask: the plain key, those of the original and of the mask, and the mask."""
    for held in masks(module):
        path, _, parameter = held.name.rpartition(".")
        stem = f"{prefix}{path}{'.' if path else ''}parametrizations.{parameter}"
        yield prefix + held.name, f"{stem}.original", f"{stem}.0.mask", held.mask


def _write_plain(module, state_dict, prefix, local_metadata) -> None:
    for plain, original, mask_key, mask in _keys(module, prefix):
        if original in state_dict:
            weight = state_dict.pop(original)
            del state_dict[mask_key]
            state_dict[plain] = torch.where(mask, weight, weight.new_zeros(()))


def _read_plain(module, state_dict, prefix, *rest) -> None:
    for plain, original, mask_key, mask in _keys(module, prefix):
        if plain in state_dict:
            state_dict[original] = state_dict.pop(plain)
            state_dict[mask_key] = mask
