"""`groundingdino.util.slconfig` of IDEA-Research/GroundingDINO: the values of a config file, which is not run."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class SLConfig:
    """Values by attribute or key."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self.__dict__.update(values or {})

    @classmethod
    def fromfile(cls, filename: str | Path) -> "SLConfig":
        """The assignments of plain values in a Python file. ValueError where it cannot be read."""
        try:
            tree = ast.parse(Path(filename).read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{filename}: not a config file ({error})") from error
        values: dict[str, Any] = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                try:
                    values[node.targets[0].id] = ast.literal_eval(node.value)
                except ValueError:
                    continue  # an expression, which is not run
        return cls(values)

    def __getitem__(self, name: str) -> Any:
        return self.__dict__[name]

    def __contains__(self, name: str) -> bool:
        return name in self.__dict__

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or `default` where there is none."""
        return self.__dict__.get(name, default)
