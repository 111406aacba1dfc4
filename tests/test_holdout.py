"""The prompts of a search that are held out share no picture with those that it trains on."""

import warnings

import pytest
import torch

from vtv_nnsight import VisualPrompt, data, tasks
from vtv_nnsight.layouts import Layout
from vtv_nnsight.search.holdout import split_prompts

LAYOUT = Layout(64, 16)


@pytest.fixture(scope="module")
def scenes():
    return data.scenes("train", n=60, seed=0)


def made_of(pairs, seed=0):
    """Prompts of random pictures: (example, query) by number."""
    pictures = torch.rand(40, 3, LAYOUT.cell_size, LAYOUT.cell_size, generator=torch.Generator().manual_seed(seed))
    cells = [{"example_input": pictures[a], "query": pictures[b]} for a, b in pairs]
    return VisualPrompt.cat([VisualPrompt.from_cells(own, LAYOUT) for own in cells])


def shown(prompts, rows):
    """The pixels of all cells but those of one colour, as bytes."""
    cells = [prompts.canvas[int(i)][:, r, c].contiguous() for i in rows for r, c in prompts.layout.cells.values()]
    return {cell.numpy().tobytes() for cell in cells if (cell.amax((1, 2)) > cell.amin((1, 2))).any()}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("names", [["segmentation"], ["inpainting"], ["segmentation", "colorization", "lowlight"]])
def test_no_picture_is_on_both_sides(scenes, names, known):
    """Not as an example, a query or an answer, of any task; known from the task or seen in the cells."""
    prompts = [tasks.get(name).prompts(scenes, 60, seed, LAYOUT).query_only() for seed, name in enumerate(names)]
    if not known:
        prompts = [VisualPrompt(p.canvas, p.visible, p.decoded, p.layout) for p in prompts]
    with warnings.catch_warnings(record=True):
        parts = split_prompts(prompts, 0.25, seed=3)
    train, held = (set.union(*(shown(p, part[side]) for p, part in zip(prompts, parts))) for side in (0, 1))
    assert not train & held
    for own, (training, held_out) in zip(prompts, parts):
        assert not set(training.tolist()) & set(held_out.tolist())
        assert 8 <= len(held_out) <= 15 and len(training) + len(held_out) <= len(own)
        if own.pictures is not None:
            sources = [set(own.pictures[rows].flatten().tolist()) for rows in (training, held_out)]
            assert not sources[0] & sources[1]
    again = split_prompts(prompts, 0.25, seed=3)
    assert all(torch.equal(a, b) for own, other in zip(parts, again) for a, b in zip(own, other))


def test_prompts_that_hang_together_stay_together():
    prompts = made_of([(0, 1), (1, 2), (3, 4), (5, 6), (6, 7), (8, 9), (10, 11), (12, 13)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(8):
            ((train, held),) = split_prompts([prompts], 0.25, seed)
            assert sorted([*train.tolist(), *held.tolist()]) == list(range(8)) and len(held) == 2
            for pair in ({0, 1}, {3, 4}):
                assert len(pair & set(held.tolist())) in (0, 2)


def test_distinct_pictures_are_split_as_by_version_01():
    prompts = made_of([(2 * i, 2 * i + 1) for i in range(12)])
    ((train, held),) = split_prompts([prompts], 0.25, seed=5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    assert torch.equal(held, order[:3]) and torch.equal(train, order[3:])


def test_a_chain_is_cut_and_what_lies_on_the_cut_is_left_out():
    prompts = made_of([(i, i + 1) for i in range(20)])
    ((train, held),) = split_prompts([prompts], 0.25, seed=0)
    assert len(held) == 5 and 13 <= len(train) <= 14
    assert not shown(prompts, train) & shown(prompts, held)
    star = made_of([(i, (i + 1) % 8) for i in range(8)] + [(i, (i + 3) % 8) for i in range(8)])
    with pytest.warns(UserWarning, match=r"of 16 prompts are left out, as they share pictures"):
        ((train, held),) = split_prompts([star], 0.25, seed=0)
    assert len(held) == 4 and len(train) and not shown(star, train) & shown(star, held)


def test_a_fixed_example_does_not_count():
    prompts = made_of([(0, i) for i in range(1, 13)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((train, held),) = split_prompts([prompts], 0.25, seed=0)
    assert (len(train), len(held)) == (9, 3)


def test_a_prompt_that_shows_no_picture_of_its_own_is_on_one_side():
    prompts = made_of([(0, 0)] * 4 + [(0, i) for i in range(1, 9)])
    ((train, held),) = split_prompts([prompts], 0.25, seed=0)
    assert len(train) and len(held) and not set(train.tolist()) & set(held.tolist())
    with pytest.warns(UserWarning, match="too few pictures to split them"):
        ((train, held),) = split_prompts([made_of([(0, 0)] * 8)], 0.25, seed=0)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(8))


def test_too_few_pictures_are_told():
    prompts = made_of([(0, 1), (1, 2), (2, 0)])
    with pytest.warns(UserWarning, match="too few pictures to split them"):
        ((train, held),) = split_prompts([prompts], 0.25, seed=0)
    assert (len(train), len(held)) == (2, 1)
    with pytest.raises(ValueError, match="1 prompts and held_out=0.25 leave 0 to train on and 1 held out"):
        split_prompts([prompts[:1]], 0.25)
    with pytest.raises(ValueError, match="8 prompts and held_out=1.0 leave 0 to train on and 8 held out"):
        split_prompts([made_of([(2 * i, 2 * i + 1) for i in range(8)])], 1.0)
