"""A device that only pretends to be one: its tensors live in ordinary memory, and it counts what a GPU would wait for.

Code that asks `x.device.type` takes the way it takes on a GPU. Reading a value, counting true elements and copying to
the host would make the program wait for all that the GPU was told to do; copying to the device from ordinary memory
makes it wait as well. All of these pass through PyTorch's dispatcher, where `Pretend` sees and counts them.
"""
import traceback
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_waits = {'_local_scalar_dense', 'nonzero', 'masked_select', 'equal', 'is_nonzero', 'unique', '_unique2',
          'repeat_interleave', 'bincount'}


class Elsewhere(torch.Tensor):
    "A tensor of the pretended device; `inner` holds its numbers."
    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(cls, inner.size(), strides=inner.stride(), dtype=inner.dtype,
            storage_offset=inner.storage_offset(), device='pretend:0')
        self.inner = inner
        return self
    def __repr__(self): return f'Elsewhere({self.inner!r})'
    def tolist(self): return self.cpu().tolist()
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None): return run(f, args, kwargs or {})


def is_pretend(device): return device is not None and torch.device(device).type == 'pretend'


def inside(x): return x.inner if isinstance(x, Elsewhere) else x


def run(f, args, kwargs):
    "An operation on the numbers themselves; results belong to the device that the operation is about."
    leaves = tree_leaves((args, kwargs))
    given = kwargs.get('device')
    there = is_pretend(given) if given is not None else any(isinstance(x, Elsewhere) for x in leaves)
    if given is not None and is_pretend(given): kwargs = kwargs | dict(device='cpu')
    kwargs = {k: v for k, v in kwargs.items() if k != 'pin_memory'}
    made = f(*tree_map(inside, args), **tree_map(inside, kwargs))
    if f._schema.is_mutable:                               # in place, or into `out`: what was given is what comes back
        known = {id(inside(x)): x for x in leaves if isinstance(x, Elsewhere)}
        return tree_map(lambda x: known.get(id(x), x), made)
    wrap = there and f is not torch.ops.aten._local_scalar_dense.default
    if not wrap: return made
    if f is torch.ops.aten._to_copy.default and any(isinstance(x, torch.Tensor) and made is x for x in leaves):
        made = made.clone()
    return tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) else x, made)


class Pretend(TorchDispatchMode):
    "While it is on, there is a device `pretend`; `waits` lists what would wait, with the line that asked."
    active = 0 # how many are on: otherwise PyTorch must not believe in the device
    def __init__(self):
        super().__init__()
        self.waits, self.counting = [], True

    def __enter__(self):
        Pretend.active += 1
        return super().__enter__()

    def __exit__(self, *args):
        Pretend.active -= 1
        return super().__exit__(*args)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.counting and (why := self.would_wait(f, args, kwargs)): self.waits.append((why, who()))
        return run(f, args, kwargs)

    def would_wait(self, f, args, kwargs):
        name = f._schema.name.removeprefix('aten::')
        there = [isinstance(x, Elsewhere) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name in ('_to_copy', 'copy_'):
            source = args[1] if name == 'copy_' else args[0]
            target = isinstance(args[0], Elsewhere)
            if name == '_to_copy': target = is_pretend(kwargs.get('device', source.device))
            crosses = isinstance(source, Elsewhere) != target
            if crosses and not kwargs.get('non_blocking', name == 'copy_' and len(args) > 2 and args[2]):
                return 'copy to the device' if target else 'copy from the device'
            return None
        if name in _waits and any(there): return name
        if name.startswith('index') and self.indexed_by_bool(args): return f'{name} by true and false'
        return None

    @staticmethod
    def indexed_by_bool(args):
        if len(args) < 2 or not isinstance(args[1], (list, tuple)): return False
        return any(isinstance(x, Elsewhere) and x.dtype == torch.bool for x in args[1])

    @contextmanager
    def not_counted(self):
        before, self.counting = self.counting, False
        try: yield
        finally: self.counting = before


def who():
    "The nearest lines of the library or of fastai."
    lines = [f for f in traceback.extract_stack()
             if 'pretend.py' not in f.filename and 'site-packages/torch' not in f.filename]
    return ' < '.join(f'{f.filename.rsplit("/", 1)[-1]}:{f.lineno} {f.name}' for f in reversed(lines[-4:]))


class _Module:
    "What PyTorch asks of a device's module."
    def device_count(self): return Pretend.active
    def is_available(self): return Pretend.active > 0
    def current_device(self): return 0
    def is_initialized(self): return True
    def _lazy_init(self): pass
    def _is_in_bad_fork(self): return False
    def manual_seed_all(self, seed): pass
    def get_amp_supported_dtype(self): return [torch.bfloat16, torch.float16]
    def get_rng_state(self, device=None): return torch.empty(0, dtype=torch.uint8)
    def set_rng_state(self, state, device=None): pass
    def synchronize(self, device=None): pass


def register():
    "Once in a process."
    if torch._C._get_privateuse1_backend_name() == 'pretend': return
    from torch.utils.backend_registration import _DummyPrivateUse1Hook, _setup_privateuseone_for_python_backend
    class Hook(_DummyPrivateUse1Hook):
        def is_available(self): return Pretend.active > 0
    _setup_privateuseone_for_python_backend('pretend', backend_module=_Module(), hook=Hook())


def waits_per_step(learn, steps=4, lr=.1, views=True, **kwargs):
    """Train some steps on the pretended device: for each step what would wait, from its batch to the next.
    Without `views`, what happens while the views are made is left out. Nor is the first step there."""
    from fastai.callback.core import Callback, CancelFitException
    class Mark(Callback):
        order = 1000
        def after_batch(self):
            found.append(list(mode.waits))
            mode.waits.clear()
            if len(found) == steps: raise CancelFitException
    found = []
    learn.dls.to(torch.device('pretend:0'))
    with Pretend() as mode:
        if not views:
            make = learn.views.make
            def uncounted(*args):
                with mode.not_counted(): return make(*args)
            learn.views.make = uncounted
        learn.model.to('pretend')
        learn.fit(100, lr=lr, cbs=[Mark()], **kwargs)
    return found[1:]
