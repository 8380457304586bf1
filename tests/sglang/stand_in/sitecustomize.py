"""Lets torchvision's wheel, built for CUDA, be imported beside a CPU torch.

Its `_C.so` cannot be loaded then, and its Python half asks for the schemas of two ops. They are declared just before
its import; nothing calls them.
"""

import sys
from importlib.abc import MetaPathFinder


class _DeclareOpsFirst(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for op in ("nms", "qnms"):
                self.library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].keep_alive = self  # a collected library takes its schemas along
        return None


sys.meta_path.insert(0, _DeclareOpsFirst())
