"""cada-deploy: adapt, export, pseudo-label and run semantic segmentation models.

The public names are few and lazy: `load`, `ModelSpec`, `ClassSet` and `__version__`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cada_deploy.classes import ClassSet as ClassSet
    from cada_deploy.model_spec import ModelSpec as ModelSpec
    from cada_deploy.predictor import load as load

__version__ = "0.1.0"
__all__ = ["ClassSet", "ModelSpec", "__version__", "load"]

_HOMES = {
    "load": "cada_deploy.predictor",
    "ModelSpec": "cada_deploy.model_spec",
    "ClassSet": "cada_deploy.classes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cada_deploy' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
