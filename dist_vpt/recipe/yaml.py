"""YAML as recipes are written in it."""

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """Safe YAML without duplicate keys: keys and dates are strings; 1e-3 is a number (YAML 1.1 wants 1.0e-3).

    010 and 1:30 are text, which no number accepts: YAML 1.1 reads them as 8 and 90.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != YAML_TAG + "merge":
                key.tag = YAML_TAG + "str"
                if key.value in keys:
                    message = f"duplicate key {key.value}; keep one of the two"
                    raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
                keys.add(key.value)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes the strings that Loader would read as numbers."""


YAML_TAG = "tag:yaml.org,2002:"
REPLACED = ("timestamp", "int", "float")
INT = re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$")
FLOAT = re.compile(r"^([-+]?[0-9][0-9_]*\.[0-9_]*|[-+]?\.[0-9][0-9_]*|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
SHORT_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(YAML_TAG) not in REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(YAML_TAG + "int", INT, list("-+0123456789"))
Loader.add_implicit_resolver(YAML_TAG + "float", FLOAT, list("-+0123456789."))
Loader.add_implicit_resolver(YAML_TAG + "float", SHORT_FLOAT, list("-+0123456789."))
Dumper.add_implicit_resolver(YAML_TAG + "float", SHORT_FLOAT, list("-+0123456789."))
