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
        helps = [_help(value, cls.module) for value in values]
        comments = [cls.members[name].source.partition("  # ")[2] or name.replace("_", " ") for name in names]
        fields = [f"    {name}: {help or comment}" for name, help, comment in zip(names, helps, comments, strict=True)]
        if fields:
            text = cls.docstring.value if cls.docstring else ""
            cls.docstring = griffe.Docstring("\n".join([text, "", "Attributes:", *fields]), parent=cls, parser="google")


def _kinds(node):
    """Names of what a class derives from and of its decorators."""
    marks = [*node.bases, *(getattr(call, "func", call) for call in node.decorator_list)]
    return {mark.id for mark in marks if isinstance(mark, ast.Name)}


def _help(value, module):
    """The help of `arg` and the like, its bounds and its default; the help itself says what a default of None means."""
    kind = getattr(value.func, "id", None) if isinstance(value, ast.Call) else None
    if kind not in ("arg", "required", "random_seed"):
        return None
    names = {node.id for node in ast.walk(value.args[-1]) if isinstance(node, ast.Name)}
    constants = {name: eval(str(module[name].value)) for name in names}
    *default, text = map(ast.unparse, value.args)
    default += ["0"] if kind == "random_seed" else []
    text = eval(text, constants)  # a string, or an f-string of the module's constants
    bounds = [f"{bound.arg} {ast.unparse(bound.value)}.".capitalize().replace("_", " ") for bound in value.keywords]
    return " ".join([text, *bounds, *(f"Default: `{value}`." for value in default if value != "None")])
