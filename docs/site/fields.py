"""Lists a class's fields in its docstring, for the API reference: the code explains each field where it stands.

clip: float = arg(0.2, "The clip.", above=0)    becomes    clip: The clip. Above 0. Default: `0.2`.
kept: Tensor | None  # [N], what was kept       becomes    kept: [N], what was kept
"""

import ast

import griffe


class Fields(griffe.Extension):
    def on_class_members(self, *, node, cls, **kwargs):
        body = node.body if {"NamedTuple", "dataclass"} & _kinds(node) else []
        names = [line.target.id for line in body if isinstance(line, ast.AnnAssign)]
        values = [line.value for line in body if isinstance(line, ast.AnnAssign)]
        fields = [
            f"    {name}: {_help(value) or cls.members[name].source.partition('  # ')[2] or name.replace('_', ' ')}"
            for name, value in zip(names, values, strict=True)
        ]
        if fields:
            text = cls.docstring.value if cls.docstring else ""
            cls.docstring = griffe.Docstring("\n".join([text, "", "Attributes:", *fields]), parent=cls, parser="google")


def _kinds(node):
    """Names of what a class derives from and of its decorators."""
    marks = [*node.bases, *(getattr(call, "func", call) for call in node.decorator_list)]
    return {mark.id for mark in marks if isinstance(mark, ast.Name)}


def _help(value):
    """What `arg` or `required` says, its bounds and its default; the text itself says what None means."""
    if not isinstance(value, ast.Call) or getattr(value.func, "id", None) not in ("arg", "required"):
        return None
    *default, text = value.args
    bounds = [f"{keyword.arg} {ast.unparse(keyword.value)}".capitalize() + "." for keyword in value.keywords]
    defaults = [f"Default: `{ast.unparse(value)}`." for value in default if ast.unparse(value) != "None"]
    return " ".join([ast.literal_eval(text), *bounds, *defaults])
