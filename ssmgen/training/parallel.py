"""Sharded training (FSDP2): each process keeps a part of every weight, of its average and of the optimiser's state.

This calls torch's `fully_shard` and not accelerate's plugin: accelerate chooses FSDP once per Python process and never
on a CPU, wraps by the name of a class, and cannot gather a block's weights for methods other than ``forward``.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ssmgen.weights import copy_whole, full_tensor, tensors_of, unwrapped


def check_parallel(model: nn.Module, settings: Any) -> None:
    """Reject a model that cannot be trained with the settings ``shard`` and ``checkpoint_activations``.

    Raises:
        ValueError: it does not name its blocks, or is compiled and to be sharded.
    """
    inner = unwrapped(model)
    for name, needed in (("shard", "fsdp_units"), ("checkpoint_activations", "checkpoint_activations")):
        if getattr(settings, name) and not hasattr(inner, needed):
            raise ValueError(
                f"{name}=True works block by block, and {type(inner).__name__} has no {needed!r} as "
                f"ssmgen.models.ConditionalModel has: derive the model from that class, or leave {name} False"
            )
    if settings.shard and inner is not model:
        raise ValueError(f"shard=True needs the model itself, got it inside {type(model).__name__}: do not compile it")


def set_rank_slice(model: nn.Module, accelerator: Any) -> None:
    """Tell the conditions which items of a batch this process sees; their dropout is drawn for all of them."""
    module: Any
    for module in unwrapped(model).modules():
        if hasattr(module, "share"):
            module.share = (accelerator.process_index, accelerator.num_processes)


def shard(model: nn.Module, accelerator: Any) -> None:
    """Divide the weights of a model among the processes, in place. All processes get those of the first."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    marks = {name: vars(parameter) for name, parameter in model.named_parameters()}
    for tensor in tensors_of(model).values():
        source = tensor.to(accelerator.device)
        torch.distributed.broadcast(source, 0)
        tensor.copy_(source)
    for module, methods in model.fsdp_units():  # type: ignore[operator]
        fully_shard(module, mesh=mesh)
        for name in methods:
            register_fsdp_forward_method(module, name)
    fully_shard(model, mesh=mesh)
    for name, parameter in model.named_parameters():  # which are new ones, without the mark `no_weight_decay`
        vars(parameter).update(marks[name])
    # What a block derives from a condition holds views. No layer changes them in place, which is what torch warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` divided the weights of this model."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


@contextmanager
def whole_model(model: nn.Module, outline: nn.Module | None, device: torch.device) -> Iterator[nn.Module]:
    """The model in one piece; all processes must call this if it is sharded.

    Args:
        model: the model, sharded or not. If it is not, it is returned itself.
        outline: a model of the same kind that receives the weights; where it is None, ``model`` is returned.
        device: where ``outline`` is while the context lasts; afterwards it is on the CPU.
    """
    if not is_sharded(model):
        yield model
        return
    own = {} if outline is None else tensors_of(outline)
    for name, tensor in tensors_of(model).items():
        gathered = full_tensor(tensor)
        if outline is not None:
            copy_whole(own[name], gathered)
    try:
        yield model if outline is None else outline.to(device)
    finally:
        if outline is not None:
            outline.cpu()


def host_copy_of(model: nn.Module, accelerator: Any) -> nn.Module | None:
    """A copy on the CPU of the main process that `whole_model` fills; None in the others."""
    return copy.deepcopy(model).cpu() if accelerator.is_main_process else None
