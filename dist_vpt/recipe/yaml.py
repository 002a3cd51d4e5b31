"""YAML as recipes are written in it."""

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """Safe YAML without duplicate keys: keys and dates are strings; 1e-3 is a number (YAML 1.1 wants 1.0e-3)."""

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
SHORT_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != YAML_TAG + "timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(YAML_TAG + "float", SHORT_FLOAT, list("-+0123456789."))
Dumper.add_implicit_resolver(YAML_TAG + "float", SHORT_FLOAT, list("-+0123456789."))
