"""Where things lie on a canvas: cells in pixels, regions in patches, tokens in a stage.

A visual prompt is a grid of cells: each example shows an input beside its output, and the query stands beside the
output to be painted (*Visual Prompting via Image Inpainting*, NeurIPS 2022, §3; below *VP*). The transformer sees the
canvas as square patches, numbered row by row. Every fact about that geometry lives in this module:

    >>> layout = Layout()                       # the published 2x2 grid on 224 pixels
    >>> layout.cells["output"]
    (slice(113, 224, None), slice(113, 224, None))
    >>> layout.regions["output"][:3]
    tensor([105, 106, 107])

Positions are absolute. Position 0 is the CLS token and position 1 + i is patch i, whichever patches a stage sees and in
whatever order it sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from einops import rearrange, repeat
from PIL import ImageColor

from vtv_nnsight.finite import check_whole
from vtv_nnsight.text import check_choice

ORDERS = ("vertical", "horizontal")
CLS = 0
"""The absolute position of the CLS token."""


@dataclass(frozen=True)
class Layout:
    """A grid of `examples` + 1 rows of an input and an output cell, on a square canvas cut into square patches.

    Args:
        canvas_size: Side of the canvas in pixels.
        patch_size: Side of a patch in pixels.
        examples: Number of solved examples before the query.
        order: "vertical" stacks examples from top to bottom, inputs on the left (the papers' default); "horizontal" is
            its transpose: inputs on top, outputs below (the papers' *flip*, VP §4.4).
        background: Colour of the canvas between and beside the cells, in any form that PIL knows.
        gap: Pixels between neighbouring cells. None is VP's: 2 on the 2x2 grid, 1 on larger ones (§4.3). Painter and
            SegGPT have 0: each of their two pictures is a column of square cells that touch. Two numbers are those
            between a pair and the next, and between an input and its output.

    Raises:
        ValueError: when the patches do not tile the canvas, the gap is negative, or the cells are smaller than a patch.
    """

    canvas_size: int = 224
    patch_size: int = 16
    examples: int = 1
    order: str = "vertical"
    background: str = "white"
    gap: int | tuple[int, int] | None = None
    MODEL_FACTS: ClassVar[tuple[str, ...]] = ("canvas_size", "patch_size")
    """What of it belongs to the model."""
    REGION: ClassVar[str] = "quadrant"
    """What units of granularity "quadrant" are by."""

    def __post_init__(self) -> None:
        if isinstance(self.gap, list):
            object.__setattr__(self, "gap", tuple(self.gap))
        check_whole(canvas_size=self.canvas_size, patch_size=self.patch_size, examples=self.examples)
        check_choice(ORDERS, order=self.order)
        if self.examples < 1:
            raise ValueError(f"examples={self.examples} leaves nothing to learn from; a layout needs 1 or more.")
        if self.patch_size < 1 or self.canvas_size < 1 or self.canvas_size % self.patch_size:
            raise ValueError(f"canvas_size={self.canvas_size} is not a multiple of patch_size={self.patch_size}.")
        for gap in self.gutters:
            check_whole(gap=gap)
        if min(self.gutters) < 0:
            raise ValueError(f"gap={self.gap} is negative; give the pixels between cells, 0 or more.")
        if self.cell_size < self.patch_size:
            raise ValueError(f"examples={self.examples} leaves cells of {self.cell_size} pixels, smaller than a patch.")
        if (left := self._columns[0]) < 0:
            raise ValueError(f"gap={self.gap} puts inputs {-left} pixels beyond the canvas's edge; give fewer pixels.")
        ImageColor.getrgb(self.background)

    @property
    def grid(self) -> int:
        """Patches along a side of the canvas."""
        return self.canvas_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of the canvas."""
        return self.grid**2

    @property
    def num_positions(self) -> int:
        """CLS and every patch."""
        return 1 + self.num_patches

    @property
    def gutters(self) -> tuple[int, int]:
        """Pixels between a pair and the next, and between an input and its output: `gap`, or what None stands for."""
        if self.gap is None:
            return (2, 2) if self.examples == 1 else (1, 1)
        return self.gap if isinstance(self.gap, tuple) else (self.gap, self.gap)

    @property
    def gutter(self) -> int:
        """Pixels between a pair and the next."""
        return self.gutters[0]

    @property
    def cell_size(self) -> int:
        """Side of a cell in pixels: 111 on the published canvas, 74 with two examples."""
        return (self.canvas_size - self.gutter * self.examples) // (self.examples + 1)

    @property
    def _columns(self) -> tuple[int, int]:
        """Where inputs and outputs begin, across the canvas."""
        outputs = self.canvas_size // 2 + (self.gutter + 1) // 2
        return outputs - self.gutters[1] - self.cell_size, outputs

    @cached_property
    def cells(self) -> dict[str, tuple[slice, slice]]:
        """Name of each cell → (row slice, column slice) in pixels: outputs begin half a gap, rounded up, past the
        canvas's middle."""
        across = self._columns
        cells = {}
        for pair in range(self.examples + 1):
            number = f"_{pair + 1}" if self.examples > 1 else ""
            names = (
                ("query", "output") if pair == self.examples else (f"example_input{number}", f"example_output{number}")
            )
            along = pair * (self.cell_size + self.gutter)
            for name, offset in zip(names, across):
                row, column = (along, offset) if self.order == "vertical" else (offset, along)
                cells[name] = (slice(row, row + self.cell_size), slice(column, column + self.cell_size))
        return cells

    @cached_property
    def regions(self) -> dict[str, torch.Tensor]:
        """Name of each cell → LongTensor of the patches that it touches, in row-major order."""
        return {name: self._patches(rows, columns) for name, (rows, columns) in self.cells.items()}

    @cached_property
    def disjoint_regions(self) -> dict[str, torch.Tensor]:
        """Every patch of the canvas in one region: those of `regions`, what two cells touch being the later one's (as
        happens where cells are not whole patches high), and "background" for what no cell touches, if there is any."""
        seen, regions = torch.tensor([], dtype=torch.long), {}
        for name, patches in reversed(({"background": self.all_patches} | self.regions).items()):
            regions[name] = patches[~torch.isin(patches, seen)]
            seen = torch.cat([seen, patches])
        return {name: patches for name, patches in reversed(regions.items()) if len(patches)}

    @property
    def canvas_colour(self) -> tuple[float, float, float]:
        """The background as RGB in [0, 1]."""
        red, green, blue, *_ = ImageColor.getrgb(self.background)
        return red / 255, green / 255, blue / 255

    @cached_property
    def all_patches(self) -> torch.Tensor:
        """The ids of all patches in row-major order: LongTensor [patch]."""
        return torch.arange(self.num_patches)

    @cached_property
    def visible(self) -> torch.Tensor:
        """What the encoder sees one-shot: all patches but those of the output."""
        return self.all_patches[~torch.isin(self.all_patches, self.regions["output"])]

    @cached_property
    def query_band(self) -> torch.Tensor:
        """What the decoder sees zero-shot: the whole rows (columns, when horizontal) of the query and the output
        (*Finding Visual Task Vectors*, ECCV 2024, §4)."""
        rows, columns = self.cells["query"]
        whole = slice(0, self.canvas_size)
        return self._patches(rows, whole) if self.order == "vertical" else self._patches(whole, columns)

    def index(self, seen: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Token indices, in a stage that sees CLS and the patches `seen` in that order, of some of those `patches`.

        Raises:
            ValueError: when a patch is not among those seen.
        """
        present = torch.isin(patches, seen.to(patches.device))
        if not present.all():
            absent = patches[~present].tolist()
            raise ValueError(f"patches {absent} are not among the {len(seen)} patches that this stage sees.")
        return 1 + index_of(seen, patches)

    def on_grid(self, values: torch.Tensor) -> torch.Tensor:
        """One value for each position → those of the patches where they lie: [..., position] → [..., row, column]."""
        return rearrange(values[..., 1:], "... (row column) -> ... row column", row=self.grid)

    def shares(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sums over the positions of CLS and of each of `disjoint_regions`: [..., position] → name → [...]. NaN counts
        as nothing."""
        return {name: values[..., places].nansum(-1) for name, places in named_positions(self.disjoint_regions).items()}

    @property
    def places(self) -> dict[str, torch.Tensor]:
        """Positions of "cls" and of each cell, for people."""
        return named_positions(self.regions)

    @staticmethod
    def place_names(places: torch.Tensor) -> list[str]:
        """Absolute positions [position] by name: "cls", or "patch 98"."""
        return ["cls" if place == CLS else f"patch {place - 1}" for place in places.tolist()]

    def pixels(self, patches: torch.Tensor) -> torch.Tensor:
        """Which pixels some patches cover: LongTensor [patch] → bool [height, width]."""
        covered = torch.zeros(self.num_patches, dtype=torch.bool, device=patches.device).index_fill(0, patches, True)
        side = self.patch_size
        return repeat(covered.view(self.grid, self.grid), "h w -> (h p) (w q)", p=side, q=side)

    def _patches(self, rows: slice, columns: slice) -> torch.Tensor:
        ids = torch.arange(self.num_patches).view(self.grid, self.grid)
        first, last = rows.start // self.patch_size, (rows.stop - 1) // self.patch_size
        left, right = columns.start // self.patch_size, (columns.stop - 1) // self.patch_size
        return ids[first : last + 1, left : right + 1].flatten()


def positions(seen: torch.Tensor) -> torch.Tensor:
    """Absolute positions of the tokens of a stage that sees CLS and the patches `seen`: [..., patch] → [..., token]."""
    return torch.cat([torch.full_like(seen[..., :1], CLS), 1 + seen], dim=-1)


def named_positions(patches: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Absolute positions of "cls" and of the patches of each name, such as `Layout.regions`: LongTensor [position]."""
    return {"cls": torch.tensor([CLS])} | {name: positions(ids)[1:] for name, ids in patches.items()}


def index_of(seen: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Where some patches stand among those seen, in their order: LongTensor [patch], in which the first is 0. That they
    are among them is not looked at, which would wait for a GPU (`Layout.index` looks)."""
    return (patches[:, None] == seen.to(patches.device)[None, :]).int().argmax(1)


def take(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Select tokens [batch, token, ...] by an index shared by the batch [n] or one a row [batch, n]."""
    if index.ndim == 1:
        return tokens.index_select(1, index)
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[-1]))


def decoder_sources(visible: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """Where the decoder takes each of its tokens from, in the sequence [CLS, visible patches…, mask token].

    Args:
        visible: [..., visible patch] ids in the encoder's order.
        decoded: [..., decoded patch] ids.

    Returns:
        LongTensor [..., 1 + decoded patch].
    """
    matches = decoded[..., :, None] == visible[..., None, :]
    sources = 1 + matches.int().argmax(-1)
    mask_token = torch.full_like(sources, 1 + visible.shape[-1])
    patches = torch.where(matches.any(-1), sources, mask_token)
    return torch.cat([torch.zeros_like(patches[..., :1]), patches], dim=-1)


def tile(decoded: torch.Tensor, grid: int) -> torch.Tensor:
    """For every patch of the grid, the index of the decoded patch that stands for it.

    A patch that was decoded stands for itself. When only a block of rows and columns was decoded, it is repeated
    periodically: zero-shot, the bottom half is repeated as the top half before the VQGAN (ECCV 2024, released code).

    Args:
        decoded: LongTensor [decoded patch].
        grid: Patches along a side.

    Returns:
        LongTensor [grid * grid].

    Raises:
        ValueError: when the decoded patches are not a block of whole rows and columns.
    """
    rows, columns = torch.unique(decoded // grid), torch.unique(decoded % grid)
    if len(rows) * len(columns) != len(decoded) or len(torch.unique(decoded)) != len(decoded):
        raise ValueError(f"the {len(decoded)} decoded patches do not fill a block; decode whole rows or columns.")
    index = torch.empty(grid * grid, dtype=torch.long, device=decoded.device)
    index[decoded] = torch.arange(len(decoded), device=decoded.device)
    every = torch.arange(grid, device=decoded.device)
    row = rows[(every - rows[0]) % len(rows)]
    column = columns[(every - columns[0]) % len(columns)]
    return index[(row[:, None] * grid + column[None, :]).flatten()]
