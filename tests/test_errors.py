"""The messages of ``InputError``: one form in the whole project."""

from __future__ import annotations

import ast

from helpers import ROOT

SOURCES = sorted(path for folder in ('mmmilan', 'tools') for path in (ROOT / folder).rglob('*.py'))
ERRORS = ('InputError', 'CorruptImageError')


def text_of(node: ast.expr) -> str:
    """A message as it stands in the source: f-strings with their expressions in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return ''.join(text_of(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    node = node.value if isinstance(node, ast.FormattedValue) else node
    return f'{{{ast.unparse(node)}}}'


def messages(source: str) -> list[str]:
    """The messages of all errors that a file raises."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    return [text_of(call.args[0]) for call in calls if getattr(call.func, 'id', None) in ERRORS]


def is_cause_and_remedy(message: str) -> bool:
    """Whether it is 'cause; remedy.', or ends with another message of that form, or with a remedy."""
    another = ('{fault}', '{error}', '{str(error)}', '{sentence}', '{fault.reason}')
    return message.endswith(another) or (';' in message and message.endswith(('.', '{rule}', 'rest=rest)}')))


def test_every_message_is_a_cause_and_a_remedy():
    found = [(str(path.relative_to(ROOT)), message) for path in SOURCES for message in messages(path.read_text())]
    assert len(found) > 150
    assert [place for place in found if not is_cause_and_remedy(place[1])] == []


def test_the_messages_are_found():
    assert messages('raise InputError(f"{path} is broken; " + "replace it.")') == ['{path} is broken; replace it.']
    assert not is_cause_and_remedy('It is broken.') and not is_cause_and_remedy('It is broken; replace it')
