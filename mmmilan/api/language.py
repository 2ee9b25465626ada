"""Search, heat maps and zero-shot classification by texts, in the joint space of a MILAN checkpoint's teacher."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mmmilan import arguments
from mmmilan.api.feature_files import is_features, read_embeddings, read_features, write_npz
from mmmilan.api.inference import Inferencer
from mmmilan.arguments import checked
from mmmilan.errors import InputError

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    import numpy as np
    from torch import Tensor


class Found(NamedTuple):
    """An image and the cosine of its embedding with the text."""

    path: str
    cosine: float


class Percent(float):
    """A number that is printed as per cent, with one decimal."""

    def __str__(self) -> str:
        return f'{self:.1f} %'


class JointSpace(Inferencer):
    """Embeddings of images, of their patches and of texts, by a checkpoint of :class:`MILAN` or :class:`MaskCLIP`.

    Args:
        checkpoint: a checkpoint of your own or a model of the zoo, with its decoder and a CLIP as teacher.
        device: where to run, by default on the GPU if there is one.
        teacher: the teacher, if it is not where the checkpoint says.

    Raises:
        InputError: the checkpoint has no decoder, or its teacher has no text tower.
    """

    def __init__(self, checkpoint: str | os.PathLike, device: str | None = None, teacher: str | None = None) -> None:
        from mmmilan.api.models import get_model

        model = get_model(checkpoint, True, encoder_only=False, teacher=teacher)
        if not hasattr(model, 'embed_joint'):
            raise InputError(f'{checkpoint} is a {type(model).__name__}; texts need a checkpoint of MILAN or MaskCLIP.')
        super().__init__(model, device=device)
        self.texts = model.text_tower().to(next(model.parameters()).device)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [T, C] of length 1, float32.

        Raises:
            InputError: there is no text, or an empty one.
        """
        if not texts or not all(texts):
            raise InputError('There is an empty text; say what to look for.')
        return self.texts(texts)

    def embed_images(self, images: Sequence[str], batch_size: int = 32) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """Paths, normalised images [B, 3, H, W] and their embeddings [B, 1 + N, C], batch by batch.

        Images that cannot be used are left out, see :meth:`usable_batches`.
        """
        import torch

        for positions, batch in self.usable_batches(images, batch_size):
            with torch.no_grad():
                yield [images[i] for i in positions], batch, self.model.embed_joint(batch)


@checked
def search(
    images: arguments.Paths,
    checkpoint: arguments.Path,
    text: arguments.Text,
    *,
    top: arguments.Count = 10,
    batch_size: arguments.Count = 32,
    device: arguments.Device | None = None,
    teacher: arguments.Path | None = None,
) -> list[Found]:
    """Find the images that a text describes, best first.

    Args:
        images: folder of images, paths of images, or a file of ``mmmilan.embed`` (.npz), whose column ``embedding`` is
            searched without reading an image.
        checkpoint: checkpoint of MILAN with its decoder, your own or a model of the zoo; for a file, the one that wrote
            it.
        text: what to look for, such as 'a red boat'.
        top: number of images to return.
        batch_size: number of images that the model sees at once.
        device: where to run, by default on the GPU if there is one.
        teacher: the teacher, if it is not where the checkpoint says: a name or a file, as for ``mmmilan.pretrain``.

    Returns:
        Paths and cosines.

    Raises:
        InputError: there is no image, the file has no embeddings, or the checkpoint has no decoder or no text tower.

    Examples:
        >>> mmmilan.search('photos', 'runs/photos/milan.pth', 'a red boat', top=1)
        [Found(path='photos/harbour.jpg', cosine=0.31)]
    """
    import torch

    from mmmilan.datasets.image_folder import list_images

    paths, embeddings = read_embeddings(images) if is_features(images) else (list_images(images), None)
    space = JointSpace(checkpoint, device, teacher)
    wanted = space.embed_texts([text])[0]
    if embeddings is not None:
        if embeddings.shape[1] != len(wanted):
            raise InputError(
                f'{images} has embeddings of {embeddings.shape[1]} dimensions but {checkpoint} of {len(wanted)}; give '
                'the checkpoint that wrote the file.'
            )
        cosines = embeddings.to(wanted.device) @ wanted
    else:
        found = [(names, rows[:, 0] @ wanted) for names, _, rows in space.embed_images(paths, batch_size)]
        if not found:
            raise InputError(f'None of the images of {images} decodes; give images.')
        paths, cosines = [name for names, _ in found for name in names], torch.cat([cosines for _, cosines in found])
    best = cosines.argsort(descending=True, stable=True)[:top].tolist()
    return [Found(paths[i], round(float(cosines[i]), 4)) for i in best]


@checked
def heat_maps(
    images: arguments.Paths,
    checkpoint: arguments.Path,
    out: arguments.Path,
    *,
    texts: arguments.Texts | arguments.Text,
    batch_size: arguments.Count = 32,
    device: arguments.Device | None = None,
    overwrite: bool = False,
    teacher: arguments.Path | None = None,
) -> Path:
    """Show where texts apply in images: the cosine of each patch with each text, with an open vocabulary.

    Writes ``heat_maps.npz`` (``paths``, ``texts`` and ``cosine`` [M, T, rows, columns], float32) and a figure for each
    image, with one map per text.

    Args:
        images: folder of images, paths of images, or a file of ``mmmilan.embed`` with patches (.npz), for which no
            image is read and no figure is drawn.
        checkpoint: checkpoint of MILAN with its decoder, your own or a model of the zoo.
        out: folder to write.
        texts: what to look for.
        batch_size: number of images that the model sees at once.
        device: where to run, by default on the GPU if there is one.
        overwrite: replace the files that are in ``out``.
        teacher: the teacher, if it is not where the checkpoint says: a name or a file, as for ``mmmilan.pretrain``.

    Returns:
        The file of cosines.

    Raises:
        InputError: there is no image, the file has no patches, the checkpoint has no decoder or no text tower, or
            ``out`` must not or cannot be written.
    """
    import numpy as np
    import torch

    from mmmilan.datasets.image_folder import as_sources, list_images
    from mmmilan.files import check_output_folder

    from_file = is_features(images)
    found = read_features(images, ['class_token', 'patch_tokens']) if from_file else list_images(images)
    pictures = {} if from_file else {path: f'{i:04}-{Path(path).stem}' for i, path in enumerate(found)}
    names = ['heat_maps.npz', *(f'{name}{ending}' for name in pictures.values() for ending in ('.pdf', '.png'))]
    inputs = [checkpoint, *as_sources(images)]
    folder = check_output_folder(out, names, inputs, overwrite=overwrite, pictures=not from_file)
    space = JointSpace(checkpoint, device, teacher)
    texts = [texts] if isinstance(texts, str) else list(texts)
    wanted = space.embed_texts(texts)
    batches = project_tokens(space, *found) if from_file else space.embed_images(found, batch_size)
    paths, parts = [], []
    for names, pixels, embeddings in batches:
        cosine = (embeddings[:, 1:] @ wanted.T).transpose(1, 2)  # [B, T, N]
        if pixels is not None:
            draw_maps(space, [folder / pictures[name] for name in names], pixels, cosine, texts)
        paths += names
        parts.append(cosine.unflatten(2, tuple(space.model.backbone.patch_resolution)).cpu())
    if not parts:
        raise InputError(f'None of the images of {images} decodes; give images.')
    return write_npz(folder / 'heat_maps.npz', paths=np.array(paths), texts=np.array(texts), cosine=torch.cat(parts))


def project_tokens(
    space: JointSpace, paths: list[str], tokens: list[np.ndarray]
) -> Iterator[tuple[list[str], None, Tensor]]:
    """Project class tokens [M, D] and patch tokens [M, N, D] of the encoder, as :meth:`JointSpace.embed_images` does.

    Yields:
        Paths, None in place of the images, and embeddings [B, 1 + N, C].
    """
    import numpy as np
    import torch

    class_tokens, patch_tokens = tokens
    device = next(space.model.parameters()).device
    for start in range(0, len(paths), 32):
        rows = slice(start, start + 32)
        latent = torch.from_numpy(np.concatenate([class_tokens[rows, None], patch_tokens[rows]], axis=1)).to(device)
        with torch.no_grad():
            yield paths[rows], None, space.model.project_joint(latent)


def draw_maps(space: JointSpace, paths: Sequence[Path], pixels: Tensor, cosine: Tensor, texts: Sequence[str]) -> None:
    """Draw a figure for each image of a batch, at ``paths`` without ending."""
    from mmmilan.visualization.paper import draw_pictures, save_figure
    from mmmilan.visualization.pictures import draw_heat, to_images

    images = to_images(pixels, space.model.data_preprocessor)
    for path, image, maps in zip(paths, images, cosine, strict=True):
        columns = {'image': [image]}
        columns |= {text: [draw_heat(image, values, 'inferno')] for text, values in zip(texts, maps, strict=True)}
        save_figure(draw_pictures(columns), path)


@checked
def zero_shot(
    data: arguments.Path,
    checkpoint: arguments.Path,
    *,
    class_names: arguments.Texts | None = None,
    templates: arguments.Texts | arguments.Text = ('a photo of a {}.',),
    batch_size: arguments.Count = 32,
    device: arguments.Device | None = None,
    teacher: arguments.Path | None = None,
) -> Percent:
    """Classify the images of a labelled folder by the names of its classes, without training (zero-shot).

    Args:
        data: folder with a folder of images for each class.
        checkpoint: checkpoint of MILAN with its decoder, or of MaskCLIP: your own or a model of the zoo.
        class_names: the class names for the prompts, in the alphabetical order of the folders; by default the names of
            the folders.
        templates: prompts with ``{}`` for the name of a class; the embeddings of several are averaged.
        batch_size: number of images that the model sees at once.
        device: where to run, by default on the GPU if there is one.
        teacher: the teacher, if it is not where the checkpoint says: a name or a file, as for ``mmmilan.pretrain``.

    Returns:
        Top-1 accuracy in percent, over the images that decode.

    Raises:
        InputError: there are fewer than two classes, the number of names is not the number of classes, the names are
            the folders' in another order, or the checkpoint has no decoder or no text tower.
    """
    from mmmilan.datasets.splits import list_labelled_images
    from mmmilan.evaluation.zero_shot import embed_classes, name_classes, read_templates

    files, labels, classes = list_labelled_images(data)
    if len(classes) < 2:
        raise InputError(f'{data} has no folders of classes; give a folder with one folder of images for each class.')
    names = name_classes(classes, class_names or classes, 'class_names')
    space = JointSpace(checkpoint, device, teacher)
    classifier = embed_classes(space.texts, names, read_templates(templates))
    label_of, hits, total = dict(zip(files, labels.tolist(), strict=True)), 0, 0
    for paths, _, embeddings in space.embed_images(files, batch_size):
        predicted = (embeddings[:, 0] @ classifier.T).argmax(1).tolist()
        hits += sum(label_of[path] == label for path, label in zip(paths, predicted, strict=True))
        total += len(paths)
    if not total:
        raise InputError(f'None of the images of {data} decodes; give images.')
    return Percent(100 * hits / total)
