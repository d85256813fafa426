"""Import hook that lets `import torchvision` work beside a CPU build of torch.

torchvision's registry wheel is compiled against CUDA libraries; beside a CPU torch its compiled part does not load and the
import dies with "operator torchvision::nms does not exist". Python transforms need none of the compiled operators: defining
the two operator schemas first is enough. vLLM, transformers and open_clip import torchvision in child processes, so
cluster/bootstrap.sh copies this file into site-packages with a .pth line, and only where the plain import fails. The hook is
lazy: a process that never imports torchvision pays nothing.
"""

import importlib.abc
import sys

_library = None  # keeps the operator fragment alive


class _DefineOperatorsFirst(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        global _library
        if fullname == "torchvision" and _library is None:
            sys.meta_path.remove(self)
            import torch

            _library = torch.library.Library("torchvision", "FRAGMENT")
            _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _DefineOperatorsFirst())
