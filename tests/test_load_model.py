import json

import pytest
import torch
from helpers import make_config, vit_mae_config
from transformers import SegGptConfig, SegGptForImageSegmentation, ViTMAEForPreTraining

from vtv_nnsight import MAEVQGAN, data, tasks
from vtv_nnsight.models import load_model
from vtv_nnsight.models.mae_vqgan import MAEVQGANModel
from vtv_nnsight.models.painter import Painter, SegGPT
from vtv_nnsight.models.painter_files import released_name
from vtv_nnsight.models.vit_mae import ViTMAE


def seggpt(typed):
    sizes = dict(hidden_size=16, num_hidden_layers=16, num_attention_heads=2, image_size=(64, 32), patch_size=8)
    decoder = dict(decoder_hidden_size=8, pretrain_image_size=32, intermediate_hidden_state_indices=[3, 7, 11, 15])
    model = SegGptForImageSegmentation(SegGptConfig(**sizes, **decoder, mlp_dim=32))
    for token in (model.model.embeddings.type_token_semantic, model.model.embeddings.type_token_instance):
        torch.nn.init.constant_(token, float(typed))
    return model


def vit_mae():
    return ViTMAEForPreTraining(vit_mae_config())


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (lambda: MAEVQGANModel(make_config()), MAEVQGAN),
        (vit_mae, ViTMAE),
        (lambda: seggpt(True), SegGPT),
        (lambda: seggpt(False), Painter),
    ],
)
def test_a_folder_is_of_its_family(tmp_path, make, family):
    make().save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.bfloat16)
    assert type(model) is family
    model.dispatch()
    assert next(model.parameters()).dtype == torch.bfloat16


def test_files_and_the_embedded_model(checkpoint):
    assert type(load_model(checkpoint)) is MAEVQGAN and type(load_model()) is MAEVQGAN


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="is a clip model; expected one of mae_vqgan, vit_mae, seggpt, painter"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_model(tmp_path / "nowhere.pth")
    for path in (str(tmp_path / "lama"), "./lama", "~/lama"):
        with pytest.raises(FileNotFoundError, match=f"there is no folder {path}; give one that holds a model"):
            load_model(path)


def test_arguments_of_another_family_are_refused(tmp_path):
    vit_mae().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="embedding_type='semantic' is for SegGPT, not ViTMAE"):
        load_model(tmp_path, embedding_type="semantic")
    with pytest.raises(ValueError, match="vqgan='x.ckpt' is for MAEVQGAN, not ViTMAE"):
        load_model(tmp_path, vqgan="x.ckpt")


def test_hub_ids(tmp_path):
    """As the Hub's cache keeps them: a folder of transformers', and a repository of one released file."""

    def cached(name):
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        return folder / "snapshots" / ("0" * 40)

    seggpt(True).save_pretrained(cached("BAAI/seggpt-vit-large"))
    vit_mae().save_pretrained(cached("facebook/vit-mae-base"))
    options = {"cache_dir": str(tmp_path), "dispatch": True}
    model = load_model("BAAI/seggpt-vit-large", embedding_type="semantic", **options)
    assert type(model) is SegGPT and model.identity() == {"model": "SegGPT", "embedding_type": "semantic"}
    for source in ("facebook/vit-mae-base", "hub:facebook/vit-mae-base"):
        assert type(load_model(source, **options)) is ViTMAE
    snapshot = cached("BAAI/Painter")
    snapshot.mkdir(parents=True)
    tensors = seggpt(False).state_dict()
    released = {released_name(name): tensor for name, tensor in tensors.items() if "type_token" not in name}
    torch.save({"model": released}, snapshot / "painter_vit_large.pth")
    painter = load_model("BAAI/Painter", **options)
    assert type(painter) is Painter
    assert torch.equal(painter._module.embeddings.mask_token, tensors["model.embeddings.mask_token"])


def test_what_a_model_knows_needs_no_trace_before():
    lazy, loaded = MAEVQGAN("tiny"), MAEVQGAN("tiny", dispatch=True)
    prompts = tasks.identity.prompts(data.scenes("train", n=40, seed=0), n=1, layout=lazy.layout)
    assert torch.equal(lazy.ceiling(prompts), loaded.ceiling(prompts))
    assert torch.equal(MAEVQGAN("tiny").truth(prompts), loaded.truth(prompts))
