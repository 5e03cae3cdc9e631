"""mypy plugin: what the house does at run time, told to the type checker.

Methods that fastcore's `@patch` adds to a class of the same file are members of that class; a `Policy` has the
fields of its configuration; `@reward(…)` makes a reward of a function.

A type checker sees `@patch def fit(self:Trainer): …` as a function beside the class, and would call every
`trainer.fit` unknown. Before mypy looks at a file, this moves such functions into the body of their class, where
Python's `patch` puts them when the file is run.
"""

from mypy.nodes import CallExpr, ClassDef, Decorator, MypyFile, NameExpr, Var
from mypy.plugin import Plugin
from mypy.types import AnyType, TypeOfAny, UnboundType

REWARD = 'drl_toolkit.rewards.reward.reward'
POLICY, CONFIG = 'drl_toolkit.sampling.policy.Policy', 'drl_toolkit.sampling.config.PolicyConfig'


def is_patch(
    decorator,  # expression
):
    "Whether it is `@patch` or `@patch(…)`."
    name = decorator.callee if isinstance(decorator, CallExpr) else decorator
    return isinstance(name, NameExpr) and name.name == 'patch'


def kind_of(
    decorator,  # `@patch` or `@patch(…)`
):
    "The decorator that a method in a class would have in its place; None for a plain method."
    options = decorator.arg_names if isinstance(decorator, CallExpr) else []
    kind = 'property' if 'as_prop' in options else 'classmethod' if 'cls_method' in options else None
    if kind is None:
        return None
    name = NameExpr(kind)
    name.set_line(decorator)
    return name


def owner(
    function,  # `FuncDef`
):
    "The class that its first parameter is annotated with."
    annotation = function.arguments[0].type_annotation if function.arguments else None
    return annotation.name if isinstance(annotation, UnboundType) else None


def method(
    node,  # `Decorator` of a patched function
    decorator,  # its `@patch`
):
    "The function as it would stand in its class."
    others = [d for d in node.decorators if d is not decorator]
    kind = kind_of(decorator)
    node.func.arguments[0].type_annotation = None
    if node.func.unanalyzed_type:
        node.func.unanalyzed_type.arg_types[0] = any_type(node)
    if node.func.type:
        node.func.type.arg_types[0] = any_type(node)
    if kind:
        others.insert(0, kind)
    if not others:
        node.func.is_decorated = False
        return node.func
    node.decorators = others
    node.original_decorators = others.copy()
    return node


def any_type(
    node,  # where
):
    "The type of a parameter without annotation: what `self` has in a class."
    return AnyType(TypeOfAny.unannotated, line=node.line)


class PatchPlugin(Plugin):
    "Moves patched methods into their classes."

    def get_additional_deps(
        self,
        file: MypyFile,  # as parsed
    ):
        "Called once for every file, before its names are resolved. Adds no dependency."
        classes = {node.name: node for node in file.defs if isinstance(node, ClassDef)}
        kept = []
        for node in file.defs:
            decorator = next(filter(is_patch, node.decorators), None) if isinstance(node, Decorator) else None
            home = classes.get(owner(node.func)) if decorator else None
            if home is None:
                kept.append(node)
            else:
                home.defs.body.append(method(node, decorator))
        file.defs = kept
        return []

    def get_function_hook(self, fullname):
        "`@reward(level='group')` is called with the function afterwards."
        return maybe_decorator if fullname == REWARD else None

    def get_customize_class_mro_hook(self, fullname):
        "Of a policy."
        return with_fields if fullname == POLICY else None


def maybe_decorator(
    context,  # of a call of `reward`
):
    "A reward where a function was given, else anything that can be called."
    return context.default_return_type if context.args[0] else AnyType(TypeOfAny.special_form)


def with_fields(
    context,  # of the class
):
    "`vars(self).update(vars(self.config))`: the fields of the configuration are attributes of the policy."
    config = context.api.lookup_fully_qualified_or_none(CONFIG)
    for name, symbol in config.node.names.items() if config and config.node else ():
        if isinstance(symbol.node, Var) and name not in context.cls.info.names:
            context.cls.info.names[name] = symbol


def plugin(version):
    "What mypy asks a plugin's module for."
    return PatchPlugin
