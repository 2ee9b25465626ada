"""One model of each family, with random weights, against the libraries' own forward pass and unfused attention."""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

from helpers import randomise, relative_error, rest_slow
from mmmilan.teachers import Teacher

# name: (number of registers, how the importance is computed)
CLASS, QUERY, MEAN = 'attention of the class token', 'attention of the pooling query', 'cosine of each token'
TIMM = {
    'vit_small_patch14_dinov2': (0, CLASS),  # LayerScale
    'vit_small_patch14_reg4_dinov2': (4, CLASS),
    'vit_small_patch16_dinov3': (4, CLASS),  # rotary positions
    'eva02_tiny_patch14_224': (0, CLASS),  # rotary positions, SwiGLU
    'vit_base_patch16_radio_v3': (7, CLASS),  # class tokens of other teachers
    'beit_base_patch16_224': (0, CLASS),  # relative positions
    'vit_relpos_medium_patch16_cls_224': (0, CLASS),
    'deit_tiny_distilled_patch16_224': (1, CLASS),
    'cait_xxs24_224': (0, CLASS),  # class attention after the other blocks
    'vit_base_patch16_siglip_224': (0, QUERY),
    'vit_pe_core_tiny_patch16_384': (1, QUERY),  # the class token is in the pool too
    'naflexvit_base_patch16_siglip': (0, QUERY),
    'vit_medium_patch16_reg4_gap_256': (4, MEAN),
    'vit_base_mci_224': (0, CLASS),  # convolutional stem
    'samvit_base_patch16_224': (0, MEAN),  # windows, and a map of tokens
}
LAYERED = ('vit_small_patch14_reg4_dinov2', 'vit_small_patch16_dinov3', 'vit_base_patch16_siglip_224')
OPEN_CLIP = {
    'ViT-B-16-SigLIP2': (0, QUERY),
    'PE-Core-T-16-384': (1, QUERY),
    'EVA02-B-16': (0, CLASS),
    'MobileCLIP-B': (0, CLASS),
    'vit_medium_patch16_gap_256': (0, MEAN),
}


@torch.no_grad()
def embedding_of(head: nn.Module, vit: nn.Module, tokens: Tensor, importance: str) -> Tensor:
    """The library's embedding of an image; without a head, the class token or the mean token."""
    if QUERY in importance or not isinstance(head, nn.Identity):
        return head(vit.forward_head(tokens))
    first = tokens[:, 0] if CLASS in importance else tokens.mean(1)
    return vit.fc_norm(first) if isinstance(getattr(vit, 'fc_norm', None), nn.Module) else first


@torch.no_grad()
def pool_reference(pool: nn.Module, tokens: Tensor) -> Tensor:
    """Attention [B, T] of timm's pooling query, unfused, averaged over heads."""
    query = pool.q(pool.latent).unflatten(2, (pool.num_heads, -1)).transpose(1, 2)
    key = pool.kv(tokens).chunk(2, dim=-1)[0].unflatten(2, (pool.num_heads, -1)).transpose(1, 2)
    scores = pool.q_norm(query) @ pool.k_norm(key).transpose(2, 3) * pool.head_dim**-0.5
    return scores.softmax(-1).mean(1)[:, 0]


def unfused(vit: nn.Module, images: Tensor) -> list[Tensor]:
    """Attention [B, T] of the first token in each block, averaged over heads, by timm's own unfused code."""
    maps, handles = [], []
    attentions = [module for module in vit.modules() if hasattr(module, 'fused_attn')]
    for attention in attentions:
        attention.fused_attn = False
        if hasattr(attention, 'attn_drop'):
            handles.append(attention.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output)))
    vit.forward_features(images)
    for attention in attentions:
        attention.fused_attn = True
    for handle in handles:
        handle.remove()
    return [attention.mean(1)[:, 0] for attention in maps]


def check_family(teacher: Teacher, registers: int, importance: str) -> None:
    tower = teacher.tower
    vit, head, n = tower.vit, tower.head, teacher.num_patches
    randomise(tower.double())
    assert importance in teacher.describe()
    images = torch.randn(2, 3, *teacher.input_size, dtype=torch.double)
    features, scores = teacher(images)
    assert features.shape == (2, 1 + n, teacher.feature_dim) and scores.shape == (2, n)
    with torch.no_grad():
        tokens = vit.forward_features(images)
        tokens = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
        assert tokens.shape[1] == (CLASS in importance) + registers + n
        expected = embedding_of(head, vit, tokens if importance != MEAN else tokens[:, registers:], importance)
        patches = tokens[:, -n:]
        if importance == QUERY:  # each patch alone in the pool
            patches = vit.attn_pool(patches.flatten(0, 1)[:, None]).unflatten(0, (2, n))
            attention = pool_reference(vit.attn_pool, tokens)[:, -n:]
        elif importance == CLASS:
            attention = unfused(vit, images)[-1][:, -n:]
        else:
            mean = tokens[:, -n:].mean(1, keepdim=True)
            cosine = (tokens[:, -n:] * mean).sum(-1) / tokens[:, -n:].norm(dim=-1) / mean.norm(dim=-1)
            attention = cosine.clamp(min=0) / cosine.clamp(min=0).sum(1, keepdim=True)
        patches = head(vit.head(vit.fc_norm(patches)) if hasattr(vit, 'fc_norm') else patches)
    assert relative_error(features[:, 0], expected) < 1e-5
    assert relative_error(features[:, 1:], patches) < 1e-5
    assert relative_error(scores, attention) < 1e-5


@pytest.mark.parametrize(
    'name',
    rest_slow(
        TIMM,
        'vit_small_patch14_reg4_dinov2',
        'vit_small_patch16_dinov3',
        'eva02_tiny_patch14_224',
        'cait_xxs24_224',
        'vit_pe_core_tiny_patch16_384',
        'vit_medium_patch16_reg4_gap_256',
    ),
)
def test_timm(name, build, shallow):
    patch = 14 if 'patch14' in name else 16
    size = (3 * patch, 3 * patch) if 'samvit' in name else (2 * patch, 4 * patch)
    check_family(build(type='mmmilan.TimmTeacher', model=name, pretrained=None, input_size=size), *TIMM[name])


@pytest.mark.parametrize('name', rest_slow(OPEN_CLIP, 'PE-Core-T-16-384', 'vit_medium_patch16_gap_256'))
def test_open_clip(name, build, shallow):
    teacher = build(type='mmmilan.OpenCLIPTeacher', model=name, input_size=(32, 64))
    check_family(teacher, *OPEN_CLIP[name])


@torch.no_grad()
@pytest.mark.parametrize(('name', 'importance'), [('ViT-L-14-CLIPA', MEAN), ('coca_ViT-B-32', QUERY)])
def test_pools_of_open_clip(name, importance, build, shallow):
    """The mean token; a pool of 256 queries, the first of which gives the image's embedding."""
    teacher = build(type='mmmilan.OpenCLIPTeacher', model=name, input_size=64 if QUERY in importance else 28)
    visual = randomise(teacher.double().tower.visual)
    assert importance in teacher.describe()
    images = torch.randn(2, 3, *teacher.input_size, dtype=torch.double)
    features, scores = teacher(images)
    pooled = visual(images)
    assert relative_error(features[:, 0], pooled[0] if isinstance(pooled, tuple) else pooled) < 1e-5
    tokens = visual.transformer(visual._embeds(images))
    if importance == QUERY:
        pool = visual.attn_pool
        alone = pool(tokens[:, 1:3].flatten(0, 1)[:, None])[:, 0].unflatten(0, (2, 2))  # two patches, each alone
        keys = pool.ln_k(tokens)
        attention = pool.attn(pool.ln_q(pool.query).expand(2, -1, -1), keys, keys, average_attn_weights=True)[1]
        assert relative_error(scores, attention[:, 0, 1:]) < 1e-5
    else:
        alone = tokens[:, 1:3]
        cosine = torch.cosine_similarity(tokens[:, 1:], tokens[:, 1:].mean(1, keepdim=True), dim=-1).clamp(min=0)
        assert relative_error(scores, cosine / cosine.sum(1, keepdim=True)) < 1e-5
    assert relative_error(features[:, 1:3], visual.ln_post(alone) @ visual.proj) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize('name', rest_slow(LAYERED, 'vit_small_patch16_dinov3'))
def test_tokens_of_several_layers(name, build, shallow):
    """Against hooks on the blocks. Registers are left out; the mean replaces a missing class token."""
    patch = 14 if 'patch14' in name else 16
    teacher = build(type='mmmilan.TimmTeacher', model=name, pretrained=None, input_size=4 * patch)
    vit, outputs = randomise(teacher.double().vit), []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    images = torch.randn(2, 3, 64, 64, dtype=torch.double)
    _, importance = teacher(images)
    tokens, same_importance = teacher.forward_layers(images, [-1, 0])
    for actual, own in zip(tokens, outputs[1::-1], strict=True):
        first = own[:, 0] if 'siglip' not in name else own.mean(1)
        assert actual.shape == (2, 17, teacher.width)
        assert relative_error(actual[:, 0], first) < 1e-5
        assert relative_error(actual[:, 1:], own[:, -16:]) < 1e-5
    assert relative_error(same_importance, importance) < 1e-5


@torch.no_grad()
def test_importance_over_the_last_blocks(build, shallow):
    teacher = build(
        type='mmmilan.TimmTeacher',
        model='vit_small_patch16_dinov3',
        pretrained=None,
        input_size=64,
        importance_layers=2,
    )
    vit = randomise(teacher.double().vit)
    images = torch.randn(2, 3, 64, 64, dtype=torch.double)
    _, importance = teacher(images)
    expected = sum(attention[:, -16:] for attention in unfused(vit, images)) / 2
    assert relative_error(importance, expected) < 1e-5


def test_every_name_is_one_of_the_library():
    assert set(TIMM) <= set(timm.list_models()) and set(OPEN_CLIP) <= set(open_clip.list_models())
