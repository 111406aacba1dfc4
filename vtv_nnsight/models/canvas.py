"""What all models that complete one canvas share: prompts as the input of a trace, `generate` and `paint`, and how a
source is read."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from vtv_nnsight.files import refusing
from vtv_nnsight.finite import check_output
from vtv_nnsight.layouts import Layout
from vtv_nnsight.models.devices import floating_dtype
from vtv_nnsight.models.interface import CanvasModel
from vtv_nnsight.models.nnsight_compat import Envoy, TraceableModel, real_tensors, traceable
from vtv_nnsight.models.painting import Inputs, paint_canvas
from vtv_nnsight.models.sources import HUB_OPTIONS, locate
from vtv_nnsight.models.torch_files import StrPath, fill, refuse_differences
from vtv_nnsight.progress import quiet
from vtv_nnsight.prompts import Canvases, VisualPrompt, check_canvas, check_patches

EXPECTED = (
    "give a VisualPrompt, or canvas [batch, 3, height, width], visible [patch] and decoded [patch] as tensors "
    "(VisualPrompt.from_canvas makes a prompt of a canvas)."
)


class AdaptedNetwork(nn.Module):
    """A model of transformers' under the names that a trace uses, which sees the patches that a prompt shows.

    Args:
        original: The model, which keeps its own names.
    """

    def __init__(self, original: PreTrainedModel) -> None:
        super().__init__()
        self.config: Any = original.config
        self.original: Any
        object.__setattr__(self, "original", original)  # not as a child: its modules have their names here

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype


class TraceableCanvas(TraceableModel, CanvasModel):
    """A traceable network of canvas, visible and decoded patches (see `Inputs`).

    Raises:
        TypeError, ValueError, OSError: when it is made: naming the source and what is wrong with it.
    """

    module_class: ClassVar[Any]
    """What a ready module must be."""
    config_class: ClassVar[type[PretrainedConfig]]
    source_kinds: ClassVar[str] = "a Hub id, a folder"
    """What else a source may be, for people."""
    file_options: ClassVar[tuple[str, ...]] = ()
    """Arguments of a published checkpoint file alone."""
    published_name: ClassVar[Any]
    """What published files call a tensor of the module."""
    envoy_classes: ClassVar[Mapping[type[nn.Module], type[Envoy]]] = {}
    """Envoys of the network's modules; the argument `envoys` adds to them."""

    def __init__(
        self, source: StrPath | nn.Module, *, revision: str | None = None, envoys: Any = None, **kwargs: Any
    ) -> None:
        if isinstance(source, os.PathLike):
            source = os.fspath(source)
        if not isinstance(source, (str, self.module_class)):
            raise TypeError(f"{type(source).__name__} is no source of {type(self).__name__}; give {self.source_kinds}.")
        if isinstance(source, str) and locate(source).kind == "hub":
            source = locate(source).path
        self._of_file = drop_none(kwargs, *self.file_options)
        if self._of_file and not (isinstance(source, str) and locate(source).kind == "file"):
            names = ", ".join(self._of_file)
            raise ValueError(f"{names}= is for a published checkpoint file; this source has its own.")
        kwargs = {name: value for name, value in kwargs.items() if name not in self.file_options}
        if envoys is None or isinstance(envoys, dict):
            envoys = {**self.envoy_classes, **(envoys or {})}
        super().__init__(source, revision=revision, envoys=envoys, **kwargs)

    @property
    def layout(self) -> Layout:
        """The layout of the model's canvas, with one example."""
        return self.network.layout

    @property
    def device(self) -> torch.device | None:
        """Where inputs go: the device of the first weights, or the one that runs them when they are offloaded."""
        device: torch.device | None = super().device
        if device is None or device.type != "meta":
            return device
        hooks = (getattr(module, "_hf_hook", None) for module in self.network.modules())
        running = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((torch.device(place) for place in running if place is not None), device)

    def layer(self, stage: str, layer: int) -> Any:
        """The envoy of a layer, 0 being the stage's first."""
        return getattr(self, stage).layers[layer]

    def attention(self, stage: str, layer: int) -> Any:
        """The attention of a layer, 0 being the stage's first."""
        return self.layer(stage, layer).attention

    def outputs(self, stage: str, layer: int) -> dict[str, Any]:
        """The attention, the MLP, and the layer itself."""
        module = self.layer(stage, layer)
        return {"attn": self.attention(stage, layer), "mlp": module.mlp, "residual": module}

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
        options = {"paste": kwargs.pop("paste")} if "paste" in kwargs else {}
        with torch.no_grad():
            output = self.network.forward(*inputs, **kwargs)
            return Canvases.of(self.paint(output, Inputs(*inputs), **options), layout or self.layout)

    @torch.no_grad()
    def paint(self, output: Any, prompts: VisualPrompt | Inputs, paste: bool = True) -> torch.Tensor:
        """The canvases that the network's output stands for, with their own pixels at the visible patches where
        `paste`: [batch, 3, height, width] in [0, 1], in steps of 1/255 (truncated).

        Raises:
            ValueError: when the output is not finite.
        """
        check_output(output)
        return paint_canvas(self.draw, self.predictions(output), prompts, self.layout, paste)

    def predictions(self, output: Any) -> torch.Tensor:
        """What the output says of each decoded patch, [batch, decoded patch, …]."""
        raise NotImplementedError

    def draw(self, predictions: torch.Tensor) -> torch.Tensor:
        """The picture of predictions of every patch of the grid: [batch, 3, height, width] in [0, 1]."""
        raise NotImplementedError

    def to(self, *args: Any, **kwargs: Any) -> TraceableCanvas:
        """Move or cast the model (device, dtype), in place, as `torch.nn.Module.to` does; loads the weights first."""
        self.dispatch()
        self.network.to(*args, **kwargs)
        return self

    def save_pretrained(self, folder: StrPath, **kwargs: Any) -> None:
        """Write a safetensors folder that this class and transformers read; loads the weights first."""
        self.dispatch()
        getattr(self.network, "original", self.network).save_pretrained(folder, **kwargs)

    def adapt(self, module: Any, source: str) -> Any:
        """The network of a module of `module_class`, read from that source; the module itself by default.

        Raises:
            ValueError: naming the source, when it cannot complete a prompt's canvas.
        """
        return module

    def empty_network(self, source: str, **options: Any) -> Any:
        """The network of a source's config on the meta device."""
        return self.adapt(self.build(self.read_config(source, **options), source, **options), source)

    def loaded_network(self, source: str, **options: Any) -> Any:
        """The network of a source, with its weights."""
        if locate(source).kind != "file":
            self.read_config(source, **options)
            return self.adapt(self.load_weights(source, **options), source)
        config, tensors = self.read_released(source, **self._of_file)
        with real_tensors(), torch.device("meta"):
            module = self.module_class(config)
        return self.adapt(copy_with(fill(module, tensors, self.published_name, source, None), **options), source)

    def ready_network(self, module: Any, **options: Any) -> Any:
        """The network of a ready module, or of a copy of it where an option is set."""
        return self.adapt(copy_with(module, **options), f"this {type(module).__name__}")

    def read_config(self, source: str, **options: Any) -> Any:
        """The config of a folder or a Hub id, or that which the tensors of a published file tell.

        Raises:
            ValueError, OSError: when it is of another kind of model, or cannot be read.
        """
        if locate(source).kind == "file":
            return self.read_released(source, **self._of_file)[0]
        path = locate(source).path
        with refusing(source, "has no usable config"):
            config = AutoConfig.from_pretrained(path, revision=self.revision, **drop_none(options, *HUB_OPTIONS))
        if not isinstance(config, self.config_class):
            raise ValueError(f"{source!r} is a {config.model_type} model; expected {self.config_class.model_type}.")
        return config

    def read_released(self, source: str, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        """The config that the tensors of a published file tell, and these, by published name.

        Raises:
            ValueError: for a model without such files.
        """
        raise ValueError(f"{source!r} is no source of {type(self).__name__}; give {self.source_kinds}.")

    def build(self, config: PretrainedConfig, source: str, **options: Any) -> Any:
        """The module of a config, without weights."""
        kept = drop_none({**options, "dtype": floating_dtype(options.get("dtype"))}, "dtype", "attn_implementation")
        with refusing(source, "is no model that can be built"):
            return self.module_class._from_config(config, **kept)

    def load_weights(self, source: str, **options: Any) -> Any:
        """The module of a folder or a Hub id, with all of its weights.

        Raises:
            ValueError: naming the source and the weights that are missing, of other shapes, or damaged; or the dtype.
        """
        floating_dtype(options.get("dtype"))
        path = locate(source).path
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # what it would report is raised below
        try:
            with refusing(source, "cannot be loaded"), quiet() if Path(path).is_dir() else nullcontext():
                module, report = self.load_pretrained(
                    path, **options, output_loading_info=True, ignore_mismatched_sizes=True
                )
        finally:
            logging.set_verbosity(verbosity)
        differences = (sorted(report[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched"))
        refuse_differences(path, *differences)
        return module

    def count_rows(self, *inputs: Any, **kwargs: Any) -> int:
        """Rows of one input set; 0 when it holds only options, as in `model.trace()` with invokes."""
        if not inputs and not any(name in kwargs for name in Inputs._fields):
            return 0
        canvas = inputs[0] if inputs else kwargs.get("canvas")
        if not isinstance(canvas, (VisualPrompt, torch.Tensor)) or getattr(canvas, "ndim", 4) == 0:
            raise TypeError(f"a trace was given {type(canvas).__name__}; {EXPECTED}")
        if not len(canvas):
            raise ValueError("there are no canvases in this batch; give at least one.")
        return len(canvas)

    def join_inputs(self, invokes: list[tuple[Any, dict[str, Any]]], method: Any) -> tuple[Inputs, dict[str, Any]]:
        """The input sets of a trace as one forward's arguments, `Inputs` and the options."""
        if not invokes:
            raise ValueError(f"a trace was given nothing; {EXPECTED}")
        with unset_fake_temporarily():  # a scan's inputs are real, and their values are checked
            parts, options = zip(*[self.check_inputs(*inputs, **kwargs) for inputs, kwargs in invokes])
            if any(other != options[0] for other in options):
                raise ValueError(f"the invokes of a trace share one forward; {options} must not differ between them.")
            layouts = [part.layout for part in parts if isinstance(part, VisualPrompt)]
            painted = getattr(method, "__name__", method) == "generate"
            return _join(parts), ({"layout": layouts[0] if layouts else None} if painted else {}) | options[0]

    def check_inputs(self, *inputs: Any, **kwargs: Any) -> tuple[VisualPrompt | Inputs, dict[str, Any]]:
        """One input set, checked against the model's grid of patches, and what is left: the options."""
        if len(inputs) == 1 and isinstance(inputs[0], VisualPrompt):
            prompt, layout = inputs[0], self.layout
            if (prompt.layout.canvas_size, prompt.layout.patch_size) != (layout.canvas_size, layout.patch_size):
                raise ValueError(f"a prompt of {prompt.layout} does not fit {layout}; give layout=model.layout.")
            return prompt, kwargs
        given = dict(zip(Inputs._fields, inputs)) | drop_none(kwargs, *Inputs._fields)
        if len(inputs) > len(Inputs._fields) or set(given) != set(Inputs._fields):
            raise TypeError(f"a trace was given {', '.join(given)} ({len(inputs)} unnamed); {EXPECTED}")
        tensors = Inputs(**given)
        check_canvas(tensors.canvas, self.layout)
        for name in _IDS:
            check_patches(name, given[name], self.layout, len(tensors.canvas))
        return tensors, {name: value for name, value in kwargs.items() if name not in Inputs._fields}


def copy_with(module: Any, **options: Any) -> Any:
    """A ready module, or a copy of it, loaded with other options of `from_pretrained`, where one is set."""
    if not (options := drop_none(options, *options)):
        return module
    options = {"attn_implementation": module.config._attn_implementation, "dtype": module.dtype} | options
    config, weights = copy.deepcopy(module.config), module.state_dict()
    return type(module).from_pretrained(None, config=config, state_dict=weights, **options)


def drop_none(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
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


def _join_ids(every: list[torch.Tensor], parts: Sequence[VisualPrompt | Inputs]) -> torch.Tensor:
    if all(ids.ndim == 1 and torch.equal(ids, every[0]) for ids in every):
        return every[0]
    if any(ids.ndim == 2 for ids in every) and len({ids.shape[-1] for ids in every}) == 1:
        return torch.cat([ids.expand(len(part.canvas), -1) for ids, part in zip(every, parts)])
    counts = " and ".join(str(ids.shape[-1]) for ids in every)
    raise ValueError(f"prompts that show other patches ({counts} of them; one-shot and query_only() ones do) {_APART}")


_IDS = ("visible", "decoded")
_APART = (
    "cannot share a batch, which is one forward; trace them one after the other, in a `with model.session():` when "
    "values are to pass between them."
)
