"""Writes the files of version 0.1 that the tests load. Run with the code of version 0.1 on the path:

    git archive 1161894 | tar -x -C /tmp/v0_1 && PYTHONPATH=/tmp/v0_1 python tests/data/make_v0_1.py tests/data/v0_1
"""

import sys
from pathlib import Path

import torch

SIZES = dict(
    image_size=64,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    decoder_hidden_size=8,
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


def waves(shape: tuple, step: float) -> torch.Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).float().view(shape)


def main(folder: Path) -> None:
    from vtv_nnsight import MAEVQGAN, PatchSet, PatchSpace, TaskVectors, VisualPrompt, search, tasks
    from vtv_nnsight.models.mae_vqgan import MAEVQGANConfig, MAEVQGANModel

    model = MAEVQGAN(filled(MAEVQGANModel(MAEVQGANConfig(**SIZES))))
    prompts = {name: VisualPrompt.from_canvas(canvases(i), model.layout) for i, name in enumerate(("a", "b"))}
    vectors = TaskVectors.collect(model, prompts, progress=False)
    vectors.save(folder / "vectors.safetensors")
    space = PatchSpace(model, model.layout, "quadrant")
    PatchSet.random(space, 7).save(folder / "patches.json")
    query_only = prompts["a"].query_only()
    result = search.random(model, vectors["a"], tasks.identity, query_only, space, budget=40, progress=False)
    result.save(folder / "result.safetensors")


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """The module with weights that need no random numbers."""
    for i, parameter in enumerate(module.parameters()):
        parameter.data = 0.3 * waves(parameter.shape, 0.37 + 0.01 * i)
    return module.eval()


def canvases(i: int, count: int = 8) -> torch.Tensor:
    return 0.5 + 0.5 * waves((count, 3, 64, 64), 0.011 + 0.001 * i)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
