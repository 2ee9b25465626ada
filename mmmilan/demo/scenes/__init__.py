"""Scenes: a small captioned data set that is drawn, not downloaded.

A scene is a textured background, one large main object and up to two small ones; an object is an
outline of one of ten kinds (tiger, gold, ladybird, ...), which a pattern in a colour makes. The class of
an image is the kind of its main object. Kind, outline, background, place and angle are drawn
independently of one another. Every colour serves two kinds and most patterns do, so neither colours
nor patterns alone give the class away.

:func:`write_scenes` writes the same images for four tasks: image folders (classification), COCO
instances (detection), label maps (segmentation) and captions (image-text training, retrieval).
"""

from mmmilan.demo.scenes.dataset import write_scenes
from mmmilan.demo.scenes.drawing import make_scene

__all__ = ['make_scene', 'write_scenes']
