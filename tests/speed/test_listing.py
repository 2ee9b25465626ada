"""What a folder of many images costs before the first is used: that it is measured."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from helpers import ROOT


@pytest.mark.slow
def test_both_commands_reach_their_first_images(tmp_path):
    command = [sys.executable, ROOT / 'tools/speed/listing.py', '--folder', tmp_path / 'images', '--images', '1100']
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert len(list(tmp_path.glob('images/*/*.png'))) == 1100
    found = dict(re.findall(r'(\w+): ([\d.]+) s of CPU, \d+ MB above the imports', done.stdout))
    assert found.keys() == {'pretrain', 'embed'} and all(0 < float(seconds) < 60 for seconds in found.values())
