"""What the models that complete one canvas share: prompts as the input of a trace, `generate`, and how a source is
read. MAE-VQGAN and ViT-MAE are such; a model with another input overrides `_prepare`."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from nnsight.intervention.envoy import traceable
from nnsight.modeling.huggingface import HuggingFaceModel
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from vtv_nnsight.layouts import Layout
from vtv_nnsight.models.devices import check_device_map, resolve_device
from vtv_nnsight.models.nnsight_compat import PromptBatcher, PromptTracer
from vtv_nnsight.models.sources import check_folder, read_model_type
from vtv_nnsight.prompts import Canvases, VisualPrompt
from vtv_nnsight.text import join_names

EXPECTED = (
    "give a VisualPrompt, or canvas [batch, 3, height, width], visible [patch] and decoded [patch] as tensors "
    "(VisualPrompt.from_canvas makes a prompt of a canvas)."
)
HUB_OPTIONS = ("token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")


class Inputs(NamedTuple):
    """What the network is given: canvases, and the patches that its two stages see, shared by the batch ([patch]) or
    for each row ([batch, patch])."""

    canvas: torch.Tensor
    visible: torch.Tensor
    decoded: torch.Tensor


class CanvasModel(HuggingFaceModel):
    """A traceable network of canvas, visible and decoded patches (see `Inputs`)."""

    config_class: ClassVar[type[PretrainedConfig]]
    _batcher_class = PromptBatcher

    def __init__(
        self, source: str | os.PathLike | torch.nn.Module, *, revision: str | None = None, **kwargs: Any
    ) -> None:
        check_device_map(kwargs.get("device_map"))
        super().__init__(source, revision=revision, **kwargs)

    @property
    def layout(self) -> Layout:
        """The layout of the model's canvas, with one example."""
        return self._module.layout

    @property
    def device(self) -> torch.device | None:
        """Where inputs go: the device of the first weights, or the one that runs them when they are offloaded."""
        device = super().device
        if device is None or device.type != "meta":
            return device
        hooks = (getattr(module, "_hf_hook", None) for module in self._module.modules())
        running = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((torch.device(place) for place in running if place is not None), device)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the transformer once, untraced: the output that `model.trace(...)` calls `model.output`."""
        if self.interleaver.interleaving:
            return super().__call__(*inputs, **kwargs)
        return self.trace(*inputs, trace=False, **kwargs)

    def trace(self, *inputs: Any, **kwargs: Any) -> Any:
        return super().trace(*inputs, **{"tracer_cls": PromptTracer, **kwargs})

    trace.__doc__ = HuggingFaceModel.trace.__doc__

    @traceable
    def generate(self, *inputs: Any, layout: Layout | None = None, **kwargs: Any) -> Canvases:
        """Complete canvases: called as it is, or as `with model.generate(prompts) as tracer:`, where `tracer.result`
        is the canvas.

        Args:
            *inputs: A VisualPrompt, or canvas, visible and decoded as tensors.
            layout: Where the cells lie; by default that of the prompts, and of tensors the model's.
            **kwargs: Options of the network. `paste`, of those that paint the whole canvas: keep the canvas's own
                pixels at the visible patches (default); False gives the model's picture of all of it.

        Returns:
            `Canvases`: a tensor [batch, 3, height, width] in [0, 1] that shows itself, with `.answer` and `.picture()`.
        """
        return Canvases.of(self._module.generate(*inputs, **kwargs), layout or self.layout)

    def to(self, *args: Any, **kwargs: Any) -> CanvasModel:
        """Move or cast the model (device, dtype), in place, as `torch.nn.Module.to` does; loads the weights first.

        Raises:
            ValueError: when there is no such device, naming those that there are.
        """
        for device in (*args, kwargs.get("device")):
            if isinstance(device, (str, int, torch.device)) and not isinstance(device, bool):
                resolve_device(device)
        self.dispatch()
        self._module.to(*args, **kwargs)
        return self

    def _read_config(self, source: str, **kwargs: Any) -> PretrainedConfig:
        expected = self.config_class.model_type
        folder = Path(source, kwargs.get("subfolder") or "")
        if folder.is_dir() and (found := read_model_type(folder)) != expected:
            raise ValueError(f"{source!r} is a {found} model; expected {expected}.")
        config = AutoConfig.from_pretrained(source, revision=self.revision, **drop_none(kwargs, *HUB_OPTIONS))
        if not isinstance(config, self.config_class):
            raise ValueError(f"{source!r} is a {config.model_type} model; expected {expected}.")
        return config

    def _build(self, config: PretrainedConfig, source: str, **kwargs: Any) -> PreTrainedModel:
        """The model of a config, without weights."""
        chosen = drop_none(kwargs, "dtype", "attn_implementation")
        if chosen.get("dtype") == "auto":
            del chosen["dtype"]
        auto = self._auto()
        make = auto.from_config if hasattr(auto, "from_config") else auto._from_config
        with _one_sentence(source):
            return make(config, **chosen)

    def _from_pretrained(self, source: str, **kwargs: Any) -> PreTrainedModel:
        """The model of a folder or a Hub id, all of whose weights were there.

        Raises:
            ValueError: naming the source and the weights that are missing, of other shapes, or damaged.
        """
        folder = Path(source, kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_folder(folder)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # what it would report is raised below
        options = kwargs | {"output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            with _one_sentence(source):
                module, report = super()._load(source, **options)
        finally:
            logging.set_verbosity(verbosity)
        if mismatched := sorted(report["mismatched_keys"]):
            name, found, expected = mismatched[0]
            raise ValueError(
                f"{source}: {name} has shape {list(found)}; the sizes in its config ask for {list(expected)}."
            )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{source} has no {join_names(missing)}; it is incomplete, or of another model.")
        if strange := sorted(report["unexpected_keys"]):
            raise ValueError(f"{source} has {join_names(strange)}, unknown to the model; it is of another one.")
        return module

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        """Rows of one input set; 0 when it holds only options, as in `model.trace()` with invokes."""
        if not inputs and not any(name in kwargs for name in Inputs._fields):
            return 0
        canvas = inputs[0] if inputs else kwargs.get("canvas")
        if not isinstance(canvas, (VisualPrompt, torch.Tensor)) or getattr(canvas, "ndim", 4) == 0:
            raise TypeError(f"a trace was given {type(canvas).__name__}; {EXPECTED}")
        if not len(canvas):
            raise ValueError("there are no canvases in this batch; give at least one.")
        return len(canvas)

    def _batch(self, invokes: list[tuple[tuple, dict]], fn: Any) -> tuple[tuple, dict]:
        """The input sets of a trace as one forward's arguments, `Inputs` and the options."""
        if not invokes:
            raise ValueError(f"a trace was given nothing; {EXPECTED}")
        with unset_fake_temporarily():  # a scan's inputs are real, and their values are checked
            parts, options = zip(*[self._prepare(*inputs, **kwargs) for inputs, kwargs in invokes])
            if any(other != options[0] for other in options):
                raise ValueError(f"the invokes of a trace share one forward; {options} must not differ between them.")
            own = {"layout": _layout(parts)} if getattr(fn, "__name__", fn) == "generate" else {}
            return _join(parts), own | options[0]

    def _prepare(self, *inputs: Any, **kwargs: Any) -> tuple[VisualPrompt | Inputs, dict]:
        """One input set, checked against the model's grid of patches, and what is left: the options."""
        if len(inputs) == 1 and isinstance(inputs[0], VisualPrompt):
            prompt, own = inputs[0], self.layout
            if (prompt.layout.canvas_size, prompt.layout.patch_size) != (own.canvas_size, own.patch_size):
                raise ValueError(
                    f"a prompt of {prompt.layout} does not fit a model of {own}; make it with "
                    "layout=model.layout (canvas_size and patch_size must agree; order and examples are free)."
                )
            return prompt, kwargs
        given = dict(zip(Inputs._fields, inputs)) | drop_none(kwargs, *Inputs._fields)
        if len(inputs) > len(Inputs._fields) or set(given) != set(Inputs._fields):
            raise TypeError(f"a trace was given {', '.join(given)} ({len(inputs)} unnamed); {EXPECTED}")
        inputs = Inputs(**given)
        _check(inputs, self.layout)
        return inputs, {name: value for name, value in kwargs.items() if name not in Inputs._fields}


@contextmanager
def _one_sentence(source: str) -> Iterator[None]:
    """What a config leads transformers to raise when nothing can be built of it, as one sentence."""
    try:
        yield
    except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"no model can be built of the config of {source!r}: {reason}.") from error


def copy_with(module: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """A copy of a ready module, loaded with other options of `from_pretrained`."""
    own = {"attn_implementation": module.config._attn_implementation, "dtype": module.dtype}
    config, weights = copy.deepcopy(module.config), module.state_dict()
    return type(module).from_pretrained(None, config=config, state_dict=weights, **(own | options))


def drop_none(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """The options of these names that are set."""
    return {name: options[name] for name in names if options.get(name) is not None}


def _join(parts: Sequence[VisualPrompt | Inputs]) -> Inputs:
    """The rows of input sets, one after the other."""
    if len(parts) == 1:
        return Inputs(parts[0].canvas, parts[0].visible, parts[0].decoded)
    device = parts[0].canvas.device
    if len({part.layout for part in parts if isinstance(part, VisualPrompt)}) > 1:
        raise ValueError(f"prompts of different layouts {_APART}")
    canvas = torch.cat([part.canvas.to(device) for part in parts])
    return Inputs(canvas, *(_join_ids([getattr(part, name).to(device) for part in parts], parts) for name in _IDS))


def _layout(parts: Sequence[VisualPrompt | Inputs]) -> Layout | None:
    """The layout of input sets that say one."""
    return next((part.layout for part in parts if isinstance(part, VisualPrompt)), None)


def _join_ids(every: list[torch.Tensor], parts: Sequence[VisualPrompt | Inputs]) -> torch.Tensor:
    if all(ids.ndim == 1 and torch.equal(ids, every[0]) for ids in every):
        return every[0]
    if any(ids.ndim == 2 for ids in every) and len({ids.shape[-1] for ids in every}) == 1:
        return torch.cat([ids.expand(len(part.canvas), -1) for ids, part in zip(every, parts)])
    counts = " and ".join(str(ids.shape[-1]) for ids in every)
    raise ValueError(f"prompts that show other patches ({counts} of them; one-shot and query_only() ones do) {_APART}")


def _check(inputs: Inputs, layout: Layout) -> None:
    """Refuse tensors that are not a prompt of this layout, whose patch ids may be given for each row."""
    shared = [ids[0] if isinstance(ids, torch.Tensor) and ids.ndim == 2 and len(ids) else ids for ids in inputs[1:]]
    VisualPrompt(inputs.canvas, *shared, layout)
    for name, ids in zip(_IDS, inputs[1:]):
        if ids.ndim == 1 or ids.device.type == "meta":
            continue
        if len(ids) != len(inputs.canvas):
            raise ValueError(f"{name} has {len(ids)} rows for {len(inputs.canvas)} canvases; give a row for each.")
        if ids.min() < 0 or ids.max() >= layout.num_patches:
            raise ValueError(
                f"{name} holds patch ids from {ids.min().item()} to {ids.max().item()}; this layout's grid has 0 to "
                f"{layout.num_patches - 1}."
            )
        if (ids.sort(1).values.diff(dim=1) == 0).any():
            raise ValueError(f"{name} names a patch twice in a row; give each patch id once.")


_IDS = ("visible", "decoded")
_APART = (
    "cannot share a batch, which is one forward; trace them one after the other, in a `with model.session():` when "
    "values are to pass between them."
)
