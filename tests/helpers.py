"""What several test modules build: small models with random weights, prompts for them, and their activations read by
hand. Fixtures are in conftest.py."""

import importlib.util
import re
from collections import OrderedDict
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import (
    BeitConfig,
    BeitForMaskedImageModeling,
    PreTrainedTokenizerFast,
    SegGptConfig,
    SegGptForImageSegmentation,
    ViTMAEConfig,
)

from vtv_nnsight import MAEVQGAN, Layout, VisualPrompt
from vtv_nnsight.models.interface import ByStage
from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig, MAEVQGANModel
from vtv_nnsight.models.mae_vqgan.vqgan import VQGAN
from vtv_nnsight.report import page
from vtv_nnsight.report.explorer import demonstrate
from vtv_nnsight.runs import pipeline

DATA = Path(__file__).parent / "data"
"""Golden numbers and the pictures they are of."""
ROOT = Path(__file__).parents[1]

SIZES = dict(vocab_size=110, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, bos_token_id=1, eos_token_id=2)
GROUPED = SIZES | dict(num_key_value_heads=2, intermediate_size=48)
"""Of tiny language models: with as many keys and values as heads, and with fewer."""


def python_blocks(page):
    """The Python blocks of a page, such as "docs/your_model.md"."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def import_code(code, path):
    """Code as a module, in a file that is written: nnsight reads the source of what it traces."""
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(out, settings, **options):
    """`runs.run` with the report's steps → the report's path."""
    steps = {"explore": demonstrate, "report": lambda folder: page.write(folder)}
    return pipeline.run(out, settings, **steps, **options) / "report.html"


def make_config(**sizes):
    """A config that is quick to build: a canvas of 64, patches of 16."""
    small = dict(
        image_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        num_codes=24,
        code_dim=8,
        vqgan_z_channels=8,
        vqgan_channels=32,
        vqgan_channel_multipliers=(1, 1, 2),
        vqgan_num_res_blocks=1,
        vqgan_attention_levels=(2,),
        vqgan_fold=4,
    )
    return MAEVQGANConfig(**small | sizes)


FINE = dict(
    image_size=112,
    patch_size=8,
    num_hidden_layers=3,
    decoder_num_hidden_layers=2,
    num_codes=64,
    vqgan_channel_multipliers=(1, 1, 1),
    vqgan_fold=2,
)
"""Of `make_config`: the published grid of 14x14 patches, on a canvas of 112."""

LAYOUT = Layout(112, 8)
FAST = dict(vqgan_fold=4, vqgan_channel_multipliers=(1, 1), vqgan_attention_levels=())
"""Sizes of a tokenizer that draws quickly."""


def random_module(seed=0, **sizes):
    """A small model with weights large enough for every edit to show in the logits."""
    torch.manual_seed(seed)
    module = MAEVQGANModel(make_config(**FINE | sizes)).eval()
    for parameter in module.parameters():
        if parameter.ndim < 2:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def random_prompts(n, seed=0, layout=LAYOUT):
    shape = (n, 3, layout.canvas_size, layout.canvas_size)
    return VisualPrompt.from_canvas(torch.rand(shape, generator=torch.Generator().manual_seed(seed)), layout)


def all_heads(model, prompts):
    """Every head's activation, without task vectors' code: by stage [layer, prompt, token, head, head_dim]."""
    with torch.no_grad(), model.trace(prompts):
        encoder = [block.attn.heads.clone() for block in model.encoder.blocks].save()
        decoder = [block.attn.heads.clone() for block in model.decoder.blocks].save()
    return ByStage(encoder=torch.stack(encoder), decoder=torch.stack(decoder))


def logits_of(model, *inputs):
    with torch.no_grad(), model.trace(*inputs):
        logits = model.output.logits.save()
    return logits


def vit_mae_config(**more):
    """Sizes of a ViTMAE that is quick to build: a canvas of 64, patches of 16."""
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=64)
    decoder = dict(decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    return ViTMAEConfig(**sizes, **decoder, decoder_intermediate_size=16, patch_size=16, **more)


def small_painter(types):
    """A network that is quick to run; SegGPT's if it has type tokens, else Painter's."""
    torch.manual_seed(0)
    config = SegGptConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=(64, 32),
        patch_size=8,
        pretrain_image_size=32,
        decoder_hidden_size=8,
        merge_index=1,
        intermediate_hidden_state_indices=[1, 3],
        initializer_range=0.3,
    )
    module = SegGptForImageSegmentation(config)
    if not types:
        for token in (module.model.embeddings.type_token_semantic, module.model.embeddings.type_token_instance):
            token.data.zero_()
    return module


DALLE_CODES = 32


class Conv(nn.Module):
    """A convolution with parameters called as in the published files."""

    def __init__(self, a, b, size):
        super().__init__()
        self.w = nn.Parameter(torch.randn(b, a, size, size) / (a * size**2) ** 0.5, requires_grad=False)
        self.b = nn.Parameter(0.1 * torch.randn(b), requires_grad=False)

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    def __init__(self, a, b, sizes):
        super().__init__()
        h = b // 4
        self.post_gain = 1 / 64
        self.id_path = Conv(a, b, 1) if a != b else nn.Identity()
        parts = []
        for i, (size, x, y) in enumerate(zip(sizes, (a, h, h, h), (h, h, h, b)), 1):
            parts += [(f"relu_{i}", nn.ReLU()), (f"conv_{i}", Conv(x, y, size))]
        self.res_path = nn.Sequential(OrderedDict(parts))

    def forward(self, x):
        return self.id_path(x) + self.post_gain * self.res_path(x)


class Part(nn.Module):
    """The published encoder or decoder: `blocks` of an input, four groups of two blocks, and an output."""

    def __init__(self, first, widths, sizes, between, last):
        super().__init__()
        parts = [("input", first)]
        for i, (a, b) in enumerate(zip(widths, widths[1:]), 1):
            group = [("block_1", Block(a, b, sizes)), ("block_2", Block(b, b, sizes))]
            parts.append((f"group_{i}", nn.Sequential(OrderedDict(group + ([between] if i < 4 else [])))))
        parts.append(("output", nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=last))))
        self.blocks = nn.Sequential(OrderedDict(parts))

    def forward(self, x):
        return self.blocks(x)


def beit_config(**more):
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=64)
    shared = dict(use_mask_token=True, use_shared_relative_position_bias=True)
    return BeitConfig(**{**sizes, **shared, "patch_size": 16, "vocab_size": DALLE_CODES, **more})


def beit_module(**more):
    """transformers' own model, of which every weight shows."""
    torch.manual_seed(0)
    module = BeitForMaskedImageModeling(beit_config(**more)).eval()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


GPT_CODES, GPT_WIDTH, GPT_HEADS, GPT_LAYERS, GPT_LENGTH = 16, 16, 2, 2, 64

VQGAN_SIZES = dict(
    image_size=32, patch_size=4, num_codes=GPT_CODES, code_dim=8, vqgan_z_channels=8, vqgan_channels=32,
    vqgan_channel_multipliers=(1, 1, 1), vqgan_num_res_blocks=1, vqgan_attention_levels=(2,),
)  # fmt: skip


def net2net_weights(codes=GPT_CODES, length=GPT_LENGTH):
    """A published state dict: the transformer with its causal masks, the VQGAN with the losses it was trained with."""
    torch.manual_seed(0)
    linear = {"attn.key": (1, 1), "attn.query": (1, 1), "attn.value": (1, 1), "attn.proj": (1, 1)}
    linear |= {"mlp.0": (4, 1), "mlp.2": (1, 4)}
    state = {"tok_emb.weight": torch.randn(codes, GPT_WIDTH), "pos_emb": torch.randn(1, length, GPT_WIDTH)}
    for i in range(GPT_LAYERS):
        for name, (out, into) in linear.items():
            state[f"blocks.{i}.{name}.weight"] = (
                torch.randn(out * GPT_WIDTH, into * GPT_WIDTH) / (into * GPT_WIDTH) ** 0.5
            )
            state[f"blocks.{i}.{name}.bias"] = 0.3 * torch.randn(out * GPT_WIDTH)
        state[f"blocks.{i}.attn.mask"] = torch.ones(1, 1, length, length).tril()
        state |= {f"blocks.{i}.{n}.weight": 1 + 0.3 * torch.randn(GPT_WIDTH) for n in ("ln1", "ln2")}
        state |= {f"blocks.{i}.{n}.bias": 0.3 * torch.randn(GPT_WIDTH) for n in ("ln1", "ln2")}
    state |= {"ln_f.weight": torch.ones(GPT_WIDTH), "ln_f.bias": torch.zeros(GPT_WIDTH)}
    state |= {"head.weight": 3 * torch.randn(codes, GPT_WIDTH) / GPT_WIDTH**0.5}
    vqgan = VQGAN(MAEVQGANConfig(**VQGAN_SIZES))
    vqgan.codebook.weight.data = 0.3 * torch.randn(GPT_CODES, 8)
    first = {name.replace("codebook", "quantize.embedding"): value for name, value in vqgan.state_dict().items()}
    first["loss.discriminator.main.0.weight"] = torch.zeros(2, 2)
    return {f"transformer.{n}": v for n, v in state.items()} | {f"first_stage_model.{n}": v for n, v in first.items()}


VOC_SIZE = (48, 36)


def label_map(*boxes, border=None):
    """A mask with a palette: boxes of (class from 1, left, top, right, bottom)."""
    image = Image.new("P", VOC_SIZE)
    image.putpalette([value for colour in range(256) for value in (colour, 255 - colour, 7)])
    for value, *box in boxes:
        image.paste(value, tuple(box))
    if border:
        image.paste(255, border)
    return image


VOC_MAPS = {  # "b…" are VOC's val
    "a1": label_map((1, 2, 2, 20, 20), border=(2, 2, 20, 4)),
    "a2": label_map((1, 5, 5, 30, 30), (2, 31, 5, 40, 30)),
    "a3": label_map((2, 0, 0, 24, 36), (15, 24, 0, 48, 36)),
    "b1": label_map((1, 0, 0, 24, 36)),
    "b2": label_map((1, 8, 0, 24, 36)),
    "b3": label_map((6, 8, 0, 24, 36)),
}
VOC_OBJECTS = {
    "a1": [("cat", 1, 1, 24, 18)],
    "a2": [("cat", 3, 5, 26, 30), ("dog", 1, 1, 4, 4)],
    "a3": [("cat", 9, 5, 26, 30)],
    "b1": [("dog", 1, 1, 48, 36)],
    "b2": [],
    "b3": [("dog", 2, 3, 21, 33)],
}


def annotation(objects):
    text = "".join(
        f"<object><name>{name}</name><bndbox><xmax>{x1}</xmax><xmin>{x0}</xmin><ymin>{y0}</ymin><ymax>{y1}</ymax>"
        "</bndbox><part><name>head</name></part></object>"
        for name, x0, y0, x1, y1 in objects
    )
    return f"<annotation><size><width>{VOC_SIZE[0]}</width><height>{VOC_SIZE[1]}</height></size>{text}</annotation>"


def letters(**special):
    """A tokenizer of single characters."""
    vocab = {name: number for number, name in enumerate(["<unk>", "<s>", "<pad>", "Ġ", "Ċ", *map(chr, range(33, 127))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<pad>", "pad_token": "<pad>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def model_of_chance(config):
    """MAE-VQGAN with a decoder that is random enough to answer different prompts differently."""
    torch.manual_seed(0)
    module = MAEVQGANModel(config).eval()
    for parameter in module.decoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return MAEVQGAN(module)
