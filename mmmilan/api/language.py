"""Search, heat maps and zero-shot classification by texts, in the joint space of a MILAN checkpoint's teacher."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mmmilan import arguments
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

    Under ``python -m mmmilan.torchrun`` each process takes a part of the images, and all return the same; a file of
    features is read by each.

    Args:
        images: folder of images, paths of images, or a file of ``mmmilan.embed`` (.npz or .parquet), whose column
            ``embedding`` is searched without reading an image.
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
    from mmmilan.engine.distributed import joined
    from mmmilan.evaluation.feature_files import check_written_by, is_features, read_embeddings
    from mmmilan.evaluation.features import join

    with joined():
        paths, embeddings = read_embeddings(images) if is_features(images) else (list_images(images), None)
        space = JointSpace(checkpoint, device, teacher)
        wanted = space.embed_texts([text])[0]
        if embeddings is not None:
            if embeddings.shape[1] != len(wanted):
                raise InputError(
                    f'{images} has embeddings of {embeddings.shape[1]} dimensions but {checkpoint} of {len(wanted)}; '
                    'give the checkpoint that wrote the file.'
                )
            check_written_by(images, space.model.backbone, checkpoint)
            if not paths:
                raise InputError(f'{images} has no image that could be read; give another file.')
            cosines = embeddings.to(wanted.device) @ wanted
        else:

            def encode(inputs: Tensor) -> dict[str, Tensor]:
                return dict(cosine=space.model.encode_image(inputs) @ wanted)

            found = join(space.extract(paths, encode, 'Search', batch_size=batch_size))
            paths, cosines = [paths[i] for i in found['position']], torch.from_numpy(found['cosine'])
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
    image, with one map per text. Under ``python -m mmmilan.torchrun`` each process takes a part of the images; a file
    of features is read by each.

    Args:
        images: folder of images, paths of images, or a file of ``mmmilan.embed`` with patches (.npz or .parquet), for
            which no image is read and no figure is drawn.
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
    from mmengine.dist import get_dist_info, is_main_process

    from mmmilan.datasets.image_folder import as_sources, list_images
    from mmmilan.engine.distributed import joined, on_main
    from mmmilan.evaluation.feature_files import check_written_by, is_features, read_features, write_npz
    from mmmilan.files import check_output_folder, short_name

    with joined():
        from_file = is_features(images)
        found = read_features(images, ['class_token', 'patch_tokens']) if from_file else list_images(images)
        paths, *tokens = (found[0], *found[1]) if from_file else (found,)
        pictures = [] if from_file else [f'{i:04}-{short_name(Path(path).stem)}' for i, path in enumerate(paths)]
        names = ['heat_maps.npz', *(f'{name}{ending}' for name in pictures for ending in ('.pdf', '.png'))]
        inputs, folder = [checkpoint, *as_sources(images)], Path(out)
        on_main(lambda: check_output_folder(folder, names, inputs, overwrite=overwrite, pictures=not from_file))
        if not paths:
            raise InputError(f'{images} has no image that could be read; give another file.')
        space = JointSpace(checkpoint, device, teacher)
        if from_file:
            check_written_by(images, space.model.backbone, checkpoint)
        texts = [texts] if isinstance(texts, str) else list(texts)
        wanted = space.embed_texts(texts)

        def encode(inputs: Tensor) -> dict[str, Tensor]:
            return dict(inputs=inputs, cosine=compare(space.model.embed_joint(inputs)))

        def compare(embeddings: Tensor) -> Tensor:
            cosine = (embeddings[:, 1:] @ wanted.T).transpose(1, 2)
            return cosine.unflatten(2, tuple(space.model.backbone.patch_resolution))  # [B, T, rows, columns]

        positions, cosine, (rank, world_size) = [], [], get_dist_info()
        if from_file:
            positions, cosine = range(len(paths)), [compare(rows).cpu() for rows in project_tokens(space, *tokens)]
        for batch in () if from_file else space.extract(paths, encode, 'Heat maps', batch_size=batch_size):
            inputs, maps = torch.from_numpy(batch['inputs']), torch.from_numpy(batch['cosine'])
            own = np.arange(rank, len(inputs), world_size)  # each process draws some
            where = [folder / pictures[i] for i in batch['position'][own]]
            draw_maps(space, where, inputs[own], maps[own].flatten(2), texts)
            positions += batch['position'].tolist()
            cosine.append(maps)
        paths, path = np.array([paths[i] for i in positions]), folder / 'heat_maps.npz'
        if is_main_process():
            write_npz(path, paths=paths, texts=np.array(texts), cosine=torch.cat(cosine))
    return path


def project_tokens(space: JointSpace, class_tokens: np.ndarray, patch_tokens: np.ndarray) -> Iterator[Tensor]:
    """Project class tokens [M, D] and patch tokens [M, N, D] of the encoder to embeddings [B, 1 + N, C]."""
    import numpy as np
    import torch

    device = next(space.model.parameters()).device
    for start in range(0, len(class_tokens), 32):
        rows = slice(start, start + 32)
        latent = torch.from_numpy(np.concatenate([class_tokens[rows, None], patch_tokens[rows]], axis=1)).to(device)
        with torch.no_grad():
            yield space.model.project_joint(latent)


def draw_maps(space: JointSpace, paths: Sequence[Path], pixels: Tensor, cosine: Tensor, texts: Sequence[str]) -> None:
    """Draw a figure for each image of a batch, at ``paths`` without ending."""
    from mmmilan.visualization.pictures import draw_heat, draw_pictures, save_figure, to_images

    images = to_images(pixels, space.model.data_preprocessor)
    for path, image, maps in zip(paths, images, cosine, strict=True):
        columns = {'image': [image]}
        for text, values in zip(texts, maps, strict=True):
            title = f'{text}\n{values.min():.3f} to {values.max():.3f}'
            columns[title] = [draw_heat(image, values, 'inferno')]
        save_figure(draw_pictures(columns, 'inferno', 'cosine'), path)


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

    Under ``python -m mmmilan.torchrun`` each process takes a part of the images, and all return the same.

    Args:
        data: folder with a folder of images for each class. If it is divided into splits, ``val`` is taken, or else
            ``test``.
        checkpoint: checkpoint of MILAN with its decoder, or of MaskCLIP: your own or a model of the zoo.
        class_names: the class names for the prompts, in the alphabetical order of the folders; by default the names of
            the folders, or what ImageNet-1k calls folders such as n01440764.
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
    from mmmilan.engine.distributed import joined
    from mmmilan.evaluation.features import join
    from mmmilan.evaluation.zero_shot import embed_classes, name_classes, names_of_folders, nearest_text, read_templates

    with joined():
        files, labels, classes = list_labelled_images(data)
        if len(classes) < 2:
            raise InputError(
                f'{data} has no folders of classes; give a folder with one folder of images for each class.'
            )
        names = name_classes(classes, class_names or names_of_folders(classes), 'class_names')
        space = JointSpace(checkpoint, device, teacher)
        classifier = embed_classes(space.texts, names, read_templates(templates))
        encode = nearest_text(dict(predicted=space.model.encode_image), classifier)
        found = join(space.extract(files, encode, 'Zero-shot classification', batch_size=batch_size))
    return Percent(100 * (found['predicted'] == labels[found['position']]).mean())
