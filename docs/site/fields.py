"""Reads the fields' explanations for the API reference, so that the code need not say them twice.

    clip: float = arg(0.2, "The clip.", above=0)    has the default 0.2 and the docstring "The clip. (above 0)"
    kept: Tensor | None  # [N], what was kept       has the docstring "[N], what was kept"
"""

import ast

import griffe


class Fields(griffe.Extension):
    def on_attribute_instance(self, *, node, attr, **kwargs):
        if not isinstance(node, ast.AnnAssign) or not isinstance(attr.parent, griffe.Class):
            return
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ("arg", "required"):
            *default, text = call.args
            attr.value = ast.unparse(default[0]) if default else None
            bounds = [f"{bound.arg} {ast.unparse(bound.value)}" for bound in call.keywords]
            text = ast.literal_eval(text) + (f" ({', '.join(bounds)})" if bounds else "")
        else:
            text = attr.source.partition("  # ")[2]
        if text:
            attr.docstring = griffe.Docstring(text, parent=attr)
