"""What a real SGLang server lacks on a machine without a GPU. On the server's PYTHONPATH only."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Adapts torch as soon as it is imported, and is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None
        assert spec.loader is not None
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _adapt(module)

        loader.exec_module = exec_module
        return spec


def _adapt(torch: Any) -> None:
    # torchvision is not installed, and sglang registers fake versions of these operators of its.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.__lockstep_library__ = library  # an operator lives as long as its library

    # Pinned memory needs a GPU, and the capture of routed experts asks for it.
    for name in ("zeros", "empty", "full"):
        make = getattr(torch, name)

        def unpinned(*args: Any, make: Any = make, **options: Any) -> Any:
            options.pop("pin_memory", None)
            return make(*args, **options)

        setattr(torch, name, unpinned)

    # Digests of weights wait for the GPU.
    torch.cuda.synchronize = lambda *_: None


sys.meta_path.insert(0, _AfterTorch())
