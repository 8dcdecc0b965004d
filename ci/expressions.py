"""GitHub's `${{ }}` expressions: parsed, evaluated, and asked what they refer to.

The subset is the language without `hashFiles`: literals, contexts, `.name`, `[index]`, `.*`, operators, and the
functions below. What is outside it is an ExpressionError, never a guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

TOKEN = re.compile(
    r"\s*(?:(?P<number>-?(?:0x[0-9a-fA-F]+|\d+(?:\.\d+)?))|(?P<string>'(?:[^']|'')*')"
    r"|(?P<operator>&&|\|\||==|!=|<=|>=|[!<>()\[\],.*])|(?P<name>[A-Za-z_][\w-]*))"
)
INLINE = re.compile(r"\$\{\{(.*?)\}\}", re.S)
LITERALS = {"true": True, "false": False, "null": None}
STATUS = ("success", "failure", "always", "cancelled")

Node = tuple[Any, ...]
Functions = Mapping[str, Callable[..., Any]]


class ExpressionError(ValueError):
    """The text is no expression of the subset, or refers to what is not there."""


class Open(dict[str, Any]):
    """A context in which an absent name is null, as in `vars`; in the others it is an error, here a typing mistake."""


def parse(text: str) -> Node:
    """The syntax tree of one expression, without its braces."""
    parser = _Parser(text)
    node = parser.binary(0)
    if parser.peek():
        raise ExpressionError(f"{text.strip()!r}: unexpected {parser.peek()!r}")
    return node


def evaluate(text: str, context: Mapping[str, Any], status: Functions | None = None) -> Any:
    """The value of one expression. `status` holds success(), failure(), always() and cancelled()."""
    return _value(parse(text), context, {**FUNCTIONS, **(status or {})})


def interpolate(text: str, context: Mapping[str, Any], status: Functions | None = None) -> str:
    """The text with every `${{ }}` replaced by its value as GitHub prints it."""
    return INLINE.sub(lambda found: shown(evaluate(found[1], context, status)), text)


def holds(condition: str, context: Mapping[str, Any], status: Functions) -> bool:
    """A step's or job's `if`: without a status function it means success() as well."""
    text = condition.strip()
    whole = INLINE.fullmatch(text)
    text = whole[1] if whole else text
    asked = any(name in STATUS for name in calls(text))
    return (asked or bool(status["success"]())) and truth(evaluate(text, context, status))


def references(text: str) -> set[tuple[str, ...]]:
    """What one expression reads: ("needs", "cpu", "result"); an index that is computed ends the path."""
    return {path for node in _walk(parse(text)) if (path := _path(node))}


def calls(text: str) -> set[str]:
    """Names of the functions that one expression calls."""
    return {node[1] for node in _walk(parse(text)) if node[0] == "call"}


def inline(text: str) -> list[str]:
    """The expressions inside a text, without their braces."""
    return INLINE.findall(text)


def truth(value: Any) -> bool:
    """GitHub's notion: false, 0, the empty string and null are false; lists and objects are true."""
    return True if isinstance(value, list | dict) else bool(value)


def shown(value: Any) -> str:
    """A value inside a text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | dict):
        return json.dumps(value, indent=2)
    return f"{value:.15g}" if isinstance(value, float) else str(value)


class _Parser:
    LEVELS = (("||",), ("&&",), ("==", "!="), ("<", ">", "<=", ">="))

    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.at = text.strip(), list(_tokens(text)), 0

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> tuple[str, str]:
        if self.at >= len(self.tokens) or (expected and self.peek() != expected):
            raise ExpressionError(f"{self.text!r}: {expected or 'a value'} expected, found {self.peek() or 'the end'}")
        self.at += 1
        return self.tokens[self.at - 1]

    def binary(self, level: int) -> Node:
        if level == len(self.LEVELS):
            return self.unary()
        node = self.binary(level + 1)
        while self.peek() in self.LEVELS[level] and self.tokens[self.at][0] == "operator":
            node = ("binary", self.take()[1], node, self.binary(level + 1))
        return node

    def unary(self) -> Node:
        if self.peek() == "!":
            self.take()
            return ("not", self.unary())
        return self.postfix(self.primary())

    def primary(self) -> Node:
        kind, text = self.take()
        if kind == "number":
            return ("literal", float(int(text, 16)) if "0x" in text else float(text))
        if kind == "string":
            return ("literal", text[1:-1].replace("''", "'"))
        if kind == "name" and self.peek() == "(":
            return ("call", text, *self.arguments())
        if kind == "name":
            return ("literal", LITERALS[text]) if text in LITERALS else ("context", text)
        if text == "(":
            node = self.binary(0)
            self.take(")")
            return node
        raise ExpressionError(f"{self.text!r}: unexpected {text!r}")

    def arguments(self) -> list[Node]:
        self.take("(")
        found: list[Node] = []
        while self.peek() != ")":
            if found:
                self.take(",")
            found.append(self.binary(0))
        self.take(")")
        return found

    def postfix(self, node: Node) -> Node:
        while self.peek() in (".", "["):
            if self.take()[1] == "[":
                node = ("index", node, self.binary(0))
                self.take("]")
                continue
            kind, name = self.take()
            if kind != "name" and name != "*":
                raise ExpressionError(f"{self.text!r}: a name expected after the dot, found {name!r}")
            node = ("each", node) if name == "*" else ("index", node, ("literal", name))
        return node


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    text = text.strip()
    at = 0
    while at < len(text):
        found = TOKEN.match(text, at)
        if not found or not found.lastgroup:
            raise ExpressionError(f"{text!r}: unreadable at {text[at : at + 12]!r}")
        yield found.lastgroup, found[found.lastgroup]
        at = found.end()


def _walk(node: Node) -> Iterator[Node]:
    yield node
    path = _path(node)
    for part in node[1:] if not path else ():
        if isinstance(part, tuple):
            yield from _walk(part)


def _path(node: Node) -> tuple[str, ...]:
    if node[0] == "context":
        return (node[1],)
    if node[0] == "each" and (below := _path(node[1])):
        return (*below, "*")
    if node[0] == "index" and node[2][0] == "literal" and (below := _path(node[1])):
        return (*below, shown(node[2][1]))
    return ()


def _value(node: Node, context: Mapping[str, Any], functions: Functions) -> Any:
    kind = node[0]
    if kind == "literal":
        return node[1]
    if kind == "context":
        if node[1] not in context:
            raise ExpressionError(f"no context {node[1]!r} here; known: {', '.join(sorted(context))}")
        return context[node[1]]
    if kind == "not":
        return not truth(_value(node[1], context, functions))
    if kind == "call":
        if node[1] not in functions:
            raise ExpressionError(f"no function {node[1]!r} here; known: {', '.join(sorted(functions))}")
        return functions[node[1]](*(_value(part, context, functions) for part in node[2:]))
    if kind == "binary":
        return _binary(node, context, functions)
    return _member(node, context, functions)


def _member(node: Node, context: Mapping[str, Any], functions: Functions) -> Any:
    owner = _value(node[1], context, functions)
    if node[0] == "each":
        return list(owner.values()) if isinstance(owner, dict) else list(owner or [])
    key = _value(node[2], context, functions)
    if node[1][0] == "each":
        return [_lookup(item, key) for item in owner]
    return _lookup(owner, key)


def _lookup(owner: Any, key: Any) -> Any:
    if owner is None or isinstance(owner, Open):
        found = Open(owner or {}).get(shown(key))
        return Open(found) if isinstance(found, dict) else found
    if isinstance(owner, list):
        return owner[int(key)] if 0 <= key < len(owner) else None
    if not isinstance(owner, dict) or shown(key) not in owner:
        names = ", ".join(owner) if isinstance(owner, dict) else type(owner).__name__
        raise ExpressionError(f"no {shown(key)!r} here; known: {names or 'nothing'}")
    return owner[shown(key)]


def _binary(node: Node, context: Mapping[str, Any], functions: Functions) -> Any:
    operator = node[1]
    left = _value(node[2], context, functions)
    if operator in ("&&", "||"):
        return left if truth(left) == (operator == "||") else _value(node[3], context, functions)
    left, right = _comparable(left, _value(node[3], context, functions))
    if operator in ("==", "!="):
        return (left == right) == (operator == "==")
    return {"<": left < right, ">": left > right, "<=": left <= right, ">=": left >= right}[operator]


def _comparable(left: Any, right: Any) -> tuple[Any, Any]:
    """Strings are compared without case; values of two types as numbers."""
    if isinstance(left, str) and isinstance(right, str):
        return left.casefold(), right.casefold()
    if isinstance(left, list | dict) or isinstance(right, list | dict):
        return id(left), id(right)
    return _number(left), _number(right)


def _number(value: Any) -> float:
    if isinstance(value, str):
        try:
            return float(value) if value.strip() else 0.0
        except ValueError:
            return float("nan")
    return float(value or 0)


def _contains(where: Any, what: Any) -> bool:
    if isinstance(where, list):
        return any(_comparable(item, what)[0] == _comparable(item, what)[1] for item in where)
    return shown(what).casefold() in shown(where).casefold()


def _format(pattern: Any, *values: Any) -> str:
    return re.sub(r"\{(\d+)\}", lambda found: shown(values[int(found[1])]), shown(pattern))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "contains": _contains,
    "startsWith": lambda text, start: shown(text).casefold().startswith(shown(start).casefold()),
    "endsWith": lambda text, end: shown(text).casefold().endswith(shown(end).casefold()),
    "format": _format,
    "join": lambda items, glue=",": shown(glue).join(map(shown, items)),
    "toJSON": lambda value: json.dumps(value, indent=2),
    "fromJSON": lambda text: json.loads(text),
}
