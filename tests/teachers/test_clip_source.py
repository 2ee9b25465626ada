"""Files that are no teacher's are refused with the reason."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers import build_error


def test_teacher_file_of_another_kind(clip_file, tmp_path):
    def message_for(path: Path) -> str:
        return build_error(dict(type='mmmilan.OpenCLIPTeacher', pretrained=str(path)))

    torch.save({'encoder.weight': torch.zeros(2), 'encoder.bias': torch.zeros(2)}, tmp_path / 'unknown.pt')
    message = message_for(tmp_path / 'unknown.pt')
    assert message.startswith(f"{tmp_path}/unknown.pt is not in OpenAI's CLIP layout")
    assert 'it begins with encoder.weight, encoder.bias' in message

    content = Path(clip_file).read_bytes()
    (tmp_path / 'truncated.pt').write_bytes(content[: len(content) // 2])
    message = message_for(tmp_path / 'truncated.pt')
    assert message.startswith(f'{tmp_path}/truncated.pt is incomplete or damaged')

    (tmp_path / 'empty.pt').write_bytes(b'')
    assert str(tmp_path / 'empty.pt') in message_for(tmp_path / 'empty.pt')

    weights = torch.load(clip_file)
    weights['visual.ln_post.weight'] = torch.zeros(5)
    del weights['visual.ln_post.bias']
    torch.save(weights, tmp_path / 'misfit.pt')
    message = message_for(tmp_path / 'misfit.pt')
    assert message.startswith(f'{tmp_path}/misfit.pt looks like a CLIP image tower but does not fit')
    assert 'ln_post' in message

    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / 'script.pt')
    assert f"{tmp_path}/script.pt is not in OpenAI's CLIP layout" in message_for(tmp_path / 'script.pt')
    script = (tmp_path / 'script.pt').read_bytes()
    (tmp_path / 'half_script.pt').write_bytes(script[: len(script) // 2])
    assert str(tmp_path / 'half_script.pt') in message_for(tmp_path / 'half_script.pt')
