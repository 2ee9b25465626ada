"""Scenes: a small captioned data set that is drawn, not downloaded.

A scene is a textured background, one large main object and up to two small ones. An object has an outline and one of
ten kinds (tiger, gold, ladybird, ...), which determines its colour and pattern. The class of an image is the kind of
its main object. Kind, outline, background, place and angle are drawn independently of one another. Every colour belongs
to two kinds, and so do most patterns, so neither colours nor patterns alone reveal the class.

:func:`write_scenes` writes the same images for four tasks: image folders (classification), COCO instances (detection),
label maps (segmentation) and captions (image-text training, retrieval).
"""

from scenes.dataset import write_scenes
from scenes.drawing import make_scene

__all__ = ['make_scene', 'write_scenes']
