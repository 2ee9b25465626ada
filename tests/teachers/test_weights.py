"""Weights from the hub and its cache, and the errors where they cannot be had."""

from __future__ import annotations

import socket
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import timm
import torch

from helpers import assert_clip, randomise, relative_error
from mmmilan.errors import InputError
from mmmilan.teachers.clip_source import new_visual
from processes import serve_http

REVISION = '0' * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with an empty cache. The test sets its answers: status and the hub's error code by file name."""
    answers: dict[str, tuple[int, str]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            status, code = answers.get(self.path.rpartition('/')[2], (404, 'EntryNotFound'))
            self.send_response(status)
            self.send_header('X-Error-Code', code)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    with serve_http(Handler) as server:
        point_to(monkeypatch, server.server_port)
        yield answers


def point_to(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    address = f'http://127.0.0.1:{port}'
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', address)
    monkeypatch.setattr(
        'huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE',
        address + '/{repo_id}/resolve/{revision}/{filename}',
        raising=False,
    )


def fill_cache(folder: Path, repo: str, name: str, weights: dict) -> None:
    """Put a file where the hub's library keeps it."""
    cached = folder / f'models--{repo.replace("/", "--")}'
    (cached / f'snapshots/{REVISION}').mkdir(parents=True)
    (cached / 'refs').mkdir()
    (cached / 'refs/main').write_text(REVISION)
    safetensors.torch.save_file(weights, cached / f'snapshots/{REVISION}' / name)


def test_from_the_cache_without_network(hub, build, tmp_path):
    """The file as timm publishes it, with a classifier, which is left out."""
    reference = timm.create_model('test_vit', num_classes=1000).eval()
    weights = {key: value.clone() for key, value in reference.state_dict().items()}
    fill_cache(tmp_path / 'hub', 'timm/test_vit.r160_in1k', 'model.safetensors', weights)
    teacher = build(type='mmmilan.TimmTeacher', model='test_vit.r160_in1k')
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert relative_error(teacher(images)[0], reference.forward_features(images)) < 1e-6


def test_open_clip_from_the_cache(hub, build, shallow, tmp_path):
    """The file holds the whole CLIP; its text tower is left out."""
    repo = 'timm/vit_base_patch32_clip_224.openai'
    own = build(type='mmmilan.OpenCLIPTeacher', model='ViT-B-32-quickgelu', input_size=224)
    for parameter in own.parameters():
        parameter.data.normal_(std=0.02)
    weights = {f'visual.{key}': value for key, value in unfolded(own.visual).items()}
    fill_cache(tmp_path / 'hub', repo, 'open_clip_model.safetensors', weights | {'text_projection': torch.ones(2, 2)})
    teacher = build(type='mmmilan.OpenCLIPTeacher', model='ViT-B-32-quickgelu', pretrained='openai')
    images = torch.randn(1, 3, 224, 224)
    assert relative_error(teacher(images)[0], own(images)[0]) < 1e-6


def unfolded(visual: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights without QuickGELU's factor."""
    weights = {key: value.clone() for key, value in visual.state_dict().items()}
    for key in weights:
        if '.c_fc.' in key:
            weights[key] /= 1.702
        elif '.c_proj.weight' in key:
            weights[key] *= 1.702
    return weights


SIGLIP2 = dict(type='mmmilan.OpenCLIPTeacher', model='ViT-B-16-SigLIP2', pretrained='webli')
DINOV3 = dict(type='mmmilan.TimmTeacher', model='vit_small_patch16_dinov3.lvd1689m')


@pytest.mark.parametrize('cfg', [SIGLIP2, DINOV3], ids=['open_clip', 'timm'])
def test_no_network(cfg, hub, build, monkeypatch):
    """The error comes at once and names the file to download."""
    with socket.socket() as closed:
        closed.bind(('127.0.0.1', 0))
        point_to(monkeypatch, closed.getsockname()[1])
        start = time.monotonic()
        with pytest.raises(InputError, match=r'timm/\S+ does not answer .*; download \S+\.safetensors .* --teacher M'):
            build(**cfg)
    assert time.monotonic() - start < 8  # building the architecture for its check takes some of it


def test_a_hub_that_keeps_silent(hub, build, monkeypatch):
    monkeypatch.setattr('mmmilan.teachers.weights.HUB_TIMEOUT', 0.3)
    with socket.create_server(('127.0.0.1', 0)) as silent:
        point_to(monkeypatch, silent.getsockname()[1])
        with pytest.raises(InputError, match='does not answer .*Timeout'):
            build(**DINOV3)


def test_a_gated_repository(hub, build):
    hub['model.safetensors'] = (403, 'GatedRepo')
    with pytest.raises(InputError, match='vit_small_patch16_dinov3.lvd1689m is gated; accept its licence there'):
        build(**DINOV3)


def test_a_repository_without_weights(hub, build):
    with pytest.raises(InputError, match='has none of the files model.safetensors, pytorch_model.bin; give'):
        build(**DINOV3)
    hub['model.safetensors'] = (500, '')
    with pytest.raises(InputError, match=r'does not answer \(500\)'):
        build(**DINOV3)


def test_names_without_weights(build):
    with pytest.raises(InputError, match="timm has no weights 'vit_small_patch16_dinov3.clip'; its tags .*lvd1689m"):
        build(type='mmmilan.TimmTeacher', model='vit_small_patch16_dinov3.clip')
    with pytest.raises(
        InputError, match='timm has no weights of vit_base_patch16_xp_224; give them as --teacher MODEL'
    ):
        build(type='mmmilan.TimmTeacher', model='vit_base_patch16_xp_224')


@pytest.mark.parametrize('model', ['ViT-B-32', 'ViT-B-32-quickgelu'])
def test_quick_gelu_is_that_of_the_tag(model, hub, build, shallow, tmp_path, log):
    """Whatever the name of the model says."""
    visual = new_visual(open_clip.get_model_config('ViT-B-32-quickgelu')).eval()
    weights = {f'visual.{key}': value for key, value in randomise(visual).state_dict().items()}
    fill_cache(tmp_path / 'hub', 'timm/vit_base_patch32_clip_224.openai', 'open_clip_model.safetensors', weights)
    teacher = build(type='mmmilan.OpenCLIPTeacher', model=model, pretrained='openai')
    images = torch.randn(2, 3, 224, 224)
    assert_clip(teacher, images, visual, images)
    assert ('openai was trained with QuickGELU, and so it is run' in log.text) == (model == 'ViT-B-32')
