"""A GPU that is not there: tensors that say they lie on 'cuda:0', compute on the CPU, and refuse to be mixed with the
CPU's.

What goes wrong first on a real GPU is a tensor left behind on the other side. PyTorch's own check of that needs the
hardware; this one does not. Inside `fake_cuda()` a tensor made on, or moved to, 'cuda' is a `Far`. Every operation
looks at where its tensors lie, by the rules of a real GPU: numbers without dimensions may come from the CPU, so may
indices, and `copy_` goes anywhere; all else must lie in one place, and NumPy takes no tensor of the GPU."""

import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA, CPU = torch.device('cuda', 0), torch.device('cpu')
aten = torch.ops.aten
MIXED = {aten.copy_.default, aten._foreach_copy_.default}  # may go from one side to the other
INDEXED = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}  # the first argument decides


class Far(torch.Tensor):
    "A tensor on the GPU that is not there; `elem` holds its numbers."

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = CUDA, True, False

    @staticmethod
    def __new__(cls, elem):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=elem.device,
            requires_grad=elem.requires_grad,
        )

    def __init__(self, elem):
        self.elem = elem

    def __repr__(self):
        return f"{self.elem!r}, device='{CUDA}'"

    def __format__(self, spec):
        return self.elem.__format__(spec)

    def to(self, *args, **kwargs):
        return move(self, args, kwargs)

    def cpu(self):
        return Fetch.apply(self)

    def cuda(self):
        return self

    def new_tensor(self, *args, **kwargs):
        return Send.apply(self.elem.new_tensor(*args, **kwargs))

    def storage(self):
        return self.elem.storage()

    def untyped_storage(self):
        return self.elem.untyped_storage()

    def data_ptr(self):
        return self.elem.data_ptr()

    def tolist(self):
        return self.elem.tolist()

    def numpy(self, **options):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        check(func, args, kwargs)
        out = func(*numbers(args), **numbers(kwargs))
        refuse_float64(func, out)
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, Far, out))


def numbers(tree):
    return tree_map_only(Far, lambda t: t.elem, tree)


def check(func, args, kwargs):
    "Refuse tensors of both sides in one operation."
    if func in MIXED:
        return
    seen = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if func in INDEXED and isinstance(args[0], Far):
        seen = [
            t for t in (args[0], *args[2:]) if isinstance(t, torch.Tensor)
        ]  # its indices may be the CPU's
    near = [tuple(t.shape) for t in seen if not isinstance(t, Far) and (t.dim() or func in INDEXED)]
    if near:
        raise RuntimeError(
            'Expected all tensors to be on the same device, but found at least two devices, cuda:0 and '
            f'cpu! ({func}; on the CPU are shapes {near})'
        )


LIBRARIES = ('diffusers', 'transformers')  # ask for the device's kind themselves, and this one is a CUDA


def refuse_float64(func, out):
    "As Apple's GPUs do, and some of Intel's; whoever asks for it but `LIBRARIES`."
    if not any(
        isinstance(t, torch.Tensor) and t.dtype == torch.float64 and t.dim() for t in tree_leaves(out)
    ):
        return
    frame = sys._getframe(1)
    while frame and not {'drl_toolkit', 'tests', *LIBRARIES} & set(
        Path(frame.f_code.co_filename).parts[:-1] if frame.f_code.co_filename != __file__ else ()
    ):
        frame = frame.f_back
    if frame and set(LIBRARIES) & set(Path(frame.f_code.co_filename).parts):
        return
    raise TypeError(f'Cannot convert a tensor to float64 dtype as the device does not support it ({func})')


WHOLE = {
    torch.quantile,
    torch.Tensor.quantile,
    torch.nn.functional.one_hot,
}  # written in C++ with tensors of their own, whose place this class cannot tell


class Send(torch.autograd.Function):
    "To the GPU that is not there."

    @staticmethod
    def forward(ctx, x):
        return Far(x.detach().clone())

    @staticmethod
    def backward(ctx, g):
        return g.elem


class Fetch(torch.autograd.Function):
    "And back."

    @staticmethod
    def forward(ctx, x):
        return x.elem.detach().clone()

    @staticmethod
    def backward(ctx, g):
        return Far(g)


def is_far(device):
    return isinstance(device, (str, torch.device)) and torch.device(device).type == 'cuda'


def move(x, args, kwargs):
    "What `Tensor.to` does, wherever the tensor is and goes."
    if isinstance(args[0] if args else None, torch.Tensor):
        args = args[0].device, args[0].dtype
    device, dtype, _, layout = torch._C._nn._parse_to(
        *args, **{k: v for k, v in kwargs.items() if k != 'copy'}
    )
    if device is not None and is_far(device) != isinstance(x, Far):
        x = (Send if is_far(device) else Fetch).apply(x)
    x = x if dtype in (None, x.dtype) else x.type(dtype)
    return x.contiguous(memory_format=layout) if layout else x


class Calls(TorchFunctionMode):
    "Calls that name the device are answered here, since there is no CUDA to ask."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            return move(args[0], args[1:], kwargs)
        if func in WHOLE and isinstance(args[0], Far):
            return Far(func(*numbers(args), **numbers(kwargs)))
        if func is torch.Tensor.cuda:
            return move(args[0], (CUDA,), {})
        if func is torch._C._nn._parse_to or not is_far(kwargs.get('device')):
            return func(*args, **kwargs)
        return Send.apply(func(*numbers(args), **numbers(kwargs) | dict(device=CPU)))


@contextmanager
def fake_cuda():
    "Inside this context 'cuda' is a device."
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(
        True
    )  # a module that moves gets new parameters, since these are of another class
    try:
        with Calls():
            yield CUDA
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
