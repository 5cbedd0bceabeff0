"""Counts the bytes of live tensors, to prove that a large tensor never exists or is not kept."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside the context: live `now`, `most` at a time, the `largest` tensor."""

    def __init__(self):
        super().__init__()
        self.now = self.most = self.largest = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_iter((args, kwargs)) if isinstance(tensor, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known and self._known[key]() is storage:
            return

        def gone(_):
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most, self.largest = max(self.most, self.now), max(self.largest, size)
