"""YAML that others wrote, read with limits: what is nested too deep, stands twice or grows without end is refused."""

from __future__ import annotations

import re
from typing import Any

import yaml

from errors import UserError

MOST_NODES = 100_000  # of a YAML file, its aliases written out; our largest recipe has 200


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, and aliases that contain themselves or grow beyond MOST_NODES."""

    def compose_document(self) -> yaml.Node:
        """Return the document's node. Raise MarkedYAMLError for what this class refuses."""
        node = super().compose_document()
        check_node(node, {})
        return node


class RecipeLoader(StrictLoader):
    """Reads 010 and 1:30 as texts: YAML 1.1 makes the numbers 8 and 90 of them, which nobody means in a flag."""


OCTAL_OR_SEXAGESIMAL = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
RecipeLoader.yaml_implicit_resolvers = {None: [], **StrictLoader.yaml_implicit_resolvers}
for first in "-+0123456789":
    others = StrictLoader.yaml_implicit_resolvers[first]
    RecipeLoader.yaml_implicit_resolvers[first] = [("tag:yaml.org,2002:str", OCTAL_OR_SEXAGESIMAL), *others]


def check_node(node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
    """Return how many nodes there are in one, aliases written out. Raise MarkedYAMLError for what StrictLoader refuses.

    sizes: of the nodes met so far, 0 for one that is still being counted.
    """
    if node in sizes:
        size = sizes[node]
        if not size:
            raise yaml.MarkedYAMLError(problem="an alias that contains itself", problem_mark=node.start_mark)
        return size
    sizes[node], size = 0, 1
    if isinstance(node, yaml.MappingNode):
        names = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
            names.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            size += check_node(key, sizes) + check_node(value, sizes)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(check_node(one, sizes) for one in node.value)
    if size > MOST_NODES:
        raise yaml.MarkedYAMLError(problem=f"more than {MOST_NODES} values with its aliases", problem_mark=node.start_mark)
    sizes[node] = size
    return size


def parse_yaml(text: str, path: object, loader: type[StrictLoader] = RecipeLoader) -> list[Any]:
    """Return the documents in a YAML text. Raise UserError with ``path`` and the line for what is none."""
    try:
        return list(yaml.load_all(text, loader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise UserError(f"{path}{where}: not valid YAML ({' '.join(reason.split())}).") from error
    except ValueError as error:  # a date that no calendar has, a number of 6,000 digits
        raise UserError(f"{path}: not valid YAML ({error}).") from error
    except RecursionError:
        raise UserError(f"{path}: not valid YAML (nested too deep).") from None
