"""Weights of other programs: any prefix, any place in the file, one of several models by name, folders."""

from __future__ import annotations

import json

import pytest
import torch
from mmengine.model.weight_init import PretrainedInit
from safetensors.torch import save_file
from timm.models import VisionTransformer as TimmViT
from torch import Tensor
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from helpers import assert_within, rest_slow, strip_prefix
from mmmilan import convert as convert_file
from mmmilan.checkpoints.io import load_checkpoint_file
from mmmilan.checkpoints.layouts import convert, detect_layout
from mmmilan.checkpoints.loading import load_weights, read_checkpoint
from mmmilan.errors import InputError
from mmmilan.models import MAEDecoder, MILANViT

ARCH = dict(embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=96)
SIZES = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def our_vit(checkpoint: object = (), kind: object = 'Pretrained') -> MILANViT:
    init_cfg = None if checkpoint == () else dict(checkpoint=checkpoint) | (dict(type=kind) if kind else {})
    vit = MILANViT(ARCH, img_size=32, patch_size=8, out_type='raw', init_cfg=init_cfg)
    vit.init_weights()
    vit.eval()
    return vit


def timm_weights(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    vit = TimmViT(32, 8, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2, num_classes=0)
    return {key: torch.randn_like(value) * 0.2 for key, value in vit.state_dict().items()}


def below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f'{prefix}{key}': value for key, value in weights.items()}


def compiled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As where each block was compiled alone."""
    return {key.replace('blocks.1.', 'blocks.1._orig_mod.'): value for key, value in weights.items()}


HEAD = {'head.mlp.0.weight': torch.ones(2, 2)}
ONE_MODEL = {
    'compiled': lambda w: below('_orig_mod.', w),
    'compiled and distributed': lambda w: dict(model=below('module._orig_mod.', w)),
    'compiled blocks': lambda w: dict(state_dict=below('net.', compiled(w))),
    'Lightning': lambda w: {
        'state_dict': below('model.encoder.', w) | {'loss.scale': torch.ones(1)},
        'pytorch-lightning_version': '2.1',
        'optimizer_states': [{}],
    },
    'DINO': lambda w: dict(teacher=below('module.backbone.', w) | below('module.', HEAD), epoch=3),
    'averages alone': lambda w: dict(model_ema=w, epoch=3),
    'anything': lambda w: dict(run=dict(networks=below('a.b.c.', w))),
    'OpenMMLab': lambda w: dict(state_dict=below('x.y.', convert(w))),
    'encoder of OpenMMLab': lambda w: below('student.vit.', strip_prefix(convert(w), 'backbone.')),
    'Hugging Face': lambda w: below('p.vit.', convert(w, 'huggingface')),
}
SEVERAL = {  # the file, and the name that stands for the first weights
    'DINO': (lambda w, v: dict(teacher=below('backbone.', w), student=below('module.backbone.', v)), 'teacher'),
    'MoCo': (
        lambda w, v: dict(state_dict=below('module.momentum_encoder.', w) | below('module.base_encoder.', v)),
        'momentum_encoder',
    ),
    'averages': (lambda w, v: dict(model_ema=w, model=v), 'model_ema'),
    'averages of timm': (lambda w, v: dict(state_dict=v, state_dict_ema=below('module.', w)), 'state_dict_ema'),
    'anything': (lambda w, v: below('one.two.', w) | below('one.three.', v), 'one.two'),
    'in one another': (lambda w, v: below('net.', v) | below('net.slow.', w), 'slow'),
}


def check_vit(path: str, weights: dict[str, Tensor]) -> None:
    """All ways give the encoder of these weights."""
    expected = strip_prefix(convert(weights), 'backbone.')
    vit = our_vit()
    load_weights(vit, read_checkpoint(path), path)
    for loaded in (vit, our_vit(path)):
        assert loaded.state_dict().keys() - {'ln2.weight', 'ln2.bias'} == expected.keys()
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in expected.items())


@pytest.mark.parametrize('name', rest_slow(ONE_MODEL, 'compiled blocks', 'Lightning', 'OpenMMLab', 'Hugging Face'))
def test_one_model(name, tmp_path, capsys):
    path = tmp_path / 'theirs.pth'
    torch.save(ONE_MODEL[name](timm_weights()), path)
    check_vit(str(path), timm_weights())
    convert_file(path, tmp_path / 'ours.pth')
    check_vit(str(tmp_path / 'ours.pth'), timm_weights())
    assert ('to be left out: ' in capsys.readouterr().out) == (name in ('Lightning', 'DINO'))


@pytest.mark.parametrize('name', rest_slow(SEVERAL, 'MoCo', 'in one another'))
def test_one_of_several_by_name(name, tmp_path):
    make, chosen = SEVERAL[name]
    path = tmp_path / 'theirs.pth'
    torch.save(make(timm_weights(1), timm_weights(2)), path)
    check_vit(f'{path}#{chosen}', timm_weights(1))
    convert_file(f'{path}#{chosen}', tmp_path / 'ours.safetensors')
    check_vit(str(tmp_path / 'ours.safetensors'), timm_weights(1))
    with pytest.raises(InputError, match=f"theirs.pth holds no models 'nobody'; choose one of: .*{chosen}"):
        read_checkpoint(f'{path}#nobody')
    if name != 'in one another':  # where the outer one is meant
        for attempt in (our_vit, lambda path: convert_file(path, tmp_path / 'no.pth')):
            with pytest.raises(InputError, match=rf'theirs.pth.*[sS]everal models .*{chosen}.*FILE#'):
                attempt(str(path))
        assert not (tmp_path / 'no.pth').exists()


@pytest.mark.parametrize('safe', [True, False])
@pytest.mark.parametrize(
    'kind', ['Pretrained', None, 'mmengine.Pretrained', 'mmdet.Pretrained', PretrainedInit], ids=str
)
def test_names_of_pretrained(kind, safe, tmp_path, request):
    """By a name with a scope MMEngine loaded nothing of this file, or initialised FFNs and positions after that."""
    if safe:
        request.getfixturevalue('safe_mmengine')
    torch.save(timm_weights(), tmp_path / 'theirs.pth')
    loaded, expected = our_vit(tmp_path / 'theirs.pth', kind).state_dict(), convert(timm_weights())
    assert all(torch.equal(loaded[key.removeprefix('backbone.')], value) for key, value in expected.items())


@pytest.mark.parametrize('name', ['', None])
def test_no_name(name, tmp_path, monkeypatch):
    """An empty one, as of an environment variable, is not the current folder."""
    save_file(timm_weights(), tmp_path / 'model.safetensors')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f'checkpoint={name!r} names no checkpoint; give a file'):
        our_vit(name)


def test_a_file_with_a_hash_in_its_name(tmp_path):
    torch.save(timm_weights(), tmp_path / 'run#3.pth')
    check_vit(str(tmp_path / 'run#3.pth'), timm_weights())


def test_averages_of_mmengine_stay_beside_the_weights(tmp_path):
    weights = dict(state_dict=convert(timm_weights(1)), ema_state_dict=below('module.', convert(timm_weights(2))))
    torch.save(weights | dict(message_hub={}, meta={}), tmp_path / 'run.pth')
    check_vit(str(tmp_path / 'run.pth'), timm_weights(1))


def hugging_face_mae() -> ViTMAEForPreTraining:
    torch.manual_seed(0)
    decoder = {f'decoder_{key}': value for key, value in SIZES.items()}
    decoder |= dict(decoder_hidden_size=32, decoder_num_attention_heads=4, decoder_intermediate_size=128)
    return ViTMAEForPreTraining(
        ViTMAEConfig(**SIZES, **decoder, image_size=32, patch_size=8, mask_ratio=0.0, layer_norm_eps=1e-6)
    ).eval()


@torch.no_grad()
def test_vit_mae_predicts_the_same(tmp_path):
    theirs = hugging_face_mae()
    theirs.save_pretrained(tmp_path / 'mae')
    for encoder_only in (False, True):
        convert_file(tmp_path / 'mae', tmp_path / f'{encoder_only}.pth', encoder_only=encoder_only)
    layout = detect_layout(theirs.state_dict())
    assert (layout.name, layout.content, layout.decoder, layout.depth) == ('huggingface', 'pretraining', 'vanilla', 2)
    weights = load_checkpoint_file(tmp_path / 'False.pth')['state_dict']
    only = load_checkpoint_file(tmp_path / 'True.pth')['state_dict']
    assert only.keys() == {key for key in weights if key.startswith('backbone.')}

    vit, noise = our_vit(str(tmp_path / 'mae')), torch.arange(16.0).repeat(2, 1)
    latent = vit(IMAGES)[0]
    assert_within(latent, theirs.vit(IMAGES, noise=noise).last_hidden_state)
    decoder = MAEDecoder(16, 48, 32, 2, 4, 4, 192)
    decoder.load_state_dict(strip_prefix(weights, 'neck.'))
    assert_within(
        decoder(latent, torch.arange(16).repeat(2, 1), torch.zeros(2, 0, dtype=torch.long))[:, 1:],
        theirs(IMAGES, noise=noise).logits,
    )
    back = convert(weights, 'huggingface')
    assert all(torch.equal(back[key], value) for key, value in theirs.state_dict().items())


@torch.no_grad()
def test_a_folder_of_shards(tmp_path):
    theirs = ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8, layer_norm_eps=1e-6)).eval()
    theirs.save_pretrained(tmp_path / 'vit', max_shard_size='50KB')
    assert (tmp_path / 'vit' / 'model.safetensors.index.json').is_file()
    assert_within(our_vit(str(tmp_path / 'vit'))(IMAGES)[0], theirs(IMAGES).last_hidden_state)

    for index in ({}, [], {'weight_map': {'a': '../x.safetensors'}}, {'weight_map': {'a': 'gone.safetensors'}}):
        (tmp_path / 'vit' / 'model.safetensors.index.json').write_text(json.dumps(index))
        with pytest.raises(InputError, match='vit'):
            read_checkpoint(str(tmp_path / 'vit'))


def test_a_folder_that_holds_no_weights(tmp_path):
    save_file({'a': torch.ones(1)}, tmp_path / 'other.safetensors')
    with pytest.raises(InputError, match='is neither a file nor a URL'):
        read_checkpoint(str(tmp_path))


def test_a_dictionary_within_itself(tmp_path):
    content = dict(model=timm_weights())
    content['model']['again'] = content
    torch.save(content, tmp_path / 'circle.pth')
    with pytest.raises(InputError, match='circle.pth'):
        our_vit(str(tmp_path / 'circle.pth'))
