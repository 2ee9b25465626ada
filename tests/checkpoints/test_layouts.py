"""Layouts: features equal the source library's, round trips are exact, unknown keys are refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from mmpretrain.models import ImageClassifier, MAEPretrainDecoder, MILANPretrainDecoder, VisionTransformer
from timm.models import VisionTransformer as TimmViT
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from helpers import assert_within, real_data, rest_slow, strip_prefix
from mmmilan.checkpoints.layouts import convert, detect_layout
from mmmilan.errors import InputError
from mmmilan.models import MAEDecoder, MILANViT, PromptingDecoder

ARCH = dict(embed_dims=48, num_layers=3, num_heads=3, feedforward_channels=96)
VIT = dict(arch=ARCH, img_size=32, patch_size=8, out_type='raw')
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def randomised(module: nn.Module) -> nn.Module:
    """Random weights and buffers, so that a swapped norm or bias shows."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.randn_like(tensor) * 0.2 + 0.1
    module.eval()  # mmpretrain's backbones return None
    return module


def timm_vit(**kwargs) -> TimmViT:
    return randomised(TimmViT(32, 8, embed_dim=48, depth=3, num_heads=3, mlp_ratio=2, **kwargs))


def hf_config() -> ViTConfig:
    return ViTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8,
        num_labels=7,
    )  # fmt: skip


def encoder(weights: dict[str, Tensor], **kwargs) -> MILANViT:
    """Our ViT with the encoder of a state dict in our layout."""
    vit = MILANViT(**{**VIT, **kwargs})
    vit.load_state_dict({key.removeprefix('backbone.'): value for key, value in weights.items()}, strict=True)
    vit.eval()
    return vit


def classifier(head: str, pooling: str) -> ImageClassifier:
    """mmpretrain's classifier on our encoder: ``mean`` of the patch tokens, or the class token."""
    backbone = dict(VIT, type='mmmilan.MILANViT', out_type='avg_featmap' if pooling == 'mean' else 'cls_token')
    backbone['final_norm'] = pooling != 'mean'
    neck = dict(type='ClsBatchNormNeck', input_features=48) if pooling == 'probe' else None
    return ImageClassifier(backbone, neck, dict(type=head, num_classes=7, in_channels=48))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    assert all(actual[key].dtype == expected[key].dtype for key in expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@torch.no_grad()
def test_timm_encoder_gives_the_same_features():
    source = timm_vit(num_classes=0)
    assert detect_layout(source.state_dict()).name == 'timm'
    assert_within(encoder(convert(source.state_dict()))(IMAGES)[0], source.forward_features(IMAGES))


@torch.no_grad()
@pytest.mark.parametrize('pooling', ['mean', 'token'])
def test_timm_classifier_gives_the_same_scores(pooling):
    source = timm_vit(num_classes=7, global_pool='avg' if pooling == 'mean' else 'token')
    head = 'LinearClsHead' if pooling == 'mean' else 'VisionTransformerClsHead'
    ours = classifier(head, pooling).eval()
    ours.load_state_dict(convert(source.state_dict()), strict=True)
    assert_within(ours(IMAGES), source(IMAGES))
    assert_same(
        convert(ours.state_dict(), 'timm'),
        {key: source.state_dict()[key] for key in convert(ours.state_dict(), 'timm')},
    )


@torch.no_grad()
def test_hugging_face_vit_gives_the_same_features_and_scores():
    norm_cfg = dict(type='LN', eps=1e-12)  # transformers' default; the file does not hold it
    source = randomised(ViTModel(hf_config()))
    layout = detect_layout(source.state_dict())
    assert (layout.name, layout.content, layout.depth, layout.embed_dims) == ('huggingface', 'encoder', 3, 48)
    assert layout.dropped == ('pooler.',)
    ours = encoder(convert(source.state_dict()), norm_cfg=norm_cfg)
    assert_within(ours(IMAGES)[0], source(IMAGES).last_hidden_state)

    source = randomised(ViTForImageClassification(hf_config()))
    ours = classifier('VisionTransformerClsHead', 'token').eval()
    ours.load_state_dict(convert(source.state_dict()), strict=True)
    for norm in ours.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = 1e-12
    assert_within(ours(IMAGES), source(IMAGES).logits)


@torch.no_grad()
def test_our_encoder_gives_the_same_features_elsewhere():
    ours = randomised(MILANViT(**VIT))
    features = ours(IMAGES)[0]

    to_timm = timm_vit(num_classes=0)
    to_timm.load_state_dict(convert(ours.state_dict(), 'timm'), strict=True)
    assert_within(to_timm.forward_features(IMAGES), features)

    config = hf_config()
    config.layer_norm_eps = 1e-6
    to_hf = ViTModel(config, add_pooling_layer=False).eval()
    to_hf.load_state_dict(convert(ours.state_dict(), 'huggingface'), strict=True)
    assert_within(to_hf(IMAGES).last_hidden_state, features)

    to_mmpretrain = VisionTransformer(**VIT)
    to_mmpretrain.eval()
    bare = convert(ours.state_dict(), 'openmmlab')
    to_mmpretrain.load_state_dict({key.removeprefix('backbone.'): bare[key] for key in bare}, strict=True)
    assert_within(to_mmpretrain(IMAGES)[0], features)


@torch.no_grad()
def test_published_pretraining_weights_give_the_recorded_latent(official):
    config = official['config']
    published = strip_prefix(official, 'milan/')
    layout = detect_layout(published)
    assert (layout.name, layout.content, layout.decoder) == ('official', 'pretraining', 'prompting')
    weights = convert(published)

    arch = dict(embed_dims=config['dim'], num_layers=config['depth'], num_heads=config['heads'])
    arch['feedforward_channels'] = 4 * config['dim']
    encoder_only = convert(published, encoder_only=True)
    ours = encoder(encoder_only, arch=arch, img_size=config['img'], patch_size=config['patch'])
    assert_within(ours(official['input'], official['ids_keep']), official['latent'])

    neck = PromptingDecoder(16, config['dim'], config['ddim'], config['ddepth'], config['dheads'], 4, config['out'])
    neck.load_state_dict(strip_prefix(weights, 'neck.'), strict=True)
    assert set(encoder_only) == {key for key in weights if key.startswith('backbone.')}
    assert_same(convert(weights, 'official'), published)


@pytest.mark.data
@pytest.mark.parametrize('size, dims, depth', [('base', 768, 12), ('large', 1024, 24)])
def test_published_layouts_fill_our_models_exactly(size, dims, depth):
    layouts = json.loads(real_data('../reference/state_dict_layouts.json').read_text())
    with torch.device('meta'):
        published = {key: torch.empty(shape) for key, shape in layouts[f'milan_vit_{size}_patch16'].items()}
        vit = MILANViT(size)
        pixels = 3 * 16**2 if size == 'base' else 512
        neck = PromptingDecoder(embed_dim=dims, predict_feature_dim=published['decoder_pred.bias'].numel() or pixels)
    layout = detect_layout(published)
    assert (layout.depth, layout.embed_dims) == (depth, dims)
    expected = {f'backbone.{key}': value.shape for key, value in vit.state_dict().items()}
    expected |= {f'neck.{key}': value.shape for key, value in neck.state_dict().items()}
    assert {key: value.shape for key, value in convert(published).items()} == expected


def layouts_to_convert() -> dict[str, dict[str, Tensor]]:
    """State dicts of each kind of model, by the library that wrote it and the kind."""

    def pretraining(vit: nn.Module, decoder: type[nn.Module], **kwargs) -> nn.ModuleDict:
        decoder = decoder(
            num_patches=16, embed_dim=48, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4, **kwargs
        )
        return nn.ModuleDict(dict(backbone=vit, neck=decoder))

    small = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, mlp_ratio=2, num_classes=7)
    modules = {
        'mmmilan pretraining': pretraining(MILANViT(**VIT), PromptingDecoder),
        'mmmilan MAE pretraining': pretraining(MILANViT(**VIT), MAEDecoder),
        'mmpretrain MILAN': pretraining(VisionTransformer(**VIT), MILANPretrainDecoder),
        'mmpretrain MAE': pretraining(VisionTransformer(**VIT), MAEPretrainDecoder, patch_size=8),
        'mmpretrain fine-tuned': classifier('LinearClsHead', 'mean'),
        'mmpretrain class token': classifier('VisionTransformerClsHead', 'token'),
        'mmpretrain linear probe': classifier('VisionTransformerClsHead', 'probe'),
        'timm mean': TimmViT(**small, global_pool='avg'),
        'timm token': TimmViT(**small),
        'hf encoder': ViTModel(hf_config(), add_pooling_layer=False),
        'hf classifier': ViTForImageClassification(hf_config()),
    }
    return {name: randomised(module).state_dict() for name, module in modules.items()}


@pytest.mark.parametrize('name', rest_slow([
    'mmmilan pretraining', 'mmmilan MAE pretraining', 'mmpretrain MILAN', 'mmpretrain MAE', 'mmpretrain fine-tuned',
    'mmpretrain class token', 'mmpretrain linear probe', 'timm mean', 'timm token', 'hf encoder', 'hf classifier',
], 'mmmilan pretraining', 'mmpretrain MAE', 'mmpretrain linear probe', 'timm token', 'hf classifier'))  # fmt: skip
def test_round_trips_are_bit_identical(name):
    weights = layouts_to_convert()[name]
    home = detect_layout(weights).name
    for away in ('mmmilan', 'openmmlab', 'official', 'timm', 'huggingface'):
        try:
            there = convert(weights, away)
        except InputError as error:
            # Hugging Face holds encoders and class-token classifiers only; timm holds no decoders.
            assert 'has no place for' in str(error)
            holds = {'huggingface': ('hf', 'timm token', 'mmpretrain class'), 'timm': ('hf', 'timm', 'mmpretrain class',
                     'mmpretrain fine')}  # fmt: skip
            assert not name.startswith(holds[away])
            continue
        assert_same(convert(there, home), weights)


def test_clip_in_an_openmmlab_file_is_dropped_and_named():
    weights = layouts_to_convert()['mmpretrain MILAN']
    with_clip = {**weights, 'target_generator.model.visual.proj': torch.zeros(2, 2)}
    layout = detect_layout(with_clip)
    assert layout.name == 'openmmlab' and 'target_generator.*' in str(layout)
    assert_same(convert(with_clip), weights)


def test_module_prefix_and_missing_backbone_prefix():
    weights = layouts_to_convert()['mmpretrain MAE']
    assert_same(convert({f'module.{key}': value for key, value in weights.items()}), weights)
    backbone = {key: value for key, value in weights.items() if key.startswith('backbone.')}
    assert_same(convert({key.removeprefix('backbone.'): value for key, value in backbone.items()}), backbone)


def test_encoder_only_drops_decoders_heads_and_detector_parts():
    for name in ('mmpretrain linear probe', 'mmmilan pretraining', 'timm token'):
        weights = layouts_to_convert()[name]
        ours = convert(weights, encoder_only=True)
        assert set(ours) == {key for key in convert(weights) if key.startswith('backbone.')}
    detector = {**ours, 'neck.lateral_convs.0.conv.weight': torch.zeros(1), 'rpn_head.rpn_cls.weight': torch.zeros(1)}
    assert detect_layout(detector).content == 'detector or segmentor'
    assert_same(convert(detector), detector)
    assert_same(convert(detector, encoder_only=True), ours)
    with pytest.raises(InputError, match='timm has no place for a detector'):
        convert(detector, 'timm')


@pytest.mark.parametrize(
    'name', rest_slow(['mmpretrain MILAN', 'timm mean', 'hf encoder'], 'mmpretrain MILAN', 'hf encoder')
)
@pytest.mark.parametrize(
    'key',
    rest_slow(
        ['blocks.0.other.gamma', 'extra.weight', 'backbone.layers.0.attn.gamma1.weight'],
        'blocks.0.other.gamma',
        'backbone.layers.0.attn.gamma1.weight',
    ),
)
def test_unknown_key_is_refused_by_name(name, key):
    weights = {**layouts_to_convert()[name], key: torch.zeros(1)}
    with pytest.raises(InputError, match=f"The key '{key}' is unknown"):
        convert(weights)


def test_refused_state_dicts():
    with pytest.raises(InputError, match='No ViT in a known layout.*conv1.weight'):
        detect_layout({'conv1.weight': torch.zeros(1)})
    with pytest.raises(InputError, match='This is a CLIP'):
        detect_layout({'visual.class_embedding': torch.zeros(1)})
    with pytest.raises(InputError, match="'epoch' is a int, not a tensor"):
        detect_layout({'epoch': 3})
    with pytest.raises(InputError, match='is unknown'):
        convert(layouts_to_convert()['timm mean'], 'jax')
    weights = layouts_to_convert()['hf encoder']
    del weights['encoder.layer.1.attention.attention.key.bias']
    with pytest.raises(InputError, match=r'encoder.layer.1.attention.attention.key.bias.* is missing'):
        convert(weights)


@pytest.mark.parametrize(
    ('key', 'part'),
    [
        ('blocks.0.ls1.gamma', 'LayerScale'),
        ('reg_token', 'register tokens'),
        ('dist_token', 'a distillation token'),
        ('norm_pre.weight', 'a norm before the first block'),
        ('blocks.1.attn.q_norm.weight', 'norms of queries and keys'),
        ('blocks.1.mlp.fc1_g.weight', 'a gated MLP'),
    ],
)
def test_parts_of_other_vits_are_refused_by_name(key, part):
    """The message names the part of timm's ViT that a MILANViT lacks."""
    weights = {'patch_embed.proj.weight': torch.zeros(8, 3, 2, 2), key: torch.zeros(1)}
    with pytest.raises(InputError) as error:
        convert(weights)
    assert str(error.value).startswith(f'{key!r} is of {part}')
    assert str(error.value).endswith(', which a MILANViT does not have; give a ViT without it.')


def test_weight_without_a_place():
    """The message gives the remedy once."""
    weights = {'patch_embed.proj.weight': torch.zeros(8, 3, 2, 2), 'decoder_blocks.0.attn.kv.weight': torch.zeros(1)}
    with pytest.raises(InputError) as error:
        convert(weights, to='huggingface')
    assert str(error.value) == (
        "Hugging Face ViT has no place for 'decoder_blocks.0.attn.kv.weight'; convert the encoder alone "
        '(--encoder-only), or choose another layout.'
    )
