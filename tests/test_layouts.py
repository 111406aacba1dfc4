import pytest
import torch

from vtv_nnsight.layouts import Layout, decoder_sources, positions, take, tile

GRID = torch.arange(196).view(14, 14)


def test_the_published_cells_leave_a_cross_of_two_pixels():
    first, second = slice(0, 111), slice(113, 224)
    assert Layout().cells == {
        "example_input": (first, first),
        "example_output": (first, second),
        "query": (second, first),
        "output": (second, second),
    }


def test_the_published_regions_are_quarters_of_the_grid():
    expected = {
        "example_input": GRID[:7, :7],
        "example_output": GRID[:7, 7:],
        "query": GRID[7:, :7],
        "output": GRID[7:, 7:],
    }
    regions = Layout().regions
    assert list(regions) == list(expected)
    for name, ids in expected.items():
        assert torch.equal(regions[name], ids.flatten()), name


def test_what_the_stacks_see():
    layout = Layout()
    assert len(layout.visible) == 147 and layout.num_positions == 197
    assert not torch.isin(layout.visible, layout.regions["output"]).any()
    assert torch.equal(layout.visible, layout.visible.sort().values)
    assert torch.equal(layout.query_band, GRID[7:].flatten())
    assert torch.equal(Layout(order="horizontal").query_band, GRID[:, 7:].flatten())


@pytest.mark.parametrize("examples", [1, 2, 3])
def test_horizontal_order_is_the_transpose(examples):
    upright, flipped = Layout(examples=examples), Layout(examples=examples, order="horizontal")
    assert {name: (columns, rows) for name, (rows, columns) in upright.cells.items()} == flipped.cells


def test_several_examples_are_numbered_and_do_not_overlap():
    layout = Layout(examples=2)
    assert layout.cell_size == 74
    assert list(layout.cells)[:4] == ["example_input_1", "example_output_1", "example_input_2", "example_output_2"]
    covered = torch.zeros(224, 224)
    for rows, columns in layout.cells.values():
        assert rows.stop - rows.start == columns.stop - columns.start == 74
        covered[rows, columns] += 1
    assert covered.max() == 1 and covered.sum() == 6 * 74 * 74


def test_the_output_of_three_rows_lies_in_the_patches_that_it_touches():
    rows, columns = Layout(examples=2).cells["output"]
    assert (rows.start, columns.start) == (150, 113)
    assert torch.equal(Layout(examples=2).regions["output"], GRID[9:, 7:12].flatten())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"order": "diagonal"}, "diagonal.*vertical, horizontal"),
        ({"examples": 0}, "examples=0"),
        ({"patch_size": 15}, "224 is not a multiple of patch_size=15"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"examples": 20}, "smaller than a patch"),
        ({"gap": -1}, "gap=-1"),
        ({"gap": 200}, "examples=1 leaves cells of 12 pixels, smaller than a patch"),
    ],
)
def test_impossible_layouts_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Layout(**wrong)


@pytest.mark.parametrize("wrong", [{"examples": 1.5}, {"gap": float("nan")}, {"gap": (1, 2.5)}, {"canvas_size": "224"}])
def test_counts_of_a_layout_are_whole(wrong):
    with pytest.raises(TypeError, match=f"{next(iter(wrong))}=.* is no whole number"):
        Layout(**wrong)


@pytest.mark.parametrize("order", ["vertical", "horizontal"])
def test_without_a_gap_the_cells_and_regions_are_quarters(order):
    """Painter's two pictures of 896x448, side by side: each is two square cells, one upon the other."""
    layout = Layout(canvas_size=896, patch_size=16, gap=0, order=order)
    first, second = slice(0, 448), slice(448, 896)
    below, beside = ("query", "example_output") if order == "vertical" else ("example_output", "query")
    assert layout.cells == {
        "example_input": (first, first),
        below: (second, first),
        beside: (first, second),
        "output": (second, second),
    }
    grid = torch.arange(56 * 56).view(56, 56)
    expected = {
        "example_input": grid[:28, :28],
        below: grid[28:, :28],
        beside: grid[:28, 28:],
        "output": grid[28:, 28:],
    }
    for name, ids in expected.items():
        assert torch.equal(layout.regions[name], ids.flatten()), name
    assert len(torch.cat(list(layout.regions.values())).unique()) == layout.num_patches


def test_without_a_gap_three_rows_touch():
    cells = Layout(canvas_size=240, patch_size=8, examples=2, gap=0).cells
    assert [(rows.start, columns.start) for rows, columns in cells.values()] == [
        (row, column) for row in (0, 80, 160) for column in (40, 120)
    ]
    assert {rows.stop - rows.start for rows, _ in cells.values()} == {80}


@pytest.mark.parametrize(("examples", "gap"), [(1, 2), (2, 1), (3, 1)])
def test_no_gap_given_is_the_papers(examples, gap):
    default = Layout(examples=examples)
    assert default.gap is None and default.gutter == gap
    assert default.cells == Layout(examples=examples, gap=gap).cells


def test_an_index_is_the_rank_plus_one():
    layout = Layout()
    seen = layout.regions["query"]
    assert layout.index(seen, seen[[0, 5, 48]]).tolist() == [1, 6, 49]
    assert layout.index(torch.tensor([30, 10, 20]), torch.tensor([10, 30])).tolist() == [2, 1]
    with pytest.raises(ValueError, match=r"\[3\] are not among the 49"):
        layout.index(seen, torch.tensor([98, 3]))


def test_positions_are_cls_and_patches():
    assert positions(torch.tensor([4, 2])).tolist() == [0, 5, 3]
    assert positions(torch.tensor([[4], [7]])).tolist() == [[0, 5], [0, 8]]


def test_take_with_one_index_a_row():
    tokens = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(take(tokens, torch.tensor([2, 0])), tokens[:, [2, 0]])
    by_row = take(tokens, torch.tensor([[2, 0], [1, 1]]))
    assert torch.equal(by_row, torch.stack([tokens[0, [2, 0]], tokens[1, [1, 1]]]))


def test_decoder_sources_point_at_visible_tokens_and_else_at_the_mask_token():
    assert decoder_sources(torch.tensor([8, 3]), torch.tensor([3, 5, 8])).tolist() == [0, 2, 3, 1]


def test_tile_repeats_the_bottom_half_as_the_top_half():
    half = tile(GRID[7:].flatten(), 14).view(14, 14)
    assert torch.equal(half[:7], half[7:]) and torch.equal(half[7:].flatten(), torch.arange(98))
    right = tile(GRID[:, 7:].flatten(), 14).view(14, 14)
    assert torch.equal(right[:, :7], right[:, 7:]) and torch.equal(right[:, 7:].flatten(), torch.arange(98))
    shuffled = torch.randperm(196, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shuffled[tile(shuffled, 14)], torch.arange(196))


@pytest.mark.parametrize("decoded", [[0, 1, 14], [0, 0]])
def test_tile_refuses_what_is_not_a_block(decoded):
    with pytest.raises(ValueError, match="do not fill a block"):
        tile(torch.tensor(decoded), 14)
