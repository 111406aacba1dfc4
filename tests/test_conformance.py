"""`vtv_nnsight.testing.check_model`: the page's own model passes, and models that are broken in one place do not."""

import pytest
import torch
from helpers import import_code, python_blocks
from nnsight import Envoy, NNsight
from nnsight.intervention.batching import Batcher
from nnsight.intervention.envoy import eproperty
from torch import nn
from torch.nn import functional as F

from vtv_nnsight import data, tasks
from vtv_nnsight.layouts import positions
from vtv_nnsight.models.interface import Loss, Stage
from vtv_nnsight.models.nnsight_compat import heads_of
from vtv_nnsight.testing import check_model


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's code of a model of your own: `Network`, `Attention`, `AttentionEnvoy` and `Painter`."""
    torch.manual_seed(0)
    return import_code(python_blocks("docs/your_model.md")[0], tmp_path_factory.mktemp("page") / "your_model.py")


@pytest.fixture(scope="module")
def prompts(page):
    return tasks.segmentation.prompts(data.scenes("train", n=40, seed=0), n=3, layout=page.Painter.layout)


def build(page, network=None, envoy=None, **members):
    """The page's model with other parts."""
    torch.manual_seed(0)
    envoys = {page.Attention: envoy or page.AttentionEnvoy}

    def start(self):
        NNsight.__init__(self, (network or page.Network)(self.layout), envoys=envoys)

    return type("Broken", (page.Painter,), {"__init__": start, **members})()


def fails(model, prompts, words):
    with pytest.raises(AssertionError, match=words):
        check_model(model, prompts)


def test_the_model_of_the_page_passes(page, prompts):
    check_model(build(page), prompts)
    with pytest.raises(ValueError, match="check_model was given 1 prompt; give two or more"):
        check_model(build(page), prompts[:1])


def test_positions_that_are_not_the_tokens(page, prompts):
    def with_cls(self, stage, prompts=None):
        return positions(self.inputs[0][2] if prompts is None else prompts.decoded)

    def twice(self, stage, prompts=None):
        return page.Painter.positions(self, stage, prompts) // 2

    def by_row(self, stage, prompts=None):
        return page.Painter.positions(self, stage, prompts).flip(0 if prompts is None else ())

    fails(build(page, positions=with_cls), prompts, r"layers, layer 0: heads have shape \[3, 64, 4, 16\]; .* 65")
    fails(build(page, positions=twice), prompts, "layers: positions are not different numbers from 0 to 64")
    fails(build(page, positions=by_row), prompts, "layers: positions differ inside and outside a trace")


def test_a_stage_of_other_heads(page, prompts):
    stages = (Stage("layers", layers=4, heads=2, head_dim=32),)
    fails(
        build(page, stages=stages), prompts, r"layer 0: heads have shape .* 4, 16\]; its stage and positions say .* 2"
    )


def test_units_that_zero_shot_prompts_do_not_show(page, prompts):
    def groups(self, stage, granularity, layout=None):
        units = page.Painter.groups(self, stage, granularity, layout)
        return units | {"example": torch.tensor([1])} if granularity == "quadrant" else units

    fails(build(page, groups=groups), prompts, "layers: the quadrant 'example' has positions that zero-shot")


def test_heads_that_are_something_else(page, prompts):
    class Queries(Envoy):
        heads = heads_of("qkv")

    class Doubled(Envoy):
        @eproperty(key="proj.input")
        def heads(self, value):
            return 2 * value[0][0].unflatten(-1, (4, 16))

        @heads.postprocess
        def heads(self, value):
            return (value.flatten(-2) / 2,), {}

    class Flipped(Envoy):
        @eproperty(key="proj.input")
        def heads(self, value):
            return value[0][0].unflatten(-1, (4, 16)).flip(-2)

        @heads.postprocess
        def heads(self, value):
            return (value.flip(-2).flatten(-2),), {}

    fails(build(page, envoy=Flipped), prompts, "layers, layer 0: capture gives other values than its heads")
    fails(build(page, envoy=Queries), prompts, "layers, layer 0: twice the heads do not add twice as much")
    fails(build(page, envoy=Doubled), prompts, "layers, layer 0: heads are not what any module of its attention is")


def test_writes_that_go_nowhere_or_elsewhere(page, prompts):
    class Lost(Envoy):
        @eproperty(key="proj.input")
        def heads(self, value):
            self.kept = value
            return value[0][0].unflatten(-1, (4, 16))

        @heads.postprocess
        def heads(self, value):
            return self.kept

    class Swapped(Envoy):
        heads = heads_of("proj")

        @heads.postprocess
        def heads(self, value):
            return (value.flip(-2).flatten(-2),), {}

    fails(build(page, envoy=Lost), prompts, "layers, layer 0: the output stays as it is when all heads are set to zero")
    fails(build(page, envoy=Swapped), prompts, "layers, layer 0: writing what was read changes the output")


def test_a_sum_that_is_not_the_stream(page, prompts):
    class Layer(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention, self.mlp = attention, nn.Linear(64, 64)

        def forward(self, x):
            x = x + self.attention(F.layer_norm(x, x.shape[-1:]))
            return x + self.mlp(F.layer_norm(x, x.shape[-1:]))

    class Network(page.Network):
        def __init__(self, layout):
            super().__init__(layout)
            self.blocks = nn.ModuleList(map(Layer, self.layers))

        def forward(self, canvas, visible, decoded):
            x = self.embed(page.cut(canvas, self.layout)[:, decoded])
            x = torch.where(torch.isin(decoded, visible)[:, None], x, self.mask_token) + self.pos_embed[decoded]
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    def attention(self, stage, layer):
        return self.blocks[layer].attention

    def outputs(self, stage, layer, mlp="mlp"):
        block = self.blocks[layer]
        return {"attn": block.attention, "mlp": getattr(block, mlp), "residual": block}

    def wrong(self, stage, layer):
        return outputs(self, stage, layer, mlp="attention" if layer == 2 else "mlp")

    check_model(build(page, Network, attention=attention, outputs=outputs), prompts)
    model = build(page, Network, attention=attention, outputs=wrong)
    fails(model, prompts, "layers, layer 2: residual is not the layer's input plus its attn and its mlp")


def test_rows_that_look_at_each_other(page, prompts):
    class Network(page.Network):
        def forward(self, canvas, visible, decoded):
            return super().forward(canvas, visible, decoded) + canvas.mean()

    fails(build(page, Network), prompts, "the outputs of two invokes are not those of their prompts alone")

    class Careless(Batcher):
        def _widen_tensor(self, full, group, edited):
            return edited.mean(0, keepdim=True).expand_as(full)

    fails(build(page, _batcher_class=Careless), prompts, "an edit of its heads in one invoke changes the output")


def test_hidden_patches_that_are_looked_at(page, prompts):
    class Truth(page.Network):
        def forward(self, canvas, visible, decoded):
            return super().forward(canvas, visible, decoded) + canvas.mean((1, 2, 3))[:, None, None]

    class Example(page.Network):
        def forward(self, canvas, visible, decoded):
            return super().forward(canvas, visible, decoded) + canvas[:, :, :32].mean((1, 2, 3))[:, None, None]

    fails(build(page, Truth), prompts, "the output of one-shot prompts depends on the truth, which they hide")
    fails(build(page, Example), prompts, "the output of zero-shot prompts depends on their examples")


def test_answers_that_are_no_pictures(page, prompts):
    def paint(self, output, prompts):
        return page.Painter.paint(self, output, prompts) - 0.5

    def mean(output, prompts, truth):
        return page.squared_error(output, prompts, truth).mean()

    def restrict(self, prompts):
        self.output[:] = 0
        return prompts

    fails(build(page, paint=paint), prompts, r"paint gives \[3, 3, 64, 64\] from -0.5 to .* in \[0, 1\]")
    fails(build(page, losses=(Loss("mean", mean),)), prompts, "loss 'mean' is not a finite number for each prompt")
    fails(build(page, restrict_to_output=restrict), prompts, "'squared error' differs when restrict_to_output leaves")


def test_gradients_that_stop_or_lie(page, prompts):
    class Stopped(page.Network):
        def forward(self, canvas, visible, decoded):
            x = self.embed(page.cut(canvas, self.layout)[:, decoded])
            x = torch.where(torch.isin(decoded, visible)[:, None], x, self.mask_token) + self.pos_embed[decoded]
            for layer, attention in enumerate(self.layers):
                x = x + attention(F.layer_norm(x, x.shape[-1:]))
                x = x.detach() if layer == 1 else x
            return self.head(x)

    def scaled(output, prompts, truth):
        value = page.squared_error(output, prompts, truth)
        return 3 * value - 2 * value.detach()

    fails(build(page, Stopped), prompts, "layers, layer 0: no gradient of loss 'squared error' reaches its heads")
    fails(build(page, losses=(Loss("scaled", scaled),)), prompts, "layers: the loss rises by .* which says")


def test_a_model_without_stages_is_checked_for_the_rest(page, prompts):
    class Network(page.Network):
        def forward(self, canvas, visible, decoded):
            return super().forward(canvas, visible, decoded) + canvas.mean((1, 2, 3))[:, None, None]

    check_model(build(page, stages=()), prompts)
    fails(build(page, Network, stages=()), prompts, "the output of one-shot prompts depends on the truth")
