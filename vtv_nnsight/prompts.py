"""Prompts: what all kinds of them have, and batches of visual prompts, which are canvases that share a layout and what
each stage of the model sees of them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from einops import rearrange
from PIL import Image
from torch.nn import functional as F

from vtv_nnsight.digests import tensor_digest, text_number
from vtv_nnsight.finite import check_whole
from vtv_nnsight.images import as_cell, digest, png_of, to_pil
from vtv_nnsight.layouts import Layout

Self = TypeVar("Self", bound="Prompts")


class Prompts(ABC):
    """Rows for a model to answer, of canvases (`VisualPrompt`) or of texts (`TextPrompts`): all that collecting,
    patching, searching and evaluating ask of them.

    Attributes:
        layout: Where things lie in them: equal layouts have equal positions. It has `num_positions`, `place_names`,
            and `MODEL_FACTS`, the names of the fields that belong to the model.
        noun: What tables count.
    """

    layout: Any
    noun: ClassVar[str] = "images"

    @property
    @abstractmethod
    def identifiers(self) -> torch.Tensor | None:
        """LongTensor [row, examples + 1] with a number for all that each row shows, the query last; None where that is
        not known."""

    @classmethod
    @abstractmethod
    def cat(cls, prompts: Sequence[Any]) -> Any:
        """Prompts of one layout, one after the other."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self: Self, rows: int | slice | Sequence[int] | torch.Tensor) -> Self: ...

    def __iter__(self: Self) -> Iterator[Self]:
        return (self[i] for i in range(len(self)))

    def split(self: Self, batch_size: int) -> Iterator[Self]:
        """Batches of at most `batch_size` rows, in order.

        Raises:
            ValueError: when that is less than 1.
        """
        check_whole(batch_size=batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} holds nothing; give 1 or more.")
        return (self[start : start + batch_size] for start in range(0, len(self), batch_size))

    @abstractmethod
    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Move, as `torch.Tensor.to` does."""

    @abstractmethod
    def query_only(self: Self) -> Self:
        """The zero-shot form."""

    @abstractmethod
    def one_shot(self: Self) -> Self:
        """The form with examples."""

    @property
    @abstractmethod
    def factors(self) -> dict[str, torch.Tensor]:
        """What rows may share, and intervals resample together: "query" and more → a number for each row, LongTensor
        [row] on the CPU."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """A name for all that they show."""

    def contents(self, named: bool = True) -> list[set[int]]:
        """Numbers for all that each row shows: its identifiers, or, if not `named`, what can be seen."""
        return [] if self.identifiers is None else [set(row) for row in self.identifiers.tolist()]

    @abstractmethod
    def check_truth(self) -> None:
        """Refuse prompts without a truth, by which nothing can be scored."""

    @abstractmethod
    def same_queries(self, other: Any) -> bool:
        """Whether others ask the same, row for row, as far as that can be told."""

    @abstractmethod
    def shown(self) -> dict[str, Any]:
        """For people: "prompt", what they show without the answers, and "truth", the true answers."""


@dataclass(frozen=True, eq=False)
class VisualPrompt(Prompts):
    """Canvases with an example, a query and an output to be painted.

    A canvas holds the truth in its output cell, where the model never sees it; without a truth the cell is white.

    Args:
        canvas: Float [batch, 3, height, width] in [0, 1], not normalised.
        visible: LongTensor [visible patch] of the patches that the encoder sees, shared by the batch.
        decoded: LongTensor [decoded patch] of the patches that the decoder sees.
        layout: Where the cells lie.
        pictures: LongTensor [batch, examples + 1] of `images.digest`s of the pictures that the cells were made of, as
            they were before a task changed them, the query last; None where that is not known. Tasks say it.
        sources: What rows tell of what the query's picture was made of ("object", "background", "source") → a number
            for each, LongTensor [batch] on the CPU: rows of one number share it. Tasks say it.
        has_truth: Whether all output cells hold the truth; where one is only white, nothing can be scored.

    Raises:
        TypeError, ValueError: naming what is wrong with the canvas or the patch ids. Rows, moves and other forms of a
            prompt are not looked at again.
    """

    canvas: torch.Tensor
    visible: torch.Tensor
    decoded: torch.Tensor
    layout: Layout
    pictures: torch.Tensor | None = None
    sources: Mapping[str, torch.Tensor] = field(default_factory=dict)
    has_truth: bool = True

    def __post_init__(self) -> None:
        check_canvas(self.canvas, self.layout)
        for name in ("visible", "decoded"):
            check_patches(name, getattr(self, name), self.layout)

    @classmethod
    def from_canvas(cls, canvas: torch.Tensor, layout: Layout | None = None) -> VisualPrompt:
        """One-shot prompts of ready canvases [batch, 3, height, width] or [3, height, width]: float in [0, 1] or
        uint8. The encoder sees all but the output; the decoder sees everything."""
        layout = layout or Layout()
        if isinstance(canvas, torch.Tensor):
            canvas = canvas[None] if canvas.ndim == 3 else canvas
            canvas = canvas.float() / 255 if canvas.dtype == torch.uint8 else canvas
        return cls(canvas, layout.visible, layout.all_patches, layout)

    @classmethod
    def from_cells(cls, cells: Mapping[str, Any], layout: Layout) -> VisualPrompt:
        """One one-shot prompt on the layout's background, cells that are not given being white.

        Args:
            cells: Name of a cell → its pixels [3, cell, cell] in [0, 1], or a picture (PIL or its path), which is
                resized.

        Raises:
            ValueError: when the layout has no such cell, or pixels are of another size.
        """
        size, cell = layout.canvas_size, layout.cell_size
        canvas = torch.tensor(layout.canvas_colour).view(1, 3, 1, 1).repeat(1, 1, size, size)
        for name, pixels in (dict.fromkeys(layout.cells, torch.ones(3, cell, cell)) | dict(cells)).items():
            pixels = pixels if isinstance(pixels, torch.Tensor) else as_cell(pixels, cell)
            if pixels.shape != (3, cell, cell):
                raise ValueError(f"pixels of {name!r} have shape {list(pixels.shape)}; expected [3, {cell}, {cell}].")
            crop(canvas, name, layout)[0] = pixels
        return cls.from_canvas(canvas, layout)._with(has_truth="output" in cells)

    @classmethod
    def cat(cls, prompts: Sequence[VisualPrompt]) -> VisualPrompt:
        """Prompts that share layout and patches, one after the other."""
        if not prompts:
            raise ValueError("there are no prompts to concatenate; give at least one.")
        first = prompts[0]
        for other in prompts[1:]:
            if other.layout != first.layout:
                raise ValueError(f"prompts of {first.layout} and {other.layout} cannot share a batch; run them apart.")
            if not (torch.equal(other.visible, first.visible) and torch.equal(other.decoded, first.decoded)):
                raise ValueError("prompts that show other patches share no batch; call query_only() on all or none.")
        known = [p.pictures for p in prompts if p.pictures is not None]
        pictures = torch.cat(known) if len(known) == len(prompts) else None
        names = [name for name in first.sources if all(name in p.sources for p in prompts)]
        sources = {name: torch.cat([p.sources[name] for p in prompts]) for name in names}
        canvas, has_truth = torch.cat([p.canvas for p in prompts]), all(p.has_truth for p in prompts)
        return first._with(canvas=canvas, pictures=pictures, sources=sources, has_truth=has_truth)

    def _with(self, **changes: Any) -> VisualPrompt:
        """This prompt with other tensors that are known to be good. `dataclasses.replace` looks at all of them, and
        waits for the GPU to do so."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__ | changes)
        return new

    def __len__(self) -> int:
        return len(self.canvas)

    def __getitem__(self, rows: int | slice | Sequence[int] | torch.Tensor) -> VisualPrompt:
        """Some of the rows, always as a batch: an int gives a batch of one."""
        rows = as_rows(rows, len(self))
        of_rows = as_rows(rows.cpu() if isinstance(rows, torch.Tensor) else rows, len(self))
        sources = {name: numbers[of_rows] for name, numbers in self.sources.items()}
        pictures = None if self.pictures is None else self.pictures[rows]
        return self._with(canvas=self.canvas[rows], pictures=pictures, sources=sources)

    def to(self, *args: Any, **kwargs: Any) -> VisualPrompt:
        """Move the canvas (device, dtype) and the ids (device) as `torch.Tensor.to` does."""
        canvas = self.canvas.to(*args, **kwargs)
        if not canvas.is_floating_point():
            raise TypeError(f"{canvas.dtype} cannot hold a canvas; give a floating point type.")
        ids = {name: getattr(self, name) for name in ("visible", "decoded", "pictures")}
        return self._with(canvas=canvas, **{n: None if i is None else i.to(canvas.device) for n, i in ids.items()})

    @property
    def device(self) -> torch.device:
        """Where the canvas lies."""
        return self.canvas.device

    def query_only(self) -> VisualPrompt:
        """The zero-shot form: the encoder sees the query alone, the decoder the query's band of the canvas, with the
        output hidden (ECCV 2024, §4)."""
        return self._with(
            visible=self.layout.regions["query"].to(self.device), decoded=self.layout.query_band.to(self.device)
        )

    def one_shot(self) -> VisualPrompt:
        """The form with examples, as `from_canvas` makes it: the encoder sees all but the output, the decoder
        everything."""
        return self._with(visible=self.layout.visible.to(self.device), decoded=self.layout.all_patches.to(self.device))

    def with_examples(self, others: VisualPrompt | None) -> VisualPrompt:
        """The same queries under the examples of as many other prompts, or with blank cells in the examples' place.

        Raises:
            ValueError: when there are more or fewer of the others, or they are of another layout.
        """
        if others is not None and (len(others) != len(self) or others.layout != self.layout):
            raise ValueError(
                f"{len(others)} prompts of {others.layout} cannot lend {len(self)} of {self.layout} theirs."
            )
        canvas = self.canvas.clone()
        blank = canvas.new_tensor(self.layout.canvas_colour)[:, None, None]
        for name, (rows, columns) in self.layout.cells.items():
            if name not in ("query", "output"):
                canvas[:, :, rows, columns] = blank if others is None else others.canvas[:, :, rows, columns].to(canvas)
        return self._with(canvas=canvas, pictures=None)

    @property
    def identifiers(self) -> torch.Tensor | None:
        """`pictures`."""
        return self.pictures

    @property
    def queries(self) -> torch.Tensor:
        """A number for each row's query picture, LongTensor [batch] on the CPU: rows of one number ask about the same
        picture. Of the query's cell where `pictures` is not known."""
        return self.factors["query"]

    @property
    def factors(self) -> dict[str, torch.Tensor]:
        """What rows may share, and intervals resample together: "query", "example" (all examples of a prompt as one)
        and `sources` → a number for each row, LongTensor [batch] on the CPU."""
        names = [name for name in self.layout.cells if "output" not in name]
        cells = [self.region(name).cpu() for name in names] if self.pictures is None else []
        looked_at = [[digest(cell) for cell in row] for row in zip(*cells)]
        pictures = looked_at if self.pictures is None else self.pictures.tolist()
        examples = [row[0] if len(row) == 2 else text_number(row[:-1]) for row in pictures]
        numbers = {"query": [row[-1] for row in pictures], "example": examples}
        return {name: torch.tensor(column, dtype=torch.long) for name, column in numbers.items()} | dict(self.sources)

    @property
    def digest(self) -> str:
        """A name for the canvases and for what each stage sees of them."""
        return tensor_digest(self.canvas, self.visible, self.decoded)

    def same_queries(self, other: VisualPrompt) -> bool:
        """Whether others have the same queries and truths, row for row; those of another layout are not compared."""
        return self.layout != other.layout or all(
            torch.equal(self.region(cell).float().cpu(), other.region(cell).float().cpu())
            for cell in ("query", "output")
        )

    def shown(self) -> dict[str, torch.Tensor]:
        """Canvases with grey output cells, [batch, 3, height, width], and the output cells."""
        canvas = self.canvas.clone()
        crop(canvas, "output", self.layout)[:] = 0.5
        return {"prompt": canvas, "truth": self.region("output")}

    def contents(self, named: bool = True) -> list[set[int]]:
        """Numbers for the pictures of each row: its identifiers, or, if not `named`, of the pictures in its cells, the
        truth included: an input with a hole, or in grey, is found by the answer that belongs to it. Cells of one colour
        are no pictures."""
        if named:
            return super().contents()
        pictures = []
        for canvas in self.canvas.cpu():
            pixels = (crop(canvas, name, self.layout) for name in self.layout.cells)
            pictures.append({digest(p) for p in pixels if (p.amax((1, 2)) > p.amin((1, 2))).any()})
        return pictures

    def region(self, name: str) -> torch.Tensor:
        """Pixels [batch, 3, cell, cell] of a cell, such as "query" or "output" (the truth)."""
        return crop(self.canvas, name, self.layout)

    def check_truth(self) -> None:
        """Refuse prompts without a truth, which white cells are not.

        Raises:
            ValueError: naming what tasks need for it.
        """
        if not self.has_truth:
            raise ValueError('these prompts have no truth to be scored by; give queries with a "mask" or an "answer".')

    def picture(self, most: int = 8) -> Image.Image:
        """The first canvases side by side, patches that the encoder does not see dimmed."""
        hidden = (~self.layout.pixels(self.visible.cpu())).float()
        canvas = self.canvas[:most].float().cpu()
        return _beside(canvas * (1 - 0.6 * hidden) + 0.3 * hidden)

    def __repr__(self) -> str:
        size = self.layout.canvas_size
        return (
            f"VisualPrompt({len(self)} canvases of {size}x{size}, {len(self.visible)} patches visible, "
            f"{len(self.decoded)} decoded, {self.layout.order}, {self.layout.examples} example(s))"
        )

    def _repr_png_(self) -> bytes:
        return png_of(self.picture())


class Canvases(torch.Tensor):
    """Canvases that a model has completed: a tensor [batch, 3, height, width] in [0, 1] like any other, which a
    notebook shows as a picture. What is computed of it, or read from a file that it was written to, is a plain tensor.

    >>> canvases = model.generate(prompts)
    >>> canvases.answer                                  # [batch, 3, cell, cell]
    >>> canvases.picture().save("answers.png")           # `save` itself is nnsight's, as of every value in a trace
    """

    canvas_layout: Layout  # `layout` is an attribute of every tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # operations return plain tensors

    @classmethod
    def of(cls, canvas: torch.Tensor, layout: Layout) -> Canvases:
        """A tensor as canvases of a layout; the memory is shared."""
        canvases = canvas.as_subclass(cls)
        canvases.canvas_layout = layout
        return canvases

    @property
    def answer(self) -> torch.Tensor:
        """What was painted into the output cells: pixels [batch, 3, cell, cell]."""
        return crop(self, "output", self.canvas_layout)

    def picture(self, most: int = 8) -> Image.Image:
        """The first canvases side by side."""
        return _beside(self[:most].float().cpu())

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Canvases({list(self.shape)}, {self.dtype}, {self.device})"  # the values are a picture

    def _repr_png_(self) -> bytes:
        return png_of(self.picture())

    def __deepcopy__(self, memo: dict[int, Any]) -> Canvases:
        return self.of(copy.deepcopy(self.as_subclass(torch.Tensor), memo), self.canvas_layout)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


def as_rows(rows: int | slice | Sequence[int] | torch.Tensor, n: int) -> slice | Sequence[int] | torch.Tensor:
    """An index into a batch of `n` that keeps it a batch: one number, whatever holds it, becomes a list of one."""
    if isinstance(rows, int) or getattr(rows, "ndim", None) == 0:
        return [range(n)[int(rows)]]  # type: ignore[arg-type]
    return rows


def _beside(canvas: torch.Tensor) -> Image.Image:
    """Canvases [batch, 3, height, width] side by side, with white between them."""
    return to_pil(rearrange(F.pad(canvas, (4, 4, 4, 4), value=1.0), "b c h w -> c h (b w)"))


def crop(canvas: torch.Tensor, name: str, layout: Layout) -> torch.Tensor:
    """The pixels [..., cell, cell] of a cell of canvases [..., height, width]."""
    if name not in layout.cells:
        raise ValueError(f"{name!r} is not a cell of this layout; choose one of {', '.join(layout.cells)}.")
    rows, columns = layout.cells[name]
    return canvas[..., rows, columns]


def check_canvas(canvas: torch.Tensor, layout: Layout) -> None:
    """Refuse what are no canvases of a layout: floats [batch, 3, height, width] in [0, 1]."""
    if not isinstance(canvas, torch.Tensor):
        raise TypeError(f"canvas is a {type(canvas).__name__}; expected a float tensor [batch, 3, height, width].")
    size = layout.canvas_size
    if canvas.ndim != 4 or tuple(canvas.shape[1:]) != (3, size, size):
        raise ValueError(f"canvas has shape {tuple(canvas.shape)}; this layout expects [batch, 3, {size}, {size}].")
    if not canvas.is_floating_point():
        raise TypeError(f"canvas is {canvas.dtype}; expected floating point in [0, 1] (divide 8-bit values by 255).")
    if canvas.device.type == "meta" or not len(canvas):
        return
    low, high = (bound.item() for bound in canvas.detach().aminmax())
    if not (low >= 0 and high <= 1):
        content = "NaN" if low != low else f"values from {low:.3g} to {high:.3g}"
        raise ValueError(f"canvas holds {content}; expected pixels in [0, 1], not normalised: the model normalises.")


def check_patches(name: str, ids: torch.Tensor, layout: Layout, rows: int = 0) -> None:
    """Refuse what are no patch ids of a layout: LongTensor [patch], or where there are `rows` [row, patch], too."""
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.long or ids.ndim not in (1, 2 if rows else 1):
        raise TypeError(f"{name} must be a LongTensor [patch] of patch ids.")
    if ids.ndim == 2 and len(ids) != rows:
        raise ValueError(f"{name} has {len(ids)} rows for {rows} canvases; give a row for each.")
    if not ids.numel():
        raise ValueError(f"{name} is empty; the model must see at least one patch.")
    if ids.device.type == "meta":
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= layout.num_patches:
        raise ValueError(f"{name} holds patch ids from {low} to {high}; this grid has 0 to {layout.num_patches - 1}.")
    if (ids.sort(-1).values.diff(dim=-1) == 0).any():
        raise ValueError(f"{name} names a patch twice{' in a row' * (ids.ndim == 2)}; give each patch id once.")
