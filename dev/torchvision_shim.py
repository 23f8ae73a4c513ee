"""Lets a torchvision wheel built for CUDA import beside a CPU build of torch.

Its compiled operators do not load there, and the import of torchvision fails
on the two that it refers to. This declares them just before that import;
calling them remains an error. dev/setup_env.py installs it, where needed, into
the environment, to be imported at interpreter start.
"""

import sys


class DeclareOperators:
    """An import hook that loads torch no sooner than torchvision."""

    def find_spec(self, name, path=None, target=None):
        if name == 'torchvision':
            sys.meta_path.remove(self)
            from torch.library import define

            signature = '(Tensor dets, Tensor scores, float iou_threshold)'
            for operator in 'nms', 'qnms':
                define(f'torchvision::{operator}', f'{signature} -> Tensor')


sys.meta_path.insert(0, DeclareOperators())
