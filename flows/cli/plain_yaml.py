"""Parses YAML that somebody else wrote into plain data, or says in which line it is not."""

from typing import Any

import yaml

from rlhf_core.errors import ConfigError

# What aliases and merge keys may expand to: a few lines that refer to each other can mean billions.
MOST_NODES, DEEPEST = 20_000, 50


def parse_yaml(text: str, name: str) -> tuple[yaml.Node | None, Any]:
    """The node tree, which knows the line of everything, and its plain data; None without content.

    Raises: ConfigError that begins with `name` and the line.
    """
    try:
        loader = _Loader(text)
        loader.name = name
        tree = loader.get_single_node()
        if tree is None:
            return None, None
        _require_small(tree, name)
        return tree, loader.construct_document(tree)
    except RecursionError:
        raise ConfigError(
            f"{name}: the YAML is nested too deeply; settings are {DEEPEST} deep at most."
        ) from None
    except yaml.constructor.ConstructorError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(
            f"{name}: the YAML value{line} cannot be read: {error.problem}."
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{name}{line}: this is not valid YAML ({error.problem}); "
            "check the indentation, colons and quotes there."
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"{name}: this is not valid YAML ({str(error).splitlines()[0]})."
        ) from None


class _Loader(yaml.SafeLoader):
    """A safe loader, in which no tag creates an object, that also rejects duplicate keys.

    What a value that does not fit its tag raises (`!!int abc`, `!!timestamp x`, 2020-13-45) is an
    error of the line.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and first.setdefault(key.value, key) is not key:
                raise ConfigError(
                    f"{self.name}:{key.start_mark.line + 1}: {key.value!r} is a duplicate of line "
                    f"{first[key.value].start_mark.line + 1}: keep one of them."
                )
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise _not_valid(
                node, f"is not a valid {node.tag.rpartition(':')[2]}: {error}"
            ) from error
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise _not_valid(node, "has half of a surrogate pair, which is not a character")
        return value


def _not_valid(node: yaml.Node, reason: str) -> yaml.MarkedYAMLError:
    shown = repr(node.value[:60]) if isinstance(node, yaml.ScalarNode) else "the value"
    return yaml.MarkedYAMLError(problem=f"{shown} {reason}", problem_mark=node.start_mark)


def _require_small(tree: yaml.Node, name: str) -> None:
    """Raise ConfigError when the tree, with all that its aliases repeat, is huge or endless."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        line = node.start_mark.line + 1
        if depth > DEEPEST:
            raise ConfigError(f"{name}:{line}: nested more than {DEEPEST} deep, or within itself.")
        if id(node) not in sizes:
            parts = []
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                parts = node.value
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
        if sizes[id(node)] > MOST_NODES:
            raise ConfigError(
                f"{name}:{line}: this expands to more than {MOST_NODES:,} values; write what is "
                "needed without aliases (*) and merge keys (<<)."
            )
        return sizes[id(node)]

    size(tree, 0)
