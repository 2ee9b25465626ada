"""The console script: commands are functions of the package."""

from __future__ import annotations

import functools
import inspect
import re
import shlex
from pathlib import Path

import pytest
from docstring_parser import parse

import mmmilan
from helpers import ROOT
from mmmilan import cli
from mmmilan.arguments import typed
from mmmilan.checkpoints.zoo import zoo_models
from mmmilan.errors import InputError

NAMES = [name for names in cli.COMMANDS.values() for name in names]


@pytest.fixture
def called(monkeypatch):
    """The arguments with which a command calls its function, in place of the call."""

    def call(line: str | list[str]) -> dict:
        words = line.split() if isinstance(line, str) else line
        function = getattr(mmmilan, words[0].replace('-', '_'))
        taken: dict = {}

        @functools.wraps(function)
        def record(*args, **kwargs):
            taken.update(inspect.signature(function).bind(*args, **kwargs).arguments)

        monkeypatch.setattr(mmmilan, words[0].replace('-', '_'), record)
        cli.run(words)
        monkeypatch.setattr(mmmilan, words[0].replace('-', '_'), function)
        return taken

    return call


def shown(capsys) -> str:
    return ' '.join(capsys.readouterr().out.replace('│', ' ').split())


def test_help_describes_each_command_in_its_group(capsys):
    cli.main(['--help'])
    text = shown(capsys)
    for title, names in cli.COMMANDS.items():
        assert title in text
        for name in names:
            function = getattr(mmmilan, name.replace('-', '_'))
            assert f'{name} {inspect.getdoc(function).splitlines()[0]}' in text


@pytest.mark.parametrize('name', NAMES)
def test_help_explains_every_parameter(name, capsys):
    """The help is made of signature and docstring; every parameter has a description."""
    function = getattr(mmmilan, name.replace('-', '_'))
    explained = {parameter.arg_name: parameter.description for parameter in parse(function.__doc__).params}
    assert set(explained) == set(inspect.signature(function).parameters)
    cli.main([name, '--help'])
    text = shown(capsys)
    assert ' '.join(parse(function.__doc__).short_description.split()) in text
    assert all(' '.join(each.split()[:2]) in text for name, each in explained.items() if name != 'local_rank')


@pytest.mark.parametrize('name', NAMES)
def test_usage_works_as_it_is_printed(name, capsys, called):
    """One word in place of each word in capitals; several in place of one with dots."""
    cli.main([name, '--help'])
    usage = capsys.readouterr().out.splitlines()[0]
    words = usage.removeprefix(f'Usage: mmmilan {name} ').replace(' [OPTIONS]', '').replace('[', '').replace(']', '')
    line, expected = [name], {}
    for word in words.split():
        several = word.endswith('...')
        value = [f'{word[0]}1', f'{word[0]}2'] if several else [f'{word}-value']
        line += value
        expected[word.strip('.').lower()] = value if several else value[0]
    required = dict(heat_maps='--texts water').get(name.replace('-', '_'), '')
    taken = called(' '.join([*line, required]).strip())
    assert {key: taken[key] for key in expected} == expected


def test_arguments_come_in_one_order():
    """Data, then checkpoint, then the output or the text."""
    order = ['config', 'data', 'images', 'checkpoint', 'checkpoints', 'out', 'text']
    for name in NAMES:
        parameters = inspect.signature(getattr(mmmilan, name.replace('-', '_'))).parameters.values()
        positional = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        assert positional == sorted(positional, key=order.index), name
    assert set(NAMES) <= {name.replace('_', '-') for name in dir(mmmilan)}


def documented() -> list[str]:
    """The commands of the README's table and of all code blocks of README and docs."""
    lines = []
    for path in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))):
        text = path.read_text().replace('\\\n', ' ')
        blocks = ''.join(re.findall(r'^```bash\n(.*?)^```', text, re.M | re.S))
        assert not re.search(r'^    mmmilan ', text, re.M), f'{path}: an indented block is not tested; use ```bash'
        lines += re.findall(r'^(?:\w+=\S+ )*mmmilan ([^#\n]+)', blocks, re.M)
        lines += re.findall(r'^\|[^|]+\| `mmmilan ([^`]+)` \|', text, re.M)
    return [line.strip() for line in lines]


@pytest.mark.parametrize('line', documented())
def test_documented_commands_can_be_typed(line, called):
    """Each word is what its argument is: a checkpoint is a file of weights or in the zoo, and nothing else is."""
    taken = called(shlex.split(line))
    assert taken
    for name, value in taken.items():
        for word in value if isinstance(value, list) else [value]:
            is_model = str(word).endswith(('.pth', '.safetensors')) or word in (*zoo_models(), 'CHECKPOINT', 'teacher')
            if name in ('data', 'images', 'text'):
                assert not is_model, (name, word)
            elif name in ('checkpoint', 'checkpoints', 'start', 'compare') and word != 'scratch':
                assert is_model, (name, word)


@pytest.mark.parametrize(
    ('line', 'expected'),
    [
        ('embed a.jpg b.jpg m.pth o.npz', dict(images=['a.jpg', 'b.jpg'], checkpoint='m.pth', out='o.npz')),
        ('embed photos --checkpoint m.pth --out=o.npz', dict(images=['photos'], checkpoint='m.pth', out='o.npz')),
        ('embed --images a b --out o.npz --checkpoint m.pth --patches', dict(images=['a', 'b'], patches=True)),
        ('pretrain photos --out runs/x', dict(data=['photos'], out='runs/x')),
        ('pretrain p q runs/x --img-size 96 64', dict(data=['p', 'q'], img_size=(96, 64))),
        ('pretrain p x --arch.embed_dims 48 --arch.num_layers=2', dict(arch=dict(embed_dims=48, num_layers=2))),
        ('pretrain p x --arch {"embed_dims":48}', dict(arch=dict(embed_dims=48))),
        ('pretrain p x --arch dict(embed_dims=48)', dict(arch=dict(embed_dims=48))),
        ('pretrain p x --teacher.type T --teacher.model.a 1', dict(teacher=dict(type='T', model=dict(a=1)))),
        ('pretrain p x --train-dataloader.num-workers=2', dict(changes={'train_dataloader.num_workers': 2})),
        ('pretrain p x --arch.embed-dims 48 --arch.num-layers=2', dict(arch=dict(embed_dims=48, num_layers=2))),
        ('pretrain p x --model.masking.mask_ratio 0.5', dict(changes={'model.masking.mask_ratio': 0.5})),
        ('train c.py --cfg-options a.b=dict(c=[1,2]) d=None', dict(changes={'a.b': dict(c=[1, 2]), 'd': None})),
        ('train c.py --resume', dict(resume=True)),
        ('train c.py --resume last.pth', dict(resume='last.pth')),
        ('train c.py --local_rank=3 --launcher pytorch', dict(local_rank=3, launcher='pytorch')),
        ('test c.py', dict(config='c.py')),
        ('report p q m.pth', dict(data=['p', 'q'], checkpoint='m.pth')),
        ('search p m.pth water --top 3', dict(images=['p'], checkpoint='m.pth', text='water', top=3)),
        ('figures p a.pth teacher out', dict(images='p', checkpoints=['a.pth', 'teacher'], out='out')),
    ],
)  # fmt: skip
def test_a_line_and_the_arguments_of_its_function(called, line, expected):
    taken = called(line)
    assert {key: taken[key] for key in expected} == expected


def test_a_call_is_typed_so_that_it_is_taken_as_it_was(called):
    """With names that a shell would divide, lists, dicts, and changes nested or dotted."""
    arch, backends = dict(embed_dims=48, num_layers=2), [dict(type='LocalVisBackend')]
    options = dict(
        arch=arch, freeze=True, resume=False, lr=1e-05, classes=['a b', "it's"], compare='scratch', seed=None
    )
    changes = {'visualizer': dict(vis_backends=backends), 'val_dataloader.num_workers': 0, 'param_scheduler': None}
    line = typed('finetune', ['my photos', Path('runs/x')], options, changes)
    assert line.startswith("mmmilan finetune 'my photos' runs/x --arch '{")
    taken = called(shlex.split(line)[1:])
    flat = {'visualizer.vis_backends': backends, 'val_dataloader.num_workers': 0, 'param_scheduler': None}
    expected = dict(data='my photos', out='runs/x', arch=arch, freeze=True, lr=1e-05, classes=['a b', "it's"])
    assert {key: taken.get(key) for key in (*expected, 'compare')} == expected | dict(compare='scratch')
    assert taken['changes'] == flat and not {'resume', 'seed'} & taken.keys()


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('convert a.pth', '--out'),
        ('convert a.pth b.pth --to onnx', '"timm"'),
        ('convert a.pth b.pth --speed 3', 'Unknown option: --speed'),
        ('convert a.pth b.pth --a.b 3', '--a.b is unknown here'),
        ('transmogrify', 'transmogrify is no command; see mmmilan --help.'),
        ('help', 'help is no command; see mmmilan --help.'),
        ('Heat_Maps a b', 'Heat_Maps is no command; the nearest is heat-maps.'),
        ('--hlep', '--hlep is no command; see mmmilan --help.'),
        ('convert none.pth b.pth', 'none.pth'),
        ('embed a b', 'parameter IMAGES requires an argument'),
        ('embed a b c --batch-size 0.5', 'batch_size=0.5 is not a whole number; give a whole number from 1 to'),
        ('embed a b c --batchsize 5', 'Did you mean --batch-size?'),
        ('pretrain p o --model.a', '--model.a has no value'),
        ('pretrain p o --model.a --seed 3', '--model.a has no value'),
        ('pretrain p o --epoch 3', 'Nothing reads epoch; the nearest name is epochs.'),
        ('pretrain p o --batchsize 3', 'Nothing reads batchsize; the nearest name is batch_size.'),
        ('pretrain p o --lr 3', 'the nearest name is optim_wrapper.optimizer.lr.'),
        ('pretrain p o --mask-ratio 0.5', 'the nearest name is model.masking.mask_ratio.'),
        ('pretrain p o --train-dataloder.batch-size 2', 'the nearest name is train_dataloader.batch_size.'),
        ('pretrain p o --train_dataloder.batch_size 2', 'the nearest name is train_dataloader.batch_size.'),
        ('pretrain p o --arch {embed_dims', 'is not a dict'),
        ('train c.py --cfg-options a', '--cfg-options a is not KEY=VALUE'),
    ],
)
def test_errors_are_one_line(line, message):
    with pytest.raises(SystemExit) as error:
        cli.main(line.split())
    assert message in str(error.value) and '\n' not in str(error.value)


def test_numbers_are_checked_by_the_function_where_pydantic_is_loaded():
    pytest.importorskip('pydantic')
    with pytest.raises(InputError, match=r'^batch_size=0.5 is not a whole number; '):
        cli.run(['embed', 'a', 'b', 'c', '--batch-size', '0.5'])


def test_an_unknown_argument_in_python():
    with pytest.raises(InputError, match=r'^embed takes no batchsize; the nearest name is batch_size.$'):
        mmmilan.embed('photos', 'm.pth', 'o.npz', batchsize=3)
    with pytest.raises(InputError, match='Nothing reads nothing; '):
        mmmilan.pretrain('photos', 'out', nothing=1)
