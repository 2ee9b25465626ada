"""The page of a trained model: its figures are those of OpenMMLab's metrics, its pictures those of the images."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch

from helpers import demo_config, read_metrics, rest_slow, save_trained, save_untrained
from mmmilan.engine.launch import test as run_test
from mmmilan.errors import InputError
from mmmilan.visualization.results_page import validate, write_results

TASKS = ('classification', 'detection', 'segmentation')


@pytest.mark.parametrize('task', rest_slow(TASKS, 'classification'))
def test_page(task, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr('mmmilan.evaluation.predictions.FEW', 5)
    weights = save_untrained(task, scenes, tmp_path)
    log = tmp_path / '20260101_000000/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    rows = [dict(step=step, epoch=step // 4 + 1, loss=3.0 / step) for step in range(1, 9)]
    log.write_text('\n'.join(map(json.dumps, rows)))
    comparison = dict(sentence='Pretraining helped: <so much> & more.')
    found = validate(weights)
    page = write_results(found, weights, tmp_path / 'report.html', comparison)
    text = page.read_text()
    assert 'Pretraining helped: &lt;so much&gt; &amp; more.' in text and 'training loss' in text
    assert re.search('3 of (20|8) epochs in batches of 5', text)
    kind = dict(classification='ImageClassifier', detection='Mask R-CNN', segmentation='UperNet')[task]
    assert f'{kind} on a ViT of 32 dimensions and 2 layers' in text
    assert '10 validation images' in text and 'trained on 10 images' in text and 'The worst mistakes' in text
    run_test(weights, work_dir=tmp_path / 'tested')
    figures = read_metrics(tmp_path / 'tested')
    verdict = re.search(r'class="verdict">(.*?)<', text)[1]
    expected = dict(classification='accuracy/top1', segmentation='mIoU', detection='coco/bbox_mAP')[task]
    factor = 100 if task == 'detection' else 1
    shown = [float(value) for value in re.findall(r'([\d.]+) % \(95 % interval', verdict)]
    assert shown[0] == pytest.approx(factor * figures[expected], abs=0.06)
    if task == 'classification':
        assert 100 * np.mean(list(found.scores.values())) == pytest.approx(figures[expected])
    if task == 'detection':
        assert shown[1] == pytest.approx(100 * figures['coco/segm_mAP'], abs=0.06)
    assert text.count('<img') >= 2 * 10
    headings = dict(classification=['By class', 'Confusion matrix'], segmentation=['By class'])
    headings |= dict(detection=['By size and overlap', 'By class'])
    common = ['How it was trained', 'Images', 'The worst mistakes']
    assert [each for each in re.findall('<h2>(.*?)</h2>', text) if each in {*headings[task], *common}] == [
        *headings[task], *common
    ]  # fmt: skip
    if task == 'detection':
        assert all(f'<th>{name}</th>' in text for name in ('AP', 'AP50', 'AP75', 'mask AP')) and '>mask<' in text
    for name in ('gingham', 'tiger'):
        assert f'<td>{name}</td>' in text


def test_an_image_that_does_not_decode_is_left_out(scenes, tmp_path):
    data = shutil.copytree(scenes, tmp_path / 'data')
    min((data / 'val').rglob('*.jpg')).write_bytes(b'no image')
    weights = save_untrained('classification', data, tmp_path)
    assert len(validate(weights).labels) == 9


@pytest.mark.slow
def test_page_of_a_detector_that_finds_nothing(scenes, tmp_path, monkeypatch):
    """AP is 0 of boxes and masks; a class without objects is left out; the legend names what is drawn."""
    monkeypatch.setattr('mmmilan.evaluation.predictions.FEW', 5)
    weights = save_untrained('detection', scenes, tmp_path)
    file = scenes / 'annotations/instances_val.json'
    annotations = json.loads(file.read_text())
    (tiger,) = [each['id'] for each in annotations['categories'] if each['name'] == 'tiger']
    annotations['annotations'] = [each for each in annotations['annotations'] if each['category_id'] != tiger]
    (tmp_path / 'val.json').write_text(json.dumps(annotations))
    content = torch.load(weights, weights_only=False)
    text = (
        content['meta']['cfg'].replace(str(file), str(tmp_path / 'val.json')).replace('score_thr=0.0', 'score_thr=2.0')
    )
    content['meta']['cfg'] = text.replace("'annotations/instances_val.json'", repr(str(tmp_path / 'val.json')))
    torch.save(content, weights)
    page = write_results(validate(weights), weights, tmp_path / 'report.html').read_text()
    assert re.search('verdict">Box AP 0.0 % .*, mask AP 0.0 % ', page)
    assert 'Left out: 1 class, of which these images have nothing.' in page and '<td>tiger</td>' not in page
    legend = re.search('<ul class="legend">.*?</ul>', page)[0]
    assert 'taxi' in legend and 'tiger' not in legend


def test_what_cannot_be_read_or_written(scenes, tmp_path):
    weights = save_untrained('classification', scenes, tmp_path)
    with pytest.raises(InputError, match='does not end in .html'):
        write_results(validate(weights), weights, tmp_path / 'page.txt')
    cfg = demo_config('classification')
    cfg.val_dataloader.dataset.data_root = 'gone'
    with pytest.raises(InputError, match='gone does not exist'):
        validate(save_trained(cfg, tmp_path / 'a.pth', 'abcdefghij'))
